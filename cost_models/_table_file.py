"""Files that hold a table of kernel times: the JSON that ``eexform calibrate`` writes, or JSON and CSV by hand."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eexform.errors import OptionError, RunError
from eexform.files import read_json

FORMAT = 1
KERNELS = ("onnxruntime", "fused")
_COLUMNS = ("op", "variant", "sizes", "us")


@dataclass(frozen=True)
class Row:
    """One kernel's time.

    Attributes:
        op: operator (:class:`eexform.cost_models._kernels.Kernel`).
        variant: as there.
        sizes: as there.
        us: microseconds per call.
        spread_us: distance between the quartiles of the repeats.
        repeats: how many count; 0 where it is not known.
    """

    op: str
    variant: str
    sizes: tuple[int, ...]
    us: float
    spread_us: float = 0.0
    repeats: int = 0

    @property
    def key(self) -> tuple[str, str, tuple[int, ...]]:
        return self.op, self.variant, self.sizes

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "sizes": list(self.sizes)}


@dataclass(frozen=True)
class TableFile:
    """What such a file says.

    Attributes:
        rows: kernels and their times.
        kernels: ``onnxruntime``: kernels of the graph as that runtime optimises it; ``fused``: of the graph itself.
        device: the description of the device, as in a device file; ``None`` where there is none.
        runtime: what the times were measured with, and what it takes beside kernels.
        finished: ``False`` where a calibration was interrupted.
    """

    rows: tuple[Row, ...]
    kernels: str
    device: Mapping[str, Any] | None = None
    runtime: Mapping[str, Any] = field(default_factory=dict)
    finished: bool = True


def read_table(path: str | Path) -> TableFile:
    """Read a table.

    Args:
        path: a ``.json``; its ``table`` may be the name of a CSV beside it. Or a ``.csv`` with the columns ``op``,
            ``variant``, ``sizes`` (``16x32x64``) and ``us``, of kernels that are ``fused``.

    Raises:
        OptionError: there is no such file, or it is not a table: the message says where.
    """
    path = Path(path)
    if path.suffix == ".csv":
        return TableFile(_csv(path), "fused")
    try:
        content = read_json(path)
    except RunError as error:
        raise OptionError(f"{error}; give the file that `eexform calibrate` wrote, or a table of your own") from error
    if not isinstance(content, dict) or "table" not in content:
        raise OptionError(
            f"{path}: there is no 'table' in it; `eexform calibrate` writes one, and a device file alone has none"
        )
    version = content.get("format", FORMAT)
    if not isinstance(version, int) or version > FORMAT:
        raise OptionError(f"{path}: format {version!r} was written by a newer eexform; this one reads up to {FORMAT}")
    kernels = content.get("kernels", "fused")
    if kernels not in KERNELS:
        raise OptionError(f"{path}: kernels: {kernels!r} is neither {KERNELS[0]!r} nor {KERNELS[1]!r}")
    device, runtime = content.get("device"), content.get("runtime")
    for name, part in (("device", device), ("runtime", runtime)):
        if part is not None and not isinstance(part, dict):
            raise OptionError(f"{path}: {name}: expected names and values, found {type(part).__name__}")
    table = content["table"]
    if isinstance(table, str):
        if not table or Path(table).name != table:
            raise OptionError(f"{path}: table: {table!r} is no name; a CSV lies in the same folder as this file")
        rows = _csv(path.parent / table)
    elif isinstance(table, list):
        rows = tuple(_row(entry, f"{path}: table[{place}]") for place, entry in enumerate(table))
    else:
        raise OptionError(f"{path}: table: expected a list of kernels or the name of a CSV, found {table!r}")
    return TableFile(rows, kernels, device, _figures(runtime or {}, path), bool(content.get("finished", True)))


def _figures(runtime: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    between = runtime.get("between_us", {})
    if not isinstance(between, dict):
        raise OptionError(f"{path}: runtime.between_us: expected a time per class of kernels, found {between!r}")
    times = {name: runtime.get(name, 0.0) for name in ("call_us", "launch_us")}
    for name, value in {**times, **{f"between_us.{kind}": value for kind, value in between.items()}}.items():
        if not _is_time(value):
            raise OptionError(f"{path}: runtime.{name}: {value!r} is no time in microseconds")
    curve = runtime.get("weights", [])
    pairs = isinstance(curve, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in curve)
    if not pairs or not all(_is_time(number) for pair in curve for number in pair):
        raise OptionError(f"{path}: runtime.weights: expected pairs of KiB and microseconds per KiB")
    return runtime


def _csv(path: Path) -> tuple[Row, ...]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:  # spreadsheets put a mark in front
            reader = csv.DictReader(stream)
            lines, header = list(reader), reader.fieldnames or ()
    except FileNotFoundError as error:
        raise OptionError(f"{path}: no such file") from error
    except (OSError, ValueError, csv.Error) as error:
        raise OptionError(f"{path}: cannot be read as CSV: {error}") from error
    missing = [name for name in _COLUMNS if name not in header]
    if missing:
        raise OptionError(f"{path}: no column {missing[0]!r}; a table has the columns {', '.join(_COLUMNS)}")
    found = []
    for number, line in enumerate(lines, 2):
        where = f"{path}, line {number}"
        try:
            sizes = [int(part) for part in str(line["sizes"]).replace("x", " ").split()]
            time = float(line["us"])
        except (TypeError, ValueError) as error:
            raise OptionError(f"{where}: {error}; write sizes as 16x32x64 and us as a number") from error
        found.append(_row({"op": line["op"], "variant": line["variant"], "sizes": sizes, "us": time}, where))
    return tuple(found)


def _row(entry: Any, where: str) -> Row:
    if not isinstance(entry, dict):
        raise OptionError(f"{where}: expected op, variant, sizes and us, found {entry!r}")
    op, variant, sizes, us = (entry.get(name) for name in _COLUMNS)
    if not isinstance(op, str) or not op or not isinstance(variant, str):
        raise OptionError(f"{where}: op {op!r} and variant {variant!r} must be texts")
    whole = isinstance(sizes, list) and all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
    if not whole or not sizes or min(sizes) < 1 or not _is_time(max(sizes)):
        raise OptionError(f"{where}: sizes {sizes!r} must be whole numbers of at least 1")
    if us is None or not _is_time(us):
        raise OptionError(f"{where}: us {us!r} is no time in microseconds")
    spread, repeats = entry.get("spread_us", 0.0), entry.get("repeats", 0)
    if not _is_time(spread) or not isinstance(repeats, int) or repeats < 0:
        raise OptionError(f"{where}: spread_us {spread!r} or repeats {repeats!r} is damaged")
    return Row(op, variant, tuple(sizes), float(us), float(spread), repeats)


def _is_time(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value <= sys.float_info.max  # JSON has whole numbers of any length
