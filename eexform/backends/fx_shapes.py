"""Rules for operators that move data about and compute shapes (see :mod:`eexform.backends.fx`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import fx

from eexform.backends.fx import Raiser, op
from eexform.errors import ModelError

Ints = Sequence[int] | torch.Tensor
"""Integers known when the module is made, or a tensor computed while it runs."""


@op("Constant")
def _constant(raiser: Raiser, node: gs.Node) -> fx.Node:
    value = node.attrs.get("value")
    if not isinstance(value, gs.Constant):
        raise ModelError(
            f"node {node.name!r} (Constant): make it an initialiser first (load the file with eexform.load)"
        )
    return raiser.operand(gs.Constant(node.outputs[0].name, value.values))


@op("Cast")
def _cast(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(cast, raiser.value(node, 0), _torch_dtype(node.attrs["to"], node))


@op("Concat")
def _concat(raiser: Raiser, node: gs.Node) -> fx.Node:
    values = [raiser.operand(tensor) for tensor in node.inputs]
    return raiser.call(torch.cat, values, int(node.attrs["axis"]))


@op("Split")
def _split(raiser: Raiser, node: gs.Node) -> Sequence[fx.Node]:
    pieces = raiser.ints(node, 1, "split")
    parts = raiser.call(split, raiser.value(node, 0), pieces, len(node.outputs), int(node.attrs.get("axis", 0)))
    return raiser.pick(parts, len(node.outputs))


@op("Slice")
def _slice(raiser: Raiser, node: gs.Node) -> fx.Node:
    starts, ends, axes, steps = (raiser.ints(node, place) for place in range(1, 5))
    return raiser.call(cut, raiser.value(node, 0), starts, ends, axes, steps)


@op("Gather")
def _gather(raiser: Raiser, node: gs.Node) -> fx.Node:
    axis, places = int(node.attrs.get("axis", 0)), raiser.array(node, 1)
    if places is not None and places.ndim == 0:
        return raiser.call(torch.select, raiser.value(node, 0), axis, int(places))
    return raiser.call(gather, raiser.value(node, 0), raiser.value(node, 1), axis)


@op("GatherElements")
def _gather_elements(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(gather_elements, raiser.value(node, 0), raiser.value(node, 1), int(node.attrs.get("axis", 0)))


@op("Reshape")
def _reshape(raiser: Raiser, node: gs.Node) -> fx.Node:
    keep_zero = bool(node.attrs.get("allowzero", 0))
    return raiser.call(reshape, raiser.value(node, 0), raiser.ints(node, 1), keep_zero)


@op("Flatten")
def _flatten(raiser: Raiser, node: gs.Node) -> fx.Node:
    axis = int(node.attrs.get("axis", 1))
    if axis == 1:
        return raiser.call(torch.flatten, raiser.value(node, 0), 1)
    return raiser.call(flatten, raiser.value(node, 0), axis)


@op("Squeeze")
def _squeeze(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(squeeze, raiser.value(node, 0), raiser.ints(node, 1, "axes"))


@op("Unsqueeze")
def _unsqueeze(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(unsqueeze, raiser.value(node, 0), raiser.ints(node, 1, "axes"))


@op("Transpose")
def _transpose(raiser: Raiser, node: gs.Node) -> fx.Node:
    order = node.attrs.get("perm")
    if order is None:
        return raiser.call(reverse_axes, raiser.value(node, 0))
    return raiser.call(torch.permute, raiser.value(node, 0), [int(axis) for axis in order])


@op("Expand")
def _expand(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(expand, raiser.value(node, 0), raiser.ints(node, 1))


@op("Tile")
def _tile(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(tile, raiser.value(node, 0), raiser.ints(node, 1))


@op("Pad")
def _pad(raiser: Raiser, node: gs.Node) -> fx.Node:
    mode = str(node.attrs.get("mode", "constant"))
    if mode not in ("constant", "reflect", "edge"):
        raise ModelError(f"node {node.name!r} (Pad): mode {mode!r} cannot be raised to torch")
    return raiser.call(
        pad, raiser.value(node, 0), raiser.ints(node, 1), raiser.ints(node, 3), mode, raiser.number(node, 2, 0.0)
    )


@op("Shape")
def _shape(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(shape_of, raiser.value(node, 0), int(node.attrs.get("start", 0)), node.attrs.get("end"))


@op("ConstantOfShape")
def _constant_of_shape(raiser: Raiser, node: gs.Node) -> fx.Node:
    value = node.attrs.get("value")
    array = np.asarray(value.values if isinstance(value, gs.Constant) else value if value is not None else [0.0])
    array = array.astype(np.float32) if value is None else array
    dtype = torch.from_numpy(array.reshape(-1)[:1].copy()).dtype
    return raiser.call(filled, raiser.value(node, 0), array.reshape(-1)[0].item(), dtype)


@op("DepthToSpace")
def _depth_to_space(raiser: Raiser, node: gs.Node) -> fx.Node:
    if node.attrs.get("mode", "DCR") != "CRD":
        raise ModelError(f"node {node.name!r} (DepthToSpace): mode DCR cannot be raised to torch")
    return raiser.call(F.pixel_shuffle, raiser.value(node, 0), int(node.attrs["blocksize"]))


# -- torch functions for what torch has no single call for ---------------------------------------------------------


def cast(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype)


def split(value: torch.Tensor, pieces: Ints | None, count: int, axis: int) -> tuple[torch.Tensor, ...]:
    """Equal pieces, the last one smaller, where no sizes are given."""
    if pieces is None:
        return torch.split(value, -(-value.shape[axis] // count), axis)
    return torch.split(value, as_ints(pieces), axis)


def cut(value: torch.Tensor, starts: Ints, ends: Ints, axes: Ints | None, steps: Ints | None) -> torch.Tensor:
    """ONNX ``Slice``; steps may be negative."""
    first, last = as_ints(starts), as_ints(ends)
    over = list(range(len(first))) if axes is None else as_ints(axes)
    pace = [1] * len(first) if steps is None else as_ints(steps)
    for start, end, axis, step in zip(first, last, over, pace, strict=True):
        places = range(*slice(start, _open(end, step), step).indices(value.shape[axis]))
        if step > 0:
            taken = [slice(None)] * value.dim()
            taken[axis] = slice(places.start, places.stop, step)
            value = value[tuple(taken)]
        else:
            value = value.index_select(axis, torch.tensor(list(places), dtype=torch.int64, device=value.device))
    return value


def gather(value: torch.Tensor, places: torch.Tensor, axis: int) -> torch.Tensor:
    axis %= value.dim()
    flat = places.reshape(-1).to(torch.int64)
    flat = torch.where(flat < 0, flat + value.shape[axis], flat)
    return value.index_select(axis, flat).reshape(*value.shape[:axis], *places.shape, *value.shape[axis + 1 :])


def gather_elements(value: torch.Tensor, places: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.gather(value, axis, torch.where(places < 0, places + value.shape[axis], places))


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
    return value.permute(*reversed(range(value.dim())))


def expand(value: torch.Tensor, shape: Ints) -> torch.Tensor:
    """Two-way broadcast: a 1 in ``shape`` keeps the value's size."""
    return value.expand(torch.broadcast_shapes(value.shape, tuple(as_ints(shape))))


