"""Fused attention: heads go as a whole, the attributes that count them are mended."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from eexform.frontends.onnx import from_model
from eexform.ir.graph import Graph
from tests.ir.masking import assert_cut
from tests.zoo.net import Net

WIDTH, HEADS, TOKENS = 12, 3, 6


def tokens() -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(0).normal(size=(3, TOKENS, WIDTH)).astype(np.float32)}


def finished(net: Net, mixed: str, opset: int = 17) -> Graph:
    """A projection, the mean over the tokens and a classifier; onnxruntime's domain is known."""
    x = net.op("ReduceMean", net.linear(mixed, WIDTH, 8), net.const([1]), keepdims=0)
    scores = net.gemm(x, 8, 5)
    net.nodes.append(helper.make_node("Identity", [scores], ["logits"], "logits"))
    output = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["N", 5])
    graph = helper.make_graph(net.nodes, net.name, net.inputs, [output], net.weights)
    for name in ("attention_1", "multiheadattention_1"):
        if any(name in node.output for node in net.nodes):
            graph.value_info.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", TOKENS, WIDTH]))
    domains = [helper.make_opsetid("", max(opset, 18)), helper.make_opsetid("com.microsoft", 1)]
    return from_model(helper.make_model(graph, opset_imports=domains, ir_version=10))


def held(graph: Graph) -> None:
    """Any one head, and any two, may go."""
    (group,) = (group for group in graph.groups.prunable if group.kind == "heads")
    assert group.size == HEADS
    for gone in ([0], [1], [0, 2]):
        small = assert_cut(graph, {group.name: gone}, tokens())
        for node in small.nodes:
            for key in ("num_heads", "q_num_heads", "kv_num_heads"):
                assert node.attrs.get(key, HEADS - len(gone)) == HEADS - len(gone)


@pytest.mark.parametrize("biased", [False, True])
def test_multi_head_attention(biased):
    net = Net("fused")
    x = net.input("image", TOKENS, WIDTH)
    operands = [net.linear(x, WIDTH, WIDTH) for _ in range(3)]
    if biased:
        operands.append(net.weight(3 * WIDTH, scale=0.3))
    held(finished(net, net.op("MultiHeadAttention", *operands, num_heads=HEADS, domain="com.microsoft")))


def test_packed_attention():
    net = Net("packed")
    x = net.op("Relu", net.linear(net.input("image", TOKENS, WIDTH), WIDTH, WIDTH))
    weights = net.weight(WIDTH, 3 * WIDTH, scale=0.3), net.weight(3 * WIDTH, scale=0.3)
    held(finished(net, net.op("Attention", x, *weights, num_heads=HEADS, domain="com.microsoft")))


@pytest.mark.parametrize("rank", [3, 4])
def test_standard_attention(rank):
    net = Net("standard")
    x = net.input("image", TOKENS, WIDTH)
    operands = [net.linear(x, WIDTH, WIDTH) for _ in range(3)]
    if rank == 3:
        mixed = net.op("Attention", *operands, q_num_heads=HEADS, kv_num_heads=HEADS)
    else:
        shape = net.const([0, TOKENS, HEADS, WIDTH // HEADS])
        operands = [net.transpose(net.op("Reshape", operand, shape), 0, 2, 1, 3) for operand in operands]
        mixed = net.op("Reshape", net.transpose(net.op("Attention", *operands), 0, 2, 1, 3), net.const([0, 0, WIDTH]))
    held(finished(net, mixed, 23))


def test_fewer_key_heads_freeze():
    net = Net("grouped")
    x = net.input("image", TOKENS, WIDTH)
    operands = [net.linear(x, WIDTH, width) for width in (WIDTH, 4, 4)]
    graph = finished(net, net.op("Attention", *operands, q_num_heads=3, kv_num_heads=1), 23)
    assert not [group for group in graph.groups.prunable if group.kind == "heads"]
    assert any("fewer key heads" in (group.frozen or "") for group in graph.groups.groups)
