"""What pruning finds and what it saves, on the zoo and on files, and how it grows with the number of nodes. By hand:

    python -m tests.benchmarks.bench_prune [--names vit swin ...] [--files model.onnx ...] [--round-to 8] [--markdown]
    python -m tests.benchmarks.bench_prune --grow residual masked [--nodes 1250 2500 5000 10000]

The first prints one row per network (batch normalisation folded): prunable groups of all, the share of MACs that goes
where each of them is cut to one unit, and after a cut of 30 % and of 50 % of the MACs (criterion l2, groups of every
kind, families on a par): MACs left, and the time that onnxruntime takes, both relative to the uncut network. Times are
of one run: every round gives the same batch to the uncut and both cut files, in an order that rotates; median of the
rounds' ratios and their quartiles. onnxruntime has one thread, the caller's, and the time is that thread's CPU time, so
that other work on the machine does not count. ``*`` marks a cut that could not save as much (limits: a tenth of every
group stays, and ``--round-to``).

The second prints CPU seconds: loading, finding the groups, scoring and allocating 30 %, cutting, types of the result.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import eexform as ee
from eexform import passes
from eexform.frontends.onnx import from_model
from eexform.ir.cut import cut, predicted
from eexform.ir.graph import Graph
from eexform.ir.groups import ChannelGroups, find_groups
from eexform.ir.inference import infer_types
from eexform.pruning import criteria
from eexform.pruning.allocate import Cuts, Limits, Order, to_cost
from eexform.verification.bench import runner
from tests.zoo import doors, modules
from tests.zoo.big import KINDS

RATIOS = (0.3, 0.5)
COLUMNS = ("network", "groups", "prunable %", "MACs -30%", "time -30%", "MACs -50%", "time -50%")
WIDTHS = (24, 9, 12, 11, 21, 11, 21)
GROWTH = ("load s", "groups s", "allocate s", "cut s", "types s", "sum s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", choices=modules.NAMES, nargs="*", default=modules.NAMES)
    parser.add_argument("--files", type=Path, nargs="*", default=[])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--round-to", type=int, default=1, help="channels kept are a multiple of this, where they can")
    parser.add_argument("--markdown", action="store_true", help="a table for a document")
    parser.add_argument("--grow", choices=sorted(KINDS), nargs="+", help="time large graphs instead")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1250, 2500, 5000, 10000])
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if asked.grow:
        print(f"{'kind':10}{'nodes':>8}" + "".join(f"{name:>12}" for name in GROWTH) + f"{'groups':>8}{'MACs':>8}")
        for kind in asked.grow:
            for nodes in asked.nodes:
                grow(kind, nodes)
        return
    show(COLUMNS, asked.markdown)
    if asked.markdown:
        show(tuple("---" for _ in COLUMNS), True)
    for name in asked.names:
        args = modules.inputs(name, asked.batch, seed=6)
        graph = doors.graph(name, "torch")
        show((name, *measure(graph, doors.feeds(graph, args), asked.rounds, asked.round_to)), asked.markdown)
    for file in asked.files:
        graph = ee.load(file)
        show((file.stem, *measure(graph, random(graph, asked.batch), asked.rounds, asked.round_to)), asked.markdown)


def show(row: tuple[object, ...], markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    else:
        print("".join(f"{cell!s:>{width}}" for cell, width in zip(row, WIDTHS, strict=True)), flush=True)


def measure(graph: Graph, feeds: Mapping[str, np.ndarray], rounds: int, round_to: int) -> tuple[str, ...]:
    """Groups, prunable share, and MACs and time per ratio."""
    graph = passes.make("fold_batch_norm")(graph).graph
    found = find_groups(graph)
    free = [group for group in found.groups if group.prunable]
    whole = predicted(graph, {}, found).macs
    least = predicted(graph, {group.name: range(1, group.size) for group in free}, found).macs
    graphs, cells = [graph], []
    for ratio in RATIOS:
        cuts, reached = allocate(graph, found, ratio, round_to)
        graphs.append(cut(graph, cuts, found))
        cells.append(f"{predicted(graph, cuts, found).macs / whole:.3f}{'' if reached else '*'}")
    times = side_by_side(graphs, feeds, rounds)
    row = [f"{len(free)} of {len(found.groups)}", f"{100 * (1 - least / whole):.1f}"]
    for place, cell in enumerate(cells, 1):
        low, middle, high = np.percentile(times[:, place] / times[:, 0], (25, 50, 75))
        row += [cell, f"{middle:.3f} ({low:.3f}, {high:.3f})"]
    return tuple(row)


def allocate(graph: Graph, found: ChannelGroups, ratio: float, round_to: int = 1) -> tuple[Cuts, bool]:
    """Units to cut so that ``ratio`` of the MACs goes, and whether that much can."""
    free = [group for group in found.groups if group.prunable]
    scores, _ = criteria.score(criteria.make("l2"), graph, free)
    judged = [group for group in free if group.name in scores]
    order = Order(judged, scores, tuple(found.families().values()), Limits(round_to=round_to))
    return to_cost(order, lambda cuts: predicted(graph, cuts, found).macs, ratio)


def side_by_side(graphs: list[Graph], feeds: Mapping[str, np.ndarray], rounds: int) -> np.ndarray:
    """CPU seconds of one batch, [rounds, graphs], each round in another order."""
    with tempfile.TemporaryDirectory() as folder:
        runners = []
        for place, graph in enumerate(graphs):
            path = Path(folder) / f"{place}.onnx"
            ee.save(graph, path)
            runners.append(runner(path))
        times = np.zeros((rounds, len(runners)))
        for number in range(-10, rounds):  # the first ten warm up
            for turn in range(len(runners)):
                chosen = (number + turn) % len(runners)
                start = time.thread_time()
                runners[chosen](feeds)
                if number >= 0:
                    times[number, chosen] = time.thread_time() - start
        return times


def random(graph: Graph, batch: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        name: draw.normal(size=(batch, *(graph.types[name].shape or ())[1:])).astype(np.float32)  # type: ignore[arg-type]
        for name in graph.inputs
    }


def grow(kind: str, nodes: int) -> None:
    """Print one row of seconds."""
    model = KINDS[kind](nodes)
    clock = [time.process_time()]
    graph = from_model(model)
    infer_types(graph)
    clock.append(time.process_time())
    found = find_groups(graph)
    clock.append(time.process_time())
    cuts, _ = allocate(graph, found, 0.3)
    clock.append(time.process_time())
    small = cut(graph, cuts, found)
    clock.append(time.process_time())
    assert len(small.types) >= len(small.nodes)
    clock.append(time.process_time())
    left = predicted(graph, cuts, found).macs / predicted(graph, {}, found).macs
    seconds = np.diff(clock)
    row = "".join(f"{part:12.2f}" for part in (*seconds, seconds.sum()))
    print(f"{kind:10}{len(graph.nodes):8}{row}{sum(g.prunable for g in found.groups):8}{left:8.3f}", flush=True)


if __name__ == "__main__":
    main()
