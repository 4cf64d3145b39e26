"""Between genomes and scorers: evaluates individuals in batches, seeds a population, improves elites."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any

import numpy as np

from eexform.errors import OptionError, need, suggest
from eexform.search.aiming import aim
from eexform.search.bits import BitScorer
from eexform.search.genome import Constraints, Genome, Individual
from eexform.search.goals import Goal, Goals, check_price
from eexform.search.scorer import Candidate
from eexform.search.space import Space
from eexform.search.terms import Term, least, statistic
from eexform.search.thresholds import Draft, descend, improve
from eexform.tunables import Each, Rng, Subset

EXCHANGE = (0.01, 1.0)
"""Scalarisations: how much error (as a share) the whole trunk's cost is worth, from hardly any to all."""

MOVE_HEADS = 64
"""Heads that one refinement considers for adding; drawn anew each time."""


@dataclass
class Evaluation:
    """Scores individuals and makes good ones, for given objectives and constraints.

    Attributes:
        space: the genes.
        scorer: of the trunk that the exits are for.
        goals: what is made small beside the error.
        constraints: limits.

    Raises:
        OptionError: an objective or a limit names a cost model that was not computed, or the trunk costs nothing.
    """

    space: Space
    scorer: BitScorer
    goals: Goals = field(default_factory=lambda: Goals.of("macs"))
    constraints: Constraints = field(default_factory=Constraints)

    def __post_init__(self) -> None:
        costs = self.scorer.costs
        for what, models in (("objective", self.goals.models), ("limit", sorted(self.constraints.models))):
            for model in models:
                known = model in costs
                need(known, f"{what} {model!r} is no cost model here: {suggest(model, costs)}", OptionError)
        for model in self.goals.models:
            check_price(model, costs[model].trunk)

    # -- scoring -------------------------------------------------------------------------------------------------------

    def evaluate(self, individuals: Sequence[Individual]) -> None:
        """Set the fitness of each individual."""
        if not individuals:
            return
        scorer = self.scorer
        heads, levels, measure, carry = _arrays([self.draft(individual) for individual in individuals], scorer)
        counts = scorer.score(heads, levels, measure, carry)
        vectors = self._vectors(heads, {*self.goals.models, *self.constraints.models})

        def figure(term: Term) -> np.ndarray:
            return statistic(term.statistic, vectors[term.model], counts.left)

        values = self.goals.values((scorer.samples - counts.credit) / scorer.samples, figure)
        violation = self.constraints.after(figure, counts.correct / scorer.samples)
        table = np.stack([*values, np.broadcast_to(violation, len(individuals))], axis=1).tolist()
        for individual, (*fitness, over) in zip(individuals, table, strict=True):
            individual.fitness.values = tuple(fitness)
            individual.fitness.violation = over

    def certain_violation(self, individual: Individual) -> float:
        """By how much the individual fails constraints that can be judged without scoring it."""
        if not self.constraints.limits:
            return 0.0
        heads, _, _, _ = _arrays([self.draft(individual)], self.scorer)
        vectors = self._vectors(heads, self.constraints.models)
        return float(self.constraints.before(lambda term: least(term.statistic, vectors[term.model]))[0])

    def _vectors(self, heads: np.ndarray, models: Iterable[str]) -> dict[str, np.ndarray]:
        return {model: self.scorer.vectors(model, heads) for model in models}

    def candidate(self, individual: Individual) -> Candidate:
        """The individual's plan with thresholds as numbers."""
        draft = self.draft(individual)
        return self.scorer.candidate(draft.heads, draft.levels, draft.measure, draft.carry)

    def recipe(self, individual: Individual) -> list[tuple[str, dict[str, Any]]]:
        """The individual's recipe, every tunable bound."""
        thresholds = {exit_.site: exit_.threshold for exit_ in self.candidate(individual).exits}
        return self.space.bind(individual.genome, thresholds)

    # -- genome and numbers --------------------------------------------------------------------------------------------

    def draft(self, individual: Individual) -> Draft:
        """The individual's exits as numbers."""
        scorer, genome, place = self.scorer, individual.genome, self.space.exits_place
        sites = self._read(genome, "sites", ())
        heads = self._read(genome, "heads", {})
        levels = genome.get((place, "thresholds"), {})
        found = sorted(
            (scorer.identity[site, str(heads[site])], int(levels.get(site, 0)))
            for site in sites
            if (site, str(heads.get(site))) in scorer.identity
        )
        measure = scorer.measures.index(self._read(genome, "measure", scorer.measures[0]))
        carry = float(self._read(genome, "carry", 0.0))
        return Draft(tuple(h for h, _ in found), tuple(level for _, level in found), measure, carry)

    def encode(self, draft: Draft, genome: Genome) -> Individual | None:
        """``genome`` with its exits replaced by ``draft``; ``None`` where the space cannot say that."""
        scorer, place = self.scorer, self.space.exits_place
        changed = dict(genome)
        chosen = {scorer.heads[head][0]: (scorer.heads[head][1], level) for head, level in _pairs(draft)}
        gene = self.space.genes.get((place, "sites"))
        if gene is not None:
            assert isinstance(gene.domain, Subset)
            most = len(gene.domain.items) if gene.domain.most is None else gene.domain.most
            if not gene.domain.least <= len(chosen) <= most:
                return None
            changed[place, "sites"] = tuple(site for site in gene.domain.items if site in chosen)
        heads = self.space.genes.get((place, "heads"))
        if heads is not None:
            changed[place, "heads"] = {**genome[place, "heads"], **self._heads(heads.domain, chosen)}
        if (place, "thresholds") in genome:
            levels = {site: level for site, (_, level) in chosen.items()}
            changed[place, "thresholds"] = {**genome[place, "thresholds"], **levels}
        for name, value in (("measure", scorer.measures[draft.measure]), ("carry", draft.carry)):
            if (place, name) in genome:
                changed[place, name] = value
        individual = self.space.individual(changed)
        return individual if self.draft(individual) == draft else None

    # -- good individuals ----------------------------------------------------------------------------------------------

    def seeds(self, count: int, rng: Rng) -> list[Individual]:
        """Up to ``count`` individuals to begin with, not scored: the trunk alone first, then local searches from it,
        shared-threshold sweeps and single exits, in turn."""
        base, scorer = self.space.sample(rng), self.scorer
        trunk = self.draft(base)
        trunk = Draft((), (), trunk.measure, min(self._carries(trunk)))
        measures = self._measures(scorer, trunk)
        grown, swept, single = [], [], []
        allowed = self._allowed(scorer)
        plain = replace(trunk, carry=0.0 if 0.0 in self._carries(trunk) else trunk.carry)
        # heads are added one by one only where exits do not depend on each other; the rest follows by ``_relative``
        growing = [measure for measure in measures if not scorer.by_path(measure, plain.carry)] or measures
        shares = cycle(_corners(len(self.goals.listed)))
        for exchange in np.geomspace(*EXCHANGE, 6) if self._free("sites") else ():
            weights = self._weights(float(exchange), next(shares))
            for measure in growing:
                start = replace(plain, measure=measure)
                grown.append(improve(scorer, start, weights, allowed=allowed))
            grown.append(self._relative(scorer, grown[-1], weights, rng))
        by_site: dict[int, list[int]] = {}
        for head in allowed:
            by_site.setdefault(int(scorer.site_of[head]), []).append(head)
        for level in np.linspace(0, self.space.levels - 1, max(2, count // 12), dtype=int):
            heads = tuple(int(rng.choice(options)) for options in by_site.values())
            swept.append(Draft(heads, (int(level),) * len(heads), int(rng.choice(measures)), trunk.carry))
        for head in rng.permutation(allowed) if allowed else ():
            level = int(rng.integers(self.space.levels))
            single.append(Draft((int(head),), (level,), int(rng.choice(measures)), trunk.carry))
            if len(single) >= count // 4:
                break
        return self._distinct([trunk, *_in_turn(grown, swept, single)], base.genome, count)

    def refine(self, individuals: Sequence[Individual], rng: Rng) -> list[Individual]:
        """Up to two individuals per given one, not scored: an improved one, and that with another measure or carry."""
        found: list[Individual] = []
        for individual in individuals:
            scorer, draft = self.scorer, self.draft(individual)
            exchange = float(np.exp(rng.uniform(*np.log(EXCHANGE))))
            several = len(self.goals.listed) > 1
            share = rng.dirichlet(np.ones(len(self.goals.listed))).tolist() if several else (1.0,)
            weights = self._weights(exchange, share)
            allowed = self._allowed(scorer)
            if len(allowed) > MOVE_HEADS:
                allowed = sorted(rng.choice(allowed, MOVE_HEADS, replace=False).tolist())
            if self._free("sites"):
                better = improve(scorer, draft, weights, allowed=allowed, moves=2)
            else:
                better = descend(scorer, draft, weights, drop=False)
            for goal in self.goals.listed:
                if goal.target is not None:
                    better = self._aimed(better, goal, share)
            for one in (better, self._relative(scorer, better, weights, rng)):
                encoded = self.encode(one, individual.genome) if one != draft else None
                if encoded is not None:
                    found.append(encoded)
        return found

    def _aimed(self, draft: Draft, goal: Goal, share: Sequence[float]) -> Draft:
        def judged(drafts: Sequence[Draft]) -> tuple[np.ndarray, np.ndarray]:
            heads, levels, measure, carry = _arrays(drafts, self.scorer)
            counts = self.scorer.score(heads, levels, measure, carry)
            vectors = self._vectors(heads, {term.model for term in goal.amount.terms})
            cost = goal.amount(lambda term: statistic(term.statistic, vectors[term.model], counts.left))
            return cost, -counts.credit

        return aim(
            self.scorer,
            draft,
            goal,
            judged,
            lambda exchange: self._weights(exchange, share),
            EXCHANGE,
            drop=not self.scorer.by_path(draft.measure, draft.carry) and self._free("sites"),
        )

    # -- inside --------------------------------------------------------------------------------------------------------

    def _read(self, genome: Genome, name: str, default: Any) -> Any:
        return self.space.value(genome, self.space.exits_place, name, default)

    def _weights(self, exchange: float, shares: Sequence[float]) -> dict[Term, float]:
        """A scalarisation of the goals: loss that a unit of each term is worth, the whole trunk ``exchange`` in all.

        Where there is a target, of what stands before the distance: local search goes along the front of error and
        cost, and selection keeps what comes near.
        """
        weights: dict[Term, float] = {}
        for goal, share in zip(self.goals.listed, shares, strict=True):
            whole = goal.amount(lambda term: self.scorer.costs[term.model].trunk)
            for factor, term in goal.amount.parts:
                weights[term] = weights.get(term, 0.0) + exchange * share * factor / whole
        return weights

    def _relative(self, scorer: BitScorer, draft: Draft, weights: Mapping[Term, float], rng: Rng) -> Draft:
        """The same exits under another measure or carry, their levels set anew (confidences differ too much)."""
        measures = [measure for measure in self._measures(scorer, draft) if measure != draft.measure]
        carries = [carry for carry in self._carries(draft) if carry != draft.carry]
        if not draft.heads or not (measures or carries):
            return draft
        if carries and (not measures or rng.random() < 0.5):
            other = replace(draft, carry=float(rng.choice(carries)))
        else:
            other = replace(draft, measure=int(rng.choice(measures)))
        return descend(
            scorer,
            other,
            weights,
            drop=not scorer.by_path(other.measure, other.carry) and self._free("sites"),
        )

    def _carries(self, draft: Draft) -> list[float]:
        if not self._free("carry"):
            return [draft.carry]
        domain = self.space.genes[self.space.exits_place, "carry"].domain
        return [float(value) for value in getattr(domain, "values", (draft.carry,))]

    def _free(self, name: str) -> bool:
        return (self.space.exits_place, name) in self.space.genes

    def _measures(self, scorer: BitScorer, draft: Draft) -> list[int]:
        return list(range(len(scorer.measures))) if self._free("measure") else [draft.measure]

    def _allowed(self, scorer: BitScorer) -> list[int]:
        """Heads of this trunk that the genes can express."""
        place = self.space.exits_place
        sites = self.space.genes.get((place, "sites"))
        items = set(getattr(sites.domain, "items", ())) if sites else set(self._read({}, "sites", ()))
        gene = self.space.genes.get((place, "heads"))
        allowed = []
        for index, (site, head) in enumerate(scorer.heads):
            if gene is None:
                known: set[str] = {str(self._read({}, "heads", {}).get(site))}
            else:
                assert isinstance(gene.domain, Each)
                known = {str(value) for value in getattr(gene.domain.domains.get(site), "values", ())}
            if site in items and head in known:
                allowed.append(index)
        return allowed

    @staticmethod
    def _heads(domain: Any, chosen: Mapping[str, tuple[str, int]]) -> dict[str, Any]:
        """The genes' own values for the chosen heads (a domain may hold texts or head specifications)."""
        return {
            site: next((value for value in domain.domains[site].values if str(value) == head), head)
            for site, (head, _) in chosen.items()
        }

    def _distinct(self, drafts: Sequence[Draft], genome: Genome, count: int) -> list[Individual]:
        found: dict[str, Individual] = {}
        for draft in drafts:
            individual = self.encode(draft, genome)
            if individual is not None and len(found) < count:
                found.setdefault(individual.key, individual)
        return list(found.values())


def _pairs(draft: Draft) -> list[tuple[int, int]]:
    return list(zip(draft.heads, draft.levels, strict=True))


def _arrays(drafts: Sequence[Draft], scorer: BitScorer) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    width = max((len(draft.heads) for draft in drafts), default=0)
    heads = np.full((len(drafts), width), -1, np.int64)
    levels = np.full((len(drafts), width), scorer.levels, np.int64)
    for row, draft in enumerate(drafts):
        heads[row, : len(draft.heads)] = draft.heads
        levels[row, : len(draft.heads)] = draft.levels
    measure = np.array([draft.measure for draft in drafts], np.int64)
    return heads, levels, measure, np.array([draft.carry for draft in drafts], np.float64)


def _corners(goals: int) -> list[tuple[float, ...]]:
    """Shares that the goals have in turn: each one alone, then all alike."""
    if goals == 1:
        return [(1.0,)]
    return [*(tuple(float(place == one) for place in range(goals)) for one in range(goals)), (1.0 / goals,) * goals]


def _in_turn(*lists: Sequence[Draft]) -> list[Draft]:
    longest = max(map(len, lists), default=0)
    return [drafts[place] for place in range(longest) for drafts in lists if place < len(drafts)]
