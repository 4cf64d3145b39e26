"""What can be mended in a graph: linear operators with what follows them per channel, and normalisations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from eexform.ir.graph import Graph
from eexform.pruning.repair_patches import Window, channels, patches, positions

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators whose outputs are mended; weights only of the first and the last two."""

_TINY = 1e-6
"""A channel whose gain is smaller than this share of the largest passes nothing on: its weights are left alone."""


@dataclass(frozen=True)
class Knob:
    """A constant that adds one number per channel to a layer's result.

    Attributes:
        name: of the constant; for one that is to be made, the name that it gets.
        node: where it is read.
        gain: what the result gains per unit of it: one number, or one per channel.
        new: whether the node has no bias yet.
    """

    name: str
    node: str
    gain: np.ndarray
    new: bool = False


@dataclass(frozen=True)
class Layer:
    """A linear operator ``y = W x (+ b)`` and what follows it per channel: ``result = slope * W x + offset``.

    Attributes:
        node: name of the operator's node.
        op: its operator.
        source: the value x.
        linear: the value y.
        result: the last value that is y channel by channel: of the operator, a bias addition or a normalisation.
        axis: of the channels in y and the result; counted from 0.
        slope: ``[channels]``.
        offset: ``[channels]``, the operator's own bias in it; meaningless where that is computed (then ``frozen``).
        knob: what moves the result per channel; ``None`` where nothing does.
        why: why there is no knob.
        add: name of the node that adds the result to another branch, where that alone reads it; the other operand is
            ``other`` and the sum ``total``.
        frozen: why the weights stay as they are; ``None`` where they can be fitted.
    """

    node: str
    op: str
    source: str
    linear: str
    result: str
    axis: int
    slope: np.ndarray
    offset: np.ndarray
    knob: Knob | None
    why: str = ""
    other: str = ""
    total: str = ""
    frozen: str | None = None


def find_layers(graph: Graph) -> tuple[dict[str, Layer], dict[str, str]]:
    """Every linear operator that can be looked at, in topological order, and why others cannot, by node name."""
    reads = _reads(graph)
    found: dict[str, Layer] = {}
    refused: dict[str, str] = {}
    for name in graph.flow.topological:
        node = graph.flow.nodes[name]
        if name in graph.flow.shape_nodes:
            continue
        if node.op in LINEAR and not node.domain:
            reason = _unfit(node, graph)
            if reason is None:
                found[name] = _layer(graph, node, reads)
            elif reason:
                refused[name] = reason
        elif node.op not in _QUIET and _weights(node):
            refused[name] = f"{node.op} has weights of its own, but only {', '.join(LINEAR)} are mended"
    return found, refused


_ELEMENTWISE = (
    "Add Sub Mul Div Pow PRelu Gather GatherElements Where Concat Reshape Slice Pad Transpose Expand Tile Unsqueeze "
    "Squeeze Clip BatchNormalization LayerNormalization InstanceNormalization GroupNormalization RMSNormalization "
    "Min Max Mean Sum Resize"
)
_QUIET = frozenset(_ELEMENTWISE.split())
"""Operators whose constants nobody expects to be fitted."""


@dataclass(frozen=True)
class Norm:
    """A BatchNormalization: its input, and the names of its mean and variance."""

    node: str
    source: str
    mean: str
    variance: str


def find_norms(graph: Graph) -> tuple[dict[str, Norm], dict[str, str]]:
    """Every BatchNormalization whose statistics can be set, in topological order, and why others cannot."""
    reads = _reads(graph)
    found: dict[str, Norm] = {}
    refused: dict[str, str] = {}
    for name in graph.flow.topological:
        node = graph.flow.nodes[name]
        if node.op != "BatchNormalization" or node.domain:
            continue
        mean, variance = node.inputs[3:5]
        if int(node.attrs.get("training_mode", 0)):
            refused[name] = "it is in training mode and takes its statistics from the batch"
        elif not isinstance(mean, gs.Constant) or not isinstance(variance, gs.Constant):
            refused[name] = "its statistics are computed, not constants"
        elif mean.name == variance.name or reads[mean.name] > 1 or reads[variance.name] > 1:
            refused[name] = "its statistics are shared with another node"
        elif isinstance(node.inputs[0], gs.Constant):
            refused[name] = "its input is a constant"
        else:
            found[name] = Norm(name, node.inputs[0].name, mean.name, variance.name)
    return found, refused


# -- one layer ---------------------------------------------------------------------------------------------------------


def _reads(graph: Graph) -> dict[str, int]:
    """How many inputs of nodes each constant is."""
    found = dict.fromkeys(graph.constants, 0)
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                found[tensor.name] += 1
    return found


def _weights(node: gs.Node) -> bool:
    return any(
        isinstance(tensor, gs.Constant) and np.issubdtype(tensor.dtype, np.floating) and len(tensor.shape) >= 2
        for tensor in node.inputs
    )


