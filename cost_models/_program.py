"""From a graph to the steps that a runtime executes and the buffers that they read and write.

Shape arithmetic, folded constants and views (``Reshape``, ``Flatten``, ``Squeeze``, ``Unsqueeze``, ``Identity``,
``Dropout`` at inference) are no steps: a view lies in the buffer of what it shows. Fused kernels keep what is between
their nodes in registers (:mod:`eexform.cost_models._fusion` says what is fused); what stands between
``DequantizeLinear`` and ``QuantizeLinear`` runs on integers, so its floats are never stored.

Runtimes differ in what they write over an operand that nobody needs any more:

- ``activations``: onnxruntime on the CPU. Its kernels say ``MayInplace`` where they can; version 1.31, held to it on
  large values, does so for ``Relu``, ``Clip``, ``Softmax`` and the like, but not for sums and products of two values.
- ``elementwise``: LiteRT (TensorFlow Lite) and compilers, where arithmetic of two values shares a buffer, too.
- ``none``: TensorFlow Lite Micro, where every result has a place of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import onnx_graphsurgeon as gs

from eexform.cost_models._fusion import CONVOLUTIONS, VIEWS, calls
from eexform.cost_models._lifetimes import Buffer, Program, Step
from eexform.ir.arithmetic import size_of
from eexform.ir.elements import is_float
from eexform.ir.graph import BATCH, Graph
from eexform.ir.inference import split_dim

ACTIVATIONS = frozenset({
    "Celu", "Clip", "Elu", "HardSigmoid", "LeakyRelu", "LogSoftmax", "Relu", "Selu", "Shrink", "Sigmoid", "Softmax",
    "Softplus", "Softsign", "Tanh", "ThresholdedRelu",
})  # fmt: skip
"""Operators that onnxruntime runs in place on the CPU."""

ELEMENTWISE = ACTIVATIONS | {
    "Abs", "Add", "And", "Ceil", "Cos", "Div", "Erf", "Exp", "Floor", "Gelu", "HardSwish", "Log", "Max", "Mean", "Min",
    "Mish", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal", "Round", "Sign", "Sin", "Sqrt", "Sub", "Sum",
    "Swish", "Where", "Xor",
}  # fmt: skip
"""Those, and arithmetic that needs the same element of every operand only."""

OVERWRITING: Mapping[str, frozenset[str]] = {
    "none": frozenset(),
    "activations": ACTIVATIONS,
    "elementwise": ELEMENTWISE,
}

_SIZES = frozenset({"Shape", "Size"})


@dataclass(frozen=True)
class Storage:
    """How a runtime stores values.

    Attributes:
        bindings: sizes of symbolic dimensions other than the batch.
        batch: samples per call.
        inputs: the graph's inputs lie in the same memory; otherwise their owner keeps them, and nobody writes there.
        fused: nodes are fused to kernels.
        residual: a convolution with a residual sum behind it is one kernel and writes over the other operand.
        inplace: operators that may write over an operand, see above.
        alignment: the size of every buffer is rounded up to a multiple of so many bytes.
        float_bytes: bytes of a floating-point number; ``None``: as the graph has it.
    """

    bindings: Mapping[str, int] = field(default_factory=dict)
    batch: int = 1
    inputs: bool = True
    fused: bool = True
    residual: bool = False
    inplace: str = "activations"
    alignment: int = 64
    float_bytes: int | None = None

    def aligned(self, size: int) -> int:
        return -(-size // self.alignment) * self.alignment


def read_program(graph: Graph, storage: Storage) -> Program:
    """The steps of a graph. With exits, each head runs as soon as its site is there, as in the lowered network.

    Raises:
        GraphError: a value's shape holds a symbol without a binding.
    """
    return _Reader(graph, storage).program()


@dataclass(frozen=True)
class _Kernel:
    """Nodes of one step, and the value that its result may be written over beside those that its operator allows."""

    nodes: tuple[str, ...]
    over: str = ""

    @property
    def result(self) -> str:
        """The node that makes the result."""
        return self.nodes[-1]


class _Reader:
    def __init__(self, graph: Graph, storage: Storage) -> None:
        self.graph, self.storage, self.flow = graph, storage, graph.flow
        self.results = frozenset(graph.outputs)
        self.stage = _stages(graph)
        self.shown = self._views()
        self.views = {self.flow.producer[view] for view in self.shown}

    def program(self) -> Program:
        kernels = self._kernels()
        if self.storage.fused:
            kernels = self._integer_kernels(kernels)
        kernels.sort(key=lambda kernel: (self.stage[kernel.result], self.flow.index(kernel.result)))
        reads = [self._reads(kernel) for kernel in kernels]
        writes = [self._writes(kernel) for kernel in kernels]
        fed = [value for value in self.flow.inputs if self._counted(value)]
        values: dict[str, list[str]] = {value: [value] for value in chain(fed, *writes)}
        for view in self.shown:
            values[self._root(view)].append(view)
        number = {value: i for i, value in enumerate(values)}
        lent = frozenset() if self.storage.inputs else frozenset(fed)
        buffers = [
            Buffer(
                tuple(names),
                0 if value in lent else self._bytes(value) or 0,
                fed=value in fed,
                held=not self.results.isdisjoint(names),
            )
            for value, names in values.items()
        ]
        steps = [
            Step(
                kernel.result,
                tuple(number[value] for value in read),
                tuple(number[value] for value in made),
                tuple(number[value] for value in self._over(kernel, made) if value not in lent),
                self.stage[kernel.result],
            )
            for kernel, read, made in zip(kernels, reads, writes, strict=True)
        ]
        return Program(tuple(steps), tuple(buffers), self._unknown(kernels, fed, writes))

    # -- kernels -------------------------------------------------------------------------------------------------------

    def _views(self) -> dict[str, str]:
        """View -> the value that it shows."""
        flow = self.flow
        found: dict[str, str] = {}
        for name in flow.topological:
            node = flow.nodes[name]
            if node.op not in VIEWS or name not in flow.needed or name in flow.shape_nodes:
                continue
            view, value = node.outputs[0].name, node.inputs[0].name
            source = value
            while source in found:
                source = found[source]
            copied = view in self.results and source in flow.inputs  # a result of its own, not the caller's input
            mask = any(t.name in self.results or flow.consumers.get(t.name) for t in node.outputs[1:])
            if not copied and not mask and self._counted(value):
                found[view] = value
        return found

    def _kernels(self) -> list[_Kernel]:
        flow = self.flow
        fused = calls(self.graph)[0] if self.storage.fused else ()
        found = [kernel for call in fused if call.nodes[-1] in flow.needed for kernel in self._of_call(call.nodes)]
        taken = {name for kernel in found for name in kernel.nodes} | self.views
        return found + [
            _Kernel((name,))
            for name in flow.topological
            if name in flow.needed and name not in taken and self._runs(name)
        ]

    def _runs(self, name: str) -> bool:
        """Data nodes, and shape nodes that make rows of samples (a class token, repeated)."""
        made = self.flow.nodes[name].outputs
        return name not in self.flow.shape_nodes or any(t.name and self._counted(t.name) for t in made)

    def _of_call(self, nodes: tuple[str, ...]) -> list[_Kernel]:
        """A fused call; a convolution and the residual sum behind it (with its activation) stay apart unless asked."""
        made = {t.name for name in nodes for t in self.flow.nodes[name].outputs}
        convolution = any(self.flow.nodes[name].op in CONVOLUTIONS for name in nodes)
        for place, name in enumerate(nodes):
            others = [value for value in self.flow.data_inputs(name) if value not in made]
            if convolution and place and self.flow.nodes[name].op == "Add" and len(others) == 1:
                if self.storage.residual:
                    return [_Kernel(nodes, over=others[0])]
                return [_Kernel(nodes[:place]), _Kernel(nodes[place:])]
        return [_Kernel(nodes)]

    def _integer_kernels(self, kernels: list[_Kernel]) -> list[_Kernel]:
        """What stands between ``DequantizeLinear`` and ``QuantizeLinear`` runs on integers: no floats are stored."""
        flow = self.flow
        of = {name: kernel for kernel in kernels for name in kernel.nodes}
        for name in [name for name in of if flow.nodes[name].op == "QuantizeLinear"]:
            value = flow.nodes[name].inputs[0].name
            maker = of.get(flow.producer.get(value, ""))
            if maker is None or value in self.results or self._readers(value) != (name,):
                continue
            sources = {flow.producer.get(read, "") for member in maker.nodes for read in flow.data_inputs(member)}
            if any(source in of and flow.nodes[source].op == "DequantizeLinear" for source in sources):
                merged = _Kernel((*maker.nodes, name), maker.over)
                of.update(dict.fromkeys(merged.nodes, merged))
        for name in [name for name in of if flow.nodes[name].op == "DequantizeLinear"]:
            value, source = flow.nodes[name].outputs[0].name, flow.nodes[name].inputs[0].name
            readers = self._readers(value)
            integers = readers and all(
                reader in of and flow.nodes[of[reader].result].op == "QuantizeLinear" for reader in readers
            )
            if integers and value not in self.results and self._counted(source):
                self.shown[value] = source
                del of[name]
        return list(dict.fromkeys(of.values()))

    # -- values --------------------------------------------------------------------------------------------------------

    def _root(self, value: str) -> str:
        while value in self.shown:
            value = self.shown[value]
        return value

    def _counted(self, value: str) -> bool:
        """Data, and what carries rows of samples although no sample can change it."""
        kind = self.graph.types.get(value)
        return (value in self.flow.producer or value in self.flow.inputs) and (
            self.flow.is_data(value) or (kind is not None and kind.batch_axis is not None)
        )

    def _readers(self, value: str) -> tuple[str, ...]:
        """Nodes that need what the value holds, views of it among them."""
        return tuple(
            name
            for name in self.flow.consumers.get(value, ())
            if name in self.flow.needed and self.flow.nodes[name].op not in _SIZES and self._runs(name)
        )

    def _reads(self, kernel: _Kernel) -> list[str]:
        made = {t.name for name in kernel.nodes for t in self.flow.nodes[name].outputs}
        read = (
            value
            for name in kernel.nodes
            if self.flow.nodes[name].op not in _SIZES
            for value in self.flow.reads(name)
            if value not in made and self._counted(value)
        )
        return list(dict.fromkeys(map(self._root, read)))

    def _writes(self, kernel: _Kernel) -> list[str]:
        """The result first; what only the kernel itself reads is never stored."""
        found = []
        for name in reversed(kernel.nodes):
            for tensor in self.flow.nodes[name].outputs:
                if not tensor.name or not self._counted(tensor.name):
                    continue
                inner = self._readers(tensor.name)
                if not inner or tensor.name in self.results or not set(inner) <= set(kernel.nodes):
                    found.append(tensor.name)
        return found

    def _over(self, kernel: _Kernel, made: Sequence[str]) -> list[str]:
        """Operands that the result may be written over: as large, and read once."""
        if self.storage.inplace == "none" or not made:
            return []
        node = self.flow.nodes[kernel.nodes[0]]
        names: list[str] = []
        if kernel.over and sum(kernel.over in self.flow.data_inputs(name) for name in kernel.nodes) == 1:
            names = [kernel.over]  # the sum's operand is not the convolution's, too
        if len(kernel.nodes) == 1 and node.op in OVERWRITING[self.storage.inplace]:
            operands = [t.name for t in node.inputs if t.name]
            names = [value for value in operands if operands.count(value) == 1 and self._counted(value)]
        result = self.graph.types.get(made[0])
        found = []
        for value in names:
            kind = self.graph.types.get(value)
            same = kind is not None and result is not None and (kind.shape, kind.dtype) == (result.shape, result.dtype)
            if same and self._bytes(value) is not None:
                found.append(self._root(value))
        return found

    def _bytes(self, value: str) -> int | None:
        """Bytes of a value, rounded up; ``None`` where its type does not say."""
        kind = self.graph.types.get(value)
        if kind is None or kind.shape is None or kind.dtype is None or kind.dtype.kind in "OSU" or None in kind.shape:
            return None
        elements = math.prod(size_of(dim, value, self.storage.bindings) for dim in kind.shape)
        for dim in kind.shape:
            if isinstance(dim, str) and split_dim(dim)[1] == BATCH:
                elements *= self.storage.batch
        width = self.storage.float_bytes if is_float(kind.dtype) else None
        return self.storage.aligned(elements * (kind.dtype.itemsize if width is None else width))

    def _unknown(
        self, kernels: Sequence[_Kernel], fed: Sequence[str], writes: Sequence[Sequence[str]]
    ) -> tuple[tuple[str, str], ...]:
        """Values without a size, and what sub-graphs hold inside."""
        found = [(value, "input") for value in fed if self._bytes(value) is None]
        for kernel, made in zip(kernels, writes, strict=True):
            nodes = [self.flow.nodes[name] for name in kernel.nodes]
            found += [
                (node.name, node.op) for node in nodes if any(isinstance(a, gs.Graph) for a in node.attrs.values())
            ]
            if any(self._bytes(value) is None for value in made):
                found.append((nodes[-1].name, nodes[-1].op))
        return tuple(dict.fromkeys(found))


def _stages(graph: Graph) -> dict[str, int]:
    """Node -> when it runs: 2i up to the site of exit i, 2i + 1 in its head, 2E behind the last of E exits."""
    flow = graph.flow
    found: dict[str, int] = {}
    for place, item in enumerate(graph.exits):
        for offset, values in enumerate(((item.site,), item.values)):
            for name in flow.ancestors(values):
                found.setdefault(name, 2 * place + offset)
    return {name: found.get(name, 2 * len(graph.exits)) for name in flow.nodes}
