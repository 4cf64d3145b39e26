"""A cut graph beside the graph before the cut: which channels are left, and which nodes see something new."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from eexform.ir.coupling import Slot, positions_of
from eexform.ir.cut import kept_since
from eexform.ir.graph import Graph

_APART = (
    "Abs Add AveragePool BatchNormalization Cast Ceil Celu Clip Concat Cos Div Dropout Elu Erf Exp Expand Flatten "
    "Floor Gelu GlobalAveragePool GlobalMaxPool HardSigmoid HardSwish Identity InstanceNormalization LeakyRelu "
    "Log LogSigmoid Max MaxPool Min Mish Mul Neg Pad Pow PRelu Reciprocal Relu Reshape Resize Round Selu Sigmoid "
    "Sign Sin Slice Softplus Softsign Split Sqrt Squeeze Sub Sum Tanh ThresholdedRelu Transpose Unsqueeze "
    "Upsample Where"
)
_CHANNELS_APART = frozenset(_APART.split())
"""Operators that treat every channel by itself, or only move channels about."""


class Match:
    """Which channels of the reference are left in the cut graph.

    Both graphs may have been cut before (:func:`eexform.ir.cut.kept_since`); positions are those of the reference.
    """

    def __init__(self, graph: Graph, reference: Graph) -> None:
        self._types = (graph.types, reference.types)
        self._reference = reference
        self._now, self._before = kept_since(graph), kept_since(reference)

    def kept(self, value: str, axis: int) -> np.ndarray | None:
        """Positions of the reference that are left on one axis; ``None`` where nothing was cut there."""
        slot = Slot(value, axis)
        now, before = self._now.get(slot), self._before.get(slot)
        if now is None or before is None:
            return now
        return None if np.array_equal(now, before) else np.flatnonzero(np.isin(before, now))

    def obstacle(self, value: str) -> str | None:
        """Why a value cannot be compared with the reference; ``None`` where it can."""
        mine, theirs = (types.get(value) for types in self._types)
        if value not in self._reference.flow.producer or theirs is None:
            return f"the reference has no value {value!r} to compare with"
        if mine is None or mine.shape is None or theirs.shape is None or len(mine.shape) != len(theirs.shape):
            return f"the shape of {value!r} is not known, or has another rank in the reference"
        for axis, (left, right) in enumerate(zip(mine.shape, theirs.shape, strict=True)):
            kept = self.kept(value, axis)
            whole = positions_of(right) if kept is None else len(kept)
            if positions_of(left) != whole:
                return (
                    f"axis {axis} of {value!r} has {left} positions, of {right} in the reference {whole} should be left"
                )
        return None

    def restrict(self, array: np.ndarray, value: str) -> np.ndarray:
        """What the reference holds in a value or a constant, at the positions that are left."""
        known = self._types[1].get(value)
        shape = array.shape if known is None or known.shape is None else known.shape
        for axis in range(array.ndim):
            kept = self.kept(value, axis)
            if kept is None:
                continue
            size = positions_of(shape[axis]) or array.shape[axis]
            if size != array.shape[axis]:  # "3*N": position p of sample n is at n * 3 + p
                kept = (np.arange(array.shape[axis] // size)[:, None] * size + kept).reshape(-1)
            array = np.take(array, kept, axis=axis)
        return array

    def lost(self, value: str) -> bool:
        """Whether any axis of a value or a constant lost positions."""
        known = self._types[1].get(value)
        constant = self._reference.constants.get(value)
        rank = len(constant.shape) if constant is not None else len((known.shape if known else None) or ())
        return any(self.kept(value, axis) is not None for axis in range(rank))


def touched(graph: Graph, reference: Graph, match: Match | None = None) -> frozenset[str]:
    """Nodes whose results may differ, in the channels that are left, from the same node's in ``reference``.

    By structure: other constants, fewer channels to read, other inputs, another operator, or a touched node in front.
    """
    match = Match(graph, reference) if match is None else match
    theirs = {node.name: node for node in reference.nodes}
    flow = graph.flow
    found: set[str] = set()
    for name in flow.topological:
        behind = any(flow.producer.get(value) in found for value in flow.reads(name) if flow.is_data(value))
        if behind or not _alike(flow.nodes[name], theirs.get(name), match):
            found.add(name)
    return frozenset(found - flow.shape_nodes)


def _alike(node: gs.Node, other: gs.Node | None, match: Match) -> bool:
    """Whether two nodes say the same in the channels that are left, provided that they read the same there."""
    if other is None or (node.op, node.domain) != (other.op, other.domain):
        return False
    if [tensor.name for tensor in node.inputs] != [tensor.name for tensor in other.inputs]:
        return False
    loses = any(match.lost(tensor.name) for tensor in (*node.inputs, *node.outputs) if tensor.name)
    if loses and _mixes(node, match):
        return False
    for mine, its in zip(node.inputs, other.inputs, strict=True):
        if isinstance(mine, gs.Constant) != isinstance(its, gs.Constant):
            return False
        if isinstance(mine, gs.Constant) and not _same(mine, its, match, loses):
            return False
    return loses or {key: str(value) for key, value in node.attrs.items()} == {
        key: str(value) for key, value in other.attrs.items()
    }


def _same(mine: gs.Constant, its: gs.Constant, match: Match, loses: bool) -> bool:
    if mine.values is its.values:
        return True
    if loses and not np.issubdtype(mine.dtype, np.floating):
        return True  # sizes and bounds that were mended after the cut
    held = match.restrict(its.values, mine.name)
    return held.shape == mine.values.shape and np.array_equal(mine.values, held)


def _mixes(node: gs.Node, match: Match) -> bool:
    """Whether a node, some of whose operands lost positions, lost some that its results are sums over."""
    if node.domain not in ("", "ai.onnx", None):
        return True
    if node.op in _CHANNELS_APART:
        return False
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if not isinstance(weight, gs.Constant) or node.op not in ("Conv", "Gemm", "MatMul"):
        return True
    if node.op == "Conv":
        return match.kept(weight.name, 1) is not None
    if len(weight.shape) != 2:
        return True
    inner = 1 if node.op == "Gemm" and int(node.attrs.get("transB", 0)) else 0
    return match.kept(weight.name, inner) is not None
