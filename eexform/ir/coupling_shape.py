"""Coupling rules of operators that rearrange whole axes: Transpose, Squeeze, Expand, Tile, pixel shuffles.

Reshape and Flatten, which split and merge axes, are in :mod:`eexform.ir.coupling_reshape`.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from eexform.errors import GraphError
from eexform.ir.coupling import Coupler, Cut, Rule, Slot, rule
from eexform.ir.coupling_sizes import follows, guard, mend, size_chains
from eexform.ir.emit import Emitter


@rule("Transpose")
class Transpose(Rule):
    """Axes change places."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        data, result = node.inputs[0].name, node.outputs[0].name
        order = node.attrs.get("perm") or list(reversed(range(coupler.rank(data))))
        for after, before in enumerate(order):
            coupler.same(Slot(data, int(before)), Slot(result, after))


@rule("Squeeze", "Unsqueeze")
class Squeeze(Rule):
    """Axes of size 1 go or come; the others stay in order."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        data, result = node.inputs[0].name, node.outputs[0].name
        longer, shorter = (data, result) if node.op == "Squeeze" else (result, data)
        shape = coupler.shape(longer) or ()
        axes = _axes(node, coupler, len(shape))
        if axes is None and (node.op == "Unsqueeze" or len(node.inputs) > 1):
            return coupler.freeze_all(node, "its axes are computed")
        gone = {axis for axis, dim in enumerate(shape) if dim == 1} if axes is None else axes
        for axis in gone:
            coupler.freeze(Slot(longer, axis), f"is an axis of size 1 that {node.op} handles")
        for after, before in enumerate(axis for axis in range(len(shape)) if axis not in gone):
            coupler.same(Slot(longer, before), Slot(shorter, after))


def _axes(node: gs.Node, coupler: Coupler, rank: int) -> set[int] | None:
    """The axes that come or go, counted from 0; ``None`` where they are not given as numbers."""
    given = node.attrs.get("axes")
    if len(node.inputs) > 1:
        given = coupler.array(node.inputs[1])
    return None if given is None else {int(axis) % rank for axis in np.asarray(given).reshape(-1)}


@rule("Expand")
class Expand(Rule):
    """Axes of size 1 are repeated, and each of the copies may go; the numbers of the target are mended."""

    follows_sizes = True

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        data, result = node.inputs[0].name, node.outputs[0].name
        before, after = coupler.shape(data) or (), coupler.shape(result) or ()
        elements = size_chains(coupler.graph).elements(node.inputs[1])
        if elements is None or len(elements) > len(after):
            return coupler.freeze_all(node, "its target is not known")
        for axis, dim in enumerate(after):
            slot = Slot(result, axis)
            own = axis - len(after) + len(before)
            coupler.keep(slot)
            if own >= 0 and before[own] == dim:
                coupler.same(Slot(data, own), slot)
                continue
            if own >= 0:
                coupler.keep(Slot(data, own))
            place = axis - len(after) + len(elements)
            element = elements[place] if place >= 0 else 1
            if isinstance(element, Slot):
                coupler.same(element, slot)  # as many copies as another value has channels
            elif isinstance(element, frozenset):
                coupler.freeze(slot, "is repeated a computed number of times")
        own_slots = (*coupler.slots(data), *coupler.slots(result))
        coupler.defer(partial(guard, coupler, node.inputs[1:], own_slots, f"Expand {node.name!r}"))

    def rewrite(self, node: gs.Node, cut: Cut, emitter: Emitter) -> None:
        elements = size_chains(cut.graph).elements(cut.graph.flow.nodes[node.name].inputs[1]) or []
        before, after = cut.shape(node.inputs[0].name), cut.shape(node.outputs[0].name)
        wanted: list[int | None] = []
        for place, element in enumerate(elements):
            axis = len(after) - len(elements) + place
            own = axis - len(after) + len(before)
            found = follows(element, cut)
            known = found is not None or not cut.is_cut(Slot(node.outputs[0].name, axis))
            if element == 1 or (known and found in (after[axis], None)):
                wanted.append(None)
            elif own >= 0 and before[own] == after[axis]:
                wanted.append(1)  # whatever the operand has
            else:
                dim = after[axis]
                if not isinstance(dim, int):
                    raise GraphError(f"node {node.name!r} (Expand): size {dim} of axis {axis} cannot be written")
                wanted.append(dim)
        mend(node, 1, wanted, cut, emitter)


@rule("Tile")
class Tile(Rule):
    """Position p of an axis comes back at p + size, and so on; all copies go together."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        data, result = node.inputs[0].name, node.outputs[0].name
        elements = size_chains(coupler.graph).elements(node.inputs[1])
        if elements is None or len(elements) != coupler.rank(data):
            return coupler.freeze_all(node, "its repeats are computed")
        for slot, element in zip(coupler.slots(data), elements, strict=True):
            after = Slot(result, slot.axis)
            size, width = coupler.size(data, slot.axis), coupler.size(result, slot.axis)
            if element == 1:
                coupler.same(slot, after)
            elif isinstance(element, int) and size is not None and width == size * element:
                coupler.tie(after, np.arange(width), slot, np.arange(width) % size)
            else:
                for each in (slot, after):
                    coupler.freeze(each, "is repeated a computed number of times")


@rule("DepthToSpace", "SpaceToDepth")
class PixelShuffle(Rule):
    """Channels become pixels or the other way round: the channels of all pixels of a block go together."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        data, result = node.inputs[0].name, node.outputs[0].name
        deep, flat = (data, result) if node.op == "DepthToSpace" else (result, data)
        size = coupler.size(deep, 1)
        area = int(node.attrs["blocksize"]) ** 2
        if size is None:
            return coupler.freeze_all(node, "its number of channels is not known")
        mode = node.attrs.get("mode", "DCR") if node.op == "DepthToSpace" else "DCR"
        positions = np.arange(size)
        channel = positions // area if mode == "CRD" else positions % (size // area)
        coupler.tie(Slot(deep, 1), positions, Slot(flat, 1), channel)
        for value in (data, result):
            for axis in (2, 3):
                coupler.freeze(Slot(value, axis), "positions, not channels")
        coupler.same(Slot(data, 0), Slot(result, 0))
