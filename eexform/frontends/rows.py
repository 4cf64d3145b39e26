"""Does a node keep samples apart? Asked of every node, because early exits run the rest of the network on fewer rows.

The *lane* of a value is its one axis whose size is ``N`` or ``k*N``. A node keeps samples apart when row ``i`` of its
outputs' lane is computed from row ``i`` of its inputs' lanes only, in the same way for every ``i``. Each family of
operators has a rule here; an operator without one is "not known", which forbids only what needs a proof.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from eexform.ir.inference import BATCH, Inference, split_dim
from eexform.ir.types import Dim, TensorType

Shape = tuple[Dim, ...]


@dataclass(frozen=True)
class Verdict:
    """``mixes``: samples meet in the node. Otherwise nothing is known about it. ``why`` ends a sentence on the node."""

    mixes: bool
    why: str


def lane(known: TensorType) -> int | None:
    """The axis that carries samples, ``None`` where there is none; ``-1`` where there are several."""
    axes = [i for i, dim in enumerate(known.shape or ()) if isinstance(dim, str) and split_dim(dim)[1] == BATCH]
    if not axes:
        return None
    return axes[0] if len(axes) == 1 else -1


def judge(node: gs.Node, walk: Inference) -> Verdict | None:
    """``None`` where ``node``, whose outputs were just inferred, keeps samples apart."""
    view = _View(node, walk)
    lanes = [axis for axis in view.lanes if axis is not None]
    if not lanes or node.op in ("Shape", "Size"):
        return None
    if -1 in lanes:
        return Verdict(True, "works on a value with the batch on several axes")
    if node.domain not in (None, "", "ai.onnx"):
        return Verdict(False, f"is a custom operator ({node.domain}.{node.op})")
    rule = _RULES.get(node.op)
    if rule is None:
        return Verdict(False, f"is an operator for which eexform has no rule ({node.op})")
    verdict = rule(view)
    if verdict is not None:
        return verdict
    for known in view.outputs:
        if known.shape is None or None in known.shape:
            return Verdict(False, "has an output whose shape cannot be told")
        if lane(known) == -1:
            return Verdict(True, "relates every sample of the batch to every other")
    return None


class _View:
    """A node's types and small constants, as the rules need them."""

    def __init__(self, node: gs.Node, walk: Inference) -> None:
        self.node = node
        self.attrs = node.attrs
        self.inputs = [walk.type(t.name) if t.name else TensorType(None, ()) for t in node.inputs]
        self.outputs = [walk.type(t.name) for t in node.outputs if t.name]
        self.lanes = [lane(known) for known in self.inputs]
        self._walk = walk

    def shape(self, index: int) -> Shape:
        return self.inputs[index].shape or ()

    def content(self, index: int) -> np.ndarray | None:
        """A small input's elements, where they do not depend on the batch."""
        if index >= len(self.node.inputs) or not self.node.inputs[index].name:
            return None
        first, second, *_ = self._walk.known(self.node.inputs[index].name)
        if first.content is None or second.content is None or not np.array_equal(first.content, second.content):
            return None
        return first.content

    def given(self, index: int) -> bool:
        return index < len(self.node.inputs) and bool(self.node.inputs[index].name)

    def axis(self, default: int, rank: int | None = None) -> int:
        axis = int(self.attrs.get("axis", default))
        return axis % (len(self.shape(0)) if rank is None else rank) if (rank or self.shape(0)) else axis


Rule = Callable[[_View], Verdict | None]


def _mixes(why: str) -> Verdict:
    return Verdict(True, why)


def _unsure(why: str) -> Verdict:
    return Verdict(False, why)


def _elementwise(view: _View) -> Verdict | None:
    rank = max(len(known.shape or ()) for known in view.inputs)
    places = {axis + rank - len(view.shape(i)) for i, axis in enumerate(view.lanes) if axis is not None}
    return None if len(places) == 1 else _mixes("combines values that carry the batch on different axes")


def _first_only(view: _View) -> Verdict | None:
    """Convolution, pooling: samples on axis 0 of the first input, plain numbers in all others."""
    if view.lanes[0] != 0:
        return _mixes("does not find the batch on its first axis")
    return None if all(axis is None for axis in view.lanes[1:]) else _unsure("has weights that depend on the sample")


def _batch_norm(view: _View) -> Verdict | None:
    if view.attrs.get("training_mode", 0):
        return _mixes("normalises over the batch (training mode); export the model in evaluation mode")
    return _first_only(view)


def _along(default: int) -> Rule:
    def rule(view: _View) -> Verdict | None:
        return _mixes("works along the batch axis") if view.axis(default) == view.lanes[0] else None

    return rule


def _softmax(view: _View) -> Verdict | None:
    return _mixes("takes the maximum over the batch axis") if view.axis(-1) == view.lanes[0] else None


