"""Blocks that can be left out whole: residual branches and stretches whose input and output agree in type.

A *branch* is what lies between a value ``x`` and the other operand of ``Add(x, f(x))``; without it the sum is ``x``. A
*stretch* is a part of the network that one value enters and one value leaves, of the same type, and that holds no
branch: a layer of a plain network with its normalisation and activation, or a block whose shortcut is itself a layer.

Where the sizes change along the shortcut (a strided projection, or zeros padded to more channels), nothing could take
the block's place; such additions are reported with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import networkx as nx
import onnx_graphsurgeon as gs

from eexform.errors import GraphError, need, suggest
from eexform.ir.arithmetic import node_macs
from eexform.ir.flow import DataFlow
from eexform.ir.roles import Role, role
from eexform.ir.sites import Rejected

if TYPE_CHECKING:
    from eexform.ir.graph import Graph

BlockKind = Literal["branch", "stretch"]
_SUMS = ("Add", "Sum")
_ENTRY = object()


@dataclass(frozen=True)
class Block:
    """A part of the network that can be left out.

    Attributes:
        name: the name of ``exit``, by which recipes name the block.
        kind: ``branch`` (a shortcut goes around it) or ``stretch`` (it is the only way).
        entry: the value that takes the place of ``exit`` when the block is left out; of the same type.
        exit: the value that the block hands on.
        nodes: names of the nodes that go with it (the addition included), in topological order.
        macs: multiply-accumulates of these nodes for one sample, operators without a rule as zero; ``None`` where a
            dimension has no number (a sequence of any length).
    """

    name: str
    kind: BlockKind
    entry: str
    exit: str
    nodes: tuple[str, ...]
    macs: int | None


@dataclass(frozen=True)
class BlockReport:
    """The blocks in the order in which a sample leaves them, and the additions that end none, with reasons."""

    blocks: tuple[Block, ...]
    rejected: tuple[Rejected, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(block.name for block in self.blocks)

    def block(self, name: str) -> Block:
        """The block called ``name``.

        Raises:
            GraphError: there is none; the message says why the value ends no block, or lists similar names.
        """
        for block in self.blocks:
            if block.name == name:
                return block
        for rejected in self.rejected:
            if rejected.value == name:
                raise GraphError(f"no block that could be left out ends at {name!r}: {rejected.reason}")
        raise GraphError(f"there is no block {name!r}: {suggest(name, self.names)}")


def find_blocks(graph: Graph) -> BlockReport:
    """Every block of ``graph``'s trunk, and a reason for every addition of activations that ends none.

    Heads of exits that are already there are left out of the question. Blocks may lie inside each other.

    Raises:
        GraphError: the graph is not well formed.
    """
    return _Finder(graph).report()


def leave_out(graph: Graph, blocks: Iterable[Block]) -> Graph:
    """The graph without ``blocks``: whoever read what one hands on reads what entered it.

    An activation that then follows the same activation (the ReLU behind an addition whose shortcut comes from a ReLU)
    changes nothing any more and goes, too. Names of what stays are kept.

    Args:
        graph: has no exits; it is left as it is.
        blocks: of :func:`find_blocks` on the same graph; those inside another one are gone with it.

    Raises:
        GraphError: the graph has exits, whose heads would see other values than they were trained on.
    """
    need(not graph.exits, f"the graph has {len(graph.exits)} exits; leave blocks out of the trunk", GraphError)
    instead = {block.exit: block.entry for block in blocks}
    if not instead:
        return graph
    draft = graph.copy().gs
    values = {tensor.name: tensor for tensor in draft.inputs}
    values.update((tensor.name, tensor) for node in draft.nodes for tensor in node.outputs)
    results = {tensor.name for tensor in draft.outputs}

    def source(name: str) -> str:
        while name in instead:
            name = instead[name]
        return name

    for node in [graph.flow.nodes[name] for name in graph.flow.topological]:
        if len(node.outputs) == 1 and node.outputs[0].name not in results and node.inputs:
            before = values.get(source(node.inputs[0].name))
            rewired = node.inputs[0].name in instead
            if rewired and before is not None and before.inputs and _same_activation(node, before.inputs[0]):
                instead[node.outputs[0].name] = before.name
    for node in draft.nodes:
        for place, tensor in enumerate(node.inputs):
            if tensor.name in instead:
                node.inputs[place] = values[source(tensor.name)]
    draft.cleanup(remove_unused_graph_inputs=False, remove_unused_node_outputs=False)
    return graph.replace(draft)


def _same_activation(node: gs.Node, before: gs.Node) -> bool:
    """Whether both are the same activation, and one that applied twice is applied once: ReLU, or Clip to fixed ends."""
    if node.op != before.op or node.domain or before.domain or len(node.inputs) != len(before.inputs):
        return False
    if node.op == "Relu":
        return True
    pairs = zip(node.inputs[1:], before.inputs[1:], strict=True)
    return node.op == "Clip" and all(_equal(one, other) for one, other in pairs)


def _equal(one: gs.Tensor, other: gs.Tensor) -> bool:
    if isinstance(one, gs.Constant) and isinstance(other, gs.Constant):
        return bool((one.values == other.values).all())
    return bool(one.is_empty() and other.is_empty())


class _Finder:
    """What is known about one graph while its blocks are looked for."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.flow = DataFlow(graph, [graph.final]) if graph.exits else graph.flow
        self.types = graph.types
        self.results = set(graph.outputs)
        self.found: dict[str, Block] = {}
        self.rejected: list[Rejected] = []

    def report(self) -> BlockReport:
        for name in self.flow.topological:
            node = self.flow.nodes[name]
            if node.op in _SUMS and name in self.flow.needed and not node.domain:
                self._sum(node)
        self._stretches()
        place = {block.name: self.flow.index(self.flow.producer[block.exit]) for block in self.found.values()}
        ordered = sorted(self.found.values(), key=lambda block: place[block.name])
        return BlockReport(tuple(ordered), tuple(self.rejected))

    # -- residual branches ---------------------------------------------------------------------------------------------

    def _sum(self, node: gs.Node) -> None:
        """A branch, or a block whose shortcut computes something, that ends in this addition; else the reason."""
        operands = [tensor.name for tensor in node.inputs if self.flow.is_data(tensor.name)]
        if len(operands) < 2 or operands[0] == operands[1]:
            return  # a bias, a position table: no two ways meet here
        if len(operands) > 2:
            self._reject(node, f"it adds {len(operands)} values; a block ends in the sum of two")
            return
        first, second = operands
        kind: BlockKind = "branch"
        if self._leads_to(first, second):
            entry, branch = first, second
        elif self._leads_to(second, first):
            entry, branch = second, first
        else:
            kind, branch = "stretch", node.outputs[0].name
            common = self._dominator(node.name)
            if common is None:
                self._reject(node, f"no one value leads to both {first!r} and {second!r}")
                return
            entry = common
        exit_ = node.outputs[0].name
        reason = self._fault(entry, branch, exit_, kind)
        if reason is not None:
            self._reject(node, reason)
            return
        self._add(kind, entry, exit_)

    def _fault(self, entry: str, branch: str, exit_: str, kind: BlockKind) -> str | None:
        """Why what lies between ``entry`` and ``exit_`` cannot be left out."""
        before, after = self.types[entry], self.types[exit_]
        if before.shape is None or before.shape != after.shape or before.dtype != after.dtype:
            way = "the shortcut" if kind == "branch" else "a layer on its shortcut"
            return f"{way} changes the shape: {entry!r} is {before}, {exit_!r} is {after}"
        if exit_ in self.results:
            return f"{exit_!r} is an output of the graph"
        if not self._read_plainly(exit_):
            return f"{exit_!r} is read inside a sub-graph"
        gone = self._gone(entry, exit_)
        inside = self._between(entry, branch)
        shared = sorted(inside - gone, key=self.flow.index)
        if shared:
            return f"what node {shared[0]!r} inside it computes is needed elsewhere, too"
        if kind == "stretch":
            others = sorted({value for name in inside for value in self.flow.data_inputs(name)} - {entry})
            side = [value for value in others if self.flow.producer.get(value) not in inside]
            if side:
                return f"besides {entry!r} it reads {side[0]!r}"
        return None

    def _leads_to(self, value: str, later: str) -> bool:
        """Whether ``later`` is computed from ``value``."""
        producer = self.flow.producer.get(later)
        return producer is not None and self._depends(producer, value)

    def _depends(self, node: str, value: str) -> bool:
        """Whether ``node`` is a data node that runs on ``value`` or what comes of it."""
        if node in self.flow.shape_nodes:
            return False
        by = self.flow.producer.get(value)
        if by is None:
            return node in self._behind_input.get(value, ())
        index = self.flow.index(by)
        return node != by and bool(self.flow.ancestor_bits([self.flow.nodes[node].outputs[0].name]) >> index & 1)

    @cached_property
    def _behind_input(self) -> dict[str, set[str]]:
        """The data nodes computed from each input of the graph."""
        behind: dict[str, set[str]] = {value: set() for value in self.flow.inputs}
        for value, found in behind.items():
            queue = list(self.flow.data_consumers(value))
            while queue:
                name = queue.pop()
                if name not in found:
                    found.add(name)
                    made = (tensor.name for tensor in self.flow.nodes[name].outputs)
                    queue += [reader for each in made for reader in self.flow.data_consumers(each)]
        return behind

    def _between(self, entry: str, last: str) -> set[str]:
        """The data nodes on the ways from ``entry`` to ``last``."""
        found: set[str] = set()
        queue = [last]
        while queue:
            value = queue.pop()
            name = self.flow.producer.get(value)
            if value == entry or name is None or name in found or not self._depends(name, entry):
                continue
            found.add(name)
            queue += self.flow.data_inputs(name)
        return found

    def _gone(self, entry: str, exit_: str) -> set[str]:
        """The nodes that nobody needs any more when readers of ``exit_`` read ``entry`` instead."""
        stays = self.flow.producer.get(entry)
        first = self.flow.producer[exit_]
        gone, queue = {first}, list(self.flow.reads(first))
        while queue:
            name = self.flow.producer.get(queue.pop())
            if name is None or name == stays or name in gone:
                continue
            made = [tensor.name for tensor in self.flow.nodes[name].outputs if tensor.name]
            readers = {reader for value in made for reader in self.flow.consumers[value]}
            if readers <= gone and not self.results & set(made):
                gone.add(name)
                queue += self.flow.reads(name)
        return gone

    def _read_plainly(self, value: str) -> bool:
        """Whether every reader has the value among its own inputs (not inside a sub-graph)."""
        readers = (self.flow.nodes[name] for name in self.flow.consumers[value])
        return all(any(tensor.name == value for tensor in reader.inputs) for reader in readers)

    @cached_property
    def _dominators(self) -> Mapping[object, object]:
        """Immediate dominators on the data flow, from a virtual entry in front of the inputs."""
        forwards = nx.DiGraph()
        for name in self.flow.topological:
            for value in self.flow.data_inputs(name):
                forwards.add_edge(self.flow.producer.get(value, _ENTRY), name)
        return dict(nx.immediate_dominators(forwards, _ENTRY)) if _ENTRY in forwards else {}

    def _dominator(self, node: str) -> str | None:
        """The last value before ``node`` that every way to it passes; ``None`` where there is none."""
        found = self._dominators.get(node, _ENTRY)
        if not isinstance(found, str):
            return self.flow.inputs[0] if len(self.flow.inputs) == 1 else None
        made = [tensor.name for tensor in self.flow.nodes[found].outputs if tensor.name]
        return made[0] if len(made) == 1 else None

    # -- stretches -----------------------------------------------------------------------------------------------------

    def _stretches(self) -> None:
        """Between two points of the same type that every way passes, each right in front of a layer or a pool."""
        ends = [name for name in self.flow.cut_points if self._is_end(name)]
        values = [self.flow.nodes[name].outputs[0].name for name in ends]
        branches = [block for block in self.found.values() if block.kind == "branch"]
        exits = sorted(self.flow.index(self.flow.producer[block.exit]) for block in branches)
        for place, entry in enumerate(values):
            exit_ = next((v for v in values[place + 1 :] if self._same_type(entry, v)), None)
            if exit_ is None or exit_ in self.found or exit_ in self.results or not self._read_plainly(exit_):
                continue
            start, end = (self.flow.index(self.flow.producer[value]) for value in (entry, exit_))
            if any(start < at <= end for at in exits):
                continue  # its branches can be left out one by one
            if self._gone(entry, exit_) >= self._between(entry, exit_):
                self._add("stretch", entry, exit_)

    def _is_end(self, name: str) -> bool:
        """Whether the node hands on one value, to a layer or a pool, or to several nodes."""
        node = self.flow.nodes[name]
        if len([tensor for tensor in node.outputs if tensor.name]) != 1:
            return False
        readers = [self.flow.nodes[reader] for reader in self.flow.data_consumers(node.outputs[0].name)]
        return len(readers) > 1 or any(self._role(reader) not in (Role.FOLLOWER, Role.REARRANGE) for reader in readers)

    def _role(self, node: gs.Node) -> Role:
        return role(node, weighted=any(not self.flow.is_data(tensor.name) for tensor in node.inputs if tensor.name))

    def _same_type(self, one: str, other: str) -> bool:
        before, after = self.types[one], self.types[other]
        return before.shape is not None and before.shape == after.shape and before.dtype == after.dtype

    # -- results -------------------------------------------------------------------------------------------------------

    def _add(self, kind: BlockKind, entry: str, exit_: str) -> None:
        nodes = tuple(sorted(self._gone(entry, exit_), key=self.flow.index))
        if kind == "stretch" and all(self._role(self.flow.nodes[name]) is not Role.LAYER for name in nodes):
            return  # an activation or a pool alone: nothing to gain
        self.found[exit_] = Block(exit_, kind, entry, exit_, nodes, self._macs(nodes))

    def _macs(self, nodes: Sequence[str]) -> int | None:
        try:
            return int(sum(node_macs(self.flow.nodes[name], self.types) or 0 for name in nodes))
        except GraphError:
            return None

    def _reject(self, node: gs.Node, reason: str) -> None:
        self.rejected.append(Rejected(node.outputs[0].name, reason))
