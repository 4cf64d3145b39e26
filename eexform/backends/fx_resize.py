"""Rules for Resize and Upsample (see :mod:`eexform.backends.fx`).

Every mode of ONNX treats the axes one after the other, each as a product with a matrix ``[out, in]`` that follows from
the coordinates; so do we, except where ``torch.nn.functional.interpolate`` computes the same faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import fx

from eexform.backends.fx import Raiser, op
from eexform.backends.fx_shapes import Ints, as_ints
from eexform.errors import ModelError

_MODES = ("nearest", "linear", "cubic")
_INTERPOLATE = {3: "linear", 4: "bilinear", 5: "trilinear"}

Numbers = Sequence[float] | torch.Tensor


@op("Resize")
def _resize(raiser: Raiser, node: gs.Node) -> fx.Node:
    attrs = node.attrs
    mode = str(attrs.get("mode", "nearest"))
    if mode not in _MODES:
        raise ModelError(f"node {node.name!r} (Resize): mode {mode!r} cannot be raised to torch")
    old = raiser.source.opset < 11  # one input of scales, and only what later came to be called asymmetric
    default = "asymmetric" if old else "half_pixel"
    return raiser.call(
        resize,
        raiser.value(node, 0),
        None if old else _floats(raiser, node, 1),
        _floats(raiser, node, 1 if old else 2),
        raiser.ints(node, 3),
        mode=mode,
        coordinates=str(attrs.get("coordinate_transformation_mode", default)),
        nearest="floor" if old else str(attrs.get("nearest_mode", "round_prefer_floor")),
        cubic=float(attrs.get("cubic_coeff_a", -0.75)),
        exclude=bool(attrs.get("exclude_outside", 0)),
        antialias=bool(attrs.get("antialias", 0)),
        outside=float(attrs.get("extrapolation_value", 0.0)),
        axes=[int(axis) for axis in attrs.get("axes") or []],
        policy=str(attrs.get("keep_aspect_ratio_policy", "stretch")),
    )


@op("Upsample")
def _upsample(raiser: Raiser, node: gs.Node) -> fx.Node:
    scales = node.attrs.get("scales")
    given = [float(scale) for scale in scales] if scales else _floats(raiser, node, 1)
    mode = str(node.attrs.get("mode", "nearest")).replace("bilinear", "linear")
    if mode not in _MODES:
        raise ModelError(f"node {node.name!r} (Upsample): mode {mode!r} cannot be raised to torch")
    return raiser.call(
        resize, raiser.value(node, 0), None, given, None, mode=mode, coordinates="asymmetric", nearest="floor"
    )


def _floats(raiser: Raiser, node: gs.Node, place: int) -> list[float] | fx.Node | None:
    """A list of numbers: plain where constant, an fx node where computed; ``None`` where empty or left out."""
    if not raiser.has(node, place):
        return None
    array = raiser.array(node, place)
    if array is None:
        return raiser.value(node, place)
    return [float(number) for number in array.reshape(-1)] or None


# -- torch functions -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """How one axis is resized.

    Attributes:
        length, size: places before and after.
        scale: ratio of coordinates, which need not be ``size / length``.
        start, end: part of the axis that is looked at, in shares (``tf_crop_and_resize``).
    """

    length: int
    size: int
    scale: float
    start: float = 0.0
    end: float = 1.0


def resize(
    value: torch.Tensor,
    roi: Numbers | None,
    scales: Numbers | None,
    sizes: Ints | None,
    *,
    mode: str,
    coordinates: str,
    nearest: str,
    cubic: float = -0.75,
    exclude: bool = False,
    antialias: bool = False,
    outside: float = 0.0,
    axes: list[int] | None = None,
    policy: str = "stretch",
) -> torch.Tensor:
    """ONNX ``Resize``.

    Args:
        value: of any rank; integers are computed as floating point and rounded towards zero.
        roi: beginnings and ends of the part to look at, in shares of each axis.
        scales, sizes: one of them, per axis.
        mode: ``nearest``, ``linear`` or ``cubic``.
        coordinates: ``coordinate_transformation_mode``.
        nearest: ``nearest_mode``.
        cubic: coefficient of the cubic kernel.
        exclude: places outside have no weight, the others are scaled up.
        antialias: the kernel is stretched when an axis shrinks.
        outside: result for coordinates outside (``tf_crop_and_resize``).
        axes: axes that the lists speak of; all by default.
        policy: ``keep_aspect_ratio_policy``.
    """
    over = [axis % value.dim() for axis in axes] if axes else list(range(value.dim()))
    plan = _plan(value, over, roi, scales, sizes, coordinates, policy)
    if mode == "linear" and not antialias and _is_interpolate(value, plan, coordinates):
        target = [plan[axis].size if axis in plan else value.shape[axis] for axis in range(2, value.dim())]
        return F.interpolate(value, target, mode=_INTERPOLATE[value.dim()], align_corners=coordinates[0] == "a")
    kind = value.dtype
    result = value if mode == "nearest" or value.is_floating_point() else value.to(torch.float32)
    beyond: list[tuple[int, torch.Tensor]] = []
    for axis, form in plan.items():
        at = _coordinates(form, coordinates, value.device)
        if coordinates == "tf_crop_and_resize":
            beyond.append((axis, (at < 0) | (at > form.length - 1)))
        if mode == "nearest":
            result = result.index_select(axis, _nearest(at, nearest).clamp(0, form.length - 1))
        else:
            matrix = _weights(at, form, mode, cubic, exclude, antialias).to(result.dtype)
            result = torch.tensordot(result, matrix, ([axis], [1])).movedim(-1, axis)
    for axis, places in beyond:
        shape = [-1 if place == axis else 1 for place in range(value.dim())]
        result = result.masked_fill(places.reshape(shape), outside)
    if result.dtype != kind:
        limits = torch.iinfo(kind)
        result = result.clamp(limits.min, limits.max).to(kind)
    return result


def _plan(
    value: torch.Tensor,
    axes: list[int],
    roi: Numbers | None,
    scales: Numbers | None,
    sizes: Ints | None,
    coordinates: str,
    policy: str,
) -> dict[int, Axis]:
    """How each axis is resized; those that stay as they are are left out."""
    crop = coordinates == "tf_crop_and_resize" and roi is not None
    bounds = [float(number) for number in roi] if crop and roi is not None else []
    starts = bounds[: len(axes)] or [0.0] * len(axes)
    ends = bounds[len(axes) :] or [1.0] * len(axes)
    lengths = [value.shape[axis] for axis in axes]
    if scales is not None and len(scales):
        ratios = [float(scale) for scale in scales]
        wanted = [
            length if ratio == 1.0 and not crop else math.floor(length * (end - start) * ratio)
            for length, ratio, start, end in zip(lengths, ratios, starts, ends, strict=True)
        ]
    else:
        wanted = as_ints(sizes if sizes is not None else [])
        ratios = [1.0 if size == length else size / length for size, length in zip(wanted, lengths, strict=True)]
        if policy != "stretch":
            ratio = min(ratios) if policy == "not_larger" else max(ratios)
            ratios, wanted = [ratio] * len(axes), [math.floor(ratio * length + 0.5) for length in lengths]
    found = zip(axes, lengths, wanted, ratios, starts, ends, strict=True)
    # an axis that stays as it is, such as the batch, is not looked at: it may be empty, or free in torch.export
    return {axis: Axis(*form) for axis, *form in found if crop or form[2] != 1.0 or form[1] != form[0]}


def _is_interpolate(value: torch.Tensor, plan: dict[int, Axis], coordinates: str) -> bool:
    """Whether torch's own function gives the same: whole images, and no scale of its own."""
    if coordinates not in ("half_pixel", "align_corners") or value.dim() not in _INTERPOLATE:
        return False
    if not value.is_floating_point():
        return False
    kept = all(axis > 1 for axis in plan)
    exact = all(abs(form.scale * form.length - form.size) < 1e-6 for form in plan.values())
    # torch's half-pixel coordinates below zero count as zero, which for linear weights is the edge as well
    return kept and exact and all(form.size > 1 for axis, form in plan.items() if axis > 1)


