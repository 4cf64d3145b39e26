"""Passes by name: built-in or registered by another distribution."""

from __future__ import annotations

import dataclasses
from typing import Any

from eexform import plugins
from eexform.errors import EexformError, OptionError
from eexform.passes._contract import Pass
from eexform.tunables import describe_fields, missing_parameters

GROUP = "eexform.passes"


def names() -> tuple[str, ...]:
    """Every registered pass, sorted."""
    return plugins.names(GROUP)


def get(name: str) -> type[Pass]:
    """The pass registered as ``name``.

    Raises:
        OptionError: there is none, or what is registered is no pass.
    """
    found = plugins.load(GROUP, name)
    if not (isinstance(found, type) and issubclass(found, Pass) and dataclasses.is_dataclass(found)):
        raise OptionError(
            f"pass {name!r} from {plugins.origin(GROUP, name)} is not a dataclass derived from eexform.passes.Pass"
        )
    return found


def make(name: str, /, **parameters: Any) -> Pass:
    """The pass ``name`` with these parameters.

    Raises:
        OptionError: unknown pass or parameter, value out of range, or a required parameter is missing.
    """
    cls = get(name)
    checked = cls.checked(parameters)
    absent = missing_parameters(cls, checked)
    if absent:
        raise OptionError(f"pass {name!r} needs a value for " + ", ".join(map(repr, absent)))
    try:
        return cls(**checked)
    except EexformError as error:
        raise OptionError(f"pass {name!r}: {error}") from error


def listing() -> list[dict[str, Any]]:
    """What is registered, for ``eexform passes``: name, summary, distribution, preserves_outputs, parameters, error.

    A pass that cannot be loaded is listed with the reason as ``error`` (``None`` otherwise) and no parameters.
    """
    found: list[dict[str, Any]] = []
    for name in names():
        entry: dict[str, Any] = {
            "name": name,
            "summary": "",
            "distribution": plugins.origin(GROUP, name),
            "preserves_outputs": False,
            "parameters": [],
            "error": None,
        }
        try:
            cls = get(name)
        except EexformError as error:
            entry["error"] = str(error)
        else:
            entry["summary"] = cls.summary()
            entry["preserves_outputs"] = cls.preserves_outputs
            entry["parameters"] = describe_fields(cls)
        found.append(entry)
    return found
