"""Rules for element-wise operators (see :mod:`eexform.backends.fx`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import fx

from eexform.backends import fx_wide
from eexform.backends.fx import Raiser, op
from eexform.backends.fx_wide import SIGNED, from_ordered, to_ordered

# -- torch functions for what torch has no single call for ---------------------------------------------------------


def identity(value: Any) -> Any:
    return value


def divide(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Integers are divided towards zero."""
    whole = not left.is_floating_point() and not right.is_floating_point()
    return torch.div(left, right, rounding_mode="trunc" if whole else None)


def power(base: torch.Tensor, exponent: torch.Tensor | float) -> torch.Tensor:
    """The result has the type of the base."""
    found = torch.pow(base, exponent)
    return found if found.dtype == base.dtype else found.to(base.dtype)


def size_of(value: torch.Tensor) -> torch.Tensor:
    return torch.tensor(value.numel(), device=value.device)


def total(*values: torch.Tensor) -> torch.Tensor:
    result = values[0]
    for value in values[1:]:
        result = result + value
    return result


def mean(*values: torch.Tensor) -> torch.Tensor:
    return total(*values) / len(values)


def largest(*values: torch.Tensor) -> torch.Tensor:
    result = values[0]
    for value in values[1:]:
        result = torch.maximum(result, value)
    return result


def smallest(*values: torch.Tensor) -> torch.Tensor:
    result = values[0]
    for value in values[1:]:
        result = torch.minimum(result, value)
    return result


def is_infinite(value: torch.Tensor, negative: bool, positive: bool) -> torch.Tensor:
    """Where the value is an infinity of the signs asked for."""
    if negative and positive:
        return torch.isinf(value)
    if not negative and not positive:
        return torch.zeros_like(value, dtype=torch.bool)
    return torch.isposinf(value) if positive else torch.isneginf(value)


def bit_shift(value: torch.Tensor, places: torch.Tensor, left: bool) -> torch.Tensor:
    """ONNX ``BitShift``: what leaves the type is lost; zeros come in, at the top of signed numbers copies of the sign.

    Shifts by a negative number of places, or by all of them or more, leave only what came in.
    """
    kind, width = value.dtype, 8 * value.element_size()
    held, by = fx_wide.to_signed(value), fx_wide.to_signed(places)
    within = (by >= 0) & (by < width)
    by = torch.where(within, by, 0)
    if left:
        moved = torch.bitwise_left_shift(held, by)
    else:
        moved = torch.bitwise_right_shift(held, by)
        if kind == torch.uint64:  # held as int64, whose sign bit was copied into the places that became free
            free = torch.bitwise_left_shift(torch.full_like(held, -1), (64 - by).clamp(max=63))
            moved = torch.where(by > 0, moved & ~free, moved)
    gone = -(held < 0).to(held.dtype) if kind.is_signed and not left else torch.zeros_like(moved)
    moved = torch.where(within, moved, gone)
    return moved if moved.dtype == kind else moved.to(kind)


def clip(value: torch.Tensor, low: Any, high: Any) -> torch.Tensor:
    """Bounds as numbers or as tensors of one element; where they contradict each other the upper one holds."""
    if value.dtype in SIGNED:
        bounds = (None if bound is None else to_ordered(_as_bound(bound, value)) for bound in (low, high))
        return from_ordered(torch.clamp(to_ordered(value), *bounds), value.dtype)
    if isinstance(low, torch.Tensor) or isinstance(high, torch.Tensor):
        low, high = (None if bound is None else _as_bound(bound, value) for bound in (low, high))
    return torch.clamp(value, low, high)


def hard_sigmoid(value: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    return torch.clamp(value * alpha + beta, 0.0, 1.0)


def swish(value: torch.Tensor, alpha: float) -> torch.Tensor:
    return value * torch.sigmoid(value * alpha)


def _as_bound(bound: Any, value: torch.Tensor) -> torch.Tensor:
    return bound if isinstance(bound, torch.Tensor) else torch.tensor(bound, dtype=value.dtype, device=value.device)


# -- one torch call on all inputs, without attributes --------------------------------------------------------------

_FLOATING: dict[str, Callable[..., torch.Tensor]] = {
    "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh, "Atan": torch.atan,
    "Atanh": torch.atanh, "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh, "Erf": torch.erf,
    "Exp": torch.exp, "Floor": torch.floor, "HardSwish": F.hardswish, "Identity": identity, "IsNaN": torch.isnan,
    "Log": torch.log, "Mish": F.mish, "Not": torch.logical_not, "And": torch.logical_and, "Or": torch.logical_or,
    "Xor": torch.logical_xor, "Reciprocal": torch.reciprocal, "Round": torch.round, "Sigmoid": torch.sigmoid,
    "Sin": torch.sin, "Sinh": torch.sinh, "Size": size_of, "Softplus": F.softplus, "Softsign": F.softsign,
    "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
}  # fmt: skip

_NUMERIC: dict[str, Callable[..., torch.Tensor]] = {
    "Abs": torch.abs, "Add": torch.add, "BitwiseAnd": torch.bitwise_and, "BitwiseNot": torch.bitwise_not,
    "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor, "Div": divide, "Equal": torch.eq,
    "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt, "LessOrEqual": torch.le, "Mul": torch.mul,
    "Neg": torch.neg, "Relu": torch.relu, "Sign": torch.sign, "Sub": torch.sub,
}  # fmt: skip

_MANY: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "Max": (torch.maximum, largest),
    "Min": (torch.minimum, smallest),
    "Sum": (torch.add, total),
    "Mean": (mean, mean),
}
"""Operators of any number of inputs: what is called on two, and on another number."""

