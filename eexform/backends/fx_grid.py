"""Rules for sampling at computed places, and other calls on whole images or matrices (see ``eexform.backends.fx``)."""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import fx

from eexform.backends.fx import Raiser, op
from eexform.backends.fx_shapes import Ints, as_ints
from eexform.errors import ModelError

_MODES = {"linear": "bilinear", "bilinear": "bilinear", "nearest": "nearest", "cubic": "bicubic", "bicubic": "bicubic"}


@op("GridSample")
def _grid_sample(raiser: Raiser, node: gs.Node) -> fx.Node:
    mode, border = str(node.attrs.get("mode", "linear")), str(node.attrs.get("padding_mode", "zeros"))
    rank = len(raiser.shape(node, 0) or ())
    if mode not in _MODES or (rank == 5 and _MODES[mode] == "bicubic"):
        raise ModelError(f"node {node.name!r} (GridSample): mode {mode!r} on {rank} axes cannot be raised to torch")
    return raiser.call(
        grid_sample, raiser.value(node, 0), raiser.value(node, 1), _MODES[mode], border,
        bool(node.attrs.get("align_corners", 0)),
    )  # fmt: skip


@op("AffineGrid")
def _affine_grid(raiser: Raiser, node: gs.Node) -> fx.Node:
    corners = bool(node.attrs.get("align_corners", 0))
    return raiser.call(affine_grid, raiser.value(node, 0), raiser.ints(node, 1), corners)


@op("Det")
def _det(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(torch.linalg.det, raiser.value(node, 0))


@op("RoiAlign")
def _roi_align(raiser: Raiser, node: gs.Node) -> fx.Node:
    default = "half_pixel" if raiser.source.opset >= 16 else "output_half_pixel"
    return raiser.call(
        roi_align,
        *(raiser.value(node, place) for place in range(3)),
        size=(int(node.attrs.get("output_height", 1)), int(node.attrs.get("output_width", 1))),
        ratio=int(node.attrs.get("sampling_ratio", 0)),
        scale=float(node.attrs.get("spatial_scale", 1.0)),
        half_pixel=str(node.attrs.get("coordinate_transformation_mode", default)) == "half_pixel",
        largest=str(node.attrs.get("mode", "avg")) == "max",
    )


# -- torch functions -----------------------------------------------------------------------------------------------


def grid_sample(value: torch.Tensor, grid: torch.Tensor, mode: str, border: str, corners: bool) -> torch.Tensor:
    """torch's own, on grids of the value's type."""
    return F.grid_sample(value, grid.to(value.dtype), mode, border, corners)


def affine_grid(theta: torch.Tensor, size: Ints, corners: bool) -> torch.Tensor:
    """Places to sample at for an image of ``size`` ``[N, C, ...]`` under the affine maps ``theta``."""
    return F.affine_grid(theta, as_ints(size), corners)


def roi_align(
    value: torch.Tensor,
    boxes: torch.Tensor,
    owners: torch.Tensor,
    *,
    size: tuple[int, int],
    ratio: int,
    scale: float,
    half_pixel: bool,
    largest: bool,
) -> torch.Tensor:
    """Boxes of images, each read on a grid of its own (He et al. 2017).

    Args:
        value: ``[N, C, H, W]``.
        boxes: corners ``[R, 4]``: left, top, right, bottom.
        owners: image of each box ``[R]``.
        size: bins of the result, rows and columns.
        ratio: reads per bin and axis; 0 for as many as the box has pixels per bin.
        scale: of the boxes' coordinates to those of the value.
        half_pixel: the middle of the first pixel is 0.5, not 0; boxes may then be smaller than a pixel.
        largest: the greatest share that one pixel has in a read of the bin, not the mean of the reads (as ONNX has it).

    Returns:
        ``[R, C, *size]``.
    """
    if not len(boxes):
        return value.new_zeros(0, value.shape[1], *size)
    results = []
    for box, owner in zip(boxes, owners.tolist(), strict=True):
        reads = []
        for axis in (0, 1):
            start, end = (box[corner] * scale - (0.5 if half_pixel else 0.0) for corner in (1 - axis, 3 - axis))
            length = end - start if half_pixel else torch.clamp(end - start, min=1.0)
            count = ratio or max(1, math.ceil(float(length) / size[axis]))
            at = torch.arange(size[axis] * count, dtype=value.dtype, device=value.device)
            reads.append((_between(start + (at + 0.5) * length / (size[axis] * count), value.shape[2 + axis]), count))
        (rows, high), (columns, wide) = reads
        if largest:
            parts = [row @ value[owner] @ column.mT for row in rows for column in columns]
            found = torch.stack(parts).amax(0)
        else:
            found = (rows[0] + rows[1]) @ value[owner] @ (columns[0] + columns[1]).mT
        bins = found.reshape(value.shape[1], size[0], high, size[1], wide)
        results.append(bins.amax((2, 4)) if largest else bins.mean((2, 4)))
    return torch.stack(results)


def _between(at: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices ``[len(at), length]`` that read the places before and behind, by how near these are.

    Up to one place outside the edge is read, further out is zero.
    """
    inside = (at >= -1) & (at <= length)
    place = at.clamp(0, length - 1)
    before = place.floor().to(torch.int64)
    share = (place - before) * inside
    empty = at.new_zeros(len(at), length)
    first = empty.scatter(1, before.unsqueeze(1), (inside.to(at.dtype) - share).unsqueeze(1))
    return first, empty.scatter(1, (before + 1).clamp(max=length - 1).unsqueeze(1), share.unsqueeze(1))
