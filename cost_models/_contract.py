"""The contract of a cost model: a graph in, a number with a unit out, and the names of what it could not count."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from eexform.ir.graph import Graph


@dataclass(frozen=True)
class Cost:
    """Cost of running a graph on one sample (or of holding it, for sizes).

    Attributes:
        total: in the model's unit.
        nodes: share of each node by name, where the model is additive; empty otherwise.
        unknown: ``(node, operator)`` pairs the model has no rule for: they are *not* in ``total``.
        estimated: ``(node, why)`` pairs that are in ``total`` but beyond what the model has data for, such as sizes
            outside a table's grid.
        bounds: what limits each node, where the model knows: ``compute``, ``bandwidth`` or ``overhead``.
        conditions: how it was obtained (device, threads, repeats, spread, ...), for measured models.
    """

    total: float
    nodes: Mapping[str, float] = field(default_factory=dict)
    unknown: tuple[tuple[str, str], ...] = ()
    estimated: tuple[tuple[str, str], ...] = ()
    bounds: Mapping[str, str] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Held:
    """A value as it lies in memory: the shape of one sample, and bytes per element."""

    shape: tuple[int, ...]
    itemsize: int = 4

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.itemsize


@dataclass(frozen=True)
class Crossing:
    """Where a head branches off the trunk: all that routing depends on.

    Attributes:
        site: name of the value.
        value: the site's value.
        live: every value that an undecided sample takes along; the site's own among them where it is needed.
        classes: number of classes.
        names: of the live values.
    """

    site: str
    value: Held
    live: tuple[Held, ...]
    classes: int
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Routing:
    """What an exit costs beside its head, in the model's unit.

    Attributes:
        decision: paid by every sample that reaches the exit: confidence, comparison, branch. In models that combine by
            ``max``: what is held while the head runs, beside what the head itself holds.
        onward: paid by every sample that goes on: its rows are picked out of the live values, results are put back,
            layouts are changed. In models that combine by ``max``: what is held meanwhile.
    """

    decision: float = 0.0
    onward: float = 0.0


class CostModel(ABC):
    """A cost model; frozen dataclass, one file each, registered in the entry-point group ``eexform.cost_models``.

    Its fields (``parameter(...)``) are its settings. Aggregation to segments, heads and paths is not the model's work:
    :mod:`eexform.cost_models.paths` does it for all of them.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    """Unit of every figure, e.g. ``MACs``, ``parameters``, ``ms``."""

    additive: ClassVar[bool]
    """True: ``cost(graph).nodes`` covers every node, and the total is their sum and :meth:`overhead`. False: sub-graphs
    are costed apart."""

    measured: ClassVar[bool] = False
    """True: timed or read from a device, so two calls differ; False: a pure function of the graph."""

    per_sample: ClassVar[bool] = True
    """True: paid per sample along its path. False (sizes): everything in the file is paid once, whatever the path."""

    combine: ClassVar[Literal["sum", "max"]] = "sum"
    """How the parts of a path make its cost: ``sum`` (work, time), or ``max`` (memory that is free again afterwards;
    such a model is not additive)."""

    @abstractmethod
    def cost(self, graph: Graph) -> Cost:
        """Cost of running all of ``graph`` (every output) on one sample."""

    def costs(self, graphs: Sequence[Graph]) -> list[Cost]:
        """:meth:`cost` of several graphs; a measured model takes them in turns: a slow moment then hits all alike."""
        return [self.cost(graph) for graph in graphs]

    def overhead(self) -> float:
        """What a graph costs on its own however small it is, and does not cost as a part of a bigger one (a call)."""
        return 0.0

    def paths(self, graph: Graph) -> tuple[float, ...] | None:
        """What a sample pays that leaves at exit i of a graph with exits, the final exit last, where the model knows it
        as a whole (it runs the lowered file); ``None``: it is put together from parts."""
        return None

    def routing(self, graph: Graph, crossing: Crossing) -> Routing:
        """What an exit costs beside its head; nothing where the unit does not see it (MACs, parameters).

        Args:
            graph: the trunk, or a graph with exits.
            crossing: where the head branches off.
        """
        return Routing()

    def between(self, graph: Graph, before: Crossing | None, after: Crossing | None) -> Cost:
        """What the trunk costs more from one exit to the next because a branch begins and ends there: runtimes fuse
        operators, and keep values in a layout of their own, inside a branch only. Paid by every sample that goes there.

        Args:
            graph: the trunk, or a graph with exits.
            before: the exit that was passed; ``None``: there was none yet.
            after: the next exit; ``None``: the final classifier.

        Returns:
            The difference as ``total``, and what of the branch the model does not know or had to estimate.
        """
        return Cost(0.0)

    def channel_block(self) -> int | None:
        """Channels that the device computes at once, where that is known: other counts cost like the next multiple."""
        return None

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""
