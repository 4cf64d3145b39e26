"""What part an operator plays between two layers: does work, follows a layer, or only moves data."""

from __future__ import annotations

from enum import Enum

import onnx_graphsurgeon as gs

from eexform.ir.arithmetic import RULES, RULES_MICROSOFT, has_rule


class Role(Enum):
    """Part of a node in a network.

    Everything but ``LAYER`` and ``PRODUCT`` is cheap: no multiply-accumulates.
    """

    LAYER = "layer"
    """Multiplies activations with parameters: Conv, Gemm, MatMul with a constant, LSTM; also unknown operators."""
    PRODUCT = "product"
    """Multiplies activations with activations: the two MatMuls of attention."""
    FOLLOWER = "follower"
    """Element-wise or normalising: activation, bias, batch normalisation, residual addition, softmax."""
    POOL = "pool"
    """Pooling over a window."""
    SQUEEZE = "squeeze"
    """Reduction over whole axes: global pooling, ReduceMean, ArgMax."""
    REARRANGE = "rearrange"
    """Moves or selects data: Reshape, Transpose, Slice, Concat, Identity, quantisation, resizing."""


_POOLS = {"AveragePool", "MaxPool", "LpPool", "NhwcMaxPool", "QLinearAveragePool"}
_SQUEEZES = {"GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "ArgMax", "ArgMin", "QLinearGlobalAveragePool"}
_SHAPING = {"Expand", "Flatten", "Identity", "Pad", "Reshape", "Resize", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
_CHOOSING = {"CenterCropPad", "Compress", "Gather", "GatherElements", "GatherND", "Slice", "Split", "TopK", "Unique"}
_MOVING = {"Concat", "DepthToSpace", "ReverseSequence", "ScatterElements", "ScatterND", "SpaceToDepth", "Upsample"}
_PACKING = {
    *("ConcatFromSequence", "Optional", "OptionalGetElement", "SequenceAt", "SequenceConstruct", "SequenceErase"),
    *("SequenceInsert", "SplitToSequence"),
}
_SAME_NUMBERS = {"Cast", "CastLike", "DequantizeLinear", "Dropout", "DynamicQuantizeLinear", "QuantizeLinear"}
_REARRANGES = _SHAPING | _CHOOSING | _MOVING | _PACKING | _SAME_NUMBERS


def role(node: gs.Node, *, weighted: bool) -> Role:
    """The role of ``node``.

    Args:
        node: the node.
        weighted: one of its operands is a constant or computed from constants.
    """
    standard = node.domain in (None, "", "ai.onnx")
    if not has_rule(node):
        return Role.LAYER  # unknown operators may do any amount of work
    if node.op in (RULES if standard else RULES_MICROSOFT):
        return Role.LAYER if weighted else Role.PRODUCT
    if node.op in _POOLS:
        return Role.POOL
    if node.op in _SQUEEZES or "Reduce" in node.op:
        return Role.SQUEEZE
    return Role.REARRANGE if node.op in _REARRANGES else Role.FOLLOWER
