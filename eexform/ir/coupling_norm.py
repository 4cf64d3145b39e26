"""Coupling rules of normalisation: per channel (exact) and over channels (a statistic of them)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from eexform.ir.coupling import Coupler, Cut, Role, Rule, Slot, rule
from eexform.ir.coupling_elementwise import broadcast, pointwise

_PER_CHANNEL: tuple[Role, ...] = ("scale", "bias", "mean", "variance")


def per_channel(node: gs.Node, coupler: Coupler, channels: Slot) -> None:
    """Operands 1.. are [C]: scale, bias, mean, variance."""
    for tensor, role in zip(node.inputs[1:], _PER_CHANNEL, strict=False):
        if not tensor.is_empty():
            coupler.same(Slot(tensor.name, 0), channels)
            coupler.role(Slot(tensor.name, 0), role)


@rule("BatchNormalization", "InstanceNormalization")
class PerChannel(Rule):
    """Channel by channel: of running statistics, or of the positions of the channel itself."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        data, result = node.inputs[0].name, node.outputs[0].name
        pointwise(coupler, data, result)
        per_channel(node, coupler, Slot(data, 1))
        for extra in node.outputs[1:]:  # running statistics of a node in training mode
            if extra.name:
                coupler.same(Slot(extra.name, 0), Slot(data, 1))
        if node.op == "InstanceNormalization":
            for slot in coupler.slots(data)[2:]:
                coupler.inexact(slot, f"{node.op} over the axis")


@rule("LayerNormalization", "RMSNormalization")
class OverAxes(Rule):
    """Normalised over the axes from ``axis`` on; scale and bias are broadcast to the data."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        data, result = node.inputs[0].name, node.outputs[0].name
        rank = coupler.rank(data)
        pointwise(coupler, data, result)
        for tensor, role in zip(node.inputs[1:], _PER_CHANNEL, strict=False):
            if not tensor.is_empty():
                broadcast(coupler, [tensor], result)
                for slot in coupler.slots(tensor.name):
                    if (coupler.size(slot.value, slot.axis) or 1) > 1:
                        coupler.role(slot, role)
        first = int(node.attrs.get("axis", -1)) % rank
        for axis in range(first, rank):
            coupler.inexact(Slot(data, axis), f"{node.op} over the axis")
        for extra in node.outputs[1:]:  # mean and inverse deviation, with ones from ``axis`` on
            if extra.name:
                for axis in range(first):
                    coupler.same(Slot(data, axis), Slot(extra.name, axis))


@rule("LayerNormalization", "SimplifiedLayerNormalization", domain="com.microsoft")
class OverAxesMicrosoft(OverAxes):
    """The same, in onnxruntime's domain."""


@rule("LpNormalization", "MeanVarianceNormalization", "LRN")
class Plain(Rule):
    """No parameters; what it normalises over is a statistic."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        data = node.inputs[0].name
        rank = coupler.rank(data)
        pointwise(coupler, data, node.outputs[0].name)
        if node.op == "LRN":
            # the window runs over neighbouring channels: who is a neighbour changes when channels go
            coupler.inexact(Slot(data, 1), "LRN over neighbouring channels")
        elif node.op == "MeanVarianceNormalization":
            for axis in node.attrs.get("axes", [0, 2, 3]):
                coupler.inexact(Slot(data, int(axis) % rank), f"{node.op} over the axis")
        # LpNormalization: the norm of what is left is the norm with zeros


@rule("GroupNormalization")
class GroupNorm(Rule):
    """Statistics over the channels of each group: units are whole groups, so what stays is normalised as before.

    ``num_groups`` follows. Scale and bias are [C] (opset 21) or one number per group (opset 18).
    """

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        whole_groups(node, coupler, int(node.attrs["num_groups"]))

    def attributes(self, node: gs.Node, cut: Cut) -> Mapping[str, Any]:
        channels, group = Slot(node.inputs[0].name, 1), int(node.attrs["num_groups"])
        if group == 1 or not cut.is_cut(channels):
            return {}
        before = cut.graph.types[channels.value].shape[1]  # type: ignore[index]
        return {"num_groups": len(cut.kept(channels)) * group // int(before)}  # type: ignore[arg-type]


def whole_groups(node: gs.Node, coupler: Coupler, group: int) -> None:
    """Tie the channels of each of ``group`` groups to each other; with one group they are a statistic instead."""
    data, result = node.inputs[0].name, node.outputs[0].name
    channels = Slot(data, 1)
    size = coupler.size(data, 1)
    if size is None or size % group:
        return coupler.freeze_all(node, "its channels are not known")
    pointwise(coupler, data, result)
    if group == 1:
        coupler.inexact(channels, f"{node.op} over the axis")
    else:
        place = np.arange(size)
        coupler.join(channels, place, place // (size // group) * (size // group))
    for tensor, role in zip(node.inputs[1:3], _PER_CHANNEL, strict=False):
        operand = Slot(tensor.name, 0)
        if coupler.size(tensor.name, 0) == size:
            coupler.same(operand, channels)
        else:  # one number per group
            coupler.tie(channels, np.arange(size), operand, np.arange(size) // (size // group))
        coupler.role(operand, role)
    for slot in coupler.slots(data)[2:]:
        coupler.inexact(slot, f"{node.op} over the axis")
