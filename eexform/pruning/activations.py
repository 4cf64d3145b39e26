"""Activation functions in a graph: as one operator, or as the several nodes that exporters write for one.

``x * clip(x + 3, 0, 6) / 6`` is a hard-swish however its factors are ordered, and a GELU may be five nodes around an
``Erf``. Instead of a pattern for each spelling, the nodes between one value and another are evaluated on a grid, and
the numbers are compared with those of the functions known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from eexform.ir.graph import Graph

Function = Callable[[np.ndarray], np.ndarray]

TOLERANCE = 2e-3
"""Largest difference on the grid at which two functions count as one: GELU by ``Erf`` and by ``Tanh`` differ less."""

_GRID = np.linspace(-9.0, 9.0, 361)  # holds 0 and the kinks at -3, 3 and 6
_MOST = 12  # nodes of one activation


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, x)


def _erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _hard_sigmoid(x: np.ndarray) -> np.ndarray:
    return np.clip(x / 6.0 + 0.5, 0.0, 1.0)


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0)))


FUNCTIONS: Mapping[str, Function] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "relu6": lambda x: np.clip(x, 0.0, 6.0),
    "hard_sigmoid": _hard_sigmoid,
    "hard_swish": lambda x: x * _hard_sigmoid(x),
    "hard_tanh": lambda x: np.clip(x, -1.0, 1.0),
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "gelu": _gelu,
    "tanh": np.tanh,
    "softplus": _softplus,
    "mish": lambda x: x * np.tanh(_softplus(x)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0.0))),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
}
"""The activations that are known, each as a function of one number."""


@dataclass(frozen=True)
class Activation:
    """An activation in a graph.

    Attributes:
        function: its name in :data:`FUNCTIONS`.
        source: the value that it is applied to.
        result: the value that it gives.
        nodes: the nodes that compute it, in topological order; nobody else reads what those before the last compute.
        ops: their operators.
        apply: what the nodes compute, element by element; the named function, or the same one with other parameters.
    """

    function: str
    source: str
    result: str
    nodes: tuple[str, ...]
    ops: frozenset[str]
    apply: Function = field(repr=False, compare=False)


def find_activations(graph: Graph, wanted: AbstractSet[str]) -> tuple[Activation, ...]:
    """The activations of ``graph`` that are among ``wanted``, in topological order, no two sharing a node.

    Where one is part of another (the sigmoid of a SiLU) the larger one counts.

    Args:
        graph: the graph.
        wanted: names of :data:`FUNCTIONS`.
    """
    return tuple(sorted(_Finder(graph, wanted).find(), key=lambda found: graph.flow.index(found.nodes[-1])))


def operator(node: gs.Node) -> str:
    """The operator's name, its domain in front where it is not ONNX's own."""
    return node.op if node.domain in (None, "", "ai.onnx") else f"{node.domain}::{node.op}"


class _Finder:
    def __init__(self, graph: Graph, wanted: AbstractSet[str]) -> None:
        self.flow = graph.flow
        self.types = graph.types
        self.results = set(graph.outputs) | {item.site for item in graph.exits}
        self.numbers = {name: FUNCTIONS[name](_GRID) for name in FUNCTIONS if name in wanted}

    def find(self) -> Iterator[Activation]:
        taken: set[str] = set()
        for name in reversed(self.flow.topological):
            if name in taken or not self._follows(name):
                continue
            found = None
            for nodes, source in self._regions(name, taken):
                names = tuple(sorted(nodes, key=self.flow.index))
                function = self._named(names, source)
                if function is not None:
                    ops = frozenset(operator(self.flow.nodes[each]) for each in names)
                    result = self.flow.nodes[name].outputs[0].name
                    found = Activation(function, source, result, names, ops, partial(self._apply, names, source))
            if found is not None:
                taken.update(found.nodes)
                yield found

    def _follows(self, name: str) -> bool:
        """Whether the node is element-wise and of one output, and computes from the samples."""
        node = self.flow.nodes[name]
        return operator(node) in _RULES and len(node.outputs) == 1 and name not in self.flow.shape_nodes

    def _regions(self, last: str, taken: AbstractSet[str]) -> Iterator[tuple[set[str], str]]:
        """Sets of nodes that end in ``last`` and read one value, growing backwards; with that value."""
        nodes = {last}
        while True:
            reads = {value for name in nodes for value in self.flow.data_inputs(name)}
            reads -= {tensor.name for name in nodes for tensor in self.flow.nodes[name].outputs}
            if len(reads) == 1:
                yield nodes, next(iter(reads))
            makers = [(self.flow.index(self.flow.producer[value]), value) for value in reads if self._made(value)]
            if not makers or len(nodes) == _MOST:
                return
            _, value = max(makers)
            name = self.flow.producer[value]
            inside = set(self.flow.consumers[value]) <= nodes and value not in self.results
            if not inside or name in taken or not self._follows(name):
                return
            nodes = nodes | {name}

    def _made(self, value: str) -> bool:
        return value in self.flow.producer

    def _named(self, nodes: Sequence[str], source: str) -> str | None:
        """The function that the nodes compute of ``source``; ``None`` where it is not one of those wanted."""
        before, after = (self.types[value] for value in (source, self.flow.nodes[nodes[-1]].outputs[0].name))
        if before.shape is None or before.shape != after.shape or not self._plain(nodes):
            return None  # a constant with more axes, or with a number per channel
        found = self._apply(nodes, source, _GRID)
        fits = (name for name, numbers in self.numbers.items() if np.abs(found - numbers).max() <= TOLERANCE)
        named = _BY_OPERATOR.get(operator(self.flow.nodes[nodes[0]])) if len(nodes) == 1 else None
        return next(fits, named if named in self.numbers else None)

    def _plain(self, nodes: Sequence[str]) -> bool:
        """Whether every operand is data, left out, or one number."""
        operands = (tensor for name in nodes for tensor in self.flow.nodes[name].inputs)
        return all(
            tensor.values.size == 1 if isinstance(tensor, gs.Constant) else tensor.is_empty() or self._data(tensor)
            for tensor in operands
        )

    def _data(self, tensor: gs.Tensor) -> bool:
        return self.flow.is_data(tensor.name)

    def _apply(self, nodes: Sequence[str], source: str, x: np.ndarray) -> np.ndarray:
        """What ``nodes``, in order, compute of the numbers ``x``."""
        known: dict[str, np.ndarray] = {source: x}
        for name in nodes:
            node = self.flow.nodes[name]
            operands = [
                tensor.values.astype(np.float64).reshape(())
                if isinstance(tensor, gs.Constant)
                else known.get(tensor.name)
                for tensor in node.inputs
            ]
            with np.errstate(all="ignore"):
                known[node.outputs[0].name] = _RULES[operator(node)](node, operands)
        return known[self.flow.nodes[nodes[-1]].outputs[0].name]


_Operands = list[Any]
_Rule = Callable[[gs.Node, _Operands], np.ndarray]


def _unary(function: Function) -> _Rule:
    return lambda node, operands: np.asarray(function(operands[0]))


def _fold(function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> _Rule:
    def rule(node: gs.Node, operands: _Operands) -> np.ndarray:
        total = operands[0]
        for operand in operands[1:]:
            total = function(total, operand)
        return np.asarray(total)

    return rule


def _clip(node: gs.Node, operands: _Operands) -> np.ndarray:
    low, high = ([*operands[1:], None, None])[:2]
    return np.clip(operands[0], -np.inf if low is None else low, np.inf if high is None else high)


def _hard_sigmoid_node(node: gs.Node, operands: _Operands) -> np.ndarray:
    slope, middle = float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5))
    return np.clip(slope * operands[0] + middle, 0.0, 1.0)


def _elu_node(node: gs.Node, operands: _Operands) -> np.ndarray:
    x = operands[0]
    return np.where(x > 0, x, float(node.attrs.get("alpha", 1.0)) * np.expm1(np.minimum(x, 0.0)))


def _leaky_node(node: gs.Node, operands: _Operands) -> np.ndarray:
    return np.where(operands[0] > 0, operands[0], float(node.attrs.get("alpha", 0.01)) * operands[0])


def _swish_node(node: gs.Node, operands: _Operands) -> np.ndarray:
    return operands[0] * _sigmoid(float(node.attrs.get("alpha", 1.0)) * operands[0])


def _quick_gelu_node(node: gs.Node, operands: _Operands) -> np.ndarray:
    return operands[0] * _sigmoid(float(node.attrs.get("alpha", 1.702)) * operands[0])


_RULES: Mapping[str, _Rule] = {
    "Add": _fold(np.add), "Sub": _fold(np.subtract), "Mul": _fold(np.multiply), "Div": _fold(np.divide),
    "Pow": _fold(np.power), "Min": _fold(np.minimum), "Max": _fold(np.maximum), "Sum": _fold(np.add),
    "Neg": _unary(np.negative), "Abs": _unary(np.abs), "Exp": _unary(np.exp), "Log": _unary(np.log),
    "Sqrt": _unary(np.sqrt), "Reciprocal": _unary(np.reciprocal), "Erf": _unary(_erf), "Tanh": _unary(np.tanh),
    "Sigmoid": _unary(_sigmoid), "Softplus": _unary(_softplus), "Relu": _unary(FUNCTIONS["relu"]),
    "HardSwish": _unary(FUNCTIONS["hard_swish"]), "Mish": _unary(FUNCTIONS["mish"]), "Gelu": _unary(_gelu),
    "com.microsoft::Gelu": _unary(_gelu), "com.microsoft::QuickGelu": _quick_gelu_node, "Swish": _swish_node,
    "Clip": _clip, "HardSigmoid": _hard_sigmoid_node, "Elu": _elu_node, "LeakyRelu": _leaky_node,
}  # fmt: skip
"""Element-wise operators on numbers, in float64; operands that are left out are ``None``."""

_BY_OPERATOR = {"LeakyRelu": "leaky_relu", "Elu": "elu", "HardSigmoid": "hard_sigmoid"}
"""What an operator is called whatever its parameters are."""
