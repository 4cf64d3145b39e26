"""Cost models: what running (or holding) a graph costs, and what each path through its exits costs.

To write one, derive a frozen dataclass from :class:`CostModel` and register it in the entry-point group
``eexform.cost_models``.
"""

from eexform.cost_models._contract import Cost, CostModel, Crossing, Held, Routing
from eexform.cost_models._external import ask, ask_cost, words
from eexform.cost_models._registry import get, listing, make, names, parse
from eexform.cost_models.paths import PathCosts, exit_costs, path_costs

__all__ = [
    "Cost",
    "CostModel",
    "Crossing",
    "Held",
    "PathCosts",
    "Routing",
    "ask",
    "ask_cost",
    "exit_costs",
    "get",
    "listing",
    "make",
    "names",
    "parse",
    "path_costs",
    "words",
]
