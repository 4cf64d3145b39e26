"""How well plans chosen on one half of the unseen data hold on the other half, over several redraws of the halves.

    python -m tests.benchmarks.bench_front RUN [--redraws 10] [--limits 0 -0.25 -0.5 -1]

The run's trained heads are kept; only who selects and who judges is drawn anew: select and test are pooled, divided at
random as often as asked, searched on one part and judged on the other. The first row of each limit is the run's own
division. Temperatures stay those of the run (calibrate is never part of either half).
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console
from rich.table import Table

from eexform.cost_models import parse, path_costs
from eexform.heads import HeadSpec
from eexform.ir.sites import find_sites
from eexform.passes import PassContext, make
from eexform.search.bits import BitScorer
from eexform.search.evaluation import Evaluation
from eexform.search.front import Front, build_front, describe_plan
from eexform.search.nsga2 import Settings, evolve
from eexform.search.run import Run, open_run
from eexform.search.scorer import Candidate, HeadScores, Scorer
from eexform.search.space import build_space
from eexform.training.bank import Bank


@dataclass(frozen=True)
class Judged:
    """A picked plan on the judging half: points against the trunk, share of its MACs, exits."""

    points: float
    macs: float
    worst: float
    exits: int


def scores_of(bank: Bank, split: str, pairs: Sequence[tuple[str, str]], judge: Bank) -> HeadScores:
    return HeadScores(
        final=np.asarray(bank.final(split)),
        labels=np.asarray(bank.labels(split)),
        heads={pair: np.asarray(bank.scores(*pair, split)) for pair in pairs},
        temperatures={pair: bank.records[pair].temperature for pair in pairs},
        scores=bank.facts["scores"],
        final_temperature=bank.facts["temperature"],
        gates={pair: np.asarray(bank.gates(*pair, split)) for pair in pairs if HeadSpec.parse(pair[1]).gate},
        opinion=(np.asarray(judge.final(split)), judge.facts["temperature"]),
    )


def pooled(first: HeadScores, second: HeadScores) -> HeadScores:
    return replace(
        first,
        final=np.concatenate([first.final, second.final]),
        labels=np.concatenate([first.labels, second.labels]),
        heads={pair: np.concatenate([first.heads[pair], second.heads[pair]]) for pair in first.heads},
        gates={pair: np.concatenate([first.gates[pair], second.gates[pair]]) for pair in first.gates},
        opinion=(np.concatenate([first.opinion[0], second.opinion[0]]), first.opinion[1]),
    )


def rows_of(scores: HeadScores, rows: np.ndarray) -> HeadScores:
    return replace(
        scores,
        final=scores.final[rows],
        labels=scores.labels[rows],
        heads={pair: array[rows] for pair, array in scores.heads.items()},
        gates={pair: array[rows] for pair, array in scores.gates.items()},
        opinion=(scores.opinion[0][rows], scores.opinion[1]),
    )


def before(select: HeadScores, test: HeadScores) -> dict[str, HeadScores]:
    """The splits as the model says that plans are compared with, without exits."""
    return {
        name: replace(scores, final=scores.opinion[0], final_temperature=scores.opinion[1])
        for name, scores in (("select", select), ("test", test))
        if scores.opinion is not None
    }


class Redraw:
    """Searches over a run's bank with other divisions of the unseen data."""

    def __init__(self, run: Run, seed: int) -> None:
        self.options, self.seed = run.facts["options"], seed
        self.trunk = make("fold_batch_norm")(run.graph).graph
        self.bank = run.bank(self.trunk)
        pairs = list(self.bank.records)
        found = find_sites(self.trunk)
        self.sites = [found.site(value) for value in self.bank.sites(self.trunk.digest)]
        heads = {s.value: [HeadSpec.parse(head) for at, head in pairs if at == s.value] for s in self.sites}
        self.costs = {name: path_costs(parse(name), self.trunk, self.sites, heads) for name in ("macs", "params")}
        self.places = [(s.value, [str(spec) for spec in heads[s.value]]) for s in self.sites]
        # points are against the model that the user had, also where the trunk was fine-tuned
        judge = run.bank(make("fold_batch_norm")(run.original).graph)
        self.halves = (scores_of(self.bank, "select", pairs, judge), scores_of(self.bank, "test", pairs, judge))

    def search(self, select: HeadScores, test: HeadScores) -> Front:
        given = {"final_temperature": self.bank.facts["temperature"]}
        context = PassContext(heads=self.bank)
        space = build_space([("insert_exits", given)], self.trunk, context, levels=self.options["levels"])
        fee = self.options.get("exit_fee", 0.01)
        seen = {**self.costs, "macs": self.costs["macs"].with_fee(fee)}
        measures = tuple(space.genes[0, "measure"].domain.values)  # type: ignore[attr-defined]
        trust = self.options["trust"]
        bits = BitScorer(select, seen, self.places, measures=measures, levels=self.options["levels"], trust=trust)
        evaluation = Evaluation(space, bits)
        settings = Settings(population=self.options["population"], generations=self.options["generations"])
        state = evolve(space, evaluation, settings, seed=self.seed)
        scorer = Scorer({"select": select, "test": test}, self.costs, trust=trust)
        plans = [describe_plan(evaluation.candidate(one), scorer) for one in state.archive]
        return build_front(plans, describe_plan(Candidate(), Scorer(before(select, test), self.costs, trust=trust)))

    def divisions(self, count: int) -> list[tuple[HeadScores, HeadScores]]:
        select, test = self.halves
        whole = pooled(select, test)
        found = [(select, test)]
        for draw in range(1, count):
            order = np.random.default_rng([self.seed, draw]).permutation(len(whole))
            found.append((rows_of(whole, order[: len(select)]), rows_of(whole, order[len(select) :])))
        return found


