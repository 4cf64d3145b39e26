"""Rules for pooling (see :mod:`eexform.backends.fx`).

Windows that torch knows go to torch's own functions. Uneven padding, dilated averages, ceil mode with these, norms and
indices of the whole tensor are computed on a padded copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import fx

from eexform.backends.fx import Raiser, op
from eexform.backends.fx_shapes import Ints, as_ints
from eexform.errors import ModelError

_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Window:
    """Attributes that all pooling operators share.

    Attributes:
        kernel, stride, dilation: one number per spatial axis.
        pads: all beginnings, then all ends.
        auto: ``auto_pad``.
        ceil: a last window may stand half outside.
    """

    kernel: list[int]
    stride: list[int]
    dilation: list[int]
    pads: list[int]
    auto: str
    ceil: bool

    @property
    def rank(self) -> int:
        return len(self.kernel)

    @property
    def even(self) -> bool:
        """Whether torch can do the padding itself: the same on both sides, up to half the window."""
        halves = self.pads[: self.rank], self.pads[self.rank :]
        fits = all(2 * pad <= size for pad, size in zip(halves[0], self.kernel, strict=True))
        return self.auto in ("NOTSET", "VALID") and halves[0] == halves[1] and fits

    def arguments(self) -> tuple[Any, ...]:
        """What the torch functions below take."""
        return self.kernel, self.stride, self.dilation, self.pads, self.auto, self.ceil


def _window(node: gs.Node) -> Window:
    kernel = [int(size) for size in node.attrs["kernel_shape"]]
    if len(kernel) not in _MAX:
        raise ModelError(f"node {node.name!r} ({node.op}): {len(kernel)} spatial axes cannot be raised; torch has 1-3")

    def numbers(name: str, length: int, default: int) -> list[int]:
        return [int(number) for number in node.attrs.get(name) or [default] * length]

    auto = str(node.attrs.get("auto_pad", "NOTSET"))
    pads = [0] * (2 * len(kernel)) if auto == "VALID" else numbers("pads", 2 * len(kernel), 0)
    strides, dilations = numbers("strides", len(kernel), 1), numbers("dilations", len(kernel), 1)
    return Window(kernel, strides, dilations, pads, auto, bool(node.attrs.get("ceil_mode", 0)))


@op("GlobalAveragePool")
def _global_average(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(global_pool, raiser.value(node, 0), "mean")


@op("GlobalMaxPool")
def _global_max(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(global_pool, raiser.value(node, 0), "max")


@op("GlobalLpPool")
def _global_lp(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(global_norm, raiser.value(node, 0), int(node.attrs.get("p", 2)))


@op("AveragePool")
def _average_pool(raiser: Raiser, node: gs.Node) -> fx.Node:
    window, include = _window(node), bool(node.attrs.get("count_include_pad", 0))
    value = raiser.value(node, 0)
    if window.even and all(step == 1 for step in window.dilation):
        arguments = (window.kernel, window.stride, window.pads[: window.rank], window.ceil, include)
        return raiser.call(_AVERAGE[window.rank], value, *arguments)
    return raiser.call(average_pool, value, *window.arguments(), include)


@op("LpPool")
def _lp_pool(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(lp_pool, raiser.value(node, 0), *_window(node).arguments(), int(node.attrs.get("p", 2)))


@op("MaxPool")
def _max_pool(raiser: Raiser, node: gs.Node) -> fx.Node | Sequence[fx.Node]:
    window, value = _window(node), raiser.value(node, 0)
    if len(node.outputs) > 1 and not node.outputs[1].is_empty():
        columns = bool(node.attrs.get("storage_order", 0))
        return raiser.pick(raiser.call(max_pool_indices, value, *window.arguments(), columns), 2)
    if window.even:
        padding = window.pads[: window.rank]
        arguments = (window.kernel, window.stride, padding, window.dilation, window.ceil)
        return raiser.call(_MAX[window.rank], value, *arguments)
    return raiser.call(max_pool, value, *window.arguments())


@op("MaxUnpool")
def _max_unpool(raiser: Raiser, node: gs.Node) -> fx.Node:
    window = _window(node)
    target = raiser.ints(node, 2)
    places = (raiser.value(node, 0), raiser.value(node, 1))
    return raiser.call(max_unpool, *places, window.kernel, window.stride, window.pads, target)


# -- torch functions for what torch has no single call for ---------------------------------------------------------


def global_pool(value: torch.Tensor, kind: str) -> torch.Tensor:
    """Mean or maximum over every axis behind the channels, kept with size 1."""
    axes = list(range(2, value.dim()))
    return value.mean(axes, keepdim=True) if kind == "mean" else torch.amax(value, axes, keepdim=True)


def global_norm(value: torch.Tensor, power: int) -> torch.Tensor:
    """Norm over every axis behind the channels, kept with size 1."""
    return torch.linalg.vector_norm(value, power, list(range(2, value.dim())), keepdim=True)


def max_pool(
    value: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    pads: list[int],
    auto: str,
    ceil: bool,
) -> torch.Tensor:
    """Maximum over windows with any padding; the least value of the type where integers are padded."""
    begins, ends, _ = _amounts(value, kernel, stride, dilation, pads, auto, ceil)
    lowest = float("-inf") if value.is_floating_point() else torch.iinfo(value.dtype).min
    padded = F.pad(value, flat_pads(begins, ends), value=lowest)
    return _MAX[len(kernel)](padded, kernel, stride, 0, dilation)


def max_pool_indices(
    value: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    pads: list[int],
    auto: str,
    ceil: bool,
    columns: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima and their places in the flat tensor ``[N, C, ...]``; ``columns``: the first spatial axis runs fastest."""
    begins, ends, _ = _amounts(value, kernel, stride, dilation, pads, auto, ceil)
    wide = value if value.is_floating_point() else value.to(torch.float64)
    padded = F.pad(wide, flat_pads(begins, ends), value=float("-inf"))
    found, places = _MAX[len(kernel)](padded, kernel, stride, 0, dilation, return_indices=True)
    sizes, flat, step = list(value.shape[2:]), torch.zeros_like(places), 1
    at = [place - begin for place, begin in zip(torch.unravel_index(places, padded.shape[2:]), begins, strict=True)]
    for axis in range(len(sizes)) if columns else reversed(range(len(sizes))):
        flat, step = flat + at[axis] * step, step * sizes[axis]
    planes = torch.arange(value.shape[0] * value.shape[1], device=value.device) * step
    return found.to(value.dtype), flat + planes.reshape(value.shape[0], value.shape[1], *[1] * len(sizes))


