"""Which nodes a runtime executes as one call: products with what follows them, and decomposed functions put together.

Two steps, both on the data flow alone (a value is swallowed only where everything that reads it is swallowed too, and
where it is no output and no value of an exit):

1. *Functions.* Some functions are written as several nodes between one value and one result: SiLU (x * sigmoid(x)),
   GELU (by erf or tanh), hard swish, Mish, layer normalisation, softmax. Walking back from a node that joins two ways,
   the walk ends where a single value is left; what lies between is one function, named by the operators in it.
2. *Products.* A convolution or matrix product takes along, in this order: batch normalisation and multiplication by
   constants (folded into its weights, so they cost nothing), an added constant, the other operand of a residual sum
   (convolutions only), one activation. Matrix products also take scalar factors and swapped axes of their operands.

What is left are nodes that cost nothing (shape arithmetic, and views: the same bytes under another shape), and nodes
that are calls of their own. Attention written out stays two products and a softmax: that is how runtimes without an
attention kernel of their own execute it, those for processors and microcontrollers among them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from eexform.ir.flow import DataFlow
from eexform.ir.graph import Graph

VIEWS = frozenset({"Dropout", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators whose output is their input under another shape."""

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
PRODUCTS = CONVOLUTIONS | {"Gemm", "MatMul"}

_ACTIVATIONS = """
    Celu Clip Elu Gelu HardSigmoid HardSwish LeakyRelu Mish Relu Selu Sigmoid Softplus Swish Tanh ThresholdedRelu"""
_ARITHMETIC = "Abs Add Div Erf Exp Log Max Min Mul Neg Pow Reciprocal Sqrt Sub"
ACTIVATIONS = frozenset(_ACTIVATIONS.split())
_POINTWISE = ACTIVATIONS | frozenset(_ARITHMETIC.split())
_REDUCTIONS = frozenset({"ReduceMax", "ReduceMean", "ReduceSum"})
_CENTRED = frozenset({"Sub", "ReduceMean"})
_SHIFTED = frozenset({"Exp", "Sub", "ReduceMax"})
_JOINS = frozenset({"Mul", "Div"})
_LONGEST = 12


@dataclass(frozen=True)
class Call:
    """Nodes that are executed together.

    Attributes:
        nodes: in topological order.
        main: the node whose operator and sizes describe the call.
        op: what is called.
        fused: what is done besides, in order: ``Add`` for a residual sum, then the activation.
        folded: nodes that go into the weights and cost nothing at run time.
    """

    nodes: tuple[str, ...]
    main: str
    op: str
    fused: tuple[str, ...] = ()
    folded: frozenset[str] = frozenset()


def calls(graph: Graph) -> tuple[tuple[Call, ...], tuple[str, ...]]:
    """The calls of a graph, in the order of their last nodes, and the nodes that cost nothing."""
    return _Fusion(graph).calls()


