"""Rules for quantised operators (see :mod:`eexform.backends.fx`).

They compute what ONNX says of them; rounding has no useful gradient, so no training goes through ``QuantizeLinear``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import fx

from eexform.backends.fx import Raiser, op
from eexform.backends.fx_cast import cast_node, element_of
from eexform.backends.fx_nn import pad_same
from eexform.backends.fx_wide import to_signed
from eexform.backends.torch_types import torch_type
from eexform.errors import ModelError

_TYPE = onnx.TensorProto.DataType
_RANGES: dict[int, tuple[int, int]] = {
    _TYPE.UINT8: (0, 255), _TYPE.INT8: (-128, 127), _TYPE.UINT16: (0, 65535), _TYPE.INT16: (-32768, 32767),
    _TYPE.UINT4: (0, 15), _TYPE.INT4: (-8, 7), _TYPE.UINT2: (0, 3), _TYPE.INT2: (-2, 1),
}  # fmt: skip
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@op("QuantizeLinear")
def _quantize(raiser: Raiser, node: gs.Node) -> fx.Node:
    element = int(node.attrs.get("output_dtype", 0))
    if raiser.has(node, 2) and node.inputs[2].dtype is not None:
        element = element_of(node.inputs[2].dtype)
    element = element or int(_TYPE.UINT8)
    zero = raiser.value(node, 2) if raiser.has(node, 2) else None
    axis, block = int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0))
    scaled = raiser.call(scale_down, raiser.value(node, 0), raiser.value(node, 1), axis, block, _precision(node))
    if element in _RANGES:
        return raiser.call(to_integer, scaled, zero, axis, block, *_RANGES[element], torch_type(element))
    return cast_node(raiser, node, scaled, element)


@op("DequantizeLinear")
def _dequantize(raiser: Raiser, node: gs.Node) -> fx.Node:
    value, scale = raiser.value(node, 0), raiser.value(node, 1)
    zero = raiser.value(node, 2) if raiser.has(node, 2) else None
    axis, block = int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0))
    kind = torch_type(int(node.attrs["output_dtype"])) if node.attrs.get("output_dtype") else None
    return raiser.call(dequantize, value, scale, zero, axis, block, kind)


@op("DynamicQuantizeLinear")
def _dynamic_quantize(raiser: Raiser, node: gs.Node) -> Sequence[fx.Node]:
    return raiser.pick(raiser.call(dynamic_quantize, raiser.value(node, 0)), 3)


@op("MatMulInteger")
def _matmul_integer(raiser: Raiser, node: gs.Node) -> fx.Node:
    zeros = [raiser.value(node, place) if raiser.has(node, place) else None for place in (2, 3)]
    return raiser.call(matmul_integer, raiser.value(node, 0), raiser.value(node, 1), *zeros)


@op("QLinearMatMul")
def _qlinear_matmul(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(qlinear_matmul, *(raiser.value(node, place) for place in range(8)))


@op("ConvInteger")
def _conv_integer(raiser: Raiser, node: gs.Node) -> fx.Node:
    zeros = [raiser.value(node, place) if raiser.has(node, place) else None for place in (2, 3)]
    form = _conv_form(raiser, node, 1)
    return raiser.call(conv_integer, raiser.value(node, 0), raiser.value(node, 1), *zeros, *form)


@op("QLinearConv")
def _qlinear_conv(raiser: Raiser, node: gs.Node) -> fx.Node:
    bias = raiser.value(node, 8) if raiser.has(node, 8) else None
    values = [raiser.value(node, place) for place in range(8)]
    return raiser.call(qlinear_conv, *values, bias, *_conv_form(raiser, node, 3))


def _precision(node: gs.Node) -> torch.dtype | None:
    return torch_type(int(node.attrs["precision"])) if node.attrs.get("precision") else None


def _conv_form(raiser: Raiser, node: gs.Node, weight: int) -> tuple[list[int], list[int], list[int], int, str]:
    """Strides, paddings in torch's order, dilations, groups, ``auto_pad``."""
    rank = len(raiser.shape(node, weight) or ()) - 2
    if rank not in _CONV:
        raise ModelError(f"node {node.name!r} ({node.op}): {rank} spatial axes cannot be raised; torch has 1 to 3")
    pads = [int(amount) for amount in node.attrs.get("pads") or [0] * (2 * rank)]
    flat = [amount for place in reversed(range(rank)) for amount in (pads[place], pads[rank + place])]
    strides, dilations = ([int(n) for n in node.attrs.get(key) or [1] * rank] for key in ("strides", "dilations"))
    return strides, flat, dilations, int(node.attrs.get("group", 1)), str(node.attrs.get("auto_pad", "NOTSET"))


# -- torch functions -----------------------------------------------------------------------------------------------


