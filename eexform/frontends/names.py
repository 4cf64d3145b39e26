"""Tidying an imported graph: unique names, no ``Constant`` nodes, nothing dead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from eexform.ir.order import node_inputs, ordered

_CONSTANT_FORMS: dict[str, Callable[[Any], np.ndarray]] = {
    "value_int": lambda v: np.array(v, np.int64),
    "value_ints": lambda v: np.array(v, np.int64),
    "value_float": lambda v: np.array(v, np.float32),
    "value_floats": lambda v: np.array(v, np.float32),
}


def constants_to_initialisers(body: gs.Graph) -> None:
    """Turn ``Constant`` nodes into constants, in place (string and sparse ones stay nodes)."""
    kept = []
    outputs = {id(tensor) for tensor in body.outputs}
    for node in body.nodes:
        value = _constant_value(node)
        if value is None or id(node.outputs[0]) in outputs:
            kept.append(node)
            continue
        tensor = node.outputs[0]
        node.outputs.clear()
        tensor.to_constant(value)
    body.nodes = kept


def tidy(draft: gs.Graph) -> None:
    """Drop what no output needs, sort, give every node a unique name, and forget stale intermediate types.

    Types of custom operators' and control flow's outputs stay: nothing else knows them.
    """
    nodes = ordered(draft.nodes)
    needed = {tensor.name for tensor in draft.outputs}
    kept: list[gs.Node] = []
    for node in reversed(nodes):
        if any(tensor.name in needed for tensor in node.outputs if tensor.name):
            needed.update(node_inputs(node))
            kept.append(node)
        else:
            node.inputs.clear()
            node.outputs.clear()
    draft.nodes = kept[::-1]
    _name_nodes(draft)
    boundary = {id(tensor) for tensor in (*draft.inputs, *draft.outputs)}
    for node in draft.nodes:
        opaque = bool(node.domain and node.domain != "ai.onnx") or any(
            isinstance(value, gs.Graph) for value in node.attrs.values()
        )
        for tensor in node.outputs:
            if not opaque and isinstance(tensor, gs.Variable) and id(tensor) not in boundary:
                tensor.dtype, tensor.shape = None, None


def _name_nodes(draft: gs.Graph) -> None:
    """Keep the first use of each name; number the others by operator, in topological order."""
    taken = {node.name for node in draft.nodes if node.name}
    seen: set[str] = set()
    numbers: Counter[str] = Counter()
    for node in draft.nodes:
        if node.name and node.name not in seen:
            seen.add(node.name)
            continue
        while True:
            name = f"{node.op}_{numbers[node.op]}"
            numbers[node.op] += 1
            if name not in taken:
                break
        node.name = name
        taken.add(name)
        seen.add(name)


def _constant_value(node: gs.Node) -> Any:
    """What a ``Constant`` node holds (an array, or graphsurgeon's lazy stand-in); ``None`` for other nodes."""
    if node.op != "Constant" or node.domain not in (None, "", "ai.onnx"):
        return None
    for key, value in node.attrs.items():
        if key == "value" and isinstance(value, gs.Constant):
            return value._values
        if key in _CONSTANT_FORMS:
            return _CONSTANT_FORMS[key](value)
    return None
