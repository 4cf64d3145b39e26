"""Rules for reductions, sorting and cumulative operators (see :mod:`eexform.backends.fx`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_graphsurgeon as gs
import torch
from torch import fx

from eexform.backends.fx import Raiser, op
from eexform.backends.fx_shapes import Ints, as_ints
from eexform.backends.fx_wide import SIGNED, from_ordered, from_signed, to_ordered, to_signed

_REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
)  # fmt: skip


@op(*_REDUCTIONS)
def _reduce(raiser: Raiser, node: gs.Node) -> fx.Node:
    value, axes = raiser.value(node, 0), raiser.ints(node, 1, "axes")
    keep, idle = bool(node.attrs.get("keepdims", 1)), bool(node.attrs.get("noop_with_empty_axes", 0))
    if isinstance(axes, list) and axes and node.op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum"):
        return raiser.call(_PLAIN[node.op], value, axes, keep)
    return raiser.call(reduce, value, node.op, axes, keep, idle)


@op("ArgMax", "ArgMin")
def _arg(raiser: Raiser, node: gs.Node) -> fx.Node:
    axis, keep = int(node.attrs.get("axis", 0)), bool(node.attrs.get("keepdims", 1))
    if node.attrs.get("select_last_index", 0):
        return raiser.call(last_arg, raiser.value(node, 0), node.op == "ArgMax", axis, keep)
    return raiser.call(arg_max if node.op == "ArgMax" else arg_min, raiser.value(node, 0), axis, keep)


@op("TopK")
def _top_k(raiser: Raiser, node: gs.Node) -> Sequence[fx.Node]:
    # before opset 10 the number was an attribute
    count = [int(node.attrs["k"])] if "k" in node.attrs else raiser.ints(node, 1)
    axis, most = int(node.attrs.get("axis", -1)), bool(node.attrs.get("largest", 1))
    return raiser.pick(raiser.call(top_k, raiser.value(node, 0), count, axis, most), 2)


@op("CumSum", "CumProd")
def _cumulative(raiser: Raiser, node: gs.Node) -> fx.Node:
    exclusive, reverse = bool(node.attrs.get("exclusive", 0)), bool(node.attrs.get("reverse", 0))
    value, axis = raiser.value(node, 0), raiser.ints(node, 1)
    return raiser.call(cumulative, value, axis, node.op == "CumSum", exclusive, reverse)


# -- torch functions -----------------------------------------------------------------------------------------------


def reduce_mean(value: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    if value.is_floating_point():
        return value.mean(axes, keepdim=keep)
    count = math.prod(value.shape[axis] for axis in axes)
    return torch.div(value.sum(axes, keepdim=keep), count, rounding_mode="trunc").to(value.dtype)


def reduce_sum(value: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    found = value.sum(axes, keepdim=keep)
    return found if found.dtype == value.dtype else found.to(value.dtype)


def reduce_max(value: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return _extreme(value, axes, keep, True)


def reduce_min(value: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return _extreme(value, axes, keep, False)


_PLAIN = {"ReduceMean": reduce_mean, "ReduceSum": reduce_sum, "ReduceMax": reduce_max, "ReduceMin": reduce_min}


def reduce(value: torch.Tensor, kind: str, axes: Ints | None, keep: bool, idle: bool = False) -> torch.Tensor:
    """``kind`` is the ONNX operator; no axes means all, or none with ``idle`` (then only element by element)."""
    over = [] if axes is None else as_ints(axes)
    if not over:
        if idle:
            return _each(value, kind)
        over = list(range(value.dim()))
    if value.dtype in SIGNED and kind not in _PLAIN:
        return from_signed(reduce(to_signed(value), kind, over, keep), value.dtype)
    if not over:  # a single number
        return _each(value, kind)
    match kind:
        case "ReduceL1":
            return reduce_sum(value.abs(), over, keep)
        case "ReduceL2":
            return _norm(value, over, keep)
        case "ReduceSumSquare":
            return reduce_sum(value * value, over, keep)
        case "ReduceLogSum":
            return _floating(value, lambda held: held.sum(over, keepdim=keep).log())
        case "ReduceLogSumExp":
            return _floating(value, lambda held: torch.logsumexp(held, over, keepdim=keep))
        case "ReduceProd":
            kept = value
            for axis in sorted((axis % value.dim() for axis in over), reverse=True):
                kept = kept.prod(axis, keepdim=keep)
            return kept if kept.dtype == value.dtype else kept.to(value.dtype)
    return _PLAIN[kind](value, over, keep)


def _norm(value: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    # not a square root of a sum: its gradient at zero would not be finite
    if value.is_floating_point():
        return torch.linalg.vector_norm(value, 2, axes, keepdim=keep)
    return _floating(value, lambda held: torch.linalg.vector_norm(held, 2, axes, keepdim=keep))


def _each(value: torch.Tensor, kind: str) -> torch.Tensor:
    """What a reduction does to the elements when it reduces over no axis."""
    if kind in ("ReduceL1", "ReduceL2"):
        return value.abs()
    if kind == "ReduceSumSquare":
        return value * value
    return value.log() if kind == "ReduceLogSum" else value


def _floating(value: torch.Tensor, function: Any) -> torch.Tensor:
    """Integers are computed in double precision and rounded towards zero."""
    if value.is_floating_point():
        return function(value)
    return function(value.to(torch.float64)).to(value.dtype)


def _extreme(value: torch.Tensor, axes: list[int], keep: bool, most: bool) -> torch.Tensor:
    """Maximum or minimum; of nothing it is the smallest (largest) number of the type."""
    if value.dtype in SIGNED:
        return from_ordered(_extreme(to_ordered(value), axes, keep, most), value.dtype)
    if any(value.shape[axis] == 0 for axis in axes):
        gone = {axis % value.dim() for axis in axes}
        sizes = [1 if place in gone else size for place, size in enumerate(value.shape) if keep or place not in gone]
        return torch.full(sizes, _bound(value.dtype, most), dtype=value.dtype, device=value.device)
    return torch.amax(value, axes, keepdim=keep) if most else torch.amin(value, axes, keepdim=keep)


def _bound(kind: torch.dtype, lowest: bool) -> Any:
    if kind == torch.bool:
        return not lowest
    if kind.is_floating_point:
        return -math.inf if lowest else math.inf
    return torch.iinfo(kind).min if lowest else torch.iinfo(kind).max


def arg_max(value: torch.Tensor, axis: int, keep: bool) -> torch.Tensor:
    return torch.argmax(to_ordered(value), dim=axis, keepdim=keep)


def arg_min(value: torch.Tensor, axis: int, keep: bool) -> torch.Tensor:
    return torch.argmin(to_ordered(value), dim=axis, keepdim=keep)


def last_arg(value: torch.Tensor, most: bool, axis: int, keep: bool) -> torch.Tensor:
    """The last of equal places."""
    flipped = to_ordered(value).flip(axis)
    found = torch.argmax(flipped, dim=axis, keepdim=keep) if most else torch.argmin(flipped, dim=axis, keepdim=keep)
    return value.shape[axis] - 1 - found


def top_k(value: torch.Tensor, count: Ints, axis: int, most: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted; of equal elements the first ones (``torch.topk`` promises neither order nor choice there)."""
    if value.dtype in SIGNED:
        found, places = top_k(to_ordered(value), count, axis, most)
        return from_ordered(found, value.dtype), places
    found, places = torch.sort(value, dim=axis, descending=most, stable=True)
    number = as_ints(count)[0]
    return found.narrow(axis, 0, number), places.narrow(axis, 0, number)


def cumulative(value: torch.Tensor, axis: Ints, adds: bool, exclusive: bool, reverse: bool) -> torch.Tensor:
    """Running sums or products; ``exclusive``: of the elements before."""
    place = as_ints(axis)[0]
    if value.dtype in SIGNED:
        return from_signed(cumulative(to_signed(value), [place], adds, exclusive, reverse), value.dtype)
    held = value.flip(place) if reverse else value
    if exclusive:
        first = held.narrow(place, 0, min(1, held.shape[place]))
        start = torch.zeros_like(first) if adds else torch.ones_like(first)
        held = torch.cat([start, held.narrow(place, 0, max(0, held.shape[place] - 1))], place)
    found = torch.cumsum(held, place) if adds else torch.cumprod(held, place)
    found = found if found.dtype == value.dtype else found.to(value.dtype)
    return found.flip(place) if reverse else found
