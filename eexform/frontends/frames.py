"""Sequences that are held time first, [T, N, C], are also there batch first, [N, T, C], which a head can read.

Recurrent layers and transformers (``batch_first=False`` is torch's default) hand such values on from layer to layer,
and exporters drop the transpositions between two layers that are both called batch first. A head reads samples on axis
0, so without this such a network has no sites. Pairs that no head uses are dropped by runtimes when they load.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_graphsurgeon as gs

from eexform.frontends.rows import lane
from eexform.ir.graph import BATCH
from eexform.ir.inference import Inference

_RECURRENT = ("GRU", "LSTM", "RNN")


def batch_first(nodes: Iterable[gs.Node], walk: Inference) -> list[gs.Node]:
    """The nodes, with a pair of transpositions behind every value between two layers that is held time first.

    Args:
        nodes: in topological order; they are changed in place.
        walk: inference that has seen all of them.
    """
    found: list[gs.Node] = []
    for node in nodes:
        found.append(node)
        for tensor in node.outputs:
            if tensor.name and _time_first(tensor, walk) and _between_layers(node, tensor):
                found += _pair(tensor)
    return found


def _time_first(tensor: gs.Tensor, walk: Inference) -> bool:
    known = walk.type(tensor.name)
    if known.shape is None or len(known.shape) != 3 or known.dtype != np.float32:
        return False
    return lane(known) == 1 and known.shape[1] == BATCH


def _between_layers(node: gs.Node, tensor: gs.Tensor) -> bool:
    """Whether a recurrent layer reads it, or it is a residual stream: a sum or its normalisation, used twice."""
    if node.op == "Transpose":
        return False  # it comes batch first
    users: list[gs.Node] = tensor.outputs
    if any(user.op in _RECURRENT and user.inputs[0] is tensor for user in users):
        return True
    stream = node.op == "LayerNormalization" or (
        node.op == "Add" and not any(isinstance(operand, gs.Constant) for operand in node.inputs)
    )
    return stream and len(users) > 1


def _pair(tensor: gs.Variable) -> list[gs.Node]:
    users: list[gs.Node] = list(tensor.outputs)
    stem = f"{tensor.name}.{BATCH}"
    first, again = gs.Variable(f"{stem}.first"), gs.Variable(f"{stem}.again")
    for user in users:
        for place, operand in enumerate(user.inputs):
            if operand is tensor and user.op not in ("Shape", "Size"):
                user.inputs[place] = again
    return [
        gs.Node("Transpose", f"{stem}.first", {"perm": [1, 0, 2]}, [tensor], [first]),
        gs.Node("Transpose", f"{stem}.again", {"perm": [1, 0, 2]}, [first], [again]),
    ]
