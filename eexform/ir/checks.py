"""Well-formedness: what every graph holds to before and after every pass."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_graphsurgeon as gs

from eexform.errors import GraphError, need
from eexform.ir.exits import outputs_of
from eexform.ir.graph import Graph
from eexform.ir.order import node_inputs

_WEIGHTED = {
    "Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "LayerNormalization", "InstanceNormalization",
    "GroupNormalization", "PRelu", "LSTM", "GRU", "RNN",
}  # fmt: skip
_CHUNK = 1 << 22  # elements looked at at once: a mapped weight of many GB is never a second time in memory


def check(graph: Graph) -> None:
    """Names are unique, nodes are in order, every input is produced, outputs and exits exist and agree.

    Raises:
        GraphError: names the node or value at fault.
    """
    check_structure(graph)
    _check_exits(graph)


def check_structure(graph: Graph) -> None:
    """The part of :func:`check` that holds for any graph, also for parts and tapped graphs with outputs of their own.

    Raises:
        GraphError: names the node or value at fault.
    """
    draft = graph.gs
    _check_names(draft)
    available = {tensor.name for tensor in draft.inputs}
    for node in draft.nodes:
        constants = {t.name for t in node.inputs if isinstance(t, gs.Constant)}
        for name in node_inputs(node):
            if name not in available and name not in constants:
                later = any(t.name == name for other in draft.nodes for t in other.outputs)
                reason = "is computed after it (the nodes are not in order)" if later else "nothing produces"
                raise GraphError(f"node {node.name!r} ({node.op}) needs the value {name!r}, which {reason}")
        available.update(constants)
        available.update(tensor.name for tensor in node.outputs if tensor.name)
    need(draft.outputs, "the graph has no output", GraphError)
    for tensor in draft.outputs:
        need(not isinstance(tensor, gs.Constant), f"output {tensor.name!r} is a constant", GraphError)
        need(tensor.name in available, f"output {tensor.name!r}: nothing produces it", GraphError)


def check_finite(graph: Graph) -> None:
    """No parameter holds NaN, and none that multiplies or normalises holds infinity (masks may).

    Raises:
        GraphError: names the parameter, how many elements are at fault and the node that uses it.
    """
    users: dict[int, list[gs.Node]] = {}
    constants: dict[int, gs.Constant] = {}
    for body in (graph.gs, *graph.gs.subgraphs(recursive=True)):
        for node in body.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant):
                    constants[id(tensor)] = tensor
                    users.setdefault(id(tensor), []).append(node)
    for key, constant in constants.items():
        values = constant._values
        if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
            continue
        nans, infinities = _count_not_finite(values)
        weighs = [node for node in users[key] if node.op in _WEIGHTED]
        if nans or (infinities and weighs):
            node = (weighs or users[key])[0]
            what = f"{nans} NaN" if nans else f"{infinities} infinite"
            raise GraphError(
                f"parameter {constant.name!r} of node {node.name!r} ({node.op}) has {what} of {values.size} elements: "
                "the training that made it diverged, or the file is damaged"
            )


def _check_names(draft: gs.Graph) -> None:
    names = Counter(node.name for node in draft.nodes)
    need("" not in names, "a node has no name", GraphError)
    twice = [name for name, count in names.items() if count > 1]
    need(not twice, f"several nodes are called {twice[:3]}", GraphError)
    owner: dict[str, gs.Tensor] = {}
    for tensor in (*draft.inputs, *(t for node in draft.nodes for t in (*node.inputs, *node.outputs)), *draft.outputs):
        if tensor.name and owner.setdefault(tensor.name, tensor) is not tensor:
            raise GraphError(f"two different values are called {tensor.name!r}")
    produced = Counter(tensor.name for node in draft.nodes for tensor in node.outputs if tensor.name)
    produced.update(tensor.name for tensor in draft.inputs)
    twice = [name for name, count in produced.items() if count > 1]
    need(not twice, f"the values {twice[:3]} are produced more than once", GraphError)
    for node in draft.nodes:
        for tensor in node.outputs:
            need(
                not isinstance(tensor, gs.Constant),
                f"node {node.name!r} writes to the constant {tensor.name!r}",
                GraphError,
            )


def _check_exits(graph: Graph) -> None:
    for i, exit_ in enumerate(graph.exits):
        known = (("site", exit_.site), ("scores", exit_.logits), ("confidence", exit_.confidence))
        for what, name in known:
            found = name in graph.tensors or (what == "confidence" and not name)
            need(found, f"exit {i}: its {what} {name!r} is not in the graph", GraphError)
        missing = [name for name in exit_.parameters if name not in graph.constants]
        need(not missing, f"exit {i} at {exit_.site!r}: its parameters {missing[:3]} are not in the graph", GraphError)
    expected = outputs_of(graph.final, graph.exits)
    need(
        graph.outputs == expected,
        f"the outputs are {list(graph.outputs)}; expected the final scores, those of every exit and the learned "
        f"confidences: {list(expected)}",
        GraphError,
    )


def _count_not_finite(values: np.ndarray) -> tuple[int, int]:
    flat = values.reshape(-1)
    nans = infinities = 0
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK]
        finite = int(np.count_nonzero(np.isfinite(chunk)))
        if finite < chunk.size:
            missing = int(np.count_nonzero(np.isnan(chunk)))
            nans += missing
            infinities += chunk.size - finite - missing
    return nans, infinities
