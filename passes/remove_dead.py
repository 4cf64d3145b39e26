"""Remove what no output needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eexform.errors import need
from eexform.ir.graph import Graph
from eexform.passes._contract import Pass, PassContext, PassResult


@dataclass(frozen=True)
class RemoveDead(Pass):
    """Remove nodes that contribute to no output: neither to the final scores nor to an exit's.

    Inputs of the graph stay, used or not: they are what callers feed.
    """

    name: ClassVar[str] = "remove_dead"
    preserves_outputs: ClassVar[bool] = True

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        draft = graph.copy().gs
        draft.cleanup(remove_unused_graph_inputs=False, remove_unused_node_outputs=False)
        kept = {node.name for node in draft.nodes}
        removed = [node.name for node in graph.nodes if node.name not in kept]
        if not removed:
            return PassResult(graph, changed=False)
        return PassResult(graph.replace(draft), changed=True, notes=tuple(f"removed {name}" for name in removed))

    def ensures(self, graph: Graph) -> None:
        needed = graph.flow.ancestors(graph.outputs)
        dead = [node.name for node in graph.nodes if node.name not in needed]
        need(not dead, f"nodes that no output needs are still there: {dead[:5]}")
