"""Who feeds whom: data flow apart from shape arithmetic, ancestors, live sets, dominators.

An exported network holds two kinds of nodes. *Data nodes* compute something from the samples. *Shape nodes* compute
from sizes and constants only: ``Shape`` and ``Size`` themselves, every chain behind them that feeds a ``Reshape``, an
``Expand`` or a ``Slice``, but also a class token expanded to the batch size, position numbers from ``Range``, zeros
from ``ConstantOfShape`` or a parameter that is merely cast: whatever the element type, no sample can change what they
hold (only how often it is repeated). So nothing of theirs is carried over a cut; the rest of the network computes it
again for the rows that are left. Without this distinction a transformer exported with a dynamic batch has next to no
cut points, because the batch size, once read, is used everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np
import onnx_graphsurgeon as gs

from eexform.errors import GraphError, suggest

if TYPE_CHECKING:
    from eexform.ir.graph import Graph

WIDEST = 128
"""Live sets are followed up to this many values; a wider cut is nobody's site (see :meth:`DataFlow.cut`)."""

_SIZES = frozenset({"Shape", "Size"})
_RANDOM = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli"})
_SIZED_BY_CONTENT = frozenset({"NonZero", "Unique", "Compress", "NonMaxSuppression", "StringSplit"})
_ONNX_DOMAINS = ("", "ai.onnx", None)