def _from_axis(view: _View) -> Verdict | None:
    """Layer normalisation: over ``axis`` and all that follow."""
    return None if view.lanes[0] is not None and view.lanes[0] < view.axis(-1) else _mixes("normalises over the batch")


def _reduce(view: _View) -> Verdict | None:
    rank = len(view.shape(0))
    given: Sequence[int] | None = view.attrs.get("axes")
    if view.given(1):
        content = view.content(1)
        if content is None:
            return _unsure("reduces over axes that are not constant")
        given = content.reshape(-1).tolist()
    if not given:
        if view.attrs.get("noop_with_empty_axes", 0):
            return None
        return _mixes("reduces over all axes, the batch included")
    return _mixes("reduces over the batch axis") if view.lanes[0] in {axis % rank for axis in given} else None


def _mean_variance(view: _View) -> Verdict | None:
    return _mixes("normalises over the batch axis") if view.lanes[0] in view.attrs.get("axes", [0, 2, 3]) else None


def _concat(view: _View) -> Verdict | None:
    axes = {axis for axis in view.lanes if axis is not None}
    if len(axes) > 1:
        return _mixes("joins values that carry the batch on different axes")
    return _mixes("joins values along the batch axis") if view.axis(0) in axes else None


def _gather(view: _View) -> Verdict | None:
    if view.lanes[0] is None:
        return None
    if view.axis(0) == view.lanes[0]:
        return _mixes("picks along the batch axis")
    return None if view.lanes[1] is None else _unsure("picks by an index that depends on the sample")


def _aligned_along(default: int) -> Rule:
    def rule(view: _View) -> Verdict | None:
        if view.axis(default) in view.lanes:
            return _mixes("works along the batch axis")
        return None if len({axis for axis in view.lanes if axis is not None}) == 1 else _unsure("mixes axes")

    return rule


def _gather_nd(view: _View) -> Verdict | None:
    if view.lanes[0] is None:
        return None
    return None if int(view.attrs.get("batch_dims", 0)) > view.lanes[0] else _unsure("picks along the batch axis")


def _slice(view: _View) -> Verdict | None:
    starts, ends = view.content(1), view.content(2)
    if starts is None or ends is None:
        return _unsure("cuts at places that are not constant")
    rank = len(view.shape(0))
    axes = view.content(3)
    steps = view.content(4)
    numbers = range(starts.size) if axes is None else [int(axis) % rank for axis in axes.reshape(-1)]
    for i, axis in enumerate(numbers):
        step = 1 if steps is None else int(steps.reshape(-1)[i])
        whole = int(starts.reshape(-1)[i]) == 0 and int(ends.reshape(-1)[i]) >= 2**31 - 1 and step == 1
        if axis == view.lanes[0] and not whole:
            return _mixes("cuts or reverses the batch axis")
    return None


def _pad(view: _View) -> Verdict | None:
    pads = view.content(1)
    rank = len(view.shape(0))
    axes = view.content(3)
    if pads is None or view.lanes[0] is None:
        return _unsure("pads by amounts that are not constant")
    numbers = list(range(rank)) if axes is None else [int(axis) % rank for axis in axes.reshape(-1)]
    if view.lanes[0] not in numbers:
        return None
    place = numbers.index(view.lanes[0])
    flat = pads.reshape(-1)
    return _mixes("pads the batch axis") if flat[place] or flat[place + len(numbers)] else None


def _reshape(view: _View) -> Verdict | None:
    """[P, k*N, S] -> [P', m*N, S'] keeps samples in place when P and P' have the same number of elements."""
    before, after = view.shape(0), view.outputs[0].shape or ()
    source, target = view.lanes[0], lane(view.outputs[0])
    if view.outputs[0].shape is None or (target is None and None in after):
        return _unsure("has an output whose shape cannot be told")
    if source is None or target is None:
        return _mixes("loses the batch axis")
    if target == -1 or None in before[:source] or None in after[:target]:
        return _unsure("moves the batch in a way that cannot be followed")
    if _product(before[:source]) != _product(after[:target]):
        return _unsure("merges the batch behind another axis")
    return None


def _flatten(view: _View) -> Verdict | None:
    axis = view.axis(1, len(view.shape(0)) + 1)
    if view.lanes[0] is None or view.lanes[0] >= axis:
        return _mixes("merges the batch into the features")
    return _reshape(view)


def _mat_mul(first: int, second: int) -> Rule:
    def rule(view: _View) -> Verdict | None:
        left, right = view.lanes[first], view.lanes[second]
        ranks = len(view.shape(first)), len(view.shape(second))
        if min(ranks) < 2:
            return _unsure("multiplies a vector")
        if left == ranks[0] - 1 or right == ranks[1] - 2:
            return _mixes("sums over the batch axis")
        if left is not None and right is not None and left - ranks[0] != right - ranks[1]:
            return _mixes("multiplies samples with one another")
        return None

    return rule