def _unfit(node: gs.Node, graph: Graph) -> str | None:
    """Why nothing at all can be done at a linear operator; empty where it has no weights."""
    left, right = node.inputs[0], node.inputs[1]
    if not isinstance(right, gs.Constant):
        if isinstance(left, gs.Constant):
            return "its weights are on the left: results are mixtures of rows, not of channels"
        return "" if graph.flow.is_data(right.name) else f"its weights {right.name!r} are computed, not constants"
    if isinstance(left, gs.Constant):
        return ""
    if not np.issubdtype(right.dtype, np.floating):
        return f"its weights are {np.dtype(right.dtype)}, not floating-point numbers"
    if node.op == "Gemm" and int(node.attrs.get("transA", 0)):
        return "it transposes its input"
    if node.op == "MatMul" and len(right.shape) != 2:
        return f"its weights have {len(right.shape)} axes, expected 2"
    known = graph.types[left.name].shape
    if node.op == "MatMul" and (known is None or len(known) < 2):
        return f"the rank of {left.name!r} is not known, or below 2"
    return None


def _layer(graph: Graph, node: gs.Node, reads: dict[str, int]) -> Layer:
    weight = node.inputs[1]
    count = outputs_of(node)
    linear = node.outputs[0].name
    axis = len(graph.types[node.inputs[0].name].shape or ()) - 1 if node.op == "MatMul" else 1
    kept = {*graph.outputs, *(item.site for item in graph.exits)}
    slope = np.ones(count)
    offset = _bias_values(node, count)
    knob, why = _own_bias(graph, node, reads, count)
    result = linear
    while (after := _follower(graph, result, axis, count, kept)) is not None:
        if after.op == "BatchNormalization":
            scale, shift, mean, variance = (np.asarray(tensor.values, np.float64) for tensor in after.inputs[1:5])
            gain = scale / np.sqrt(variance + float(after.attrs.get("epsilon", 1e-5)))
            slope, offset = slope * gain, None if offset is None else gain * (offset - mean) + shift
            name = after.inputs[2].name
        else:
            (constant,) = [tensor for tensor in after.inputs if isinstance(tensor, gs.Constant)]
            added = np.broadcast_to(np.asarray(constant.values, np.float64).reshape(-1), (count,))
            gain, offset = np.ones(1), None if offset is None else offset + added
            name = constant.name
        if reads[name] == 1 and graph.constants[name].values.size == count:
            knob, why = Knob(name, after.name, np.ones(1)), ""
        elif knob is not None:
            knob = Knob(knob.name, knob.node, knob.gain * gain, knob.new)
        result = after.outputs[0].name
    other, total = _sum(graph, result)
    frozen = None
    if node.op == "ConvTranspose":
        frozen = "weights of a transposed convolution are not fitted"
    elif reads[weight.name] > 1:
        frozen = f"its weights {weight.name!r} are shared with another node"
    elif node.op == "Gemm" and not float(node.attrs.get("alpha", 1.0)):
        frozen = "its alpha is 0"
    elif offset is None:
        frozen = f"its bias {node.inputs[2].name!r} is computed, or not one number per channel"
    shift = np.zeros(count) if offset is None else offset
    return Layer(
        node.name, node.op, node.inputs[0].name, linear, result, axis, slope, shift, knob, why, other, total, frozen
    )


def _bias_values(node: gs.Node, count: int) -> np.ndarray | None:
    """What a linear operator adds itself, ``[channels]`` float64; ``None`` where it is not one number per channel."""
    bias = node.inputs[2] if node.op != "MatMul" and len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    if bias is None:
        return np.zeros(count)
    if not isinstance(bias, gs.Constant):
        return None
    values = np.asarray(bias.values, np.float64)
    if values.size not in (1, count) or (values.ndim and values.shape[-1] != values.size):
        return None
    beta = float(node.attrs.get("beta", 1.0)) if node.op == "Gemm" else 1.0
    return np.broadcast_to(beta * values.reshape(-1), (count,))


def outputs_of(node: gs.Node) -> int:
    """Output channels of a linear operator."""
    shape = node.inputs[1].shape
    if node.op == "Conv":
        return int(shape[0])
    if node.op == "ConvTranspose":
        return int(shape[1]) * int(node.attrs.get("group", 1))
    return int(shape[0]) if node.op == "Gemm" and int(node.attrs.get("transB", 0)) else int(shape[1])


