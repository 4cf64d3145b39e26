"""Networks with exits: predicted against measured mean latency, and fronts of several runs measured side by side.

The sub-commands ``plans`` and ``fronts`` of :mod:`tests.benchmarks.bench_costs`. Test samples come one by one in the
order of the split; plans take turns after every few samples. A plan's measured latency is the mean over the samples of
the first quartile over the repeats.

- plans: of plans spread over a front's cost, as ``if`` files: the mean over the samples of the path cost up to the exit
  that each really took, as a search would predict it, against the clock; with routing, and with routing left out. For
  some of the plans the difference is taken apart, by forcing every sample to each exit in turn and by timing the same
  nodes without control flow:

      trunk    what the trunk alone takes up to the exit's site
      heads    what the same takes more with the heads passed on the way
      routing  what the ``if`` file forced to that exit takes more than that
      mixing   what the plan itself takes more than the forced ones, each weighted by its share of the samples

- fronts: of every run the cheapest plan that is at most so many points below the original, on select and (a look at the
  test labels, to separate speed from luck) on test; all timed in one run, with the original.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eexform.backends.export import export
from eexform.backends.lower_if import EXIT_INDEX
from eexform.cost_models import CostModel, PathCosts, path_costs
from eexform.heads import HeadSpec
from eexform.ir.extract import extract
from eexform.ir.flow import WIDEST
from eexform.ir.graph import Graph
from eexform.ir.serialize import save
from eexform.ir.sites import find_sites
from eexform.search.front import Plan
from eexform.search.run import Run, open_run
from eexform.search.settling import replay_passes
from eexform.search.space import EXITS
from tests.benchmarks.bench_costs_shared import (
    COLUMNS,
    Errors,
    Feeds,
    Report,
    Stream,
    fitted,
    heading,
    models_of,
    stream,
    table,
)


def add_commands(commands: Any, usual: argparse.ArgumentParser) -> None:
    """``plans`` and ``fronts``."""
    timed = argparse.ArgumentParser(add_help=False)
    timed.add_argument("--data", help="where the samples are now, if not where they were")
    timed.add_argument("--samples", type=int, default=1000, help="of the test split, from its beginning")
    timed.add_argument("--repeats", type=int, default=9)
    command = commands.add_parser("plans", parents=[usual, timed])
    command.add_argument("folder", type=Path, help="a finished run", metavar="RUN")
    command.add_argument("--count", type=int, default=50)
    command.add_argument("--apart", type=int, default=4, help="plans whose time is taken apart")
    command.add_argument("--each", action="store_true", help="every plan's figures, too")
    command.set_defaults(run=plans)
    command = commands.add_parser("fronts", parents=[usual, timed])
    command.add_argument("folders", type=Path, nargs="+", help="finished runs over one trunk", metavar="RUN")
    command.add_argument("--at", type=float, nargs="+", default=[-0.5, -1.0], help="points against the original")
    command.set_defaults(run=fronts)


def samples_of(run: Run, count: int, data: str | None) -> list[Feeds]:
    """The first samples of the test split, one by one."""
    dataset = run.dataset(data)
    positions = np.arange(min(count, dataset.size("test")))
    return [dict(dataset.batch("test", positions[at : at + 1]).feeds) for at in positions]


# -- plans -------------------------------------------------------------------------------------------------------------


def plans(asked: argparse.Namespace, report: Report) -> None:
    """Predicted against measured mean latency over a front."""
    run = open_run(asked.folder)
    chosen = spread([plan for plan in run.front if plan.exits], run.front.cost, asked.count)
    names = [f"plan {plan.index}" for plan in chosen]
    samples = samples_of(run, asked.samples, asked.data)
    models, notes = models_of(asked.models, asked.device, asked.threads)
    prices = [Prices(run, chosen, named.model) for named in models]
    notes += [f"{named.text}: {line}" for named, price in zip(models, prices, strict=True) for line in price.gaps]
    how = f"{len(samples)} test samples in their order, {asked.repeats} repeats"
    report.add(heading(f"{len(chosen)} plans of {asked.folder.name}, form if, batch 1", asked.threads, how))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{plan.index}.onnx" for plan in chosen]
        for plan, file in zip(chosen, files, strict=True):
            run.export(plan, file)
        trunk = Path(folder) / "trunk.onnx"
        save(trunk_of(run, chosen[0]), trunk)
        timed = stream([*files, trunk], samples, repeats=asked.repeats, threads=asked.threads)
    measured, alone = timed.mean[:-1], timed.mean[-1]
    taken = [np.asarray(output[EXIT_INDEX]) for output in timed.outputs[:-1]]
    rows, columns = [], {}
    for named, price in zip(models, prices, strict=True):
        for routed in (True, False):
            predicted = np.array([price.mean(*pair, routed=routed) for pair in zip(chosen, taken, strict=True)])
            predicted = fitted(predicted, measured) if named.scaled else predicted
            if routed:
                columns[named.label] = predicted
            if routed or price.routes:
                label = named.label if routed else f"{named.label}, routing left out"
                rows.append((label, *Errors.of(names, predicted, measured).cells))
    report.add(table(("model", *COLUMNS), rows))
    each = timed.each[:, :-1]
    noise = 100 * (np.percentile(each, 75, axis=0) - np.percentile(each, 25, axis=0)) / measured
    report.add(f"Spread of a plan's mean over the repeats: median {np.median(noise):.1f} %, most {noise.max():.1f} %")
    told = [f"{n.text} {p.trunk(chosen[0]):.4f}" for n, p in zip(models, prices, strict=True) if not n.scaled]
    report.notes([f"the trunk alone, in turns with the plans: {alone:.4f} ms; {', '.join(told)}", *notes])
    if asked.each:
        cells = [
            (name, str(len(plan.exits)), f"{measured[at]:.4f}", *(f"{row[at]:.4f}" for row in columns.values()))
            for at, (name, plan) in enumerate(zip(names, chosen, strict=True))
        ]
        report.add(table(("plan", "exits", "measured ms", *columns), cells))
    timers = [(named.label, price) for named, price in zip(models, prices, strict=True) if not named.scaled]
    for plan in spread(chosen, run.front.cost, asked.apart):
        at = chosen.index(plan)
        report.add(taken_apart(run, plan, taken[at], samples, timers, asked))


def spread(plans: Sequence[Plan], cost: Any, count: int) -> list[Plan]:
    """``count`` plans whose costs lie evenly between the cheapest and the dearest, as far as there are such."""
    if count >= len(plans):
        return list(plans)
    left, found = list(plans), []
    costs = [cost(plan) for plan in plans]
    for target in np.linspace(min(costs), max(costs), count):
        found.append(min(left, key=lambda plan: abs(cost(plan) - target)))
        left.remove(found[-1])
    return sorted(found, key=cost)


class Prices:
    """A cost model's path costs for plans of a run, as the search priced them."""

    def __init__(self, run: Run, plans: Sequence[Plan], model: CostModel) -> None:
        self.costs: dict[str, PathCosts] = {}
        for plan in plans:
            key = _trunk_key(plan)
            if key not in self.costs:
                alike = [other for other in plans if _trunk_key(other) == key]
                self.costs[key] = _priced(trunk_of(run, plan), alike, model)

    @property
    def gaps(self) -> list[str]:
        """What the model could not count, or has no data for."""
        unknown = {operator for costs in self.costs.values() for _, operator in costs.unknown}
        outside = {pair for costs in self.costs.values() for pair in costs.estimated}
        return [f"not counted: {', '.join(sorted(unknown))}"] * bool(unknown) + [
            f"{len(outside)} nodes are beyond its data"
        ] * bool(outside)

    @property
    def routes(self) -> bool:
        """Whether the model prices routing at all."""
        return any(any(costs.decision.values()) or any(costs.onward.values()) for costs in self.costs.values())

    def trunk(self, plan: Plan) -> float:
        """The plan's whole trunk without exits."""
        return self.costs[_trunk_key(plan)].trunk

    def path(self, plan: Plan, *, routed: bool = True) -> np.ndarray:
        """What a sample pays that leaves at exit i, the final exit last."""
        costs = self.costs[_trunk_key(plan)]
        costs = costs if routed else replace(costs, decision={}, onward={})
        return np.array(costs.path([(exit_.site, exit_.head) for exit_ in plan.exits]))

    def mean(self, plan: Plan, taken: np.ndarray, *, routed: bool = True) -> float:
        """Mean over samples that left at the exits ``taken``."""
        return float(self.path(plan, routed=routed)[taken].mean())