class _Fusion:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.flow: DataFlow = graph.flow
        self.kept = {*graph.outputs, *(value for item in graph.exits for value in (item.site, *item.values))}
        self.taken: set[str] = set()
        self.functions: dict[str, Call] = {}  # by each of their nodes

    def calls(self) -> tuple[tuple[Call, ...], tuple[str, ...]]:
        order = self.flow.topological
        free = [name for name in order if name in self.flow.shape_nodes or self.flow.nodes[name].op in VIEWS]
        self.taken.update(free)
        for name in order:
            if name not in self.taken and self.flow.nodes[name].op in _JOINS:
                self._find_function(name)
        found: list[Call] = []
        for name in reversed(order):  # of two products that meet in a sum, the later one makes it
            if name not in self.taken and self.flow.nodes[name].op in PRODUCTS:
                call = self._product(name)
                self.taken.update(call.nodes)
                found.append(call)
        for name in order:
            if name not in self.taken:
                call = self.functions.get(name) or Call((name,), name, _label(self.flow.nodes[name]))
                self.taken.update(call.nodes)
                found.append(call)
        found.sort(key=lambda call: self.flow.index(call.nodes[-1]))
        return tuple(found), tuple(free)

    # -- what may be swallowed -----------------------------------------------------------------------------------------

    def _readers(self, value: str) -> tuple[str, ...]:
        """Nodes that need what ``value`` holds; those that ask for its size alone are no obstacle."""
        return tuple(name for name in self.flow.consumers.get(value, ()) if name not in self.flow.shape_nodes)

    def _only_reader(self, value: str) -> str | None:
        readers = self._readers(value)
        if value in self.kept or len(readers) != 1 or readers[0] in self.taken:
            return None
        return readers[0]

    def _constant(self, tensor: gs.Tensor) -> bool:
        return isinstance(tensor, gs.Constant) or not self.flow.is_data(tensor.name)

    def _size(self, tensor: gs.Tensor) -> int | None:
        """Elements of a value that does not depend on the batch; ``None`` where that is not known."""
        shape = tensor.shape if isinstance(tensor, gs.Constant) else self._shape(tensor.name)
        if shape is None or not all(isinstance(dim, int) for dim in shape):
            return None
        return math.prod(shape)

    def _shape(self, value: str) -> tuple[int | str | None, ...] | None:
        found = self.graph.types.get(value)
        return None if found is None else found.shape

    def _ordered(self, names: Collection[str]) -> tuple[str, ...]:
        return tuple(sorted(names, key=self.flow.index))

    # -- functions -----------------------------------------------------------------------------------------------------

    def _find_function(self, end: str) -> None:
        """Walk back from ``end`` until one value is left; remember what lies between if it is a known function."""
        start = (frozenset({end}), frozenset(self.flow.data_inputs(end)))
        found = self._walk(*start, _POINTWISE | _REDUCTIONS, _twice(self.flow.nodes[end]))
        if found is None:
            return
        op = self._named(found[0])
        # x / sqrt(mean(x^2)) may go on to x - mean, and e / sum(e) to exp(x - max)
        further = {"RMSNormalization": _CENTRED, None: _SHIFTED}.get(op)
        longer = self._walk(*found, further, False) if further is not None else None
        if longer is not None and self._named(longer[0]) is not None:
            found, op = longer, self._named(longer[0])
        if op is None:
            return
        ordered = self._with_factor(self._ordered(found[0]), op)
        self.functions.update(dict.fromkeys(ordered, Call(ordered, end, op)))

    def _walk(
        self, nodes: frozenset[str], open_values: frozenset[str], allowed: frozenset[str], joined: bool
    ) -> tuple[frozenset[str], frozenset[str]] | None:
        """Nodes back to where two ways have become one, and the one value there."""
        joined = joined or len(open_values) > 1
        while not (joined and len(open_values) == 1):
            latest = max(open_values, key=self._place, default="")
            maker = self.flow.producer.get(latest)
            if maker is None or maker in self.taken or maker in self.functions or len(nodes) == _LONGEST:
                return None
            if self.flow.nodes[maker].op not in allowed or latest in self.kept:
                return None
            if not set(self._readers(latest)) <= nodes:
                return None
            read = self.flow.data_inputs(maker)
            nodes, open_values = nodes | {maker}, (open_values - {latest}) | set(read)
            joined = joined or len(read) > 1
        return nodes, open_values

    def _named(self, nodes: Collection[str]) -> str | None:
        return _function([self.flow.nodes[name].op for name in nodes])

    def _place(self, value: str) -> int:
        return self.flow.index(self.flow.producer[value]) if value in self.flow.producer else -1

    def _with_factor(self, nodes: tuple[str, ...], op: str) -> tuple[str, ...]:
        """The function with the constants that still belong to it: 0.5 of GELU, 1/6 of hard swish, scale and shift."""
        wanted: Sequence[frozenset[str]] = ()
        if op in ("Gelu", "HardSwish"):
            wanted = (frozenset({"Mul", "Div"}),)
        elif op in ("LayerNormalization", "RMSNormalization"):
            wanted = (frozenset({"Mul"}), frozenset({"Add"}))
        for ops in wanted:
            reader = self._only_reader(self.flow.nodes[nodes[-1]].outputs[0].name)
            if reader is None or reader in self.functions or self.flow.nodes[reader].op not in ops:
                break
            others = [tensor for tensor in self.flow.nodes[reader].inputs if self._constant(tensor)]
            if len(others) != 1 or (op in ("Gelu", "HardSwish") and self._size(others[0]) != 1):
                break
            nodes = (*nodes, reader)
        return nodes

    # -- products ------------------------------------------------------------------------------------------------------

    def _product(self, name: str) -> Call:
        node = self.flow.nodes[name]
        convolution = node.op in CONVOLUTIONS
        nodes, folded = [name], set[str]()
        fused: list[str] = []
        if node.op == "MatMul":
            folded.update(self._operand_nodes(node))
            nodes += folded
        value = node.outputs[0].name
        while True:
            function = self._function_of(value)
            if function is not None and fused in ([], ["Add"]):
                nodes += function.nodes
                fused.append(function.op)
                break
            reader = self._only_reader(value)
            if reader is None or reader in self.functions:
                break
            after = self.flow.nodes[reader]
            if after.op in ACTIVATIONS and after.inputs[0].name == value:
                nodes.append(reader)
                fused.append(after.op)
                break
            if not fused and self._folds(after, value, convolution):
                folded.add(reader)
            elif not (after.op == "Add" and not fused and self._added(after, value, convolution, fused)):
                break
            nodes.append(reader)
            value = after.outputs[0].name
        return Call(self._ordered(nodes), name, _label(node), tuple(fused), frozenset(folded))

    def _function_of(self, value: str) -> Call | None:
        """The activation, of several nodes, that is all that reads ``value``."""
        readers = self._readers(value)
        call = self.functions.get(readers[0]) if readers and value not in self.kept else None
        if call is None or call.op not in ACTIVATIONS or not set(readers) <= set(call.nodes):
            return None
        return None if call.nodes[0] in self.taken else call

    def _folds(self, node: gs.Node, value: str, convolution: bool) -> bool:
        """Whether a node behind a product goes into the product's weights."""
        others = [tensor for tensor in node.inputs if tensor.name != value]
        if not others or not all(self._constant(tensor) for tensor in others):
            return False
        if node.op == "BatchNormalization":
            return convolution or len(self._shape(value) or ()) == 2
        if node.op == "Div" and node.inputs[0].name != value:
            return False
        return node.op in ("Mul", "Div") and self._per_channel(others[0], value, convolution)

    def _added(self, node: gs.Node, value: str, convolution: bool, fused: list[str]) -> bool:
        """Whether a sum behind a product is made with it: a constant, or (convolutions) a residual of that shape."""
        others = [tensor for tensor in node.inputs if tensor.name != value]
        if len(others) != 1:
            return False
        if self._constant(others[0]):
            return self._per_channel(others[0], value, convolution)
        shape = self._shape(value)
        if not convolution or shape is None or self._shape(others[0].name) != shape:
            return False
        fused.append("Add")
        return True

    def _per_channel(self, constant: gs.Tensor, value: str, convolution: bool) -> bool:
        """One number, or one for each output channel (axis 1 of a convolution, the last one of a matrix product)."""
        shape = constant.shape if isinstance(constant, gs.Constant) else self._shape(constant.name)
        out = self._shape(value)
        if shape is None or out is None:
            return False
        axis = len(out) - 1 if convolution else 1  # counted from the end
        wide = [place for place, dim in enumerate(reversed(tuple(shape)), 1) if dim != 1]
        return wide in ([], [axis])

    def _operand_nodes(self, node: gs.Node) -> list[str]:
        """Scalar factors and swapped last axes of a matrix product's operands."""
        found: list[str] = []
        for tensor in node.inputs:
            value = tensor.name
            while self._only_reader(value) is not None and value in self.flow.producer:
                maker = self.flow.producer[value]
                before = self.flow.nodes[maker]
                if maker in self.taken or maker in self.functions or not self._turns(before):
                    break
                found.append(maker)
                value = self.flow.data_inputs(maker)[0]
        return found

    def _turns(self, node: gs.Node) -> bool:
        if node.op == "Transpose":
            perm = list(node.attrs.get("perm", ()))
            return len(perm) > 1 and perm == [*range(len(perm) - 2), len(perm) - 1, len(perm) - 2]
        if node.op not in ("Mul", "Div") or (node.op == "Div" and not self._constant(node.inputs[1])):
            return False
        constants = [tensor for tensor in node.inputs if self._constant(tensor)]
        return len(constants) == 1 and self._size(constants[0]) == 1


