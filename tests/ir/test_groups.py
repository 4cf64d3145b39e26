"""Channel groups: what goes together in convolutions, products, normalisations, and what stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eexform.errors import GraphError
from eexform.frontends.onnx import from_model, load
from eexform.ir.coupling import Coupler, Rule, Slot, rule
from eexform.ir.graph import Graph
from eexform.ir.groups import find_groups
from tests import zoo
from tests.graphs import random_classifier
from tests.ir.masking import assert_cut, some
from tests.zoo.net import Net


def small(build: str, seed: int = 0) -> Graph:
    """conv -> the operator called ``build`` -> global pooling -> classifier, with 8 channels."""
    net = Net("small", seed)
    x = net.op("Conv", net.input("image", 3, 6, 6), net.weight(8, 3, 3, 3), pads=[1] * 4)
    width = 8
    if build == "grouped":  # 2 groups, 8 -> 12
        x, width = net.op("Conv", x, net.weight(12, 4, 3, 3), net.weight(12), group=2, pads=[1] * 4), 12
    elif build == "depthwise":  # every channel makes two
        x, width = net.op("Conv", x, net.weight(16, 1, 3, 3), group=8, pads=[1] * 4), 16
    elif build == "transposed":
        x, width = net.op("ConvTranspose", x, net.weight(8, 6, 2, 2), net.weight(6), strides=[2, 2]), 6
    elif build == "transposed_grouped":
        x, width = net.op("ConvTranspose", x, net.weight(8, 3, 2, 2), net.weight(6), group=2, strides=[2, 2]), 6
    elif build == "transposed_depthwise":
        x = net.op("ConvTranspose", x, net.weight(8, 1, 2, 2), group=8, strides=[2, 2])
    elif build == "transposed_wide":  # one input channel per group, three outputs each
        x, width = net.op("ConvTranspose", x, net.weight(8, 3, 2, 2), group=8, strides=[2, 2]), 24
    elif build == "instance":
        x = net.op("InstanceNormalization", x, net.weight(8), net.weight(8))
    elif build == "prelu":
        x = net.op("PRelu", x, net.weight(8, 1, 1))
    elif build == "gate":
        squeezed = net.op("ReduceMean", x, axes=[2, 3], keepdims=1)
        x = net.op("Mul", x, net.op("HardSigmoid", net.op("Conv", squeezed, net.weight(8, 8, 1, 1))))
    elif build == "softmax":
        x = net.op("Mul", x, net.op("Softmax", x, axis=1))
    elif build == "mean":
        x = net.op("Sub", x, net.op("ReduceMean", x, axes=[1], keepdims=1))
    elif build == "largest":
        x = net.op("Sub", x, net.op("ReduceMax", x, axes=[1], keepdims=1))
    elif build == "norm":
        x = net.op("Div", x, net.op("ReduceL2", x, axes=[1], keepdims=1))
    elif build == "pools":
        x = net.op("Sum", net.op("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4), net.op("Clip", x), x)
    elif build == "relu6":
        x = net.op("Clip", x, net.const(0, np.float32), net.const(6, np.float32))
    else:
        assert build == "plain", build
    scores = net.op("Gemm", net.op("Flatten", net.op("GlobalAveragePool", x)), net.weight(5, width), transB=1)
    return from_model(net.model(scores, 5))


BUILDS = (
    "plain", "grouped", "depthwise", "transposed", "transposed_grouped", "transposed_depthwise", "transposed_wide",
    "instance", "prelu", "gate", "softmax", "mean", "largest", "norm", "pools", "relu6",
)  # fmt: skip


def sizes(graph: Graph) -> dict[str, int]:
    return {group.name: group.size for group in graph.groups.prunable}


def image(seed: int = 0) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(seed).normal(size=(2, 3, 6, 6)).astype(np.float32)}


@pytest.mark.parametrize("build", BUILDS)
def test_a_cut_equals_the_network_in_which_nobody_reads_what_was_cut(build: str) -> None:
    graph = small(build)
    assert sizes(graph)
    for seed, share in enumerate((0.2, 0.5, 0.8)):
        assert_cut(graph, some(graph, share, seed), image(seed))


def test_sizes_of_groups() -> None:
    assert sizes(small("plain")) == {"weight_1": 8}
    assert sizes(small("grouped")) == {"weight_1": 4, "weight_2": 6}
    assert sizes(small("depthwise")) == {"weight_1": 8}
    assert sizes(small("transposed")) == {"weight_1": 8, "weight_2": 6}
    assert sizes(small("transposed_grouped")) == {"weight_1": 4, "weight_2": 3}
    assert sizes(small("transposed_wide")) == {"weight_1": 8}
    assert sizes(small("gate")) == {"weight_1": 8}


def test_members_have_roles_and_positions() -> None:
    graph = small("depthwise")
    group = graph.groups["weight_1"]
    found = {str(m.slot): (m.role, m.units.tolist()[1]) for m in group.members if m.constant}
    assert found == {
        "weight_1|0": ("filter", [1]),
        "weight_2|0": ("filter", [2, 3]),
        "weight_3|1": ("reader", [2, 3]),
    }
    assert {m.role for m in group.members if not m.constant} == {"activation"}
    assert group.kind == "channels"
    assert group.exact


def test_inputs_and_outputs_are_frozen_with_a_reason() -> None:
    groups = small("plain").groups
    assert groups["weight_1.in"].frozen == "graph input 'image'"
    assert groups["weight_2"].frozen == "graph output 'logits'"
    assert not groups["weight_2"].prunable


def test_group_normalisation_loses_whole_groups() -> None:
    net = Net("groups")
    x = net.op("Conv", net.input("image", 3, 6, 6), net.weight(8, 3, 3, 3), pads=[1] * 4)
    x = net.op("GroupNormalization", x, net.weight(8), net.weight(8), num_groups=4)
    graph = from_model(net.model(net.classifier(x, 8, 5), 5, opset=21))
    assert sizes(graph) == {"weight_1": 4}
    assert graph.groups["weight_1"].exact
    small = assert_cut(graph, {"weight_1": [0, 2]}, image())
    (node,) = (node for node in small.nodes if node.op == "GroupNormalization")
    assert node.attrs["num_groups"] == 2
    assert [m.units.tolist() for m in graph.groups["weight_1"].constants("filter")] == [
        [[0, 1], [2, 3], [4, 5], [6, 7]]
    ]


@pytest.mark.parametrize("build", ["softmax", "mean", "largest"])
def test_statistics_over_channels_are_inexact(build: str) -> None:
    group = small(build).groups["weight_1"]
    assert not group.exact
    assert "over the axis" in group.inexact[0]


@pytest.mark.parametrize("build", ["plain", "gate", "norm", "instance"])
def test_what_is_zero_can_as_well_be_left_out(build: str) -> None:
    assert small(build).groups["weight_1"].exact


def test_an_operator_without_a_rule_freezes_what_it_touches() -> None:
    net = Net("odd")
    x = net.op("Conv", net.input("image", 3, 6, 6), net.weight(8, 3, 3, 3), pads=[1] * 4)
    x = net.op("Conv", net.op("LpPool", net.op("Bernoulli", x), kernel_shape=[1, 1]), net.weight(4, 8, 1, 1))
    graph = from_model(net.model(net.classifier(x, 4, 5), 5))
    assert graph.groups["weight_1"].frozen == "Bernoulli has no rule (Bernoulli 'node_bernoulli_1')"
    assert graph.groups["weight_2"].prunable


def test_an_axis_that_a_rule_forgets_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(Rule):
        def couple(self, node: object, coupler: Coupler) -> None:
            return

    from eexform.ir import coupling_rule

    graph = small("relu6")
    assert sizes(graph) == {"weight_1": 8}
    monkeypatch.setitem(coupling_rule._RULES, ("", "Clip"), Forgetful())
    frozen = find_groups(graph)["weight_1"].frozen
    assert frozen is not None
    assert "has no rule" in frozen


def test_one_rule_per_operator() -> None:
    with pytest.raises(GraphError, match="'Relu' has two coupling rules"):
        rule("Relu")(Rule)


def test_residual_blocks_are_one_stream_and_families_of_inner_channels() -> None:
    graph = from_model(zoo.build("preact"))
    found = sizes(graph)
    again = find_groups(graph)
    assert {group.name: group.size for group in again.prunable} == found
    families = graph.groups.families()
    assert [name for names in families.values() for name in names] != []
    assert set(found) == {name for names in families.values() for name in names}
    assert graph.groups.family(next(iter(found))) in families


def test_shared_weights_are_one_slot() -> None:
    net = Net("shared")
    shared = net.weight(8, 8, 3, 3)
    x = net.op("Conv", net.input("image", 3, 6, 6), net.weight(8, 3, 3, 3), pads=[1] * 4)
    for _ in range(2):
        x = net.op("Relu", net.op("Conv", x, shared, pads=[1] * 4))
    graph = from_model(net.model(net.classifier(x, 8, 5), 5))
    assert sizes(graph) == {"weight_2": 8}  # what the shared weight reads is what it makes: all one group
    assert {slot for slot in graph.groups["weight_2"].slots if slot.value == shared} == {
        Slot(shared, 0),
        Slot(shared, 1),
    }
    assert_cut(graph, some(graph), image())


def test_both_roles_of_a_shared_weight_are_members() -> None:
    net = Net("shared")
    shared = net.weight(8, 8, 1, 1)
    x = net.op("Conv", net.input("image", 8, 6, 6), net.weight(8, 8, 1, 1))
    x = net.op("Conv", x, shared)
    graph = from_model(net.model(net.classifier(net.op("Conv", x, shared), 8, 5), 5))
    (group,) = graph.groups.prunable
    assert {(str(m.slot), m.role) for m in group.constants("filter", "reader") if m.slot.value == shared} == {
        (f"{shared}|0", "filter"),
        (f"{shared}|1", "reader"),
    }


def test_data_products_tie_what_they_contract() -> None:
    net = Net("products")
    x = net.op("Conv", net.input("image", 3, 6, 6), net.weight(8, 3, 1, 1))
    y = net.op("Conv", "image", net.weight(8, 3, 1, 1))
    flat = [net.op("Reshape", v, net.const([0, 8, 36])) for v in (x, y)]
    product = net.op("MatMul", net.op("Transpose", flat[0], perm=[0, 2, 1]), flat[1])  # [N, 36, 36] over channels
    mean = net.op("ReduceMean", product, axes=[1], keepdims=0)
    graph = from_model(net.model(net.gemm(mean, 36, 5), 5))
    assert sizes(graph) == {"weight_1": 8}
    assert_cut(graph, some(graph), image())


@pytest.mark.parametrize("name", zoo.NAMES)
def test_zoo(name: str) -> None:
    graph = from_model(zoo.build(name))
    assert graph.groups.prunable
    assert_cut(graph, some(graph), zoo.feeds(name))


def test_units_partition_every_slot_they_touch() -> None:
    for name in zoo.NAMES:
        graph = from_model(zoo.build(name))
        seen: dict[Slot, list[int]] = {}
        for group in graph.groups.groups:
            for slot, units in group.slots.items():
                assert len(units) == group.size
                seen.setdefault(slot, []).extend(units.reshape(-1).tolist())
        for slot, positions in seen.items():
            assert len(positions) == len(set(positions)), slot


def test_json_is_plain() -> None:
    import json

    plain = json.loads(json.dumps(small("gate").groups.to_json()))
    assert plain["families"] == {"weight_1": ["weight_1"]}
    assert plain["groups"][1]["name"] == "weight_1"


def test_unknown_group() -> None:
    groups = small("plain").groups
    with pytest.raises(GraphError, match="weight_1"):
        groups["weight_11"]
    with pytest.raises(GraphError, match="no family"):
        groups.family("weight_1.in")


def test_the_same_graph_has_the_same_groups() -> None:
    first, second = (from_model(random_classifier(3)).groups.to_json() for _ in range(2))
    assert first == second


@pytest.mark.shared_data
@pytest.mark.parametrize(("name", "stream", "inner"), [("cifar10_resnet20", 16, 9), ("cifar10_resnet56", 16, 27)])
def test_cifar_resnet(shared: Path, name: str, stream: int, inner: int) -> None:
    graph = load(shared / "models" / f"{name}.onnx")
    found = sizes(graph)
    assert found["conv1"] == stream
    assert sum(group.endswith(".conv1") for group in found) == inner
    feeds = {"image": np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)}
    assert_cut(graph, some(graph, 0.3), {graph.inputs[0]: feeds["image"]}, tolerance=1e-4)
