"""Cutting a part out of a graph, and planting one graph into another. Weights are shared, never copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count

import numpy as np
import onnx_graphsurgeon as gs

from eexform.errors import GraphError, need
from eexform.ir.graph import Graph
from eexform.ir.inference import split_dim
from eexform.ir.order import node_inputs, ordered
from eexform.ir.types import TensorType


def extract(graph: Graph, inputs: Sequence[str], outputs: Sequence[str]) -> Graph:
    """The part of ``graph`` between some values, as a graph of its own.

    Nodes, values and constants keep their names. A ``Shape`` of a value that lies outside is computed again from the
    part's inputs (same numbers, other origin), so a part never needs a value for its size alone.

    Args:
        graph: where the part lies.
        inputs: values that become the part's inputs, typed from ``graph.types``; also the graph's own inputs. Those
            that the part turns out not to need stay inputs.
        outputs: values that become the part's outputs, in this order; the first is the part's ``final``.

    Returns:
        A graph without exits.

    Raises:
        GraphError: a value does not exist, the outputs need a value that is not among the inputs (named), or an output
            is itself an input or a constant.
    """
    known = graph.tensors
    for name in (*inputs, *outputs):
        graph.tensor(name)
        need(not isinstance(known[name], gs.Constant), f"the value {name!r} is a constant", GraphError)
    both = sorted(set(inputs) & set(outputs))
    need(not both, f"the values {both} are both inputs and outputs of the part: nothing would lie between", GraphError)
    need(outputs, "a part needs at least one output", GraphError)

    part = _Part(graph, inputs)
    part.walk(outputs)
    return graph.replace(part.build(outputs), exits=())


def graft(draft: gs.Graph, part: Graph, *, feeds: Mapping[str, gs.Tensor], prefix: str) -> dict[str, gs.Tensor]:
    """Copy a graph into another one, at its end.

    Args:
        draft: changed in place; its nodes must produce every feed.
        part: what to plant; constants share their arrays with it.
        feeds: a value of ``draft`` for each input of ``part``.
        prefix: goes in front of every node, value and constant name of ``part``.

    Returns:
        The planted value for each output of ``part``.

    Raises:
        GraphError: a feed is missing, or a prefixed name is taken.
    """
    missing = [name for name in part.inputs if name not in feeds]
    need(not missing, f"grafting {prefix!r}: no feed for the inputs {missing}", GraphError)
    nodes = ordered(part.nodes)
    _check_free(draft, part, prefix)
    mapped: dict[str, gs.Tensor] = {name: feeds[name] for name in part.inputs}
    for node in nodes:
        for tensor in (*node.inputs, *node.outputs):
            if tensor.name and tensor.name not in mapped:
                mapped[tensor.name] = _renamed(tensor, prefix + tensor.name)
    absent = [name for name in part.outputs if name not in mapped]
    need(not absent, f"grafting {prefix!r}: nothing produces its outputs {absent}", GraphError)
    for node in nodes:
        draft.nodes.append(_copied(node, mapped, prefix + node.name))
    _merge_domains(draft, part.gs)
    return {name: mapped[name] for name in part.outputs}


def _check_free(draft: gs.Graph, part: Graph, prefix: str) -> None:
    """No prefixed name is taken: asked before anything is changed."""
    nodes = {node.name for node in draft.nodes}
    values = {tensor.name for node in draft.nodes for tensor in (*node.inputs, *node.outputs)}
    values.update(tensor.name for tensor in draft.inputs)
    for node in part.nodes:
        _need_free(prefix + node.name, nodes, "node")
    for name in set(part.tensors) - set(part.inputs):
        _need_free(prefix + name, values, "value")


def _need_free(name: str, taken: set[str], what: str) -> None:
    need(name not in taken, f"the graph has a {what} called {name!r} already; rename it in the model", GraphError)


class _Part:
    """The nodes between the inputs and what is asked for, found backwards."""

    def __init__(self, graph: Graph, inputs: Sequence[str]) -> None:
        self._graph = graph
        self._inputs = tuple(dict.fromkeys(inputs))
        self._stop = set(inputs)
        self._producer = {t.name: node for node in graph.nodes for t in node.outputs if t.name}
        self._constants = graph.constants
        self._kept: set[str] = set()
        self._values: set[str] = set(inputs)
        self._rerooted: dict[str, gs.Node] = {}  # name of a Shape/Size node whose operand lies outside

    def walk(self, outputs: Sequence[str]) -> None:
        sizes = self._backwards(outputs)
        while sizes:
            pending, sizes = sizes, []
            for node in pending:
                operand = node.inputs[0].name
                if operand in self._values or operand in self._constants:
                    continue
                if self._can_reroot(node):
                    self._rerooted[node.name] = node
                else:
                    sizes += self._backwards([operand])

    def _backwards(self, wanted: Sequence[str]) -> list[gs.Node]:
        """Keep what computes ``wanted``; returns the Shape and Size nodes met, whose operands are not followed."""
        sizes = []
        stack = list(wanted)
        while stack:
            name = stack.pop()
            if name in self._values or name in self._constants:
                continue
            node = self._producer.get(name)
            if node is None:
                given = ", ".join(map(repr, self._inputs)) or "none"
                raise GraphError(
                    f"the part needs the value {name!r}, an input of the graph that is not among its inputs ({given})"
                )
            self._values.update(t.name for t in node.outputs if t.name and t.name not in self._stop)
            self._kept.add(node.name)
            if node.op in ("Shape", "Size") and not node.domain:
                sizes.append(node)
            else:
                stack += node_inputs(node)
        return sizes

    def _can_reroot(self, node: gs.Node) -> bool:
        shape = self._graph.types[node.inputs[0].name].shape
        return shape is not None and all(
            isinstance(dim, int) or (isinstance(dim, str) and self._root(split_dim(dim)[1])) for dim in shape
        )

    def _root(self, symbol: str) -> tuple[str, int, int] | None:
        """An input of the part, and its axis, whose size is the symbol or (third) a multiple of it."""
        found = [
            (factor, name, axis)
            for name in self._inputs
            for axis, dim in enumerate(self._graph.types[name].shape or ())
            if isinstance(dim, str)
            for factor, rest in [split_dim(dim)]
            if rest == symbol
        ]
        if not found:
            return None
        factor, name, axis = min(found, key=lambda item: item[0])
        return name, axis, factor

    def build(self, outputs: Sequence[str]) -> gs.Graph:
        source = self._graph.gs
        mapped: dict[str, gs.Tensor] = {}
        for name in self._inputs:
            mapped[name] = _typed(name, self._graph.types[name])
        fresh = _Names(self._graph)
        nodes: list[gs.Node] = []
        for node in ordered(source.nodes):
            if node.name not in self._kept:
                continue
            for tensor in (*node.inputs, *node.outputs):
                if tensor.name and tensor.name not in mapped:
                    mapped[tensor.name] = _renamed(tensor, tensor.name)
            for name in node_inputs(node):  # what a sub-graph takes from around it
                if name not in mapped:
                    mapped[name] = _renamed(self._graph.tensor(name), name)
            if node.name in self._rerooted:
                nodes += self._sizes(node, mapped, fresh)
            else:
                copied = _copied(node, mapped, node.name)
                for i, tensor in enumerate(copied.outputs):
                    if tensor.name in self._stop:  # given from outside: this second producer must not shadow it
                        copied.outputs[i] = gs.Variable(fresh.get(f"{tensor.name}.unused"))
                nodes.append(copied)
        for name in outputs:
            known = self._graph.types[name]
            tensor = mapped[name]
            tensor.dtype, tensor.shape = known.dtype, None if known.shape is None else list(known.shape)
        return gs.Graph(
            nodes=nodes,
            inputs=[mapped[name] for name in self._inputs],
            outputs=[mapped[name] for name in outputs],
            name=source.name,
            opset=source.opset,
            import_domains=source.import_domains,
            ir_version=source.ir_version,
        )

    def _sizes(self, node: gs.Node, mapped: dict[str, gs.Tensor], fresh: _Names) -> list[gs.Node]:
        """Nodes that compute the same numbers as a Shape or Size node, from the part's inputs."""
        shape = self._graph.types[node.inputs[0].name].shape or ()
        if node.op == "Shape":
            shape = shape[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
        made: list[gs.Node] = []

        def add(op: str, inputs: list[gs.Tensor], output: gs.Tensor | None = None, **attrs: object) -> gs.Tensor:
            name = fresh.get(f"{node.name}.reroot")
            output = output if output is not None else gs.Variable(f"{name}.out", np.int64)
            made.append(gs.Node(op, name, dict(attrs), inputs, [output]))
            return output

        def constant(numbers: Sequence[int] | int) -> gs.Tensor:
            return gs.Constant(fresh.get(f"{node.name}.reroot.const"), np.array(numbers, np.int64))

        pieces: list[gs.Tensor] = []
        for dim in shape:
            if isinstance(dim, int):
                pieces.append(constant([dim]))
                continue
            factor, symbol = split_dim(str(dim))
            root = self._root(symbol)
            assert root is not None  # _can_reroot has asked
            name, axis, multiple = root
            size = add("Gather", [add("Shape", [mapped[name]]), constant([axis])], axis=0)
            if multiple > 1:
                size = add("Div", [size, constant([multiple])])
            pieces.append(size if factor == 1 else add("Mul", [size, constant([factor])]))
        output = mapped[node.outputs[0].name]
        if node.op == "Shape":
            joined = pieces or [constant([])]
            add("Concat", joined, output, axis=0)
        else:
            joined = pieces or [constant([1])]
            add("ReduceProd", [add("Concat", joined, axis=0)], output, keepdims=0)
        return made


class _Names:
    """Names for nodes and constants that the graph does not have yet."""

    def __init__(self, graph: Graph) -> None:
        self._taken = {node.name for node in graph.nodes} | set(graph.tensors)

    def get(self, wanted: str) -> str:
        name = next(n for n in (f"{wanted}.{i}" for i in count()) if n not in self._taken)
        self._taken.add(name)
        return name


def _typed(name: str, known: TensorType) -> gs.Variable:
    return gs.Variable(name, known.dtype, None if known.shape is None else list(known.shape))


def _renamed(tensor: gs.Tensor, name: str) -> gs.Tensor:
    copied = tensor.copy()
    copied.name = name
    return copied


def _copied(node: gs.Node, mapped: Mapping[str, gs.Tensor], name: str) -> gs.Node:
    copied = node.copy(
        inputs=[mapped[t.name] if t.name else gs.Variable.empty() for t in node.inputs],
        outputs=[mapped[t.name] if t.name else gs.Variable.empty() for t in node.outputs],
        tensor_map=dict(mapped),
    )
    copied.name = name
    return copied


def _merge_domains(draft: gs.Graph, part: gs.Graph) -> None:
    """Take over the versions of custom domains that only the part uses (on a list of its own: copies share it)."""
    present = list(draft.import_domains or ())
    names = {item.domain for item in present}
    new = [item for item in part.import_domains or () if item.domain not in names and item.domain]
    if new:
        draft.import_domains = [*present, *new]
