"""Coupling rules of pooling, reductions, softmax and selection along an axis."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from eexform.ir.coupling import Coupler, Rule, Slot, rule
from eexform.ir.coupling_conv import POSITIONS, batch, freeze_from
from eexform.ir.coupling_elementwise import pointwise

REDUCTIONS = """
    ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare"""


@rule(
    "AveragePool", "MaxPool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "MaxUnpool", "MaxRoiPool"
)
class Pool(Rule):
    """[N, C, spatial...] to [N, C, spatial...]: channel by channel, positions stay."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        if node.op in ("MaxUnpool", "MaxRoiPool") or len([out for out in node.outputs if out.name]) > 1:
            return coupler.freeze_all(node, "pools with indices or regions")
        before, after = node.inputs[0].name, node.outputs[0].name
        batch(coupler, before, after)
        coupler.same(Slot(before, 1), Slot(after, 1))
        for value in (before, after):
            freeze_from(coupler, value, 2, POSITIONS)


def reduced_axes(node: gs.Node, coupler: Coupler, rank: int) -> tuple[int, ...] | None:
    """Axes that a reduction runs over, from attribute or operand; ``None`` where they are computed."""
    given = node.attrs.get("axes")
    if given is None and len(node.inputs) > 1 and not node.inputs[1].is_empty():
        array = coupler.array(node.inputs[1])
        if array is None:
            return None
        given = array.reshape(-1).tolist()
    if not given:
        return () if int(node.attrs.get("noop_with_empty_axes", 0)) else tuple(range(rank))
    return tuple(sorted({int(axis) % rank for axis in given}))


@rule(*REDUCTIONS.split())
class Reduce(Rule):
    """Axes that stay go with those of the result; a reduction over channels is a statistic of them."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        before, after = node.inputs[0].name, node.outputs[0].name
        rank = coupler.rank(before)
        axes = reduced_axes(node, coupler, rank)
        if axes is None:
            return coupler.freeze_all(node, "its axes are computed")
        kept = bool(int(node.attrs.get("keepdims", 1)))
        place = 0
        for axis in range(rank):
            slot = Slot(before, axis)
            if axis not in axes:
                coupler.same(slot, Slot(after, place))
                place += 1
                continue
            # a sum over what is left is a sum with zeros: exact; anything else counts or compares its terms
            if node.op in ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"):
                coupler.keep(slot)
            else:
                coupler.inexact(slot, f"{node.op} over the axis")
            place += kept
        for tensor in node.inputs[1:]:
            for operand in coupler.slots(tensor.name):
                coupler.keep(operand)


@rule("Softmax", "LogSoftmax", "Hardmax")
class Softmax(Rule):
    """Same shape; the normalised axis is a statistic."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        before = node.inputs[0].name
        pointwise(coupler, before, node.outputs[0].name)
        over = Slot(before, int(node.attrs.get("axis", -1)) % max(coupler.rank(before), 1))
        coupler.inexact(over, f"{node.op} over the axis")


@rule("ArgMax", "ArgMin", "TopK")
class Select(Rule):
    """Positions along the axis are results: they stay; the other axes pass."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        before = node.inputs[0].name
        rank = coupler.rank(before)
        axis = int(node.attrs.get("axis", -1 if node.op == "TopK" else 0)) % rank
        kept = node.op == "TopK" or bool(int(node.attrs.get("keepdims", 1)))
        coupler.freeze(Slot(before, axis), f"{node.op} along the axis")
        for result in node.outputs:
            if not result.name:
                continue
            for own in range(rank):
                if own != axis:
                    coupler.same(Slot(before, own), Slot(result.name, own if kept or own < axis else own - 1))