def trunk_of(run: Run, plan: Plan) -> Graph:
    """What the passes in front of the exits make of the run's trunk."""
    return replay_passes(_before(plan), run.graph, run.context().arrays)[-1]


def _before(plan: Plan) -> list[tuple[str, Mapping[str, Any]]]:
    return list(plan.recipe[: [name for name, _ in plan.recipe].index(EXITS)])


def covering(run: Run) -> dict[str, Graph]:
    """Plans of a run, as graphs with exits, that hold all heads of its front between them."""
    left = {(exit_.site, exit_.head) for plan in run.front for exit_ in plan.exits}
    found = {}
    while left:
        best = max(run.front, key=lambda plan: len({(e.site, e.head) for e in plan.exits} & left))
        left -= {(exit_.site, exit_.head) for exit_ in best.exits}
        found[f"{run.folder.path.name} plan {best.index}"] = run.materialise(best)
    return found


def _trunk_key(plan: Plan) -> str:
    return json.dumps([[name, dict(given)] for name, given in _before(plan)], sort_keys=True, default=str)


def _priced(trunk: Graph, plans: Sequence[Plan], model: CostModel) -> PathCosts:
    wanted = dict.fromkeys((exit_.site, exit_.head) for plan in plans for exit_ in plan.exits)
    sites = [site for site in find_sites(trunk, max_live=WIDEST).sites if any(site.value == at for at, _ in wanted)]
    heads = {site.value: [HeadSpec.parse(head) for at, head in wanted if at == site.value] for site in sites}
    return path_costs(model, trunk, sites, heads)


