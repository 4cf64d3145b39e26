"""Multiply-accumulates of one ONNX node, for one sample.

Conventions: a multiplication followed by an addition counts once; biases, normalisations, activations, pooling and
other element-wise work count zero (they are listed by name, so that "zero" is never "unknown"); the batch counts as 1.
Operators in neither list have no rule and :func:`node_macs` returns ``None`` for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import onnx_graphsurgeon as gs

from eexform.errors import GraphError
from eexform.ir.graph import BATCH
from eexform.ir.inference import split_dim
from eexform.ir.types import Dim, TensorType

Types = Mapping[str, TensorType]
Bindings = Mapping[str, int]

MICROSOFT = "com.microsoft"
"""Domain of onnxruntime's own operators."""

_ZERO = {
    "element-wise": """
        Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Ceil Cos Cosh
        Div Equal Erf Exp Floor Greater GreaterOrEqual IsInf IsNaN Less LessOrEqual Log Max Mean Min Mod Mul Neg Not Or
        Pow Reciprocal Round Sign Sin Sinh Sqrt Sub Sum Tan Where Xor""",
    "activations": """
        Celu Clip Elu Gelu HardSigmoid HardSwish Hardmax LeakyRelu LogSoftmax Mish PRelu Relu Selu Shrink Sigmoid
        Softmax Softplus Softsign SwiGLU Swish Tanh ThresholdedRelu""",
    "normalisation": """
        BatchNormalization GroupNormalization InstanceNormalization LRN LayerNormalization LpNormalization
        MeanVarianceNormalization RMSNormalization""",
    "pooling and reductions": """
        ArgMax ArgMin AveragePool CumProd CumSum GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool MaxRoiPool
        MaxUnpool ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
        ReduceSumSquare RoiAlign TopK""",
    "moving data": """
        CenterCropPad Col2Im Compress Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Identity
        NonMaxSuppression NonZero OneHot Pad Reshape Resize ReverseSequence RotaryEmbedding Scatter ScatterElements
        ScatterND Slice SpaceToDepth Split Squeeze TensorScatter Tile Transpose Trilu Unique Unsqueeze Upsample""",
    "moving tensors in and out of sequences": """
        ConcatFromSequence SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength
        SplitToSequence Optional OptionalGetElement OptionalHasElement""",
    "text": "RegexFullMatch StringConcat StringNormalizer StringSplit",
    "constants, types, shapes, random numbers": """
        AffineGrid Bernoulli BitCast BlackmanWindow Cast CastLike Constant ConstantOfShape Dropout EyeLike HammingWindow
        HannWindow Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Shape Size""",
    "borders of integer arithmetic": "DequantizeLinear DynamicQuantizeLinear QuantizeLinear",
}
_ZERO_MICROSOFT = {
    "activations and normalisation": """
        BiasAdd BiasDropout BiasGelu BiasSoftmax BiasSplitGelu EmbedLayerNormalization FastGelu Gelu GroupNorm
        LayerNormalization QuickGelu SimplifiedLayerNormalization SkipLayerNormalization
        SkipSimplifiedLayerNormalization""",
    "pooling and moving data": "NhwcMaxPool RotaryEmbedding Trilu",
    "integer arithmetic": """
        DequantizeLinear QLinearAdd QLinearAveragePool QLinearConcat QLinearGlobalAveragePool QLinearLeakyRelu
        QLinearMul QLinearReduceMean QLinearSigmoid QLinearSoftmax QLinearWhere QuantizeLinear""",
}

ZERO_MACS: frozenset[str] = frozenset(" ".join(_ZERO.values()).split())
"""Operators of the ONNX domain that cost no multiply-accumulate."""

ZERO_MACS_MICROSOFT: frozenset[str] = frozenset(" ".join(_ZERO_MICROSOFT.values()).split())
"""Operators of onnxruntime's ``com.microsoft`` domain that cost no multiply-accumulate."""


