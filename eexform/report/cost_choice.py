"""Which cost models a question is about: texts taken apart, a device put where it belongs, checked before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from eexform import cost_models
from eexform.cost_models import CostModel
from eexform.cost_models.peak_ram_bytes import PeakRam
from eexform.errors import OptionError, need

DEVICE = "device"
"""Name of the setting that says which device file a cost model reads."""


def divided(text: str) -> tuple[str, ...]:
    """``macs,latency_ort:threads=1,batch=8,params`` as three texts: what has a ``=`` before any ``:`` is a setting."""
    found: list[str] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        if found and "=" in part.partition(":")[0]:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return tuple(found)


def chosen(texts: Sequence[str | CostModel], device: str | None = None) -> list[CostModel]:
    """The cost models that texts name, in the same order.

    Args:
        texts: as on the command line, or models.
        device: for every named model that has a device and is not given one of its own.

    Raises:
        OptionError: a model or a setting does not exist, a setting is missing, or nothing has a device.
    """
    need(texts, "name a cost model; `eexform costs` lists them", OptionError)
    found: list[CostModel] = []
    taken = False
    for text in texts:
        if not isinstance(text, str):
            found.append(text)
        elif device is not None and _takes_device(text):
            taken = True
            found.append(_parsed(_with_device(text, device), device))
        else:
            found.append(_parsed(text, device))
    if device is not None and not taken and not any(isinstance(model, PeakRam) for model in found):
        names = ", ".join(name for name in cost_models.names() if _takes_device(name))
        raise OptionError(
            f"device {device!r}: no cost model named has a device to set; these have: {names}; and peak_ram_bytes is "
            "held to its memory"
        )
    return found


def unique(models: Iterable[CostModel]) -> list[CostModel]:
    """Each once, in order; equal settings are equal models."""
    found: list[CostModel] = []
    for model in models:
        if model not in found:
            found.append(model)
    return found


def label(model: CostModel, among: Sequence[CostModel]) -> str:
    """A model's name, with the settings that tell it from others of that name; of a path only the end, if that does."""
    others = [other for other in among if other.name == model.name and other != model]
    if not others:
        return model.name
    differing = [
        item.name
        for item in dataclasses.fields(model)  # type: ignore[arg-type]
        if any(getattr(other, item.name, None) != getattr(model, item.name) for other in others)
    ]

    def text(one: CostModel, shown: Callable[[Any], str]) -> str:
        return f"{one.name}:" + ",".join(f"{name}={shown(getattr(one, name))}" for name in differing)

    short = text(model, _end)
    return text(model, str) if short in [text(other, _end) for other in others] else short


def _end(value: Any) -> str:
    """A setting; of a path the last part."""
    return Path(value).name if isinstance(value, str) and "/" in value else str(value)


def _parsed(text: str, device: str | None) -> CostModel:
    try:
        return cost_models.parse(text)
    except OptionError as error:
        if device is None and DEVICE in str(error) and _takes_device(text):
            raise OptionError(f"{error}; --device sets it for every cost model that has one") from error
        raise


def _takes_device(text: str) -> bool:
    """Whether a text names a model with a device that it does not give itself."""
    name, _, settings = text.partition(":")
    try:
        cls = cost_models.get(name.strip())
    except OptionError:
        return False  # parsing says why
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    given = {part.partition("=")[0].strip() for part in settings.split(",")}
    return any(field.name == DEVICE for field in fields) and DEVICE not in given


def _with_device(text: str, device: str) -> str:
    need("," not in device, f"device {device!r}: a path with a comma cannot be given", OptionError)
    return f"{text}{',' if ':' in text else ':'}{DEVICE}={device}"
