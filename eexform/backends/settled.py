"""Shape arithmetic that comes out the same whatever the batch, computed once and kept as constants."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_graphsurgeon as gs

from eexform.ir import kinds
from eexform.ir.graph import Graph
from eexform.ir.inference import Inference
from eexform.ir.order import captured, ordered


def settled(graph: Graph) -> Graph:
    """``graph`` with constants for everything that is computed from fixed sizes and constants alone.

    What follows the batch, or another size that is free, stays computed. The answers are the same. A tracer that cannot
    read the content of a tensor (``torch.export``) then meets numbers where it would have met tensors of sizes.

    The new constants have the names of the values that they replace and the kind ``constant``: they are not trained.
    """
    flow = graph.flow
    walk = Inference(graph.gs)
    for node in ordered(graph.gs.nodes):
        walk.step(node)
    by_name = {name for node in graph.nodes for body in _bodies(node) for name in captured(body)}
    known: dict[str, np.ndarray] = {}
    for label in flow.shape_nodes:
        outputs = [tensor.name for tensor in flow.nodes[label].outputs if tensor.name]
        contents = {name: _content(walk, name) for name in outputs}
        if by_name.isdisjoint(outputs) and set(graph.outputs).isdisjoint(outputs):
            known.update({name: found for name, found in contents.items() if found is not None})
    if not known:
        return graph
    draft = graph.copy().gs
    made = {name: gs.Constant(name, values) for name, values in known.items()}
    for node in list(draft.nodes):
        if node.name in flow.shape_nodes and all(tensor.name in made for tensor in node.outputs if tensor.name):
            draft.nodes.remove(node)
            node.inputs.clear()
            node.outputs.clear()
    for node in draft.nodes:
        for place, tensor in enumerate(node.inputs):
            if tensor.name in made and not tensor.inputs:
                node.inputs[place] = made[tensor.name]
    listed = kinds.kinds(graph.metadata)
    fixed: kinds.Kind = "constant"
    listed.update(dict.fromkeys(made, fixed))
    return graph.replace(draft, metadata=kinds.with_kinds(graph.metadata, listed))


def _content(walk: Inference, name: str) -> np.ndarray | None:
    """What a value holds, where it holds the same at every probe of its sizes."""
    found = [known.content for known in walk.known(name)]
    first = found[0]
    if first is None or any(other is None or not _same(first, other) for other in found[1:]):
        return None
    return first


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _bodies(node: gs.Node) -> Iterable[gs.Graph]:
    return (value for value in node.attrs.values() if isinstance(value, gs.Graph))
