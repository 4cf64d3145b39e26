"""Cutting channels out of a graph, and what the result will cost, before it is built.

Nothing is renamed: values, nodes and parameters keep their names, so a cut graph can be compared with the original
value by value. Which positions are left of each is kept in the metadata (:data:`CUT`), in terms of the graph that was
first cut.
"""

from __future__ import annotations

import json
import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import onnx_graphsurgeon as gs

from eexform.errors import GraphError, need
from eexform.ir.arithmetic import node_macs
from eexform.ir.coupling import Cut, Slot, cut_dim, find_rule, positions_of
from eexform.ir.emit import Emitter
from eexform.ir.graph import Graph
from eexform.ir.groups import ChannelGroups
from eexform.ir.types import Dim

Cuts = Mapping[str, Sequence[int]]
"""Units to remove, by the name of the group."""

CUT = "eexform.cut"
"""Key of ``Graph.metadata``: JSON ``{"value|axis": kept positions}`` of every slot that lost some, in the positions of
the graph before its first cut. Slots that later passes removed may still be there."""


class Figures(NamedTuple):
    """What a graph costs whatever path a sample takes.

    Attributes:
        macs: multiply-accumulates of one sample.
        params: floating-point numbers stored.
    """

    macs: int
    params: int


def cut(graph: Graph, cuts: Cuts, groups: ChannelGroups | None = None) -> Graph:
    """``graph`` without the given units: constants are sliced, attributes and shape operands mended.

    Args:
        graph: stays as it is; weights that are not cut are shared with it.
        cuts: units to remove from each group.
        groups: those of ``graph``, where they are at hand.

    Returns:
        A graph with the same names. Exits keep their heads' digests: where a head's parameters were cut, a pass calls
        ``refresh_exits``.

    Raises:
        GraphError: there is no such group or unit, the group is frozen, or none of its units would be left.
    """
    kept = kept_positions(graph, cuts, groups)
    if not kept:
        return graph
    draft = graph.copy().gs
    emitter = Emitter(draft)
    state = Cut(graph, kept, emitter)
    axes: dict[str, list[Slot]] = {}
    for slot in kept:
        axes.setdefault(slot.value, []).append(slot)
    seen: set[int] = set()
    for node in draft.nodes:
        for tensor in (*node.inputs, *node.outputs):
            if tensor.name in axes and id(tensor) not in seen:
                seen.add(id(tensor))
                _slice(tensor, axes[tensor.name], kept)
    touched = [node for node in draft.nodes if state.touches(node)]
    for node in touched:
        made = find_rule(node)
        if made is not None:
            node.attrs.update(made.attributes(node, state))
    for node in touched:
        made = find_rule(node)
        if made is not None:
            made.rewrite(node, state, emitter)
    state.hand_on_names(draft)
    return graph.replace(draft, metadata=_with_cut(graph.metadata, kept))


def predicted(
    graph: Graph, cuts: Cuts, groups: ChannelGroups | None = None, bindings: Mapping[str, int] | None = None
) -> Figures:
    """What the cost models ``macs`` and ``params`` say of ``cut(graph, cuts)``, without building it.

    Args:
        graph: the uncut graph.
        cuts: units to remove from each group.
        groups: those of ``graph``, where they are at hand.
        bindings: sizes of symbolic dimensions other than the batch.

    Raises:
        GraphError: as :func:`cut`, or a size that the count needs is not known.
    """
    kept = kept_positions(graph, cuts, groups)
    return _ledger(graph, bindings or {}).figures(graph, kept)


def kept_positions(graph: Graph, cuts: Cuts, groups: ChannelGroups | None = None) -> dict[Slot, np.ndarray]:
    """Sorted positions that are left of every slot that loses some.

    Raises:
        GraphError: as :func:`cut`.
    """
    found = graph.groups if groups is None else groups
    shared: dict[tuple[int, int], np.ndarray] = {}
    kept: dict[Slot, np.ndarray] = {}
    owners: dict[Slot, list[tuple[np.ndarray, np.ndarray]]] = {}
    for name, units in cuts.items():
        gone = np.unique(np.asarray(units, np.int64))
        if not len(gone):
            continue
        group = found[name]
        need(group.frozen is None, f"channel group {name!r} may not be cut: {group.frozen}", GraphError)
        need(
            gone[0] >= 0 and gone[-1] < group.size,
            f"channel group {name!r} has units 0..{group.size - 1}, asked to cut {_outside(gone, group.size)}",
            GraphError,
        )
        need(len(gone) < group.size, f"channel group {name!r}: all {group.size} units would be cut", GraphError)
        for slot, positions in group.slots.items():
            owners.setdefault(slot, []).append((positions, gone))
    for slot, parts in owners.items():
        size = _size(graph, slot)
        key = (id(parts[0][0]), size)
        if len(parts) == 1 and key in shared:  # most slots of a group lose the same positions
            kept[slot] = shared[key]
            continue
        mask = np.ones(size, bool)
        for positions, gone in parts:
            mask[positions[gone]] = False
        kept[slot] = np.flatnonzero(mask)
        if len(parts) == 1:
            shared[key] = kept[slot]
    return kept


def kept_since(graph: Graph) -> dict[Slot, np.ndarray]:
    """Positions of the first graph that are left in each slot that was ever cut (:data:`CUT`); empty where none was.

    Raises:
        GraphError: the metadata are damaged.
    """
    return _read(graph.metadata)


