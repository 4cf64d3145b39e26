"""Concat, Split, Slice, Pad, Gather and Resize in small networks."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto

from eexform.frontends.onnx import from_model
from eexform.ir.coupling import Slot
from eexform.ir.graph import Graph
from tests.ir.masking import assert_cut, some
from tests.zoo.net import Net


def image(batch: int = 3) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(0).normal(size=(batch, 3, 4, 4)).astype(np.float32)}


def checked(net: Net, scores: str, opset: int = 17) -> Graph:
    """The graph, of which cuts hold what they promise, a cut of a cut included."""
    graph = from_model(net.model(scores, 5, opset))
    for seed in range(3):
        small = assert_cut(graph, some(graph, 0.4, seed), image())
    if small.groups.prunable:
        assert_cut(small, some(small, 0.3, 7), image())
    return graph


def start(width: int = 8) -> tuple[Net, str]:
    net = Net("small")
    return net, net.conv_bn_relu(net.input("image", 3, 4, 4), 3, width)


def end(net: Net, x: str, width: int, opset: int = 17) -> Graph:
    if opset < 18:
        return checked(net, net.classifier(net.conv_bn_relu(x, width, 6), 6, 5))
    return checked(net, net.classifier(net.conv_bn_relu(x, width, 6), 6, 5), opset)


def sizes(graph: Graph) -> list[int]:
    return sorted(group.size for group in graph.groups.prunable)


def test_concat_keeps_operands_apart():
    net, x = start(8)
    y = net.conv_bn_relu(x, 8, 4)
    graph = end(net, net.op("Concat", x, y, x, axis=1), 20)
    assert sizes(graph) == [4, 6, 8]
    group = next(group for group in graph.groups.prunable if group.size == 8)
    np.testing.assert_array_equal(group.slots[Slot("concat_1", 1)], [[k, 12 + k] for k in range(8)])


def test_concat_with_a_parameter():
    """Planes that are parameters, one after the other with the channels."""
    net, x = start(6)
    planes = net.op("Expand", net.weight(1, 2, 4, 4), net.vector([net.size(x, 0), 1, 1, 1]))
    graph = end(net, net.op("Concat", planes, x, axis=1), 8)
    assert sizes(graph) == [2, 6, 6]


@pytest.mark.parametrize("form", ["sizes", "equal", "number"])
def test_split(form):
    net, x = start(9)
    if form == "sizes":
        parts = net.op("Split", x, net.const([2, 4, 3]), outputs=3, axis=1)
    elif form == "equal":
        parts = net.op("Split", x, outputs=3, axis=1)
    else:
        parts = net.op("Split", x, outputs=2, axis=1, num_outputs=2)  # 5 and 4
    opset = 18 if form == "number" else 17
    widths = {"sizes": [2, 4, 3], "equal": [3, 3, 3], "number": [5, 4]}[form]
    joined = net.op(
        "Concat",
        *(net.op("Mul", part, net.weight(width, 1, 1)) for part, width in zip(parts, widths, strict=True)),
        axis=1,
    )
    assert sum(sizes(end(net, joined, 9, opset))) == 9 + 6


def test_split_into_single_channels_freezes():
    net, x = start(2)
    first, second = net.op("Split", x, net.const([1, 1]), outputs=2, axis=1)
    graph = end(net, net.op("Add", first, second), 1)
    assert any("single positions" in (group.frozen or "") for group in graph.groups.groups)


@pytest.mark.parametrize(("first", "last", "step"), [(2, 7, 1), (-6, -1, 1), (0, 2**62, 1), (-1, -(2**62), -1)])
def test_slices_of_channels(first, last, step):
    net, x = start(8)
    width = len(range(8)[slice(first, None if step < 0 else last, step)])
    x = net.op("Add", net.slice(x, first, last, 1, step), net.weight(width, 1, 1))
    graph = end(net, x, width)
    assert sum(sizes(graph)) == (8 if width == 8 else 5 + 3) + 6 or width < 8


def test_strided_slices_of_channels_freeze():
    net, x = start(8)
    graph = end(net, net.slice(x, 0, 8, 1, 2), 4)
    assert sizes(graph) == [6]
    assert any("stride" in (group.frozen or "") for group in graph.groups.groups)


def test_strided_slices_of_space_do_not():
    net, x = start(8)
    assert sizes(end(net, net.slice(net.slice(x, 0, 4, 2, 2), 0, 4, 3, 2), 8)) == [6, 8]


@pytest.mark.parametrize("axes", [False, True])
def test_pad_of_channels(axes):
    """Option A: the channels of zeros may go one by one; the amounts are mended."""
    net, x = start(4)
    wide = net.conv_bn_relu(x, 4, 8)
    if axes:
        padded = net.op("Pad", x, net.const([3, 1]), "", net.const([1]))
    else:
        padded = net.op("Pad", x, net.const([0, 3, 0, 0, 0, 1, 0, 0]))
    graph = checked(net, net.classifier(net.op("Relu", net.op("Add", wide, padded)), 8, 5), 18)
    assert sizes(graph) == [4, 4]


def test_pad_by_amounts_that_are_computed_from_constants():
    """As older exporters write it: pairs from the last axis on, turned round by nodes."""
    net, x = start(4)
    pairs = net.op("Reshape", net.const([0, 0, 0, 0, 3, 1, 0, 0]), net.const([-1, 2]))
    turned = net.transpose(net.slice(pairs, -1, -(2**62), 0, -1), 1, 0)
    padded = net.op("Pad", x, net.op("Cast", net.op("Reshape", turned, net.const([-1])), to=TensorProto.INT64))
    wide = net.conv_bn_relu(x, 4, 8)
    graph = checked(net, net.classifier(net.op("Relu", net.op("Add", wide, padded)), 8, 5))
    assert sizes(graph) == [4, 4]


def test_pad_with_other_channels_freezes():
    net, x = start(4)
    padded = net.op("Pad", x, net.const([0, 2, 0, 0, 0, 2, 0, 0]), mode="reflect")
    graph = end(net, padded, 8)
    assert any("borders" in (group.frozen or "") for group in graph.groups.groups)


def test_pad_of_space():
    net, x = start(4)
    assert sizes(end(net, net.op("Pad", x, net.const([0, 0, 1, 1, 0, 0, 1, 1]), mode="reflect"), 4)) == [4, 6]


def test_channels_in_another_order():
    net, x = start(6)
    graph = end(net, net.op("Gather", x, net.const([5, 0, -2, 1, 3, 2]), axis=1), 6)
    assert sizes(graph) == [6, 6]


def test_channels_taken_twice():
    net, x = start(4)
    graph = end(net, net.op("Gather", x, net.const([0, 1, 2, 3, 3, 2, 1, 0]), axis=1), 8)
    assert sizes(graph) == [4, 6]


def test_a_channel_picked_by_number_freezes():
    net, x = start(4)
    picked = net.op("Unsqueeze", net.pick(x, 2, 1), net.const([1]))
    graph = end(net, net.op("Mul", x, picked), 4)
    assert any("picked by number" in (group.frozen or "") for group in graph.groups.groups)


def test_embedding():
    net = Net("words")
    ids = net.input("ids", 6, dtype=TensorProto.INT64)
    x = net.op("Add", net.op("Gather", net.weight(10, 8), ids, axis=0), net.weight(6, 8))
    x = net.op("ReduceMean", net.op("Relu", net.linear(x, 8, 12)), axes=[1], keepdims=0)
    graph = from_model(net.model(net.gemm(x, 12, 5), 5))
    assert {group.kind: group.size for group in graph.groups.prunable} == {"embedding": 8, "width": 12}
    feeds = {"ids": np.random.default_rng(0).integers(0, 10, (3, 6))}
    assert_cut(graph, some(graph), feeds)


@pytest.mark.parametrize("form", ["scales", "sizes", "axes"])
def test_resize(form):
    net, x = start(4)
    if form == "scales":
        up = net.op("Resize", x, "", net.const([1, 1, 2, 2], np.float32), mode="nearest")
    elif form == "sizes":
        up = net.op("Resize", x, "", "", net.vector([net.size(x, 0), 4, 8, 8]), mode="nearest")
    else:
        up = net.op("Resize", x, "", "", net.const([8, 8]), mode="nearest", axes=[2, 3])
    assert sizes(end(net, up, 4, 18)) == [4, 6]


def test_table_of_relative_positions():
    """Rows of a table per pair of positions, one column per head: the heads' columns go with the heads."""
    net = Net("bias")
    x = net.input("image", 6, 12)
    query, key, value = (
        net.transpose(net.op("Reshape", net.linear(x, 12, 12), net.const([0, 6, 3, 4])), 0, 2, 1, 3) for _ in range(3)
    )
    places = np.abs(np.arange(6)[:, None] - np.arange(6)).reshape(-1, 1)
    rows = net.op("GatherND", net.weight(6, 3), net.const(places))
    bias = net.transpose(net.op("Reshape", rows, net.const([6, 6, 3])), 2, 0, 1)
    scores = net.op("Add", net.op("MatMul", query, net.transpose(key, 0, 1, 3, 2)), bias)
    mixed = net.op("MatMul", net.op("Softmax", scores), value)
    mixed = net.op("Reshape", net.transpose(mixed, 0, 2, 1, 3), net.const([0, 6, 12]))
    x = net.op("ReduceMean", net.linear(mixed, 12, 8), axes=[1], keepdims=0)
    graph = from_model(net.model(net.gemm(x, 8, 5), 5))
    heads = next(group for group in graph.groups.prunable if group.kind == "heads")
    assert heads.size == 3
    feeds = {"image": np.random.default_rng(0).normal(size=(2, 6, 12)).astype(np.float32)}
    assert_cut(graph, {heads.name: [1]}, feeds)
