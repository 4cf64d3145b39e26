"""What static cost models share: counting node by node, and the constants that a model stores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import onnx_graphsurgeon as gs

from eexform.cost_models._contract import Cost
from eexform.ir.graph import Graph
from eexform.ir.types import TensorType

Rule = Callable[[gs.Node, Mapping[str, TensorType], Mapping[str, int] | None], int | None]


def counted(graph: Graph, rule: Rule, bindings: Mapping[str, int]) -> Cost:
    """Sum of a rule over the nodes; those for which it has no answer are named, and hold 0."""
    nodes: dict[str, float] = {}
    unknown = []
    for node in graph.nodes:
        found = rule(node, graph.types, bindings)
        if found is None:
            unknown.append((node.name, node.op))
        nodes[node.name] = found or 0
    return Cost(sum(nodes.values()), nodes, tuple(unknown))


def stored(graph: Graph) -> Iterator[tuple[str, gs.Constant]]:
    """Every constant with the name of the first node that reads it; one that several nodes read comes once.

    Constants of the sub-graphs in a node (its branches) are the node's.
    """
    met: set[int] = set()
    for node in graph.nodes:
        for tensor in _read(node):
            if id(tensor) not in met:
                met.add(id(tensor))
                yield node.name, tensor


def _read(node: gs.Node) -> Iterator[gs.Constant]:
    yield from (tensor for tensor in node.inputs if isinstance(tensor, gs.Constant))
    for graph in node.subgraphs(recursive=True):
        yield from (tensor for inner in graph.nodes for tensor in inner.inputs if isinstance(tensor, gs.Constant))
        yield from (tensor for tensor in graph.outputs if isinstance(tensor, gs.Constant))
