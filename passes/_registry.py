"""Passes by name: built-in or registered by another distribution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eexform.passes._contract import Pass
from eexform.registry import Registry


def _checked(cls: type[Pass], label: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Passes may have forms of their own for what they are given; they name themselves in messages."""
    return cls.checked(given)


REGISTRY = Registry(
    "eexform.passes",
    "pass",
    Pass,  # type: ignore[type-abstract]
    home="eexform.passes",
    facts={"preserves_outputs": False},
    settings="parameters",
    plain=False,
    checked=_checked,
)

GROUP = REGISTRY.group
names, get, make, listing = REGISTRY.names, REGISTRY.get, REGISTRY.make, REGISTRY.listing
