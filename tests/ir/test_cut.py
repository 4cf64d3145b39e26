"""Cutting: equal to masking, exact figures, names and metadata kept, composing, and refusing what cannot be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eexform.backends import ort
from eexform.errors import EexformError, GraphError
from eexform.frontends.onnx import from_model, load, save
from eexform.ir import coupling_rule
from eexform.ir.coupling import Coupler, Rule, Slot
from eexform.ir.cut import CUT, cut, kept_since, predicted
from eexform.ir.graph import Graph
from eexform.ir.kinds import kinds, with_kinds
from eexform.passes import make
from tests import zoo
from tests.counting import function_calls
from tests.graphs import random_classifier
from tests.ir.masking import assert_cut, some
from tests.zoo.big import residual
from tests.zoo.net import Net


def chain() -> Graph:
    """Three convolutions, the last two inside a residual branch."""
    net = Net("chain")
    x = net.conv_bn_relu(net.input("image", 3, 6, 6), 3, 8)
    y = net.conv_bn(net.conv_bn_relu(x, 8, 6), 6, 8)
    return from_model(net.model(net.classifier(net.op("Relu", net.op("Add", x, y)), 8, 5), 5))


def image(side: int = 6) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(0).normal(size=(2, 3, side, side)).astype(np.float32)}


# -- random networks ---------------------------------------------------------------------------------------------------


def random_convnet(seed: int) -> Graph:
    """Grouped, depthwise and transposed convolutions, option-A shortcuts, concatenations, splits, gates, norms."""
    rng = np.random.default_rng(seed)
    net = Net("random", seed)
    width, side = int(rng.choice([4, 6, 8])), 8
    x = net.conv_bn_relu(net.input("image", 3, side, side), 3, width)
    for _ in range(int(rng.integers(2, 6))):
        kind = rng.choice(
            ["residual", "grouped", "depthwise", "concat", "option_a", "gate", "split", "group_norm", "up", "shared"]
        )
        if kind == "residual":
            inner = int(rng.integers(2, 9))
            x = net.op("Relu", net.op("Add", x, net.conv_bn(net.conv_bn_relu(x, width, inner), inner, width)))
        elif kind == "grouped":
            x = net.op("Relu", net.conv(x, width, width * 2, group=2))
            width *= 2
            x = net.conv(x, width, width // 2, 1)
            width //= 2
        elif kind == "depthwise":
            x = net.op("HardSwish", net.conv_bn(x, width, width, group=width))
        elif kind == "concat":
            x = net.op("Concat", net.conv(x, width, 4, 1), x, net.conv(x, width, 2), axis=1)
            width += 6
        elif kind == "option_a" and side > 2:
            every_second = net.op("MaxPool", x, kernel_shape=[1, 1], strides=[2, 2])
            short = net.op("Pad", every_second, net.const([0, 1, 0, 0, 0, 1, 0, 0]))
            x = net.op("Add", net.conv_bn(x, width, width + 2, stride=2), short)
            width, side = width + 2, (side + 1) // 2
        elif kind == "gate":
            pooled = net.op("GlobalAveragePool", x)
            narrow = net.op("Relu", net.conv(pooled, width, 3, 1))
            x = net.op("Mul", x, net.op("Sigmoid", net.conv(narrow, 3, width, 1)))
        elif kind == "split":
            left, right = net.op("Split", x, outputs=2, axis=1)
            x = net.op("Concat", left, net.conv_bn_relu(right, width // 2, width // 2), axis=1)
        elif kind == "group_norm":
            x = net.op("InstanceNormalization", x, net.weight(width), net.weight(width))
        elif kind == "up" and side < 16:
            x, side = net.op("ConvTranspose", x, net.weight(width, width, 2, 2), strides=[2, 2]), side * 2
        elif kind == "shared":
            weight = net.weight(width, width, 1, 1)
            x = net.op("Add", net.op("Conv", x, weight), net.op("Conv", net.op("Tanh", x), weight))
    return from_model(net.model(net.classifier(x, width, 5), 5))


PROPERTY = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@PROPERTY
@given(seed=st.integers(0, 10**6), share=st.floats(0.0, 1.0))
def test_random_networks_cut_as_if_masked(seed: int, share: float) -> None:
    graph = random_convnet(seed)
    assert_cut(graph, some(graph, share, seed), image(8))


@PROPERTY
@given(seed=st.integers(0, 10**6), share=st.floats(0.1, 0.9))
def test_random_classifiers_cut_as_if_masked(seed: int, share: float) -> None:
    graph = from_model(random_classifier(seed))
    assert_cut(graph, some(graph, share, seed), image(8))


@PROPERTY
@given(seed=st.integers(0, 10**6), first=st.floats(0.1, 0.6), second=st.floats(0.1, 0.6))
def test_cuts_compose(seed: int, first: float, second: float) -> None:
    graph = random_convnet(seed)
    once = cut(graph, some(graph, first, seed))
    twice = assert_cut(once, some(once, second, seed + 1), image(8))
    original = graph.constants
    for slot, left in kept_since(twice).items():
        if slot.value in original:
            assert len(left) == twice.constants[slot.value].shape[slot.axis]
    for name, constant in twice.constants.items():
        values = original[name].values if name in original else None
        if values is None or not np.issubdtype(constant.dtype, np.floating):
            continue
        for axis in range(values.ndim):
            if Slot(name, axis) in kept_since(twice):
                values = np.take(values, kept_since(twice)[Slot(name, axis)], axis)
        np.testing.assert_array_equal(values, constant.values)


# -- faults that must show ---------------------------------------------------------------------------------------------


def swap(a: Slot, ia: Any, b: Slot, ib: Any) -> tuple[Slot, Any, Slot, Any]:
    return a, ia, b, np.asarray(ib)[::-1]


def test_a_wrong_index_map_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net("depthwise")
    x = net.op("Conv", net.input("image", 3, 6, 6), net.weight(8, 3, 3, 3), pads=[1] * 4)
    x = net.op("Conv", x, net.weight(16, 1, 3, 3), group=8, pads=[1] * 4)
    graph = from_model(net.model(net.classifier(x, 16, 5), 5))
    right = Coupler.tie
    monkeypatch.setattr(Coupler, "tie", lambda self, *given: right(self, *swap(*given)))
    with pytest.raises(AssertionError, match="differs by"):
        assert_cut(graph, {"weight_1": [0, 1]}, image())


def pairwise_shifted(self: Coupler, a: Slot, b: Slot) -> None:
    size = self.size(a.value, a.axis) or 0
    self.tie(a, np.arange(size), b, np.roll(np.arange(size), 1))


FAULTS: Mapping[str, Callable[[pytest.MonkeyPatch], None]] = {
    "shifted": lambda patch: patch.setattr(Coupler, "same", _shifted(Coupler.same)),
    "attributes": lambda patch: patch.setattr(_rule("Conv"), "attributes", lambda node, cut: {}),
    "forgotten": lambda patch: patch.setattr(Coupler, "tie", lambda self, a, ia, b, ib: (self.keep(a), self.keep(b))),
}


def _rule(op: str) -> Rule:
    return coupling_rule._RULES["", op]


def _shifted(right: Callable[..., None]) -> Callable[..., None]:
    def same(self: Coupler, a: Slot, b: Slot) -> None:
        if self.is_constant(b.value) and (self.size(b.value, b.axis) or 0) > 2 and b.axis == 1:
            return pairwise_shifted(self, a, b)
        return right(self, a, b)

    return same


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_show(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net("faults")
    x = net.op("Conv", net.input("image", 3, 6, 6), net.weight(8, 3, 3, 3), pads=[1] * 4)
    x = net.op("Relu", net.op("Conv", x, net.weight(8, 1, 3, 3), group=8, pads=[1] * 4))
    x = net.op("Conv", x, net.weight(6, 8, 1, 1))
    graph = from_model(net.model(net.classifier(x, 6, 5), 5))
    FAULTS[fault](monkeypatch)
    with pytest.raises((AssertionError, EexformError)):
        assert_cut(graph, some(graph, 0.4), image())


# -- names, metadata, exits --------------------------------------------------------------------------------------------


def test_the_original_stays_as_it_is() -> None:
    graph = chain()
    digest = graph.digest
    small = cut(graph, {"weight_1": [0]})
    assert graph.replace().digest == digest
    assert small.digest != digest
    assert small.constants["weight_1"].shape == (7, 3, 3, 3)


def test_nothing_to_cut_is_the_same_graph() -> None:
    graph = chain()
    assert cut(graph, {}) is graph
    assert cut(graph, {"weight_1": []}) is graph
    assert CUT not in graph.metadata


def test_kept_positions_are_metadata_and_survive_a_file(tmp_path: Path) -> None:
    graph = chain()
    once = cut(graph, {"weight_5": [0, 3]})
    twice = cut(once, {"weight_5": [1], "weight_1": [7]})
    save(twice, tmp_path / "small.onnx")
    for found in (kept_since(twice), kept_since(load(tmp_path / "small.onnx"))):
        assert found[Slot("weight_5", 0)].tolist() == [1, 4, 5]
        assert found[Slot("weight_1", 0)].tolist() == [0, 1, 2, 3, 4, 5, 6]
        assert found[Slot("relu_2", 1)].tolist() == [1, 4, 5]
        assert Slot("logits", 1) not in found


def test_damaged_metadata() -> None:
    with pytest.raises(GraphError, match="damaged"):
        kept_since(chain().replace(metadata={CUT: "{"}))
    with pytest.raises(GraphError, match="damaged"):
        kept_since(chain().replace(metadata={CUT: '{"a": [1]}'}))


def test_kinds_of_constants_stay_valid() -> None:
    graph = chain()
    graph = graph.replace(metadata=with_kinds(graph.metadata, dict.fromkeys(graph.constants, "parameter")))
    small = cut(graph, {"weight_1": [0]})
    assert set(kinds(small.metadata)) == set(small.constants)


def test_exits_stay_attached() -> None:
    trunk = chain()
    insert = make(
        "insert_exits", sites=["relu_1"], heads={"relu_1": "conv:1x4/avg"}, thresholds={"relu_1": 0.5}, untrained=True
    )
    graph = insert(trunk).graph
    small = assert_cut(graph, some(graph), image())
    assert small.exits == graph.exits
    assert small.outputs == graph.outputs
    assert small.types[small.exits[0].site].shape == ("N", 4, 6, 6)


def test_shape_operands_of_several_nodes_are_replaced_only_where_they_change() -> None:
    net = Net("shapes")
    x = net.conv(net.input("image", 3, 4, 4), 3, 8)
    y = net.conv("image", 3, 8)
    target = net.const([0, 8, 16])
    parts = [net.op("ReduceMean", net.op("Reshape", v, target), axes=[2], keepdims=0) for v in (x, y)]
    graph = from_model(net.model(net.op("Add", *(net.gemm(part, 8, 5) for part in parts)), 5))
    assert {group.size for group in graph.groups.prunable} == {8}
    feeds = image(4)
    one = assert_cut(graph, {"weight_1": [0, 1]}, feeds)
    targets = [node.inputs[1].values.tolist() for node in one.nodes if node.op == "Reshape"]
    assert targets == [[0, 6, 16], [0, 8, 16]]
    both = assert_cut(graph, {"weight_1": [0, 1], "weight_3": [5, 6]}, feeds)
    assert [node.inputs[1].name for node in both.nodes if node.op == "Reshape"] == [target, target]


# -- refusing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ({"weight_1": range(8)}, "all 8 units would be cut"),
        ({"weight_5": [6]}, "has units 0..5, asked to cut 6"),
        ({"weight_5": [-1]}, "has units 0..5, asked to cut -1"),
        ({"wieght_5": [0]}, "did you mean 'weight_5'"),
        ({"weight_1.in": [0]}, "may not be cut: graph input 'image'"),
    ],
)
def test_refused(cuts: dict[str, list[int]], message: str) -> None:
    graph = chain()
    with pytest.raises(GraphError, match=message):
        cut(graph, cuts)
    with pytest.raises(GraphError, match=message):
        predicted(graph, cuts)


def test_groups_of_another_graph_are_refused() -> None:
    with pytest.raises(GraphError, match="another graph's"):
        cut(from_model(zoo.build("vit")), {"weight_41": [0]}, from_model(zoo.build("resnet")).groups)


# -- size --------------------------------------------------------------------------------------------------------------


def test_uncut_figures_are_those_of_the_graph() -> None:
    from eexform.cost_models.macs import Macs
    from eexform.cost_models.params import Params

    for name in ("mobilenet", "vit", "swin"):
        graph = from_model(zoo.build(name))
        assert predicted(graph, {}) == (Macs().cost(graph).total, Params().cost(graph).total)


def test_work_grows_with_the_network() -> None:
    def work(nodes: int) -> int:
        graph = from_model(residual(nodes))
        _ = graph.types, graph.flow
        return function_calls(lambda: cut(graph, some(graph)))

    work(100)
    assert work(800) < 6 * work(200)


def test_onnxruntime_takes_a_large_cut_graph() -> None:
    graph = from_model(residual(300))
    small = cut(graph, some(graph))
    assert ort.run(ort.session(small), image(8))["logits"].shape == (2, 5)
    assert isinstance(small.gs, gs.Graph)
