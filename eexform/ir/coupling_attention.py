"""Coupling rules of fused attention and of the normalisations that onnxruntime's optimiser fuses around it.

Heads are cut as a whole: queries, keys and values of a head with the columns of the projection that reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from eexform.ir.coupling import Coupler, Cut, Rule, Slot, rule
from eexform.ir.coupling_elementwise import broadcast

_MICROSOFT = "com.microsoft"
_WIDTH = "normalises over the axis"


def tie_heads(coupler: Coupler, slots: Sequence[Slot], heads: int, groups: Sequence[int] | None = None) -> bool:
    """Tie axes of ``heads * size`` features (repeated ``groups[k]`` times) head by head; False where that fails."""
    repeats = [1] * len(slots) if groups is None else list(groups)
    sizes = [coupler.size(slot.value, slot.axis) for slot in slots]
    if heads < 1 or any(size is None or size % (heads * many) for size, many in zip(sizes, repeats, strict=True)):
        return False
    first = None
    for slot, size, many in zip(slots, sizes, repeats, strict=True):
        assert size is not None
        positions = np.arange(size)
        each = size // many
        head = (positions % each) // (each // heads)
        leader = head * (each // heads)
        coupler.join(slot, positions, leader)
        if first is None:
            first = slot, each // heads
        else:
            coupler.tie(slot, positions, first[0], head * first[1])
        coupler.kind(slot, "heads")
    return True


@rule("Attention")
class Attention(Rule):
    """ONNX's own: [N, heads, T, size] or [N, T, heads * size]; neither past keys nor fewer key heads than heads."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        names = [tensor.name for tensor in node.inputs] + [""] * (7 - len(node.inputs))
        query, key, value, mask = names[:4]
        result = node.outputs[0].name
        if any(names[4:]) or any(tensor.name for tensor in node.outputs[1:]):
            return coupler.freeze_all(node, "attention with past keys or several results is not followed")
        operands = (query, key, value, result)
        whole = {3: 2, 4: 1}.get(coupler.rank(query))
        heads = [coupler.size(operand, 1) for operand in operands] if whole == 1 else self._heads(node)
        if whole is None or len(set(heads)) > 1 or heads[0] is None:
            return coupler.freeze_all(node, "attention with fewer key heads than heads is not followed")
        if whole == 1:
            for operand in operands[1:]:
                coupler.same(Slot(query, 1), Slot(operand, 1))
            coupler.kind(Slot(query, 1), "heads")
            for operand in (query, key):
                coupler.freeze(Slot(operand, 3), "is the size of a head, which scales the scores")
            coupler.same(Slot(value, 3), Slot(result, 3))
        elif not tie_heads(coupler, [Slot(operand, 2) for operand in operands], heads[0]):
            return coupler.freeze_all(node, "its heads have no whole size")
        for operand in operands:
            for slot in coupler.slots(operand):
                if slot.axis in (0, 3 - whole):
                    coupler.freeze(slot, "positions, not heads")
        self._mask(coupler, mask, query if whole == 1 else "", heads[0])

    @staticmethod
    def _mask(coupler: Coupler, mask: str, query: str, heads: int) -> None:
        per_head = coupler.rank(mask) == 4 and coupler.size(mask, 1) == heads > 1
        for slot in coupler.slots(mask):
            if per_head and query and slot.axis == 1:
                coupler.same(slot, Slot(query, 1))
            else:
                coupler.freeze(slot, "positions, not heads")

    @staticmethod
    def _heads(node: gs.Node) -> list[int | None]:
        return [int(node.attrs.get("q_num_heads", 0)) or None, int(node.attrs.get("kv_num_heads", 0)) or None]

    def attributes(self, node: gs.Node, cut: Cut) -> Mapping[str, Any]:
        query = Slot(node.inputs[0].name, 2)
        if len(cut.shape(query.value)) != 3 or not cut.is_cut(query):
            return {}
        return {key: _left(node, key, query, cut) for key in ("q_num_heads", "kv_num_heads")}


def _left(node: gs.Node, attribute: str, slot: Slot, cut: Cut) -> int:
    """Number of heads after a cut: the same share as of the axis that holds them."""
    before = cut.graph.types[slot.value].shape or ()
    heads = int(cut.graph.flow.nodes[node.name].attrs[attribute])
    return heads * len(cut.kept(slot)) // int(before[slot.axis])  # type: ignore[arg-type]


