"""Fronts of several runs over the same model and splits, side by side, and their hypervolume.

    python -m tests.benchmarks.bench_fronts RUN [RUN ...] [--at 0.2 0.3 0.4 0.5 0.6 0.7 0.8] [--budgets 5 10]

Per run and share of the original's MACs: the plan that is best on select among those within the share on select, and
what it gives on test. A run that searched trunks is shown twice, with its exits and as its trunks alone. The
hypervolume is that of error and cost on test, of the plans that no other one beats on select, up to an error of one
half and the cost of the original; the larger the better, 0.5 is the most.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from eexform.cost_models import parse
from eexform.search.archive import hypervolume, non_dominated
from eexform.search.run import Run, open_run
from eexform.search.settling import replay_passes
from eexform.search.trunk_trials import Trunk

REFERENCE = (0.5, 1.0)


@dataclass(frozen=True)
class Points:
    """Plans as numbers, [plans, 2] each: error and MACs as a share of the original's."""

    name: str
    select: np.ndarray
    test: np.ndarray

    def front(self) -> Points:
        kept = non_dominated(self.select)
        return Points(self.name, self.select[kept], self.test[kept])

    def within(self, share: float) -> tuple[float, float] | None:
        """(error, cost) on test of the best plan on select whose cost there is at most ``share``."""
        fits = np.flatnonzero(self.select[:, 1] <= share)
        if not len(fits):
            return None
        error, cost = self.test[fits[np.argmin(self.select[fits, 0])]]
        return float(error), float(cost)


def plans_of(run: Run, name: str) -> Points:
    whole = float(run.front.trunk.select["cost"]["macs"])
    select, test = (
        np.array([[1 - figures["accuracy"], figures["cost"]["macs"] / whole] for figures in split])
        for split in ([plan.select for plan in run.front.plans], [plan.test for plan in run.front.plans])
    )
    return Points(name, select, test).front()


def trunks_of(run: Run, name: str) -> Points | None:
    """The trunks that were trained, without exits, and the original."""
    if "trunks" not in run.facts:
        return None
    macs, arrays = parse("macs"), run.context().arrays
    whole = macs.cost(run.graph).total
    both: dict[str, list[list[float]]] = {
        split: [[1 - run.facts["trunk"]["accuracy"][split], 1.0]] for split in ("select", "test")
    }
    for plain in run.facts["trunks"]:
        graph = replay_passes(Trunk.from_json(plain).passes, run.graph, arrays)[-1]
        facts = run.bank(graph).facts
        for split, points in both.items():
            points.append([1 - facts["accuracy"][split], macs.cost(graph).total / whole])
    return Points(name, np.array(both["select"]), np.array(both["test"])).front()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--at", nargs="+", type=float, default=[0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--budgets", nargs="+", type=float, default=[], help="millions of MACs")
    given = parser.parse_args(arguments)
    found: list[Points] = []
    whole = 0.0
    for path in given.runs:
        run = open_run(path)
        whole = float(run.front.trunk.select["cost"]["macs"])
        found.append(plans_of(run, path))
        alone = trunks_of(run, f"{path}, trunks alone")
        found += [alone] if alone else []
    shares = [*given.at, *(budget * 1e6 / whole for budget in given.budgets)]
    table = Table("MACs at most", *(points.name for points in found))
    for share in shares:
        cells = [points.within(share) for points in found]
        shown = ["-" if cell is None else f"{100 * (1 - cell[0]):.2f} at {cell[1]:.3f}" for cell in cells]
        table.add_row(f"{share:.3f} ({share * whole / 1e6:.2f} M)", *shown)
    table.add_row("hypervolume", *(f"{hypervolume(points.test, REFERENCE):.4f}" for points in found))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
