"""What the cost models say against what a clock says. Run by hand, on a machine that does nothing else:

    python -m tests.benchmarks.bench_costs calibrate -o mydevice.json
    python -m tests.benchmarks.bench_costs networks [--device mydevice.json] [--held-out]
    python -m tests.benchmarks.bench_costs plans RUN [--device mydevice.json] [--count 50]
    python -m tests.benchmarks.bench_costs fronts RUN_MACS RUN_LATENCY [--at -0.5 -1]
    python -m tests.benchmarks.bench_costs search-cost [--device mydevice.json]

- calibrate: one calibration file for all these networks (and the heads of runs), as ``eexform calibrate`` makes it.
- networks: whole networks (the zoo through both doors, real trunks in ``EEXFORM_SHARED``) at batch 1: every model
  against session time, all networks in turns. What is no time is multiplied by one constant, fitted to the
  same networks by least squares of logarithms: the naive baseline. ``latency_ort`` stands there twice: what two
  measurements differ by is as good as it gets. ``--held-out`` adds tables without the entries that only the network
  in question (through both doors) contributed.
- plans, fronts: networks with exits; see :mod:`tests.benchmarks.bench_costs_plans`.
- search-cost: how long a search waits for the path costs of its candidates.

Tables are markdown; ``-o FILE`` adds them to a file.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

import eexform as ee
from eexform.backends import ort
from eexform.cost_models import CostModel, parse, path_costs
from eexform.errors import EexformError
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.passes import PassContext
from eexform.passes.fold_batch_norm import FoldBatchNorm
from eexform.search.candidates import choose
from eexform.search.options import SearchOptions
from eexform.search.run import open_run
from tests import zoo
from tests.benchmarks import bench_costs_plans
from tests.benchmarks.bench_costs_shared import (
    COLUMNS,
    Errors,
    Named,
    Report,
    Said,
    fitted,
    heading,
    in_turns,
    models_of,
    random_feeds,
    shared,
    symbols,
    table,
)
from tests.zoo import doors, modules

TRUNKS = ("cifar10_resnet20", "cifar10_resnet56", "ic_resnet8_cifar10", "ic_resnet_large_cifar10", "kws_dscnn")
Predictions = dict[str, np.ndarray]
Key = tuple[str, str, tuple[int, ...]]
"""Operator, variant and sizes: what a table looks kernels up by."""


def networks(asked: argparse.Namespace, report: Report) -> None:
    """Every model against session time, over whole networks."""
    graphs = every_network(asked.networks, asked.files)
    models, notes = models_of(asked.models, asked.device, asked.threads)
    names = list(graphs)
    report.add(heading("Whole networks, batch 1", asked.threads, f"median of {asked.rounds} rounds in turns"))
    sessions = [ort.session(graph, threads=asked.threads) for graph in graphs.values()]
    feeds = [random_feeds(graph) for graph in graphs.values()]
    # taken apart, so that the clock's own uncertainty can be seen: every other round on its own
    calls = [partial(session.run, None, fed) for session, fed in zip(sessions, feeds, strict=True)]
    times = in_turns(calls, asked.rounds)
    measured = np.median(times, axis=0)
    low, high = np.percentile(times, [25, 75], axis=0)
    predictions: Predictions = {
        "clock, odd rounds against even": np.median(times[1::2], axis=0) * measured / np.median(times[::2], axis=0)
    }
    for named in models:
        predictions[named.label], lines = predict(named.model, graphs)
        notes += [f"{named.text}: {line}" for line in lines]
        if named.model.measured:
            predictions[f"{named.label}, again"] = predict(named.model, graphs)[0]
        if named.model.name == "table" and asked.held_out:
            held, lines = held_out(named, graphs)
            predictions["table, network held out"] = held
            notes += lines
    groups = {"all": names, "zoo": [n for n in names if ":" in n], "trunks": [n for n in names if ":" not in n]}
    scaled = {named.label for named in models if named.scaled}
    rows = []
    for group, members in groups.items():
        at = [names.index(name) for name in members]
        for label, predicted in predictions.items() if at else ():
            told = fitted(predicted[at], measured[at]) if label in scaled else predicted[at]
            rows.append((label, group, *Errors.of(members, told, measured[at]).cells))
    report.add(table(("model", "networks", *COLUMNS), rows))
    spread = 100 * (high - low) / measured
    report.add(
        f"Spread of a measurement (interquartile range): median {np.median(spread):.1f} %, most {spread.max():.1f} %"
    )
    report.notes(notes)
    if asked.each:
        predictions |= {label: fitted(predictions[label], measured) for label in scaled}
        each = [
            (name, f"{measured[at]:.4f}", f"{spread[at]:.1f} %", *(f"{row[at]:.4f}" for row in predictions.values()))
            for at, name in enumerate(names)
        ]
        report.add(table(("network", "measured ms", "spread", *predictions), each))


def every_network(chosen: Sequence[str], files: Sequence[Path]) -> dict[str, Graph]:
    """Graphs by name: the writers' zoo, that of modules through both doors, real trunks, and files.

    Args:
        chosen: of ``writers``, ``torch``, ``onnx``, ``trunks``.
        files: models beside them.
    """
    graphs: dict[str, Graph] = {}
    if "writers" in chosen:
        with tempfile.TemporaryDirectory() as folder:
            for name in zoo.NAMES:
                path = Path(folder) / f"{name}.onnx"
                onnx.save(zoo.build(name), path)
                graphs[f"writer:{name}"] = ee.load(path)
    for door in doors.DOORS:
        if door in chosen:
            graphs |= {f"{door}:{name}": doors.graph(name, door) for name in modules.NAMES}
    if "trunks" in chosen:
        graphs |= {name: ee.load(shared() / "models" / f"{name}.onnx") for name in TRUNKS}
    return graphs | {path.stem: ee.load(path) for path in files}


def predict(model: CostModel, graphs: dict[str, Graph]) -> tuple[np.ndarray, list[str]]:
    """A model's totals, NaN where it gives none, and what it says about its own gaps."""
    totals = np.full(len(graphs), np.nan)
    unknown: dict[str, None] = {}
    lines, outside = [], 0
    for place, (name, graph) in enumerate(graphs.items()):
        try:
            cost = bound(model, graph).cost(graph)
        except EexformError as error:
            lines.append(f"no figure for {name}: {error}")
            continue
        totals[place] = cost.total
        unknown |= dict.fromkeys(operator for _, operator in cost.unknown)
        outside += bool(cost.estimated)
    if unknown:
        lines.append(f"not counted: {', '.join(unknown)}")
    if outside:
        lines.append(f"{outside} of {len(graphs)} networks hold something it has no data for")
    return totals, lines


