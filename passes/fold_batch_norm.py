"""Fold inference-time batch normalisation into the linear operator in front of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from eexform.errors import need
from eexform.ir.emit import Emitter
from eexform.ir.graph import Graph
from eexform.passes._contract import Pass, PassContext, PassResult, Skip
from eexform.passes._exits import refresh_exits

_LINEAR = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold BatchNormalization into the Conv, ConvTranspose or Gemm in front of it.

    With the operator linear per output channel, ``y = W x + c``, and the normalisation (statistics fixed)

        z = s (y - m) / sqrt(v + eps) + b

    put ``g = s / sqrt(v + eps)`` (one number per channel). Then

        z = W' x + c'     with   W' = g W,   c' = g (c - m) + b

    where ``g`` multiplies W along its output-channel axis: axis 0 of Conv's [C_out, C_in/group, k...]; axis 1 of
    ConvTranspose's [C_in, C_out/group, k...], each group of input channels with its own slice of ``g``; the columns of
    Gemm's B. Gemm computes ``alpha A B + beta C``: alpha stays, ``c = beta C``, and beta becomes 1. Computed in
    float64, stored in the weights' own type.
    """

    name: ClassVar[str] = "fold_batch_norm"
    preserves_outputs: ClassVar[bool] = True

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        draft = graph.copy().gs
        kept = {*graph.outputs, *(item.site for item in graph.exits)}
        emitter = Emitter(draft)
        skipped, folded = [], []
        for norm in [node for node in draft.nodes if node.op == "BatchNormalization" and not node.domain]:
            reason = _obstacle(norm, kept)
            if reason is None:
                linear = norm.inputs[0].inputs[0]
                reason = _fold(linear, norm, emitter)
            if reason is None:
                folded.append(norm)
            else:
                skipped.append(Skip(norm.name, reason))
        if not folded:
            return PassResult(graph, changed=False, skipped=tuple(skipped))
        gone = {id(norm) for norm in folded}
        draft.nodes = [node for node in draft.nodes if id(node) not in gone]
        notes = tuple(f"folded {norm.name}" for norm in folded)
        return PassResult(refresh_exits(graph, graph.replace(draft)), True, tuple(skipped), notes)

    def ensures(self, graph: Graph) -> None:
        orphans = [node.name for node in graph.nodes if not node.outputs]
        need(not orphans, f"nodes without outputs are left: {orphans[:5]}")


def _obstacle(norm: gs.Node, kept: set[str]) -> str | None:
    """Why ``norm`` cannot be folded, from the structure alone."""
    value = norm.inputs[0]
    if not value.inputs:
        return f"its input {value.name!r} is no operator's output"
    linear = value.inputs[0]
    if linear.op not in _LINEAR or linear.domain:
        return f"its input comes from {linear.op} {linear.name!r}, not from {', '.join(_LINEAR)}"
    if len(value.outputs) != 1:
        return f"{value.name!r} has {len(value.outputs)} consumers"
    if value.name in kept:
        return f"{value.name!r} is an output of the graph or the site of an exit"
    if int(norm.attrs.get("training_mode", 0)):
        return "it is in training mode: its statistics depend on the batch"
    if len([tensor for tensor in norm.outputs if not tensor.is_empty()]) != 1:
        return "its statistics are outputs"
    for tensor in norm.inputs[1:]:
        if not isinstance(tensor, gs.Constant):
            return f"{tensor.name!r} is computed, not a constant"
    for tensor in linear.inputs[1:]:
        if not isinstance(tensor, gs.Constant) and not tensor.is_empty():
            return f"{tensor.name!r} of {linear.name!r} is computed, not a constant"
    return None


def _fold(linear: gs.Node, norm: gs.Node, emitter: Emitter) -> str | None:
    """Rewrite ``linear`` so that it yields what ``norm`` yields; or the reason why not, and nothing is touched."""
    scale, shift, mean, variance = (tensor.values.astype(np.float64) for tensor in norm.inputs[1:5])
    spread = variance + float(norm.attrs.get("epsilon", 1e-5))
    if not (spread > 0).all():
        return "its variance is not positive everywhere"
    gain = scale / np.sqrt(spread)
    weight = linear.inputs[1]
    bias = linear.inputs[2] if len(linear.inputs) > 2 and not linear.inputs[2].is_empty() else None
    offset = _offset(linear, bias, len(gain))
    if offset is None:
        return f"the addend of {linear.name!r} is not one number per channel"
    folded = _scaled(linear, weight.values.astype(np.float64), gain)
    if folded is None:
        return f"the weight of {linear.name!r} does not have {len(gain)} output channels"
    kind = weight.dtype
    new_weight = folded.astype(kind)
    new_bias = (gain * (offset - mean) + shift).astype(kind)
    if not (np.isfinite(new_weight).all() and np.isfinite(new_bias).all()):
        return f"the folded weights do not fit into {kind}"
    if linear.op == "Gemm":
        linear.attrs["beta"] = 1.0
    output = norm.outputs[0]
    norm.outputs.clear()
    norm.inputs.clear()
    linear.inputs = [
        linear.inputs[0],
        _constant(emitter, weight, weight.name, new_weight),
        _constant(emitter, bias, _bias_name(weight.name), new_bias),
    ]
    linear.outputs = [output]
    return None


def _offset(linear: gs.Node, bias: gs.Constant | None, channels: int) -> np.ndarray | None:
    """What ``linear`` adds to each output channel, [channels]; ``None`` where it differs from row to row."""
    if bias is None:
        return np.zeros(channels)
    values = bias.values.astype(np.float64)
    if linear.op != "Gemm":
        return values
    # C broadcasts to [rows, channels]: [], [1], [channels], [1, 1] and [1, channels] are the same for every row
    if values.ndim > 2 or (values.ndim == 2 and values.shape[0] != 1):
        return None
    return float(linear.attrs.get("beta", 1.0)) * np.broadcast_to(values.reshape(-1), (channels,))


def _scaled(linear: gs.Node, weight: np.ndarray, gain: np.ndarray) -> np.ndarray | None:
    """``weight`` with every output channel multiplied by its gain; ``None`` where the sizes do not fit."""
    channels = len(gain)
    if linear.op == "Gemm":
        axis = 0 if int(linear.attrs.get("transB", 0)) else 1
        if weight.ndim != 2 or weight.shape[axis] != channels:
            return None
        return weight * (gain[:, None] if axis == 0 else gain[None, :])
    if linear.op == "Conv":
        return weight * gain.reshape(-1, *[1] * (weight.ndim - 1)) if weight.shape[0] == channels else None
    group = int(linear.attrs.get("group", 1))
    if weight.shape[0] % group or weight.shape[1] * group != channels:
        return None
    # [C_in, C_out/group, k...] -> [group, C_in/group, C_out/group, k...]
    parts = weight.reshape(group, weight.shape[0] // group, *weight.shape[1:])
    gains = gain.reshape(group, 1, channels // group, *[1] * (weight.ndim - 2))
    return (parts * gains).reshape(weight.shape)


def _constant(emitter: Emitter, old: gs.Constant | None, name: str, values: np.ndarray) -> gs.Constant:
    """A new constant that takes over ``old``'s name, unless somebody else still uses that one."""
    if old is None or len(old.outputs) > 1:
        return gs.Constant(emitter.unique(name if old is None else old.name), values)
    return gs.Constant(old.name, values)


def _bias_name(weight: str) -> str:
    return weight.removesuffix("weight") + "bias" if weight.endswith("weight") else weight + ".bias"
