"""The contract of a pass: a frozen dataclass whose fields are parameters, and a ``run`` that returns a new graph."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np

from eexform.ir.graph import Graph
from eexform.passes import _instruments
from eexform.pruning.samples import CalibrationData
from eexform.tunables import Domain, check_parameters, tunable_fields


@dataclass(frozen=True)
class TrainedHead:
    """A head's trained parameters.

    Attributes:
        parameters: arrays by the name they have in the stand-alone head graph (see ``eexform.heads.head_graph``).
        temperature: calibrated on data that neither trunk nor head has seen.
        digest: sha-256 of the parameters (:func:`eexform.ir.digest.digest_arrays`).
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
        exit_rates: share of samples that leave at each exit of the graph (final exit last), measured on select;
            ``None`` where unknown. ``drop_idle_exits`` needs it.
        node_costs: additive cost per node under the search's cost model, for passes that weigh work; ``None`` means
            multiply-accumulates.
        seed: for passes that draw random numbers.
        samples: for passes that have to look at data; ``None`` where there are none.
        reference: the graph before anything was cut, which the passes that mend a cut compare with. A pipeline sets it
            to the graph that it starts from, where it is ``None``.
        arrays: stored parameters by their digest (:func:`eexform.ir.digest.digest_arrays`), each set by name; what
            ``set_parameters`` looks up.
    """

    heads: HeadStore | None = None
    exit_rates: tuple[float, ...] | None = None
    node_costs: Callable[[Graph], Mapping[str, float]] | None = None
    seed: int = 0
    samples: CalibrationData | None = None
    reference: Graph | None = None
    arrays: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)


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
        replay: passes that do the same to the same graph from what they hold themselves, without data or random
            numbers; ``None`` where the pass itself does. ``Recipe.of(replay)`` is the settled recipe.
        arrays: parameters that the replay needs in ``context.arrays``, by digest.
    """

    graph: Graph
    changed: bool
    skipped: tuple[Skip, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())
    replay: tuple[Pass, ...] | None = None
    arrays: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)


class Pass(ABC):
    """A parameterised Graph → Graph function.

    Sub-classes are frozen dataclasses, one file each, registered in the entry-point group ``eexform.passes``. Fields
    made with :func:`eexform.tunables.tunable` may be chosen by a search; those made with ``parameter`` may not. Call
    the pass to apply it: that checks what it ``requires``, runs it and checks what it ``ensures``.
    """

    name: ClassVar[str]
    """The name it is registered under."""

    preserves_outputs: ClassVar[bool] = False
    """True where every output is the same numbers before and after (up to rounding); the test-suite checks it."""

    keeps_structure: ClassVar[bool] = False
    """True where a pass changes numbers only: nodes stay, and so does every cost (a bias may come in)."""

    composite: ClassVar[bool] = False
    """True for passes made of passes: instruments watch the parts, not the whole."""

    @classmethod
    def checked(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """``given`` parameters in canonical form, before all are known and without a graph.

        Raises:
            OptionError: an unknown parameter, or a value that no graph could make valid.
        """
        return check_parameters(cls, f"pass {cls.name!r}", given)

    def requires(self, graph: Graph) -> None:
        """Raise :class:`eexform.errors.PassError` (with ``need``) where the pass cannot run on ``graph``."""
        return

    @abstractmethod
    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Build the transformed graph; never change ``graph``."""

    def ensures(self, graph: Graph) -> None:
        """Raise :class:`eexform.errors.PassError` where the result lacks what the pass guarantees."""
        return

    def __call__(self, graph: Graph, context: PassContext | None = None) -> PassResult:
        """Apply the pass: ``requires`` on the graph, ``run``, ``ensures`` on the result, watched by the instruments.

        Raises:
            PassError: the pass cannot run on this graph, or broke what it guarantees.
        """
        context = PassContext() if context is None else context
        with _instruments.watching(self, graph) as watch:
            self.requires(graph)
            result = self.run(graph, context)
            self.ensures(result.graph)
            watch(result)
        return result

    @classmethod
    def space(cls, graph: Graph, context: PassContext) -> dict[str, Domain]:
        """Domain of each tunable parameter on this graph, in order of declaration."""
        return {
            name: domain if isinstance(domain, Domain) else domain(graph)
            for name, domain in tunable_fields(cls).items()
        }

    @classmethod
    def follow(cls, item: Any, before: Graph, after: Graph) -> Any:
        """What an item of a table that was filled in on ``before`` is called on ``after``.

        Passes in front have made ``after`` of ``before``. An item that is none there (by ``space``) no longer counts.
        """
        return item

    def to_plain(self) -> dict[str, Any]:
        """The parameters as plain values that a recipe file can hold; those at their default are left out."""
        plain = {}
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            made = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
            if made is dataclasses.MISSING or value != made:
                plain[item.name] = plain_value(value)
        return plain

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""


def plain_value(value: Any) -> Any:
    """``value`` with tuples as lists and numpy scalars as Python's own."""
    if isinstance(value, Mapping):
        return {str(key): plain_value(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list, set, frozenset)):
        return [plain_value(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value