def average_pool(
    value: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    pads: list[int],
    auto: str,
    ceil: bool,
    include: bool,
) -> torch.Tensor:
    """Mean over windows with any padding and dilation; ``include``: padding (not what ceil mode adds) counts."""
    begins, ends, extra = _amounts(value, kernel, stride, dilation, pads, auto, ceil)
    total = _window_sum(F.pad(value, flat_pads(begins, ends)), kernel, stride, dilation)
    own = torch.ones_like(value[:1, :1])
    if include:
        own = F.pad(own, flat_pads(begins, [end - more for end, more in zip(ends, extra, strict=True)]), value=1.0)
        counted = F.pad(own, flat_pads([0] * len(kernel), extra))
    else:
        counted = F.pad(own, flat_pads(begins, ends))
    return total / _window_sum(counted, kernel, stride, dilation)


def lp_pool(
    value: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    pads: list[int],
    auto: str,
    ceil: bool,
    power: int,
) -> torch.Tensor:
    """Norm over windows with any padding and dilation."""
    begins, ends, _ = _amounts(value, kernel, stride, dilation, pads, auto, ceil)
    padded = F.pad(value.abs() ** power, flat_pads(begins, ends))
    total = _window_sum(padded, kernel, stride, dilation)
    none = total == 0  # a root has no finite gradient there
    return torch.where(none, torch.zeros_like(total), torch.where(none, 1.0, total) ** (1.0 / power))


def max_unpool(
    value: torch.Tensor,
    places: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    pads: list[int],
    target: Ints | None,
) -> torch.Tensor:
    """Values put back at their places in the flat result, zeros elsewhere; a bigger ``target`` gets zeros behind."""
    rank = len(kernel)
    sizes = [
        (value.shape[2 + axis] - 1) * stride[axis] + kernel[axis] - pads[axis] - pads[rank + axis]
        for axis in range(rank)
    ]
    shape = [*value.shape[:2], *sizes]
    flat = value.new_zeros(math.prod(shape)).scatter(0, places.reshape(-1), value.reshape(-1))
    result = flat.reshape(shape)
    if target is None:
        return result
    more = [wanted - size for wanted, size in zip(as_ints(target)[2:], sizes, strict=True)]
    return F.pad(result, flat_pads([0] * rank, more))


def _amounts(
    value: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    dilation: list[int],
    pads: list[int],
    auto: str,
    ceil: bool,
) -> tuple[list[int], list[int], list[int]]:
    """Padding before and after each spatial axis, and how much of the latter only ceil mode adds."""
    rank = len(kernel)
    begins, ends, extra = pads[:rank], pads[rank:], [0] * rank
    for axis in range(rank):
        size, span = value.shape[2 + axis], (kernel[axis] - 1) * dilation[axis] + 1
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            total = max(0, (-(-size // stride[axis]) - 1) * stride[axis] + span - size)
            small, large = total // 2, total - total // 2
            begins[axis], ends[axis] = (small, large) if auto == "SAME_UPPER" else (large, small)
        elif ceil:
            places = size + begins[axis] + ends[axis]
            windows = -(-(places - span) // stride[axis]) + 1
            if (windows - 1) * stride[axis] >= size + begins[axis]:  # it would start behind the data: no such window
                windows -= 1
            extra[axis] = max(0, (windows - 1) * stride[axis] + span - places)
            ends[axis] += extra[axis]
    return begins, ends, extra


def _window_sum(padded: torch.Tensor, kernel: list[int], stride: list[int], dilation: list[int]) -> torch.Tensor:
    planes = padded.flatten(0, 1).unsqueeze(1)
    total = _CONV[len(kernel)](planes, padded.new_ones(1, 1, *kernel), None, stride, 0, dilation)
    return total.reshape(*padded.shape[:2], *total.shape[2:])


def flat_pads(begins: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Amounts in the order of ``F.pad``: last axis first."""
    return [amount for axis in reversed(range(len(begins))) for amount in (begins[axis], ends[axis])]