def tile(value: torch.Tensor, repeats: Ints) -> torch.Tensor:
    return value.repeat(as_ints(repeats))


def pad(value: torch.Tensor, pads: Ints, axes: Ints | None, mode: str, fill: Any) -> torch.Tensor:
    """ONNX ``Pad``: all beginnings, then all ends; negative amounts cut."""
    amounts = as_ints(pads)
    over = list(range(value.dim())) if axes is None else [axis % value.dim() for axis in as_ints(axes)]
    flat = [0] * (2 * value.dim())
    for place, axis in enumerate(over):
        back = 2 * (value.dim() - 1 - axis)
        flat[back], flat[back + 1] = amounts[place], amounts[len(over) + place]
    if mode == "constant":
        return F.pad(value, flat, value=float(fill))
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    return F.pad(value, flat, mode={"edge": "replicate"}.get(mode, mode))


def shape_of(value: torch.Tensor, start: int, end: int | None) -> torch.Tensor:
    return torch.tensor(list(value.shape)[start:end], dtype=torch.int64, device=value.device)


def filled(shape: torch.Tensor, fill: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(as_ints(shape), fill, dtype=dtype, device=shape.device)


def _open(end: int, step: int) -> int | None:
    """Python cannot name "past the first element" by a number when it walks backwards; ONNX uses a very small one."""
    return None if step < 0 and end < -(2**30) else end


def _torch_dtype(to: Any, node: gs.Node) -> torch.dtype:
    """From an ONNX element type (a number, or a numpy type as onnx-graphsurgeon may hold it)."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(to) if isinstance(to, int) else np.dtype(to)
    try:
        return torch.from_numpy(np.zeros(1, dtype)).dtype
    except TypeError as error:
        raise ModelError(f"node {node.name!r} (Cast): type {dtype} does not exist in torch") from error


def as_ints(numbers: Ints) -> list[int]:
    """Plain integers, wherever they come from."""
    return [int(number) for number in (numbers.reshape(-1).tolist() if isinstance(numbers, torch.Tensor) else numbers)]
