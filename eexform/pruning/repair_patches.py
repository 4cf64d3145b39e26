"""Rows of a linear operator: what it reads at some positions of its output, and what it says there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs


@dataclass(frozen=True)
class Window:
    """Geometry of a convolution over any number of spatial axes.

    Attributes:
        kernel: its size per axis.
        strides: steps per axis.
        dilations: distance of neighbouring taps per axis.
        pads: begin of each axis, then end of each; ``None``: follows from sizes (``same``).
        same: ``SAME_UPPER`` or ``SAME_LOWER``: outputs are as many as strides, the odd one goes to the end or begin.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | None
    same: str = ""

    @classmethod
    def of(cls, node: gs.Node, kernel: Sequence[int]) -> Window:
        """The window of a Conv node whose weight is ``[out, in / group, *kernel]``."""
        axes = len(kernel)
        auto = node.attrs.get("auto_pad", "NOTSET")
        auto = auto.decode() if isinstance(auto, bytes) else str(auto)
        same = auto if auto.startswith("SAME") else ""
        pads = tuple(map(int, node.attrs.get("pads") or (0,) * 2 * axes)) if auto == "NOTSET" else (0,) * 2 * axes
        return cls(
            tuple(map(int, kernel)),
            tuple(map(int, node.attrs.get("strides") or (1,) * axes)),
            tuple(map(int, node.attrs.get("dilations") or (1,) * axes)),
            None if same else pads,
            same,
        )

    def padding(self, size: Sequence[int], out: Sequence[int]) -> list[tuple[int, int]]:
        """(begin, end) per axis for an input and an output of these sizes."""
        axes = len(self.kernel)
        if self.pads is not None:
            return [(self.pads[axis], self.pads[axis + axes]) for axis in range(axes)]
        found = []
        for axis in range(axes):
            reach = (out[axis] - 1) * self.strides[axis] + (self.kernel[axis] - 1) * self.dilations[axis] + 1
            whole = max(reach - size[axis], 0)
            begin = whole // 2 if self.same == "SAME_UPPER" else whole - whole // 2
            found.append((begin, whole - begin))
        return found


def positions(shape: Sequence[int], axis: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` places (all, where there are fewer) of an array apart from ``axis``: flat, int64, ascending."""
    whole = int(np.prod([size for at, size in enumerate(shape) if at != axis], dtype=np.int64))
    if count >= whole:
        return np.arange(whole)
    return np.sort(rng.choice(whole, size=count, replace=False))


def channels(array: np.ndarray, axis: int, places: np.ndarray) -> np.ndarray:
    """``[len(places), channels]``: what the array holds at ``places`` along ``axis``."""
    rest = [size for at, size in enumerate(array.shape) if at != axis]
    index: list[np.ndarray] = list(np.unravel_index(places, rest))
    if axis == array.ndim - 1:
        return np.asarray(array[tuple(index)])
    chosen: tuple[slice | np.ndarray, ...] = (*index[:axis], slice(None), *index[axis:])
    taken = array[chosen]
    # numpy puts the broadcast index in front, unless all index arrays stand side by side behind the slice
    return np.asarray(taken.T if axis == 0 else taken)


def patches(array: np.ndarray, out: Sequence[int], window: Window, groups: int, places: np.ndarray) -> np.ndarray:
    """What a convolution reads at some positions: im2col for those alone.

    Args:
        array: its input ``[n, channels, *spatial]``.
        out: shape of its output ``[n, channels, *spatial]``.
        window: its geometry.
        groups: of channels.
        places: from :func:`positions` with axis 1 of the output.

    Returns:
        ``[len(places), groups, channels / groups * kernel]``, taps in the order of the weight's axes.
    """
    axes = len(window.kernel)
    padding = window.padding(array.shape[2:], out[2:])
    if any(begin or end for begin, end in padding):
        array = np.pad(array, [(0, 0), (0, 0), *((max(begin, 0), max(end, 0)) for begin, end in padding)])
    sample, *at = np.unravel_index(places, (out[0], *out[2:]))
    taps = np.indices(window.kernel).reshape(axes, -1)
    index = tuple(
        at[axis][:, None] * window.strides[axis] + taps[axis][None, :] * window.dilations[axis] for axis in range(axes)
    )
    taken = array[(sample[:, None], slice(None), *index)]  # [places, taps, channels]
    return taken.transpose(0, 2, 1).reshape(len(places), groups, -1)
