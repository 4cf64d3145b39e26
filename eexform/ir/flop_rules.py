"""Formulas for the floating-point operations of what lies between the layers: element-wise work, norms, pooling.

The conventions stand in :mod:`eexform.ir.flops`. In the derivations below n is the number of elements that one result
is made of (a row of a softmax, a window of a pooling, a group of a normalisation).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_graphsurgeon as gs

from eexform.ir.arithmetic import NodeSizes

FlopRule = Callable[[NodeSizes], int | None]
"""Operations of one node; ``None`` where the number depends on data or on a mode that has no formula."""

_ONE = """
    Abs Acos Acosh Add Asin Asinh Atan Atanh Ceil Cos Cosh Div Equal Erf Exp Floor Greater GreaterOrEqual IsInf IsNaN
    Less LessOrEqual Log Mod Mul Neg Pow Reciprocal Relu Round Sign Sin Sinh Sqrt Sub Tan Tanh ThresholdedRelu"""

PER_ELEMENT: dict[str, int] = {
    **dict.fromkeys(_ONE.split(), 1),  # one step of arithmetic, one comparison or one elementary function
    "LeakyRelu": 2,  # compare, times slope
    "PRelu": 2,
    "Shrink": 3,  # two comparisons, plus or minus the bias
    "Softplus": 3,  # log(exp(x) + 1)
    "Softsign": 3,  # x / (1 + |x|)
    "Sigmoid": 4,  # 1 / (1 + exp(-x))
    "HardSigmoid": 4,  # max(0, min(1, a x + b))
    "HardSwish": 5,  # x times that
    "Elu": 4,  # compare, a (exp(x) - 1)
    "Selu": 5,  # compare, g (a exp(x) - a)
    "Celu": 6,  # a elu(x / a)
    "Mish": 5,  # x tanh(log(1 + exp(x)))
    "HammingWindow": 5,  # a - b cos(c i / n)
    "HannWindow": 5,
    "BlackmanWindow": 9,  # one more term: times, cos, times, plus
    "Range": 2,  # start + i delta
    "Bernoulli": 1,  # compare with the number drawn
    "CumSum": 1,
    "CumProd": 1,
}
"""Operations per element of the output, the same for every setting of the operator."""

_ZERO = {
    "bits and choices": "And BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Not Or Where Xor",
    "moving data": """
        CenterCropPad Compress Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Identity MaxUnpool
        OneHot Pad Reshape ReverseSequence Slice SpaceToDepth Split Squeeze TensorScatter Tile Transpose Trilu
        Unsqueeze""",
    "sequences": """
        ConcatFromSequence SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength
        SplitToSequence Optional OptionalGetElement OptionalHasElement""",
    "text": "RegexFullMatch StringConcat StringNormalizer StringSplit",
    "constants, types, shapes": "BitCast Cast CastLike Constant ConstantOfShape EyeLike Shape Size",
    "drawing random numbers": """
        Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike""",
}

ZERO_FLOPS: frozenset[str] = frozenset(" ".join(_ZERO.values()).split())
"""Operators without arithmetic on numbers."""


# -- element-wise --------------------------------------------------------------------------------------------------


def elements(s: NodeSizes) -> int:
    """Elements of the (first) output."""
    return math.prod(s.output())


def per_element(operations: int) -> FlopRule:
    """So many operations per element of the output."""
    return lambda s: operations * elements(s)


def _variadic(extra: int) -> FlopRule:
    # Max, Min, Sum: operands - 1 steps; Mean divides besides
    return lambda s: (sum(s.has(place) for place in range(len(s.node.inputs))) - 1 + extra) * elements(s)


def _clip(s: NodeSizes) -> int:
    # one comparison per bound; operator sets before 11 have them as attributes
    return (sum(s.has(place) for place in (1, 2)) + sum(key in s.node.attrs for key in ("min", "max"))) * elements(s)


def _gelu(s: NodeSizes) -> int:
    # 0.5 x (1 + erf(x / sqrt 2)) or 0.5 x (1 + tanh(c (x + d x^3)))
    return (8 if s.node.attrs.get("approximate", "none") == "tanh" else 5) * elements(s)


def _swish(extra: int) -> FlopRule:
    # x sigmoid(a x), and times another operand for SwiGLU
    return lambda s: (5 + extra + (s.node.attrs.get("alpha", 1.0) != 1.0)) * elements(s)


def _dropout(s: NodeSizes) -> int:
    # outside training it does nothing; in training it multiplies by mask and scale
    training = s.has(2) and not (isinstance(s.node.inputs[2], gs.Constant) and not s.node.inputs[2].values.any())
    return 2 * elements(s) if training else 0


def _rotary(s: NodeSizes) -> int:
    # each rotated element is x cos - y sin: two products and a sum
    shape = s.input(0)
    size = shape[-1] if len(shape) == 4 else shape[-1] // s.attribute("num_heads", 1)
    return 3 * (math.prod(shape) // size) * (s.attribute("rotary_embedding_dim", 0) or size)


# -- softmax and normalisations ------------------------------------------------------------------------------------


def softmax(n: int, rows: int, *, log: bool = False) -> int:
    """max (n-1), minus (n), exp (n), sum (n-1), divide (n); the logarithm subtracts one log from x - max instead."""
    return rows * (5 * n - 1 if log else 5 * n - 2)


def _softmax(s: NodeSizes) -> int:
    shape = s.output()
    n = shape[s.attribute("axis", -1)]
    return softmax(n, math.prod(shape) // n, log=s.node.op == "LogSoftmax") if n else 0


def _hardmax(s: NodeSizes) -> int:
    shape = s.output()
    n = shape[s.attribute("axis", -1)]
    return (n - 1) * (math.prod(shape) // n) if n else 0


def layer_norm(n: int, rows: int, *, bias: bool) -> int:
    """Mean (n), deviations (n), their squares (n), mean of these (n), + epsilon and root (2), divide (n), scale (n)."""
    return rows * (6 * n + 2 + n * bias)


def rms_norm(n: int, rows: int) -> int:
    """Squares (n), their mean (n), + epsilon and root (2), divide (n), scale (n)."""
    return rows * (4 * n + 2)


def group_norm(elements: int, groups: int) -> int:
    """A layer norm with bias over each group, with a scale and a bias per channel."""
    return 7 * elements + 2 * groups


def _tail(s: NodeSizes) -> tuple[int, int]:
    """Elements from ``axis`` on, and how many such rows there are."""
    shape = s.input(0)
    n = math.prod(shape[s.attribute("axis", -1) :])
    return n, math.prod(shape) // max(1, n)


def _layer_norm(s: NodeSizes) -> int:
    return layer_norm(*_tail(s), bias=s.has(2))


def _instance_norm(s: NodeSizes) -> int:
    return group_norm(math.prod(s.input(0)), math.prod(s.input(0)[:2]))  # every channel of every sample is a group


def _group_norm(s: NodeSizes) -> int:
    return group_norm(math.prod(s.input(0)), s.input(0)[0] * s.attribute("num_groups", 1))


def _batch_norm(s: NodeSizes) -> int:
    # At inference a x + b: 2 per element. a = scale / sqrt(var + epsilon) and b = bias - mean a are 5 per channel,
    # once for all samples where they are constants. In training: statistics as in a layer norm (4 per element) and
    # their running averages (2 x 3 per channel) besides.
    shape = s.input(0)
    elements, channels = math.prod(shape), shape[1] if len(shape) > 1 else 1
    if s.attribute("training_mode", 0):
        return 6 * elements + (5 + 6) * channels
    known = all(isinstance(tensor, gs.Constant) for tensor in s.node.inputs[1:5])
    return 2 * elements + (0 if known else 5 * channels)


def _local_response(s: NodeSizes) -> int:
    # square, sum over `size` channels, times alpha / size, plus bias, power, divide
    return (s.attribute("size", 1) + 4) * elements(s)


def _lp_norm(s: NodeSizes) -> int:
    shape = s.output()
    n = shape[s.attribute("axis", -1)]
    # |x| or x^2 (n), sum (n-1), root for p = 2, divide (n)
    return (3 * n - (s.attribute("p", 2) == 1)) * (math.prod(shape) // max(1, n))


def _mean_variance(s: NodeSizes) -> int:
    # as a layer norm without scale
    shape = s.output()
    n = math.prod(shape[axis] for axis in s.node.attrs.get("axes", [0, 2, 3]))
    return (5 * n + 2) * (math.prod(shape) // max(1, n))


# -- pooling, reductions, resampling -------------------------------------------------------------------------------


def _window(s: NodeSizes) -> int:
    return math.prod(s.node.attrs["kernel_shape"])


def _max_pool(s: NodeSizes) -> int:
    return (_window(s) - 1) * elements(s)


def _average_pool(s: NodeSizes) -> int:
    # n - 1 sums and a division; windows at the border count as full ones
    return _window(s) * elements(s)


def _lp_pool(s: NodeSizes) -> int:
    # power (n), sum (n-1), root; no root for p = 1
    return (2 * _window(s) - (s.attribute("p", 2) == 1)) * elements(s)


def _reduced(per_input: int, per_output: int) -> FlopRule:
    """Operations per element that is read and per result: n inputs are joined in n - 1 steps, so -1 for a sum."""
    return lambda s: per_input * math.prod(s.input(0)) + per_output * elements(s)


def _global_lp_pool(s: NodeSizes) -> int:
    return 2 * math.prod(s.input(0)) - (s.attribute("p", 2) == 1) * elements(s)


def _top_k(s: NodeSizes) -> int:
    # comparisons of a heap that keeps the best k of n
    axis = s.attribute("axis", -1)
    k = s.output()[axis]
    return math.prod(s.input(0)) * (k - 1).bit_length() if k > 1 else math.prod(s.input(0)) - elements(s)


def _unique(s: NodeSizes) -> int:
    # comparisons of a merge sort
    n = math.prod(s.input(0))
    return n * (n - 1).bit_length() if n > 1 else 0


def _col_to_im(s: NodeSizes) -> int:
    # every element of a block is added to its place
    return math.prod(s.input(0))


def _scatter(updates: int) -> FlopRule:
    # one step per update, none where updates replace what was there
    def rule(s: NodeSizes) -> int:
        return 0 if s.node.attrs.get("reduction", "none") == "none" else math.prod(s.input(updates))

    return rule


def _resize(s: NodeSizes) -> int | None:
    # An output element is made of 2 (linear) or 4 (cubic) pixels per axis that changes size: so many products, and one
    # sum fewer. Their weights depend on the position alone, so they are computed once and count 0.
    mode = s.node.attrs.get("mode", "nearest")
    if mode == "nearest":
        return 0
    if s.attribute("antialias", 0) or mode not in ("linear", "bilinear", "cubic"):
        return None
    axes = sum(before != after for before, after in zip(s.input(0), s.output(), strict=True))
    return (2 * (4 if mode == "cubic" else 2) ** axes - 1) * elements(s) if axes else 0


def bilinear(values: int, places: int) -> int:
    """Sampling between pixels: per value 4 products and 3 sums; per place the fractions of two coordinates (offset,
    floor, fraction, complement: 4 each) and 4 products of them."""
    return 7 * values + 12 * places


def _roi_align(s: NodeSizes) -> int | None:
    side = s.attribute("sampling_ratio", 0)
    if side == 0:  # as many samples as the region has pixels
        return None
    regions, _, high, wide = s.output()
    samples = side * side
    joined = samples - (s.node.attrs.get("mode", "avg") == "max")  # a mean divides, a maximum does not
    return bilinear(samples * elements(s), regions * high * wide * samples) + joined * elements(s)


def _affine_grid(s: NodeSizes) -> int:
    # [H, W, d + 1] times theta^T [d + 1, d]: d + 1 products and d sums per coordinate
    return (2 * s.output()[-1] + 1) * elements(s)


# -- borders of integer arithmetic ---------------------------------------------------------------------------------

QUANTIZE, DEQUANTIZE = 5, 2
"""x / scale, round, + zero point, two bounds; (x - zero point) scale."""


def _quantize(s: NodeSizes) -> int:
    return (QUANTIZE - (not s.has(2))) * elements(s)


def _dequantize(s: NodeSizes) -> int:
    return (DEQUANTIZE - (not s.has(2))) * elements(s)


def dynamic_quantize(n: int) -> int:
    """Max and min, zero among them (2n); scale: minus, divide; zero point: minus, divide, round, two bounds (7)."""
    return (2 + QUANTIZE) * n + 7


FLOP_RULES: dict[str, FlopRule] = {
    **{op: per_element(operations) for op, operations in PER_ELEMENT.items()},
    **dict.fromkeys(("Max", "Min", "Sum"), _variadic(0)),
    "Mean": _variadic(1),
    "Clip": _clip,
    "Gelu": _gelu,
    "Swish": _swish(0),
    "SwiGLU": _swish(1),
    "Dropout": _dropout,
    "RotaryEmbedding": _rotary,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Hardmax": _hardmax,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": lambda s: rms_norm(*_tail(s)),
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "BatchNormalization": _batch_norm,
    "LRN": _local_response,
    "LpNormalization": _lp_norm,
    "MeanVarianceNormalization": _mean_variance,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "LpPool": _lp_pool,
    "GlobalMaxPool": _reduced(1, -1),
    "GlobalAveragePool": _reduced(1, 0),
    "GlobalLpPool": _global_lp_pool,
    **dict.fromkeys(("ArgMax", "ArgMin", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum"), _reduced(1, -1)),
    "ReduceMean": _reduced(1, 0),
    "ReduceL1": _reduced(2, -1),
    "ReduceSumSquare": _reduced(2, -1),
    "ReduceL2": _reduced(2, 0),
    "ReduceLogSum": _reduced(1, 0),
    "ReduceLogSumExp": _reduced(4, 0),  # max (n-1), minus (n), exp (n), sum (n-1), log, + max
    "TopK": _top_k,
    "Unique": _unique,
    "NonZero": lambda s: math.prod(s.input(0)),  # compares each with zero
    "Col2Im": _col_to_im,
    "Scatter": _scatter(2),
    "ScatterElements": _scatter(2),
    "ScatterND": _scatter(2),
    "Resize": _resize,
    "Upsample": _resize,
    "RoiAlign": _roi_align,
    "AffineGrid": _affine_grid,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": lambda s: dynamic_quantize(elements(s)),
}
"""Operators of the ONNX domain that compute without multiply-accumulates."""
