"""A graph with exits as one part per block, each on the rows that reach it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from eexform.backends.blocks import Block, split
from eexform.backends.confidence import emit_scored
from eexform.backends.rebatch import Names, Scope, bind_inputs
from eexform.errors import GraphError
from eexform.ir.graph import Graph
from eexform.ir.order import node_inputs
from eexform.ir.types import TensorType


@dataclass(frozen=True)
class Part:
    """One block as nodes that run on the rows that reach it.

    Attributes:
        block: what it executes and hands on, by names of the source.
        scope: the nodes.
        scores: class scores [rows, classes].
        confidence: [rows] float32.
        hands_on: values that it makes and later parts take.
        fixed: those of them without a batch axis (a table of positions, the length of a sequence).
    """

    block: Block
    scope: Scope
    scores: gs.Variable
    confidence: gs.Variable
    hands_on: dict[str, TensorType]
    fixed: dict[str, TensorType]

    def inputs(self) -> dict[str, TensorType]:
        """What it takes, from the network's inputs and from what earlier parts hand on."""
        types = self.scope.source.types
        used = {name for node in self.scope.draft.nodes for name in node_inputs(node)} | set(self.hands_on)
        found: dict[str, TensorType] = {}
        for value, tensor in self.scope.values.items():
            if not isinstance(tensor, gs.Constant) and not tensor.inputs and tensor.name in used:
                found[tensor.name] = types[value]
        for key, tensor in self.scope.imports.items():
            found.setdefault(tensor.name, _import_type(self.scope, key))
        return found


def divide(graph: Graph, free: Sequence[str]) -> tuple[Part, ...]:
    """The parts, in the order in which a sample meets them.

    Args:
        graph: a graph with exits.
        free: names that no value of a part gets: the graph's output first, then those that the caller gives itself.

    Raises:
        GraphError: no exits, or a value that cannot be recomputed for undecided rows.
    """
    blocks = split(graph)
    scopes: list[Scope] = []
    scored: list[tuple[gs.Variable, gs.Variable]] = []
    for depth, block in enumerate(blocks):
        names = Names(graph, free)  # each part has its own: parts need not differ in names
        scope = Scope(graph, names, prefix=f"stage{depth}." if depth else "", outer=scopes[-1] if scopes else None)
        if depth:
            for value in blocks[depth - 1].live:
                scope.bind(value, gs.Variable(value, dtype=graph.types[value].dtype))
        else:
            bind_inputs(scope)
        scope.add(block.nodes)
        scored.append(emit_scored(scope, depth, block))
        scopes.append(scope)
    parts = []
    for block, scope, (scores, confidence), fixed in zip(blocks, scopes, scored, _fixed(scopes), strict=True):
        made_here = {value: graph.types[value] for value in block.live if scope.resolve(value).inputs}
        parts.append(Part(block, scope, scores, confidence, made_here | fixed, fixed))
    return tuple(parts)


def _fixed(scopes: Sequence[Scope]) -> list[dict[str, TensorType]]:
    """Values without samples that a part makes for later ones."""
    maker: dict[str, int] = {}
    for depth, scope in enumerate(scopes):
        for node in scope.draft.nodes:
            for tensor in node.outputs:
                maker.setdefault(tensor.name, depth)
    found: list[dict[str, TensorType]] = [{} for _ in scopes]
    for scope in scopes:
        for key, tensor in scope.imports.items():
            if tensor.name in maker:  # else it is an input of the network, which all parts have anyway
                found[maker[tensor.name]][tensor.name] = _import_type(scope, key)
    return found


def _import_type(scope: Scope, key: str) -> TensorType:
    return scope.source.types.get(key) or TensorType(np.dtype(np.int64), (1,))


def known_dtype(name: str, kind: TensorType) -> np.dtype:
    """The element type of a value that one part hands to another.

    Raises:
        GraphError: it is not known.
    """
    if kind.dtype is None:
        raise GraphError(f"value {name!r} is handed from stage to stage, but its type is not known; use the form 'if'")
    return kind.dtype