def _twice(node: gs.Node) -> bool:
    """Whether a node reads the same value twice (x * x)."""
    return len(node.inputs) == 2 and node.inputs[0].name == node.inputs[1].name


def _label(node: gs.Node) -> str:
    """Operator, with its domain in front where that is not ONNX's own."""
    return node.op if node.domain in (None, "", "ai.onnx") else f"{node.domain}.{node.op}"


def _function(ops: Sequence[str]) -> str | None:
    """Name of the function that these operators compute between one value and one result, if it is a known one."""
    found = set(ops)
    root = bool(found & {"Sqrt", "Pow", "Reciprocal"})
    if {"ReduceMean", "Sub"} <= found and root:
        return "LayerNormalization"
    if "ReduceMean" in found and root:
        return "RMSNormalization"
    if {"ReduceSum", "Exp", "Div"} <= found:
        return "Softmax"
    if found & _REDUCTIONS:
        return None
    if "Erf" in found or {"Tanh", "Add", "Pow"} <= found or (ops.count("Mul") > 3 and "Tanh" in found):
        return "Gelu"
    if "Softplus" in found and "Tanh" in found:
        return "Mish"
    if found <= {"Sigmoid", "Mul"} and "Sigmoid" in found:
        return "Swish"
    if found <= {"HardSigmoid", "Mul"} and "HardSigmoid" in found:
        return "HardSwish"
    if {"Add", "Clip", "Mul"} <= found and found <= {"Add", "Clip", "Mul", "Div"}:
        return "HardSwish"
    return None
