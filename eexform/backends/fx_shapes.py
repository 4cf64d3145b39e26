"""Rules for operators that rearrange data and compute shapes (see :mod:`eexform.backends.fx`)."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import fx

from eexform.backends.fx import Raiser, op
from eexform.backends.fx_numbers import numbers
from eexform.backends.fx_wide import SIGNED, has_wide, on_signed
from eexform.backends.torch_types import to_tensor, torch_type
from eexform.errors import ModelError

Ints = Sequence[int] | torch.Tensor
"""Integers known when the module is made, or a tensor computed while it runs."""


@op("Constant")
def _constant(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.operand(gs.Constant(node.outputs[0].name, _constant_value(node)))


def _constant_value(node: gs.Node) -> np.ndarray:
    (form, value), *_ = node.attrs.items()
    if form == "value" and isinstance(value, gs.Constant):
        return _loaded(value)
    if form in ("value_int", "value_ints"):
        return np.array(value, np.int64)
    if form in ("value_float", "value_floats"):
        return np.array(value, np.float32)
    raise ModelError(f"node {node.name!r} (Constant): strings and sparse tensors cannot be raised to torch ({form})")


def _loaded(constant: gs.Constant) -> np.ndarray:
    """The content; onnx-graphsurgeon leaves types that numpy lacks in a form of its own."""
    values = constant.values
    return onnx.numpy_helper.to_array(values) if isinstance(values, onnx.TensorProto) else np.asarray(values)


@op("Concat")
def _concat(raiser: Raiser, node: gs.Node) -> fx.Node:
    values = [raiser.operand(tensor) for tensor in node.inputs]
    return raiser.call(torch.cat, values, int(node.attrs["axis"]))


@op("Split")
def _split(raiser: Raiser, node: gs.Node) -> Sequence[fx.Node]:
    value, pieces, axis = raiser.value(node, 0), raiser.ints(node, 1, "split"), int(node.attrs.get("axis", 0))
    if isinstance(pieces, list):
        parts = raiser.call(torch.split, value, pieces, axis)
    else:
        parts = raiser.call(split, value, pieces, len(node.outputs), axis)
    return raiser.pick(parts, len(node.outputs))


@op("Slice")
def _slice(raiser: Raiser, node: gs.Node) -> fx.Node:
    starts, ends = raiser.ints(node, 1, "starts"), raiser.ints(node, 2, "ends")
    axes, steps = raiser.ints(node, 3, "axes"), raiser.ints(node, 4)
    taken = _static_slice(starts, ends, axes, steps)
    if taken is not None:  # one indexing call
        return raiser.call(operator.getitem, raiser.value(node, 0), taken)
    return raiser.call(cut, raiser.value(node, 0), starts, ends, axes, steps)


def _static_slice(starts: Any, ends: Any, axes: Any, steps: Any) -> tuple[slice, ...] | None:
    """Python slices, where all numbers are known and count up and the axes are counted from the front."""
    if not isinstance(starts, list) or not isinstance(ends, list):
        return None
    over = list(range(len(starts))) if axes is None else axes
    pace = [1] * len(starts) if steps is None else steps
    if not isinstance(over, list) or not isinstance(pace, list) or not over or min(over) < 0 or min(pace) < 1:
        return None
    taken = [slice(None)] * (max(over) + 1)
    for start, end, axis, step in zip(starts, ends, over, pace, strict=True):
        taken[axis] = slice(start, end, step)
    return tuple(taken)


@op("Reshape")
def _reshape(raiser: Raiser, node: gs.Node) -> fx.Node:
    shape, keep_zero = raiser.ints(node, 1, "shape"), bool(node.attrs.get("allowzero", 0))
    if isinstance(shape, list) and shape and (keep_zero or 0 not in shape):
        return raiser.call(torch.reshape, raiser.value(node, 0), shape)
    sizes = None if isinstance(shape, list) else raiser.sizes(node, 1)
    if sizes is not None:
        return raiser.call(torch.reshape, raiser.value(node, 0), _one_open(sizes))
    return raiser.call(reshape, raiser.value(node, 0), shape, keep_zero)


def _one_open(sizes: list[Any]) -> list[Any]:
    """With -1 for the size that is not a number, where it is the only one: torch then need not be told."""
    computed = [place for place, size in enumerate(sizes) if not isinstance(size, int)]
    if len(computed) != 1 or 0 in sizes:
        return sizes
    return [-1 if place in computed else size for place, size in enumerate(sizes)]


@op("Flatten")
def _flatten(raiser: Raiser, node: gs.Node) -> fx.Node:
    axis, shape = int(node.attrs.get("axis", 1)), raiser.shape(node, 0)
    if axis == 1 and shape is not None and len(shape) > 1:
        return raiser.call(torch.flatten, raiser.value(node, 0), 1)
    return raiser.call(flatten, raiser.value(node, 0), axis)


@op("Squeeze")
def _squeeze(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(squeeze, raiser.value(node, 0), raiser.ints(node, 1, "axes"))


@op("Unsqueeze")
def _unsqueeze(raiser: Raiser, node: gs.Node) -> fx.Node:
    axes = raiser.ints(node, 1, "axes")
    if isinstance(axes, list) and len(axes) == 1:
        return raiser.call(torch.unsqueeze, raiser.value(node, 0), axes[0])
    return raiser.call(unsqueeze, raiser.value(node, 0), axes)


@op("Transpose")
def _transpose(raiser: Raiser, node: gs.Node) -> fx.Node:
    order = node.attrs.get("perm")
    if order is None:
        return raiser.call(reverse_axes, raiser.value(node, 0))
    return raiser.call(torch.permute, raiser.value(node, 0), [int(axis) for axis in order])


@op("Expand")
def _expand(raiser: Raiser, node: gs.Node) -> fx.Node:
    shape = raiser.ints(node, 1)
    sizes = None if isinstance(shape, list) else raiser.sizes(node, 1)
    if sizes is not None:
        return raiser.call(torch.Tensor.expand, raiser.value(node, 0), sizes)
    return raiser.call(expand, raiser.value(node, 0), shape)


@op("Tile")
def _tile(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(tile, raiser.value(node, 0), raiser.ints(node, 1))


@op("Pad")
def _pad(raiser: Raiser, node: gs.Node) -> fx.Node:
    mode = str(node.attrs.get("mode", "constant"))
    if mode not in ("constant", "reflect", "edge", "wrap"):
        raise ModelError(f"node {node.name!r} (Pad): mode {mode!r} cannot be raised to torch")
    fill = node.attrs["value"] if "value" in node.attrs else raiser.number(node, 2, 0.0)
    return raiser.call(pad, raiser.value(node, 0), raiser.ints(node, 1, "pads"), raiser.ints(node, 3), mode, fill)


@op("Shape")
def _shape(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(shape_of, raiser.value(node, 0), int(node.attrs.get("start", 0)), node.attrs.get("end"))


@op("ConstantOfShape")
def _constant_of_shape(raiser: Raiser, node: gs.Node) -> fx.Node:
    value = node.attrs.get("value")
    held = torch.zeros(1) if value is None else to_tensor(_loaded(value) if isinstance(value, gs.Constant) else value)
    return raiser.call(filled, raiser.value(node, 0), raiser.ints(node, 0), held.reshape(-1)[0].item(), held.dtype)


@op("Range")
def _range(raiser: Raiser, node: gs.Node) -> fx.Node:
    form = raiser.ints if all(numbers(raiser, tensor) is not None for tensor in node.inputs) else raiser.value
    return raiser.call(count_up, raiser.value(node, 0), *(form(node, place) for place in range(3)))


@op("EyeLike")
def _eye_like(raiser: Raiser, node: gs.Node) -> fx.Node:
    kind = node.attrs.get("dtype")
    dtype = None if kind is None else torch_type(kind)
    return raiser.call(eye_like, raiser.value(node, 0), int(node.attrs.get("k", 0)), dtype)


@op("Trilu")
def _trilu(raiser: Raiser, node: gs.Node) -> fx.Node:
    upper, diagonal = bool(node.attrs.get("upper", 1)), raiser.number(node, 1, 0)
    if isinstance(diagonal, fx.Node) or has_wide(raiser.source):
        return raiser.call(triangle, raiser.value(node, 0), diagonal, upper)
    return raiser.call(torch.triu if upper else torch.tril, raiser.value(node, 0), int(diagonal))


@op("DepthToSpace")
def _depth_to_space(raiser: Raiser, node: gs.Node) -> fx.Node:
    depth_first = node.attrs.get("mode", "DCR") != "CRD"
    return raiser.call(depth_to_space, raiser.value(node, 0), int(node.attrs["blocksize"]), depth_first)


@op("SpaceToDepth")
def _space_to_depth(raiser: Raiser, node: gs.Node) -> fx.Node:
    depth_first = node.attrs.get("mode", "DCR") != "CRD"
    return raiser.call(space_to_depth, raiser.value(node, 0), int(node.attrs["blocksize"]), depth_first)


@op("CenterCropPad")
def _center_crop_pad(raiser: Raiser, node: gs.Node) -> fx.Node:
    axes = node.attrs.get("axes")
    over = None if axes is None else [int(axis) for axis in axes]
    return raiser.call(center_crop_pad, raiser.value(node, 0), raiser.ints(node, 1), over)


# -- torch functions for what torch has no single call for ---------------------------------------------------------


def split(value: torch.Tensor, pieces: Ints | None, count: int, axis: int) -> tuple[torch.Tensor, ...]:
    """Equal pieces, the last one smaller, where no sizes are given."""
    if pieces is not None:
        return torch.split(value, as_ints(pieces), axis)
    size = value.shape[axis]
    each = -(-size // count)
    return torch.split(value, [max(0, min(each, size - each * place)) for place in range(count)], axis)


def cut(value: torch.Tensor, starts: Ints, ends: Ints, axes: Ints | None, steps: Ints | None) -> torch.Tensor:
    """ONNX ``Slice``; steps may be negative."""
    first, last = as_ints(starts), as_ints(ends)
    over = list(range(len(first))) if axes is None else as_ints(axes)
    pace = [1] * len(first) if steps is None else as_ints(steps)
    for start, end, axis, step in zip(first, last, over, pace, strict=True):
        size = value.shape[axis]
        if step > 0:
            taken = [slice(None)] * value.dim()
            taken[axis] = slice(start, end, step)
            value = value[tuple(taken)]
        else:
            # other than Python's slices: a start in front of the first place is the first place
            begin = min(max(start + size if start < 0 else start, 0), size - 1)
            stop = min(max(end + size if end < 0 else end, -1), size - 1)
            places = list(range(begin, stop, step))
            value = value.index_select(axis, torch.tensor(places, dtype=torch.int64, device=value.device))
    return value


def reshape(value: torch.Tensor, shape: Ints, keep_zero: bool) -> torch.Tensor:
    """A 0 copies the input's dimension unless ``keep_zero``."""
    sizes = as_ints(shape)
    if not keep_zero:
        sizes = [value.shape[place] if size == 0 else size for place, size in enumerate(sizes)]
    return value.reshape(sizes)