def _gemm(view: _View) -> Verdict | None:
    if view.lanes[1] is not None or view.lanes[0] != (1 if view.attrs.get("transA", 0) else 0):
        return _mixes("sums over the batch axis")
    return None


def _einsum(view: _View) -> Verdict | None:
    equation = str(view.attrs["equation"]).replace(" ", "")
    if "." in equation or "->" not in equation:
        return _unsure("has an equation that eexform does not follow")
    terms, result = equation.split("->")
    letters = {term[axis] for term, axis in zip(terms.split(","), view.lanes, strict=True) if axis is not None}
    return None if len(letters) == 1 and letters <= set(result) else _mixes("sums over or pairs up the batch")


def _recurrent(view: _View) -> Verdict | None:
    expected = 0 if view.attrs.get("layout", 0) else 1
    if view.lanes[0] != expected:
        return _mixes("steps along the batch axis")
    for index in (5, 6):
        if view.given(index) and view.lanes[index] is None:
            return _unsure("has an initial state for a fixed number of samples")
    return None


def _same_lane(view: _View) -> Verdict | None:
    """Resize, Tile: fine where the lane's size does not change."""
    target = lane(view.outputs[0])
    if view.lanes[0] is None or target is None or target == -1:
        return _unsure("changes the batch axis")
    same = (view.outputs[0].shape or ())[target] == view.shape(0)[view.lanes[0]]
    return None if same else _mixes("repeats or rescales the batch axis")


def _free(view: _View) -> Verdict | None:
    """Transpose, Squeeze and the like: axes move, elements stay with their sample."""
    return None


def _last_two(view: _View) -> Verdict | None:
    own = view.lanes[0]
    return None if own is not None and own < len(view.shape(0)) - 2 else _mixes("works on the batch axis")


def _whole_tensor(view: _View) -> Verdict | None:
    return _mixes("computes its scale over the whole batch, so a sample's result depends on its neighbours")


def _words(text: str) -> list[str]:
    return text.split()


def _product(dims: Sequence[Dim]) -> tuple[int, tuple[str, ...]]:
    number = 1
    symbols = []
    for dim in dims:
        factor, symbol = split_dim(dim) if isinstance(dim, str) else (int(dim or 0), "")
        number *= factor
        symbols += [symbol] if symbol else []
    return number, tuple(sorted(symbols))


_UNARY_AND_BROADCAST = _words("""
    Abs Acos Acosh Add And Asin Asinh Atan Atanh BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil
    Celu Clip Cos Cosh DequantizeLinear Div Dropout Elu Equal Erf Exp Expand Floor Gelu Greater GreaterOrEqual
    HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or PRelu
    Pow QuantizeLinear Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan
    Tanh ThresholdedRelu Where Xor
""")
_FIRST_AXIS = _words("""
    AveragePool Conv ConvInteger ConvTranspose DepthToSpace GlobalAveragePool GlobalLpPool GlobalMaxPool
    GroupNormalization InstanceNormalization LRN LpPool MaxPool QLinearConv SpaceToDepth
""")
_REDUCTIONS = _words("""
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare
""")

_RULES: dict[str, Rule] = (
    dict.fromkeys(_UNARY_AND_BROADCAST, _elementwise)
    | dict.fromkeys(_FIRST_AXIS, _first_only)
    | dict.fromkeys(_REDUCTIONS, _reduce)
    | dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent)
    | dict.fromkeys(("Transpose", "Squeeze", "Unsqueeze", "OneHot"), _free)
    | dict.fromkeys(("Resize", "Tile"), _same_lane)
    | dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax"), _softmax)
    | dict.fromkeys(("LayerNormalization", "RMSNormalization"), _from_axis)
    | dict.fromkeys(("ArgMax", "ArgMin", "Split"), _along(0))
    | dict.fromkeys(("GatherElements", "ScatterElements"), _aligned_along(0))
    | {
        "BatchNormalization": _batch_norm,
        "LpNormalization": _along(-1),
        "TopK": _along(-1),
        "MeanVarianceNormalization": _mean_variance,
        "Concat": _concat,
        "Gather": _gather,
        "GatherND": _gather_nd,
        "Slice": _slice,
        "Pad": _pad,
        "Reshape": _reshape,
        "Flatten": _flatten,
        "MatMul": _mat_mul(0, 1),
        "MatMulInteger": _mat_mul(0, 1),
        "QLinearMatMul": _mat_mul(0, 3),
        "Gemm": _gemm,
        "Einsum": _einsum,
        "Trilu": _last_two,
        "Det": _last_two,
        "DynamicQuantizeLinear": _whole_tensor,
    }
)


def _cumulative(view: _View) -> Verdict | None:
    axis = view.content(1)
    if axis is None:
        return _unsure("sums along an axis that is not constant")
    rank = len(view.shape(0))
    return _mixes("sums along the batch axis") if int(axis.reshape(-1)[0]) % rank == view.lanes[0] else None


_RULES["CumSum"] = _cumulative
