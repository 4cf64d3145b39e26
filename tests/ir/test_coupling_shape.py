"""Transpose, Squeeze, Expand, Tile and pixel shuffles in small networks."""

from __future__ import annotations

import numpy as np
import pytest

from eexform.frontends.onnx import from_model
from eexform.ir.coupling import Slot
from eexform.ir.graph import Graph
from tests.ir.masking import assert_cut, some
from tests.zoo.net import Net


def image(batch: int = 3) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(0).normal(size=(batch, 3, 4, 4)).astype(np.float32)}


def checked(net: Net, scores: str) -> Graph:
    """The graph, of which cuts hold what they promise."""
    graph = from_model(net.model(scores, 5))
    for seed in range(2):
        assert_cut(graph, some(graph, 0.4, seed), image())
    return graph


def sizes(graph: Graph) -> list[int]:
    return [group.size for group in graph.groups.prunable]


def test_transpose_and_squeeze():
    net = Net("squeeze")
    x = net.conv_bn_relu(net.input("image", 3, 4, 4), 3, 6)
    x = net.op("Squeeze", net.transpose(net.op("GlobalAveragePool", x), 0, 2, 1, 3), net.const([1, 3]))
    assert sizes(checked(net, net.gemm(x, 6, 5))) == [6]


def test_squeeze_without_axes_and_unsqueeze():
    net = Net("unsqueeze")
    x = net.op("GlobalAveragePool", net.conv_bn_relu(net.input("image", 3, 4, 4), 3, 6))
    x = net.op("Unsqueeze", net.op("Squeeze", x), net.const([-1, 1]))
    assert sizes(checked(net, net.gemm(net.op("Flatten", x), 6, 5))) == [6]


@pytest.mark.parametrize("computed", [False, True])
def test_expanded_vector(computed):
    """A vector per channel, repeated to the size of the map: the target's channels are mended."""
    net = Net("expand")
    x = net.conv_bn_relu(net.input("image", 3, 4, 4), 3, 6)
    target = net.vector([net.size(x, 0), 6, 1, 1]) if computed else net.const([1, 6, 4, 1])
    x = net.op("Mul", x, net.op("Expand", net.weight(6, 1, 1), target))
    assert sizes(checked(net, net.classifier(x, 6, 5))) == [6]


@pytest.mark.parametrize("channels", ["number", "size"])
def test_channels_made_by_expand(channels):
    """One number repeated to all channels: each copy may go, the number in the target is mended."""
    net = Net("made")
    x = net.conv_bn_relu(net.input("image", 3, 4, 4), 3, 6)
    wide = 6 if channels == "number" else net.size(x, 1)
    constant = net.op("Expand", net.weight(1, 1, 1, scale=1.0), net.vector([net.size(x, 0), wide, 4, 4]))
    x = net.conv_bn_relu(net.op("Concat", x, constant, axis=1), 12, 6)
    graph = checked(net, net.classifier(x, 6, 5))
    assert 6 in sizes(graph)


def test_tile():
    net = Net("tile")
    x = net.conv_bn_relu(net.input("image", 3, 4, 4), 3, 6)
    x = net.op("Tile", x, net.const([1, 2, 1, 1]))
    graph = checked(net, net.classifier(net.conv_bn_relu(x, 12, 4), 4, 5))
    assert sizes(graph) == [6, 4]
    np.testing.assert_array_equal(graph.groups.prunable[0].slots[Slot("tile_1", 1)], [[k, k + 6] for k in range(6)])


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space(mode):
    net = Net("shuffle")
    x = net.conv_bn_relu(net.input("image", 3, 4, 4), 3, 12)
    x = net.op("DepthToSpace", x, blocksize=2, mode=mode)
    assert sizes(checked(net, net.classifier(net.conv_bn_relu(x, 3, 4), 4, 5))) == [3, 4]


def test_space_to_depth():
    net = Net("unshuffle")
    x = net.op("SpaceToDepth", net.conv_bn_relu(net.input("image", 3, 4, 4), 3, 3), blocksize=2)
    assert sizes(checked(net, net.classifier(net.conv_bn_relu(x, 12, 4), 4, 5))) == [3, 4]


def test_parameters_behind_a_transpose_keep_their_role():
    """A weight that is transposed before it is multiplied is a filter all the same."""
    net = Net("behind")
    x = net.op("Flatten", net.input("image", 3, 4, 4))
    x = net.op("Relu", net.op("MatMul", x, net.transpose(net.weight(8, 48), 1, 0)))
    graph = checked(net, net.gemm(x, 8, 5))
    (group,) = graph.groups.prunable
    assert group.size == 8
    assert "filter" in {member.role for member in group.members if member.slot.value == "weight_1"}
