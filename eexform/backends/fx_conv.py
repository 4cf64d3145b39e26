"""Rules for relatives of convolution (see :mod:`eexform.backends.fx`; convolution itself is in ``fx_nn``)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import fx

from eexform.backends.fx import Raiser, op
from eexform.backends.fx_pool import flat_pads
from eexform.backends.fx_shapes import Ints, as_ints
from eexform.errors import ModelError

_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@op("ConvTranspose")
def _conv_transpose(raiser: Raiser, node: gs.Node) -> fx.Node:
    rank = len(raiser.shape(node, 1) or ()) - 2
    if rank not in _CONV_TRANSPOSE:
        raise ModelError(f"node {node.name!r} (ConvTranspose): {rank} spatial axes cannot be raised; torch has 1 to 3")
    auto = str(node.attrs.get("auto_pad", "NOTSET"))
    pads = [0] * (2 * rank) if auto == "VALID" else _numbers(node, "pads", 2 * rank, 0)
    stride, dilation = _numbers(node, "strides", rank, 1), _numbers(node, "dilations", rank, 1)
    more, groups = _numbers(node, "output_padding", rank, 0), int(node.attrs.get("group", 1))
    bias = raiser.value(node, 2) if raiser.has(node, 2) else None
    operands = (raiser.value(node, 0), raiser.value(node, 1), bias)
    target = node.attrs.get("output_shape")
    same = auto in ("SAME_UPPER", "SAME_LOWER")
    if not same and not target and pads[:rank] == pads[rank:]:
        arguments = (stride, pads[:rank], more, groups, dilation)
        return raiser.call(_CONV_TRANSPOSE[rank], *operands, *arguments)
    size = [int(number) for number in target][-rank:] if target else None
    return raiser.call(conv_transpose, *operands, stride, pads, more, groups, dilation, auto, size)


@op("Col2Im")
def _col2im(raiser: Raiser, node: gs.Node) -> fx.Node:
    attributes = [[int(number) for number in node.attrs.get(name) or []] for name in ("strides", "dilations", "pads")]
    return raiser.call(columns_to_image, raiser.value(node, 0), raiser.ints(node, 1), raiser.ints(node, 2), *attributes)


@op("DeformConv")
def _deformable(raiser: Raiser, node: gs.Node) -> fx.Node:
    weight_shape = raiser.shape(node, 1) or ()
    if len(weight_shape) != 4:
        raise ModelError(f"node {node.name!r} (DeformConv): only images [N, C, H, W] can be raised to torch")
    given = [raiser.value(node, place) if raiser.has(node, place) else None for place in range(5)]
    groups, offset_groups = int(node.attrs.get("group", 1)), int(node.attrs.get("offset_group", 1))
    stride, dilation = _numbers(node, "strides", 2, 1), _numbers(node, "dilations", 2, 1)
    pads = _numbers(node, "pads", 4, 0)
    return raiser.call(deformable_conv, *given, stride, dilation, pads, groups, offset_groups)


@op("CausalConvWithState")
def _causal_conv(raiser: Raiser, node: gs.Node) -> Sequence[fx.Node]:
    given = [raiser.value(node, place) if raiser.has(node, place) else None for place in range(4)]
    activation = str(node.attrs.get("activation", "none"))
    if activation not in ("none", "silu", "swish"):
        raise ModelError(f"node {node.name!r} (CausalConvWithState): activation {activation!r} cannot be raised")
    return raiser.pick(raiser.call(causal_conv, *given, activation != "none"), 2)


# -- torch functions for what torch has no single call for ---------------------------------------------------------


def conv_transpose(
    value: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    pads: list[int],
    more: list[int],
    groups: int,
    dilation: list[int],
    auto: str,
    size: list[int] | None,
) -> torch.Tensor:
    """Transposed convolution with any padding.

    Args:
        value, weight, bias: ``[N, C, ...]``, ``[C, M/groups, ...]``, ``[M]``.
        stride, dilation: one number per spatial axis.
        pads: what is cut off, all beginnings, then all ends; not used where the size is given.
        more: places that the result has more at the ends (``output_padding``).
        groups: number of groups of channels.
        auto: ``auto_pad``; SAME makes the result ``stride`` times as big as the value.
        size: spatial size of the result.
    """
    rank = len(stride)
    result = _CONV_TRANSPOSE[rank](value, weight, bias, stride, 0, more, groups, dilation)
    if size is None and auto in ("SAME_UPPER", "SAME_LOWER"):
        size = [length * step for length, step in zip(value.shape[2:], stride, strict=True)]
    begins, ends = pads[:rank], pads[rank:]
    if size is not None:
        total = [have - wanted for have, wanted in zip(result.shape[2:], size, strict=True)]
        small = [amount // 2 for amount in total]
        large = [amount - half for amount, half in zip(total, small, strict=True)]
        begins, ends = (small, large) if auto == "SAME_UPPER" else (large, small)
    return F.pad(result, flat_pads([-begin for begin in begins], [-end for end in ends]))


def columns_to_image(
    blocks: torch.Tensor, image: Ints, block: Ints, stride: list[int], dilation: list[int], pads: list[int]
) -> torch.Tensor:
    """Blocks ``[N, C * product(block), L]`` added up at their places in an image ``[N, C, *image]``."""
    sizes, kernel = as_ints(image), as_ints(block)
    rank = len(kernel)
    stride, dilation, pads = stride or [1] * rank, dilation or [1] * rank, pads or [0] * (2 * rank)
    padded = [sizes[axis] + pads[axis] + pads[rank + axis] for axis in range(rank)]
    windows = [(padded[axis] - (kernel[axis] - 1) * dilation[axis] - 1) // stride[axis] + 1 for axis in range(rank)]
    device = blocks.device
    flat = torch.zeros([1] * (2 * rank), dtype=torch.int64, device=device)
    for axis in range(rank):
        within = torch.arange(kernel[axis], device=device) * dilation[axis]
        start = torch.arange(windows[axis], device=device) * stride[axis]
        at = within.reshape([-1 if place == axis else 1 for place in range(2 * rank)]) + start.reshape(
            [-1 if place == rank + axis else 1 for place in range(2 * rank)]
        )
        flat = flat * padded[axis] + at
    channels = blocks.shape[1] // math.prod(kernel)
    values = blocks.reshape(blocks.shape[0], channels, -1)
    places = flat.reshape(1, 1, -1).expand_as(values)
    result = values.new_zeros(blocks.shape[0], channels, math.prod(padded)).scatter_add(2, places, values)
    result = result.reshape(blocks.shape[0], channels, *padded)
    return F.pad(result, flat_pads([-pad for pad in pads[:rank]], [-pad for pad in pads[rank:]]))


def deformable_conv(
    value: torch.Tensor,
    weight: torch.Tensor,
    offset: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    stride: list[int],
    dilation: list[int],
    pads: list[int],
    groups: int,
    offset_groups: int,
) -> torch.Tensor:
    """Convolution whose kernel reads at shifted places (Dai et al. 2017), weighted by a mask (Zhu et al. 2019).

    Args:
        value: ``[N, C, H, W]``.
        weight: ``[M, C/groups, kH, kW]``.
        offset: ``[N, offset_groups*kH*kW*2, oH, oW]``, vertical before horizontal.
        bias: ``[M]``.
        mask: ``[N, offset_groups*kH*kW, oH, oW]``.
        stride, dilation, pads: as in a convolution.
        groups: groups of channels of the convolution.
        offset_groups: groups of channels with offsets of their own.
    """
    batch = value.shape[0]
    outputs, _, high, wide = weight.shape
    rows, columns = offset.shape[2:]
    shift = offset.reshape(batch, offset_groups, high, wide, 2, rows, columns)
    scale = None if mask is None else mask.reshape(batch, offset_groups, high, wide, rows, columns)
    start_y = torch.arange(rows, device=value.device, dtype=value.dtype).unsqueeze(1) * stride[0] - pads[0]
    start_x = torch.arange(columns, device=value.device, dtype=value.dtype) * stride[1] - pads[1]
    result = value.new_zeros(batch, outputs, rows, columns)
    for row, column in itertools.product(range(high), range(wide)):
        y = start_y + row * dilation[0] + shift[:, :, row, column, 0]
        x = start_x + column * dilation[1] + shift[:, :, row, column, 1]
        read = _read_between(value.unflatten(1, (offset_groups, -1)), y, x)
        if scale is not None:
            read = read * scale[:, :, row, column].unsqueeze(2)
        kernel = weight[:, :, row : row + 1, column : column + 1]
        result = result + F.conv2d(read.flatten(1, 2), kernel, None, groups=groups)
    return result if bias is None else result + bias.reshape(1, -1, 1, 1)


def causal_conv(
    value: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    past: torch.Tensor | None,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Depthwise convolution of ``[N, C, T]`` over what came before, kernels ``[C, 1, k]``; and its last k-1 places."""
    kept = weight.shape[2] - 1
    before = value.new_zeros(value.shape[0], value.shape[1], kept) if past is None else past
    sequence = torch.cat([before, value], 2)
    result = F.conv1d(sequence, weight, bias, groups=value.shape[1])
    return F.silu(result) if silu else result, sequence[:, :, sequence.shape[2] - kept :]


def _read_between(value: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``[N, G, C, H, W]`` read at ``[N, G, oH, oW]`` places, linear between pixels and zero outside."""
    height, width = value.shape[3:]
    flat, result = value.flatten(3), 0.0
    for side_y, side_x in itertools.product((0, 1), (0, 1)):
        row, column = y.floor() + side_y, x.floor() + side_x
        weight = (1 - (y - row).abs()) * (1 - (x - column).abs())
        weight = weight * ((row >= 0) & (row < height) & (column >= 0) & (column < width))
        place = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
        index = place.to(torch.int64).flatten(2).unsqueeze(2).expand(-1, -1, value.shape[2], -1)
        result = result + flat.gather(3, index).unflatten(3, y.shape[2:]) * weight.unsqueeze(2)
    return torch.as_tensor(result)


def _numbers(node: gs.Node, name: str, length: int, default: int) -> list[int]:
    found: Any = node.attrs.get(name)
    return [int(number) for number in found] if found else [default] * length
