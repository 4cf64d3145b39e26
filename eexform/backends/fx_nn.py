"""Rules for operators with weights, pooling and normalisation (see :mod:`eexform.backends.fx`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import fx, nn

from eexform.backends.fx import Raiser, op
from eexform.backends.fx_norm import batch_norm, batch_norm_training, instance_norm, layer_norm_parts
from eexform.backends.fx_tree import StatelessBatchNorm
from eexform.backends.torch_types import torch_type
from eexform.errors import ModelError

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_FUNCTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_RUNNING = ("running_mean", "running_var")
_BATCH_NORM = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@op("Conv")
def _conv(raiser: Raiser, node: gs.Node) -> fx.Node:
    weight = node.inputs[1]
    rank = len(raiser.shape(node, 1) or ()) - 2
    if rank not in _CONV:
        raise ModelError(f"node {node.name!r} (Conv): {rank} spatial axes; torch has 1 to 3")
    stride, dilation = _list(node, "strides", rank), _list(node, "dilations", rank)
    bias, groups = node.inputs[2] if raiser.has(node, 2) else None, int(node.attrs.get("group", 1))
    held = isinstance(weight, gs.Constant) and isinstance(bias, gs.Constant | None)
    kernel = [int(size) for size in weight.shape[2:]] if isinstance(weight, gs.Constant) else None
    value, padding = _padded(raiser, node, raiser.value(node, 0), kernel, stride, dilation)
    if not held:
        operands = (raiser.value(node, 1), raiser.operand(bias) if bias is not None else None)
        return raiser.call(_CONV_FUNCTION[rank], value, *operands, stride, padding, dilation, groups)
    out_channels, per_group = int(weight.shape[0]), int(weight.shape[1])
    form: dict[str, Any] = {
        "kernel_size": tuple(weight.shape[2:]),
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": tuple(dilation),
    }
    module = _CONV[rank](per_group * groups, out_channels, **form, groups=groups, bias=bias is not None, device="meta")
    return raiser.module(node, module, [value], weight=weight, bias=bias)


@op("Gemm")
def _gemm(raiser: Raiser, node: gs.Node) -> fx.Node:
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    left, right = bool(node.attrs.get("transA", 0)), bool(node.attrs.get("transB", 0))
    weight, bias = node.inputs[1], node.inputs[2] if raiser.has(node, 2) else None
    plain = alpha == 1.0 and not left and right and isinstance(weight, gs.Constant)
    if plain and (
        bias is None or (beta == 1.0 and isinstance(bias, gs.Constant) and tuple(bias.shape) == (int(weight.shape[0]),))
    ):
        out_features, in_features = map(int, weight.shape)
        module = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
        return raiser.module(node, module, [raiser.value(node, 0)], weight=weight, bias=bias)
    addend = raiser.operand(bias) if bias is not None else None
    return raiser.call(gemm, raiser.value(node, 0), raiser.value(node, 1), addend, alpha, beta, left, right)


@op("MatMul")
def _matmul(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(torch.matmul, raiser.value(node, 0), raiser.value(node, 1))


@op("Einsum")
def _einsum(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(torch.einsum, node.attrs["equation"], *(raiser.operand(value) for value in node.inputs))


@op("BatchNormalization")
def _batch_norm(raiser: Raiser, node: gs.Node) -> fx.Node | Sequence[fx.Node]:
    eps = float(node.attrs.get("epsilon", 1e-5))
    if node.attrs.get("training_mode", 0):
        _statistics(raiser, node)
        operands, momentum = [raiser.value(node, place) for place in range(5)], float(node.attrs.get("momentum", 0.9))
        return raiser.pick(raiser.call(batch_norm_training, *operands, eps, momentum), len(node.outputs))
    if not all(isinstance(operand, gs.Constant) for operand in node.inputs[3:5]):
        return raiser.call(batch_norm, *(raiser.value(node, place) for place in range(5)), eps)
    rank = len(raiser.shape(node, 0) or ())
    if rank not in _BATCH_NORM:
        raise ModelError(f"node {node.name!r} (BatchNormalization): {rank or 'unknown'} axes; torch has 2 to 5")
    scale, bias, mean, var = node.inputs[1:5]
    # ONNX weighs the old statistics with momentum, torch the new ones; the attribute is float32, hence the rounding
    momentum = round(1.0 - float(node.attrs.get("momentum", 0.9)), 6)
    if not (isinstance(scale, gs.Constant) and isinstance(bias, gs.Constant)):
        return _borrowing_batch_norm(raiser, node, momentum, eps)
    module = _BATCH_NORM[rank](int(scale.shape[0]), eps=eps, momentum=momentum, device="meta")
    module.num_batches_tracked = torch.tensor(0)
    return raiser.module(
        node, module, [raiser.value(node, 0)], weight=scale, bias=bias, running_mean=mean, running_var=var
    )


def _borrowing_batch_norm(raiser: Raiser, node: gs.Node, momentum: float, eps: float) -> fx.Node:
    """Scale or bias are computed, the statistics held: they move while training, as in every batch normalisation."""
    _statistics(raiser, node)
    target = raiser.unique(node.name or node.op)
    raiser.root.add_module(target, StatelessBatchNorm(momentum, eps, ("weight", "bias", *_RUNNING)))
    return raiser.graph.call_module(target, tuple(raiser.value(node, place) for place in range(5)))


def _statistics(raiser: Raiser, node: gs.Node) -> None:
    """Running statistics are no parameters, whatever the rule does with them."""
    for tensor in node.inputs[3:5]:
        if isinstance(tensor, gs.Constant):
            raiser.tensor(tensor, trainable=False)


@op("LayerNormalization")
def _layer_norm(raiser: Raiser, node: gs.Node) -> fx.Node | Sequence[fx.Node]:
    scale, bias = node.inputs[1], node.inputs[2] if raiser.has(node, 2) else None
    eps, axis = float(node.attrs.get("epsilon", 1e-5)), int(node.attrs.get("axis", -1))
    if sum(not tensor.is_empty() for tensor in node.outputs) > 1:
        kind = torch_type(int(node.attrs.get("stash_type", 1)))
        operands = (raiser.operand(scale), None if bias is None else raiser.operand(bias))
        parts = raiser.call(layer_norm_parts, raiser.value(node, 0), *operands, axis, eps, kind)
        return raiser.pick(parts, len(node.outputs))
    sizes = (raiser.shape(node, 0) or ())[axis:]
    if (
        axis < 0
        and isinstance(scale, gs.Constant)
        and isinstance(bias, gs.Constant | None)
        and len(scale.shape) == -axis
        and (tuple(scale.shape) == sizes or 1 not in scale.shape)  # else it may broadcast
        and (bias is None or tuple(bias.shape) == tuple(scale.shape))
    ):
        module = nn.LayerNorm(list(scale.shape), eps=eps, bias=bias is not None, device="meta")
        return raiser.module(node, module, [raiser.value(node, 0)], weight=scale, bias=bias)
    addend = raiser.operand(bias) if bias is not None else None
    return raiser.call(layer_norm, raiser.value(node, 0), raiser.value(node, 1), addend, axis, eps)


@op("InstanceNormalization")
def _instance_norm(raiser: Raiser, node: gs.Node) -> fx.Node:
    value, scale, bias = (raiser.value(node, place) for place in range(3))
    return raiser.call(instance_norm, value, scale, bias, float(node.attrs.get("epsilon", 1e-5)))


# -- torch functions for what torch has no single call for ---------------------------------------------------------


def gemm(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None, alpha: float, beta: float, left: bool, right: bool
) -> torch.Tensor:
    """``alpha * a b + beta * c`` with ``a`` and ``b`` transposed where told."""
    product = torch.matmul(a.mT if left else a, b.mT if right else b)
    product = product if alpha == 1.0 else product * alpha
    return product if c is None else product + (c if beta == 1.0 else c * beta)


def layer_norm(
    value: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, axis: int, eps: float
) -> torch.Tensor:
    """Normalise over the axes from ``axis`` on; scale and bias may broadcast."""
    normal = F.layer_norm(value, value.shape[axis:], eps=eps) * scale
    return normal if bias is None else normal + bias


def pad_same(
    value: torch.Tensor,
    kernel: Sequence[int] | torch.Tensor,
    stride: Sequence[int],
    dilation: Sequence[int],
    upper: bool,
) -> torch.Tensor:
    """``auto_pad`` SAME: make the output have ``ceil(size / stride)`` places; odd ones at the end if ``upper``.

    ``kernel`` may be the weight itself, where that is computed.
    """
    kernel = kernel.shape[2:] if isinstance(kernel, torch.Tensor) else kernel
    flat: list[int] = []
    for place in reversed(range(len(kernel))):
        size, step = value.shape[2 + place], stride[place]
        total = max(0, (-(-size // step) - 1) * step + (kernel[place] - 1) * dilation[place] + 1 - size)
        small, large = total // 2, total - total // 2
        flat += [small, large] if upper else [large, small]
    return F.pad(value, flat)


# -- reading attributes --------------------------------------------------------------------------------------------


def _list(node: gs.Node, name: str, length: int, default: int = 1) -> list[int]:
    found: Any = node.attrs.get(name)
    return [default] * length if not found else [int(number) for number in found]


def _padded(
    raiser: Raiser, node: gs.Node, value: fx.Node, kernel: list[int] | None, stride: list[int], dilation: list[int]
) -> tuple[fx.Node, list[int]]:
    """The value to hand to torch and the padding to ask torch for: uneven padding is done by a call in front.

    ``kernel`` is ``None`` where the weight is computed.
    """
    rank, auto = len(stride), node.attrs.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        window = raiser.value(node, 1) if kernel is None else kernel
        return raiser.call(pad_same, value, window, stride, dilation, auto == "SAME_UPPER"), [0] * rank
    pads = _list(node, "pads", 2 * rank, 0) if auto != "VALID" else [0] * (2 * rank)
    if pads[:rank] == pads[rank:]:
        return value, pads[:rank]
    flat = [amount for place in reversed(range(rank)) for amount in (pads[place], pads[rank + place])]
    return raiser.call(F.pad, value, flat), [0] * rank
