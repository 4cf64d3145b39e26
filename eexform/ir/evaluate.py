"""Values of small constant computations: the shape arithmetic that decides what a ``Reshape`` or an ``Expand`` does.

Only tensors of at most :data:`LIMIT` elements are followed. The operators that exporters write in such chains have a
direct numpy rule; anything else goes through onnx's own reference implementation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

LIMIT = 16384
"""Largest number of elements of a value whose content is followed."""

_RANDOM = {
    "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout",
}  # fmt: skip

Arrays = Sequence[np.ndarray | None]


def evaluate(node: onnx.NodeProto, inputs: Arrays, opset: int) -> list[np.ndarray] | None:
    """Outputs of a standard operator on known inputs.

    Args:
        node: a node of the standard domain without sub-graphs.
        inputs: one array per input; ``None`` for one that is left out.
        opset: version of the standard domain.

    Returns:
        One array per output, or ``None`` where the operator is random or cannot be evaluated.
    """
    if node.op_type in _RANDOM:
        return None
    rule = _RULES.get(node.op_type)
    try:
        if rule is not None:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            found = rule(inputs, attributes)
            if found is not None:
                return [np.asarray(array) for array in found]
        return _reference(node, inputs, opset)
    except Exception:  # an operator that cannot be evaluated has an unknown value, which is always a correct answer
        return None


def _reference(node: onnx.NodeProto, inputs: Arrays, opset: int) -> list[np.ndarray]:
    from onnx.reference import ReferenceEvaluator

    feeds = {name: array for name, array in zip(node.input, inputs, strict=True) if name}
    outputs = ReferenceEvaluator(node, opsets={"": opset}).run(None, feeds)
    return [np.asarray(array) for array in outputs]


def _axes(inputs: Arrays, attributes: Mapping[str, Any]) -> tuple[int, ...] | None:
    if len(inputs) > 1 and inputs[1] is not None:
        return tuple(int(axis) for axis in inputs[1].reshape(-1))
    given = attributes.get("axes")
    return None if given is None else tuple(int(axis) for axis in given)


def _present(inputs: Arrays) -> list[np.ndarray]:
    return [array for array in inputs if array is not None]


def _binary(function: Callable[[Any, Any], Any]) -> Callable[[Arrays, Mapping[str, Any]], list[np.ndarray]]:
    def rule(inputs: Arrays, attributes: Mapping[str, Any]) -> list[np.ndarray]:
        first, second = _present(inputs)
        with np.errstate(all="ignore"):
            return [np.asarray(function(first, second))]

    return rule


def _unary(function: Callable[[Any], Any]) -> Callable[[Arrays, Mapping[str, Any]], list[np.ndarray]]:
    def rule(inputs: Arrays, attributes: Mapping[str, Any]) -> list[np.ndarray]:
        (first,) = _present(inputs)
        with np.errstate(all="ignore"):
            return [np.asarray(function(first)).astype(first.dtype, copy=False)]

    return rule


def _divide(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    if np.issubdtype(first.dtype, np.integer):  # ONNX truncates, numpy floors
        quotient = np.abs(first) // np.abs(second)
        return (np.sign(first) * np.sign(second) * quotient).astype(first.dtype)
    return (first / second).astype(first.dtype)


def _gather(inputs: Arrays, attributes: Mapping[str, Any]) -> list[np.ndarray]:
    data, indices = _present(inputs)
    return [np.take(data, indices, axis=attributes.get("axis", 0))]


def _concat(inputs: Arrays, attributes: Mapping[str, Any]) -> list[np.ndarray]:
    return [np.concatenate(_present(inputs), axis=attributes["axis"])]


def _unsqueeze(inputs: Arrays, attributes: Mapping[str, Any]) -> list[np.ndarray] | None:
    axes = _axes(inputs, attributes)
    return None if axes is None or inputs[0] is None else [np.expand_dims(inputs[0], axes)]


def _squeeze(inputs: Arrays, attributes: Mapping[str, Any]) -> list[np.ndarray]:
    return [np.squeeze(_present(inputs)[0], _axes(inputs, attributes))]


def _slice(inputs: Arrays, attributes: Mapping[str, Any]) -> list[np.ndarray] | None:
    if len(inputs) < 3 or inputs[0] is None or inputs[1] is None or inputs[2] is None:
        return None
    data, starts, ends = inputs[0], inputs[1].reshape(-1), inputs[2].reshape(-1)
    axes = inputs[3].reshape(-1) if len(inputs) > 3 and inputs[3] is not None else np.arange(len(starts))
    steps = inputs[4].reshape(-1) if len(inputs) > 4 and inputs[4] is not None else np.ones(len(starts), np.int64)
    cut = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts.tolist(), ends.tolist(), axes.tolist(), steps.tolist(), strict=True):
        if step < 0 and end < -data.shape[axis]:
            end = None  # "up to and including the first element": numpy has no number for it
        cut[axis] = slice(start, end, step)
    return [data[tuple(cut)]]


def _cast(inputs: Arrays, attributes: Mapping[str, Any]) -> list[np.ndarray]:
    with np.errstate(all="ignore"):
        return [_present(inputs)[0].astype(onnx.helper.tensor_dtype_to_np_dtype(attributes["to"]))]


def _reshape(inputs: Arrays, attributes: Mapping[str, Any]) -> list[np.ndarray]:
    data, target = _present(inputs)
    dims = target.reshape(-1).tolist()
    if not attributes.get("allowzero", 0):
        dims = [data.shape[i] if dim == 0 else dim for i, dim in enumerate(dims)]
    return [data.reshape(dims)]


def _filled(inputs: Arrays, attributes: Mapping[str, Any]) -> list[np.ndarray]:
    (shape,) = _present(inputs)
    value = attributes.get("value")
    fill = np.zeros(1, np.float32) if value is None else onnx.numpy_helper.to_array(value)
    return [np.full(shape.reshape(-1).tolist(), fill.reshape(-1)[0], dtype=fill.dtype)]


def _range(inputs: Arrays, attributes: Mapping[str, Any]) -> list[np.ndarray]:
    start, limit, delta = (array.reshape(-1)[0] for array in _present(inputs))
    count = max(math.ceil((limit - start) / delta), 0)
    return [(start + np.arange(count) * delta).astype(start.dtype)]


def _expand(inputs: Arrays, attributes: Mapping[str, Any]) -> list[np.ndarray]:
    data, shape = _present(inputs)
    return [np.array(np.broadcast_to(data, np.broadcast_shapes(data.shape, tuple(shape.reshape(-1).tolist()))))]


def _transpose(inputs: Arrays, attributes: Mapping[str, Any]) -> list[np.ndarray]:
    return [np.transpose(_present(inputs)[0], attributes.get("perm"))]


def _product(inputs: Arrays, attributes: Mapping[str, Any]) -> list[np.ndarray] | None:
    data = _present(inputs)[0]
    axes = _axes(inputs, attributes)
    if axes is None and attributes.get("noop_with_empty_axes", 0):
        return None
    return [np.prod(data, axis=axes, keepdims=bool(attributes.get("keepdims", 1)), dtype=data.dtype)]


def _where(inputs: Arrays, attributes: Mapping[str, Any]) -> list[np.ndarray]:
    return [np.where(*_present(inputs))]


_RULES: dict[str, Callable[[Arrays, Mapping[str, Any]], list[np.ndarray] | None]] = {
    "Identity": _unary(lambda x: x),
    "Gather": _gather,
    "Concat": _concat,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Slice": _slice,
    "Cast": _cast,
    "Reshape": _reshape,
    "ConstantOfShape": _filled,
    "Range": _range,
    "Expand": _expand,
    "Transpose": _transpose,
    "ReduceProd": _product,
    "Where": _where,
    "Add": _binary(lambda a, b: a + b),
    "Sub": _binary(lambda a, b: a - b),
    "Mul": _binary(lambda a, b: a * b),
    "Div": _binary(_divide),
    "Equal": _binary(lambda a, b: a == b),
    "Less": _binary(lambda a, b: a < b),
    "Greater": _binary(lambda a, b: a > b),
    "And": _binary(np.logical_and),
    "Or": _binary(np.logical_or),
    "Not": _unary(np.logical_not),
    "Floor": _unary(np.floor),
    "Ceil": _unary(np.ceil),
    "Sqrt": _unary(np.sqrt),
    "Neg": _unary(np.negative),
    "Abs": _unary(np.abs),
}