def size_of(dim: Dim, where: str, bindings: Bindings | None = None) -> int:
    """A dimension as a number: the batch counts as 1, other symbols are looked up in ``bindings``.

    Args:
        dim: number, symbol (``"seq"``) or product (``"64*N"``).
        where: value the dimension belongs to, for the message.
        bindings: sizes of symbols other than the batch.

    Raises:
        GraphError: the dimension is unknown, or its symbol has no binding.
    """
    if isinstance(dim, int):
        return dim
    known = {**(bindings or {}), BATCH: 1}
    if isinstance(dim, str):
        if dim in known:
            return int(known[dim])
        factor, symbol = split_dim(dim)
        if symbol in known:
            return factor * int(known[symbol])
        raise GraphError(
            f"value {where!r}: dimension {dim!r} has no number, so work cannot be counted; "
            f"bind it, e.g. {symbol}=128: bindings={{{symbol!r}: 128}}, or load the model with that input shape"
        )
    raise GraphError(
        f"value {where!r}: a dimension is not known, so work cannot be counted; load the model with fixed input shapes"
    )


def sizes(tensor: gs.Tensor, types: Types, bindings: Bindings | None = None) -> tuple[int, ...]:
    """Shape of a value as numbers, for a batch of 1.

    Raises:
        GraphError: the shape is not known or holds an unbound symbol.
    """
    if isinstance(tensor, gs.Constant):
        return tuple(int(dim) for dim in tensor.shape)
    found = types.get(tensor.name)
    shape = found.shape if found is not None else None
    if shape is None:
        raise GraphError(f"value {tensor.name!r}: its shape is not known, so work cannot be counted")
    return tuple(size_of(dim, tensor.name, bindings) for dim in shape)


class NodeSizes:
    """Shapes of one node's inputs and outputs as numbers, for a batch of 1."""

    def __init__(self, node: gs.Node, types: Types, bindings: Bindings | None) -> None:
        self.node, self.types, self.bindings = node, types, bindings

    def has(self, place: int) -> bool:
        return place < len(self.node.inputs) and not self.node.inputs[place].is_empty()

    def input(self, place: int) -> tuple[int, ...]:
        if not self.has(place):
            raise GraphError(f"node {self.node.name!r} ({self.node.op}): input {place} is missing")
        return sizes(self.node.inputs[place], self.types, self.bindings)

    def output(self, place: int = 0) -> tuple[int, ...]:
        return sizes(self.node.outputs[place], self.types, self.bindings)

    def attribute(self, name: str, default: int) -> int:
        value = self.node.attrs.get(name)
        return default if value is None else int(value)


Rule = Callable[[NodeSizes], int]


def _conv(weight: int) -> Rule:
    # output elements x (input channels per group x kernel); weight is [C_out, C_in / group, k...]
    return lambda s: math.prod(s.output()) * math.prod(s.input(weight)[1:])


def _conv_transpose(s: NodeSizes) -> int:
    # every input element meets [C_out / group, k...] weights; weight is [C_in, C_out / group, k...]
    return math.prod(s.input(0)) * math.prod(s.input(1)[1:])


def _matmul(s: NodeSizes) -> int:
    # output elements x contracted size: the last axis of the left operand
    left = s.input(0)
    contracted = left[-2] if s.attribute("transA", 0) and len(left) > 1 else left[-1]
    return math.prod(s.output()) * contracted


def _recurrent(s: NodeSizes) -> int:
    # X [T, B, I] (or [B, T, I]), W [D, gates*H, I], R [D, gates*H, H]: both meet every step of every sequence
    return math.prod(s.input(0)[:2]) * (math.prod(s.input(1)) + math.prod(s.input(2)))


def einsum_sizes(s: NodeSizes) -> tuple[int, int]:
    """Operands of an ``Einsum``, and the product of the sizes of all different indices."""
    operands = [place for place in range(len(s.node.inputs)) if s.has(place)]
    equation = str(s.node.attrs.get("equation", "")).replace(" ", "")
    terms = equation.split("->")[0].split(",")
    if len(terms) != len(operands):
        raise GraphError(f"node {s.node.name!r} (Einsum): equation {equation!r} does not fit {len(operands)} inputs")
    index: dict[str, int] = {}
    broadcast: list[int] = []
    for place, term in zip(operands, terms, strict=True):
        shape = s.input(place)
        before, dots, after = term.partition("...")
        named = list(zip(before, shape, strict=False))
        if after:
            named += list(zip(after, shape[len(shape) - len(after) :], strict=True))
        for letter, size in named:
            index[letter] = max(size, index.get(letter, 1))
        if dots:
            middle = list(shape[len(before) : len(shape) - len(after)])
            width = max(len(middle), len(broadcast))
            pads = [[1] * (width - len(part)) + part for part in (middle, broadcast)]
            broadcast = [max(pair) for pair in zip(*pads, strict=True)]
    return len(operands), math.prod(index.values()) * math.prod(broadcast)