def flatten(value: torch.Tensor, axis: int) -> torch.Tensor:
    axis = axis + value.dim() if axis < 0 else axis
    return value.reshape(math.prod(value.shape[:axis]), math.prod(value.shape[axis:]))


def squeeze(value: torch.Tensor, axes: Ints | None) -> torch.Tensor:
    return value.squeeze() if axes is None else value.squeeze(tuple(as_ints(axes)))


def unsqueeze(value: torch.Tensor, axes: Ints) -> torch.Tensor:
    places = as_ints(axes)
    rank = value.dim() + len(places)
    for axis in sorted(axis % rank for axis in places):
        value = value.unsqueeze(axis)
    return value


def reverse_axes(value: torch.Tensor) -> torch.Tensor:
    return value.permute(list(reversed(range(value.dim()))))


def expand(value: torch.Tensor, shape: Ints) -> torch.Tensor:
    """Two-way broadcast: a 1 in ``shape`` keeps the value's size."""
    return value.expand(torch.broadcast_shapes(value.shape, tuple(as_ints(shape))))


def tile(value: torch.Tensor, repeats: Ints) -> torch.Tensor:
    return value.repeat(as_ints(repeats))


def pad(value: torch.Tensor, pads: Ints, axes: Ints | None, mode: str, fill: Any) -> torch.Tensor:
    """ONNX ``Pad``: all beginnings, then all ends; negative amounts cut."""
    amounts = as_ints(pads)
    rank = value.dim()
    over = list(range(rank)) if axes is None else [axis % rank for axis in as_ints(axes)]
    around = [(axis, amounts[place], amounts[len(over) + place]) for place, axis in enumerate(over)]
    spatial = all(axis >= 2 or (before == 0 and after == 0) for axis, before, after in around)
    if mode == "constant":
        number = fill.item() if isinstance(fill, torch.Tensor) else fill
        return F.pad(value, _flat(around, rank), value=number)
    if mode != "wrap" and 3 <= rank <= 5 and spatial and min(amounts) >= 0 and value.is_floating_point():
        return F.pad(value, _flat(around, rank)[: 2 * (rank - 2)], mode="replicate" if mode == "edge" else mode)
    for axis, before, after in around:
        if before or after:
            value = _pad_axis(value, axis, before, after, mode)
    return value


