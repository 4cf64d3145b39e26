"""Splitting and merging axes: which positions go together, which factor may be cut, and how targets are mended."""

from __future__ import annotations

import numpy as np
import pytest

from eexform.frontends.onnx import from_model
from eexform.ir.coupling import Slot
from eexform.ir.coupling_reshape import blocks, literal
from eexform.ir.graph import Graph
from tests.ir.masking import assert_cut, some
from tests.zoo.net import Net


def image(batch: int = 3, *shape: int) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(0).normal(size=(batch, *shape)).astype(np.float32)}


def finished(net: Net, scores: str) -> Graph:
    return from_model(net.model(scores, 5))


def prunable(graph: Graph) -> dict[str, int]:
    return {group.name: group.size for group in graph.groups.prunable}


# -- factors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, 12, 3), (2, 3, 4, 3)),
        ((2, 3, 4, 3), (2, 12, 3)),
        ((6, 4), (24,)),
        ((2, 6), (4, 3)),
        ((1, 8, 1, 3), (8, 3)),
        ((4, 6, 5), (2, 12, 5)),
    ],
)
def test_factors_are_those_of_the_elements(before, after):
    """Every element has the same index along every factor before and after."""
    found = blocks(before, after, "x", "y")
    assert found is not None
    index_before = np.indices(before).reshape(len(before), -1)
    index_after = np.indices(after).reshape(len(after), -1)
    for block in found:
        assert block.sizes
        for factor in range(len(block.sizes)):
            along = []
            for axis in block.holders(factor):
                positions = index_before if axis.slot.value == "x" else index_after
                along.append(block.positions(axis, factor)[positions[axis.slot.axis]])
            assert len(along) == 2
            np.testing.assert_array_equal(*along)


def test_sizes_without_common_factors():
    (block,) = blocks((6, 4), (4, 6), "x", "y") or ()
    assert block.sizes == ()


@pytest.mark.parametrize(
    ("before", "after", "regular"),
    [
        (("N", 12), ("3*N", 4), {"y|0": True, "x|1": True}),
        (("3*N", 4), ("N", 12), {"x|0": True, "y|1": True}),
        ((3, "N", 4), ("3*N", 4), {"y|0": False}),
        (("4*N", 5), ("N", 2, 2, 5), {"x|0": True, "y|1": True}),
    ],
)
def test_axes_that_hold_samples_too(before, after, regular):
    found = blocks(before, after, "x", "y")
    assert found is not None
    known = {str(axis.slot): block.regular(axis) for block in found for axis in block.axes}
    assert {slot: known[slot] for slot in regular} == regular


def test_unknown_and_contradicting_sizes():
    assert blocks(("N", None), ("N", 4), "x", "y") is None
    assert blocks((3, 4), (3, 5), "x", "y") is None
    assert blocks((0, 4), (0,), "x", "y") is None


def test_literal_targets():
    assert literal(("N", 3, 4), ("N", 12)) == [0, 12]
    assert literal((17, "N", 12), (17, "2*N", 6)) == [17, -1, 6]
    assert literal(("N", 3, "seq", 4), ("N", "seq", 12)) == [0, -1, 12]
    assert literal(("N", 3, "seq", 4), ("3*N", "seq", 4)) is None


# -- whole graphs ----------------------------------------------------------------------------------------------------


def shuffle(target: str) -> Graph:
    """A channel shuffle in two groups of six, its targets constant or computed."""
    net = Net("shuffle")
    x = net.conv_bn_relu(net.input("image", 3, 4, 4), 3, 12)
    if target == "constant":
        x = net.op("Reshape", x, net.const([-1, 2, 6, 4, 4]))
        x = net.op("Reshape", net.transpose(x, 0, 2, 1, 3, 4), net.const([0, 12, 4, 4]))
    else:
        sizes = [net.size(x, axis) for axis in range(4)]
        half = net.op("Div", sizes[1], net.const(2)) if target == "divided" else 6
        x = net.transpose(net.reshape(x, sizes[0], 2, half, sizes[2], sizes[3]), 0, 2, 1, 3, 4)
        x = net.reshape(x, sizes[0], -1, sizes[2], sizes[3])
    return finished(net, net.classifier(net.conv_bn_relu(x, 12, 6), 6, 5))


