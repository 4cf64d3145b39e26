"""Coupling rules of convolutions: plain, grouped, depthwise, transposed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from eexform.ir.coupling import Coupler, Cut, Rule, Slot, rule

POSITIONS = "positions, not channels"


def groups_of(node: gs.Node) -> int:
    """The ``group`` attribute."""
    return int(node.attrs.get("group", 1))


def freeze_from(coupler: Coupler, value: str, first: int, why: str) -> None:
    """Freeze the axes of a value from ``first`` on."""
    for slot in coupler.slots(value)[first:]:
        coupler.freeze(slot, why)


@rule("Conv")
class Conv(Rule):
    """Weight [C_out, C_in/group, k...].

    Grouped: position ``j`` of every group's input channels is tied over the groups (they share column ``j`` of the
    weight), and so are those of the output channels: every group keeps equally many and ``group`` stays. Depthwise (one
    input channel per group): input channel ``c`` goes with output channels ``c*m .. c*m + m-1``, and ``group`` follows.
    """

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        data, weight, result = node.inputs[0].name, node.inputs[1].name, node.outputs[0].name
        shape = coupler.shape(weight) or ()
        before, after = Slot(data, 1), Slot(result, 1)
        rows, columns = Slot(weight, 0), Slot(weight, 1)
        batch(coupler, data, result)
        for value in (data, weight, result):
            freeze_from(coupler, value, 2, POSITIONS)
        if coupler.size(data, 1) is None or not all(isinstance(dim, int) for dim in shape[:2]):
            return coupler.freeze_all(node, "its channels are not known")
        outputs, group = int(shape[0]), groups_of(node)  # type: ignore[arg-type]
        bias = addend(node, coupler, 2, after)
        coupler.role(rows, "filter")
        coupler.kind(after, "channels")
        coupler.same(rows, after)
        if group == 1:
            coupler.role(columns, "reader")
            coupler.same(before, columns)
        elif shape[1] == 1:
            place = np.arange(outputs)
            coupler.tie(after, place, before, place // (outputs // group))
            coupler.keep(columns)
        else:
            coupler.role(columns, "reader")
            alike(coupler, before, columns, group)
            _join(coupler, after, outputs, group)
        if bias is not None:
            coupler.role(bias, "bias")

    def attributes(self, node: gs.Node, cut: Cut) -> Mapping[str, Any]:
        weight = cut.shape(node.inputs[1].name)
        if groups_of(node) == 1 or weight[1] != 1 or not cut.is_cut(Slot(node.inputs[0].name, 1)):
            return {}
        if cut.is_cut(Slot(node.inputs[1].name, 1)):  # grouped, now with one input channel per group
            return {}
        return {"group": cut.size(Slot(node.inputs[0].name, 1))}


@rule("ConvTranspose")
class ConvTranspose(Rule):
    """Weight [C_in, C_out/group, k...]; grouped like :class:`Conv`, with rows and columns in each other's place."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        data, weight, result = node.inputs[0].name, node.inputs[1].name, node.outputs[0].name
        shape = coupler.shape(weight) or ()
        before, after = Slot(data, 1), Slot(result, 1)
        rows, columns = Slot(weight, 0), Slot(weight, 1)
        batch(coupler, data, result)
        for value in (data, weight, result):
            freeze_from(coupler, value, 2, POSITIONS)
        if coupler.size(result, 1) is None or not all(isinstance(dim, int) for dim in shape[:2]):
            return coupler.freeze_all(node, "its channels are not known")
        inputs, group = int(shape[0]), groups_of(node)  # type: ignore[arg-type]
        bias = addend(node, coupler, 2, after)
        coupler.role(rows, "reader")
        coupler.kind(after, "channels")
        coupler.same(before, rows)
        if group == 1:
            coupler.role(columns, "filter")
            coupler.same(columns, after)
        elif inputs == group:  # one input channel per group
            outputs = coupler.size(result, 1) or 0
            place = np.arange(outputs)
            coupler.tie(after, place, before, place // (outputs // group))
            if outputs == group:
                coupler.role(rows, "filter")
                coupler.keep(columns)
            else:  # the columns are shared by all groups: they stay, whole groups may go
                coupler.freeze(columns, "belongs to every group")
        else:
            coupler.role(columns, "filter")
            alike(coupler, after, columns, group)
            _join(coupler, before, inputs, group)
        if bias is not None:
            coupler.role(bias, "bias")

    def attributes(self, node: gs.Node, cut: Cut) -> Mapping[str, Any]:
        group, data, weight = groups_of(node), node.inputs[0].name, node.inputs[1].name
        if group == 1 or len(cut.kept(Slot(data, 1))) == _size_before(cut, weight) or cut.is_cut(Slot(weight, 1)):
            return {}
        return {"group": cut.size(Slot(data, 1))} if group == _size_before(cut, weight) else {}


def _size_before(cut: Cut, weight: str) -> int:
    return int(cut.graph.constants[weight].shape[0]) if weight in cut.graph.constants else -1


def batch(coupler: Coupler, before: str, after: str) -> None:
    """The batch axis, where it is a number, stays."""
    for value in (before, after):
        coupler.freeze(Slot(value, 0), "is the batch")


def alike(coupler: Coupler, channels: Slot, columns: Slot, group: int) -> None:
    """Channels of ``group`` groups, each of which meets the same columns of a weight."""
    size = coupler.size(channels.value, channels.axis) or 0
    place = np.arange(size)
    coupler.tie(channels, place, columns, place % (size // group))


def _join(coupler: Coupler, channels: Slot, size: int, group: int) -> None:
    place = np.arange(size)
    coupler.join(channels, place, place % (size // group))


def addend(node: gs.Node, coupler: Coupler, place: int, after: Slot) -> Slot | None:
    """The slot of an optional bias [C], tied to ``after``."""
    if place >= len(node.inputs) or node.inputs[place].is_empty():
        return None
    bias = Slot(node.inputs[place].name, 0)
    coupler.same(bias, after)
    return bias
