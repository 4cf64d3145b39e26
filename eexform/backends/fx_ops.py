"""Rules for element-wise operators and reductions (see :mod:`eexform.backends.fx`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import fx

from eexform.backends.fx import Raiser, op
from eexform.backends.fx_shapes import Ints, as_ints
from eexform.errors import ModelError


def _register_simple() -> None:
    """Operators that are one torch call on all their inputs, without attributes."""
    simple: dict[str, Callable[..., torch.Tensor]] = {
        "Abs": torch.abs, "Ceil": torch.ceil, "Cos": torch.cos, "Erf": torch.erf, "Exp": torch.exp,
        "Floor": torch.floor, "HardSwish": F.hardswish, "Log": torch.log, "Mish": F.mish, "Neg": torch.neg,
        "Not": torch.logical_not, "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Round": torch.round,
        "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin, "Softplus": F.softplus, "Softsign": F.softsign,
        "Sqrt": torch.sqrt, "Tanh": torch.tanh, "Identity": identity, "Add": torch.add, "Sub": torch.sub,
        "Mul": torch.mul, "Div": divide, "Pow": power, "Where": torch.where, "Equal": torch.eq, "Greater": torch.gt,
        "GreaterOrEqual": torch.ge, "Less": torch.lt, "LessOrEqual": torch.le, "And": torch.logical_and,
        "Or": torch.logical_or, "Xor": torch.logical_xor, "Size": size_of, "Sum": total, "Mean": mean, "Max": largest,
        "Min": smallest,
    }  # fmt: skip
    for name, function in simple.items():

        @op(name)
        def build(raiser: Raiser, node: gs.Node, function: Callable[..., torch.Tensor] = function) -> fx.Node:
            return raiser.call(function, *(raiser.value(node, place) for place in range(len(node.inputs))))


# -- activations ---------------------------------------------------------------------------------------------------


@op("Mod")
def _mod(raiser: Raiser, node: gs.Node) -> fx.Node:
    # with fmod the result has the sign of the dividend, without it that of the divisor
    function = torch.fmod if node.attrs.get("fmod", 0) else torch.remainder
    return raiser.call(function, raiser.value(node, 0), raiser.value(node, 1))


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


@op("Clip")
def _clip(raiser: Raiser, node: gs.Node) -> fx.Node:
    low, high = raiser.number(node, 1), raiser.number(node, 2)
    return (
        raiser.value(node, 0)
        if low is None and high is None
        else raiser.call(torch.clamp, raiser.value(node, 0), low, high)
    )


@op("Softmax", "LogSoftmax")
def _softmax(raiser: Raiser, node: gs.Node) -> fx.Node:
    function = torch.softmax if node.op == "Softmax" else torch.log_softmax
    return raiser.call(function, raiser.value(node, 0), dim=int(node.attrs.get("axis", -1)))


# -- reductions ----------------------------------------------------------------------------------------------------


@op("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceProd", "ReduceSumSquare")
def _reduce(raiser: Raiser, node: gs.Node) -> fx.Node:
    axes, keep = raiser.ints(node, 1, "axes", []), bool(node.attrs.get("keepdims", 1))
    if not isinstance(axes, list):
        raise ModelError(f"node {node.name!r} ({node.op}): computed axes cannot be raised to torch")
    if not axes and node.attrs.get("noop_with_empty_axes", 0):
        return raiser.value(node, 0)
    return raiser.call(reduce, raiser.value(node, 0), node.op, axes, keep)


@op("ArgMax", "ArgMin")
def _arg(raiser: Raiser, node: gs.Node) -> fx.Node:
    function = torch.argmax if node.op == "ArgMax" else torch.argmin
    axis, keep = int(node.attrs.get("axis", 0)), bool(node.attrs.get("keepdims", 1))
    return raiser.call(function, raiser.value(node, 0), dim=axis, keepdim=keep)


@op("TopK")
def _top_k(raiser: Raiser, node: gs.Node) -> Sequence[fx.Node]:
    count, axis = raiser.ints(node, 1), int(node.attrs.get("axis", -1))
    largest_first, ordered = bool(node.attrs.get("largest", 1)), bool(node.attrs.get("sorted", 1))
    return raiser.pick(raiser.call(top_k, raiser.value(node, 0), count, axis, largest_first, ordered), 2)


# -- torch functions for what torch has no single call for ---------------------------------------------------------


def identity(value: torch.Tensor) -> torch.Tensor:
    return value


def divide(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Integers are divided towards zero."""
    whole = not left.is_floating_point() and not right.is_floating_point()
    return torch.div(left, right, rounding_mode="trunc" if whole else None)


def power(base: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """The result has the type of the base."""
    return torch.pow(base, exponent).to(base.dtype)


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


def hard_sigmoid(value: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    return torch.clamp(value * alpha + beta, 0.0, 1.0)


def swish(value: torch.Tensor, alpha: float) -> torch.Tensor:
    return value * torch.sigmoid(value * alpha)


def reduce(value: torch.Tensor, kind: str, axes: list[int], keep: bool) -> torch.Tensor:
    """``kind`` is the ONNX operator; no axes means all."""
    over = axes or list(range(value.dim()))
    match kind:
        case "ReduceMean":
            return value.mean(over, keepdim=keep)
        case "ReduceSum":
            return value.sum(over, keepdim=keep)
        case "ReduceSumSquare":
            return (value * value).sum(over, keepdim=keep)
        case "ReduceL2":
            return (value * value).sum(over, keepdim=keep).sqrt()
        case "ReduceMax":
            return torch.amax(value, over, keepdim=keep)
        case "ReduceMin":
            return torch.amin(value, over, keepdim=keep)
    for axis in sorted((axis % value.dim() for axis in over), reverse=True):
        value = value.prod(axis, keepdim=keep)
    return value


def top_k(
    value: torch.Tensor, count: Ints, axis: int, largest: bool, ordered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    found = torch.topk(value, as_ints(count)[0], dim=axis, largest=largest, sorted=ordered)
    return found.values, found.indices


_register_simple()
