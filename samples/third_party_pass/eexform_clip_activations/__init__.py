"""A pass in a distribution of its own: nothing in eexform knows about it, the entry point makes it known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from eexform.ir.graph import Graph
from eexform.passes import Pass, PassContext, PassResult, Skip, need
from eexform.tunables import Real, tunable


@dataclass(frozen=True)
class ClipActivations(Pass):
    """Replace every Relu by a Clip to [0, ceiling].

    Bounded activations quantise better; how low the ceiling may be before accuracy suffers is for a search to find out.
    """

    name: ClassVar[str] = "clip_activations"

    ceiling: float = tunable(Real(1.0, 20.0, log=True), default=6.0, help="largest activation that gets through")

    def requires(self, graph: Graph) -> None:
        need(not graph.exits, "the activations of trained heads would change too; put this pass before insert_exits")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        relus = [node.name for node in graph.nodes if node.op == "Relu"]
        if not relus:
            return PassResult(graph, changed=False, skipped=(Skip("graph", "it has no Relu"),))
        draft = graph.copy().gs
        low = gs.Constant("clip_activations.low", np.array(0.0, np.float32))
        high = gs.Constant("clip_activations.high", np.array(self.ceiling, np.float32))
        for node in draft.nodes:
            if node.op == "Relu":
                node.op = "Clip"
                node.inputs = [node.inputs[0], low, high]
        return PassResult(graph.replace(draft), changed=True, notes=tuple(f"clipped {name}" for name in relus))

    def ensures(self, graph: Graph) -> None:
        need(all(node.op != "Relu" for node in graph.nodes), "a Relu is left")
