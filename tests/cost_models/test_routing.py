"""Routing: what is timed really is an exit with its control flow, and what becomes of the times.

No test says how long anything takes: where figures are compared the times are given.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from eexform.backends import ort
from eexform.backends.lower_if import EXIT_INDEX, THRESHOLDS, lower_if
from eexform.cost_models import Crossing, Held, Routing, _probe, _timing, make
from eexform.cost_models._probe import ExitTimes, forced_call, probe, time_exit
from eexform.cost_models._routing import (
    RoutingFit,
    convolutional_stand_in,
    fit_routing,
    measure_routing,
    routing_pair,
    stand_in,
)
from eexform.errors import EexformError, ModelError, OptionError
from eexform.ir.graph import Graph
from tests.cost_models.test_paths import BRANCHES, insert
from tests.passes.helpers import CHAIN, feeds_of, graph_of, ops

CPU = ("CPUExecutionProvider",)

TWO_INPUTS = """
<ir_version: 8, opset_import: ["": 17]>
two (float[N, 2, 8, 8] image, float[N, 6, 8, 8] extra) => (float[N, 4] scores)
<float[3, 2, 3, 3] w1, float[6, 3, 3, 3] w2, float[6, 6, 3, 3] w3, float[4, 6] w4>
{
    [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(image, w1)
    [relu1] r1 = Relu(c1)
    [conv2] c2 = Conv<pads = [1, 1, 1, 1]>(r1, w2)
    [relu2] r2 = Relu(c2)
    [conv3] c3 = Conv<pads = [1, 1, 1, 1]>(r2, w3)
    [add] a3 = Add(c3, extra)
    [pool] p = GlobalAveragePool(a3)
    [flat] f = Flatten(p)
    [fc] scores = Gemm<transB = 1>(f, w4)
}
"""

TOKENS = """
<ir_version: 8, opset_import: ["": 17]>
tokens (float[N, seq, 4] x) => (float[N, 3] scores)
<float[4, 6] w1, float[6, 6] w2, float[6, 3] w3>
{
    [m1] a = MatMul(x, w1)
    [relu1] ra = Relu(a)
    [m2] b = MatMul(ra, w2)
    [relu2] rb = Relu(b)
    [mean] c = ReduceMean<axes = [1], keepdims = 0>(rb)
    [m3] scores = MatMul(c, w3)
}
"""


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_timing, "_REMEMBERED", {})


def crossing(graph: Graph, site: str, shape: tuple[int, ...]) -> Crossing:
    return Crossing(site, Held(shape), (Held(shape),), graph.num_classes)


def deep_ops(body: onnx.GraphProto) -> list[str]:
    found = []
    for node in body.node:
        found.append(node.op_type)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += deep_ops(attribute.g)
    return found


@pytest.mark.parametrize(("text", "site"), [(CHAIN, "r1"), (CHAIN, "r2"), (BRANCHES, "ra"), (TWO_INPUTS, "r2")])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_probe_really_leaves_and_goes_on(text: str, site: str, batch: int) -> None:
    network, words = probe(graph_of(text), site, 4)
    assert repr(site) in words
    lowered = lower_if(network, thresholds_as_input=True)
    assert deep_ops(lowered.graph).count("If") == 1
    session = ort.session(lowered)
    feeds = feeds_of(network, batch)
    for threshold, expected in ((-np.inf, 0), (np.inf, 1)):
        given = {**feeds, THRESHOLDS: np.array([threshold], np.float32)}
        assert ort.run(session, given)[EXIT_INDEX].tolist() == [expected] * batch
    for place in (0, 1):
        forced_call(session, feeds, exits=1, place=place)()
    times = time_exit(network, feeds, threads=1, repeats=2, warmup=1, providers=CPU)
    assert times.decision >= 0
    assert times.onward >= 0
    assert times.early > 0
    assert times.whole > 0


def test_a_path_that_is_not_taken_is_an_error() -> None:
    """What is not a number never leaves: timing it would time another path."""
    graph = insert(graph_of(CHAIN), ["r1", "r2"])
    session = ort.session(lower_if(graph, thresholds_as_input=True))
    feeds = {"image": np.full((2, 2, 8, 8), np.nan, np.float32)}
    with pytest.raises(ModelError, match=r"to leave at exit 1 of 2 and left at \[2\].*not a number"):
        forced_call(session, feeds, exits=2, place=1)
    for place in range(3):
        forced_call(session, feeds_of(graph), exits=2, place=place)()


def test_only_a_stretch_around_the_site_is_timed() -> None:
    layers = "\n".join(
        f"[c{i}] v{i} = Conv<pads = [1, 1, 1, 1]>(r{i}, w)\n[a{i}] r{i + 1} = Relu(v{i})" for i in range(9)
    )
    graph = graph_of(f"""
    <ir_version: 8, opset_import: ["": 17]>
    deep (float[N, 4, 8, 8] image) => (float[N, 3] scores)
    <float[4, 4, 3, 3] w, float[3, 4] last>
    {{
        [first] c = Conv<pads = [1, 1, 1, 1]>(image, w)
        [relu] r0 = Relu(c)
        {layers}
        [pool] p = GlobalAveragePool(r9)
        [flat] f = Flatten(p)
        [fc] scores = Gemm<transB = 1>(f, last)
    }}
    """)
    network, words = probe(graph, "r4", 3)
    assert words == "the network from 'r3' to 'r5' with an exit at 'r4'"
    assert ops(network).count("Conv") == 3, "one that makes what enters, one up to the site, one behind it"
    assert network.types[network.inputs[0]].shape == ("N", 4, 8, 8)
    first, words = probe(graph, "r0", 3)
    assert words.startswith("the network from the inputs to 'r1'")
    assert ops(first).count("Conv") == 2


def test_a_stretch_has_every_input_that_it_needs() -> None:
    """Behind r1 the other input is needed as well, so r1 is no place to begin at."""
    network, words = probe(graph_of(TWO_INPUTS), "r2", 4)
    assert words == "the network from the inputs to the end with an exit at 'r2'"
    assert network.inputs == ("image", "extra")


def test_times_become_decision_and_onward(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[list[float]] = []
    monkeypatch.setattr(_probe, "interleaved", lambda calls, **settings: np.array(rows))
    network, _ = probe(graph_of(CHAIN), "r1", 4)

    def timed() -> ExitTimes:
        return time_exit(network, feeds_of(network), threads=1, repeats=1, warmup=0, providers=CPU)

    rows[:] = [[5.0, 20.0, 3.0, 14.0], [105.0, 120.0, 103.0, 114.0], [6.0, 21.0, 4.0, 15.0]]
    assert timed() == ExitTimes(decision=2.0, onward=4.0, early=4.0, whole=15.0)
    rows[:] = [[3.0, 20.0, 5.0, 14.0]]
    assert timed() == ExitTimes(decision=0.0, onward=6.0, early=5.0, whole=14.0)
    rows[:] = [[5.0, 15.0, 3.0, 14.0]]
    assert timed() == ExitTimes(decision=2.0, onward=0.0, early=3.0, whole=14.0)


def test_routing_is_per_sample_and_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def timed(network: Graph, feeds: dict[str, np.ndarray], **settings: object) -> ExitTimes:
        asked.append(len(next(iter(feeds.values()))))
        return ExitTimes(4.0, 2.0, 1.0, 3.0)

    monkeypatch.setattr(_probe, "time_exit", timed)
    model, trunk = make("latency_ort", batch=4), graph_of(CHAIN)
    found = model.routing(trunk, crossing(trunk, "r1", (3, 8, 8)))
    assert (found.decision, found.onward) == (1.0, 0.5)
    assert found.conditions["measured_on"] == "the network from the inputs to 'r2' with an exit at 'r1'"
    assert "reason" not in found.conditions
    assert {"device", "threads", "repeats"} <= set(found.conditions)
    again = model.routing(graph_of(CHAIN), crossing(trunk, "r1", (3, 8, 8)))
    assert again == found
    assert asked == [4]
    model.routing(trunk, crossing(trunk, "r2", (6, 4, 4)))
    make("latency_ort", batch=2).routing(trunk, crossing(trunk, "r1", (3, 8, 8)))
    assert asked == [4, 4, 2]


def test_exits_that_are_there_change_nothing() -> None:
    trunk = graph_of(CHAIN)
    graph = insert(trunk, ["r1"])
    model = make("latency_ort", repeats=2, warmup=0)
    found = model.routing(graph, crossing(graph, "r2", (6, 4, 4)))
    assert found.conditions["measured_on"] == "the network from 'r1' to the end with an exit at 'r2'"
    assert found.decision >= 0
    assert found.onward >= 0


def test_a_stand_in_says_that_it_is_one() -> None:
    graph = graph_of(CHAIN)
    model = make("latency_ort", repeats=2, warmup=0)
    found = model.routing(graph, crossing(graph, "c1", (3, 8, 8)))
    assert found.conditions["measured_on"] == "a stand-in with an exit at a value [3, 8, 8]"
    assert "'c1'" in found.conditions["reason"]
    assert isinstance(found, Routing)
    assert found.decision >= 0


def test_symbols_need_sizes() -> None:
    graph = graph_of(TOKENS)
    site = crossing(graph, "ra", (5, 6))
    found = make("latency_ort", repeats=2, warmup=0, bindings={"seq": 5}).routing(graph, site)
    assert "stand-in" not in found.conditions["measured_on"]
    without = make("latency_ort", repeats=2, warmup=0).routing(graph, site)
    assert "'seq'" in without.conditions["reason"]


def test_what_the_rest_costs_more_inside_a_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the exit going on costs 1 ms more; with all that follows 4, over 30 ms of work: a tenth."""
    near, whole = ExitTimes(1.0, 1.0, 2.0, 5.0), ExitTimes(1.0, 4.0, 2.0, 32.0)
    asked: list[Graph] = []

    def timed(network: Graph, feeds: dict[str, np.ndarray], **settings: object) -> ExitTimes:
        asked.append(network)
        return near if any(node.name.startswith("tail.") for node in network.nodes) else whole

    monkeypatch.setattr(_probe, "time_exit", timed)
    assert make("latency_ort").branch_share(graph_of(CHAIN)) == pytest.approx(0.1)
    assert [network.exits[0].site for network in asked] == ["r1", "r1"]
    whole = ExitTimes(1.0, 0.5, 2.0, 32.0)
    assert make("latency_ort", repeats=3).branch_share(graph_of(CHAIN)) == 0.0


def test_branch_share_is_measured_where_there_is_a_cut_point() -> None:
    assert make("latency_ort", repeats=2, warmup=0).branch_share(graph_of(CHAIN)) >= 0


def test_overhead_is_the_time_of_an_idle_network(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def timed(calls: list[object], **settings: object) -> np.ndarray:
        seen.append(len(calls))
        return np.array([[0.5], [0.25], [0.75]])

    monkeypatch.setattr("eexform.cost_models.latency_ort.interleaved", timed)
    assert make("latency_ort", batch=2).overhead() == 0.25
    assert make("latency_ort", batch=2).overhead() == 0.25
    assert seen == [1]


# -- stand-ins and the formula ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16,), (5, 7), (4, 8, 8)])
def test_the_pair_differs_by_control_flow_alone(shape: tuple[int, ...]) -> None:
    plain, lowered = routing_pair(3, shape)
    assert "If" not in deep_ops(plain.graph)
    added = deep_ops(lowered.graph)
    for operator in deep_ops(plain.graph):
        added.remove(operator)
    assert {"If", "Compress", "ScatterND", "GreaterOrEqual"} <= set(added)
    feeds = {"input": np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)}
    found = ort.run(ort.session(lowered), feeds)
    assert found[EXIT_INDEX].tolist() == [1, 1]
    scores = ort.run(ort.session(plain), feeds)[stand_in(3, shape).final]
    np.testing.assert_allclose(found[stand_in(3, shape).final], scores, rtol=1e-5, atol=1e-6)


def test_a_stand_in_with_convolutions_carries_its_site_around_a_sum() -> None:
    graph = convolutional_stand_in(5, (8, 6, 6))
    assert ops(graph).count("Conv") == 3
    assert "Add" in ops(graph)
    assert graph.num_classes == 5
    for place in (0, 1):
        forced_call(ort.session(lower_if(graph, thresholds_as_input=True)), feeds_of(graph), exits=1, place=place)()


def test_the_formula_is_found_again() -> None:
    known = RoutingFit(5.0, 0.01, 2.0, 0.125, 0.05)
    points = []
    for shape, classes in (((16, 8, 8), 2), ((64, 8, 8), 1000), ((64, 32, 32), 10), ((32, 16, 16), 100)):
        said = known.routing(Crossing("s", Held(shape), (Held(shape),), classes))
        points.append((shape, classes, said.decision, said.onward))
    found = fit_routing(points)
    assert found.to_json() == pytest.approx(known.to_json())
    assert set(found.to_json()) == {
        "decision_us", "decision_us_per_class", "onward_us", "onward_us_per_kib", "decision_us_per_kib"
    }  # fmt: skip
    for point in found.residuals:
        assert point.decision_fitted_us == pytest.approx(point.decision_us)
        assert point.onward_fitted_us == pytest.approx(point.onward_us)
    assert found.residuals[0].live_kib == 4.0


def test_no_coefficient_is_negative() -> None:
    """Onward that falls with size, a decision that falls with classes: noise, not a negative price."""
    found = fit_routing([((16, 8, 8), 2, 5.0, 3.0), ((64, 8, 8), 100, 4.0, 2.0), ((64, 32, 32), 1000, 3.0, 1.0)])
    assert min(found.to_json().values()) >= 0
    assert max(point.onward_fitted_us for point in found.residuals) <= 3.0


def test_routing_is_measured_over_a_grid() -> None:
    steps = []

    class Steps:
        def task(self, label: str, total: int) -> Steps:
            steps.append(total)
            return self

        def __enter__(self) -> Steps:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def advance(self, steps_done: int = 1, note: str = "") -> None:
            steps.append(-steps_done)

        def say(self, message: str) -> None:
            raise AssertionError(message)

    fit = measure_routing(repeats=2, shapes=[(4, 4, 4), (8, 8, 8), (4, 16, 16)], classes=[2, 10], progress=Steps())
    assert [(point.shape, point.classes) for point in fit.residuals] == [
        ((4, 4, 4), 2),
        ((8, 8, 8), 10),
        ((4, 16, 16), 2),
        ((8, 8, 8), 2),
    ]
    assert steps[0] == -sum(steps[1:]) == 4
    assert min(fit.to_json().values()) >= 0
    assert fit.routing(Crossing("s", Held((4, 4, 4)), (), 2)).onward == fit.onward_us


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shapes": []}, "at least one shape"),
        ({"shapes": [(4, 4)]}, r"\(4, 4\): expected channels, height and width"),
        ({"classes": [1]}, "at least 2"),
        ({"repeats": 0}, "repeats 0: expected at least 1"),
    ],
)
def test_a_grid_that_cannot_be_measured(settings: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        measure_routing(**settings)  # type: ignore[arg-type]


def test_an_unknown_site_is_an_error_of_the_probe() -> None:
    with pytest.raises(EexformError, match="'c1' is no site"):
        probe(graph_of(CHAIN), "c1", 4)