def fitted(part: torch.Tensor, value: torch.Tensor, axis: int, block: int) -> torch.Tensor:
    """Scale or zero point in a shape that broadcasts: one number, one per place of ``axis``, or one per block."""
    if block:
        return part.repeat_interleave(block, axis).narrow(axis, 0, value.shape[axis])
    if part.numel() == 1:
        return part.reshape([1] * value.dim())
    shape = [1] * value.dim()
    shape[axis] = part.numel()
    return part.reshape(shape)


def scale_down(
    value: torch.Tensor, scale: torch.Tensor, axis: int, block: int, precision: torch.dtype | None
) -> torch.Tensor:
    by = fitted(scale, value, axis, block)
    return value / by if precision is None else value.to(precision) / by.to(precision)


def to_integer(
    value: torch.Tensor, zero: torch.Tensor | None, axis: int, block: int, low: int, high: int, kind: torch.dtype
) -> torch.Tensor:
    """Round half to even, add the zero point, stay in the range."""
    found = torch.round(value.to(torch.float32))
    if zero is not None:
        found = found + fitted(to_signed(zero).to(torch.float32), value, axis, block)
    return found.clamp(low, high).to(torch.int32).to(kind)


def dequantize(
    value: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    axis: int,
    block: int,
    kind: torch.dtype | None,
) -> torch.Tensor:
    number = to_signed(value).to(torch.float32)
    if zero is not None:
        number = number - fitted(to_signed(zero).to(torch.float32), value, axis, block)
    found = number * fitted(scale, value, axis, block).to(torch.float32)
    return found.to(scale.dtype if kind is None else kind)


def dynamic_quantize(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """To ``uint8`` by the range of the values, which always has the zero in it."""
    low, high = value.min().clamp(max=0.0), value.max().clamp(min=0.0)
    scale = (high - low) / 255.0
    zero = torch.round((-low / scale).clamp(0.0, 255.0))
    zero = torch.where(scale == 0, torch.zeros_like(zero), zero)
    found = (torch.round(value / scale) + zero).clamp(0.0, 255.0).to(torch.uint8)
    return found, scale, zero.to(torch.uint8)


def matmul_integer(
    left: torch.Tensor, right: torch.Tensor, left_zero: torch.Tensor | None, right_zero: torch.Tensor | None
) -> torch.Tensor:
    """Sums of products as ``int32``; zero points per row of the left and per column of the right."""
    a, b = left.to(torch.int32), right.to(torch.int32)
    if left_zero is not None:
        a = a - (left_zero if left_zero.dim() != 1 or left_zero.numel() == 1 else left_zero.unsqueeze(-1)).to(a.dtype)
    if right_zero is not None:
        b = b - right_zero.to(b.dtype)
    return torch.matmul(a, b)


def qlinear_matmul(
    left: torch.Tensor,
    left_scale: torch.Tensor,
    left_zero: torch.Tensor,
    right: torch.Tensor,
    right_scale: torch.Tensor,
    right_zero: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
) -> torch.Tensor:
    product = matmul_integer(left, right, left_zero, right_zero)
    by = _column(left_scale) * right_scale / scale
    return _requantized(product, by, zero)


def conv_integer(
    value: torch.Tensor,
    weight: torch.Tensor,
    value_zero: torch.Tensor | None,
    weight_zero: torch.Tensor | None,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    groups: int,
    auto: str,
) -> torch.Tensor:
    """As ``int32``; padding stands for the value's zero point. Computed in double precision, which is exact here."""
    x, w = value.to(torch.float64), weight.to(torch.float64)
    x = x if value_zero is None else x - value_zero.to(x.dtype)
    w = w if weight_zero is None else w - weight_zero.to(w.dtype).reshape(-1, *[1] * (w.dim() - 1))
    same = auto in ("SAME_UPPER", "SAME_LOWER")
    x = pad_same(x, w, strides, dilations, auto == "SAME_UPPER") if same else F.pad(x, list(pads))
    found = _CONV[w.dim() - 2](x, w, None, strides, 0, dilations, groups)
    return found.round().to(torch.int32)


def qlinear_conv(
    value: torch.Tensor,
    value_scale: torch.Tensor,
    value_zero: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bias: torch.Tensor | None,
    *form: Any,
) -> torch.Tensor:
    found = conv_integer(value, weight, value_zero, weight_zero, *form)
    channels = [-1, *[1] * (weight.dim() - 2)]
    if bias is not None:
        found = found + bias.reshape(channels)
    return _requantized(found, value_scale * weight_scale.reshape(channels) / scale, zero)


def _column(scale: torch.Tensor) -> torch.Tensor:
    return scale.unsqueeze(-1) if scale.dim() == 1 and scale.numel() > 1 else scale


def _requantized(found: torch.Tensor, by: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    limits = torch.iinfo(zero.dtype)
    scaled = torch.round(found.to(torch.float64) * by.to(torch.float64)) + zero.to(torch.float64)
    return scaled.clamp(limits.min, limits.max).to(zero.dtype)
