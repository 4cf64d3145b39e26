"""Devices: what cost models know about the hardware, one validated file each.

A device file is TOML (or the object ``device`` of a JSON file that ``eexform calibrate`` wrote). Units are in the names
of the keys, and every figure has a line in ``[sources]`` that says where it comes from. The bundled ones are in the
folder ``devices``; ``cost_models/devices/rpi4.toml`` is a good one to start from.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from eexform.errors import OptionError, suggest

DTYPES = ("float32", "float16", "int8")
"""Element types that device files know."""


@dataclass(frozen=True)
class Compute:
    """Peak throughput; a multiply-accumulate is two operations.

    Attributes:
        peak_gflops_float32: 10^9 operations per second, all ``threads`` together.
        peak_gflops_float16: the same; ``None`` where there is no arithmetic of that type.
        peak_gops_int8: the same.
        threads: cores that the peaks and the bandwidths are for.
    """

    peak_gflops_float32: float
    peak_gflops_float16: float | None = None
    peak_gops_int8: float | None = None
    threads: int = 1


@dataclass(frozen=True)
class Memory:
    """Attributes: ``bandwidth_gb_per_s`` (10^9 bytes, reads and writes together), the last cache that ``threads`` have
    to themselves and its bandwidth, RAM, and flash of microcontrollers."""

    bandwidth_gb_per_s: float
    cache_kib: float | None = None
    cache_bandwidth_gb_per_s: float | None = None
    ram_bytes: int | None = None
    flash_bytes: int | None = None


@dataclass(frozen=True)
class Calls:
    """What calls cost beside their work.

    Attributes:
        launch_us: one kernel.
        call_us: one run of a network, however small.
        channel_block: channels are computed so many at a time; other counts cost as much as the next multiple.
    """

    launch_us: float = 0.0
    call_us: float = 0.0
    channel_block: int | None = None


@dataclass(frozen=True)
class Efficiency:
    """Share of the peak (``elementwise``: of the bandwidth) that kernels of a class reach."""

    conv: float = 1.0
    depthwise: float = 1.0
    matmul: float = 1.0
    elementwise: float = 1.0


@dataclass(frozen=True)
class Joules:
    """Energy: picojoules per multiply-accumulate and per byte moved; or watts while the network runs."""

    pj_per_mac_float32: float | None = None
    pj_per_mac_int8: float | None = None
    pj_per_byte_ram: float | None = None
    pj_per_byte_cache: float | None = None
    power_w: float | None = None


@dataclass(frozen=True)
class RoutingTimes:
    """What an exit costs beside its head: ``decision_us`` + classes x ``decision_us_per_class`` + KiB of the site's
    value x ``decision_us_per_kib`` for every sample that gets there, ``onward_us`` + KiB of live values x
    ``onward_us_per_kib`` for every one that goes on."""

    decision_us: float
    decision_us_per_class: float = 0.0
    onward_us: float = 0.0
    onward_us_per_kib: float = 0.0
    decision_us_per_kib: float = 0.0


@dataclass(frozen=True)
class Device:
    """A piece of hardware, with what runs on it.

    Attributes:
        name: short, as in ``roofline:device=NAME``.
        title: what it is, for people.
        compute: peaks.
        memory: bandwidths and sizes.
        kernel: what calls cost.
        efficiency: of each class of kernels.
        energy: what operations and bytes cost.
        routing: what exits cost; ``None``: it is derived.
        sources: dotted key -> where the figure comes from.
    """

    name: str
    title: str
    compute: Compute
    memory: Memory
    kernel: Calls = field(default_factory=Calls)
    efficiency: Efficiency = field(default_factory=Efficiency)
    energy: Joules = field(default_factory=Joules)
    routing: RoutingTimes | None = None
    sources: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)

    @classmethod
    def from_json(cls, content: object, where: str) -> Device:
        """A device from plain values.

        Args:
            content: as :meth:`to_json` gives it; a TOML file holds the same.
            where: the file, for messages.

        Raises:
            OptionError: not a table, a key is missing, unknown or has a wrong value, or a figure has no source.
        """
        if not isinstance(content, Mapping):
            raise OptionError(f"{where}: a device is a table of keys, found {type(content).__name__}")
        known = {"name", "title", *_SECTIONS, "sources"}
        for key in content:
            if key not in known:
                raise OptionError(f"{where}: unknown key {key!r}: {suggest(str(key), known)}")
        sections: dict[str, Any] = {
            key: _section(kind, content.get(key), key, where)
            for key, kind in _SECTIONS.items()
            if key in content or key in ("compute", "memory")
        }
        name, title = (_text(content, key, where) for key in ("name", "title"))
        return cls(name, title, **sections, sources=_sources(content, where))

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not known is left out."""
        plain: dict[str, Any] = {"name": self.name, "title": self.title}
        for key in _SECTIONS:
            section = getattr(self, key)
            if section is None:
                continue
            given = {name: value for name, value in dataclasses.asdict(section).items() if self._given(section, name)}
            if given:
                plain[key] = given
        return {**plain, "sources": dict(self.sources)}

    def peak(self, dtype: str) -> float | None:
        """10^9 operations per second for an element type; ``None`` where there is no figure for it."""
        return {
            "float32": self.compute.peak_gflops_float32,
            "float16": self.compute.peak_gflops_float16,
            "int8": self.compute.peak_gops_int8,
        }.get(dtype)

    def assumed(self) -> tuple[str, ...]:
        """Keys that the file leaves out and that have a default which means "costs nothing" or "reaches the peak"."""
        keys = [f"efficiency.{part.name}" for part in dataclasses.fields(Efficiency)]
        return tuple(key for key in ("kernel.launch_us", *keys) if key not in self.sources)

    @staticmethod
    def _given(section: Any, name: str) -> bool:
        default = next(part.default for part in dataclasses.fields(section) if part.name == name)
        return getattr(section, name) is not None and getattr(section, name) != default


