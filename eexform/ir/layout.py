"""Where the channels of every value are.

ONNX does not say which axis holds the features. Here the question is answered from the operators: a convolution puts
them on axis 1, a product with a constant matrix on the last axis, and everything that only moves or rescales data
carries them along. A reshape may split channels over several axes (attention heads, channel shuffle) and join them
again, so the answer per value is a tuple of axes, in ascending order. What the forward walk leaves open is asked of the
consumers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from eexform.ir.flow import DataFlow
from eexform.ir.types import Dim, TensorType

Axes = tuple[int, ...]
Factors = tuple[int, tuple[str, ...]]

_CONVOLUTIONS = {"Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "DeformConv", "FusedConv"}
_DENSE = {"Gemm", "QGemm", "FusedGemm"}
_POOLINGS = {"MaxPool", "AveragePool", "LpPool", "QLinearAveragePool", "QLinearGlobalAveragePool"}
_POOLINGS |= {"GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"}
_ON_AXIS_1 = _CONVOLUTIONS | _DENSE | _POOLINGS | {"BatchNormalization", "LRN", "SpaceToDepth", "DepthToSpace"}
_ATTENTIONS = {"Attention", "MultiHeadAttention"}
_RECURRENT = {"LSTM", "GRU", "RNN"}
_ON_LAST_AXIS = _ATTENTIONS | {"EmbedLayerNormalization", "SkipLayerNormalization"}
_PRODUCTS = frozenset(["MatMul", "FusedMatMul", "MatMulInteger", "QLinearMatMul", "MatMulIntegerToFloat"])
_RESHAPES = frozenset(["Reshape", "Flatten", "Squeeze", "Unsqueeze"])
_MIXES = frozenset(["Einsum", "GatherND", "GatherElements", "NonZero", "TopK", "Col2Im", "OneHot", "ArgMax", "ArgMin"])


def channel_axes(flow: DataFlow, types: Mapping[str, TensorType]) -> dict[str, Axes]:
    """The axes that hold the channels of each data value, ascending; where nothing is known, there is no entry.

    Args:
        flow: the graph's structure.
        types: type of every value.
    """
    found: dict[str, Axes] = {}
    nodes = [flow.nodes[name] for name in flow.topological if name not in flow.shape_nodes]
    for node in nodes:
        _forward(node, flow, types, found)
    for node in reversed(nodes):
        _backward(node, flow, types, found)
    for node in nodes:
        _forward(node, flow, types, found)
    return found


def _forward(node: gs.Node, flow: DataFlow, types: Mapping[str, TensorType], found: dict[str, Axes]) -> None:
    for tensor in node.outputs:
        shape = _shape(tensor.name, types)
        if tensor.name in found or shape is None:
            continue
        axes = _output_axes(node, shape, flow, types, found)
        if axes and all(0 <= axis < len(shape) for axis in axes):
            found[tensor.name] = axes


def _output_axes(
    node: gs.Node, shape: Sequence[Dim], flow: DataFlow, types: Mapping[str, TensorType], found: Mapping[str, Axes]
) -> Axes | None:
    if node.op in _ON_AXIS_1:
        return (1,)
    if node.op in _ON_LAST_AXIS or _last_axis_norm(node, types):
        return (len(shape) - 1,)
    if node.op in _RECURRENT:
        return _recurrent_axes(node, shape)
    if node.op in _PRODUCTS:
        return _product_axes(node, len(shape), flow, found)
    if node.op in _MIXES:
        return None
    if node.op == "Gather" and not flow.is_data(node.inputs[0].name):
        return (len(shape) - 1,)  # rows of an embedding table
    for tensor in node.inputs:
        axes, before = found.get(tensor.name), _shape(tensor.name, types)
        if axes is None or before is None or not flow.is_data(tensor.name):
            continue
        if node.op == "Transpose":
            order = node.attrs.get("perm") or list(reversed(range(len(before))))
            return tuple(sorted(order.index(axis) for axis in axes))
        if node.op in _RESHAPES:
            return reshaped(axes, before, shape)
        if node.op == "Gather":
            return _gathered(node, axes, before, shape)
        if len(before) == len(shape):
            # an operand that is broadcast along its channel axis says nothing about the result's channels
            if node.op.startswith("Reduce") and any(shape[a] != before[a] for a in axes):
                return None
            if all(before[a] != 1 or shape[a] == 1 for a in axes):
                return axes
        elif len(before) > len(shape):
            return reshaped(axes, _without_reduced(node, before), shape)  # a reduction that drops axes
        else:
            return tuple(axis + len(shape) - len(before) for axis in axes)  # broadcast to a higher rank
    return None


def _backward(node: gs.Node, flow: DataFlow, types: Mapping[str, TensorType], found: dict[str, Axes]) -> None:
    """Ask a consumer where it expects the channels of inputs that nothing is known of."""
    for place, tensor in enumerate(node.inputs):
        before = _shape(tensor.name, types)
        if before is None or tensor.name in found or not flow.is_data(tensor.name):
            continue
        axes: Axes | None = None
        if node.op in _ON_AXIS_1:
            axes = (1,)
        elif _last_axis_norm(node, types) or (place == 0 and _constant_matrix(node, flow)):
            axes = (len(before) - 1,)
        elif node.op not in _PRODUCTS and node.op not in _MIXES and node.op not in _ON_LAST_AXIS | _RECURRENT:
            after = next((t.name for t in node.outputs if t.name in found), None)
            shape = None if after is None else _shape(after, types)
            if after is None or shape is None:
                continue
            if node.op == "Transpose":
                order = node.attrs.get("perm") or list(reversed(range(len(before))))
                axes = tuple(sorted(order[axis] for axis in found[after]))
            elif node.op in _RESHAPES:
                axes = reshaped(found[after], shape, before)
            elif len(before) == len(shape) and all(before[a] == shape[a] for a in found[after]):
                axes = found[after]
        if axes and all(0 <= axis < len(before) for axis in axes):
            found[tensor.name] = axes


def _product_axes(node: gs.Node, rank: int, flow: DataFlow, found: Mapping[str, Axes]) -> Axes | None:
    """[..., T, K] x [K, C]: the matrix's columns are the channels. Between activations: those of the right operand."""
    right = node.inputs[1].name if node.op in ("MatMul", "FusedMatMul", "MatMulInteger") else None
    if right is None or not flow.is_data(right):
        return (rank - 1,)
    if not flow.is_data(node.inputs[0].name):
        return (rank - 2,)
    axes = found.get(right)
    return axes if axes and rank - 1 in axes else None  # keys come transposed: queries x keys has no channels


