"""Order of nodes, and what a node needs when sub-graphs are counted."""

from __future__ import annotations

from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter

import onnx_graphsurgeon as gs

from eexform.errors import GraphError


def ordered(nodes: Sequence[gs.Node]) -> list[gs.Node]:
    """The nodes so that producers come before consumers: the given order where it already is.

    Raises:
        GraphError: there is a cycle.
    """
    producer = {tensor.name: i for i, node in enumerate(nodes) for tensor in node.outputs if tensor.name}
    needs = {i: {producer[n] for n in node_inputs(node) if n in producer} for i, node in enumerate(nodes)}
    if all(before < i for i, befores in needs.items() for before in befores):
        return list(nodes)
    try:
        return [nodes[i] for i in TopologicalSorter(needs).static_order()]
    except CycleError as error:
        names = " -> ".join(repr(nodes[i].name) for i in error.args[1])
        raise GraphError(f"the graph has a cycle through the nodes {names}") from error


def node_inputs(node: gs.Node) -> list[str]:
    """Names of the values a node needs: its inputs, and what its sub-graphs take from around them."""
    names = [tensor.name for tensor in node.inputs if tensor.name]
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            names += captured(value)
    return names


def captured(body: gs.Graph) -> list[str]:
    """Names of the values that a sub-graph takes from the graph around it."""
    local = {tensor.name for tensor in body.inputs}
    local |= {tensor.name for node in body.nodes for tensor in node.outputs}
    needed = [name for node in body.nodes for name in node_inputs(node)]
    needed += [tensor.name for tensor in body.outputs]
    constants = {t.name for node in body.nodes for t in node.inputs if isinstance(t, gs.Constant)}
    return [name for name in dict.fromkeys(needed) if name not in local and name not in constants]
