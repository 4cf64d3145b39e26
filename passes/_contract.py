"""The contract of a pass: a frozen dataclass whose fields are parameters, and a ``run`` that returns a new graph."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from eexform.ir.graph import Graph
from eexform.tunables import Domain, tunable_fields


@dataclass(frozen=True)
class TrainedHead:
    """A head's trained parameters.

    Attributes:
        parameters: arrays by the name they have in the stand-alone head graph (see ``eexform.heads.head_graph``).
        temperature: calibrated on data that neither trunk nor head has seen.
        digest: sha-256 of the parameters.
    """

    parameters: Mapping[str, np.ndarray]
    temperature: float
    digest: str


class HeadStore(Protocol):
    """Where passes find trained heads; the bank is one, a plan file with its weights another."""

    def sites(self, trunk_digest: str) -> tuple[str, ...]:
        """Sites with at least one trained head, in the order in which a sample meets them."""

    def heads(self, trunk_digest: str, site: str) -> tuple[str, ...]:
        """Canonical texts of the heads trained at ``site``."""

    def trained(self, trunk_digest: str, site: str, head: str) -> TrainedHead:
        """The trained head; raises ``OptionError`` where there is none."""


@dataclass(frozen=True)
class PassContext:
    """What a pass may use besides the graph.

    Attributes:
        heads: trained heads; ``None`` where there are none.
        exit_rates: share of samples that leave at each exit of the graph (final exit last), measured on select; ``None``
            where unknown. ``drop_idle_exits`` needs it.
        node_costs: additive cost per node under the search's cost model, for passes that weigh work; computes MACs by
            default.
        seed: for passes that draw random numbers.
    """

    heads: HeadStore | None = None
    exit_rates: tuple[float, ...] | None = None
    node_costs: Callable[[Graph], Mapping[str, float]] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Skip:
    """A place where a pass did nothing, and why."""

    where: str
    why: str


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        graph: the new graph (the input itself when nothing changed).
        changed: whether ``graph`` differs from the input.
        skipped: places where nothing happened, each with a reason that a user can read.
        notes: what was done, one line each.
    """

    graph: Graph
    changed: bool
    skipped: tuple[Skip, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())


class Pass(ABC):
    """A parameterised Graph → Graph function.

    Sub-classes are frozen dataclasses, one file each, registered in the entry-point group ``eexform.passes``. Fields
    made with :func:`eexform.tunables.tunable` may be chosen by a search; those made with ``parameter`` may not.
    """

    name: ClassVar[str]
    """The name it is registered under."""

    preserves_outputs: ClassVar[bool] = False
    """True where the final scores are the same numbers before and after (up to rounding); the test-suite checks it."""

    def requires(self, graph: Graph) -> None:
        """Raise :class:`eexform.errors.PassError` (with ``need``) where the pass cannot run on ``graph``."""

    @abstractmethod
    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Build the transformed graph; never change ``graph``."""

    def ensures(self, graph: Graph) -> None:
        """Raise :class:`eexform.errors.PassError` where the result lacks what the pass guarantees."""

    @classmethod
    def space(cls, graph: Graph, context: PassContext) -> dict[str, Domain]:
        """Domain of each tunable parameter on this graph, in order of declaration."""
        return {
            name: domain if isinstance(domain, Domain) else domain(graph)
            for name, domain in tunable_fields(cls).items()
        }

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""


Recipe = tuple[tuple[str, Mapping[str, Any]], ...]
"""Ordered passes by registered name, each with its parameters (see ``eexform.passes.recipe``)."""