@rule("MultiHeadAttention", domain=_MICROSOFT)
class MultiHeadAttention(Rule):
    """Query, key and value [N, T, heads * size] with their biases as one vector."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        names = [tensor.name for tensor in node.inputs] + [""] * (10 - len(node.inputs))
        query, key, value, bias = names[:4]
        result = node.outputs[0].name
        operands = [query, key, value, result]
        if any(coupler.rank(operand) != 3 for operand in operands) or any(names[4:]) or len(node.outputs) > 1:
            return coupler.freeze_all(node, "attention with packed operands, masks or past keys is not followed")
        slots = [Slot(operand, 2) for operand in operands]
        sizes = {coupler.size(slot.value, 2) for slot in slots}
        if bias and len(sizes) > 1:
            return coupler.freeze_all(node, "attention with values of another size and a bias is not followed")
        groups = [1] * 4
        if bias:
            slots.append(Slot(bias, 0))
            groups.append(3)
            coupler.role(Slot(bias, 0), "bias")
        if not tie_heads(coupler, slots, int(node.attrs["num_heads"]), groups):
            return coupler.freeze_all(node, "its heads have no whole size")
        for operand in operands:
            for axis in (0, 1):
                coupler.freeze(Slot(operand, axis), "positions, not heads")

    def attributes(self, node: gs.Node, cut: Cut) -> Mapping[str, Any]:
        query = Slot(node.inputs[0].name, 2)
        return {"num_heads": _left(node, "num_heads", query, cut)} if cut.is_cut(query) else {}


@rule("Attention", domain=_MICROSOFT)
class PackedAttention(Rule):
    """The projections are inside: input [N, T, C], weight [C, 3 * heads * size], bias [3 * heads * size]."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        names = [tensor.name for tensor in node.inputs] + [""] * (7 - len(node.inputs))
        data, weight, bias, mask = names[:4]
        result = node.outputs[0].name
        if any(names[4:]) or any(tensor.name for tensor in node.outputs[1:]) or node.attrs.get("qkv_hidden_sizes"):
            return coupler.freeze_all(node, "attention with past keys or sizes of its own is not followed")
        coupler.same(Slot(data, 2), Slot(weight, 0))
        coupler.role(Slot(weight, 0), "reader")
        slots, groups = [Slot(weight, 1), Slot(result, 2)], [3, 1]
        coupler.role(Slot(weight, 1), "filter")
        if bias:
            slots.append(Slot(bias, 0))
            groups.append(3)
            coupler.role(Slot(bias, 0), "bias")
        if not tie_heads(coupler, slots, int(node.attrs["num_heads"]), groups):
            return coupler.freeze_all(node, "its heads have no whole size")
        for operand in (data, result):
            for axis in (0, 1):
                coupler.freeze(Slot(operand, axis), "positions, not heads")
        for slot in coupler.slots(mask):
            coupler.freeze(slot, "positions, not heads")

    def attributes(self, node: gs.Node, cut: Cut) -> Mapping[str, Any]:
        weight = Slot(node.inputs[1].name, 1)
        if not cut.is_cut(weight):
            return {}
        width = int(cut.graph.tensors[weight.value].shape[1])
        heads = int(cut.graph.flow.nodes[node.name].attrs["num_heads"])
        return {"num_heads": heads * len(cut.kept(weight)) // width}


@rule("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=_MICROSOFT)
class SkipNorm(Rule):
    """Normalisation over the last axis of input + skip (+ bias)."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        result = node.outputs[0].name
        operands = [tensor for tensor in node.inputs if not tensor.is_empty()]
        broadcast(coupler, operands, result)
        last = coupler.rank(result) - 1
        coupler.inexact(Slot(result, last), _WIDTH)
        for tensor in node.outputs[1:]:
            for slot in coupler.slots(tensor.name):
                if slot.axis < last or coupler.rank(tensor.name) <= last:
                    coupler.freeze(slot, "positions, not channels")
                elif coupler.size(slot.value, slot.axis) == coupler.size(result, last):
                    coupler.same(slot, Slot(result, last))
        for tensor in operands[2:]:
            role = "scale" if tensor is node.inputs[2] else "bias"
            coupler.role(Slot(tensor.name, 0), role)  # type: ignore[arg-type]
