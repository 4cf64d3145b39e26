"""Rules for operators that pick and place by index (see :mod:`eexform.backends.fx`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import fx, nn

from eexform.backends.fx import Raiser, op
from eexform.backends.fx_shapes import Ints, as_ints
from eexform.backends.fx_wide import SIGNED, from_ordered, on_signed, to_ordered

_REDUCE = {"mul": "prod", "max": "amax", "min": "amin", "add": "sum"}


@op("Gather")
def _gather(raiser: Raiser, node: gs.Node) -> fx.Node:
    axis, places = int(node.attrs.get("axis", 0)), raiser.array(node, 1)
    if places is not None and places.ndim == 0:
        return raiser.call(torch.select, raiser.value(node, 0), axis, int(places))
    if places is not None and places.ndim == 1 and (places >= 0).all():
        return raiser.call(torch.index_select, raiser.value(node, 0), axis, raiser.value(node, 1))
    table = node.inputs[0]
    if places is None and axis == 0 and isinstance(table, gs.Constant) and _is_embedding(table):
        rows, width = (int(size) for size in table.shape)
        index = raiser.call(from_front, raiser.value(node, 1), rows)
        empty = torch.empty(rows, width, device="meta")  # given, so that torch does not draw numbers for it
        return raiser.module(node, nn.Embedding(rows, width, _weight=empty), [index], weight=table)
    return raiser.call(gather, raiser.value(node, 0), raiser.value(node, 1), axis)


def _is_embedding(table: gs.Constant) -> bool:
    return len(table.shape) == 2 and min(table.shape) > 0 and np.issubdtype(table.dtype, np.floating)


@op("GatherElements")
def _gather_elements(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(gather_elements, raiser.value(node, 0), raiser.value(node, 1), int(node.attrs.get("axis", 0)))


@op("GatherND")
def _gather_nd(raiser: Raiser, node: gs.Node) -> fx.Node:
    batch = int(node.attrs.get("batch_dims", 0))
    return raiser.call(gather_nd, raiser.value(node, 0), raiser.value(node, 1), batch)


@op("ScatterElements", "Scatter")
def _scatter_elements(raiser: Raiser, node: gs.Node) -> fx.Node:
    value, places, updates = (raiser.value(node, place) for place in range(3))
    axis, reduction = int(node.attrs.get("axis", 0)), str(node.attrs.get("reduction", "none"))
    return raiser.call(scatter_elements, value, places, updates, axis, reduction)


@op("ScatterND")
def _scatter_nd(raiser: Raiser, node: gs.Node) -> fx.Node:
    value, places, updates = (raiser.value(node, place) for place in range(3))
    return raiser.call(scatter_nd, value, places, updates, str(node.attrs.get("reduction", "none")))


@op("TensorScatter")
def _tensor_scatter(raiser: Raiser, node: gs.Node) -> fx.Node:
    start = raiser.value(node, 2) if raiser.has(node, 2) else None
    circular, axis = node.attrs.get("mode", "linear") == "circular", int(node.attrs.get("axis", -2))
    return raiser.call(tensor_scatter, raiser.value(node, 0), raiser.value(node, 1), start, axis, circular)


@op("NonZero")
def _non_zero(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(non_zero, raiser.value(node, 0))


@op("OneHot")
def _one_hot(raiser: Raiser, node: gs.Node) -> fx.Node:
    places, depth, values = raiser.value(node, 0), raiser.ints(node, 1), raiser.value(node, 2)
    return raiser.call(one_hot, places, depth, values, int(node.attrs.get("axis", -1)))


@op("Compress")
def _compress(raiser: Raiser, node: gs.Node) -> fx.Node:
    axis = node.attrs.get("axis")
    return raiser.call(compress, raiser.value(node, 0), raiser.value(node, 1), None if axis is None else int(axis))


@op("ReverseSequence")
def _reverse_sequence(raiser: Raiser, node: gs.Node) -> fx.Node:
    time, batch = int(node.attrs.get("time_axis", 0)), int(node.attrs.get("batch_axis", 1))
    return raiser.call(reverse_sequence, raiser.value(node, 0), raiser.value(node, 1), time, batch)


@op("Unique")
def _unique(raiser: Raiser, node: gs.Node) -> Sequence[fx.Node]:
    axis, ordered = node.attrs.get("axis"), bool(node.attrs.get("sorted", 1))
    found = raiser.call(unique, raiser.value(node, 0), None if axis is None else int(axis), ordered)
    return raiser.pick(found, len(node.outputs))


@op("NonMaxSuppression")
def _non_max_suppression(raiser: Raiser, node: gs.Node) -> fx.Node:
    boxes, scores = raiser.value(node, 0), raiser.value(node, 1)
    limits = (raiser.number(node, 2, 0), raiser.number(node, 3, 0.0), raiser.number(node, 4))
    return raiser.call(non_max_suppression, boxes, scores, *limits, bool(node.attrs.get("center_point_box", 0)))


# -- torch functions -----------------------------------------------------------------------------------------------


def gather(value: torch.Tensor, places: torch.Tensor, axis: int) -> torch.Tensor:
    axis %= value.dim()
    flat = places.reshape(-1).to(torch.int64)
    flat = torch.where(flat < 0, flat + value.shape[axis], flat)
    return value.index_select(axis, flat).reshape([*value.shape[:axis], *places.shape, *value.shape[axis + 1 :]])


@on_signed
def gather_elements(value: torch.Tensor, places: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.gather(value, axis, from_front(places, value.shape[axis]))


def gather_nd(value: torch.Tensor, places: torch.Tensor, batch: int) -> torch.Tensor:
    """The last axis of ``places`` is an index into the axes of ``value`` behind the ``batch`` ones both have."""
    outer = places.dim() - 1
    index = [
        torch.arange(value.shape[axis], device=value.device).reshape([-1 if axis == k else 1 for k in range(outer)])
        for axis in range(batch)
    ]
    index += list(places.to(torch.int64).unbind(-1))
    return value[tuple(index)] if index else value


def scatter_elements(
    value: torch.Tensor, places: torch.Tensor, updates: torch.Tensor, axis: int, reduction: str
) -> torch.Tensor:
    """Put ``updates`` to ``places`` along ``axis``, or join them with what is there."""
    if value.dtype == torch.uint64 and reduction in ("max", "min"):
        return from_ordered(
            scatter_elements(to_ordered(value), places, to_ordered(updates), axis, reduction), value.dtype
        )
    return _scatter_elements_signed(value, places, updates, axis, reduction)


@on_signed
def _scatter_elements_signed(
    value: torch.Tensor, places: torch.Tensor, updates: torch.Tensor, axis: int, reduction: str
) -> torch.Tensor:
    where = from_front(places, value.shape[axis])
    if reduction == "none":
        return torch.scatter(value, axis, where, updates)
    return torch.scatter_reduce(value, axis, where, updates, _REDUCE[reduction])


def scatter_nd(value: torch.Tensor, places: torch.Tensor, updates: torch.Tensor, reduction: str) -> torch.Tensor:
    """The last axis of ``places`` is an index into the first axes of ``value``; ``updates`` go there."""
    if value.dtype == torch.uint64 and reduction in ("max", "min"):
        return from_ordered(scatter_nd(to_ordered(value), places, to_ordered(updates), reduction), value.dtype)
    return _scatter_nd_signed(value, places, updates, reduction)


@on_signed
def _scatter_nd_signed(
    value: torch.Tensor, places: torch.Tensor, updates: torch.Tensor, reduction: str
) -> torch.Tensor:
    where = places.to(torch.int64)
    if reduction in ("none", "add"):
        return value.index_put(tuple(where.unbind(-1)), updates, accumulate=reduction == "add")
    depth = where.shape[-1]
    sizes = value.shape[:depth]
    flat = torch.zeros(where.shape[:-1], dtype=torch.int64, device=value.device)
    for axis, size in enumerate(sizes):
        flat = flat * size + from_front(where[..., axis], size)
    rows = value.reshape(math.prod(sizes), -1)
    changes = updates.reshape(flat.numel(), rows.shape[1])
    found = torch.scatter_reduce(rows, 0, flat.reshape(-1, 1).expand_as(changes), changes, _REDUCE[reduction])
    return found.reshape(value.shape)


@on_signed
def tensor_scatter(
    value: torch.Tensor, updates: torch.Tensor, start: torch.Tensor | None, axis: int, circular: bool
) -> torch.Tensor:
    """Put ``updates`` along ``axis`` from the place that ``start`` gives for each sample on (0 where not given)."""
    axis %= value.dim()
    places = torch.arange(updates.shape[axis], device=value.device).reshape(1, -1)
    if start is not None:
        places = places + start.to(torch.int64).reshape(-1, 1)
    if circular:
        places = places % value.shape[axis]
    shape = [1] * value.dim()
    shape[0], shape[axis] = places.shape
    return torch.scatter(value, axis, places.reshape(shape).expand_as(updates), updates)


def non_zero(value: torch.Tensor) -> torch.Tensor:
    held = value != 0 if value.dtype in SIGNED else value
    return torch.nonzero(held if held.dim() else held.reshape(1)).T


def one_hot(places: torch.Tensor, depth: Ints, values: torch.Tensor, axis: int) -> torch.Tensor:
    """``values`` are what a place gets that is not, and that is, the index; indices outside get only the first."""
    count = as_ints(depth)[0]
    where = from_front(places, count)
    axis = axis + places.dim() + 1 if axis < 0 else axis
    shape = [1] * (places.dim() + 1)
    shape[axis] = count
    hit = where.unsqueeze(axis) == torch.arange(count, device=places.device).reshape(shape)
    return torch.where(hit, values[1], values[0])


def compress(value: torch.Tensor, kept: torch.Tensor, axis: int | None) -> torch.Tensor:
    """``kept`` may be shorter than the axis; without an axis the value is flattened."""
    places = torch.nonzero(kept).reshape(-1)
    return value.reshape(-1).index_select(0, places) if axis is None else value.index_select(axis, places)


@on_signed
def reverse_sequence(value: torch.Tensor, lengths: torch.Tensor, time: int, batch: int) -> torch.Tensor:
    """The first ``lengths[n]`` places of sample ``n`` backwards, the others as they are."""
    steps = torch.arange(value.shape[time], device=value.device).reshape(1, -1)
    length = lengths.to(torch.int64).reshape(-1, 1)
    places = torch.where(steps < length, length - 1 - steps, steps)  # [samples, times]
    shape = [1] * value.dim()
    shape[batch], shape[time] = places.shape
    if batch > time:
        places = places.T
    return torch.gather(value, time, places.reshape(shape).expand_as(value))


def unique(
    value: torch.Tensor, axis: int | None, ordered: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Elements (slices along ``axis``), where each is first, which one each place has, and how often each occurs."""
    if value.dtype in SIGNED:
        found, first, inverse, counts = unique(to_ordered(value), axis, ordered)
        return from_ordered(found, value.dtype), first, inverse, counts
    held = value.reshape(-1) if axis is None else value
    along = 0 if axis is None else axis
    _, inverse, counts = torch.unique(held.detach(), sorted=True, return_inverse=True, return_counts=True, dim=along)
    places = torch.arange(inverse.numel(), device=value.device)
    first = torch.full_like(counts, inverse.numel()).scatter_reduce(0, inverse, places, "amin")
    if not ordered:
        order = torch.argsort(first)
        rank = torch.argsort(order)
        first, counts, inverse = first[order], counts[order], rank[inverse]
    return held.index_select(along, first), first, inverse, counts  # the way that has a gradient