@pytest.mark.parametrize("target", ["constant", "computed", "divided"])
def test_channel_shuffle(target):
    graph = shuffle(target)
    assert sorted(prunable(graph).values()) == [6, 6]
    first = graph.groups.prunable[0]
    np.testing.assert_array_equal(first.slots[Slot("conv_1", 1)], [[k, k + 6] for k in range(6)])
    for seed in range(3):
        assert_cut(graph, some(graph, 0.4, seed), image(3, 3, 4, 4))


def test_a_size_read_from_another_value_is_no_trap():
    """The number of channels of one layer as a size of another: it may not go on its own."""
    net = Net("read")
    x = net.input("image", 3, 4, 4)
    other = net.conv_bn_relu(x, 3, 8)
    inner = net.conv_bn_relu(x, 3, 8)
    inner = net.reshape(inner, net.size(x, 0), net.size(other, 1), 16)
    scores = net.op(
        "Add",
        net.classifier(net.op("Unsqueeze", inner, net.const([3])), 8, 5),
        net.classifier(other, 8, 5),
    )
    graph = finished(net, scores)
    frozen = {group.name: group.frozen for group in graph.groups.groups if group.frozen}
    assert any("size is read by Reshape" in why for why in frozen.values())
    assert_cut(graph, some(graph), image(2, 3, 4, 4))


def test_flatten_goes_by_channels():
    net = Net("flatten")
    x = net.conv_bn_relu(net.input("image", 3, 4, 4), 3, 6)
    graph = finished(net, net.gemm(net.op("Flatten", x), 96, 5))
    assert list(prunable(graph).values()) == [6]
    assert_cut(graph, some(graph), image(2, 3, 4, 4))


def test_odd_sizes_freeze():
    net = Net("odd")
    x = net.op("Relu", net.gemm(net.op("Flatten", net.input("image", 2, 2)), 4, 24))
    x = net.op("Reshape", net.op("Reshape", x, net.const([0, 6, 4])), net.const([0, 4, 6]))
    graph = finished(net, net.gemm(net.op("Flatten", x), 24, 5))
    assert not prunable(graph)
    assert any("none of which may be cut" in (group.frozen or "") for group in graph.groups.groups)


@pytest.mark.parametrize("merged", [False, True])
def test_heads(merged):
    """Heads are cut, not features within a head; keys may pass through heads that are merged with the batch."""
    net = Net("heads")
    x = net.input("image", 6, 12)
    query, key, value = (
        net.transpose(net.op("Reshape", net.linear(x, 12, 12), net.const([0, 6, 3, 4])), 0, 2, 1, 3) for _ in range(3)
    )
    if merged:
        key = net.transpose(net.op("Reshape", key, net.const([-1, 6, 4])), 0, 2, 1)
        key = net.op("Reshape", key, net.const([-1, 3, 4, 6]))
    else:
        key = net.transpose(key, 0, 1, 3, 2)
    mixed = net.op("MatMul", net.op("Softmax", net.op("MatMul", query, key)), value)
    mixed = net.op("Reshape", net.transpose(mixed, 0, 2, 1, 3), net.const([0, 6, 12]))
    x = net.op("ReduceMean", net.linear(mixed, 12, 8), axes=[1], keepdims=0)
    graph = finished(net, net.gemm(x, 8, 5))
    kinds = {group.kind: group.size for group in graph.groups.prunable}
    assert kinds["heads"] == 3
    for cuts in ({0}, {1, 2}):
        name = next(group.name for group in graph.groups.prunable if group.kind == "heads")
        assert_cut(graph, {name: sorted(cuts)}, image(3, 6, 12))
