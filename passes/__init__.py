"""Passes: parameterised Graph → Graph functions, alone, in pipelines, or written down as recipes.

To write one, derive a frozen dataclass from :class:`Pass` and register it in the entry-point group ``eexform.passes``.
"""

from eexform.errors import need
from eexform.passes._contract import HeadStore, Pass, PassContext, PassResult, Skip, TrainedHead
from eexform.passes._exits import refresh_exits
from eexform.passes._instruments import DumpGraphs, Instrument, Timing, WellFormed, instruments
from eexform.passes._pipeline import Pipeline
from eexform.passes._plan_store import PlanStore
from eexform.passes._registry import get, listing, make, names
from eexform.passes.recipe import Recipe, Step, load_recipe, parse_recipe

__all__ = [
    "DumpGraphs",
    "HeadStore",
    "Instrument",
    "Pass",
    "PassContext",
    "PassResult",
    "Pipeline",
    "PlanStore",
    "Recipe",
    "Skip",
    "Step",
    "Timing",
    "TrainedHead",
    "WellFormed",
    "get",
    "instruments",
    "listing",
    "load_recipe",
    "make",
    "names",
    "need",
    "parse_recipe",
    "refresh_exits",
]
