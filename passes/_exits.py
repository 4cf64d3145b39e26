"""Keeping exits truthful when a pass rewrites their heads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from eexform.ir.exit_nodes import head_digest, head_nodes
from eexform.ir.exits import Exit
from eexform.ir.graph import Graph


def refresh_exits(before: Graph, after: Graph) -> Graph:
    """``after`` with ``parameters`` and ``digest`` of every exit whose head's parameters are not those of ``before``.

    Exits whose parameters survived under their names keep their digest, so that it still names what was trained.
    """
    stale = [not _same_parameters(item, before, after) for item in after.exits]
    if not any(stale):
        return after
    nodes = head_nodes(after)
    exits = [_described(item, after, nodes[place]) if stale[place] else item for place, item in enumerate(after.exits)]
    return after.replace(exits=exits)


def _same_parameters(item: Exit, before: Graph, after: Graph) -> bool:
    for name in item.parameters:
        old, new = before.constants.get(name), after.constants.get(name)
        if old is None or new is None:
            return False
        if old.values is not new.values and not np.array_equal(old.values, new.values):
            return False
    return True


def _described(item: Exit, graph: Graph, nodes: frozenset[str]) -> Exit:
    found: dict[str, np.ndarray] = {}
    for name in sorted(nodes):
        for tensor in graph.flow.nodes[name].inputs:
            if isinstance(tensor, gs.Constant) and np.issubdtype(tensor.dtype, np.floating):
                found[tensor.name] = tensor.values
    return replace(item, parameters=tuple(sorted(found)), digest=head_digest(found))
