"""Lowering without control flow: one file that computes every classifier for every sample."""

from __future__ import annotations

import numpy as np
import onnx

from eexform.backends import metadata, protos
from eexform.backends.rebatch import Names, Scope, bind_inputs
from eexform.errors import GraphError
from eexform.ir.exits import outputs_of
from eexform.ir.graph import BATCH, Graph


def output_names(graph: Graph) -> tuple[str, ...]:
    """Outputs of the form ``multi``: the original output, then ``exit0``, ``exit1``, ...; last ``confidence<i>`` of
    the exits whose confidence the network computes."""
    places = range(len(graph.exits))
    learned = (f"confidence{place}" for place in places if graph.exits[place].confidence)
    return (graph.final, *(f"exit{place}" for place in places), *learned)


def lower_multi(graph: Graph, *, alone: bool = False) -> onnx.ModelProto:
    """All exits' scores as outputs; who runs the file decides which to use.

    Args:
        graph: a graph with exits.
        alone: also one without any, whose final scores are then all scores.

    Returns:
        A model with the outputs: final scores under the original output's name, ``exit0``, ``exit1``, ...; behind
        them learned confidences, float32 [N].

    Raises:
        GraphError: the graph has no exits.
    """
    if not graph.exits and not alone:
        raise GraphError("the graph has no exits, so there is nothing to lower; run the pass insert_exits first")
    outputs = output_names(graph)
    values = outputs_of(graph.final, graph.exits)
    scope = Scope(graph, Names(graph, outputs))
    bind_inputs(scope)
    flow = graph.flow
    needed = flow.ancestors(values) - flow.shape_nodes
    scope.add(name for name in flow.topological if name in needed)
    infos = []
    learned = {leaving.confidence for leaving in graph.exits}
    for name, value in zip(outputs, values, strict=True):
        scope.publish(value, name)
        if value in learned:
            infos.append(protos.value_info(name, np.float32, [BATCH]))
        else:
            infos.append(protos.scores_info(graph, name))
    body = protos.graph_proto(
        graph.gs.name or "network",
        protos.node_protos(scope.draft),
        infos,
        [protos.initializer(constant) for constant in protos.constants(scope.draft.nodes).values()],
        protos.input_infos(graph),
    )
    return protos.model(graph, body, metadata.build(graph, "multi"))
