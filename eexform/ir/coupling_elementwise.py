"""Coupling rules of element-wise operators, with broadcasting."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from eexform.ir.coupling import Coupler, Role, Rule, Slot, rule

UNARY = """
    Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid HardSwish
    Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus
    Softsign Sqrt Swish Tan Tanh ThresholdedRelu Cast"""
BROADCAST = """
    Add And BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or
    Pow Sub Sum Where Xor"""

_ROLES: dict[str, Role] = {"Add": "bias", "Sub": "bias", "Sum": "bias", "Mul": "scale", "Div": "scale"}


def broadcast(
    coupler: Coupler, operands: Sequence[gs.Tensor], result: str, *, axes: Sequence[int] | None = None
) -> None:
    """Axes are matched from the last; an axis of size 1 that meets a longer one goes with all of it and is not tied.

    Args:
        coupler: where to say it.
        operands: values and constants.
        result: the value they make.
        axes: axes of the result to speak of (default: all).
    """
    rank = coupler.rank(result)
    for axis in range(rank) if axes is None else axes:
        after = Slot(result, axis)
        width = coupler.size(result, axis)
        coupler.keep(after)
        for tensor in operands:
            own = axis - rank + coupler.rank(tensor.name)
            if own < 0:
                continue
            shape = coupler.shape(tensor.name) or ()
            if shape[own] == 1 and width != 1:
                coupler.keep(Slot(tensor.name, own))
            else:
                coupler.same(Slot(tensor.name, own), after)


def pointwise(coupler: Coupler, before: str, after: str) -> None:
    """Every axis of ``before`` goes with that of ``after``."""
    for slot in coupler.slots(before):
        coupler.same(slot, Slot(after, slot.axis))


@rule(*UNARY.split())
class Unary(Rule):
    """One operand, one result of the same shape."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        pointwise(coupler, node.inputs[0].name, node.outputs[0].name)


@rule("Gelu", "QuickGelu", domain="com.microsoft")
class UnaryMicrosoft(Unary):
    """The same, in onnxruntime's domain."""


@rule("FastGelu", "BiasGelu", domain="com.microsoft")
class BiasedActivation(Rule):
    """``f(x + bias)``, the bias along the last axis."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        operands = [tensor for tensor in node.inputs if not tensor.is_empty()]
        broadcast(coupler, operands, node.outputs[0].name)
        for tensor in operands[1:]:
            coupler.role(Slot(tensor.name, 0), "bias")


@rule(*BROADCAST.split())
class Broadcast(Rule):
    """Two or more operands that are broadcast to the result's shape."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        broadcast(coupler, node.inputs, node.outputs[0].name)
        role = _ROLES.get(node.op, "other")
        for tensor in node.inputs:
            for slot in coupler.slots(tensor.name):
                if (coupler.size(slot.value, slot.axis) or 1) > 1:
                    coupler.role(slot, role)


@rule("Clip", "CastLike")
class First(Rule):
    """The first operand's shape; the others are single numbers or only give a type."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        pointwise(coupler, node.inputs[0].name, node.outputs[0].name)
        for tensor in node.inputs[1:]:
            for slot in coupler.slots(tensor.name):
                coupler.keep(slot)


@rule("Dropout")
class Dropout(Rule):
    """Data and mask have the shape of the operand; ratio and mode are single numbers."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        for result in node.outputs:
            if result.name:
                pointwise(coupler, node.inputs[0].name, result.name)


@rule("PRelu")
class PRelu(Rule):
    """The slope is broadcast to the data, never the other way round."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        broadcast(coupler, node.inputs, node.outputs[0].name)
        for slot in coupler.slots(node.inputs[1].name):
            if (coupler.size(slot.value, slot.axis) or 1) > 1:
                coupler.role(slot, "scale")
