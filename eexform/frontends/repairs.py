"""What exporters write that stands in the way of another batch or of early exits, put right.

Each repair looks at one node before its outputs are inferred, changes it in place and returns the nodes that must run
in front of it. None of them is believed: what follows is inferred and judged like everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import numpy as np
import onnx_graphsurgeon as gs

from eexform.frontends.rows import lane
from eexform.ir.graph import BATCH
from eexform.ir.inference import Inference, split_dim


def repair(node: gs.Node, walk: Inference, fixed: int | None) -> list[gs.Node]:
    """Free ``node`` from the exported batch where it names it.

    Args:
        node: changed in place.
        walk: inference, up to this node.
        fixed: the exported batch; ``None`` where the model declares a symbol (and may be traced with one sample).

    Returns:
        New nodes that compute what ``node`` now needs.
    """
    if node.domain not in (None, "", "ai.onnx"):
        return []
    if node.op == "Reshape":
        _free_reshape(node, walk, fixed)
    elif node.op == "Resize":
        _free_resize(node, walk, fixed)
    elif node.op == "Gather":
        _plain_gather(node, walk, fixed)
    elif node.op == "Concat" and fixed in (None, 1):
        return _free_concat(node, walk)
    return []


def _free_reshape(node: gs.Node, walk: Inference, fixed: int | None) -> None:
    """Replace the exported batch in a constant target by ``-1``.

    With the data [P, k*N, S] and a target whose sizes multiply to ``b`` samples, the batch belongs to the first target
    axis in front of which there are as many elements as P has. Where the target already follows the batch on that axis,
    nothing is done.
    """
    target = node.inputs[1]
    if not isinstance(target, gs.Constant) or isinstance(node.inputs[0], gs.Constant) or not node.inputs[0].name:
        return
    shape = walk.type(node.inputs[0].name).shape
    source = lane(walk.type(node.inputs[0].name))
    if shape is None or source is None or source == -1:
        return
    front = [dim for dim in shape[:source] if isinstance(dim, int)]
    behind = [dim for dim in shape[source + 1 :] if isinstance(dim, int)]
    if len(front) + len(behind) + 1 < len(shape):
        return  # another symbol is in play: what the target means for it is not known
    dims = _copied_zeros(target, shape, bool(node.attrs.get("allowzero", 0)))
    if dims is None:
        return
    before = _volume(front)
    sample = before * split_dim(str(shape[source]))[0] * _volume(behind)
    others = _volume([dim for dim in dims if dim != -1])
    if not sample or not others:
        return
    exported = fixed if fixed is not None else (1 if -1 in dims else others // sample)
    if not exported or exported * sample % others:
        return  # it does not fit the exported batch either: inference says so
    resolved = [exported * sample // others if dim == -1 else dim for dim in dims]
    if _volume(resolved) != exported * sample:
        return
    places = [j for j, dim in enumerate(resolved) if _volume(resolved[:j]) == before and dim % exported == 0]
    if not places or dims[places[0]] == -1:
        return
    if fixed is None and -1 in dims and (dims[places[0]] != 1 or (sample % others == 0 and dims[0] == -1)):
        return  # the model says that its batch is free and the -1 follows it; only a plain 1 was left from tracing
    values = [-1 if j == places[0] else dim for j, dim in enumerate(resolved)]
    node.inputs[1] = gs.Constant(f"{node.name}.{BATCH}.shape", np.array(values, np.int64))


def _copied_zeros(target: gs.Constant, shape: Sequence[object], literal: bool) -> list[int] | None:
    """The target with zeros replaced by the sizes they copy; ``None`` where one of them copies the batch already."""
    dims = []
    for i, dim in enumerate(np.asarray(target.values).reshape(-1).tolist()):
        if dim == 0 and not literal:
            copied = shape[i] if i < len(shape) else None
            if not isinstance(copied, int):
                return None
            dim = copied
        dims.append(int(dim))
    return dims


def _free_resize(node: gs.Node, walk: Inference, fixed: int | None) -> None:
    """Sizes that name the batch become scales, where the scales are exact in single precision."""
    if len(node.inputs) < 4 or not isinstance(node.inputs[3], gs.Constant) or "axes" in node.attrs:
        return
    known = walk.type(node.inputs[0].name)
    sizes = np.asarray(node.inputs[3].values).reshape(-1).tolist()
    if known.shape is None or known.batch_axis is None or len(sizes) != len(known.shape):
        return
    if sizes[known.batch_axis] != (fixed or 1) or node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        return
    scales = []
    for axis, (dim, size) in enumerate(zip(known.shape, sizes, strict=True)):
        if axis == known.batch_axis:
            scales.append(1.0)
        elif isinstance(dim, int) and dim and float(np.float32(size / dim)) == size / dim:
            scales.append(size / dim)
        else:
            return
    node.inputs[2] = gs.Constant(f"{node.name}.{BATCH}.scales", np.array(scales, np.float32))
    del node.inputs[3]


def _plain_gather(node: gs.Node, walk: Inference, fixed: int | None) -> None:
    """Everything picked from a flat value in its own order is a reshape.

    torch decomposes ``AdaptiveAvgPool1d(1)`` and other views into ``as_strided``, which is written as a pick by
    computed places: over all samples at once, so it looks as if they met.
    """
    data = walk.type(node.inputs[0].name) if isinstance(node.inputs[0], gs.Variable) else None
    if data is None or data.shape is None or len(data.shape) != 1 or lane(data) != 0:
        return
    if int(node.attrs.get("axis", 0)) not in (0, -1):
        return
    first, second = _contents(node.inputs[1], walk)
    if not _counts(first) or not _counts(second):
        return
    length, sizes = split_dim(str(data.shape[0]))[0], (first.size, second.size)
    if first.shape == second.shape:  # written for the exported batch
        if fixed is None or sizes[0] != fixed * length or first.shape[0] % fixed:
            return
        target = [-1, *first.shape[1:]]
    else:
        if sizes != tuple(known.shape[0] for known in walk.known(node.inputs[0].name)[:2] if known.shape):
            return
        target = [one if one == other else -1 for one, other in zip(first.shape, second.shape, strict=True)]
        if target.count(-1) != 1:
            return
    node.op, node.attrs = "Reshape", {}
    node.inputs[1] = gs.Constant(f"{node.name}.{BATCH}.shape", np.array(target, np.int64))


def _contents(tensor: gs.Tensor, walk: Inference) -> tuple[np.ndarray | None, np.ndarray | None]:
    """What a tensor holds at each of the two batches that are tried."""
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values), np.asarray(tensor.values)
    first, second, *_ = walk.known(tensor.name)
    return first.content, second.content


def _counts(index: np.ndarray | None) -> TypeGuard[np.ndarray]:
    """Whether ``index`` holds 0, 1, 2, ... in order."""
    return index is not None and index.ndim > 0 and np.array_equal(index.reshape(-1), np.arange(index.size))


def _free_concat(node: gs.Node, walk: Inference) -> list[gs.Node]:
    """Samples joined with a constant whose batch axis is one (a class token): the constant is expanded first."""
    known = [walk.type(t.name) if not isinstance(t, gs.Constant) else None for t in node.inputs]
    samples = [(i, k) for i, k in enumerate(known) if k is not None and k.batch_axis is not None]
    if not samples or len(samples) == len(node.inputs) or samples[0][1].shape is None:
        return []
    first, axis, rank = samples[0][0], samples[0][1].batch_axis, len(samples[0][1].shape)
    assert axis is not None
    if int(node.attrs["axis"]) % rank == axis:
        return []
    made: list[gs.Node] = []
    target: gs.Tensor | None = None
    for i, tensor in enumerate(node.inputs):
        shape = tuple(tensor.shape) if isinstance(tensor, gs.Constant) else (known[i].shape or ())  # type: ignore[union-attr]
        if len(shape) != rank or shape[axis] != 1 or not all(isinstance(dim, int) for dim in shape):
            continue
        if target is None:
            target, made = _batch_as_shape(node, node.inputs[first], axis, rank)
        expanded = gs.Variable(f"{node.name}.{BATCH}.expanded{i}")
        made.append(gs.Node("Expand", f"{node.name}.{BATCH}.expand{i}", inputs=[tensor, target], outputs=[expanded]))
        node.inputs[i] = expanded
    return made


def _batch_as_shape(node: gs.Node, sample: gs.Tensor, axis: int, rank: int) -> tuple[gs.Tensor, list[gs.Node]]:
    """[1, .., N, .., 1] as a value, from the shape of a value that carries samples."""
    stem = f"{node.name}.{BATCH}"
    shape, batch, target = (gs.Variable(f"{stem}.{part}", np.int64) for part in ("shape", "batch", "target"))
    ones = [gs.Constant(f"{stem}.ones{i}", np.ones(n, np.int64)) for i, n in enumerate((axis, rank - axis - 1))]
    pieces = [piece for piece in (ones[0], batch, ones[1]) if not isinstance(piece, gs.Constant) or piece.shape[0]]
    index = gs.Constant(f"{stem}.axis", np.array([axis], np.int64))
    return target, [
        gs.Node("Shape", f"{stem}.shape", inputs=[sample], outputs=[shape]),
        gs.Node("Gather", f"{stem}.gather", {"axis": 0}, [shape, index], [batch]),
        gs.Node("Concat", f"{stem}.concat", {"axis": 0}, pieces, [target]),
    ]


def _volume(dims: Sequence[int]) -> int:
    volume = 1
    for dim in dims:
        volume *= dim
    return volume