def judge(front: Front, limit: float) -> Judged:
    plan, trunk = front.pick(f"min-accuracy={limit:+.2f}"), front.trunk
    return Judged(
        points=100 * (plan.test["accuracy"] - trunk.test["accuracy"]),
        macs=100 * plan.test["macs"] / trunk.test["macs"],
        worst=100 * plan.worst["macs"] / trunk.test["macs"],
        exits=len(plan.exits),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--redraws", type=int, default=10)
    parser.add_argument("--limits", type=float, nargs="+", default=[0.0, -0.25, -0.5, -1.0])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    redraw = Redraw(open_run(given.run), given.seed)
    found: dict[float, list[Judged]] = defaultdict(list)
    seconds = []
    for select, test in redraw.divisions(given.redraws):
        begun = time.perf_counter()
        front = redraw.search(select, test)
        seconds.append(time.perf_counter() - begun)
        for limit in given.limits:
            found[limit].append(judge(front, limit))
    table = Table(title=f"{given.redraws} divisions, search {np.median(seconds):.1f} s each (median)")
    for column in ("limit on select", "division", "points on test", "MACs on test", "worst case", "exits"):
        table.add_column(column, justify="right")
    for limit, results in found.items():
        own = results[0]
        row = (f"{own.points:+.2f}", f"{own.macs:.1f} %", f"{own.worst:.1f} %", f"{own.exits}")
        table.add_row(f"{limit:+.2f}", "the run's own", *row)
        points, macs, worst, exits = (
            np.array([getattr(one, name) for one in results]) for name in ("points", "macs", "worst", "exits")
        )
        table.add_row(
            "",
            f"all {len(results)}: mean (sd)",
            f"{points.mean():+.2f} ({points.std():.2f}), {points.min():+.2f}..{points.max():+.2f}",
            f"{macs.mean():.1f} % ({macs.std():.1f})",
            f"{worst.mean():.1f} %",
            f"{exits.mean():.1f}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
