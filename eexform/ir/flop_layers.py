"""Formulas for the floating-point operations of layers: multiply-accumulates, and what they do besides.

The conventions stand in :mod:`eexform.ir.flops`.
"""

from __future__ import annotations

import math

from eexform.ir.arithmetic import RULES, NodeSizes, Rule, attention_sizes, einsum_sizes
from eexform.ir.flop_rules import PER_ELEMENT, QUANTIZE, FlopRule, bilinear, elements, softmax

ACTIVATIONS = {
    **{op.lower(): operations for op, operations in PER_ELEMENT.items()},
    "affine": 2,  # a x + b
    "scaledtanh": 3,  # a tanh(b x)
    "clip": 2,
    "silu": 5,
    "swish": 5,
    "gelu": 5,
    "none": 0,
    "": 0,
}
"""Operations per element of the activations that recurrent and fused layers name, in lower case."""


def _activation(s: NodeSizes) -> int | None:
    """Operations per element of the activation that a fused layer ends in."""
    return ACTIVATIONS.get(str(s.node.attrs.get("activation", "")).lower())


def layer(macs: Rule, *, bias: int | None = None, requantized: bool = False, residual: int | None = None) -> FlopRule:
    """2 per multiply-accumulate; 1 per output element for bias and residual; activation and rounding to integers.

    Args:
        macs: the layer's multiply-accumulates.
        bias: place of the bias among the inputs.
        requantized: the output is an integer again.
        residual: place of a value that is added before the activation.
    """

    def rule(s: NodeSizes) -> int | None:
        activation = _activation(s)
        if activation is None:
            return None
        added = sum(place is not None and s.has(place) for place in (bias, residual))
        return 2 * macs(s) + (added + activation + QUANTIZE * requantized) * elements(s)

    return rule


def gemm(macs: Rule) -> FlopRule:
    """alpha A B + beta C, and the activation of a fused one."""

    def rule(s: NodeSizes) -> int | None:
        activation = _activation(s)
        if activation is None:
            return None
        scaled = s.node.attrs.get("alpha", 1.0) != 1.0
        added = s.has(2) * (1 + (s.node.attrs.get("beta", 1.0) != 1.0))
        return 2 * macs(s) + (scaled + added + activation) * elements(s)

    return rule


def _einsum(s: NodeSizes) -> int:
    operands, product = einsum_sizes(s)
    if operands == 1:  # sums over the indices that are left out
        return product - elements(s)
    # one product per operand and index; a sum for each where an index goes, none where all stay
    return (operands - 1) * product * (1 if product == elements(s) else 2)


def _deform_conv(s: NodeSizes) -> int:
    # every tap of every channel is sampled between pixels (and masked) before the convolution
    channels, kernel = s.input(0)[1], math.prod(s.input(1)[2:])
    places = math.prod(s.output()[2:]) * kernel
    values = places * channels * s.output()[0]
    sampled = bilinear(values, places * s.attribute("offset_group", 1)) + s.has(4) * values
    return 2 * RULES["DeformConv"](s) + s.has(3) * elements(s) + sampled


def _attention(s: NodeSizes) -> int:
    # per score: scale, mask, causal mask, soft cap (divide, tanh, times); a softmax per row
    rows, keys, size, value_size = attention_sizes(s)
    causal = s.attribute("is_causal", 0) != 0
    per_score = 1 + s.has(3) + causal + 3 * (s.node.attrs.get("softcap", 0.0) != 0.0)
    return 2 * rows * keys * (size + value_size) + per_score * rows * keys + softmax(keys, rows)


def _linear_attention(s: NodeSizes) -> int:
    # the products; output times scale; exp of the decay and state times decay; (value - read) times rate
    update = str(s.node.attrs.get("update_rule", "gated_delta"))
    batch, tokens, width = s.input(0)
    heads, values = s.attribute("kv_num_heads", 1), math.prod(s.input(2))
    key_size = width // s.attribute("q_num_heads", 1)
    value_size = s.input(2)[2] // heads
    total = 2 * RULES["LinearAttention"](s) + elements(s)
    if "gated" in update:
        total += math.prod(s.input(4)) + batch * tokens * heads * key_size * value_size
    return total + (2 * values if "delta" in update else 0)


# -- recurrent layers ----------------------------------------------------------------------------------------------

_GATES = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}


def _recurrent(s: NodeSizes) -> int | None:
    """2 per multiply-accumulate, the biases, the activations, and what the states are mixed by; per unit and step:

    LSTM  three gates and a candidate, c = f c + i candidate (3), h = o act(c) (1 and the activation), and a product and
          a sum for each of three peepholes.
    GRU   two gates and a candidate, the reset (1), h = (1 - z) candidate + z h (4); a bias of its own for the
          recurrent part of the candidate where that is made before the reset.
    RNN   one activation.

    The biases of input and recurrent part are one constant, their sum.
    """
    op, directions = s.node.op, s.input(1)[0]
    units, gates = s.input(2)[-1], s.input(1)[1] // s.input(2)[-1]
    named = [str(name).lower() for name in s.node.attrs.get("activations", ())]
    per_direction = len(_GATES[op])
    named = named or [name.lower() for name in _GATES[op]] * directions
    if any(name not in ACTIVATIONS for name in named):
        return None
    work = 0
    for direction in range(directions):
        f, *others = (ACTIVATIONS[name] for name in named[direction * per_direction :][:per_direction])
        bounds = 2 if s.node.attrs.get("clip") else 0
        if op == "LSTM":
            g, h = others
            work += 3 * (f + bounds) + (g + bounds) + (h + bounds) + 4 + (6 if s.has(7) else 0)
        elif op == "GRU":
            before_reset = s.attribute("linear_before_reset", 0) != 0 and s.has(3)
            work += 2 * (f + bounds) + (others[0] + bounds) + 5 + before_reset
        else:
            work += f + bounds
        work += gates * s.has(3)
    steps = math.prod(s.input(0)[:2])
    return 2 * RULES[op](s) + steps * units * work


LAYER_RULES: dict[str, FlopRule] = {
    "Conv": layer(RULES["Conv"], bias=2),
    "ConvInteger": layer(RULES["ConvInteger"]),
    "QLinearConv": layer(RULES["QLinearConv"], bias=8, requantized=True),
    "DeformConv": _deform_conv,
    "ConvTranspose": layer(RULES["ConvTranspose"], bias=2),
    "CausalConvWithState": layer(RULES["CausalConvWithState"], bias=2),
    "Gemm": gemm(RULES["Gemm"]),
    "MatMul": layer(RULES["MatMul"]),
    "MatMulInteger": layer(RULES["MatMulInteger"]),
    "QLinearMatMul": layer(RULES["QLinearMatMul"], requantized=True),
    "Einsum": _einsum,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "Attention": _attention,
    "LinearAttention": _linear_attention,
}
"""Operators of the ONNX domain that multiply and accumulate."""
