"""How loading, types, data flow and sites grow with the number of nodes. Run by hand:

    python -m tests.benchmarks.bench_sites [--kind residual] [--nodes 1250 2500 5000 10000]

Prints seconds per stage; "sites" is everything after the types. Twice the nodes should take about twice the time.
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise

from eexform.frontends.onnx import from_model
from eexform.ir.flow import DataFlow
from eexform.ir.inference import infer_types
from eexform.ir.sites import find_sites
from tests.zoo.big import KINDS

COLUMNS = ("load s", "types s", "flow s", "sites s", "sum s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(KINDS), nargs="+", default=sorted(KINDS))
    parser.add_argument("--nodes", type=int, nargs="+", default=[1250, 2500, 5000, 10000])
    asked = parser.parse_args()
    print(f"{'kind':10}{'nodes':>8}" + "".join(f"{name:>9}" for name in COLUMNS) + f"{'sites':>8}{'cuts':>7}")
    for kind in asked.kind:
        for nodes in asked.nodes:
            measure(kind, nodes)


def measure(kind: str, nodes: int) -> None:
    """Print one row."""
    model = KINDS[kind](nodes)
    clock = [time.perf_counter()]
    graph = from_model(model)
    clock.append(time.perf_counter())
    infer_types(graph)
    clock.append(time.perf_counter())
    sums = DataFlow(graph).accumulate({node.name: 1 for node in graph.nodes})
    clock.append(time.perf_counter())
    report = find_sites(graph)
    clock.append(time.perf_counter())
    assert sums[graph.final] == len(graph.flow.ancestors([graph.final]))
    seconds = [after - before for before, after in pairwise(clock)]
    row = "".join(f"{part:9.2f}" for part in (*seconds, sum(seconds)))
    print(f"{kind:10}{len(graph.nodes):8}{row}{len(report.sites):8}{sum(s.cuts for s in report.sites):7}", flush=True)


if __name__ == "__main__":
    main()