def bound(model: CostModel, graph: Graph) -> CostModel:
    """The model with a size for what the graph's inputs leave open."""
    open_ = symbols(graph)
    return replace(model, bindings=open_) if open_ and hasattr(model, "bindings") else model  # type: ignore[type-var]


def held_out(named: Named, graphs: dict[str, Graph]) -> tuple[np.ndarray, list[str]]:
    """What a table says of each network without the entries that only this network contributed.

    Those of its grid (cut channels, heads) go as well, and those of the same module through the other door.

    Args:
        named: a table with its calibration file as ``device``.
        graphs: the networks that the file was calibrated for, at least.
    """
    path = Path(str(getattr(named.model, "device", "")))
    if path.suffix != ".json":
        return np.full(len(graphs), np.nan), [f"{named.text}: --held-out needs a calibration file (.json)"]
    plain = json.loads(path.read_text(encoding="utf-8"))
    families: dict[str, set[Key]] = {}
    for name, graph in graphs.items():
        families.setdefault(_family(name), set()).update(_keys(graph, plain["kernels"]))
    totals, dropped = np.full(len(graphs), np.nan), []
    with tempfile.TemporaryDirectory() as folder:
        for place, (name, graph) in enumerate(graphs.items()):
            others = set[Key]().union(*(keys for other, keys in families.items() if other != _family(name)))
            own = families[_family(name)] - others
            kept = [entry for entry in plain["table"] if _key(entry["op"], entry["variant"], entry["sizes"]) not in own]
            dropped.append(len(plain["table"]) - len(kept))
            less = Path(folder) / f"without-{place}.json"
            less.write_text(json.dumps({**plain, "table": kept}), encoding="utf-8")
            without: Any = replace(named.model, device=str(less))  # type: ignore[type-var]
            totals[place] = predict(without, {name: graph})[0][0]
    return totals, [
        f"table, network held out: of {len(plain['table'])} entries, {np.median(dropped):.0f} (median) to "
        f"{max(dropped)} are a network's own and left out for it; what the file says beside kernels (a call, "
        "routing) is kept"
    ]


def _family(name: str) -> str:
    door, _, module = name.rpartition(":")
    return module if door in doors.DOORS else name


def _key(op: str, variant: str, sizes: Sequence[int]) -> Key:
    return op, variant, tuple(map(int, sizes))


