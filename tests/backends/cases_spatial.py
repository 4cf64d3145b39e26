"""Random convolutions, pooling, resizing and padding (see ``random_ops``)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.backends.random_ops import BATCHES, Case, Draw

AUTO = ("SAME_UPPER", "SAME_LOWER", "VALID")


def _window(draw: Draw, rank: int, *, pooling: bool = False) -> tuple[list[int], dict[str, Any]]:
    """A kernel and the attributes of how it is moved."""
    kernel = draw.numbers(rank, 1, 3)
    attrs: dict[str, Any] = {}
    if draw.flag():
        attrs["strides"] = draw.numbers(rank, 1, 3)
    if draw.flag():
        attrs["dilations"] = draw.numbers(rank, 1, 2)
    if draw.number(0, 2) == 0:
        attrs["auto_pad"] = draw.pick(AUTO)
        if pooling and attrs["auto_pad"] != "VALID":  # onnxruntime pads for a window without gaps, against the standard
            attrs.pop("dilations", None)
    elif draw.flag():
        attrs["pads"] = [draw.number(0, size - 1) for size in kernel * 2]
    return kernel, attrs


def conv(draw: Draw) -> Case:
    rank, groups = draw.number(1, 3), draw.number(1, 3)
    kernel, attrs = _window(draw, rank)
    per_group, outputs = draw.number(1, 3), groups * draw.number(1, 2)
    value = draw.weights(draw.pick(BATCHES), groups * per_group, *draw.numbers(rank, 5, 9))
    bias = draw.weights(outputs) if draw.flag() else None
    attrs |= {"group": groups} | ({"kernel_shape": kernel} if draw.flag() else {})
    operands = [value, draw.weights(outputs, per_group, *kernel), *([bias] if bias is not None or draw.flag() else [])]
    return Case("Conv", operands, attrs, loose=10)


def conv_transpose(draw: Draw) -> Case:
    rank, groups = draw.number(1, 3), draw.number(1, 3)
    kernel, attrs = _window(draw, rank)
    strides = attrs.get("strides", [1] * rank)
    dilations = attrs.get("dilations", [1] * rank)
    sizes = draw.numbers(rank, 2, 5)
    if draw.flag():
        attrs["output_padding"] = [
            draw.number(0, max(step, wide) - 1) for step, wide in zip(strides, dilations, strict=True)
        ]
    if draw.number(0, 2) == 0:
        attrs.pop("pads", None)
        spans = [(size - 1) * wide + 1 for size, wide in zip(kernel, dilations, strict=True)]
        attrs["output_shape"] = [(size - 1) * step + span - draw.number(0, 2) for size, step, span in
                                 zip(sizes, strides, spans, strict=True)]  # fmt: skip
        if min(attrs["output_shape"]) < 1:
            del attrs["output_shape"]
    more = attrs.get("output_padding", [0] * rank)
    gaps = [
        (size - 1) * wide + 1 + extra < step
        for size, wide, extra, step in zip(kernel, dilations, more, strides, strict=True)
    ]
    if any(gaps):  # the standard fills up to the size that SAME asks for, onnxruntime does not
        attrs.pop("auto_pad", None)
    value = draw.weights(draw.pick(BATCHES), groups * 2, *sizes)
    per_group = draw.number(1, 2)
    operands = [value, draw.weights(groups * 2, per_group, *kernel)]
    if draw.flag():
        operands.append(draw.weights(groups * per_group))
    return Case("ConvTranspose", operands, attrs | {"group": groups, "kernel_shape": kernel}, loose=10)


def pool(draw: Draw) -> Case:
    op, rank = draw.pick(["MaxPool", "AveragePool", "LpPool"]), draw.number(1, 3)
    kernel, attrs = _window(draw, rank, pooling=True)
    attrs |= {"kernel_shape": kernel, "ceil_mode": draw.number(0, 1)}
    value = draw.weights(draw.pick(BATCHES), draw.number(1, 3), *draw.numbers(rank, 5, 9))
    if op == "AveragePool":
        attrs["count_include_pad"] = draw.number(0, 1)
    if op == "LpPool":
        attrs["p"] = draw.number(1, 3)
        value = np.maximum(value, 0) if draw.flag() else value
    return Case(op, [value], attrs)


def max_pool_of_integers(draw: Draw) -> Case:
    kernel, attrs = _window(draw, 2, pooling=True)
    attrs |= {"kernel_shape": kernel, "ceil_mode": draw.number(0, 1)}
    if attrs.get("auto_pad", "VALID") != "VALID":  # steps wider than the window: for integers onnxruntime starts behind
        attrs.pop("strides", None)
    return Case("MaxPool", [draw.array((2, 2, 7, 6), ["int8", "uint8"])], attrs)


def places_of_maxima(draw: Draw) -> Case:
    rank = draw.number(1, 3)
    kernel, attrs = _window(draw, rank, pooling=True)
    attrs |= {"kernel_shape": kernel, "ceil_mode": draw.number(0, 1)}
    value = draw.weights(draw.pick(BATCHES), 2, *draw.numbers(rank, 5, 8))
    return Case("MaxPool", [value], attrs, 2)


def global_pool(draw: Draw) -> Case:
    op = draw.pick(["GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"])
    value = draw.array([draw.pick(BATCHES), *draw.numbers(draw.number(2, 4), 1, 5)], ["float32"])
    return Case(op, [value], {"p": draw.number(1, 3)} if op == "GlobalLpPool" else {})


def resize(draw: Draw) -> Case:
    rank, mode = draw.number(3, 4), draw.pick(["nearest", "linear", "cubic"])
    kinds = ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric"]
    attrs: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": draw.pick(kinds)}
    if mode == "nearest":
        attrs["nearest_mode"] = draw.pick(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
    if mode == "cubic":
        rank = 4
        attrs |= {"cubic_coeff_a": draw.pick([-0.75, -0.5]), "exclude_outside": draw.number(0, 1)}
    value = draw.weights(draw.pick([1, 2, 7]), 2, *draw.numbers(rank - 2, 2, 5))
    if draw.flag():
        # where the size that a scale asks for is not whole, onnxruntime's corners are not those of onnx's suite
        whole = attrs["coordinate_transformation_mode"] == "align_corners"
        steps = [1.0, 2.0, 3.0] if whole else [0.5, 1.0, 1.5, 2.0, 3.0]
        scales = [1.0, 1.0, *(draw.pick(steps) for _ in range(rank - 2))]
        return Case("Resize", [value, None, np.array(scales, np.float32)], attrs, fixed=(2,), loose=10)
    sizes = [*value.shape[:2], *draw.numbers(rank - 2, 1, 9)]
    return Case("Resize", [value, None, None, np.array(sizes, np.int64)], attrs, fixed=(3,), loose=10)


def shrunk_without_aliases(draw: Draw) -> Case:
    attrs = {"mode": draw.pick(["linear", "cubic"]), "antialias": 1, "exclude_outside": draw.number(0, 1)}
    if attrs["mode"] == "linear":
        attrs["exclude_outside"] = 0
    value = draw.weights(2, 2, *draw.numbers(2, 5, 9))
    sizes = [2, 2, *draw.numbers(2, 2, 6)]
    return Case("Resize", [value, None, None, np.array(sizes, np.int64)], attrs, fixed=(3,), loose=10)


def pad(draw: Draw) -> Case:
    mode = draw.pick(["constant", "edge", "wrap", "reflect"])
    shape = draw.shape()
    value = draw.array([shape[0], *(size + 2 for size in shape[1:])], ["float32", "float64", "int64", "bool"])
    over = draw.axes(value.ndim, 1) if draw.flag() else None
    around = range(value.ndim) if over is None else over
    lengths = [value.shape[axis] for axis in around]
    least = [-min(1, max(0, size - 1)) for size in lengths] if mode == "constant" else [0] * len(lengths)
    pads = [
        draw.number(low, max(0, min(2, size - 1))) for _ in range(2) for low, size in zip(least, lengths, strict=True)
    ]
    fill = np.asarray(draw.pick([0, 1]), value.dtype) if mode == "constant" and draw.flag() else None
    operands = [value, np.array(pads, np.int64), fill, over]
    while operands[-1] is None:
        operands.pop()
    return Case("Pad", operands, {"mode": mode})


def rearranged(draw: Draw) -> Case:
    op, block = draw.pick(["DepthToSpace", "SpaceToDepth"]), draw.number(1, 3)
    high, wide = draw.numbers(2, 1, 3)
    batch, channels = draw.pick(BATCHES), draw.number(1, 3)
    if op == "SpaceToDepth":
        return Case(op, [draw.weights(batch, channels, high * block, wide * block)], {"blocksize": block})
    attrs = {"blocksize": block, "mode": draw.pick(["DCR", "CRD"])}
    return Case(op, [draw.weights(batch, channels * block**2, high, wide)], attrs)


def grid_sample(draw: Draw) -> Case:
    rank = draw.number(2, 3)
    value = draw.weights(draw.pick([1, 2, 7]), 2, *draw.numbers(rank, 2, 5))
    grid = np.asarray(draw.random.uniform(-1.3, 1.3, (value.shape[0], *draw.numbers(rank, 1, 4), rank)), np.float32)
    modes = ["linear", "nearest", "cubic"] if rank == 2 else ["linear", "nearest"]
    attrs = {"mode": draw.pick(modes), "align_corners": draw.number(0, 1),
             "padding_mode": draw.pick(["zeros", "border", "reflection"])}  # fmt: skip
    return Case("GridSample", [value, grid], attrs, loose=20)


SPATIAL = [
    conv, conv_transpose, pool, max_pool_of_integers, places_of_maxima, global_pool, resize, shrunk_without_aliases,
    pad, rearranged, grid_sample,
]  # fmt: skip
