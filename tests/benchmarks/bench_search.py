"""How fast plans are scored, and what the search finds against chance and against the true optimum.

    python -m tests.benchmarks.bench_search
    python -m tests.benchmarks.bench_search --bank scores.npz

The file holds ``final`` [n, K], ``labels`` [n] and, per head, ``head:<site>:<text>`` [n, K]; sites count in file order
and their costs are spread evenly. Without it, made-up scores of 5,000 samples are used.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from eexform.search import baselines
from eexform.search.archive import hypervolume
from eexform.search.bits import BitScorer
from eexform.search.evaluation import Evaluation
from eexform.search.nsga2 import Settings, evolve
from eexform.search.scorer import HeadScores
from tests.search import synthetic

SAMPLES, SITES, HEADS = 5000, 8, 6


def read_bank(path: Path) -> tuple[synthetic.Places, HeadScores]:
    """Scores from a file (see above), temperatures 1."""
    where: dict[str, list[str]] = {}
    heads = {}
    with np.load(path, allow_pickle=False) as stored:
        for name in stored.files:
            if name.startswith("head:"):
                _, site, text = name.split(":", 2)
                where.setdefault(site, []).append(text)
                heads[site, text] = stored[name]
        data = HeadScores(stored["final"], stored["labels"].astype(np.int64), heads, dict.fromkeys(heads, 1.0))
    return list(where.items()), data


def plans_per_second(scorer: BitScorer, carry: float, plans: int, seed: int = 0) -> float:
    """Random plans with an exit at every site and any measure; the bit sets are built before the clock starts."""
    rng = np.random.default_rng(seed)
    sites, per_site = len(scorer.sites), len(scorer.heads) // len(scorer.sites)
    heads = np.arange(sites) * per_site + rng.integers(0, per_site, (plans, sites))
    levels = rng.integers(0, scorer.levels, (plans, sites))
    measure = rng.integers(0, len(scorer.measures), plans)
    weight = np.full(plans, carry)
    scorer.score(heads[:64], levels[:64], measure[:64], weight[:64])
    for head in range(len(scorer.heads)):
        for each in range(len(scorer.measures)):
            scorer.thresholds(head, each)
    begun = time.perf_counter()
    counts = scorer.score(heads, levels, measure, weight)
    scorer.mean_cost("macs", heads, counts)
    return plans / (time.perf_counter() - begun)


def compare(evaluation: Evaluation, reference: tuple[float, float], seeds: Sequence[int], settings: Settings) -> None:
    """Hypervolume (per mille of the reference box) of the search, of plain NSGA-II and of chance with as many plans."""
    print("seed   plans   search   (s)   no memetic/seeds   random   random (s)")
    for seed in seeds:
        box = reference[0] * reference[1] / 1000
        begun = time.perf_counter()
        full = evolve(evaluation.space, evaluation, settings, seed=seed)
        took = time.perf_counter() - begun
        bare = Settings(settings.population, settings.generations, seeded=0.0, refine_every=0)
        plain = evolve(evaluation.space, evaluation, bare, seed=seed)
        begun = time.perf_counter()
        chance = baselines.random_search(evaluation.space, evaluation, full.evaluated, np.random.default_rng(seed))
        chance_took = time.perf_counter() - begun
        values = [hypervolume(found.points, reference) / box for found in (full.archive, plain.archive, chance)]
        row = f"{seed:4d}  {full.evaluated:6d}  {values[0]:7.2f} {took:5.1f}   {values[1]:16.2f}  {values[2]:7.2f}"
        print(f"{row}  {chance_took:6.1f}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=Path, help="scores from a file instead of made-up ones")
    parser.add_argument("--plans", type=int, default=200_000)
    parser.add_argument("--generations", type=int, default=Settings().generations)
    parser.add_argument("--carry", action="store_true", help="also search plans that carry scores")
    options = parser.parse_args()
    if options.bank:
        where, data = read_bank(options.bank)
    else:
        where = synthetic.places(SITES, HEADS)
        data = synthetic.scores(where, SAMPLES)
    scorer = BitScorer(data, synthetic.costs(where), where, measures=synthetic.MEASURES)
    print(f"{len(data):,} samples x {len(scorer.sites)} exits, {len(scorer.heads)} heads, one thread:")
    trusting = BitScorer(data, scorer.costs, where, measures=synthetic.MEASURES, trust=0.3)
    for judge, carry, plans in ((scorer, 0.0, options.plans), (trusting, 0.0, options.plans), (scorer, 0.5, 200)):
        rates = [plans_per_second(judge, carry, plans, seed) for seed in range(3)]
        print(f"  trust {judge.judge.trust}, carry {carry}: {sorted(rates)[1]:,.0f} plans/s (median of 3)")

    carries = synthetic.CARRIES if options.carry else (0.0,)
    reference = (1.0, 1.1 * scorer.costs["macs"].trunk)
    print("\nhypervolume, per mille of the box error <= 1, cost <= 1.1 x trunk")
    evaluation = Evaluation(synthetic.space(where, scorer.levels, carries=carries), scorer)
    compare(evaluation, reference, range(3), Settings(generations=options.generations))

    small = [(site, heads[:2]) for site, heads in where[1::3]][:3]
    levels = 24
    print(f"\nsmall space: {len(small)} sites x 2 heads x {levels} levels, margin")
    evaluation = synthetic.evaluation(small, data, levels, measures=("margin",), carries=(0.0,))
    bits = evaluation.scorer
    begun = time.perf_counter()
    best = baselines.exhaustive(bits, "macs", range(levels))
    optimum = hypervolume(best, reference) / (reference[0] * reference[1] / 1000)
    count = baselines.count_plans(bits, range(levels))
    print(f"exhaustive optimum over {count:,} plans: {optimum:.2f} ({time.perf_counter() - begun:.1f} s)")
    compare(evaluation, reference, range(3), Settings(generations=options.generations))


if __name__ == "__main__":
    main()
