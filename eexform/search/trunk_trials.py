"""Trunks on trial: settled, priced and ranked as they are, before any of them is trained."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eexform.cost_models import CostModel
from eexform.errors import PassError
from eexform.ir.graph import Graph
from eexform.passes import PassContext
from eexform.search.genome import Constraints, Individual
from eexform.search.goals import Goals
from eexform.search.proxy import Proxy
from eexform.search.settling import BoundRecipe, Settled, Withheld, keeps_structure, settle_passes, shape_of
from eexform.search.space import Space, plain
from eexform.search.stored_costs import stored_path_costs
from eexform.search.terms import Term
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
        cost: of the whole trunk, by the first objective.
        params: parameters.
        epochs: that it was trained for.
        prices: cost of the whole trunk by cost model, where more is looked at than one model and the parameters.
    """

    passes: BoundRecipe
    digest: str
    error: float
    cost: float
    params: float
    epochs: int = 0
    prices: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        found = {**vars(self), "passes": [[name, plain(given)] for name, given in self.passes]}
        if not self.prices:  # as before there could be several, so that older logs go on
            del found["prices"]
        return found

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Trunk:
        """Inverse of :meth:`to_json`."""
        passes = tuple((str(name), dict(given)) for name, given in value["passes"])
        numbers = {name: float(value[name]) for name in ("error", "cost", "params")}
        prices = {str(model): float(price) for model, price in value.get("prices", {}).items()}
        return cls(passes, str(value["digest"]), **numbers, epochs=int(value["epochs"]), prices=prices)


@dataclass(frozen=True)
class Prices:
    """What whole trunks cost under every cost model that objectives and limits look at.

    Attributes:
        folder: where measurements are kept.
        models: by key; parameters among them.
        goals: the objectives in numbers.
        exits: there will be exits: a sample may then pay less than the whole trunk, and a target says nothing about it.
    """

    folder: Path
    models: Mapping[str, CostModel]
    goals: Goals
    exits: bool

    def of(self, graph: Graph, *, measured: bool = True) -> dict[str, float]:
        """Prices of a trunk by cost model; measured ones, where wanted, are measured once."""
        return {
            key: stored_path_costs(self.folder, model, graph, (), {}).trunk
            for key, model in self.models.items()
            if measured or not model.measured
        }

    def values(self, error: float, prices: Mapping[str, float]) -> tuple[float, ...]:
        """What is to be made small: the error, then every cost."""
        found = self.goals.values(error, lambda term: prices[term.model])
        if self.exits:
            found = (error, *(goal.amount(lambda term: prices[term.model]) for goal in self.goals.listed))
        return tuple(map(float, found))

    def cost(self, prices: Mapping[str, float]) -> float:
        """By the first objective."""
        return float(self.goals.listed[0].amount(lambda term: prices[term.model]))

    def noted(self, prices: Mapping[str, float]) -> dict[str, Any]:
        """``prices`` as a log keeps them."""
        plain_: dict[str, Any] = {"cost": self.cost(prices), "params": prices["params"]}
        return plain_ if self._alone else {**plain_, "prices": dict(prices)}

    def noted_of(self, line: Mapping[str, Any]) -> dict[str, float]:
        """Inverse of :meth:`noted`."""
        if not self._alone:
            return dict(line["prices"])
        (term,) = self.goals.listed[0].amount.terms
        return {term.model: line["cost"], "params": line["params"]}

    def covers(self, line: Mapping[str, Any]) -> bool:
        """Whether a line has all prices; one from before other limits were asked for may lack some."""
        return self._alone or set(self.models) <= set(line.get("prices", ()))

    @property
    def _alone(self) -> bool:
        """Whether there is no more to note than one cost and the parameters."""
        parts = [part for goal in self.goals.listed for part in goal.amount.parts]
        return len(parts) == 1 and parts[0][0] == 1.0 and set(self.models) == {parts[0][1].model, "params"}

    def over(self, prices: Mapping[str, float], constraints: Constraints) -> float:
        """By how much every plan on a trunk of these prices breaks limits; what is not priced breaks none."""

        def figure(term: Term) -> float:
            certain = not self.exits or term.statistic == "max" or not self.models[term.model].per_sample
            return prices.get(term.model, 0.0) if certain else 0.0

        return float(constraints.before(figure))


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
        prices: of trunks; measured ones are asked for only where a trunk is ranked.
        constraints: limits on every plan.
        log: remembers what was found.
        baseline: digest of the original behind the passes that only make it faster, which is no candidate.
        report: told after each trial.
    """

    space: Space
    original: Graph
    graphs: Sequence[Graph]
    context: PassContext
    proxy: Proxy
    prices: Prices
    constraints: Constraints
    log: TrunkLog
    baseline: str
    report: Callable[[str], None] = lambda text: None
    pool: dict[str, tuple[Individual, tuple[float, ...]]] = field(default_factory=dict)
    _settled: dict[str, Settled] = field(default_factory=dict)
    _violations: dict[str, float] = field(default_factory=dict)

    # -- what the evolution asks -----------------------------------------------------------------------------------

    def evaluate(self, individuals: Sequence[Individual]) -> None:
        """Settle, price and rank each individual."""
        for individual in individuals:
            found = self._tried(individual)
            prices = self.prices.noted_of(found)
            individual.fitness.values = self.prices.values(1.0 if found["error"] is None else found["error"], prices)
            individual.fitness.violation = self.over(prices)
            if not individual.fitness.violation and found["digest"] != self.baseline:
                self.pool.setdefault(found["digest"], (individual, individual.fitness.values))
            self.report(f"{len(self.pool)} trunks found")

    def certain_violation(self, individual: Individual) -> float:
        """By how much its structure breaks limits, as far as that can be told without looking at data."""
        if self._unlimited:
            return 0.0
        if individual.key not in self._violations:
            known = self._known(individual)
            if known is not None:
                self._violations[individual.key] = self.over(self.prices.noted_of(known))
            else:
                shape = self._shape(individual)
                priced = {} if shape is None else self.prices.of(shape, measured=False)
                self._violations[individual.key] = self.over(priced)
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

    def _known(self, individual: Individual) -> dict[str, Any] | None:
        """What was noted about it, where that is all that is asked now."""
        known = self.log.find("tried", individual.key)
        return known if known is not None and self.prices.covers(known) else None

    def _tried(self, individual: Individual) -> dict[str, Any]:
        known = self._known(individual)
        if known is not None and (known["error"] is not None or self.over(self.prices.noted_of(known))):
            return known
        begun = time.perf_counter()
        graph = self._too_big(individual) or self.settled(individual).graph
        prices = self.prices.of(graph)
        seconds = time.perf_counter() - begun
        error = None if self.over(prices) else self.rank(graph)
        return self.log.note(
            "tried", individual.key, seconds=seconds, digest=graph.digest, error=error, **self.prices.noted(prices)
        )

    def _too_big(self, individual: Individual) -> Graph | None:
        """The cut trunk, where it breaks a limit: then nothing is mended or ranked."""
        if self._unlimited:
            return None
        graph = self._shape(individual)
        if graph is None:  # data decide what is cut
            steps = [step for step in self.steps(individual) if not keeps_structure(step[0])]
            graph = settle_passes(steps, self.original, self.context).graph
        return graph if self.over(self.prices.of(graph, measured=False)) else None

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
        return not self.constraints.limits

    def over(self, prices: Mapping[str, float]) -> float:
        """By how much every plan on a trunk of these prices breaks limits."""
        return self.prices.over(prices, self.constraints)