class DataFlow:
    """The structure of a graph, by names.

    Constants are not listed as inputs anywhere: only values that are computed or fed count. Values that a sub-graph
    (``If``, ``Loop``, ``Scan``) takes from outside count as inputs of the node that holds the sub-graph.

    Attributes:
        nodes: every node by name.
        inputs: names of the graph's inputs.
        outputs: the values that count as results.
        producer: value -> the node that computes it.
        consumers: value -> the nodes that read it (shape nodes included), in topological order.
        digraph: networkx graph over node names; an edge means "must run before", through data or shapes.
        topological: node names in an order that respects ``digraph``; the graph's own order where that is one.
        shape_nodes: nodes that compute from sizes and constants only.
    """

    def __init__(self, graph: Graph, outputs: Sequence[str] | None = None) -> None:
        """Read the structure of ``graph``.

        Args:
            graph: the graph; it must not change afterwards.
            outputs: values that count as results (default: all outputs). What leads to none of them needs nothing.

        Raises:
            GraphError: a node has no name or one that is taken, a value has two producers, there is a cycle, or an
                output does not exist.
        """
        self.inputs: tuple[str, ...] = graph.inputs
        self._fed = frozenset(self.inputs)
        self.outputs: tuple[str, ...] = graph.outputs if outputs is None else tuple(outputs)
        self.nodes: dict[str, gs.Node] = {}
        self.producer: dict[str, str] = {}
        for node in graph.nodes:
            if not node.name or node.name in self.nodes:
                raise GraphError(f"two nodes are called {node.name!r} (or have no name); node names must be unique")
            self.nodes[node.name] = node
            for tensor in node.outputs:
                if tensor.name in self.producer:
                    first = self.producer[tensor.name]
                    raise GraphError(f"value {tensor.name!r} is produced by {first!r} and by {node.name!r}")
                if tensor.name:
                    self.producer[tensor.name] = node.name
        self._reads: dict[str, tuple[str, ...]] = {
            name: tuple(dict.fromkeys(v for v in _operands(node) if v in self.producer or v in self._fed))
            for name, node in self.nodes.items()
        }
        for value in self.outputs:
            self._known(value)
        self.digraph = self._digraph()
        self.topological: tuple[str, ...] = self._order()
        self._index = {name: i for i, name in enumerate(self.topological)}
        readers: dict[str, list[str]] = {value: [] for value in (*self.inputs, *self.producer)}
        for name in self.topological:
            for value in self._reads[name]:
                readers[value].append(name)
        self.consumers: dict[str, tuple[str, ...]] = {value: tuple(names) for value, names in readers.items()}
        self.shape_nodes: frozenset[str] = self._find_shape_nodes()

    # -- building ------------------------------------------------------------------------------------------------------

    def _digraph(self) -> nx.DiGraph:
        graph = nx.DiGraph()
        graph.add_nodes_from(self.nodes)
        for name, values in self._reads.items():
            graph.add_edges_from((self.producer[v], name) for v in values if v in self.producer)
        return graph

    def _order(self) -> tuple[str, ...]:
        position = {name: i for i, name in enumerate(self.nodes)}
        try:
            return tuple(nx.lexicographical_topological_sort(self.digraph, key=position.__getitem__))
        except nx.NetworkXUnfeasible:
            cycle = " -> ".join(repr(edge[0]) for edge in nx.find_cycle(self.digraph))
            raise GraphError(f"the graph has a cycle: {cycle}") from None

    def _find_shape_nodes(self) -> frozenset[str]:
        found: set[str] = set()
        unsized: set[str] = set()  # data nodes whose outputs' sizes may depend on what the samples hold
        for name in self.topological:
            node = self.nodes[name]
            sources = [self.producer.get(value) for value in self._reads[name]]
            content_sized = any(source in unsized for source in sources)
            if self.is_shape_node(node, sources, found) and not (node.op in _SIZES and content_sized):
                found.add(name)
            elif content_sized or node.op in _SIZED_BY_CONTENT:
                unsized.add(name)
        return frozenset(found)

    @staticmethod
    def is_shape_node(node: gs.Node, sources: Sequence[str | None], shape_nodes: AbstractSet[str]) -> bool:
        """Whether ``node`` computes from sizes and constants only.

        Args:
            node: the node.
            sources: producers of its inputs that are not constants; ``None`` for a graph input.
            shape_nodes: those found so far, among them all that feed this one.
        """
        if node.op in _SIZES:
            return True
        if node.op in _RANDOM or (not sources and node.domain not in _ONNX_DOMAINS):
            return False
        return all(source in shape_nodes for source in sources)

    def _known(self, value: str) -> None:
        if value not in self.producer and value not in self._fed:
            raise GraphError(f"no node computes value {value!r}: {suggest(value, (*self.inputs, *self.producer))}")

    # -- simple questions ----------------------------------------------------------------------------------------------

    def is_data(self, value: str) -> bool:
        """Whether ``value`` is computed from the samples (a graph input or the output of a data node)."""
        return value in self._fed or (value in self.producer and self.producer[value] not in self.shape_nodes)

    def reads(self, node: str) -> tuple[str, ...]:
        """The values that ``node`` takes, constants left out, each once."""
        return self._reads[node]

    def data_inputs(self, node: str) -> tuple[str, ...]:
        """The values computed from the samples that ``node`` takes; none for ``Shape``, which looks at sizes only."""
        if node in self.shape_nodes:
            return ()
        return tuple(value for value in self._reads[node] if self.is_data(value))

    def data_consumers(self, value: str) -> tuple[str, ...]:
        """The nodes that need what ``value`` holds (not merely its size) and that lead to an output."""
        return self._data_consumers.get(value, ())

    @cached_property
    def needed(self) -> frozenset[str]:
        """Nodes that lead to an output, through data or shapes; the others are dead."""
        return self.ancestors(self.outputs)

    @cached_property
    def _data_consumers(self) -> dict[str, tuple[str, ...]]:
        alive = self.needed - self.shape_nodes
        return {
            value: tuple(name for name in names if name in alive)
            for value, names in self.consumers.items()
            if self.is_data(value)
        }

    def index(self, node: str) -> int:
        """Position of ``node`` in :attr:`topological`."""
        return self._index[node]

    # -- ancestors -----------------------------------------------------------------------------------------------------

    @cached_property
    def _ancestor_bits(self) -> list[int]:
        """Per node, in topological order: itself and everything that must run before it, bit i = node i.

        Quadratic in principle, n*n/8 bytes; 10,000 nodes take some 6 MB and a few milliseconds.
        """
        bits: list[int] = []
        for i, name in enumerate(self.topological):
            mine = 1 << i
            for before in self.digraph.predecessors(name):
                mine |= bits[self._index[before]]
            bits.append(mine)
        return bits

    def ancestor_bits(self, values: Iterable[str]) -> int:
        """Like :meth:`ancestors`, as a bit set: bit i stands for ``topological[i]``."""
        bits = 0
        for value in values:
            if value in self.producer:
                bits |= self._ancestor_bits[self._index[self.producer[value]]]
        return bits

    def names(self, bits: int) -> Iterator[str]:
        """The nodes of a bit set, in topological order."""
        return (self.topological[i] for i in np.flatnonzero(self._mask(bits)))

    def bits(self, nodes: Iterable[str]) -> int:
        """Inverse of :meth:`names`."""
        mask = np.zeros(len(self.topological), dtype=np.uint8)
        mask[[self._index[name] for name in nodes]] = 1
        return int.from_bytes(np.packbits(mask, bitorder="little").tobytes(), "little")

    def _mask(self, bits: int) -> np.ndarray:
        size = len(self.topological)
        packed = np.frombuffer(bits.to_bytes((size + 7) // 8, "little"), dtype=np.uint8)
        return np.unpackbits(packed, count=size, bitorder="little").astype(bool)

    def ancestors(self, values: Iterable[str]) -> frozenset[str]:
        """Every node that has to run before all of ``values`` are there: data and shape nodes, the producers included.

        Raises:
            GraphError: a value does not exist.
        """
        wanted = tuple(values)
        for value in wanted:
            self._known(value)
        return frozenset(self.names(self.ancestor_bits(wanted)))

    def accumulate(self, weights: Mapping[str, float]) -> dict[str, float]:
        """Sum ``weights`` over the ancestors of each value, each node once (graph inputs: 0).

        Args:
            weights: node name -> weight; nodes that are not named weigh nothing. Integers stay integers.
        """
        weighted = self.bits(name for name, weight in weights.items() if weight and name in self.nodes)
        sums: list[float] = []
        for i, name in enumerate(self.topological):
            mine = self._ancestor_bits[i] & weighted
            # start from the predecessor with the largest sum and add only what it does not cover: in a chain of blocks
            # that is one node or one branch, so the whole is near-linear
            before = [self._index[source] for source in self.digraph.predecessors(name)]
            base = max(before, key=lambda j: (sums[j], j), default=None)
            rest = mine if base is None else mine & ~self._ancestor_bits[base]
            total: float = 0 if base is None else sums[base]
            if rest.bit_count() <= 8:
                while rest:
                    low = rest & -rest
                    total += weights[self.topological[low.bit_length() - 1]]
                    rest ^= low
            else:
                total += sum(weights[node] for node in self.names(rest))
            sums.append(total)
        found: dict[str, float] = dict.fromkeys(self.inputs, 0)
        found.update((value, sums[self._index[name]]) for value, name in self.producer.items())
        return found

    # -- live sets -----------------------------------------------------------------------------------------------------

    @cached_property
    def _values(self) -> tuple[str, ...]:
        """Data values in the order in which they come into being."""
        made = (tensor.name for name in self.topological for tensor in self.nodes[name].outputs if tensor.name)
        return (*self.inputs, *(value for value in made if self.is_data(value)))

    def live(self, done: AbstractSet[str]) -> tuple[str, ...]:
        """The data values (graph inputs included) that are there after ``done`` and still needed by a node outside.

        What only ``Shape`` looks at is not live, nor is what shape nodes computed. On a graph with exits, let ``done``
        contain the heads passed so far (``ancestors([site, *scores of the exits so far])``), or what feeds them stays
        live.

        Returns:
            Names in topological order.
        """
        return tuple(
            value
            for value in self._values
            if (value not in self.producer or self.producer[value] in done)
            and any(name not in done for name in self.data_consumers(value))
        )

    def cut(self, node: str) -> tuple[str, ...] | None:
        """``live(ancestors of node)``, all nodes at once in near-linear time; ``None`` if wider than :data:`WIDEST`."""
        return self._cuts[self._index[node]]

    @cached_property
    def _cuts(self) -> list[tuple[str, ...] | None]:
        """Live set behind every node.

        With A(n) = {n} + union of A(p) over the predecessors p: a value that is live behind A(n) was made by n itself,
        or lies in some A(p) and has a consumer outside A(n), hence outside A(p), so it was live behind A(p). The
        candidates are therefore the predecessors' live sets, n's outputs and the graph's inputs. Where a predecessor
        was too wide to follow, all edges are looked at.
        """
        values = self._values
        number = {value: i for i, value in enumerate(values)}
        readers = [0] * len(values)
        for i, value in enumerate(values):
            for name in self.data_consumers(value):
                readers[i] |= 1 << self._index[name]
        everything = (1 << len(self.topological)) - 1
        fed = [number[value] for value in self.inputs]
        live: list[list[int] | None] = []
        for i, name in enumerate(self.topological):
            outside = everything & ~self._ancestor_bits[i]
            behind = [live[self._index[before]] for before in self.digraph.predecessors(name)]
            own = [number[tensor.name] for tensor in self.nodes[name].outputs if tensor.name in number]
            followed = [known for known in behind if known is not None]
            if len(followed) < len(behind):
                mine = self._crossing(self._mask(outside))
            else:
                mine = sorted(v for v in {*fed, *own, *chain.from_iterable(followed)} if readers[v] & outside)
            live.append(mine if len(mine) <= WIDEST else None)
        return [None if numbers is None else tuple(values[v] for v in numbers) for numbers in live]

    @cached_property
    def _edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every data edge as (number of the value, position of its producer or -1, position of the consumer)."""
        rows = [
            (i, self._index[self.producer[value]] if value in self.producer else -1, self._index[name])
            for i, value in enumerate(self._values)
            for name in self.data_consumers(value)
        ]
        table = np.array(rows, dtype=np.int64).reshape(-1, 3)
        return table[:, 0], table[:, 1], table[:, 2]

    def _crossing(self, outside: np.ndarray) -> list[int]:
        """Numbers of the values that cross a cut; ``outside``: bool per node, what is not done yet."""
        value, source, target = self._edges
        there = (source < 0) | ~outside[source]
        return np.unique(value[there & outside[target]]).tolist()

    # -- dominators ----------------------------------------------------------------------------------------------------

    @cached_property
    def _meets(self) -> dict[object, object]:
        """Immediate post-dominators on the data flow, from a virtual entry (:data:`_ENTRY`) to a virtual exit."""
        backwards = nx.DiGraph()
        for value, names in self._data_consumers.items():
            source = self.producer.get(value, _ENTRY)
            backwards.add_edges_from((name, source) for name in names)
        for value in self.outputs:
            backwards.add_edge(_EXIT, self.producer.get(value, _ENTRY))
        return dict(nx.immediate_dominators(backwards, _EXIT))

    def meet(self, node: str) -> str | None:
        """The first data node that everything computed from ``node`` passes; ``None``: all meet in the outputs only."""
        found = self._meets.get(node, _EXIT)
        return found if isinstance(found, str) else None

    @cached_property
    def cut_points(self) -> tuple[str, ...]:
        """Nodes that every path from an input to an output passes: behind them nothing else is live. In order."""
        found: list[str] = []
        at = self._meets.get(_ENTRY, _EXIT)
        while isinstance(at, str):
            found.append(at)
            at = self._meets[at]
        return tuple(found)


class _Virtual:
    """A node that is not in the graph."""


_ENTRY, _EXIT = _Virtual(), _Virtual()


def _operands(node: gs.Node) -> Iterator[str]:
    """Names of the values a node reads: its inputs, and what its sub-graphs take from outside."""
    yield from (tensor.name for tensor in node.inputs if tensor.name and not isinstance(tensor, gs.Constant))
    for attribute in node.attrs.values():
        for graph in attribute if isinstance(attribute, list | tuple) else (attribute,):
            if isinstance(graph, gs.Graph):
                own = {tensor.name for tensor in graph.inputs}
                own.update(tensor.name for inner in graph.nodes for tensor in inner.outputs)
                yield from (name for inner in graph.nodes for name in _operands(inner) if name not in own)
                yield from (tensor.name for tensor in graph.outputs if tensor.name not in own)
