"""MAC rules against counts done by hand and against the published figures of real networks."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from eexform.errors import GraphError
from eexform.ir.arithmetic import has_rule, node_macs, size_of
from eexform.ir.types import Dim, TensorType


def count(op: str, inputs: list[tuple[Dim, ...] | None], output: tuple[Dim, ...], bindings=None, domain=None, **attrs):
    """MACs of one node whose operands have the given shapes."""
    types = {f"i{k}": TensorType(np.dtype("float32"), shape) for k, shape in enumerate(inputs) if shape is not None}
    types["out"] = TensorType(np.dtype("float32"), output)
    operands = [gs.Variable.empty() if shape is None else gs.Variable(f"i{k}") for k, shape in enumerate(inputs)]
    node = gs.Node(op, name="node", attrs=attrs, inputs=operands, outputs=[gs.Variable("out")], domain=domain)
    return node_macs(node, types, bindings)


@pytest.mark.parametrize(
    ("op", "inputs", "output", "attrs", "expected"),
    [
        ("Conv", [("N", 16, 8, 8), (32, 16, 3, 3)], ("N", 32, 4, 4), {}, 32 * 16 * 16 * 9),
        ("Conv", [("N", 16, 8, 8), (16, 1, 3, 3)], ("N", 16, 8, 8), {"group": 16}, 16 * 64 * 9),
        ("Conv", [("N", 4, 10), (8, 4, 5)], ("N", 8, 6), {}, 8 * 6 * 20),
        ("ConvTranspose", [("N", 4, 5, 5), (4, 2, 2, 2)], ("N", 2, 10, 10), {}, 100 * 8),
        ("Gemm", [("N", 64), (10, 64)], ("N", 10), {"transB": 1}, 640),
        ("Gemm", [(64, "N"), (64, 10)], ("N", 10), {"transA": 1}, 640),
        ("MatMul", [("N", 5, 8), (8, 3)], ("N", 5, 3), {}, 120),
        ("MatMul", [("N", 2, 5, 4), ("N", 2, 4, 5)], ("N", 2, 5, 5), {}, 200),
        ("MatMul", [("64*N", 49, 32), (32, 96)], ("64*N", 49, 96), {}, 64 * 49 * 32 * 96),
        ("MatMul", [(8,), (8, 3)], (3,), {}, 24),
        ("MatMulInteger", [("N", 8), (8, 3)], ("N", 3), {}, 24),
        ("QLinearMatMul", [("N", 8), (), (), (8, 3), (), (), (), ()], ("N", 3), {}, 24),
        ("QLinearConv", [("N", 2, 4, 4), (), (), (3, 2, 1, 1), (), (), (), ()], ("N", 3, 4, 4), {}, 96),
        ("ConvInteger", [("N", 2, 4, 4), (3, 2, 1, 1)], ("N", 3, 4, 4), {}, 96),
        ("LSTM", [(7, "N", 5), (1, 12, 5), (1, 12, 3)], (7, 1, "N", 3), {}, 7 * (60 + 36)),
        ("GRU", [(7, "N", 5), (2, 9, 5), (2, 9, 3)], (7, 2, "N", 3), {}, 7 * 2 * (45 + 27)),
        ("RNN", [(7, "N", 5), (1, 3, 5), (1, 3, 3)], (7, 1, "N", 3), {}, 7 * (15 + 9)),
        ("Einsum", [("N", 4, 5), (5, 6)], ("N", 4, 6), {"equation": "bij,jk->bik"}, 120),
        ("Einsum", [("N", 3, 4, 5), ("N", 3, 6, 5)], ("N", 3, 4, 6), {"equation": "...id,...jd->...ij"}, 3 * 4 * 6 * 5),
        ("Einsum", [("N", 4, 5)], ("N", 5, 4), {"equation": "bij->bji"}, 0),
        ("Attention", [("N", 2, 5, 4), ("N", 2, 7, 4), ("N", 2, 7, 6)], ("N", 2, 5, 6), {}, 2 * 5 * 7 * 10),
        (
            "Attention",
            [("N", 5, 8), ("N", 7, 4), ("N", 7, 4), None, ("N", 1, 3, 4)],
            ("N", 5, 8),
            {"q_num_heads": 2, "kv_num_heads": 1},
            2 * 5 * 10 * 8,
        ),
        ("CausalConvWithState", [("N", 6, 9), (6, 1, 4)], ("N", 6, 9), {}, 54 * 4),
        # 5 tokens: 4 query heads read a state [3, 8], 2 key heads write it; the delta rules read it before they write
        (
            "LinearAttention",
            [("N", 5, 12), ("N", 5, 6), ("N", 5, 16)],
            ("N", 5, 32),
            {"q_num_heads": 4, "kv_num_heads": 2, "update_rule": "linear"},
            5 * (4 + 2) * 3 * 8,
        ),
        (
            "LinearAttention",
            [("N", 5, 12), ("N", 5, 6), ("N", 5, 16)],
            ("N", 5, 32),
            {"q_num_heads": 4, "kv_num_heads": 2, "update_rule": "gated_delta"},
            5 * (4 + 4) * 3 * 8,
        ),
        ("SequenceAt", [None, ()], (None,), {}, 0),
        ("Relu", [("N", 16, 8, 8)], ("N", 16, 8, 8), {}, 0),
        ("Softmax", [None], (None,), {}, 0),
    ],
)
def test_formulas(op, inputs, output, attrs, expected):
    assert count(op, inputs, output, **attrs) == expected


def test_unknown_operators_have_no_rule_and_are_not_zero():
    assert count("If", [("N",)], ("N",)) is None
    assert count("Conv", [("N", 4, 10), (8, 4, 5)], ("N", 8, 6), domain="my.own") is None
    assert count("FusedConv", [("N", 4, 10), (8, 4, 5)], ("N", 8, 6), domain="com.microsoft") == 960
    assert count("FastGelu", [("N", 4)], ("N", 4), domain="com.microsoft") == 0


def test_symbols_other_than_the_batch_ask_for_a_binding():
    inputs, output = [("N", "seq", 8), (8, 3)], ("N", "seq", 3)
    with pytest.raises(GraphError, match=r"bind it, e\.g\. seq=128"):
        count("MatMul", inputs, output)
    assert count("MatMul", inputs, output, bindings={"seq": 10}) == 240
    assert size_of("4*seq", "x", {"seq": 10}) == 40
    with pytest.raises(GraphError, match="not known"):
        count("MatMul", [(None, 8), (8, 3)], (None, 3))


def test_every_operator_is_in_one_list_only():
    from eexform.ir import arithmetic

    assert not arithmetic.ZERO_MACS & set(arithmetic.RULES)
    assert not arithmetic.ZERO_MACS_MICROSOFT & set(arithmetic.RULES_MICROSOFT)
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    named = arithmetic.ZERO_MACS | set(arithmetic.RULES)
    newer = {
        "Swish",
        "SwiGLU",
        "BitCast",
        "CumProd",
        "TensorScatter",
        "RotaryEmbedding",
        "RMSNormalization",
        "Attention",
        "CausalConvWithState",
        "LinearAttention",
    }
    assert named - known <= newer, "a misspelt operator"
    without = known - named
    # control flow, signal processing, losses: reported as unknown, never as zero
    expected = (
        "If Loop Scan SequenceMap TfIdfVectorizer DFT STFT MelWeightMatrix Det GridSample ImageDecoder "
        "NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss"
    )
    assert without <= set(expected.split()), without


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("file", "millions"),
    [
        ("cifar10_resnet20.onnx", 40.6),
        ("cifar10_resnet20_opset17.onnx", 40.6),
        ("cifar10_resnet56.onnx", 125.5),
        ("ic_resnet8_cifar10.onnx", 12.5),
        ("kws_dscnn.onnx", 2.7),
    ],
)
def test_real_networks(shared, file, millions):
    from eexform.frontends.onnx import load

    graph = load(shared / "models" / file)
    counts = [node_macs(node, graph.types) for node in graph.nodes]
    assert all(has_rule(node) for node in graph.nodes)
    assert sum(counts) / 1e6 == pytest.approx(millions, abs=0.06)
