"""Coupling rules of matrix products: with a constant and between computed values."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from eexform.ir.coupling import Coupler, Rule, Slot, rule
from eexform.ir.coupling_elementwise import broadcast


@rule("Gemm")
class Gemm(Rule):
    """``alpha A B + beta C`` with [rows, contracted] x [contracted, columns]; C is broadcast to [rows, columns]."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        left, right, result = node.inputs[0].name, node.inputs[1].name, node.outputs[0].name
        a, b = int(node.attrs.get("transA", 0)), int(node.attrs.get("transB", 0))
        coupler.same(Slot(left, 0 if a else 1), Slot(right, 1 if b else 0))
        coupler.same(Slot(left, 1 if a else 0), Slot(result, 0))
        coupler.same(Slot(right, 0 if b else 1), Slot(result, 1))
        coupler.role(Slot(right, 1 if b else 0), "reader")
        coupler.role(Slot(right, 0 if b else 1), "filter")
        coupler.role(Slot(left, 0 if a else 1), "reader")
        coupler.role(Slot(left, 1 if a else 0), "filter")
        coupler.kind(Slot(result, 1), "width")
        if len(node.inputs) > 2 and not node.inputs[2].is_empty():
            broadcast(coupler, node.inputs[2:3], result)
            addend = coupler.slots(node.inputs[2].name)
            if addend and coupler.size(addend[-1].value, addend[-1].axis) != 1:
                coupler.role(addend[-1], "bias")


@rule("MatMul")
class MatMul(Rule):
    """Numpy's product: the last two axes are rows and columns, those before are batches with broadcasting.

    A constant operand is a weight; between two computed values the contracted axes go together like those of a weight
    and its input, and nothing else is shared.
    """

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        left, right, result = node.inputs[0].name, node.inputs[1].name, node.outputs[0].name
        ranks = coupler.rank(left), coupler.rank(right)
        if 0 in ranks:
            return coupler.freeze_all(node, "multiplies single numbers")
        contracted = Slot(left, ranks[0] - 1), Slot(right, max(ranks[1] - 2, 0))
        coupler.same(*contracted)
        coupler.role(contracted[0], "reader")
        coupler.role(contracted[1], "reader")
        rank = coupler.rank(result)
        batches = rank - (ranks[0] > 1) - (ranks[1] > 1)
        if ranks[1] > 1:
            columns = Slot(right, ranks[1] - 1)
            coupler.same(columns, Slot(result, rank - 1))
            coupler.role(columns, "filter")
            coupler.kind(Slot(result, rank - 1), "width")
        if ranks[0] > 1:
            rows = Slot(left, ranks[0] - 2)
            coupler.same(rows, Slot(result, rank - 1 - (ranks[1] > 1)))
            coupler.role(rows, "filter")
        for axis in range(batches):
            after = Slot(result, axis)
            width = coupler.size(result, axis)
            coupler.keep(after)
            for value, own_rank in ((left, ranks[0]), (right, ranks[1])):
                own = axis - batches + max(own_rank - 2, 0)
                if own < 0:
                    continue
                slot = Slot(value, own)
                if (coupler.shape(value) or ())[own] == 1 and width != 1:
                    coupler.keep(slot)
                else:
                    coupler.same(slot, after)


@rule("Einsum")
class Einsum(Rule):
    """Frozen: its attention and product forms are written as MatMul by exporters."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        coupler.freeze_all(node, "Einsum is not followed")
