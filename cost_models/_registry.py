"""Cost models by name: built-in or registered by another distribution."""

from __future__ import annotations

from eexform.cost_models._contract import CostModel
from eexform.registry import Registry

REGISTRY = Registry(
    "eexform.cost_models",
    "cost model",
    CostModel,  # type: ignore[type-abstract]
    home="eexform.cost_models",
    facts={"unit": "", "measured": False, "additive": False, "per_sample": True},
)

GROUP = REGISTRY.group
names, get, make, parse, listing = REGISTRY.names, REGISTRY.get, REGISTRY.make, REGISTRY.parse, REGISTRY.listing
