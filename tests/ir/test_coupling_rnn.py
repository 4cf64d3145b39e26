"""Recurrent layers: the width of the hidden state, in every form that ONNX has."""

from __future__ import annotations

import numpy as np
import pytest

from eexform.frontends.onnx import from_model
from eexform.ir.coupling import Slot
from tests.ir.masking import assert_cut, some
from tests.zoo.net import Net

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("op", GATES)
def test_hidden_units(op, direction):
    net = Net("spotter")
    ways, width, gates = (2 if direction == "bidirectional" else 1), 6, GATES[op]
    x = net.op("Relu", net.linear(net.input("frames", 7, 4), 4, 5))
    operands = [
        net.transpose(x, 1, 0, 2),
        net.weight(ways, gates * width, 5, scale=0.4),
        net.weight(ways, gates * width, width, scale=0.4),
        net.weight(ways, 2 * gates * width, scale=0.3),
    ]
    if op == "LSTM":  # with looks at the cell
        operands += ["", "", "", net.weight(ways, 3 * width, scale=0.3)]
    more = {"linear_before_reset": 1} if op == "GRU" else {}
    y = net.op(op, *operands, hidden_size=width, direction=direction, **more)  # [T, ways, N, width]
    y = net.op("Reshape", net.transpose(y, 2, 0, 1, 3), net.const([0, 7, ways * width]))
    graph = from_model(net.model(net.gemm(net.pick(y, -1, 1), ways * width, 5), 5))
    assert sorted(group.size for group in graph.groups.prunable) == [5, 6]
    hidden = next(group for group in graph.groups.prunable if group.size == 6)
    np.testing.assert_array_equal(
        hidden.slots[Slot(operands[1], 1)], np.arange(6)[:, None] + width * np.arange(gates)[None]
    )
    feeds = {"frames": np.random.default_rng(0).normal(size=(3, 7, 4)).astype(np.float32)}
    for seed in range(2):
        small = assert_cut(graph, some(graph, 0.4, seed), feeds)
        assert next(node for node in small.nodes if node.op == op).attrs["hidden_size"] == 4
