"""What an exit costs at run time: run by hand, not a test.

    python tests/benchmarks/bench_deploy.py MODEL.onnx [--exits 3] [--head conv:1x32/avg/s2] [--repeats 200]

Untrained heads are attached at sites spread over the trunk, and two promises are measured in paired runs (the two sides
take turns, batch by batch, one thread; the ratio is the median of the pairs' ratios):

- never leaves: the ``if`` file (and stages) against trunk and heads as one flat graph (``multi``)
- always leaves first: the ``if`` file (and stages) against the first block and its head alone
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from eexform.backends.export import export
from eexform.frontends.onnx import load
from eexform.ir.extract import extract
from eexform.ir.graph import Graph
from eexform.ir.serialize import save
from eexform.ir.sites import find_sites
from eexform.passes import PassContext
from eexform.passes.insert_exits import InsertExits
from eexform.verification.bench import Runner, runner

LIMIT = 1.06
POOLS = {"spatial": "avg", "sequence": "mean", "flat": "avg"}


def with_exits(trunk: Graph, count: int, head: str | None) -> Graph:
    """``trunk`` with untrained heads at sites that need one value carried, spread over its length."""
    sites = [site for site in find_sites(trunk).sites if len(site.live) == 1]
    places = np.unique(np.linspace(0, len(sites) - 1, count + 2).round().astype(int)[1:-1])
    chosen = [sites[place] for place in places]
    step = InsertExits(
        sites=tuple(site.value for site in chosen),
        heads={site.value: head or f"none/{POOLS[site.kind]}" for site in chosen},
        thresholds=dict.fromkeys((site.value for site in chosen), "never"),
        untrained=True,
    )
    return step.run(trunk, PassContext()).graph


def policy(graph: Graph, threshold: float) -> Graph:
    return graph.replace(exits=[replace(item, threshold=threshold) for item in graph.exits])


def paired(first: Runner, second: Runner, feeds: dict[str, np.ndarray], repeats: int) -> tuple[float, float, float]:
    """Median milliseconds of both, and the median of the ratios of neighbours: noise hits both alike."""
    inner = 1
    while True:
        start = time.perf_counter()
        for _ in range(inner):
            first(feeds)
        if time.perf_counter() - start > 0.002:
            break
        inner *= 2
    for _ in range(3):
        second(feeds)
    times = np.zeros((repeats, 2))
    for turn in range(repeats):
        for place in (0, 1) if turn % 2 else (1, 0):
            run = (first, second)[place]
            start = time.perf_counter()
            for _ in range(inner):
                run(feeds)
            times[turn, place] = (time.perf_counter() - start) / inner * 1e3
    medians = np.median(times, axis=0)
    return float(medians[0]), float(medians[1]), float(np.median(times[:, 0] / times[:, 1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--exits", type=int, default=3)
    parser.add_argument("--head", default=None, help="head at every site (default: pooling and a linear layer)")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    options = parser.parse_args()
    trunk = load(options.model)
    graph = with_exits(trunk, options.exits, options.head)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(trunk, folder / "trunk.onnx")
        export(graph, folder / "multi.onnx", "multi")
        save(extract(graph.replace(exits=()), graph.inputs, [graph.exits[0].logits]), folder / "first.onnx")
        for label, threshold in (("never", math.inf), ("always", -math.inf)):
            export(policy(graph, threshold), folder / f"{label}.onnx", "if")
            export(policy(graph, threshold), folder / label, "stages")
        run = {path.name: runner(path) for path in folder.iterdir()}
        rng = np.random.default_rng(0)
        print(f"{options.model.name}: exits at {[item.site for item in graph.exits]} with {graph.exits[0].head}")
        print(f"{'batch':>5}  {'file':<14}{'against':<12}{'ms':>9}{'ms':>9}{'ratio':>8}")
        for batch in options.batch:
            shapes = {item: trunk.types[item].shape for item in trunk.inputs}
            feeds = {
                item: rng.normal(size=[batch if dim == "N" else dim for dim in shape]).astype(trunk.types[item].dtype)
                for item, shape in shapes.items()
            }
            for file, against in (
                ("multi.onnx", "trunk.onnx"),
                ("never.onnx", "multi.onnx"),
                ("never", "multi.onnx"),
                ("always.onnx", "first.onnx"),
                ("always", "first.onnx"),
            ):
                ours, theirs, ratio = paired(run[file], run[against], feeds, options.repeats)
                mark = "" if ".onnx" not in file or file == "multi.onnx" else "ok" if ratio <= LIMIT else f"> {LIMIT}"
                print(f"{batch:>5}  {file:<14}{against:<12}{ours:>9.3f}{theirs:>9.3f}{ratio:>8.3f}  {mark}")


if __name__ == "__main__":
    main()
