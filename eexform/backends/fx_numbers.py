"""Shape arithmetic as Python integers instead of tensors: what decides how ``Reshape``, ``Range``, ``Slice`` work.

ONNX computes sizes with tensors: ``Shape -> Gather -> Mul -> Concat -> Reshape``. Raised literally, the module would
make tensors of sizes and read them back, which is slow and which ``torch.export`` cannot follow. Here such a chain is
walked when the module is made: what is fixed becomes a number, what is a free size an integer node of the fx graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from torch import fx

from eexform.backends.fx_tree import size_of
from eexform.errors import GraphError
from eexform.ir.evaluate import LIMIT, evaluate

if TYPE_CHECKING:
    from eexform.backends.fx import Raiser

_STANDARD = (None, "", "ai.onnx")
_MOVING = frozenset(
    (
        *("Identity", "Gather", "Concat", "Unsqueeze", "Squeeze", "Slice", "Reshape", "Expand", "Transpose"),
        *("ReduceProd", "Where", "Equal", "Add", "Sub", "Mul"),
    )
)
"""Operators whose numpy rules also work where some elements are sizes."""

_OTHERS = ("Shape", "Size", "Cast", "Div", "ConstantOfShape")


class Size:
    """An integer that is known when the module runs: a node of the fx graph; arithmetic adds nodes.

    Attributes:
        node: gives a Python integer.
        positive: it cannot be negative: a size, or a sum or product of sizes and numbers that are not negative.
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, raiser: Raiser, node: fx.Node, positive: bool = True) -> None:
        self._raiser = raiser
        self.node = node
        self.positive = positive

    def _with(self, function: Callable[..., Any], one: Any, other: Any, positive: bool) -> Size:
        plain = [item.node if isinstance(item, Size) else int(item) for item in (one, other)]
        return Size(self._raiser, self._raiser.call(function, *plain), positive)

    def __add__(self, other: Any) -> Size:
        return self._with(operator.add, self, other, self.positive and _positive(other))

    def __mul__(self, other: Any) -> Size:
        return self._with(operator.mul, self, other, self.positive and _positive(other))

    def __sub__(self, other: Any) -> Size:
        return self._with(operator.sub, self, other, False)

    def __rsub__(self, other: Any) -> Size:
        return self._with(operator.sub, other, self, False)

    __radd__, __rmul__ = __add__, __mul__

    def over(self, other: Any) -> Size:
        """The whole part of a quotient.

        Raises:
            TypeError: a number may be negative, or the divisor is not known: ONNX and Python round differently there.
        """
        if not self.positive or isinstance(other, Size) or int(other) < 1:
            raise TypeError("a quotient that is not followed")
        return self._with(operator.floordiv, self, other, True)

    def __eq__(self, other: object) -> bool:
        if self.positive and isinstance(other, int | np.integer) and other < 0:
            return False
        raise TypeError("whether a size equals another is not known before the module runs")

    def __bool__(self) -> bool:
        raise TypeError("whether a size is zero is not known before the module runs")


def numbers(raiser: Raiser, tensor: gs.Tensor) -> list[int | fx.Node] | None:
    """The elements of a value as integers and integer nodes, in order; ``None`` where it holds anything else."""
    found = _content(raiser, tensor)
    if found is None or found.dtype.kind not in "iubO":
        return None
    return [item.node if isinstance(item, Size) else int(item) for item in found.reshape(-1)]


def follows_sizes(tensor: gs.Tensor) -> bool:
    """Whether a value is computed from sizes of others and constants alone."""
    stack, seen, found = [tensor], set(), False
    while stack:
        value = stack.pop()
        if isinstance(value, gs.Constant) or value.is_empty() or value.name in seen:
            continue
        seen.add(value.name)
        if not value.inputs:
            return False
        if value.inputs[0].op in ("Shape", "Size"):
            found = True
        else:
            stack += value.inputs[0].inputs
    return found


def listed(*found: int) -> list[int]:
    """What a module gives to functions that take sizes."""
    return list(found)


