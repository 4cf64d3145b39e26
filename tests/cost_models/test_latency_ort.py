"""latency_ort: what it says about itself, its cache, and that the prices of paths are put together rightly.

The clock is replaced where figures are compared: how fast a machine is today is no test.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from eexform.cost_models import Cost, CostModel, Crossing, Routing, _timing, exit_costs, make, path_costs
from eexform.cost_models._timing import interleaved, levels
from eexform.errors import OptionError
from eexform.heads import HeadSpec
from eexform.ir.arithmetic import node_macs
from eexform.ir.graph import Graph
from eexform.ir.serialize import weight_bytes
from eexform.ir.sites import find_sites
from tests.cost_models.test_paths import BRANCHES, HEAD, insert, price
from tests.passes.helpers import CHAIN, graph_of


class Clock:
    """Stands in for the system's: it goes on only when told, in milliseconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now / 1e3)

    def call(self, spent: Callable[[], float], log: list[str], name: str) -> Callable[[], None]:
        def run() -> None:
            log.append(name)
            self.now += spent()

        return run


def test_it_says_how_it_was_measured() -> None:
    cost = make("latency_ort", repeats=3, warmup=1, batch=2).cost(graph_of(CHAIN))
    assert cost.total > 0
    assert cost.total == cost.conditions["median_ms"] / 2
    said = {
        "device",
        "threads",
        "repeats",
        "spread_ms",
        "p95_ms",
        "batch",
        "onnxruntime",
        "providers",
        "figure",
        "state",
    }
    assert said <= set(cost.conditions)
    assert cost.conditions["providers"] == ["CPUExecutionProvider"]
    assert json.dumps(cost.conditions)


