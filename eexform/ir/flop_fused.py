"""Formulas for the floating-point operations of onnxruntime's ``com.microsoft`` operators.

Each counts what the operators that it stands for count; one on quantised numbers leaves the integers, computes and
comes back to them, as the operator is defined. The conventions stand in :mod:`eexform.ir.flops`.
"""

from __future__ import annotations

import math

from eexform.ir.arithmetic import RULES, RULES_MICROSOFT, NodeSizes
from eexform.ir.flop_layers import ACTIVATIONS, gemm, layer
from eexform.ir.flop_rules import (
    DEQUANTIZE,
    FLOP_RULES,
    PER_ELEMENT,
    QUANTIZE,
    FlopRule,
    dynamic_quantize,
    elements,
    group_norm,
    layer_norm,
    per_element,
    rms_norm,
    softmax,
)

_GELU = 5
_FAST_GELU = 8  # the tanh form
_QUICK_GELU = 6  # x sigmoid(a x)
_BOTH = 2 * DEQUANTIZE + QUANTIZE  # two operands in, one result out
_THROUGH = DEQUANTIZE + QUANTIZE


def _matmul(s: NodeSizes) -> int:
    return 2 * RULES_MICROSOFT[s.node.op](s) + (s.node.attrs.get("alpha", 1.0) != 1.0) * elements(s)


def _scaled_matmul(s: NodeSizes, bias: int) -> int:
    # an integer product, times the product of two scales, plus a bias
    return 2 * RULES["MatMul"](s) + (2 + s.has(bias)) * elements(s)


def _dynamic_matmul(s: NodeSizes) -> int:
    read = math.prod(s.input(0))
    return dynamic_quantize(read) + _scaled_matmul(s, bias=4)


def _quantized_gemm(s: NodeSizes) -> int:
    # a bias, then either rounded to integers again or scaled to real numbers
    return 2 * RULES_MICROSOFT["QGemm"](s) + (s.has(6) + (QUANTIZE if s.has(7) else 1)) * elements(s)


def _skip_norm(*, simplified: bool, bias: int) -> FlopRule:
    # input + skip (+ bias), then the normalisation
    def rule(s: NodeSizes) -> int:
        n = s.input(0)[-1]
        rows = math.prod(s.input(0)) // max(1, n)
        norm = rms_norm(n, rows) if simplified else layer_norm(n, rows, bias=s.has(3))
        return (1 + s.has(bias)) * n * rows + norm

    return rule


def _embed_norm(s: NodeSizes) -> int:
    # word + position (+ segment) embedding, then a layer norm with bias
    shape = s.output()
    return (1 + s.has(4)) * math.prod(shape) + layer_norm(shape[-1], math.prod(shape[:-1]), bias=True)


def _group_norm(s: NodeSizes) -> int:
    norm = group_norm(math.prod(s.input(0)), s.input(0)[0] * s.attribute("groups", 1))
    return norm + (s.attribute("activation", 0) != 0) * ACTIVATIONS["swish"] * elements(s)


def _bias_softmax(s: NodeSizes) -> int:
    shape = s.output()
    n = math.prod(shape[s.attribute("axis", 1) :])
    return math.prod(shape) + softmax(n, math.prod(shape) // max(1, n))


def _bias_split_gelu(s: NodeSizes) -> int:
    # bias on all, then one half times the gelu of the other
    return math.prod(s.input(0)) + (_GELU + 1) * elements(s)


def _quantized_reduction(s: NodeSizes) -> int:
    # numbers in, mean, numbers out
    return (DEQUANTIZE + 1) * math.prod(s.input(0)) + QUANTIZE * elements(s)


def _quantized_pool(s: NodeSizes) -> int:
    return (math.prod(s.node.attrs["kernel_shape"]) + _THROUGH) * elements(s)


def _quantized_softmax(s: NodeSizes) -> int:
    shape = s.output()
    n = shape[s.attribute("axis", -1)]
    return _THROUGH * math.prod(shape) + softmax(n, math.prod(shape) // max(1, n))


MICROSOFT_RULES: dict[str, FlopRule] = {
    "FusedConv": layer(RULES_MICROSOFT["FusedConv"], bias=2, residual=3),
    "NhwcFusedConv": layer(RULES_MICROSOFT["NhwcFusedConv"], bias=2, residual=3),
    "QLinearConv": layer(RULES_MICROSOFT["QLinearConv"], bias=8, requantized=True),
    "FusedGemm": gemm(RULES_MICROSOFT["FusedGemm"]),
    "FusedMatMul": _matmul,
    "TransposeMatMul": _matmul,
    "QGemm": _quantized_gemm,
    "DynamicQuantizeMatMul": _dynamic_matmul,
    "MatMulIntegerToFloat": lambda s: _scaled_matmul(s, bias=6),
    "BiasAdd": per_element(2),  # bias and residual
    "BiasDropout": lambda s: (1 + s.has(2)) * elements(s),
    "BiasGelu": per_element(_GELU + 1),
    "BiasSoftmax": _bias_softmax,
    "BiasSplitGelu": _bias_split_gelu,
    "EmbedLayerNormalization": _embed_norm,
    "FastGelu": lambda s: (_FAST_GELU + s.has(1)) * elements(s),
    "Gelu": per_element(_GELU),
    "QuickGelu": per_element(_QUICK_GELU),
    "GroupNorm": _group_norm,
    "LayerNormalization": FLOP_RULES["LayerNormalization"],
    "SimplifiedLayerNormalization": FLOP_RULES["RMSNormalization"],
    "SkipLayerNormalization": _skip_norm(simplified=False, bias=4),
    "SkipSimplifiedLayerNormalization": _skip_norm(simplified=True, bias=3),
    "NhwcMaxPool": FLOP_RULES["MaxPool"],
    "RotaryEmbedding": lambda s: 3 * math.prod(s.input(0)) if not s.attribute("rotary_embedding_dim", 0) else None,
    "QuantizeLinear": FLOP_RULES["QuantizeLinear"],
    "DequantizeLinear": FLOP_RULES["DequantizeLinear"],
    "QLinearAdd": per_element(_BOTH + 1),
    "QLinearMul": per_element(_BOTH + 1),
    "QLinearLeakyRelu": per_element(_THROUGH + PER_ELEMENT["LeakyRelu"]),
    "QLinearSigmoid": per_element(_THROUGH + PER_ELEMENT["Sigmoid"]),
    "QLinearConcat": per_element(_THROUGH),
    "QLinearWhere": per_element(_THROUGH),
    "QLinearAveragePool": _quantized_pool,
    "QLinearGlobalAveragePool": _quantized_reduction,
    "QLinearReduceMean": _quantized_reduction,
    "QLinearSoftmax": _quantized_softmax,
}
"""Operators of onnxruntime's ``com.microsoft`` domain."""

ZERO_FLOPS_MICROSOFT: frozenset[str] = frozenset({"Trilu"})
"""Those that only move data."""
