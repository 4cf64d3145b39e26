"""Cutting a graph with exits into the blocks between them: what each executes and what it hands on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eexform.errors import GraphError
from eexform.ir.graph import Graph


@dataclass(frozen=True)
class Block:
    """The work between one exit and the next.

    Attributes:
        nodes: names of the data nodes it executes, in topological order. Shape arithmetic is not listed: it is emitted
            where it is needed (see :mod:`eexform.backends.rebatch`).
        live: batch-carrying values that exist after this block and are needed by a later one, in topological order.
        scores: the value that holds this block's class scores.
        confidence: the value that holds its confidence, where that is learned; empty where it is read off the scores.
    """

    nodes: tuple[str, ...]
    live: tuple[str, ...]
    scores: str
    confidence: str = ""


def split(graph: Graph) -> tuple[Block, ...]:
    """One block per exit and one for the final classifier, in the order in which a sample meets them.

    Block ``i`` holds the ancestors of exit ``i``'s scores (and confidence, where that is a value) that no earlier exit
    needed; the last block everything else that the final scores need.

    Raises:
        GraphError: there is no exit, or a value that must be handed on does not carry its samples on one axis.
    """
    if not graph.exits:
        raise GraphError("the graph has no exits, so there is nothing to lower; run the pass insert_exits first")
    flow = graph.flow
    place = {name: position for position, name in enumerate(flow.topological)}
    data = frozenset(flow.nodes) - flow.shape_nodes
    blocks: list[Block] = []
    done: frozenset[str] = frozenset()
    for leaving in graph.exits:
        reached = done | flow.ancestors(leaving.values)
        live = tuple(flow.live(reached))
        for value in live:
            _check_rows(graph, value, leaving.site)
        nodes = _ordered((reached - done) & data, place)
        blocks.append(Block(nodes, live, leaving.logits, leaving.confidence))
        done = reached
    reached = done | flow.ancestors([graph.final])
    blocks.append(Block(_ordered((reached - done) & data, place), (), graph.final))
    for block in blocks:
        _check_scores(graph, block.scores)
        _check_confidence(graph, block.confidence)
    return tuple(blocks)


def _ordered(nodes: frozenset[str], place: dict[str, int]) -> tuple[str, ...]:
    return tuple(sorted(nodes, key=place.__getitem__))


def _check_rows(graph: Graph, value: str, site: str) -> None:
    kind = graph.types.get(value)
    if kind is None or kind.batch_axis is None:
        shape = "unknown" if kind is None or kind.shape is None else list(kind.shape)
        raise GraphError(
            f"exit at {site!r}: the rest of the network needs {value!r} (shape {shape}), which does not carry one "
            "sample per row, so undecided samples cannot be picked out of it; use another site, or the form 'multi'"
        )


def _check_scores(graph: Graph, value: str) -> None:
    kind = graph.types.get(value)
    if kind is None or kind.batch_axis != 0 or kind.shape is None or len(kind.shape) != 2:
        shape = "unknown" if kind is None or kind.shape is None else list(kind.shape)
        raise GraphError(f"class scores {value!r} must have the shape [batch, classes], found {shape}")
    if kind.dtype is not None and not np.issubdtype(kind.dtype, np.floating):
        raise GraphError(f"class scores {value!r} must be floating-point numbers, found {kind.dtype}")


def _check_confidence(graph: Graph, value: str) -> None:
    kind = graph.types.get(value)
    if value and (kind is None or kind.batch_axis != 0 or kind.shape is None or len(kind.shape) != 1):
        shape = "unknown" if kind is None or kind.shape is None else list(kind.shape)
        raise GraphError(f"the confidence {value!r} must have the shape [batch], found {shape}")
