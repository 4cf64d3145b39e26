"""Cost models by name: built-in or registered by another distribution."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from eexform import plugins
from eexform.cost_models._contract import CostModel
from eexform.errors import EexformError, OptionError
from eexform.tunables import check_parameters, describe_fields, missing_parameters

GROUP = "eexform.cost_models"


def names() -> tuple[str, ...]:
    """Every registered cost model, sorted."""
    return plugins.names(GROUP)


def get(name: str) -> type[CostModel]:
    """The cost model registered as ``name``.

    Raises:
        OptionError: there is none, or what is registered is no cost model.
    """
    found = plugins.load(GROUP, name)
    if not (isinstance(found, type) and issubclass(found, CostModel) and dataclasses.is_dataclass(found)):
        raise OptionError(
            f"cost model {name!r} from {plugins.origin(GROUP, name)} is not a dataclass derived from "
            "eexform.cost_models.CostModel"
        )
    return found


def make(name: str, /, **settings: Any) -> CostModel:
    """The cost model ``name`` with these settings.

    Raises:
        OptionError: unknown model or setting, value of the wrong kind, or a required setting is missing.
    """
    cls = get(name)
    checked = check_parameters(cls, f"cost model {name!r}", settings)
    absent = missing_parameters(cls, checked)
    if absent:
        raise OptionError(f"cost model {name!r} needs a value for " + ", ".join(map(repr, absent)))
    try:
        return cls(**checked)
    except EexformError as error:
        raise OptionError(f"cost model {name!r}: {error}") from error


def parse(text: str) -> CostModel:
    """The cost model written as on the command line: ``macs``, or ``latency_ort:threads=2,batch=32``.

    Raises:
        OptionError: not written like that, or as for :func:`make`.
    """
    name, _, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise OptionError(f"{text!r}: {part!r} is no setting; write NAME:SETTING=VALUE,SETTING=VALUE")
        try:
            settings[key.strip()] = json.loads(value)
        except ValueError:
            settings[key.strip()] = value
    return make(name.strip(), **settings)


def listing() -> list[dict[str, Any]]:
    """What is registered, for ``eexform costs``: name, summary, distribution, unit, measured, additive, per_sample,
    settings, error (``None`` where it could be loaded)."""
    found: list[dict[str, Any]] = []
    for name in names():
        entry: dict[str, Any] = {
            "name": name,
            "summary": "",
            "distribution": plugins.origin(GROUP, name),
            "unit": "",
            "measured": False,
            "additive": False,
            "per_sample": True,
            "settings": [],
            "error": None,
        }
        try:
            cls = get(name)
        except EexformError as error:
            entry["error"] = str(error)
        else:
            entry["summary"] = cls.summary()
            entry.update({key: getattr(cls, key) for key in ("unit", "measured", "additive", "per_sample")})
            entry["settings"] = [
                {key: value for key, value in described.items() if key not in ("tunable", "domain")}
                for described in describe_fields(cls)
            ]
        found.append(entry)
    return found