def _recurrent_axes(node: gs.Node, shape: Sequence[Dim]) -> Axes | None:
    """Width of the state, and directions where there are two: [T, D, N, H] or [D, N, H]; batch first [N, T, D, H]."""
    directions = len(shape) - 2 if node.attrs.get("layout", 0) else len(shape) - 3
    return (len(shape) - 1,) if shape[directions] == 1 else (directions, len(shape) - 1)


def _constant_matrix(node: gs.Node, flow: DataFlow) -> bool:
    return node.op in ("MatMul", "FusedMatMul", "MatMulInteger") and not flow.is_data(node.inputs[1].name)


def _gathered(node: gs.Node, axes: Axes, before: Sequence[Dim], shape: Sequence[Dim]) -> Axes | None:
    """One index removes the axis, a list of indices keeps it, a table of indices puts several in its place."""
    axis = int(node.attrs.get("axis", 0)) % len(before)
    grown = len(shape) - len(before)
    if axis in axes and grown:
        axes = tuple(a for a in axes if a != axis)  # one group of the channels was picked
    return tuple(a + grown if a > axis else a for a in axes)


def _without_reduced(node: gs.Node, before: Sequence[Dim]) -> Sequence[Dim]:
    """Shape before a reduction with the dropped axes set to 1, so that it lines up with the shape after it."""
    operand = node.inputs[1].values if len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant) else None
    dropped = node.attrs.get("axes") if operand is None else operand
    if dropped is None:
        dropped = [node.attrs["axis"]] if "axis" in node.attrs else []
    gone = {int(a) % len(before) for a in np.asarray(dropped).ravel()}
    return [1 if i in gone else dim for i, dim in enumerate(before)]