# -- one plan's time, taken apart --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Apart:
    """Milliseconds per way out, [exits + 1] each: the trunk up to there, heads passed, routing."""

    trunk: np.ndarray
    heads: np.ndarray
    routing: np.ndarray


def taken_apart(
    run: Run, plan: Plan, taken: np.ndarray, samples: Sequence[Feeds], timers: Sequence[Any], asked: argparse.Namespace
) -> str:
    """A table: trunk, heads and routing of a plan, weighted by the exits taken, measured and as models predict it."""
    graph = run.materialise(plan)
    shares = np.bincount(taken, minlength=len(plan.exits) + 1) / len(taken)
    with tempfile.TemporaryDirectory() as folder:
        files = _parts(graph, Path(folder))
        timed = stream(files, samples, repeats=asked.repeats, threads=asked.threads)
    ways = len(shares)
    alone, flat, forced = (timed.mean[part * ways : (part + 1) * ways] for part in range(3))
    whole = timed.mean[-1]
    clock = Apart(alone, flat - alone, forced - flat)
    rows = [("measured", *_weighted(clock, shares), f"{whole - forced @ shares:.4f}", f"{whole:.4f}")]
    for label, price in timers:
        routed, bare = price.path(plan), price.path(plan, routed=False)
        costs = price.costs[_trunk_key(plan)]
        trunk = np.array(costs.path([(exit_.site, exit_.head) for exit_ in plan.exits], heads_free=True))
        told = Apart(trunk, bare - trunk, routed - bare)
        rows.append((label, *_weighted(told, shares), "-", f"{routed @ shares:.4f}"))
    title = f"Plan {plan.index}: {ways - 1} exits, leaving {', '.join(f'{100 * share:.0f} %' for share in shares)}\n\n"
    return title + table(("ms", "trunk", "heads", "routing", "mixing", "all"), rows)


def _parts(graph: Graph, folder: Path) -> list[Path]:
    """Files: per way out the trunk alone, then trunk and heads, then the ``if`` file forced there; the plan's last."""
    ways = len(graph.exits) + 1
    files = []
    ends = [(item.site,) for item in graph.exits] + [(graph.final,)]
    for place, end in enumerate(ends):
        files.append(folder / f"trunk-{place}.onnx")
        save(extract(graph.replace(exits=()), graph.inputs, list(end)), files[-1])
    for place in range(ways):
        passed = [value for item in graph.exits[: place + 1] for value in item.values]
        values = [*passed, *([graph.final] if place == ways - 1 else [])]
        files.append(folder / f"flat-{place}.onnx")
        save(extract(graph.replace(exits=()), graph.inputs, list(dict.fromkeys(values))), files[-1])
    for place in range(ways):
        thresholds = [-math.inf if at == place else math.inf for at in range(ways - 1)]
        items = [replace(item, threshold=value) for item, value in zip(graph.exits, thresholds, strict=True)]
        files.append(folder / f"forced-{place}.onnx")
        export(graph.replace(exits=items), files[-1], "if")
    files.append(folder / "plan.onnx")
    export(graph, files[-1], "if")
    return files