def _coordinates(form: Axis, kind: str, device: torch.device) -> torch.Tensor:
    """Where each place of the result lies in the value."""
    at = torch.arange(form.size, dtype=torch.float64, device=device)
    match kind:
        case "half_pixel":
            return (at + 0.5) / form.scale - 0.5
        case "half_pixel_symmetric":
            adjustment = form.size / (form.scale * form.length)
            return form.length / 2 * (1 - adjustment) + (at + 0.5) / form.scale - 0.5
        case "pytorch_half_pixel":
            return (at + 0.5) / form.scale - 0.5 if form.size > 1 else at * 0.0
        case "align_corners":  # onnx's suite takes the length that the scale asks for here, whole or not
            wanted = form.scale * form.length
            return at * ((form.length - 1) / (wanted - 1)) if form.size > 1 else at * 0.0
        case "asymmetric":
            return at / form.scale
        case "tf_half_pixel_for_nn":
            return (at + 0.5) / form.scale
        case "tf_crop_and_resize":
            last = form.length - 1
            if form.size > 1:
                return form.start * last + at * ((form.end - form.start) * last / (form.size - 1))
            return at * 0.0 + 0.5 * (form.start + form.end) * last
    raise ModelError(f"Resize: coordinate_transformation_mode {kind!r} is not known")


def _nearest(at: torch.Tensor, mode: str) -> torch.Tensor:
    match mode:
        case "round_prefer_floor":
            found = torch.ceil(at - 0.5)
        case "round_prefer_ceil":
            found = torch.floor(at + 0.5)
        case "floor":
            found = torch.floor(at)
        case _:
            found = torch.ceil(at)
    return found.to(torch.int64)


def _weights(at: torch.Tensor, form: Axis, mode: str, cubic: float, exclude: bool, antialias: bool) -> torch.Tensor:
    """Matrix ``[size, length]``; what falls outside is the edge's, or nobody's with ``exclude``."""
    stretch = max(1.0, 1.0 / form.scale) if antialias else 1.0
    reach = (1.0 if mode == "linear" else 2.0) * stretch
    first = torch.floor(at - reach).to(torch.int64)
    places = first.unsqueeze(1) + torch.arange(math.ceil(2 * reach) + 2, device=at.device)
    distance = ((places - at.unsqueeze(1)) / stretch).abs()
    kernel = torch.clamp(1 - distance, min=0) if mode == "linear" else _cubic(distance, cubic)
    if exclude:
        kernel = kernel * ((places >= 0) & (places < form.length))
    if exclude or antialias:
        kernel = kernel / kernel.sum(1, keepdim=True)
    matrix = at.new_zeros(form.size, form.length)
    return matrix.scatter_add(1, places.clamp(0, form.length - 1), kernel)


def _cubic(distance: torch.Tensor, a: float) -> torch.Tensor:
    """The cubic convolution kernel (Keys 1981, equation 4)."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, torch.zeros_like(distance)))