def _content(raiser: Raiser, tensor: gs.Tensor) -> np.ndarray | None:
    """What a value computed from sizes and constants holds, as an array that may have :class:`Size` elements.

    Walked without recursion: chains of shape arithmetic can be long.
    """
    known = raiser.contents
    stack = [tensor]
    while stack:
        value = stack[-1]
        if value.name in known or value.is_empty():
            stack.pop()
            continue
        if isinstance(value, gs.Constant):
            known[value.name] = _constant(value)
            continue
        node = value.inputs[0] if value.inputs else None
        if node is None or node.domain not in _STANDARD or node.op not in (*_MOVING, *_OTHERS):
            known[value.name] = None
            continue
        waiting = [one for one in node.inputs if not one.is_empty() and one.name not in known]
        if waiting and node.op not in ("Shape", "Size"):
            stack.append(waiting[0])
            continue
        known[value.name] = _result(raiser, node)
    return known.get(tensor.name)


def _constant(tensor: gs.Constant) -> np.ndarray | None:
    small = int(np.prod(tensor.shape, dtype=np.int64)) <= LIMIT
    if not small or isinstance(tensor.dtype, int) or np.dtype(tensor.dtype).kind not in "iub":
        return None
    return np.asarray(tensor.values)


def _result(raiser: Raiser, node: gs.Node) -> np.ndarray | None:
    if node.op in ("Shape", "Size"):
        return _sizes(raiser, node)
    inputs = [None if one.is_empty() else raiser.contents[one.name] for one in node.inputs]
    if any(array is None and not one.is_empty() for array, one in zip(inputs, node.inputs, strict=True)):
        return None
    arrays = [array for array in inputs if array is not None]
    if not any(array.dtype == object for array in arrays):
        found = evaluate(OnnxExporter.export_node(node), inputs, raiser.source.opset)
        return None if found is None or found[0].size > LIMIT else found[0]
    if node.op == "ConstantOfShape":  # as many elements as a size says
        return None
    if node.op == "Cast":
        whole = node.attrs["to"] in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
        return arrays[0] if whole else None
    if node.op == "Div":
        try:
            return np.asarray(np.frompyfunc(_quotient, 2, 1)(*arrays), dtype=object)
        except TypeError:
            return None
    found = evaluate(OnnxExporter.export_node(node), inputs, raiser.source.opset)
    return None if found is None or found[0].size > LIMIT else found[0]


def _quotient(one: Any, other: Any) -> Any:
    if isinstance(one, Size):
        return one.over(other)
    if isinstance(other, Size) or other == 0:
        raise TypeError("a quotient that is not followed")
    sign = 1 if (one < 0) == (other < 0) else -1
    return sign * (abs(one) // abs(other))


def _sizes(raiser: Raiser, node: gs.Node) -> np.ndarray | None:
    """The content of a ``Shape`` or ``Size``."""
    tensor = node.inputs[0]
    try:
        shape = raiser.shape_of(tensor)
    except GraphError:  # made by hand, not loaded
        shape = None
    if shape is None:
        return None
    cut = slice(int(node.attrs.get("start", 0)), node.attrs.get("end")) if node.op == "Shape" else slice(None)
    found = np.empty(len(range(len(shape))[cut]), dtype=object)
    for place, axis in enumerate(range(len(shape))[cut]):
        dim = shape[axis]
        if isinstance(dim, int):
            found[place] = dim
        else:
            size = raiser.size(dim)
            found[place] = Size(raiser, raiser.call(size_of, raiser.operand(tensor), axis) if size is None else size)
    if all(isinstance(item, int) for item in found):
        found = found.astype(np.int64)
    if node.op == "Shape":
        return found
    total: Any = 1
    for item in found:
        total = item * total
    return np.array(total, dtype=np.int64 if isinstance(total, int | np.integer) else object)


def _positive(other: Any) -> bool:
    return other.positive if isinstance(other, Size) else int(other) >= 0
