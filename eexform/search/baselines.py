"""What a search is compared with: random search, full enumeration, the oracle, exits taken at random."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from eexform.errors import OptionError
from eexform.search.archive import Archive, non_dominated
from eexform.search.bits import BitScorer
from eexform.search.nsga2 import Evaluator
from eexform.search.scorer import Candidate, Scorer, exit_outputs
from eexform.search.space import Space
from eexform.tunables import Rng

BATCH = 4096


def random_search(space: Space, evaluation: Evaluator, plans: int, rng: Rng) -> Archive:
    """The non-dominated ones of ``plans`` individuals drawn from the space."""
    archive = Archive()
    for begin in range(0, plans, BATCH):
        batch = [space.sample(rng) for _ in range(min(BATCH, plans - begin))]
        evaluation.evaluate(batch)
        archive.offer(batch)
    return archive


def count_plans(scorer: BitScorer, levels: Sequence[int], most: int | None = None) -> int:
    """How many plans :func:`exhaustive` would score per measure."""
    options = np.bincount(scorer.site_of, minlength=len(scorer.sites)) * len(levels)
    ways = [1]  # ways to place k exits
    for option in options.tolist():
        ways = [a + b * option for a, b in zip([*ways, 0], [0, *ways], strict=True)]
    return sum(ways[: (len(ways) if most is None else most + 1)])


def exhaustive(
    scorer: BitScorer, objective: str, levels: Sequence[int], *, most: int | None = None, limit: int = 20_000_000
) -> np.ndarray:
    """The true front of a small space: all subsets of sites, all heads, the given levels, all measures.

    Returns:
        Error and cost of the non-dominated plans, float64 [plans, 2].

    Raises:
        OptionError: more than ``limit`` plans.
    """
    total = count_plans(scorer, levels, most) * len(scorer.measures)
    if total > limit:
        raise OptionError(
            f"{total:,} plans are too many to enumerate (limit {limit:,}); take fewer sites, heads or levels"
        )
    best = np.empty((0, 2))
    for heads, marks, measure in _all_plans(scorer, levels, len(scorer.sites) if most is None else most):
        counts = scorer.score(heads, marks, measure)
        error = (scorer.samples - counts.correct) / scorer.samples
        points = np.concatenate([best, np.stack([error, scorer.mean_cost(objective, heads, counts)], axis=1)])
        best = points[non_dominated(points)]
    return best


@dataclass(frozen=True)
class Baseline:
    """Accuracy and mean cost by cost model."""

    accuracy: float
    cost: dict[str, float]


def oracle(scorer: Scorer, candidate: Candidate, split: str) -> Baseline:
    """Each sample leaves at the first exit that is right (the final one where none is): what no threshold can beat."""
    data = scorer.splits[split]
    right = np.stack([scores.argmax(axis=1) == data.labels for scores in exit_outputs(data, candidate)])
    taken = np.where(right.any(axis=0), right.argmax(axis=0), len(candidate.exits))
    cost = {name: float(np.array(model.path(candidate.pairs))[taken].mean()) for name, model in scorer.costs.items()}
    return Baseline(float(right.any(axis=0).mean()), cost)


def random_exit(scorer: Scorer, candidate: Candidate, split: str) -> Baseline:
    """Samples leave by lot at the candidate's own rates: same cost, no knowledge (expected value)."""
    data = scorer.splits[split]
    scored = scorer.exact(candidate, split)
    right = [float((scores.argmax(axis=1) == data.labels).mean()) for scores in exit_outputs(data, candidate)]
    return Baseline(math.fsum(r * a for r, a in zip(scored.rates, right, strict=True)), dict(scored.cost))


def _all_plans(
    scorer: BitScorer, levels: Sequence[int], most: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    by_site = [np.flatnonzero(scorer.site_of == site) for site in range(len(scorer.sites))]
    for size in range(most + 1):
        for sites in itertools.combinations(range(len(scorer.sites)), size):
            choices = [[(head, level) for head in by_site[site].tolist() for level in levels] for site in sites]
            products = itertools.product(*choices)
            while batch := list(itertools.islice(products, BATCH * 4)):
                table = np.array(batch, np.int64).reshape(len(batch), size, 2)
                for measure in range(len(scorer.measures)):
                    yield table[:, :, 0], table[:, :, 1], np.full(len(batch), measure)
