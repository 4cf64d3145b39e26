"""The contract of a cost model: a graph in, a number with a unit out, and the names of what it could not count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from eexform.ir.graph import Graph


@dataclass(frozen=True)
class Cost:
    """Cost of running a graph on one sample (or of holding it, for sizes).

    Attributes:
        total: in the model's unit.
        nodes: share of each node by name, where the model is additive; empty otherwise.
        unknown: ``(node, operator)`` pairs the model has no rule for: they are *not* in ``total``.
        conditions: how it was obtained (device, threads, repeats, spread, ...), for measured models.
    """

    total: float
    nodes: Mapping[str, float] = field(default_factory=dict)
    unknown: tuple[tuple[str, str], ...] = ()
    conditions: Mapping[str, Any] = field(default_factory=dict)


class CostModel(ABC):
    """A cost model; frozen dataclass, one file each, registered in the entry-point group ``eexform.cost_models``.

    Its fields (``parameter(...)``) are its settings. Aggregation to segments, heads and paths is not the model's work:
    :mod:`eexform.cost_models.paths` does it for all of them.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    """Unit of every figure, e.g. ``MACs``, ``parameters``, ``ms``."""

    additive: ClassVar[bool]
    """True: ``cost(graph).nodes`` covers every node and the total is their sum. False: sub-graphs are costed apart."""

    measured: ClassVar[bool] = False
    """True: timed or read from a device, so two calls differ; False: a pure function of the graph."""

    per_sample: ClassVar[bool] = True
    """True: paid per sample along its path. False (sizes): everything in the file is paid once, whatever the path."""

    @abstractmethod
    def cost(self, graph: Graph) -> Cost:
        """Cost of running all of ``graph`` (every output) on one sample."""

    def overhead(self) -> float:
        """What a graph costs on its own however small it is, and does not cost as a part of a bigger one (a call)."""
        return 0.0

    def routing(self, graph: Graph) -> float:
        """Cost of one exit's decision, gather and branch; 0 where the unit does not see it (MACs, parameters)."""
        return 0.0

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""