def _weighted(parts: Apart, shares: np.ndarray) -> tuple[str, ...]:
    return tuple(f"{part @ shares:.4f}" for part in (parts.trunk, parts.heads, parts.routing))


# -- fronts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picked:
    """A plan of a run: the cheapest within ``points`` of the original's accuracy on a split."""

    points: float
    split: str
    run: Run
    plan: Plan


def fronts(asked: argparse.Namespace, report: Report) -> None:
    """Plans of several runs at equal accuracy, measured in one run."""
    runs = [open_run(folder) for folder in asked.folders]
    if len({(run.original.digest, run.facts["data_digest"]) for run in runs}) > 1:
        raise SystemExit("the runs are of different models or data: their plans cannot be compared")
    picked: list[Picked] = []
    missing = []
    for points in asked.at:
        for split in ("select", "test"):
            for run in runs:
                plan = cheapest(run, split, points)
                if plan is None:
                    missing.append(f"{run.folder.path.name} has no plan with exits at {points:+g} on {split}")
                else:
                    picked.append(Picked(points, split, run, plan))
    samples = samples_of(runs[0], asked.samples, asked.data)
    keys = list(dict.fromkeys((item.run.folder.path, item.plan.index) for item in picked))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "original.onnx"]
        save(runs[0].original, files[0])
        for place, key in enumerate(keys):
            item = next(item for item in picked if (item.run.folder.path, item.plan.index) == key)
            files.append(Path(folder) / f"{place}.onnx")
            item.run.export(item.plan, files[-1])
        timed = stream(files, samples, repeats=asked.repeats, threads=asked.threads)
    how = f"{len(samples)} test samples in their order, {asked.repeats} repeats"
    report.add(heading("Fronts at equal accuracy, form if, batch 1, all in turns", asked.threads, how))
    place_of = {key: place + 1 for place, key in enumerate(keys)}
    rows = [_front_row(item, runs, picked, place_of, timed) for item in picked]
    columns = (
        "points, split",
        "run",
        "plan",
        "select",
        "test",
        "MACs",
        "predicted",
        "ms",
        "original / ms",
        "first / ms",
    )
    report.add(table(columns, rows))
    report.add(
        f"- the original: {timed.mean[0]:.4f} ms\n- first: the first run's plan at the same accuracy; above 1, this "
        "row's is faster\n- behind ±: half the interquartile range over the repeats"
        + "".join(f"\n- {line}" for line in missing)
    )


def cheapest(run: Run, split: str, points: float) -> Plan | None:
    """The plan with exits that the run's objective says is cheapest among those accurate enough on a split."""
    front = run.front
    least = getattr(front.trunk, split)["accuracy"] + points / 100 - 5e-7
    fit = [plan for plan in front if plan.exits and getattr(plan, split)["accuracy"] >= least]
    return min(fit, key=lambda plan: getattr(plan, split)["cost"][front.objective], default=None)


def _front_row(
    item: Picked, runs: Sequence[Run], picked: Sequence[Picked], place_of: Mapping[Any, int], timed: Stream
) -> tuple[str, ...]:
    def place(other: Picked) -> int:
        return place_of[other.run.folder.path, other.plan.index]

    plan, objective = item.plan, item.run.front.objective
    base = next(
        (one for one in picked if one.run is runs[0] and (one.points, one.split) == (item.points, item.split)), None
    )
    macs = plan.test["cost"]["macs"] / item.run.front.trunk.test["cost"]["macs"]
    half = _half_range(timed.each[:, place(item)])
    return (
        f"{item.points:+g}, {item.split}",
        item.run.folder.path.name,
        str(plan.index),
        f"{100 * plan.select['accuracy']:.2f} %",
        f"{100 * plan.test['accuracy']:.2f} %",
        f"{macs:.3f}",
        f"{plan.test['cost'][objective]:.4g} {objective}",
        f"{timed.mean[place(item)]:.4f} ± {half:.4f}",
        _ratio(timed, 0, place(item)),
        "-" if base is None else _ratio(timed, place(base), place(item)),
    )


def _ratio(timed: Stream, first: int, second: int) -> str:
    """How many times faster the second is, from the repeats' means."""
    ratios = timed.each[:, first] / timed.each[:, second]
    return f"{np.median(ratios):.3f} ± {_half_range(ratios):.3f}"


def _half_range(values: np.ndarray) -> float:
    low, high = np.percentile(values, [25, 75])
    return float(high - low) / 2
