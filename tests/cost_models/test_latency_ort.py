"""latency_ort: what it says about itself, its cache, and that the prices of paths are put together rightly.

The clock is replaced where figures are compared: how fast a machine is today is no test.
"""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from eexform.cost_models import Cost, CostModel, exit_costs, make, path_costs
from eexform.errors import OptionError
from eexform.heads import HeadSpec
from eexform.ir.arithmetic import node_macs
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from tests.cost_models.test_paths import BRANCHES, HEAD, insert, price
from tests.passes.helpers import CHAIN, graph_of


def test_it_says_how_it_was_measured() -> None:
    cost = make("latency_ort", repeats=3, warmup=1, batch=2).cost(graph_of(CHAIN))
    assert cost.total > 0
    assert cost.total == cost.conditions["median_ms"] / 2
    assert {"device", "threads", "repeats", "spread_ms", "batch", "onnxruntime"} <= set(cost.conditions)
    assert json.dumps(cost.conditions)


def test_the_median_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.chain.from_iterable((10.0 * i, 10.0 * i + spent) for i, spent in enumerate([0.001, 0.5, 0.003]))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    cost = make("latency_ort", repeats=3, warmup=0).cost(graph_of(CHAIN))
    assert cost.total == pytest.approx(3.0)
    assert cost.conditions["fastest_ms"] == pytest.approx(1.0)


def test_measurements_are_kept_per_graph_and_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    model = make("latency_ort", repeats=2, warmup=0, cache=str(folder))
    graph = graph_of(CHAIN)
    first = model.cost(graph)
    (stored,) = folder.iterdir()

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patched:
        patched.setattr("eexform.backends.ort.session", forbidden)
        assert model.cost(graph_of(CHAIN)) == first
        with pytest.raises(AssertionError, match="measured again"):
            make("latency_ort", repeats=3, warmup=0, cache=str(folder)).cost(graph)
        with pytest.raises(AssertionError, match="measured again"):
            model.cost(graph_of(CHAIN, seed=1))
    stored.write_text("{")
    assert model.cost(graph).total > 0
    assert json.loads(stored.read_text())["median_ms"] > 0, "a damaged entry is replaced"


def test_routing_and_overhead_are_small_and_not_negative() -> None:
    model = make("latency_ort", repeats=5)
    assert 0 <= model.routing(graph_of(CHAIN)) < 50
    assert 0 < model.overhead() < 50
    assert model.routing(insert(graph_of(CHAIN), ["r1"])) >= 0


def test_inputs_without_a_size_are_refused() -> None:
    graph = graph_of("""
    <ir_version: 8, opset_import: ["": 17]>
    tokens (float[N, seq, 4] x) => (float[N, 3] scores)
    <float[4, 3] w>
    {
        [m] m = MatMul(x, w)
        [mean] scores = ReduceMean<axes = [1], keepdims = 0>(m)
    }
    """)
    with pytest.raises(Exception, match="seq"):
        make("latency_ort", repeats=1).cost(graph)
    assert make("latency_ort", repeats=1, bindings={"seq": 4}).cost(graph).total > 0
    with pytest.raises(OptionError, match="repeats: 0 is less than 1"):
        make("latency_ort", repeats=0)


@dataclass(frozen=True)
class Clockwork(CostModel):
    """A stand-in that is not additive: MACs and 1000 for every call."""

    name: ClassVar[str] = "clockwork"
    unit: ClassVar[str] = "ticks"
    additive: ClassVar[bool] = False

    def cost(self, graph: Graph) -> Cost:
        return Cost(1000.0 + sum(node_macs(node, graph.types) or 0 for node in graph.nodes))

    def overhead(self) -> float:
        return 1000.0

    def routing(self, graph: Graph) -> float:
        return 7.0


@pytest.mark.parametrize("text", [CHAIN, BRANCHES])
def test_segments_of_a_measured_model(text: str) -> None:
    """A clock that counts MACs must give the prices of MACs: one call, one routing per exit, heads without a call."""
    trunk = graph_of(text)
    sites = find_sites(trunk).sites
    exact = price(trunk)
    found = path_costs(Clockwork(), trunk, sites, {site.value: [HeadSpec.parse(HEAD)] for site in sites})
    assert found.trunk == exact.trunk + 1000
    pairs = [(site.value, HEAD) for site in sites]
    expected = [cost + 1000 + 7 * min(i + 1, len(pairs)) for i, cost in enumerate(exact.path(pairs))]
    assert found.path(pairs) == pytest.approx(expected)
    assert exit_costs(insert(trunk, [site for site, _ in pairs]), Clockwork()) == pytest.approx(expected)
    if text == CHAIN:
        assert found.nested
        assert found.prefix == pytest.approx({site: cost + 1000 for site, cost in exact.prefix.items()})
    else:  # between branches the clock only knows sums; how they are divided is an estimate, within a tenth here
        for site in exact.sites:
            assert found.prefix[site] - 1000 == pytest.approx(exact.prefix[site], rel=0.1)