def _flat(around: Sequence[tuple[int, int, int]], rank: int) -> list[int]:
    """Amounts in torch's order: last axis first, beginning and end side by side."""
    flat = [0] * (2 * rank)
    for axis, before, after in around:
        back = 2 * (rank - 1 - axis)
        flat[back], flat[back + 1] = before, after
    return flat


def _pad_axis(value: torch.Tensor, axis: int, before: int, after: int, mode: str) -> torch.Tensor:
    """One axis: the place in the value of every place of the result."""
    size = value.shape[axis]
    places = torch.arange(-before, size + after, device=value.device)
    if mode == "edge":
        places = places.clamp(0, size - 1)
    elif mode == "wrap":
        places = places % size
    else:
        period = max(1, 2 * (size - 1))
        places = places % period
        places = torch.where(places >= size, period - places, places)
    return value.index_select(axis, places)


def shape_of(value: torch.Tensor, start: int, end: int | None) -> torch.Tensor:
    return torch.tensor(list(value.shape)[start:end], dtype=torch.int64, device=value.device)


def filled(place: torch.Tensor, shape: Ints, fill: float, dtype: torch.dtype) -> torch.Tensor:
    """On the device of ``place``."""
    return torch.full(as_ints(shape), fill, dtype=dtype, device=place.device)