_SECTIONS: dict[str, type] = {
    "compute": Compute,
    "memory": Memory,
    "kernel": Calls,
    "efficiency": Efficiency,
    "energy": Joules,
    "routing": RoutingTimes,
}
_WHOLE = frozenset({"threads", "ram_bytes", "flash_bytes", "channel_block"})
_MAY_BE_ZERO = frozenset({"launch_us", "call_us"}) | {part.name for part in dataclasses.fields(RoutingTimes)}
_NO_SOURCE = frozenset({"compute.threads"})  # says what the other figures are for
_MOST = sys.float_info.max  # TOML and JSON have whole numbers of any length


def devices() -> tuple[str, ...]:
    """Names of the bundled devices."""
    folder = resources.files("eexform.cost_models") / "devices"
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")))


def listing() -> list[dict[str, Any]]:
    """Every bundled device as plain values, sources included."""
    return [load_device(name).to_json() for name in devices()]


def load_device(name: str | Path) -> Device:
    """A bundled device by name, or one from a file.

    Args:
        name: ``rpi5``; a path to a ``.toml``; or a path to the ``.json`` that ``eexform calibrate`` wrote.

    Raises:
        OptionError: there is no such device or file, or the file is not valid; the message names file and key.
    """
    text = str(name)
    if not text:
        raise OptionError(
            f"no device is given: say device=NAME with one of {', '.join(devices())} (`eexform costs --device` lists "
            "them), or device=FILE with a .toml of your own or the .json that `eexform calibrate` wrote"
        )
    if text in devices():
        content = (resources.files("eexform.cost_models") / "devices" / f"{text}.toml").read_text(encoding="utf-8")
        return Device.from_json(tomllib.loads(content), f"device {text!r}")
    path = Path(text)
    if path.suffix not in (".toml", ".json"):
        raise OptionError(
            f"device {text!r}: no such device: {suggest(text, devices())}; or give a path to a .toml or .json file"
        )
    return Device.from_json(_read(path), text)


def _read(path: Path) -> object:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise OptionError(f"{path}: the device file cannot be read: {reason}") from error
    if path.suffix == ".toml":
        try:
            return tomllib.loads(content)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise OptionError(f"{path}: not valid TOML: {error}") from error
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(found, dict) or "device" not in found:
        raise OptionError(f"{path}: no key 'device'; a calibration that `eexform calibrate` wrote has one")
    return found["device"]


def _text(content: Mapping[str, Any], key: str, where: str) -> str:
    value = content.get(key)
    if not isinstance(value, str) or not value:
        raise OptionError(f"{where}: key {key!r} must be a text, found {value!r}")
    return value


def _section(kind: type, content: object, section: str, where: str) -> Any:
    if not isinstance(content, Mapping):
        found = "nothing" if content is None else repr(content)
        raise OptionError(f"{where}: [{section}] must be a table, found {found}")
    parts = {part.name: part for part in dataclasses.fields(kind)}
    for key in content:
        if key not in parts:
            raise OptionError(f"{where}: unknown key '{section}.{key}': {suggest(str(key), parts)}")
    for key, part in parts.items():
        if part.default is dataclasses.MISSING and key not in content:
            raise OptionError(f"{where}: key '{section}.{key}' is missing")
    return kind(**{key: _number(value, f"{section}.{key}", where) for key, value in content.items()})


def _number(value: object, key: str, where: str) -> float | int:
    name = key.rpartition(".")[2]
    whole = name in _WHOLE
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not abs(value) <= _MOST:
        raise OptionError(f"{where}: key '{key}' must be a {'whole ' if whole else ''}number, found {value!r}")
    if value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
        raise OptionError(f"{where}: key '{key}' must be positive, found {value!r}")
    return value if whole else float(value)


def _sources(content: Mapping[str, Any], where: str) -> dict[str, str]:
    sources = content.get("sources", {})
    if not isinstance(sources, Mapping):
        raise OptionError(f"{where}: [sources] must be a table, found {sources!r}")
    figures = {f"{section}.{key}" for section in _SECTIONS for key in content.get(section) or {}}
    for key, value in sources.items():
        if key not in figures:
            raise OptionError(f"{where}: 'sources.{key}' is about a key that the file does not have")
        if not isinstance(value, str) or not value.strip():
            raise OptionError(f"{where}: 'sources.{key}' must be a text, found {value!r}")
    for key in sorted(figures - _NO_SOURCE - set(sources)):
        raise OptionError(f"{where}: key '{key}' has no source: say in [sources] where the figure comes from")
    return dict(sources)