def _last_axis_norm(node: gs.Node, types: Mapping[str, TensorType]) -> bool:
    """Whether ``node`` normalises over the last axis alone, as transformers do over their channels."""
    if node.op not in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization") or not node.inputs:
        return False
    shape = _shape(node.inputs[0].name, types)
    return shape is not None and int(node.attrs.get("axis", -1)) in (-1, len(shape) - 1)


def _shape(value: str, types: Mapping[str, TensorType]) -> tuple[Dim, ...] | None:
    return types[value].shape if value in types else None


# -- reshapes ----------------------------------------------------------------------------------------------------------


def reshaped(axes: Axes, before: Sequence[Dim], after: Sequence[Dim]) -> Axes | None:
    """Where ``axes`` of a tensor are after it was reshaped.

    Both shapes are cut into the smallest groups of neighbouring axes with equal products, e.g. [N, 14, 14, 96] ->
    [N, 2, 7, 2, 7, 96] into N|N, 14|2x7, 14|2x7, 96|96. Channels move along when they fill their group.

    Returns:
        The axes, ascending; ``None`` if the channels were mixed with something else or cannot be followed.
    """
    result: list[int] = []
    for old, new in _groups(before, after):
        mine = [axis for axis in axes if axis in old]
        if not mine:
            continue
        real = [axis for axis in old if before[axis] != 1]
        whole = mine == real  # otherwise channels and positions are mixed; in one flat axis all of them are features
        if not whole and (len(new) != 1 or len(after) != 2):
            return None
        result += [axis for axis in new if after[axis] != 1] or list(new[:1])
    return tuple(result) or None


def _groups(before: Sequence[Dim], after: Sequence[Dim]) -> list[tuple[list[int], list[int]]]:
    """Smallest groups of neighbouring axes with equal products; what lies between unknown sizes forms one group."""
    if None in before or None in after:
        return _ends(before, after)
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old: list[int] = []
        new: list[int] = []
        left: Factors = (1, ())
        right: Factors = (1, ())
        while not old or not new or left != right:
            behind = _behind(left, right)
            if i < len(before) and (behind or not old or j >= len(after)):
                left = _times(left, before[i])
                old.append(i)
                i += 1
            elif j < len(after):
                right = _times(right, after[j])
                new.append(j)
                j += 1
            else:
                break
        # sizes of 1 at the end of a group belong nowhere; keep them here so that the next group starts cleanly
        while i < len(before) and before[i] == 1:
            old.append(i)
            i += 1
        while j < len(after) and after[j] == 1:
            new.append(j)
            j += 1
        groups.append((old, new))
    return groups


def _ends(before: Sequence[Dim], after: Sequence[Dim]) -> list[tuple[list[int], list[int]]]:
    """Axes that are equal counted from the front and from the back; the unknown middle is left out."""
    groups: list[tuple[list[int], list[int]]] = []
    front = 0
    while front < min(len(before), len(after)) and before[front] == after[front] is not None:
        groups.append(([front], [front]))
        front += 1
    back = 1
    while back <= min(len(before), len(after)) - front and before[-back] == after[-back] is not None:
        groups.append(([len(before) - back], [len(after) - back]))
        back += 1
    return groups


def _times(product: Factors, dim: Dim) -> Factors:
    number, symbols = product
    for part in str(dim).split("*"):
        if part.strip().isdigit():
            number *= int(part)
        else:
            symbols = tuple(sorted((*symbols, part.strip())))
    return number, symbols


def _behind(left: Factors, right: Factors) -> bool:
    """Whether the left product still lacks something that the right one has."""
    missing = [symbol for symbol in right[1] if right[1].count(symbol) > left[1].count(symbol)]
    surplus = [symbol for symbol in left[1] if left[1].count(symbol) > right[1].count(symbol)]
    if missing or surplus:
        return bool(missing)
    return left[0] < right[0]
