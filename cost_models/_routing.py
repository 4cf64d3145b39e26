"""Networks that do next to nothing, or nothing but route: for measuring what a call and an exit's decision cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from eexform.backends.lower_if import lower_if
from eexform.backends.lower_multi import lower_multi
from eexform.ir.emit import Emitter
from eexform.ir.exits import Exit
from eexform.ir.graph import BATCH, Graph

OPSET = 17


def idle_network() -> Graph:
    """A network that hands back its input, ``input`` [N, 1]."""
    value = gs.Variable("input", dtype=np.dtype(np.float32), shape=[BATCH, 1])
    draft = gs.Graph(inputs=[value], outputs=[], name="idle", opset=OPSET)
    draft.outputs = [Emitter(draft).node("Relu", value, name="idle", shape=value.shape)]
    return Graph(draft)


def routing_pair(classes: int, shape: Sequence[int]) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The same tiny network without and with routing: one exit at a value of this sample shape, which nobody takes.

    Returns:
        Models with one input ``input`` [N, *shape]: all scores as outputs; and the lowered one with its ``If``.
    """
    value = gs.Variable("input", dtype=np.dtype(np.float32), shape=[BATCH, *shape])
    draft = gs.Graph(inputs=[value], outputs=[], name="routing", opset=OPSET)
    emitter = Emitter(draft)
    site = emitter.node("Relu", value, name="before", shape=value.shape)
    early = _scores(emitter.scoped("exit0."), site, classes, shape)
    after = emitter.node("Relu", site, name="after", shape=value.shape)
    final = _scores(emitter, after, classes, shape)
    draft.outputs = [final, early]
    item = Exit(site=site.name, head="none/avg", logits=early.name, threshold=math.inf)
    graph = Graph(draft, exits=[item])
    return lower_multi(graph), lower_if(graph)


def _scores(emitter: Emitter, value: gs.Variable, classes: int, shape: Sequence[int]) -> gs.Variable:
    """[N, *shape] -> mean over all but the channels -> [N, classes]."""
    channels, space = shape[0], list(range(2, len(shape) + 1))
    if space:
        value = emitter.reduce("ReduceMean", value, space, name="pool", shape=[BATCH, channels])
    weight = np.random.default_rng(0).standard_normal((channels, classes)).astype(np.float32)
    constant = emitter.constant("weight", weight)
    return emitter.node("MatMul", value, constant, name="scores", shape=[BATCH, classes])
