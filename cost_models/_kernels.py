"""Kernels: what a runtime executes as one call, with the sizes that its time depends on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_graphsurgeon as gs

from eexform.cost_models._fusion import Call, calls
from eexform.errors import GraphError
from eexform.ir.arithmetic import Bindings, has_rule, node_macs, sizes
from eexform.ir.elements import dtype_of
from eexform.ir.flops import node_flops
from eexform.ir.graph import Graph

Class = Literal["conv", "depthwise", "matmul", "elementwise"]


@dataclass(frozen=True)
class Kernel:
    """One call of a runtime, for one sample.

    Attributes:
        name: the node whose output it makes; where nodes are fused, the last one.
        nodes: every node of the graph that it computes, in topological order.
        op: what is called, such as ``Conv``; what belongs to a domain of the runtime's own has it in front
            (``nchwc.Conv``).
        kind: the class of work, for peaks and efficiencies. What is neither convolution nor product is ``elementwise``.
        variant: everything that sizes cannot be interpolated across: window, strides, fused activation, element type.
        sizes: what time grows with, in an order that is the same for all kernels of the same op and variant.
        macs: multiply-accumulates.
        flops: floating-point operations beside them (activations, normalisation, sums).
        read_bytes: activations read.
        write_bytes: activations written.
        weight_bytes: parameters read.
        dtype: element type of the output, as numpy calls it.
        channels: input channels per group and output channels, where the kernel has them, else ``None``.
        arithmetic: element type that is computed with, where the output's does not tell: an index, a truth value, or
            the wide sum of narrow integers; else empty.
    """

    name: str
    nodes: tuple[str, ...]
    op: str
    kind: Class
    variant: str
    sizes: tuple[int, ...]
    macs: int
    flops: int
    read_bytes: int
    write_bytes: int
    weight_bytes: int
    dtype: str
    channels: tuple[int, int] | None = None
    arithmetic: str = ""


def kernels(graph: Graph, bindings: Bindings | None = None) -> tuple[Kernel, ...]:
    """What a runtime calls to run a graph on one sample, fused as in :mod:`eexform.cost_models._fusion`.

    Every node is in exactly one kernel, but for those of :func:`free_nodes`; ``macs`` add up to those of the model
    ``macs``. A node whose operator has no rule is a kernel without operations, and without bytes where its types are
    not known: check with :func:`eexform.ir.arithmetic.has_rule`.

    Args:
        graph: the graph, not lowered.
        bindings: sizes of symbolic dimensions other than the batch.

    Returns:
        In the order of execution. A kernel reads what kernels before it made.

    Raises:
        GraphError: a shape is not known, or holds a symbol without a binding.
    """
    return tuple(_Reader(graph, bindings).kernel(call) for call in calls(graph)[0])


def free_nodes(graph: Graph) -> tuple[str, ...]:
    """Nodes that cost nothing: shape arithmetic, folded constants, and views (``Reshape``, ``Identity``, ...)."""
    return calls(graph)[1]


_SEVERAL = frozenset({"Softmax", "LogSoftmax", "Hardmax", "LayerNormalization", "RMSNormalization"})
_PICKS = frozenset({"Gather", "GatherElements", "GatherND", "Slice"})
_POOLS = frozenset({"AveragePool", "LpPool", "MaxPool"})
_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
_WEIGHT_OF = {
    "Conv": 1, "ConvInteger": 1, "DeformConv": 1, "FusedConv": 1, "NhwcFusedConv": 1, "QLinearConv": 3
}  # fmt: skip
_OPERANDS = "Add And Div Equal Greater Less Max Min Mod Mul Or Pow PRelu Sub Sum Where Xor"
_BINARY = frozenset(_OPERANDS.split())

Facts = tuple[Class, str, tuple[int, ...], tuple[int, int] | None]
"""Kind, variant, sizes, channels."""


class _Reader:
    """Sizes and bytes of a graph's calls."""

    def __init__(self, graph: Graph, bindings: Bindings | None) -> None:
        self.graph, self.flow, self.types = graph, graph.flow, graph.types
        self.bindings = bindings

    def kernel(self, call: Call) -> Kernel:
        nodes = [self.flow.nodes[name] for name in call.nodes]
        macs = sum(node_macs(node, self.types, self.bindings) or 0 for node in nodes)
        rest = [node for node in nodes if node.name not in call.folded]
        flops = sum((node_flops(node, self.types, self.bindings) or 0) for node in rest)
        dtype = self._dtype(nodes[-1].outputs[0])
        kind, variant, sized, channels = self._facts(call, macs)
        read, weights = self._read(call)
        return Kernel(
            name=call.nodes[-1],
            nodes=call.nodes,
            op=call.op,
            kind=kind,
            variant=" ".join(part for part in (variant, *call.fused, dtype) if part),
            sizes=sized,
            macs=macs,
            flops=max(0, flops - 2 * macs),
            read_bytes=read,
            write_bytes=sum(self._bytes(tensor, nodes[-1]) for tensor in nodes[-1].outputs if tensor.name),
            weight_bytes=weights,
            dtype=dtype,
            channels=channels,
            arithmetic=self._arithmetic(self.flow.nodes[call.main], dtype),
        )

    def _dtype(self, tensor: gs.Tensor) -> str:
        """Element type of a value, as numpy calls it; empty where it is not known."""
        if isinstance(tensor, gs.Constant):
            found = dtype_of(tensor.dtype)
        else:
            kind = self.types.get(tensor.name)
            found = None if kind is None else kind.dtype
        return "" if found is None else str(found)

    def _arithmetic(self, node: gs.Node, made: str) -> str:
        """The first operand's element type, where the result is neither floating-point nor of 8 bits."""
        if not made or made.startswith(("float", "bfloat")) or made in ("int8", "uint8") or not node.inputs:
            return ""
        return self._dtype(node.inputs[0])

    # -- bytes ---------------------------------------------------------------------------------------------------------

    def _read(self, call: Call) -> tuple[int, int]:
        """Bytes of activations and of parameters that a call reads; each value once."""
        made = {tensor.name for name in call.nodes for tensor in self.flow.nodes[name].outputs}
        activations: dict[str, int] = {}
        weights: dict[str, int] = {}
        for name in call.nodes:
            node = self.flow.nodes[name]
            for place, tensor in enumerate(node.inputs):
                constant = not tensor.is_empty() and not self.flow.is_data(tensor.name)
                if tensor.is_empty() or tensor.name in made or (constant and name in call.folded):
                    continue
                size = self._bytes(tensor, node)
                if place == 0 and node.op in _PICKS:  # the rows that are picked, not all there are
                    size = min(size, self._bytes(node.outputs[0], node))
                (weights if constant else activations)[tensor.name] = size
            for value in self.flow.data_inputs(name):  # what sub-graphs take from outside
                if value not in made and value not in activations:
                    activations[value] = self._bytes(self.graph.tensor(value), node)
        return sum(activations.values()), sum(weights.values())

    def _bytes(self, tensor: gs.Tensor, node: gs.Node) -> int:
        """Bytes of a value; 0 where nothing is known about it and the operator is one without a rule."""
        if isinstance(tensor, gs.Constant):
            return math.prod(tensor.shape) * tensor.dtype.itemsize
        found = self.types.get(tensor.name)
        if found is None or found.shape is None or found.dtype is None:
            if not has_rule(node) or not self.flow.is_data(tensor.name):
                return 0
            raise GraphError(
                f"value {tensor.name!r}: its shape or element type is not known, so bytes cannot be counted"
            )
        return math.prod(sizes(tensor, self.types, self.bindings)) * found.dtype.itemsize

    # -- sizes ---------------------------------------------------------------------------------------------------------

    def _facts(self, call: Call, macs: int) -> Facts:
        node = self.flow.nodes[call.main]
        if not has_rule(node):
            return "elementwise", "", (), None
        op = node.op
        if op in _WEIGHT_OF or op == "ConvTranspose":
            return self._convolution(node)
        if op in _RECURRENT:
            steps, weight = self._input(node, 0), self._input(node, 1)
            return "matmul", f"d{weight[0]}", (steps[0], steps[2], self._input(node, 2)[2]), None
        if macs:
            return self._product(node, macs)
        describe: Callable[[gs.Node, str], tuple[str, tuple[int, ...]]] = self._elementwise
        if op in _POOLS:
            describe = self._pool
        elif call.op in _SEVERAL:
            describe = self._rows
        elif op.startswith("Reduce") or op.startswith("Global"):
            describe = self._reduction
        elif op == "Transpose":
            describe = self._transpose
        variant, sized = describe(node, call.op)
        return "elementwise", variant, sized, None

    def _input(self, node: gs.Node, place: int) -> tuple[int, ...]:
        return sizes(node.inputs[place], self.types, self.bindings)

    def _output(self, node: gs.Node) -> tuple[int, ...]:
        return sizes(node.outputs[0], self.types, self.bindings)

    def _convolution(self, node: gs.Node) -> Facts:
        group, out = int(node.attrs.get("group", 1)), self._output(node)
        weight = self._input(node, _WEIGHT_OF.get(node.op, 1))
        window = weight[2:]
        if node.op == "ConvTranspose":  # [C_in, C_out / group, k...]
            per_group, made = weight[0] // group, weight[1] * group
        else:  # [C_out, C_in / group, k...]
            per_group, made = weight[1], weight[0]
        space = out[1:-1] if node.op == "NhwcFusedConv" else out[2:]
        ones = (1,) * len(window)
        variant = f"k{_by(window)} s{_by(node.attrs.get('strides', ones))} d{_by(node.attrs.get('dilations', ones))}"
        if group > 1 and per_group == 1 and made == group:
            return "depthwise", variant, (made, *space), (1, made)
        if group > 1:
            variant += f" g{group}"
        kind: Class = "depthwise" if group > 1 and per_group == 1 else "conv"
        return kind, variant, (per_group * group, made, *space), (per_group, made)

    def _product(self, node: gs.Node, macs: int) -> Facts:
        """Rows x contracted x columns, with the number of such products in front where both operands are computed."""
        out = self._output(node)
        contracted = macs // max(1, math.prod(out))
        if node.op not in ("Gemm", "MatMul") or not out:
            return "matmul", "", (math.prod(out), contracted), None
        columns = out[-1]
        if not self.flow.is_data(node.inputs[1].name):
            return "matmul", "weights", (math.prod(out[:-1]), contracted, columns), (contracted, columns)
        rows = out[-2] if len(out) > 1 else 1
        return "matmul", "values", (math.prod(out[:-2]), rows, contracted, columns), None

    def _pool(self, node: gs.Node, op: str) -> tuple[str, tuple[int, ...]]:
        window = node.attrs.get("kernel_shape", ())
        variant = f"k{_by(window)} s{_by(node.attrs.get('strides', (1,) * len(window)))}"
        return variant, self._output(node)[1:]

    def _rows(self, node: gs.Node, op: str) -> tuple[str, tuple[int, ...]]:
        """Rows and their length, for what looks at a whole row to make one number of it."""
        shape = self._output(node)
        axis = int(node.attrs.get("axis", -1)) % max(1, len(shape))
        if op in ("Softmax", "LogSoftmax", "Hardmax"):
            length = shape[axis] if shape else 1
        else:
            length = math.prod(shape[axis:])
        variant = "" if math.prod(shape[axis + 1 :]) == 1 or op.endswith("Normalization") else "strided"
        return variant, (math.prod(shape) // max(1, length), length)

    def _reduction(self, node: gs.Node, op: str) -> tuple[str, tuple[int, ...]]:
        """Numbers made, and how many each is made from."""
        before, after = math.prod(self._input(node, 0)), math.prod(self._output(node))
        return "", (after, before // max(1, after))

    def _transpose(self, node: gs.Node, op: str) -> tuple[str, tuple[int, ...]]:
        """The order of the axes with those of size 1 left out, neighbours that stay together as one; sizes of these."""
        shape = self._input(node, 0)
        perm = [axis for axis in node.attrs.get("perm", range(len(shape))[::-1]) if shape[axis] != 1]
        runs: list[list[int]] = []
        for axis in perm:
            if runs and all(shape[between] == 1 for between in range(runs[-1][-1] + 1, axis)) and axis > runs[-1][-1]:
                runs[-1].append(axis)
            else:
                runs.append([axis])
        order = sorted(range(len(runs)), key=lambda run: runs[run][0])
        rank = {run: place for place, run in enumerate(order)}
        sized = tuple(math.prod(shape[axis] for axis in runs[run]) for run in order)
        return "perm" + ",".join(str(rank[run]) for run in range(len(runs))), sized or (1,)

    def _elementwise(self, node: gs.Node, op: str) -> tuple[str, tuple[int, ...]]:
        """Elements made; whether operands are repeated to that shape."""
        shape = self._output(node)
        variant = ""
        if node.op in _BINARY:
            others = [self._input(node, place) for place in range(len(node.inputs))]
            small = [other for other in others if math.prod(other) < math.prod(shape)]
            variant = (
                "scalar" if small and all(math.prod(other) == 1 for other in small) else "broadcast" if small else ""
            )
        elif node.op in ("Concat", "Split"):
            variant = f"x{len(node.inputs) if node.op == 'Concat' else len(node.outputs)}"
            shape = shape if node.op == "Concat" else self._input(node, 0)
        return variant, (math.prod(shape),)


def _by(numbers: Sequence[int]) -> str:
    return "x".join(str(int(number)) for number in numbers)
