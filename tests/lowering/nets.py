"""Zoo networks with exits, for the tests of lowering and verification."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from eexform.frontends.onnx import from_model
from eexform.ir import measures
from eexform.ir.graph import Graph
from eexform.ir.sites import Site, find_sites
from eexform.passes import PassContext
from eexform.passes.insert_exits import InsertExits
from eexform.verification.simulate import Simulated, simulate
from tests import zoo

POOLS = {"spatial": "avg", "sequence": "mean", "flat": "avg"}


@cache
def trunk(name: str) -> Graph:
    """A zoo network as a graph."""
    return from_model(zoo.build(name))


@cache
def sites(name: str) -> tuple[Site, ...]:
    """Every site of the network, however much has to be carried across it."""
    return find_sites(trunk(name), max_live=20).sites


@cache
def with_exits(
    name: str, count: int = 3, *, carry: float = 0.0, measure: str = "max_prob", threshold: float = 0.5
) -> Graph:
    """The network with ``count`` untrained exits, spread over its sites."""
    found = sites(name)
    places = np.unique(np.linspace(0, len(found) - 1, count + 2).round().astype(int)[1:-1])
    return attach(trunk(name), [found[place] for place in places], carry=carry, measure=measure, threshold=threshold)


def attach(
    graph: Graph, chosen: Sequence[Site], *, carry: float = 0.0, measure: str = "max_prob", threshold: float = 0.5
) -> Graph:
    """``graph`` with an untrained exit at each of the sites; heads have a gate where the measure reads gates."""
    gate = "/gate" if measures.is_learned(measure) else ""
    step = InsertExits(
        sites=tuple(site.value for site in chosen),
        heads={site.value: f"none/{POOLS[site.kind]}" + gate for site in chosen},
        thresholds=dict.fromkeys((site.value for site in chosen), threshold),
        measure=measure,
        carry=carry,
        untrained=True,
    )
    return step.run(graph, PassContext(seed=7)).graph


@cache
def scores(name: str, count: int, samples: int, carry: float = 0.0, measure: str = "max_prob") -> Simulated:
    """What the flat graph says about ``samples`` random samples."""
    return simulate(with_exits(name, count, carry=carry, measure=measure), zoo.feeds(name, samples, seed=3))


def spread(simulated: Simulated) -> list[float]:
    """Thresholds at which about half of those who arrive leave, between two samples each."""
    inside = np.arange(len(simulated.final))
    found = []
    for row in simulated.confidences():
        values = np.unique(row[inside]).astype(np.float64)
        if len(values) < 2:
            found.append(1.0)
            continue
        place = len(values) // 2
        found.append(float(np.float32((values[place - 1] + values[place]) / 2)))
        inside = inside[row[inside] < np.float32(found[-1])]
    return found


def set_thresholds(graph: Graph, thresholds: Sequence[float]) -> Graph:
    """The same graph under another policy."""
    from dataclasses import replace

    exits = [replace(item, threshold=value) for item, value in zip(graph.exits, thresholds, strict=True)]
    return graph.replace(exits=exits)
