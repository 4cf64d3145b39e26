"""How loading, types, data flow and sites grow with the number of nodes. Run by hand:

    python -m tests.benchmarks.bench_sites [--kind residual] [--nodes 1250 2500 5000 10000]

Prints seconds per stage; "sites" is everything after the types. Twice the nodes should take about twice the time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

from eexform.frontends.onnx import from_model
from eexform.ir.flow import DataFlow
from eexform.ir.inference import infer_types
from eexform.ir.sites import find_sites
from tests.zoo.big import KINDS

T = TypeVar("T")


def timed(action: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    return action(), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=sorted(KINDS), nargs="+", default=sorted(KINDS))
    parser.add_argument("--nodes", type=int, nargs="+", default=[1250, 2500, 5000, 10000])
    asked = parser.parse_args()
    print(
        f"{'kind':10}{'nodes':>8}{'load s':>9}{'types s':>9}{'flow s':>9}{'sites s':>9}{'sum s':>9}{'sites':>8}{'cuts':>7}"
    )
    for kind in asked.kind:
        for nodes in asked.nodes:
            model = KINDS[kind](nodes)
            graph, load = timed(lambda model=model: from_model(model))
            _, types = timed(lambda graph=graph: infer_types(graph))
            weights = {node.name: 1 for node in graph.nodes}
            sums, flow = timed(lambda graph=graph, weights=weights: DataFlow(graph).accumulate(weights))
            report, sites = timed(lambda graph=graph: find_sites(graph))
            assert sums[graph.final] == len(graph.flow.ancestors([graph.final]))
            cuts = sum(site.cuts for site in report.sites)
            times = "".join(f"{seconds:9.2f}" for seconds in (load, types, flow, sites, load + types + flow + sites))
            print(f"{kind:10}{len(graph.nodes):8}{times}{len(report.sites):8}{cuts:7}", flush=True)


if __name__ == "__main__":
    main()
