"""Random element-wise operators, reductions and sorting (see ``random_ops``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from tests.backends.random_ops import FLOATS, NUMBERS, Case, Draw

UNARY = [
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Cos", "Cosh", "Erf", "Exp", "Floor",
    "HardSwish", "Identity", "IsNaN", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin",
    "Sinh", "Softplus", "Softsign", "Sqrt", "Tan", "Tanh",
]  # fmt: skip
SMOOTH = {
    "LeakyRelu": ["alpha"], "Elu": ["alpha"], "Celu": ["alpha"], "Selu": ["alpha", "gamma"], "Swish": ["alpha"],
    "HardSigmoid": ["alpha", "beta"], "ThresholdedRelu": ["alpha"], "Shrink": ["lambd", "bias"], "Gelu": [],
}  # fmt: skip
WHOLE = ("int32", "int64", "uint8", "int8")
TYPES = ("float16", "float32", "float64", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
         "bool")  # fmt: skip


def unary(draw: Draw) -> Case:
    op = draw.pick(UNARY)
    value = draw.array(draw.shape(0, 4), FLOATS if op in ("Abs", "Neg", "Relu", "Round", "Exp") else ["float32"])
    if op in ("Log", "Sqrt", "Reciprocal", "Acosh"):
        value = np.abs(value) + value.dtype.type(1.1)
    if op in ("Acos", "Asin", "Atanh", "Tan"):
        value = np.clip(value, -0.9, 0.9).astype(value.dtype)
    return Case(op, [value])


def whole_unary(draw: Draw) -> Case:
    op = draw.pick(["Abs", "Neg", "Relu", "Sign", "Identity", "BitwiseNot"])
    kinds = ("int32", "int64", "int8") if op in ("Neg", "Relu") else WHOLE
    return Case(op, [draw.array(draw.shape(0, 4), kinds)])


def activation(draw: Draw) -> Case:
    op = draw.pick(SMOOTH)
    attrs: dict[str, Any] = {name: draw.pick([0.1, 0.7, 1.5]) for name in SMOOTH[op] if draw.flag()}
    if op == "Gelu":
        attrs["approximate"] = draw.pick(["none", "tanh"])
    return Case(op, [draw.array(draw.shape(), ["float32"])], attrs, opset=24 if op == "Swish" else 21)


def prelu(draw: Draw) -> Case:
    value = draw.array(draw.shape(2, 4), ["float32"])
    return Case("PRelu", [value, draw.weights(*draw.broadcast(value.shape))])


def softmax(draw: Draw) -> Case:
    value = draw.array(draw.shape(1, 4), FLOATS)
    op = draw.pick(["Softmax", "LogSoftmax", "Hardmax"])
    if op == "Hardmax":
        value = np.round(value)
    return Case(op, [value], {"axis": draw.axis(value.ndim)} if draw.flag() else {}, opset=draw.pick([13, 21]))


def softmax_of_a_matrix(draw: Draw) -> Case:
    value = draw.array(draw.shape(2, 4), ["float32"])
    attrs = {"axis": draw.axis(value.ndim)} if draw.flag() else {}
    return Case(draw.pick(["Softmax", "LogSoftmax", "Hardmax"]), [value], attrs, opset=11)


def binary(draw: Draw) -> Case:
    op = draw.pick(["Add", "Sub", "Mul", "Div", "Max", "Min", "Mod", "Greater", "GreaterOrEqual", "Less",
                    "LessOrEqual", "Equal"])  # fmt: skip
    shape, kind = draw.shape(0, 4), draw.pick(NUMBERS)
    operands = [draw.array(shape, [kind]), draw.array(draw.broadcast(shape), [kind])]
    if op in ("Div", "Mod"):
        operands[1] = np.where(np.abs(operands[1]) < 1, np.ones_like(operands[1]), operands[1])
    elif draw.flag():
        operands.reverse()
    return Case(op, operands, {"fmod": 1 if kind[0] == "f" else draw.number(0, 1)} if op == "Mod" else {})


def power(draw: Draw) -> Case:
    shape = draw.shape(0, 3)
    base, exponent = draw.array(shape), draw.array(draw.broadcast(shape))
    if base.dtype.kind == "i" or exponent.dtype.kind == "f":  # powers of negative numbers have whole exponents
        base, exponent = np.abs(base) + base.dtype.type(1), np.abs(exponent)
    base = np.where(np.abs(base) < 0.1, np.ones_like(base), base)
    return Case("Pow", [base, exponent], loose=10)


def logical(draw: Draw) -> Case:
    op, shape = draw.pick(["And", "Or", "Xor", "Not", "Equal"]), draw.shape(0, 4)
    left, right = draw.array(shape, ["bool"]), draw.array(draw.broadcast(shape), ["bool"])
    return Case(op, [left] if op == "Not" else [left, right])


def bits(draw: Draw) -> Case:
    op, shape, kind = draw.pick(["BitwiseAnd", "BitwiseOr", "BitwiseXor"]), draw.shape(0, 3), draw.pick(WHOLE)
    return Case(op, [draw.array(shape, [kind]), draw.array(draw.broadcast(shape), [kind])])


def many(draw: Draw) -> Case:
    op, shape = draw.pick(["Sum", "Mean", "Max", "Min"]), draw.shape()
    others = [draw.array(draw.broadcast(shape), ["float32"]) for _ in range(draw.number(0, 3))]
    return Case(op, [draw.array(shape, ["float32"]), *others])


def where(draw: Draw) -> Case:
    shape, kind = draw.shape(), draw.pick(["float32", "int64", "bool", "uint8"])
    parts = [draw.array(draw.broadcast(shape), [kind]) for _ in range(2)]
    return Case("Where", [draw.array(draw.broadcast(shape), ["bool"]), *parts])


def clip(draw: Draw) -> Case:
    value = draw.array(draw.shape(0, 4), [*NUMBERS, "uint8", "int8"])
    bounds = [np.array(draw.number(0, 3), value.dtype) if draw.flag() else None for _ in range(2)]
    operands = [value, *bounds]
    while operands[-1] is None:
        operands.pop()
    return Case("Clip", operands)


def old_clip(draw: Draw) -> Case:
    attrs = {name: float(draw.number(-2, 2)) for name in ("min", "max") if draw.flag()}
    return Case("Clip", [draw.array(draw.shape(), ["float32"])], attrs, opset=10)


def infinities(draw: Draw) -> Case:
    value = draw.array(draw.shape(), FLOATS)
    value = np.where(draw.random.random(value.shape) < 0.5, value, np.sign(value) * np.inf).astype(value.dtype)
    attrs = {f"detect_{sign}": draw.number(0, 1) for sign in ("negative", "positive") if draw.flag()}
    return Case("IsInf", [value], attrs)


def cast(draw: Draw) -> Case:
    source, target = draw.pick(TYPES), draw.pick(TYPES)
    value = draw.array(draw.shape(0, 3), [source])
    if np.dtype(source).kind in "f" and np.dtype(target).kind == "u":
        value = np.abs(value)  # what negative ones become is nobody's promise
    return Case("Cast", [value], {"to": int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(target)))})


def reduction(draw: Draw) -> Case:
    op = draw.pick(["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"])
    kinds = ["float32"] if op.startswith("L") else ["float32", "float64", "int32"]
    value = draw.array((draw.pick([2, 1, 7]), *draw.numbers(draw.number(0, 3), 1, 4)), kinds)
    value = np.abs(value) + 1 if op == "LogSum" else value
    attrs = {"keepdims": draw.number(0, 1)} if draw.flag() else {}
    if draw.flag():
        attrs["noop_with_empty_axes"] = draw.number(0, 1)
    operands = [value, *([draw.axes(value.ndim)] if draw.flag() else [])]
    # what is left of the axes where none are given is read in two ways; the standard's is the reference's
    return Case(f"Reduce{op}", operands, attrs, loose=10)


def old_reduction(draw: Draw) -> Case:
    op = draw.pick(["L2", "Max", "Mean", "Min", "Prod", "Sum"])
    value = draw.array((draw.pick([2, 1, 7]), *draw.numbers(draw.number(0, 3), 1, 4)), ["float32"])
    attrs: dict[str, Any] = {"keepdims": draw.number(0, 1)}
    if draw.flag():
        attrs["axes"] = draw.axes(value.ndim, 1).tolist()
    return Case(f"Reduce{op}", [value], attrs, opset=11, loose=10)


def reduction_of_an_empty_batch(draw: Draw) -> Case:
    value = draw.array((0, *draw.numbers(draw.number(1, 3), 1, 4)), ["float32"])
    axes = draw.axes(value.ndim, 1)
    op = draw.pick(["Max", "Min", "Sum", "Prod", "L1", "L2", "SumSquare", "Mean"])
    if op in ("Mean", "Max", "Min"):  # means, greatest and least of nothing are not looked at
        axes = np.array([axis for axis in axes.tolist() if axis % value.ndim] or [-1])
    return Case(f"Reduce{op}", [value, axes], {"keepdims": draw.number(0, 1)}, reference=True)


def arg(draw: Draw) -> Case:
    value = np.round(draw.array((draw.pick([2, 1, 7]), *draw.numbers(draw.number(0, 3), 1, 4)), [*NUMBERS, "uint8"]))
    attrs = {"axis": draw.axis(value.ndim), "keepdims": draw.number(0, 1), "select_last_index": draw.number(0, 1)}
    return Case(draw.pick(["ArgMax", "ArgMin"]), [value], attrs)


def top_k(draw: Draw) -> Case:
    value = draw.array(draw.shape(), NUMBERS)
    axis = draw.axis(value.ndim)
    count = np.array([draw.number(0, value.shape[axis])], np.int64)
    return Case("TopK", [value, count], {"axis": axis, "largest": draw.number(0, 1)}, 2)


def cumulative(draw: Draw) -> Case:
    value = draw.array(draw.shape())
    axis = np.array(draw.axis(value.ndim), draw.pick([np.int32, np.int64]))
    return Case("CumSum", [value, axis], {"exclusive": draw.number(0, 1), "reverse": draw.number(0, 1)})


MATH = [
    unary, whole_unary, activation, prelu, softmax, softmax_of_a_matrix, binary, power, logical, bits, many, where,
    clip, old_clip, infinities, cast, reduction, old_reduction, reduction_of_an_empty_batch, arg, top_k, cumulative,
]  # fmt: skip