def _read(metadata: Mapping[str, str]) -> dict[Slot, np.ndarray]:
    text = metadata.get(CUT)
    if text is None:
        return {}
    try:
        found = {}
        for key, positions in json.loads(text).items():
            value, _, axis = key.rpartition("|")
            found[Slot(value, int(axis))] = np.asarray(positions, np.int64)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise GraphError(f"metadata {CUT}: {error}; the file is damaged") from error
    return found


def _with_cut(metadata: Mapping[str, str], kept: Mapping[Slot, np.ndarray]) -> dict[str, str]:
    before = _read(metadata)
    now = {**before, **{slot: before[slot][left] if slot in before else left for slot, left in kept.items()}}
    plain = {str(slot): now[slot].tolist() for slot in sorted(now)}
    return {**metadata, CUT: json.dumps(plain, separators=(",", ":"))}


def _slice(tensor: gs.Tensor, slots: Sequence[Slot], kept: Mapping[Slot, np.ndarray]) -> None:
    if isinstance(tensor, gs.Constant):
        values = tensor.values
        for slot in slots:
            values = np.take(values, kept[slot], axis=slot.axis)
        tensor.values = np.ascontiguousarray(values)
    elif tensor.shape is not None:
        shape = list(tensor.shape)
        for slot in slots:
            if slot.axis < len(shape):
                shape[slot.axis] = cut_dim(shape[slot.axis], len(kept[slot]))
        tensor.shape = shape


def _size(graph: Graph, slot: Slot) -> int:
    constant, known = graph.constants.get(slot.value), graph.types.get(slot.value)
    shape = constant.shape if constant is not None else () if known is None else known.shape or ()
    size = positions_of(shape[slot.axis]) if slot.axis < len(shape) else None
    if size is None:
        raise GraphError(f"the graph has no axis {slot.axis} of {slot.value!r} to cut: the groups are another graph's")
    return size


def _outside(units: np.ndarray, size: int) -> str:
    return ", ".join(str(unit) for unit in units.tolist() if not 0 <= unit < size)


class _Stand:
    """A node as the counting of work sees it, constants as values whose shape is looked up."""

    def __init__(self, node: gs.Node) -> None:
        self.op, self.name, self.domain, self.attrs = node.op, node.name, node.domain, dict(node.attrs)
        self.inputs = [gs.Variable(t.name) if isinstance(t, gs.Constant) else t for t in node.inputs]
        self.outputs = list(node.outputs)


class _Ledger:
    """What each node of a graph costs uncut, so that a cut only needs to count the nodes that it touches."""

    def __init__(self, graph: Graph, bindings: Mapping[str, int]) -> None:
        self.types = dict(graph.types)
        self.bindings = dict(bindings)
        self.nodes = {node.name: node for node in graph.nodes}
        self.stands: dict[str, _Stand] = {}
        self.users: dict[str, list[str]] = {}
        for node in graph.nodes:
            for name in dict.fromkeys(t.name for t in (*node.inputs, *node.outputs) if t.name):
                self.users.setdefault(name, []).append(node.name)
        self.macs = {node.name: node_macs(node, self.types, bindings) or 0 for node in graph.nodes}
        self.sizes = _floating(graph)
        self.total = Figures(sum(self.macs.values()), sum(math.prod(shape) for shape in self.sizes.values()))

    def figures(self, graph: Graph, kept: Mapping[Slot, np.ndarray]) -> Figures:
        """Figures after a cut: the total, and the difference at what it touches."""
        shapes: dict[str, list[Dim]] = {}
        for slot, left in kept.items():
            if slot.value not in shapes:
                shapes[slot.value] = list(self.types[slot.value].shape or ())
            shapes[slot.value][slot.axis] = cut_dim(shapes[slot.value][slot.axis], len(left))
        types = ChainMap({v: replace(self.types[v], shape=tuple(s)) for v, s in shapes.items()}, self.types)
        state = Cut(graph, kept)
        macs, params = self.total
        for name in {user: None for value in shapes for user in self.users.get(value, ())}:
            node = self.nodes[name]
            if not self.macs[name]:
                continue
            stand = self.stands.setdefault(name, _Stand(node))
            made = find_rule(node)
            stand.attrs = dict(node.attrs) if made is None else {**node.attrs, **made.attributes(node, state)}
            macs += (node_macs(stand, types, self.bindings) or 0) - self.macs[name]
        for value, shape in shapes.items():
            if value in self.sizes:
                params += math.prod(shape) - math.prod(self.sizes[value])  # type: ignore[arg-type]
        return Figures(macs, params)


_LEDGERS: WeakKeyDictionary[Graph, dict[tuple[tuple[str, int], ...], _Ledger]] = WeakKeyDictionary()


def _ledger(graph: Graph, bindings: Mapping[str, int]) -> _Ledger:
    per_graph = _LEDGERS.setdefault(graph, {})
    key = tuple(sorted(bindings.items()))
    if key not in per_graph:
        per_graph[key] = _Ledger(graph, bindings)
    return per_graph[key]


def _floating(graph: Graph) -> dict[str, tuple[int, ...]]:
    """Shape of every floating-point constant that a node reads, in sub-graphs, too, as ``params`` counts them."""
    found: dict[str, tuple[int, ...]] = {}
    for body in (graph.gs, *graph.gs.subgraphs(recursive=True)):
        for node in body.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant) and np.issubdtype(tensor.dtype, np.floating):
                    found[tensor.name] = tuple(int(dim) for dim in tensor.shape)
    return found