@pytest.mark.parametrize(("figure", "expected"), [("median", 3.0), ("mean", 168.0), ("min", 1.0), ("p95", 450.3)])
def test_the_figure_is_taken(figure: str, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.chain.from_iterable((10.0 * i, 10.0 * i + spent) for i, spent in enumerate([0.001, 0.5, 0.003]))
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    cost = make("latency_ort", repeats=3, warmup=0, figure=figure).cost(graph_of(CHAIN))
    assert cost.total == pytest.approx(expected)
    assert cost.conditions["fastest_ms"] == pytest.approx(1.0)
    assert cost.conditions["spread_ms"] == pytest.approx(249.5)


def test_calls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(monkeypatch), []
    calls = [clock.call(lambda: 1.0, log, "a"), clock.call(lambda: 2.0, log, "b")]
    times = interleaved(calls, repeats=2, warmup=1)
    assert "".join(log) == "ab" + "aaabbb" + "bbbaaa", "two rehearsals before each timed call, and another one first"
    assert times == pytest.approx(np.array([[1.0, 2.0], [1.0, 2.0]]))
    log.clear()
    interleaved(calls[:1], repeats=3, warmup=0)
    assert "".join(log) == "aaa", "alone, a call is its own rehearsal"


def test_caches_are_emptied_before_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(monkeypatch), []
    monkeypatch.setattr("eexform.cost_models._timing.evict", lambda: log.append("-"))
    calls = [clock.call(lambda: 1.0, log, "a"), clock.call(lambda: 2.0, log, "b")]
    interleaved(calls, repeats=2, warmup=1, state="cold")
    assert "".join(log) == "ab" + "-a-b" + "-b-a"


def test_emptying_walks_through_more_than_the_largest_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for place, size in enumerate(("32K", "1M", "96K")):
        (tmp_path / f"index{place}").mkdir()
        (tmp_path / f"index{place}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(_timing, "_CACHE_SIZES", tmp_path)
    for function in (_timing.last_level_cache, _timing._buffer):
        function.cache_clear()
    try:
        assert _timing.last_level_cache() == 1 << 20
        before = _timing._buffer().copy()
        _timing.evict()
        assert _timing.evicted_bytes() == before.size == 5 << 18
        changed = (_timing._buffer() != before).nonzero()[0]
        assert (np.diff(changed) == 64).all()
        assert changed[0] == 0
        assert changed[-1] == before.size - 64
    finally:
        for function in (_timing.last_level_cache, _timing._buffer):
            function.cache_clear()


def test_a_slow_round_does_not_change_differences() -> None:
    """Rounds of very different slowness, and steps of 1, 4 and 5 ms between the calls in each: steps come out."""
    rng = np.random.default_rng(0)
    slow = rng.exponential(20.0, (21, 1))
    times = slow + np.array([[12.0, 2.0, 3.0, 7.0]])
    assert np.diff(np.sort(levels(times))) == pytest.approx([1.0, 4.0, 5.0])
    assert levels(times)[1] == pytest.approx(np.median(slow) + 2.0)
    assert levels(times, "min") == pytest.approx(slow.min() + np.array([12.0, 2.0, 3.0, 7.0]))


def test_graphs_are_timed_side_by_side_and_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = []

    def timed(calls: list[object], **settings: object) -> np.ndarray:
        loops.append(len(calls))
        return np.array([[float(1 + place) for place in range(len(calls))]])

    monkeypatch.setattr("eexform.cost_models.latency_ort.interleaved", timed)
    first, second = graph_of(CHAIN), graph_of(CHAIN, seed=1)
    costs = make("latency_ort", batch=2).costs([first, second, graph_of(CHAIN)])
    assert loops == [2]
    assert [cost.total for cost in costs] == [0.5, 1.0, 0.5]
    assert [cost.conditions["median_ms"] for cost in costs] == [1.0, 2.0, 1.0]
    assert costs[0].conditions["side_by_side"] == 2


def test_more_than_fits_is_timed_in_several_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loop runs at half the speed of the one before; the graph they share tells, so the figures agree."""
    loops = []

    def timed(calls: list[object], **settings: object) -> np.ndarray:
        first = sum(loops) - len(loops)
        loops.append(len(calls))
        return np.array([[float(1 + first + place) for place in range(len(calls))]]) * 2.0 ** (len(loops) - 1)

    graphs = [graph_of(CHAIN, seed=seed) for seed in range(5)]
    monkeypatch.setattr("eexform.cost_models.latency_ort.interleaved", timed)
    monkeypatch.setattr("eexform.cost_models.latency_ort._HELD_BYTES", 2 * weight_bytes(graphs[0]))
    assert [cost.total for cost in make("latency_ort").costs(graphs)] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert loops == [2, 2, 2, 2]


def test_measurements_are_kept_per_graph_and_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    settings = {"repeats": 2, "warmup": 0, "cache": str(folder)}
    model = make("latency_ort", **settings)
    graph = graph_of(CHAIN)
    first = model.cost(graph)
    (stored,) = folder.iterdir()

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    with monkeypatch.context() as patched:
        patched.setattr("eexform.backends.ort.session", forbidden)
        assert model.cost(graph_of(CHAIN)) == first
        for other in ({"repeats": 3}, {"figure": "mean"}, {"state": "cold"}, {"batch": 2}):
            with pytest.raises(AssertionError, match="measured again"):
                make("latency_ort", **{**settings, **other}).cost(graph)
        with pytest.raises(AssertionError, match="measured again"):
            model.cost(graph_of(CHAIN, seed=1))
        with pytest.raises(AssertionError, match="measured again"):
            model.costs([graph, graph_of(CHAIN, seed=1)])
        patched.setattr("eexform.cost_models._timing.machine", lambda: {"device": "another"})
        with pytest.raises(AssertionError, match="measured again"):
            model.cost(graph)
    for damaged in ("{", "[]", "{}"):
        stored.write_text(damaged)
        assert model.cost(graph).total > 0
        assert json.loads(stored.read_text())["figures"][0] > 0, "a damaged entry is replaced"


def test_of_two_that_measure_at_once_the_first_counts(tmp_path: Path) -> None:
    def measure() -> dict[str, float]:
        (tmp_path / "key.json").write_text('{"figure": 1.0}')  # another process is done meanwhile
        return {"figure": 2.0}

    assert _timing.stored(str(tmp_path), "key", measure, ["figure"]) == {"figure": 1.0}
    assert _timing.stored("", "key", measure, ["figure"]) == {"figure": 2.0}


def test_providers_are_those_of_this_onnxruntime() -> None:
    assert make("latency_ort", providers="CPU") == make("latency_ort")
    assert make("latency_ort", providers=["CPUExecutionProvider", "CPU"]) == make("latency_ort")
    with pytest.raises(OptionError, match=r"no 'Warp'; it has .*CPUExecutionProvider"):
        make("latency_ort", providers="CPU,Warp")


@pytest.mark.parametrize("setting", ["figure", "state", "what"])
def test_choices_are_named(setting: str) -> None:
    with pytest.raises(OptionError, match=rf"{setting}: 'lukewarm' is not a choice.*'"):
        make("latency_ort", **{setting: "lukewarm"})


def test_the_block_of_channels_is_that_of_the_processor() -> None:
    block = make("latency_ort").channel_block()
    try:
        flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    except OSError:
        flags = set()
    if "avx512f" in flags:
        assert block == 16
    elif "avx" in flags:
        assert block == 8
    else:
        assert block is None or block > 1


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


def test_paths_are_those_of_the_lowered_file(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = insert(graph_of(CHAIN), ["r1", "r2"])
    made = {"file": [4.0, 7.0, 9.0], "segments": [1.0, 2.0, 3.0]}

    def timed(calls: list[object], **settings: object) -> np.ndarray:
        assert len(calls) == 6
        return np.array([[*made["file"], *made["segments"]]])

    assert make("latency_ort").paths(graph) is None
    assert make("latency_ort", what="file").paths(graph_of(CHAIN)) is None
    monkeypatch.setattr("eexform.cost_models.latency_ort.interleaved", timed)
    assert make("latency_ort", what="file", batch=2).paths(graph) == (2.0, 3.5, 4.5)
    assert exit_costs(graph, make("latency_ort", what="file")) == (4.0, 7.0, 9.0)
    times = make("latency_ort", what="both").path_times(graph)
    assert times.file == (4.0, 7.0, 9.0)
    assert times.segments == (1.0, 2.0, 3.0)
    made["file"] = [2.5, 5.0, 7.0]  # twice the segments, and half a millisecond per exit
    times = make("latency_ort", what="both").path_times(graph)
    assert (times.scale, times.routing) == pytest.approx((2.0, 0.5))
    assert make("latency_ort", what="both").paths(graph) == pytest.approx((2.5, 5.0, 7.0))


def test_paths_are_really_measured() -> None:
    """Twelve wide convolutions behind the exit: going on takes several times as long as leaving."""
    layers = "\n".join(f"[c{i}] v{i + 1} = Conv<pads = [1, 1, 1, 1]>(v{i}, w)" for i in range(12))
    trunk = graph_of(f"""
    <ir_version: 8, opset_import: ["": 17]>
    deep (float[N, 32, 24, 24] image) => (float[N, 4] scores)
    <float[32, 32, 3, 3] w, float[4, 32] last>
    {{
        [first] c = Conv<pads = [1, 1, 1, 1]>(image, w)
        [relu] v0 = Relu(c)
        {layers}
        [pool] p = GlobalAveragePool(v12)
        [flat] f = Flatten(p)
        [fc] scores = Gemm<transB = 1>(f, last)
    }}
    """)
    graph = insert(trunk, ["v0"])
    early, late = make("latency_ort", what="file", repeats=9).paths(graph)
    assert 0 < 2 * early < late


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

    def routing(self, graph: Graph, crossing: Crossing) -> Routing:
        return Routing(decision=7.0, onward=2.0)


@pytest.mark.parametrize("text", [CHAIN, BRANCHES])
def test_segments_of_a_measured_model(text: str) -> None:
    """A clock that counts MACs must give the prices of MACs: one call, one routing per exit, heads without a call."""
    trunk = graph_of(text)
    sites = find_sites(trunk).sites
    exact = price(trunk)
    found = path_costs(Clockwork(), trunk, sites, {site.value: [HeadSpec.parse(HEAD)] for site in sites})
    assert found.trunk == exact.trunk + 1000
    pairs = [(site.value, HEAD) for site in sites]
    expected = [cost + 1000 + 7 * min(i + 1, len(pairs)) + 2 * i for i, cost in enumerate(exact.path(pairs))]
    assert found.path(pairs) == pytest.approx(expected)
    assert exit_costs(insert(trunk, [site for site, _ in pairs]), Clockwork()) == pytest.approx(expected)
    if text == CHAIN:
        assert found.nested
        assert found.prefix == pytest.approx({site: cost + 1000 for site, cost in exact.prefix.items()})
    else:  # between branches the clock only knows sums; how they are divided is an estimate, within a tenth here
        for site in exact.sites:
            assert found.prefix[site] - 1000 == pytest.approx(exact.prefix[site], rel=0.1)
