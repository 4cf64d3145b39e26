"""Rules for softmax, its relatives and less common activations (see :mod:`eexform.backends.fx`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import fx, nn

from eexform.backends.fx import Raiser, op

_ONE_AXIS_SINCE = 13
"""Softmax and its relatives of older operator sets work on a matrix: all axes from ``axis`` on are one."""


@op("Softmax", "LogSoftmax", "Hardmax")
def _softmax(raiser: Raiser, node: gs.Node) -> fx.Node:
    if raiser.source.opset < _ONE_AXIS_SINCE:
        return raiser.call(over_matrix, raiser.value(node, 0), node.op, int(node.attrs.get("axis", 1)))
    return raiser.call(_ALONG[node.op], raiser.value(node, 0), dim=int(node.attrs.get("axis", -1)))


@op("PRelu")
def _prelu(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(prelu, raiser.value(node, 0), raiser.value(node, 1), raiser.source.opset < 7)


@op("Celu")
def _celu(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(F.celu, raiser.value(node, 0), float(node.attrs.get("alpha", 1.0)))


@op("ThresholdedRelu")
def _thresholded_relu(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(F.threshold, raiser.value(node, 0), float(node.attrs.get("alpha", 1.0)), 0.0)


@op("Shrink")
def _shrink(raiser: Raiser, node: gs.Node) -> fx.Node:
    lambd, bias = float(node.attrs.get("lambd", 0.5)), float(node.attrs.get("bias", 0.0))
    return raiser.call(shrink, raiser.value(node, 0), lambd, bias)


@op("SwiGLU")
def _swiglu(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(swiglu, raiser.value(node, 0), raiser.value(node, 1), float(node.attrs.get("alpha", 1.0)))


@op("Dropout")
def _dropout(raiser: Raiser, node: gs.Node) -> fx.Node | Sequence[fx.Node]:
    with_mask = len(node.outputs) > 1 and not node.outputs[1].is_empty()
    ratio, training = raiser.number(node, 1, float(node.attrs.get("ratio", 0.5))), raiser.number(node, 2)
    if training is None and not with_mask and not isinstance(ratio, fx.Node):
        return raiser.module(node, nn.Dropout(ratio), [raiser.value(node, 0)])
    found = raiser.call(dropout, raiser.value(node, 0), ratio, False if training is None else training)
    return raiser.pick(found, len(node.outputs))


# -- torch functions for what torch has no single call for ---------------------------------------------------------


def over_matrix(value: torch.Tensor, kind: str, axis: int) -> torch.Tensor:
    """Operator ``kind`` along the rows of a matrix made of the axes before ``axis`` and those from it on."""
    axis %= value.dim()
    sizes = math.prod(value.shape[:axis]), math.prod(value.shape[axis:])
    return _ALONG[kind](value.reshape(sizes), dim=1).reshape(value.shape)


def hardmax(value: torch.Tensor, dim: int) -> torch.Tensor:
    """One at the first of the greatest elements, zero elsewhere."""
    if value.shape[dim] == 0:  # of nothing there is no greatest
        return torch.zeros_like(value)
    return torch.zeros_like(value).scatter(dim, value.argmax(dim, keepdim=True), 1)


def prelu(value: torch.Tensor, slope: torch.Tensor, per_channel: bool) -> torch.Tensor:
    """The slope broadcasts against the value from the right; ``per_channel``: one per channel, the second axis."""
    if slope.dim() == 1 and slope.shape[0] > 1 and per_channel:
        slope = slope.reshape(-1, *[1] * (value.dim() - 2))
    return torch.where(value < 0, value * slope, value)


def shrink(value: torch.Tensor, lambd: float, bias: float) -> torch.Tensor:
    """Moved towards zero by ``bias`` beyond ``lambd``, zero within."""
    zero = torch.zeros_like(value)
    moved = torch.where(value < -lambd, value + bias, torch.where(value > lambd, value - bias, zero))
    return moved.to(value.dtype)


def swiglu(gate: torch.Tensor, value: torch.Tensor, alpha: float) -> torch.Tensor:
    return gate * torch.sigmoid(alpha * gate) * value


def dropout(
    value: torch.Tensor, ratio: float | torch.Tensor, training: bool | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The value and what was kept of it; everything unless ``training`` (the operator's own input) says otherwise."""
    share = float(ratio)
    if not bool(training) or share == 0.0:
        return value, torch.ones_like(value, dtype=torch.bool)
    kept = torch.rand_like(value) >= share
    return torch.where(kept, value / (1.0 - share), torch.zeros_like(value)), kept


_ALONG: dict[str, Callable[..., torch.Tensor]] = {
    "Softmax": torch.softmax,
    "LogSoftmax": torch.log_softmax,
    "Hardmax": hardmax,
}
