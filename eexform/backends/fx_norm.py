"""Rules for normalisation beyond torch's modules (see :mod:`eexform.backends.fx`)."""

from __future__ import annotations

import math
from typing import Any

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import fx

from eexform.backends.fx import Raiser, op
from eexform.backends.torch_types import torch_type


@op("RMSNormalization")
def _rms_norm(raiser: Raiser, node: gs.Node) -> fx.Node:
    eps, axis = float(node.attrs.get("epsilon", 1e-5)), int(node.attrs.get("axis", -1))
    kind = torch_type(int(node.attrs.get("stash_type", 1)))
    return raiser.call(rms_norm, raiser.value(node, 0), raiser.value(node, 1), axis, eps, kind)


@op("GroupNormalization")
def _group_norm(raiser: Raiser, node: gs.Node) -> fx.Node:
    value, scale, bias = (raiser.value(node, place) for place in range(3))
    groups, eps = int(node.attrs["num_groups"]), float(node.attrs.get("epsilon", 1e-5))
    per_group = raiser.source.opset < 21  # scale and bias had one element per group before, one per channel since
    return raiser.call(group_norm, value, scale, bias, groups, eps, per_group)


@op("LpNormalization")
def _lp_norm(raiser: Raiser, node: gs.Node) -> fx.Node:
    power, axis = int(node.attrs.get("p", 2)), int(node.attrs.get("axis", -1))
    return raiser.call(lp_norm, raiser.value(node, 0), power, axis)


@op("LRN")
def _local_response(raiser: Raiser, node: gs.Node) -> fx.Node:
    alpha, beta = float(node.attrs.get("alpha", 1e-4)), float(node.attrs.get("beta", 0.75))
    size, bias = int(node.attrs["size"]), float(node.attrs.get("bias", 1.0))
    return raiser.call(local_response_norm, raiser.value(node, 0), size, alpha, beta, bias)


@op("MeanVarianceNormalization")
def _mean_variance(raiser: Raiser, node: gs.Node) -> fx.Node:
    axes: Any = node.attrs.get("axes") or [0, 2, 3]
    return raiser.call(mean_variance_norm, raiser.value(node, 0), [int(axis) for axis in axes])


# -- torch functions -----------------------------------------------------------------------------------------------


def rms_norm(value: torch.Tensor, scale: torch.Tensor, axis: int, eps: float, kind: torch.dtype) -> torch.Tensor:
    """Divided by the root mean square over the axes from ``axis`` on, in ``kind`` or wider."""
    over = list(range(axis % value.dim(), value.dim()))
    wide = value.to(torch.promote_types(kind, value.dtype))
    normal = wide * torch.rsqrt((wide * wide).mean(over, keepdim=True) + eps)
    return normal.to(value.dtype) * scale


def layer_norm_parts(
    value: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, axis: int, eps: float, kind: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Layer normalisation, its means, and one over its standard deviations, computed in ``kind``."""
    over = list(range(axis % value.dim(), value.dim()))
    wide = value.to(torch.promote_types(kind, value.dtype))
    centre = wide.mean(over, keepdim=True)
    inverse = torch.rsqrt((wide - centre).square().mean(over, keepdim=True) + eps)
    normal = ((wide - centre) * inverse).to(value.dtype) * scale
    return normal if bias is None else normal + bias, centre, inverse


def group_norm(
    value: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, per_group: bool
) -> torch.Tensor:
    if per_group:
        repeats = value.shape[1] // groups
        scale, bias = scale.repeat_interleave(repeats), bias.repeat_interleave(repeats)
    return torch.group_norm(value, groups, scale, bias, eps)  # the one in F refuses groups of one element


def lp_norm(value: torch.Tensor, power: int, axis: int) -> torch.Tensor:
    """Divided by the norm along an axis; zeros where that is zero."""
    norm = torch.linalg.vector_norm(value, power, axis, keepdim=True)
    none = norm == 0
    return torch.where(none, torch.zeros_like(value), value / torch.where(none, torch.ones_like(norm), norm))


def local_response_norm(value: torch.Tensor, size: int, alpha: float, beta: float, bias: float) -> torch.Tensor:
    """Divided by ``(bias + alpha / size * s) ** beta``, s the sum of squares over ``size`` neighbouring channels."""
    before = (size - 1) // 2
    flat = value.square().flatten(2).unsqueeze(1)  # [N, 1, C, M]
    padded = F.pad(flat, (0, 0, before, size - 1 - before))
    total = F.avg_pool2d(padded, (size, 1), stride=1) * size
    return value / (bias + alpha / size * total.reshape(value.shape)) ** beta


def mean_variance_norm(value: torch.Tensor, axes: list[int]) -> torch.Tensor:
    """``(x - mean) / (deviation + 1e-9)`` over the axes."""
    centred = value - value.mean(axes, keepdim=True)
    deviation = torch.linalg.vector_norm(centred, 2, axes, keepdim=True)  # its gradient at zero is zero, not NaN
    return centred / (deviation / math.sqrt(math.prod(value.shape[axis] for axis in axes)) + 1e-9)


def batch_norm(
    value: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, var: torch.Tensor, eps: float
) -> torch.Tensor:
    """Normalised with statistics that are computed: torch's own function has no gradient for these."""
    channels = [-1, *[1] * (value.dim() - 2)]
    factor = scale * torch.rsqrt(var + eps)
    return value * factor.reshape(channels) + (bias - mean * factor).reshape(channels)


def instance_norm(value: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalised over the places of each channel of each sample."""
    if value.shape[0] == 0 or math.prod(value.shape[2:]) == 1:  # torch refuses an empty batch and single places
        channels = [-1, *[1] * (value.dim() - 2)]
        return (value - value) * scale.reshape(channels) + bias.reshape(channels)
    return F.instance_norm(value, weight=scale, bias=bias, eps=eps)


def batch_norm_training(
    value: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    momentum: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised with the batch's own statistics; and the running ones moved towards these (``momentum`` stays)."""
    over = [axis for axis in range(value.dim()) if axis != 1]
    own_var, own_mean = torch.var_mean(value, over, correction=0)
    normal = F.batch_norm(value, None, None, scale, bias, True, 0.0, eps)
    return normal, mean * momentum + own_mean * (1 - momentum), var * momentum + own_var * (1 - momentum)
