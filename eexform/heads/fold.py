"""Folding a trained head's batch normalisation into the convolutions in front of it."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from eexform.ir.graph import Graph


def fold_head(graph: Graph) -> Graph:
    """A copy of a head graph without ``BatchNormalization`` behind convolutions.

    ``scale * (W x - mean) / sqrt(var + eps) + bias`` is the convolution with weights ``W * s`` and bias
    ``bias - mean * s``, where ``s = scale / sqrt(var + eps)`` per output channel; computed in float64.
    """
    draft = graph.copy()
    for node in list(draft.nodes):
        if node.op != "BatchNormalization" or len(node.inputs[0].inputs) != 1:
            continue
        conv = node.inputs[0].inputs[0]
        operands = [*conv.inputs[1:], *node.inputs[1:]]
        if (
            conv.op != "Conv"
            or len(conv.outputs[0].outputs) != 1
            or not all(isinstance(o, gs.Constant) for o in operands)
        ):
            continue
        scale, shift, mean, variance = (operand.values.astype(np.float64) for operand in node.inputs[1:5])
        factor = scale / np.sqrt(variance + float(node.attrs.get("epsilon", 1e-5)))
        old = conv.inputs[1]
        weight = old.values * factor.reshape(-1, *[1] * (old.values.ndim - 1))
        given = conv.inputs[2].values if len(conv.inputs) > 2 else 0.0
        bias = shift + (given - mean) * factor
        label = old.name.removesuffix(".weight")
        conv.inputs = [
            conv.inputs[0],
            gs.Constant(old.name, weight.astype(np.float32)),
            gs.Constant(f"{label}.bias", bias.astype(np.float32)),
        ]
        conv.outputs = list(node.outputs)
        node.outputs = []
        draft.nodes.remove(node)
    return draft.replace(draft.gs)
