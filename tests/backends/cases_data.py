"""Random operators that move data about, pick and place by index, or compute shapes (see ``random_ops``)."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.backends.random_ops import Case, Draw

KINDS = ("float32", "int64", "bool", "uint8")


def cut(draw: Draw) -> Case:
    value = draw.array(draw.shape(), KINDS)
    axes = draw.axes(value.ndim) if draw.flag() else None
    count = draw.number(1, value.ndim) if axes is None else len(axes)
    starts, ends = (np.array(draw.numbers(count, -6, 6), np.int64) for _ in range(2))
    steps = np.array([draw.pick([-2, -1, 1, 2]) for _ in range(count)], np.int64) if draw.flag() else None
    if draw.number(0, 3) == 0:
        far = np.iinfo(np.int64).max if draw.flag() else np.iinfo(np.int32).max
        ends = np.where(steps < 0, -far, far) if steps is not None else np.full(count, far)
    if steps is not None and axes is None:
        axes = np.arange(count)
    operands = [value, starts, ends, axes, steps]
    while operands[-1] is None:
        operands.pop()
    return Case("Slice", operands)


def gather(draw: Draw) -> Case:
    value = draw.array((draw.number(1, 4), *draw.numbers(draw.number(0, 3), 1, 4)), KINDS)
    axis = draw.axis(value.ndim)
    size = value.shape[axis]
    places = draw.random.integers(-size if draw.flag() else 0, size, draw.shape(0, 2))
    return Case("Gather", [value, np.asarray(places, draw.pick([np.int32, np.int64]))], {"axis": axis})


def embedding(draw: Draw) -> Case:
    table = draw.weights(draw.number(1, 5), draw.number(1, 4))
    places = draw.random.integers(-len(table), len(table), draw.shape(1, 3))
    case = gather_case(table, np.asarray(places, draw.pick([np.int32, np.int64])))
    return case


def gather_case(table: np.ndarray, places: np.ndarray) -> Case:
    """Looking up in a table that may be trained."""
    return Case("Gather", [table, places], {"axis": 0})


def gather_elements(draw: Draw) -> Case:
    value = draw.array((draw.number(1, 4), *draw.numbers(draw.number(0, 3), 1, 4)), KINDS)
    axis = draw.axis(value.ndim)
    shape = [draw.number(0, size) for size in value.shape]
    shape[axis] = draw.number(1, 5)
    places = draw.random.integers(-value.shape[axis], value.shape[axis], shape)
    return Case("GatherElements", [value, np.asarray(places, draw.pick([np.int32, np.int64]))], {"axis": axis})


def gather_nd(draw: Draw) -> Case:
    value = draw.array(tuple(draw.numbers(draw.number(1, 4), 1, 4)), KINDS)
    batch = draw.number(0, value.ndim - 1)
    depth = draw.number(1, value.ndim - batch)
    outer = (*value.shape[:batch], *draw.numbers(draw.number(0, 2), 1, 3))
    limits = np.array(value.shape[batch : batch + depth])
    places = draw.random.integers(-limits if draw.flag() else 0 * limits, limits, (*outer, depth))
    return Case("GatherND", [value, places], {"batch_dims": batch})


def scatter_elements(draw: Draw) -> Case:
    kind, reduction = draw.pick(["float32", "int64"]), draw.pick(["none", "add", "mul", "max", "min"])
    value = draw.array(tuple(draw.numbers(draw.number(1, 3), 1, 4)), [kind])
    axis = draw.axis(value.ndim)
    shape = [draw.number(1, size) for size in value.shape]
    whole = np.argsort(draw.random.random(value.shape), axis)  # no place twice: the order would decide
    places = whole[tuple(slice(size) for size in shape)]
    if reduction != "none" and draw.flag():
        places = draw.random.integers(-value.shape[axis], value.shape[axis], shape)
    operands = [value, places, draw.array(shape, [kind])]
    return Case("ScatterElements", operands, {"axis": axis, "reduction": reduction})


def scatter_nd(draw: Draw) -> Case:
    kind, reduction = draw.pick(["float32", "int64"]), draw.pick(["none", "add", "mul", "max", "min"])
    value = draw.array(tuple(draw.numbers(draw.number(1, 3), 1, 4)), [kind])
    depth = draw.number(1, value.ndim)
    places = np.stack(np.meshgrid(*(np.arange(size) for size in value.shape[:depth]), indexing="ij"), -1)
    places = draw.random.permutation(places.reshape(-1, depth))[: draw.number(1, 4)]
    if draw.flag():
        places = places - np.array(value.shape[:depth])
    if reduction != "none" and draw.flag():
        places = np.concatenate([places, places])
    updates = draw.array((len(places), *value.shape[depth:]), [kind])
    return Case("ScatterND", [value, places, updates], {"reduction": reduction})


def one_hot(draw: Draw) -> Case:
    places = np.asarray(draw.random.integers(-5, 5, draw.shape(0, 3)), draw.pick([np.int64, np.float32, np.int32]))
    values = np.array([-1, 2], draw.pick([np.float32, np.int64]))
    depth = np.full(draw.pick([(), (1,)]), 4, draw.pick([np.int64, np.float32]))
    return Case("OneHot", [places, depth, values], {"axis": draw.number(-1 - places.ndim, places.ndim)})


def split(draw: Draw) -> Case:
    value = draw.array(draw.shape(), KINDS)
    axis, outputs = draw.axis(value.ndim), draw.number(1, 3)
    if draw.flag():
        size = value.shape[axis]
        cuts = sorted(draw.numbers(outputs - 1, 0, size))
        pieces = np.diff([0, *cuts, size]).astype(np.int64)
        return Case("Split", [value, pieces], {"axis": axis}, outputs)
    if -(-value.shape[axis] // outputs) * (outputs - 1) > value.shape[axis]:  # the last one would be less than empty
        outputs = 1
    return Case("Split", [value], {"axis": axis, "num_outputs": outputs}, outputs)


def concat(draw: Draw) -> Case:
    shape, kind = draw.shape(), draw.pick(KINDS)
    axis = draw.axis(len(shape))
    parts = []
    for _ in range(draw.number(1, 3)):
        sizes = list(shape)
        sizes[axis] = draw.number(0, 3)
        parts.append(draw.array(sizes, [kind]))
    return Case("Concat", parts, {"axis": axis})


def reshape(draw: Draw) -> Case:
    value = draw.array(draw.shape(0, 4), KINDS)
    sizes = list(draw.data.draw(st.permutations(value.shape)))
    keep = draw.flag()
    if sizes and draw.flag():
        place = draw.number(0, len(sizes) - 1)
        if np.prod([size for at, size in enumerate(sizes) if at != place]) > 0:
            sizes[place] = -1
    elif not keep and sizes:
        sizes = [0 if draw.flag() else size for size in value.shape]
    if draw.flag():
        sizes.insert(0, 1) if keep or 0 not in sizes else None
    return Case("Reshape", [value, np.array(sizes, np.int64)], {"allowzero": int(keep)})


def flatten(draw: Draw) -> Case:
    value = draw.array(draw.shape(1, 4), KINDS)
    return Case("Flatten", [value], {"axis": draw.number(-value.ndim, value.ndim)} if draw.flag() else {})


def squeeze(draw: Draw) -> Case:
    shape = list(draw.shape(1, 4))
    axes = draw.axes(len(shape), 1)
    for axis in axes.tolist():
        shape[axis] = 1
    return Case("Squeeze", [draw.array(shape, KINDS), *([axes] if draw.flag() else [])])


def unsqueeze(draw: Draw) -> Case:
    value, more = draw.array(draw.shape(0, 3), KINDS), draw.number(1, 2)
    rank = value.ndim + more
    axes = draw.data.draw(st.permutations(range(rank)))[:more]
    return Case("Unsqueeze", [value, np.array([axis - rank if draw.flag() else axis for axis in axes], np.int64)])


def transpose(draw: Draw) -> Case:
    value = draw.array(draw.shape(0, 4), KINDS)
    return Case("Transpose", [value], {"perm": list(draw.data.draw(st.permutations(range(value.ndim))))} if value.ndim
                and draw.flag() else {})  # fmt: skip


def expand(draw: Draw) -> Case:
    shape = draw.shape(0, 4)
    target = [1 if draw.flag() else size for size in shape]
    target = target[draw.number(0, len(target)) :] if draw.flag() else [*draw.numbers(1, 1, 3), *target]
    return Case("Expand", [draw.array(draw.broadcast(shape), KINDS), np.array(target, np.int64)])


def tile(draw: Draw) -> Case:
    value = draw.array(draw.shape(1, 4), KINDS)
    return Case("Tile", [value, np.array(draw.numbers(value.ndim, 0, 3), np.int64)])


def shape(draw: Draw) -> Case:
    value = draw.array(draw.shape(0, 4), KINDS)
    attrs = {name: draw.number(-5, 5) for name in ("start", "end") if draw.flag()}
    return Case(draw.pick(["Shape", "Size"]), [value], attrs) if draw.flag() else Case("Shape", [value], attrs)


def count_up(draw: Draw) -> Case:
    kind = draw.pick(["float32", "float64", "int32", "int64"])
    start, limit = (draw.number(-5, 5) for _ in range(2))
    step = draw.pick([-2, -1, 1, 2, 3] if kind[0] == "i" else [-0.5, 0.25, 1.0, 1.5])
    return Case("Range", [np.array(number, kind) for number in (start, limit, step)])


def filled(draw: Draw) -> Case:
    attrs: dict[str, Any] = {}
    if draw.flag():
        import onnx_graphsurgeon as gs

        attrs["value"] = gs.Constant("fill", draw.array((1,), KINDS))
    return Case("ConstantOfShape", [np.array(draw.numbers(draw.number(0, 3), 0, 3), np.int64)], attrs)


def triangle(draw: Draw) -> Case:
    value = draw.array(draw.shape(2, 4), ["float32", "int64", "bool"])
    operands = [value, *([np.array(draw.number(-4, 4), np.int64)] if draw.flag() else [])]
    return Case("Trilu", operands, {"upper": draw.number(0, 1)} if draw.flag() else {})


def eye(draw: Draw) -> Case:
    value = draw.array(draw.shape(2, 2), ["float32", "int64"])
    attrs = {"k": draw.number(-4, 4)} | ({"dtype": draw.pick([1, 7])} if draw.flag() else {})
    return Case("EyeLike", [value], attrs)


def non_zero(draw: Draw) -> Case:
    return Case("NonZero", [draw.array(draw.shape(0, 4), KINDS)])


def compress(draw: Draw) -> Case:
    value = draw.array(draw.shape(), KINDS)
    axis = draw.axis(value.ndim) if draw.flag() else None
    length = value.size if axis is None else value.shape[axis]
    kept = draw.array((draw.number(0, length),), ["bool"])
    return Case("Compress", [value, kept], {} if axis is None else {"axis": axis})


def backwards(draw: Draw) -> Case:
    time = draw.number(0, 1)
    value = draw.array((draw.number(1, 4), draw.number(1, 4), *draw.numbers(draw.number(0, 2), 1, 3)), ["float32"])
    lengths = draw.random.integers(1, value.shape[time] + 1, value.shape[1 - time])
    return Case("ReverseSequence", [value, lengths], {"time_axis": time, "batch_axis": 1 - time})


def unique(draw: Draw) -> Case:
    value = np.round(draw.array(draw.shape(1, 3), ["float32", "int64"]))
    value = value if value.size else np.ones((2,), value.dtype)
    attrs = {"sorted": draw.number(0, 1)} | ({"axis": draw.axis(value.ndim)} if draw.flag() else {})
    return Case("Unique", [value], attrs, 4)


DATA = [
    cut, gather, embedding, gather_elements, gather_nd, scatter_elements, scatter_nd, one_hot, split, concat, reshape,
    flatten, squeeze, unsqueeze, transpose, expand, tile, shape, count_up, filled, triangle, eye, non_zero, compress,
    backwards, unique,
]  # fmt: skip