def count_up(place: torch.Tensor, start: Any, limit: Any, delta: Any) -> torch.Tensor:
    """On the device of ``place`` and in its type; the numbers are lists or tensors of one."""
    given = [item.item() if isinstance(item, torch.Tensor) else item[0] for item in (start, limit, delta)]
    kind = SIGNED.get(place.dtype, place.dtype)
    if (given[1] - given[0]) * given[2] <= 0:  # nothing lies between, which torch takes for a mistake
        return place.new_empty(0)
    return torch.arange(*given, dtype=kind, device=place.device).to(place.dtype)


def eye_like(value: torch.Tensor, diagonal: int, dtype: torch.dtype | None) -> torch.Tensor:
    """Ones on a diagonal of a matrix of the value's size."""
    rows, columns = (torch.arange(size, device=value.device) for size in value.shape)
    return (columns[None, :] - rows[:, None] == diagonal).to(value.dtype if dtype is None else dtype)


@on_signed
def triangle(value: torch.Tensor, diagonal: torch.Tensor | int, upper: bool) -> torch.Tensor:
    return (torch.triu if upper else torch.tril)(value, int(diagonal))


def depth_to_space(value: torch.Tensor, block: int, depth_first: bool) -> torch.Tensor:
    """Channels to blocks of places; ``depth_first``: the channel's index has the place in the block in front."""
    batch, depth, height, width = value.shape
    kept = depth // block**2  # not F.pixel_shuffle, whose gradient fails on an empty batch
    if depth_first:
        parts = value.reshape(batch, block, block, kept, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        parts = value.reshape(batch, kept, block, block, height, width).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(batch, kept, height * block, width * block)


def space_to_depth(value: torch.Tensor, block: int, depth_first: bool) -> torch.Tensor:
    """The inverse of :func:`depth_to_space`."""
    batch, depth, height, width = value.shape
    parts = value.reshape(batch, depth, height // block, block, width // block, block)
    parts = parts.permute(0, 3, 5, 1, 2, 4) if depth_first else parts.permute(0, 1, 3, 5, 2, 4)
    return parts.reshape(batch, depth * block**2, height // block, width // block)


def center_crop_pad(value: torch.Tensor, shape: Ints, axes: Sequence[int] | None) -> torch.Tensor:
    """Cut or pad with zeros around the middle; the odd place goes to the end."""
    sizes = as_ints(shape)
    around = []
    for axis, size in zip(range(value.dim()) if axes is None else axes, sizes, strict=True):
        have = value.shape[axis]
        if have > size:
            value = value.narrow(axis, (have - size) // 2, size)
        else:
            before = (size - have) // 2
            around.append((axis % value.dim(), before, size - have - before))
    return F.pad(value, _flat(around, value.dim())) if around else value


def as_ints(given: Ints) -> list[int]:
    """Plain integers, wherever they come from; sizes stay what they are, or a tracer would take them for fixed."""
    return given.reshape(-1).to(torch.int64).tolist() if isinstance(given, torch.Tensor) else list(given)
