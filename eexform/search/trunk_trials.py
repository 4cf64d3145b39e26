"""Trunks on trial: settled, priced and ranked as they are, before any of them is trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eexform.cost_models import make as make_cost
from eexform.errors import PassError
from eexform.ir.graph import Graph
from eexform.passes import PassContext
from eexform.search.genome import Constraints, Individual
from eexform.search.proxy import Proxy
from eexform.search.settling import BoundRecipe, Settled, Withheld, keeps_structure, settle_passes, shape_of
from eexform.search.space import Space, plain
from eexform.search.trunk_log import TrunkLog
from eexform.search.trunk_seeds import trunk_seeds
from eexform.tunables import Rng

KEPT = 64
"""Settled trunks that are kept in memory at a time."""


@dataclass(frozen=True)
class Trunk:
    """A trunk that may get exits.

    Attributes:
        passes: settled, so that they replay without data.
        digest: of the graph that they make.
        error: on the proxy's samples, 0-1.
        cost: of the whole trunk, in the objective's unit.
        params: parameters.
        epochs: that it was trained for.
    """

    passes: BoundRecipe
    digest: str
    error: float
    cost: float
    params: float
    epochs: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "passes": [[name, plain(given)] for name, given in self.passes]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Trunk:
        """Inverse of :meth:`to_json`."""
        passes = tuple((str(name), dict(given)) for name, given in value["passes"])
        numbers = {name: float(value[name]) for name in ("error", "cost", "params")}
        return cls(passes, str(value["digest"]), **numbers, epochs=int(value["epochs"]))


@dataclass
class Trials:
    """An evaluator of trunk genomes for :func:`eexform.search.nsga2.evolve`.

    What violates a limit by its structure alone is never run: not repaired, not ranked. Where a pass needs data to
    decide what to cut, that shows after the cut, before anything else is done.

    Attributes:
        space: of the passes in front of ``insert_exits``.
        original: the trunk as loaded.
        graphs: what the genes' domains were made for.
        context: samples for the passes, and stored numbers.
        proxy: ranks trunks.
        price: cost of a trunk under the objective.
        measured: the price is measured, and asked for only where a trunk is ranked.
        constraints: limits on every plan.
        exits: there will be exits: a sample may then pay less than the whole trunk.
        log: remembers what was found.
        baseline: digest of the original behind the passes that only make it faster, which is no candidate.
        report: told after each trial.
    """

    space: Space
    original: Graph
    graphs: Sequence[Graph]
    context: PassContext
    proxy: Proxy
    price: Callable[[Graph], float]
    measured: bool
    constraints: Constraints
    exits: bool
    log: TrunkLog
    baseline: str
    report: Callable[[str], None] = lambda text: None
    pool: dict[str, tuple[Individual, float, float]] = field(default_factory=dict)
    _settled: dict[str, Settled] = field(default_factory=dict)
    _violations: dict[str, float] = field(default_factory=dict)

    # -- what the evolution asks -----------------------------------------------------------------------------------

    def evaluate(self, individuals: Sequence[Individual]) -> None:
        """Settle, price and rank each individual."""
        for individual in individuals:
            found = self._tried(individual)
            individual.fitness.values = (1.0 if found["error"] is None else found["error"], found["cost"])
            individual.fitness.violation = self.over(found["cost"], found["params"])
            if not individual.fitness.violation and found["digest"] != self.baseline:
                self.pool.setdefault(found["digest"], (individual, found["error"], found["cost"]))
            self.report(f"{len(self.pool)} trunks found")

    def certain_violation(self, individual: Individual) -> float:
        """By how much its structure breaks limits, as far as that can be told without looking at data."""
        if self._unlimited:
            return 0.0
        if individual.key not in self._violations:
            known = self.log.find("tried", individual.key)
            if known is not None:
                self._violations[individual.key] = self.over(known["cost"], known["params"])
            else:
                shape = self._shape(individual)
                cost = 0.0 if shape is None or self.measured else self.price(shape)
                self._violations[individual.key] = 0.0 if shape is None else self.over(cost, params_of(shape))
        return self._violations[individual.key]

    def seeds(self, count: int, rng: Rng) -> list[Individual]:
        return trunk_seeds(self.space, self.graphs, count)

    def refine(self, individuals: Sequence[Individual], rng: Rng) -> list[Individual]:
        return []

    # -- trunks ------------------------------------------------------------------------------------------------------

    def steps(self, individual: Individual) -> BoundRecipe:
        """The passes of an individual, every gene bound."""
        return self.space.bind(individual.genome, {})

    def settled(self, individual: Individual) -> Settled:
        """The individual's passes, carried out."""
        if individual.key not in self._settled:
            while len(self._settled) >= KEPT:
                self._settled.pop(next(iter(self._settled)))
            self._settled[individual.key] = settle_passes(
                self.steps(individual), self.original, self.context, self.space.genes
            )
        return self._settled[individual.key]

    def _shape(self, individual: Individual) -> Graph | None:
        samples = self.context.samples
        withheld = Withheld("", 0) if samples is None else Withheld(samples.digest, samples.size)
        try:
            return shape_of(self.steps(individual), self.original, withheld, self.space.genes)
        except PassError:
            return None  # said where it is carried out

    def _tried(self, individual: Individual) -> dict[str, Any]:
        known = self.log.find("tried", individual.key)
        if known is not None and (known["error"] is not None or self.over(known["cost"], known["params"])):
            return known
        begun = time.perf_counter()
        graph = self._too_big(individual) or self.settled(individual).graph
        cost, params = self.price(graph), params_of(graph)
        seconds = time.perf_counter() - begun
        error = None if self.over(cost, params) else self.rank(graph)
        return self.log.note(
            "tried", individual.key, seconds=seconds, digest=graph.digest, error=error, cost=cost, params=params
        )

    def _too_big(self, individual: Individual) -> Graph | None:
        """The cut trunk, where it breaks a limit: then nothing is mended or ranked."""
        if self._unlimited:
            return None
        graph = self._shape(individual)
        if graph is None:  # data decide what is cut
            steps = [step for step in self.steps(individual) if not keeps_structure(step[0])]
            graph = settle_passes(steps, self.original, self.context).graph
        cost = 0.0 if self.measured else self.price(graph)
        return graph if self.over(cost, params_of(graph)) else None

    def rank(self, graph: Graph) -> float:
        """Error of a trunk on the proxy's samples, looked up or measured."""
        known = self.log.find("ranked", graph.digest)
        if known is None:
            begun = time.perf_counter()
            error = self.proxy.error(graph)
            known = self.log.note("ranked", graph.digest, seconds=time.perf_counter() - begun, error=error)
        return float(known["error"])

    @property
    def _unlimited(self) -> bool:
        return self.constraints == Constraints(min_accuracy=self.constraints.min_accuracy)

    def over(self, cost: float, params: float) -> float:
        """By how much every plan on a trunk of this cost and size breaks limits."""
        return self.constraints.before(least=0.0 if self.exits else cost, worst=cost, params=params)


def params_of(graph: Graph) -> float:
    """Parameters of a trunk, as the cost model of that name counts them."""
    return float(make_cost("params").cost(graph).total)
