"""Scopes: re-emitting parts of a graph where the batch is another one.

Inside an ``If`` branch, or in the second file of a staged network, a value holds fewer rows than in the flat graph.
Data nodes do not mind, but whatever was computed *from the batch size* (``Shape(x)`` → ``Gather`` → ``Concat`` →
``Expand`` or ``Reshape``) must be computed again from the rows that are left; captured from outside it would be wrong.
A :class:`Scope` copies data nodes as they are, emits shape arithmetic on demand in the scope that needs it, and
re-roots ``Shape(v)`` on a value of its own where ``v`` was not handed on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from eexform.errors import GraphError
from eexform.ir.emit import Emitter
from eexform.ir.graph import BATCH, Graph
from eexform.ir.inference import split_dim
from eexform.ir.order import captured
from eexform.ir.types import Dim


class Names:
    """The names of one lowering: everything the source graph uses is taken, and some values get new names.

    Attributes:
        renamed: new names of source values (a graph output's own name must stay free for the outermost output).
    """

    def __init__(self, source: Graph, free: Iterable[str]) -> None:
        """Keep ``free``, the graph's output first, for the lowered model's own inputs and outputs.

        Raises:
            GraphError: the graph's output has the name of another one of them, or a graph input has one of them.
        """
        free = list(free)
        if free[0] in free[1:]:
            raise GraphError(f"the graph's output is called {free[0]!r} like an output that lowering adds; rename it")
        root = Emitter(source.gs)
        self._taken = root._taken
        self.renamed: dict[str, str] = {}
        for name in free:
            if name in source.inputs:
                raise GraphError(f"the graph input {name!r} has a name that the lowered model needs itself; rename it")
            if name in self._taken:
                self.renamed[name] = root.unique(name + ".value")
            self._taken.add(name)

    def emitter(self, draft: gs.Graph, prefix: str = "") -> Emitter:
        """An emitter on ``draft`` that keeps clear of every name of the lowering, in whatever scope."""
        return Emitter(draft, prefix, _taken=self._taken)


class Scope:
    """One level of a lowered network: a draft graph and the values of the source graph that exist in it.

    Attributes:
        source: the flat graph that is lowered.
        draft: the nodes of this level.
        emit: adds nodes to the draft.
        values: source value name → the tensor that holds it here, with this level's rows.
        imports: source value name, or own name of a symbol → tensor of an outer level that is used here. Its content
            does not depend on the batch.
    """

    def __init__(self, source: Graph, names: Names, prefix: str = "", outer: Scope | None = None) -> None:
        self.source = source
        self.names = names
        self.outer = outer
        self.draft = gs.Graph(opset=source.gs.opset, import_domains=source.gs.import_domains)
        self.emit = names.emitter(self.draft, prefix)
        self.values: dict[str, gs.Tensor] = {}
        self.imports: dict[str, gs.Variable] = {}
        self._rows: tuple[gs.Variable, int] | None = None
        self._batch: gs.Variable | None = None
        self._symbols: dict[str, gs.Variable] = {}
        self._published: set[str] = set()

    # -- filling the scope --------------------------------------------------------------------------------------------

    def bind(self, value: str, tensor: gs.Variable) -> None:
        """Say that ``tensor`` holds source value ``value`` here, with this scope's rows."""
        axis = self.source.types[value].batch_axis
        self.values[value] = tensor
        if self._rows is None and axis is not None:
            self._rows = (tensor, axis)

    def add(self, nodes: Iterable[str]) -> None:
        """Copy data nodes of the source, by name and in topological order, with what shape arithmetic they need."""
        flow = self.source.flow
        for name in nodes:
            self._copy(flow.nodes[name], keep_names=True)

    def resolve(self, value: str) -> gs.Tensor:
        """The tensor that holds source value ``value`` in this scope; shape arithmetic is emitted where needed.

        Raises:
            GraphError: the value depends on the batch and was not handed on.
        """
        if value in self.values:
            return self.values[value]
        tensor = self.source.tensors[value]
        if isinstance(tensor, gs.Constant):
            copied = tensor.copy()  # a tensor knows its consumers, and those of the source must not change
            copied.name = self.names.renamed.get(value, value)
            self.values[value] = copied
            return copied
        flow = self.source.flow
        producer = flow.producer.get(value)
        if producer in flow.shape_nodes:
            if not self._fixed(value) or not self._import(value):
                self._emit_shape(flow.nodes[producer])
            return self.values[value]
        if self._changes(value) or not self._import(value):
            raise GraphError(
                f"value {value!r} is computed before an exit and needed behind it, but was not handed on; this is "
                "a bug in eexform's live sets, please report it"
            )
        return self.values[value]

    def publish(self, value: str, name: str, *, alone: bool = True) -> gs.Variable:
        """Make source value ``value`` available as an output called ``name``.

        Args:
            value: name in the source graph.
            name: name of the output; must have been kept free.
            alone: the value may be renamed; otherwise it keeps its own name too and the output is a copy.
        """
        tensor = self.resolve(value)
        if alone and tensor.inputs and value not in self._published:
            self._published.add(value)
            tensor.name = name
            return tensor
        copied = gs.Variable(name, dtype=tensor.dtype, shape=tensor.shape)
        label = self.emit.unique(f"publish.{name}")
        self.draft.nodes.append(gs.Node(op="Identity", name=label, inputs=[tensor], outputs=[copied]))
        return copied

    # -- values of outer scopes ---------------------------------------------------------------------------------------

    def _fixed(self, value: str) -> bool:
        """Known to be the same whatever the batch."""
        kind = self.source.types.get(value)
        return kind is not None and kind.dtype is not None and not kind.batch_dependent

    def _changes(self, value: str) -> bool:
        """Known, or to be feared, to change with the batch."""
        kind = self.source.types.get(value)
        return kind is None or kind.shape is None or kind.batch_axis is not None or kind.batch_dependent

    def _import(self, value: str) -> bool:
        """Use an outer scope's ``value`` here, if one has it."""
        scope = self.outer
        while scope is not None:
            if value in scope.values:
                self.values[value] = self._imported(value, scope.values[value])
                return True
            scope = scope.outer
        return False

    def _imported(self, key: str, tensor: gs.Tensor) -> gs.Variable:
        known = gs.Variable(tensor.name, dtype=tensor.dtype, shape=tensor.shape)
        self.imports[key] = known
        return known

    # -- copying nodes ------------------------------------------------------------------------------------------------

    def _copy(self, node: gs.Node, *, keep_names: bool) -> None:
        inputs = [self.resolve(t.name) if t.name else gs.Variable.empty() for t in node.inputs]
        if any(isinstance(attribute, gs.Graph) for attribute in node.attrs.values()):
            self._check_captures(node)
        outputs = []
        for tensor in node.outputs:
            if not tensor.name:
                outputs.append(gs.Variable.empty())
                continue
            own = self.names.renamed.get(tensor.name, tensor.name) if keep_names else self.emit.unique(tensor.name)
            copied = gs.Variable(own, dtype=tensor.dtype, shape=tensor.shape)
            self.values[tensor.name] = copied
            outputs.append(copied)
        name = node.name if keep_names else self.emit.unique(node.name)
        self.draft.nodes.append(
            gs.Node(op=node.op, name=name, attrs=dict(node.attrs), inputs=inputs, outputs=outputs, domain=node.domain)
        )

    def _check_captures(self, node: gs.Node) -> None:
        """A sub-graph of the trunk uses outer values by name: they must have that very name here."""
        bodies = [attribute for attribute in node.attrs.values() if isinstance(attribute, gs.Graph)]
        for value in sorted({name for body in bodies for name in captured(body)}):
            if value in self.source.tensors and self.resolve(value).name != value:
                raise GraphError(
                    f"node {node.name!r} ({node.op}) uses {value!r} inside its own branch; that cannot be re-rooted on "
                    "the undecided rows: put the exit behind this node, or use the form 'multi'"
                )

    # -- shape arithmetic ---------------------------------------------------------------------------------------------

    def _emit_shape(self, node: gs.Node) -> None:
        """Emit one node of shape arithmetic (and what it needs), rooted in this scope's rows."""
        if node.op in ("Shape", "Size") and not self._available(node.inputs[0].name):
            value = node.inputs[0].name
            dims = self._dims(value, node.name)
            if node.op == "Shape":
                start, end = int(node.attrs.get("start", 0)), node.attrs.get("end")
                built = self._vector(dims[slice(start, None if end is None else int(end))], value)
            else:
                built = self.emit.reduce("ReduceProd", self._vector(dims, value), [0], name=f"{value}.size")
            self.values[node.outputs[0].name] = built
            return
        self._copy(node, keep_names=self.outer is None)

    def _available(self, value: str) -> bool:
        if value in self.values or isinstance(self.source.tensors[value], gs.Constant):
            return True
        if self.source.flow.producer.get(value) in self.source.flow.shape_nodes:
            return True
        return not self._changes(value) and self._import(value)

    def _dims(self, value: str, node: str) -> tuple[Dim, ...]:
        kind = self.source.types.get(value)
        if kind is None or kind.shape is None or any(dim is None for dim in kind.shape):
            shape = None if kind is None else kind.shape
            raise GraphError(
                f"node {node!r} takes the shape of {value!r}, which is computed before an exit and has unknown "
                f"dimensions ({shape}); it cannot be recomputed for the undecided rows: give the input's shape "
                "(input_shapes), or use the form 'multi'"
            )
        return kind.shape

    def _vector(self, dims: Sequence[Dim], value: str) -> gs.Tensor:
        """The dimensions as an int64 vector; neighbouring fixed ones become one constant."""
        parts: list[gs.Tensor] = []
        fixed: list[int] = []
        for dim in dims:
            if isinstance(dim, int):
                fixed.append(dim)
                continue
            if fixed:
                parts.append(self.emit.constant(f"{value}.dims", fixed))
                fixed = []
            parts.append(self._dim(str(dim)))
        if fixed or not parts:
            parts.append(self.emit.constant(f"{value}.dims", fixed))
        if len(parts) == 1:
            return parts[0]
        return self.emit.node("Concat", *parts, name=f"{value}.shape", axis=0)

    def _dim(self, dim: str) -> gs.Variable:
        """A symbolic dimension as an int64 vector of one element."""
        factor, symbol = split_dim(dim)
        if factor != 1:
            return self.emit.node("Mul", self._dim(symbol), self.emit.constant(f"times{factor}", [factor]))
        if dim == BATCH:
            return self.batch()
        if dim not in self._symbols:
            self._symbols[dim] = self._symbol(dim)
        return self._symbols[dim]

    def batch(self) -> gs.Variable:
        """The number of rows of this scope, as an int64 vector of one element."""
        if self._batch is None:
            if self._rows is None:
                raise GraphError("no value that carries the batch is handed on, so its size is not known here")
            tensor, axis = self._rows
            self._batch = self.emit.node("Shape", tensor, name="rows", start=axis, end=axis + 1, dtype=np.int64)
        return self._batch

    def _symbol(self, dim: str) -> gs.Variable:
        found = self._measured(dim)
        if found is not None:
            return found
        scope = self.outer
        while scope is not None:
            found = scope._symbols.get(dim) or scope._measured(dim)
            if found is not None:
                scope._symbols[dim] = found
                return self._imported(dim, found)
            scope = scope.outer
        raise GraphError(f"the size of dimension {dim!r} cannot be computed: no value has it")

    def _measured(self, dim: str) -> gs.Variable | None:
        """The dimension read off a value of this scope that has it."""
        for value, tensor in self.values.items():
            kind = self.source.types.get(value)
            if kind is None or kind.shape is None or value in self.imports or isinstance(tensor, gs.Constant):
                continue
            if dim in kind.shape:
                axis = kind.shape.index(dim)
                return self.emit.node("Shape", tensor, name=f"size.{dim}", start=axis, end=axis + 1, dtype=np.int64)
        return None


def bind_inputs(scope: Scope) -> None:
    """Bind the source graph's inputs in its outermost scope."""
    for tensor in scope.source.gs.inputs:
        scope.bind(tensor.name, gs.Variable(tensor.name, dtype=tensor.dtype, shape=tensor.shape))