def _einsum(s: NodeSizes) -> int:
    # operands are contracted one after the other
    operands, product = einsum_sizes(s)
    return (operands - 1) * product


def attention_sizes(s: NodeSizes) -> tuple[int, int, int, int]:
    """Rows of the scores (batch x heads x tokens), keys, size of a key and of a value, of an ``Attention``."""
    query, key, value = s.input(0), s.input(1), s.input(2)
    if len(query) == 4:  # [B, heads, tokens, size]
        batch, heads, tokens, size = query
        value_size, key_tokens = value[3], key[2]
    else:  # [B, tokens, heads * size]
        heads, key_heads = s.attribute("q_num_heads", 1), s.attribute("kv_num_heads", 1)
        batch, tokens, size = query[0], query[1], query[2] // heads
        value_size, key_tokens = value[2] // key_heads, key[1]
    if s.has(4):  # past keys, [B, key heads, past tokens, size]
        key_tokens += s.input(4)[2]
    return batch * heads * tokens, key_tokens, size, value_size


def _attention(s: NodeSizes) -> int:
    # scores: queries x keys x head size; then the same with the value size; grouped heads repeat keys and values
    rows, keys, size, value_size = attention_sizes(s)
    return rows * keys * (size + value_size)


def _linear_attention(s: NodeSizes) -> int:
    # each token: k v^T into the state of every key head, q^T S out of it for every query head; the delta rules read
    # S^T k besides
    heads, key_heads = s.attribute("q_num_heads", 1), s.attribute("kv_num_heads", 1)
    batch, tokens, width = s.input(0)
    products = heads + key_heads * (2 if "delta" in str(s.node.attrs.get("update_rule", "gated_delta")) else 1)
    return batch * tokens * products * (width // heads) * (s.input(2)[2] // key_heads)


RULES: dict[str, Rule] = {
    "Conv": _conv(1),
    "ConvInteger": _conv(1),
    "QLinearConv": _conv(3),
    "CausalConvWithState": _conv(1),
    "DeformConv": _conv(1),
    "ConvTranspose": _conv_transpose,
    "Gemm": _matmul,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": _matmul,
    "Einsum": _einsum,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "Attention": _attention,
    "LinearAttention": _linear_attention,
}
"""Operators of the ONNX domain that multiply and accumulate."""

RULES_MICROSOFT: dict[str, Rule] = {
    "FusedConv": _conv(1),
    "NhwcFusedConv": _conv(1),
    "QLinearConv": _conv(3),
    "FusedGemm": _matmul,
    "FusedMatMul": _matmul,
    "TransposeMatMul": _matmul,
    "QGemm": _matmul,
    "DynamicQuantizeMatMul": _matmul,
    "MatMulIntegerToFloat": _matmul,
}
"""Operators of onnxruntime's ``com.microsoft`` domain that multiply and accumulate."""


def has_rule(node: gs.Node) -> bool:
    """Whether :func:`node_macs` knows the node's operator."""
    if node.domain in (None, "", "ai.onnx"):
        return node.op in RULES or node.op in ZERO_MACS
    return node.domain == MICROSOFT and (node.op in RULES_MICROSOFT or node.op in ZERO_MACS_MICROSOFT)


def node_macs(node: gs.Node, types: Types, bindings: Bindings | None = None) -> int | None:
    """Multiply-accumulates of one node for one sample; ``None`` where there is no rule for its operator.

    Args:
        node: the node.
        types: type of every value it reads and writes (``Graph.types``).
        bindings: sizes of symbolic dimensions other than the batch.

    Raises:
        GraphError: a shape that the count needs is unknown, or holds a symbol without a binding.
    """
    standard = node.domain in (None, "", "ai.onnx")
    if not standard and node.domain != MICROSOFT:
        return None
    rules, zero = (RULES, ZERO_MACS) if standard else (RULES_MICROSOFT, ZERO_MACS_MICROSOFT)
    if node.op in zero:
        return 0
    if node.op not in rules:
        return None
    return rules[node.op](NodeSizes(node, types, bindings))