fx_wide.learn(
    {**_NUMERIC, **{name: many for name, (_, many) in _MANY.items()}, "Pow": power, "Mod": torch.remainder,
     "Fmod": torch.fmod, "Where": torch.where}
)  # fmt: skip


def _operands(raiser: Raiser, node: gs.Node) -> list[fx.Node]:
    return [raiser.value(node, place) for place in range(len(node.inputs))]


def _numeric(raiser: Raiser, name: str, function: Callable[..., torch.Tensor], *values: Any) -> fx.Node:
    """One call; through a signed type where the graph has unsigned ones that torch cannot compute with."""
    if fx_wide.has_wide(raiser.source):
        return raiser.call(fx_wide.widened, name, *values)
    return raiser.call(function, *values)


@op(*_FLOATING)
def _floating(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(_FLOATING[node.op], *_operands(raiser, node))


@op(*_NUMERIC)
def _number(raiser: Raiser, node: gs.Node) -> fx.Node:
    return _numeric(raiser, node.op, _NUMERIC[node.op], *_operands(raiser, node))


@op(*_MANY)
def _many(raiser: Raiser, node: gs.Node) -> fx.Node:
    values = _operands(raiser, node)
    if len(values) == 1:
        return values[0]
    return _numeric(raiser, node.op, _MANY[node.op][0 if len(values) == 2 else 1], *values)


@op("Pow")
def _pow(raiser: Raiser, node: gs.Node) -> fx.Node:
    exponent = raiser.array(node, 1)
    if exponent is not None and exponent.ndim == 0 and not fx_wide.has_wide(raiser.source):
        return raiser.call(power, raiser.value(node, 0), exponent.item())  # squares and roots have fast kernels
    return _numeric(raiser, "Pow", power, *_operands(raiser, node))


@op("Mod")
def _mod(raiser: Raiser, node: gs.Node) -> fx.Node:
    # with fmod the result has the sign of the dividend, without it that of the divisor
    name, function = ("Fmod", torch.fmod) if node.attrs.get("fmod", 0) else ("Mod", torch.remainder)
    return _numeric(raiser, name, function, *_operands(raiser, node))


@op("Where")
def _where(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(torch.where, *_operands(raiser, node))


@op("IsInf")
def _is_inf(raiser: Raiser, node: gs.Node) -> fx.Node:
    negative, positive = (bool(node.attrs.get(f"detect_{sign}", 1)) for sign in ("negative", "positive"))
    return raiser.call(is_infinite, raiser.value(node, 0), negative, positive)


@op("BitShift")
def _bit_shift(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(bit_shift, raiser.value(node, 0), raiser.value(node, 1), node.attrs["direction"] == "LEFT")


@op("Clip")
def _clip(raiser: Raiser, node: gs.Node) -> fx.Node:
    low = node.attrs["min"] if "min" in node.attrs else raiser.number(node, 1)
    high = node.attrs["max"] if "max" in node.attrs else raiser.number(node, 2)
    if low is None and high is None:
        return raiser.value(node, 0)
    plain = not isinstance(low, fx.Node) and not isinstance(high, fx.Node) and not fx_wide.has_wide(raiser.source)
    return raiser.call(torch.clamp if plain else clip, raiser.value(node, 0), low, high)


# -- activations ---------------------------------------------------------------------------------------------------


@op("LeakyRelu")
def _leaky_relu(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(F.leaky_relu, raiser.value(node, 0), float(node.attrs.get("alpha", 0.01)))


@op("Elu")
def _elu(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(F.elu, raiser.value(node, 0), float(node.attrs.get("alpha", 1.0)))


@op("Selu")
def _selu(raiser: Raiser, node: gs.Node) -> fx.Node:
    alpha, gamma = node.attrs.get("alpha", 1.6732632), node.attrs.get("gamma", 1.0507010)
    return raiser.call(torch.mul, raiser.call(F.elu, raiser.value(node, 0), float(alpha)), float(gamma))


@op("HardSigmoid")
def _hard_sigmoid(raiser: Raiser, node: gs.Node) -> fx.Node:
    alpha, beta = float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5))
    return raiser.call(hard_sigmoid, raiser.value(node, 0), alpha, beta)


@op("Gelu")
def _gelu(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(F.gelu, raiser.value(node, 0), approximate=str(node.attrs.get("approximate", "none")))


@op("Swish")
def _swish(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(swish, raiser.value(node, 0), float(node.attrs.get("alpha", 1.0)))