def _keys(graph: Graph, kind: str) -> set[Key]:
    """What calibrating a network puts into a table."""
    if kind == "onnxruntime":
        from eexform.cost_models._grid import planned

        return set(planned({"": graph}, bindings=symbols(graph)).operators)
    from eexform.cost_models._kernels import kernels

    return {_key(kernel.op, kernel.variant, kernel.sizes) for kernel in kernels(graph, symbols(graph))}


def calibrate_all(asked: argparse.Namespace, report: Report) -> None:
    """One calibration file for all networks; a file that is there already is gone on with."""
    from eexform.cost_models.calibrate import calibrate

    graphs = every_network(asked.networks, asked.files)
    for folder in asked.runs:
        graphs |= bench_costs_plans.covering(open_run(folder))
    open_ = {name: size for graph in graphs.values() for name, size in symbols(graph).items()}
    found = calibrate(
        graphs,
        threads=asked.threads,
        repeats=asked.repeats,
        grid=not asked.no_grid,
        bindings=open_,
        resume=asked.out if asked.out.exists() else None,
        keep=lambda part: part.save(asked.out),
        progress=Said(),
    )
    found.save(asked.out)
    report.add(
        heading(f"Calibrated for {len(graphs)} networks: {asked.out.name}", asked.threads, f"{asked.repeats} rounds")
    )
    report.add(f"- {len(found.rows)} kernels; {len(found.refused)} could not be measured\n- {dict(found.device)}")


def search_cost(asked: argparse.Namespace, report: Report) -> None:
    """How long the path costs of a search's default candidates take."""
    models, notes = models_of(asked.models, asked.device, asked.threads)
    report.add(heading("What path costs take", asked.threads, f"{asked.repeats} times each, the least counts"))
    rows = []
    for path in asked.files or [shared() / "models" / f"{name}.onnx" for name in TRUNKS[:2]]:
        trunk = FoldBatchNorm().run(ee.load(path), PassContext()).graph
        options = SearchOptions()
        places = choose(trunk, find_sites(trunk, max_live=options.max_live), parse("macs").cost(trunk), options, {})
        heads = sum(len(specs) for specs in places.heads.values())
        for named in models:
            whole, single = [], []
            for _ in range(asked.repeats):
                started = time.perf_counter()
                path_costs(named.model, trunk, places.sites, places.heads)
                whole.append(time.perf_counter() - started)
                started = time.perf_counter()
                named.model.cost(trunk)
                single.append(time.perf_counter() - started)
            cells = (f"{len(places.sites)} sites, {heads} heads", f"{min(whole):.3f} s", f"{1e3 * min(single):.1f} ms")
            rows.append((path.stem, named.text, *cells))
    report.add(table(("network", "model", "candidates", "path costs", "one cost of the trunk"), rows))
    report.notes(notes)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = argparse.ArgumentParser(add_help=False)
    usual.add_argument("--device", help="device file for roofline and table: name, .toml, or what calibrate wrote")
    usual.add_argument("--models", nargs="+", default=[], help="cost models instead of all, NAME:SETTING=VALUE,...")
    usual.add_argument("--threads", type=int, default=1)
    usual.add_argument("-o", dest="out", type=Path, help="file that the tables are added to")
    commands = top.add_subparsers(required=True)
    command = commands.add_parser("calibrate")
    command.add_argument("files", type=Path, nargs="*", help="models beside the zoo and the trunks")
    command.add_argument("--networks", nargs="*", default=KINDS, choices=KINDS)
    command.add_argument("--runs", type=Path, nargs="+", default=[], help="runs whose plans' heads are measured, too")
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--repeats", type=int, default=15)
    command.add_argument("--no-grid", action="store_true", help="the networks' own kernels alone")
    command.add_argument("-o", dest="out", type=Path, required=True)
    command.set_defaults(run=calibrate_all)
    command = commands.add_parser("networks", parents=[usual])
    command.add_argument("files", type=Path, nargs="*", help="models beside the zoo and the trunks")
    command.add_argument("--networks", nargs="*", default=KINDS, choices=KINDS)
    command.add_argument("--held-out", action="store_true")
    command.add_argument("--rounds", type=int, default=60)
    command.add_argument("--each", action="store_true", help="every network's figures, too")
    command.set_defaults(run=networks)
    command = commands.add_parser("search-cost", parents=[usual])
    command.add_argument("files", type=Path, nargs="*", help="models instead of ResNet-20 and ResNet-56")
    command.add_argument("--repeats", type=int, default=3)
    command.set_defaults(run=search_cost)
    bench_costs_plans.add_commands(commands, usual)
    return top


KINDS = ("writers", *doors.DOORS, "trunks")


def main() -> None:
    asked = parser().parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    asked.run(asked, Report(None if asked.run is calibrate_all else asked.out))


if __name__ == "__main__":
    main()