def _own_bias(graph: Graph, node: gs.Node, reads: dict[str, int], count: int) -> tuple[Knob | None, str]:
    if node.op == "MatMul":
        return None, "it has no bias and nothing adds one"
    beta = float(node.attrs.get("beta", 1.0)) if node.op == "Gemm" else 1.0
    bias = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    if bias is None:
        weight = node.inputs[1].name
        stem = weight.removesuffix("weight") + "bias" if weight.endswith("weight") else f"{weight}.bias"
        while stem in graph.tensors:
            stem += "_"
        return Knob(stem, node.name, np.ones(1), new=True), ""
    if not isinstance(bias, gs.Constant):
        return None, f"its bias {bias.name!r} is computed, not a constant"
    if reads[bias.name] > 1:
        return None, f"its bias {bias.name!r} is shared with another node"
    if bias.values.size != count or bias.values.shape[-1] != count or not beta:
        return None, f"its bias {bias.name!r} is not one number per channel"
    return Knob(bias.name, node.name, np.full(1, beta)), ""


def _follower(graph: Graph, value: str, axis: int, count: int, kept: set[str]) -> gs.Node | None:
    """The one node that reads ``value``, if it works channel by channel and with constants alone."""
    names = graph.flow.consumers.get(value, ())
    if len(names) != 1 or value in kept:
        return None
    node = graph.flow.nodes[names[0]]
    if node.domain or any(not isinstance(t, gs.Constant) and t.name != value for t in node.inputs if t.name):
        return None
    if node.op == "BatchNormalization":
        fits = axis == 1 and not int(node.attrs.get("training_mode", 0))
        return node if fits and node.inputs[0].name == value else None
    if node.op != "Add":
        return None
    constants = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)]
    if len(constants) != 1:
        return None
    shape, rank = tuple(constants[0].shape), len(graph.types[value].shape or ())
    if len(shape) > rank or not rank:
        return None
    whole = (1,) * (rank - len(shape)) + shape
    alone = all(size == 1 for at, size in enumerate(whole) if at != axis)
    return node if alone and whole[axis] in (1, count) else None


def _sum(graph: Graph, value: str) -> tuple[str, str]:
    """(other operand, sum) where an Add of two branches of one shape alone reads ``value``; else empty."""
    names = graph.flow.consumers.get(value, ())
    if len(names) != 1 or value in graph.outputs:
        return "", ""
    node = graph.flow.nodes[names[0]]
    if node.op != "Add" or node.domain:
        return "", ""
    others = [tensor for tensor in node.inputs if tensor.name != value]
    if len(others) != 1 or isinstance(others[0], gs.Constant):
        return "", ""
    types = graph.types
    if types[value].shape is None or types[value].shape != types[others[0].name].shape:
        return "", ""
    return others[0].name, node.outputs[0].name


# -- weights and rows --------------------------------------------------------------------------------------------------


def weights_of(node: gs.Node) -> np.ndarray:
    """The effective weights as ``[groups, out, in]``, float64 (Gemm's alpha is in them)."""
    values = np.asarray(node.inputs[1].values, np.float64)
    if node.op == "Conv":
        groups = int(node.attrs.get("group", 1))
        return values.reshape(groups, values.shape[0] // groups, -1)
    if node.op == "Gemm":
        values = values * float(node.attrs.get("alpha", 1.0))
        values = values if int(node.attrs.get("transB", 0)) else values.T
        return values[None]
    return values.T[None]


def as_stored(node: gs.Node, weight: np.ndarray) -> np.ndarray:
    """Inverse of :func:`weights_of`, in the type of the node's constant."""
    values = node.inputs[1].values
    if node.op == "Gemm":
        weight = weight / float(node.attrs.get("alpha", 1.0))
    plain = weight[0].T if node.op == "MatMul" or not int(node.attrs.get("transB", 0)) else weight[0]
    made = weight if node.op == "Conv" else plain
    with np.errstate(over="ignore"):  # the caller looks for what does not fit
        return np.ascontiguousarray(made.reshape(values.shape).astype(values.dtype))


def rows(
    layer: Layer, node: gs.Node, read: np.ndarray, said: np.ndarray, count: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows ``x [rows, groups, in]`` and ``y [rows, groups, out]`` at some positions, in blocks.

    Args:
        layer: the layer.
        node: its node.
        read: what it reads.
        said: its target, of the shape of its result.
        count: rows wanted.
        rng: chooses them.
    """
    places = positions(said.shape, layer.axis, count, rng)
    groups = int(node.attrs.get("group", 1)) if node.op == "Conv" else 1
    window = Window.of(node, node.inputs[1].shape[2:]) if node.op == "Conv" else None
    width = int(np.prod(node.inputs[1].shape[1:])) * groups if window else int(read.shape[-1])
    step = max(1, (1 << 22) // max(1, width))
    for start in range(0, len(places), step):
        block = places[start : start + step]
        if window is None:
            x = read.reshape(-1, read.shape[-1])[block][:, None, :]
        else:
            x = patches(read, said.shape, window, groups, block)
        y = channels(said, layer.axis, block)
        yield x, y.reshape(len(block), groups, -1)


def passes_on(slope: np.ndarray) -> np.ndarray:
    """Which channels' slopes are large enough to be divided by, ``[channels]`` bool."""
    size = np.abs(slope)
    return size > _TINY * max(float(size.max(initial=0.0)), 1e-30)