def non_max_suppression(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    most: torch.Tensor | int,
    overlap: torch.Tensor | float,
    least: torch.Tensor | float | None,
    centred: bool,
) -> torch.Tensor:
    """Boxes that no better box of their class overlaps too much.

    Args:
        boxes: ``[samples, boxes, 4]``: two opposite corners ``(y, x, y, x)``, or ``(x, y, width, height)`` if
            ``centred``.
        scores: ``[samples, classes, boxes]``.
        most: boxes per sample and class.
        overlap: intersection over union from which on (more than) a box falls out.
        least: score that a box must exceed.

    Returns:
        ``[found, 3]``: sample, class, box.
    """
    first, last = _corners(boxes, centred)
    area = (last - first).prod(-1)
    found: list[tuple[int, int, int]] = []
    for sample in range(scores.shape[0]):
        for label in range(scores.shape[1]):
            score = scores[sample, label]
            order = torch.argsort(score, descending=True, stable=True).tolist()
            kept: list[int] = []
            for box in order:
                if len(kept) >= int(most):
                    break
                if least is not None and not float(score[box]) > float(least):
                    break
                sizes = torch.minimum(last[sample, box], last[sample, kept])
                sizes = (sizes - torch.maximum(first[sample, box], first[sample, kept])).clamp(min=0)
                shared = sizes.prod(-1)
                union = area[sample, box] + area[sample, kept] - shared
                if not bool((shared > float(overlap) * union).any()):
                    kept.append(box)
            found += [(sample, label, box) for box in kept]
    return torch.tensor(found, dtype=torch.int64, device=scores.device).reshape(-1, 3)


def _corners(boxes: torch.Tensor, centred: bool) -> tuple[torch.Tensor, torch.Tensor]:
    one, other = boxes[..., :2], boxes[..., 2:]
    if centred:
        return one - other / 2, one + other / 2
    return torch.minimum(one, other), torch.maximum(one, other)


def from_front(places: torch.Tensor, size: int) -> torch.Tensor:
    """Indices that count from the end, from the beginning."""
    held = places.to(torch.int64)
    return torch.where(held < 0, held + size, held)
