"""Coupling rules of operators that pick, join and add positions: Concat, Split, Slice, Pad, Gather, Resize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from eexform.ir.coupling import Coupler, Cut, Rule, Slot, rule
from eexform.ir.coupling_sizes import follows, guard, mend, numbers, put, size_chains
from eexform.ir.emit import Emitter
from eexform.ir.types import Dim

Content = Callable[[gs.Tensor | None], np.ndarray | None]
"""What a constant operand holds; ``None`` for anything else."""

_POSITIONS = "positions, not channels"


def others_same(coupler: Coupler, data: str, result: str, *, without: frozenset[int] | set[int]) -> None:
    """Axes stay as they are, but for some."""
    for slot in coupler.slots(data):
        if slot.axis not in without:
            coupler.same(slot, Slot(result, slot.axis))


def fixed(coupler: Coupler, slot: Slot) -> int | None:
    """Positions of an axis that can be picked by number: ``None`` where it holds samples, too (``"3*N"``)."""
    dim = (coupler.shape(slot.value) or ())[slot.axis]
    return dim if isinstance(dim, int) else None


@rule("Concat")
class Concat(Rule):
    """The positions of each operand follow those of the one before it."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        result = node.outputs[0].name
        axis = int(node.attrs["axis"]) % coupler.rank(result)
        whole = Slot(result, axis)
        sizes = [fixed(coupler, Slot(tensor.name, axis)) for tensor in node.inputs]
        at = 0
        for tensor, size in zip(node.inputs, sizes, strict=True):
            others_same(coupler, tensor.name, result, without={axis})
            part = Slot(tensor.name, axis)
            if None in sizes or size is None:
                coupler.freeze(part, "is joined with an axis of unknown size")
                coupler.freeze(whole, "is joined from axes of unknown size")
            else:
                coupler.tie(part, np.arange(size), whole, at + np.arange(size))
                at += size


@rule("Split")
class Split(Rule):
    """The pieces' positions in order; the sizes of the pieces are mended."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        data = node.inputs[0].name
        axis = int(node.attrs.get("axis", 0)) % coupler.rank(data)
        whole = Slot(data, axis)
        pieces = [tensor.name for tensor in node.outputs if tensor.name]
        sizes = [fixed(coupler, Slot(piece, axis)) for piece in pieces]
        known = None not in sizes and fixed(coupler, whole) == sum(size for size in sizes if size is not None)
        known = known and (len(node.inputs) < 2 or coupler.array(node.inputs[1]) is not None)
        at = 0
        for piece, size in zip(pieces, sizes, strict=True):
            others_same(coupler, data, piece, without={axis})
            if known and size is not None:
                coupler.tie(whole, at + np.arange(size), Slot(piece, axis), np.arange(size))
                at += size
            else:
                coupler.freeze(Slot(piece, axis), "is a piece of unknown size")
        if not known:
            coupler.freeze(whole, "is split into pieces of unknown sizes")
        elif max(size or 0 for size in sizes) == 1:
            coupler.freeze(whole, "is split into single positions")

    def rewrite(self, node: gs.Node, cut: Cut, emitter: Emitter) -> None:
        axis = int(node.attrs.get("axis", 0)) % len(cut.shape(node.inputs[0].name))
        if not cut.is_cut(Slot(node.inputs[0].name, axis)):
            return
        sizes = np.array([cut.shape(tensor.name)[axis] for tensor in node.outputs], np.int64)
        node.attrs.pop("num_outputs", None)
        if len(node.inputs) > 1:
            cut.replace(node, 1, sizes)
        else:
            node.inputs.append(emitter.constant(f"{node.name}.split", sizes))


@rule("Slice")
class Slice(Rule):
    """A stretch of positions; its bounds are mended. Strided and computed stretches are frozen."""

    follows_sizes = True

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        data, result = node.inputs[0].name, node.outputs[0].name
        bounds = _bounds(node, coupler.shape(data) or (), partial(numbers, coupler.graph))
        guard(coupler, node.inputs[1:], (), f"Slice {node.name!r}")
        if bounds is None:
            return coupler.freeze_all(node, "its axes are computed")
        others_same(coupler, data, result, without=set(bounds))
        for axis, taken in bounds.items():
            before, after = Slot(data, axis), Slot(result, axis)
            if taken is None or fixed(coupler, before) is None:
                for slot in (before, after):
                    coupler.freeze(slot, "is sliced by computed bounds")
            elif taken == range(len(taken)) and len(taken) == fixed(coupler, before):
                coupler.same(before, after)
            elif len(taken) < 2 or abs(taken.step) != 1:
                for slot in (before, after):
                    coupler.freeze(slot, "is picked or sliced with a stride")
            else:
                coupler.tie(before, np.array(taken), after, np.arange(len(taken)))
                coupler.keep(before)

    def rewrite(self, node: gs.Node, cut: Cut, emitter: Emitter) -> None:
        old = cut.graph.flow.nodes[node.name]
        data = node.inputs[0].name
        bounds = _bounds(old, _shape_before(cut, data), partial(numbers, cut.graph)) or {}
        starts, ends = (numbers(cut.graph, tensor) for tensor in old.inputs[1:3])
        if starts is None or ends is None:
            return
        changed = False
        starts, ends = starts.copy(), ends.copy()
        for place, (axis, taken) in enumerate(bounds.items()):
            slot = Slot(data, axis)
            if taken is None or not cut.is_cut(slot):
                continue
            kept = np.flatnonzero(np.isin(cut.kept(slot), np.array(taken)))
            if taken.step < 0:  # down to the first: "before -1" has to be said as a very small number
                starts[place], ends[place] = kept[-1], kept[0] - 1 if kept[0] else np.iinfo(np.int64).min
            else:
                starts[place], ends[place] = kept[0], kept[-1] + 1
            changed = True
        if changed:
            put(node, 1, starts, cut, emitter)
            put(node, 2, ends, cut, emitter)


def _shape_before(cut: Cut, value: str) -> tuple[Dim, ...]:
    constant = cut.graph.constants.get(value)
    return tuple(constant.shape) if constant is not None else tuple(cut.graph.types[value].shape or ())


def _bounds(node: gs.Node, shape: Sequence[Dim], array: Content) -> dict[int, range | None] | None:
    """What is taken of each axis, in the operands' order; ``None`` for computed bounds (of an axis, of all)."""
    starts, ends = (array(tensor) for tensor in node.inputs[1:3])
    given = node.inputs[3] if len(node.inputs) > 3 and not node.inputs[3].is_empty() else None
    pace = node.inputs[4] if len(node.inputs) > 4 and not node.inputs[4].is_empty() else None
    axes, steps = array(given), array(pace)
    if given is not None and axes is None:
        return None
    if axes is None:
        count = len(starts) if starts is not None else len(ends) if ends is not None else None
        if count is None:
            return None
        axes = np.arange(count)
    found: dict[int, range | None] = {}
    for place, axis in enumerate(int(axis) % len(shape) for axis in axes.reshape(-1)):
        size = shape[axis]
        if starts is None or ends is None or (pace is not None and steps is None) or not isinstance(size, int):
            found[axis] = None
            continue
        step = 1 if steps is None else int(steps.reshape(-1)[place])
        start, end = int(starts.reshape(-1)[place]), int(ends.reshape(-1)[place])
        last = None if step < 0 and end < -size else end
        found[axis] = range(*slice(start, last, step).indices(size))
    return found


@rule("Pad")
class Pad(Rule):
    """New positions before and after; they may go one by one, and the amounts are mended."""

    follows_sizes = True

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        data, result = node.inputs[0].name, node.outputs[0].name
        amounts = self._amounts(node, coupler.rank(data), partial(numbers, coupler.graph))
        guard(coupler, node.inputs[1:], (), f"Pad {node.name!r}")
        for slot in coupler.slots(data):
            after = Slot(result, slot.axis)
            before, behind = amounts[slot.axis] if amounts is not None else (None, None)
            size, width = fixed(coupler, slot), fixed(coupler, after)
            if before == behind == 0:
                coupler.same(slot, after)
            elif before is None or behind is None or size is None or width != size + before + behind:
                for each in (slot, after):
                    coupler.freeze(each, "is padded by a computed amount")
            elif min(before, behind) < 0 or node.attrs.get("mode", "constant") != "constant":
                for each in (slot, after):
                    coupler.freeze(each, "is padded with what lies at its borders")
            else:
                coupler.tie(slot, np.arange(size), after, before + np.arange(size))
                coupler.keep(after)

    def rewrite(self, node: gs.Node, cut: Cut, emitter: Emitter) -> None:
        old = cut.graph.flow.nodes[node.name]
        data, result = node.inputs[0].name, node.outputs[0].name
        rank = len(cut.shape(data))
        amounts = self._amounts(old, rank, partial(numbers, cut.graph))
        given = numbers(cut.graph, old.inputs[1])
        if amounts is None or given is None:
            return
        axes = list(amounts)[: len(given) // 2]
        wanted = given.copy()
        for place, axis in enumerate(axes):
            before, behind = amounts[axis]
            if (before or behind) and cut.is_cut(Slot(result, axis)):
                kept = cut.kept(Slot(result, axis))
                size = len(cut.kept(Slot(data, axis)))
                wanted[place] = np.count_nonzero(kept < before)
                wanted[place + len(axes)] = len(kept) - size - wanted[place]
        if not np.array_equal(wanted, given):
            put(node, 1, wanted, cut, emitter)

    @staticmethod
    def _amounts(node: gs.Node, rank: int, array: Content) -> dict[int, tuple[int, int]] | None:
        """Positions added before and behind each axis, in the operand's order; ``None`` where they are computed."""
        added = array(node.inputs[1])
        given = node.inputs[3] if len(node.inputs) > 3 and not node.inputs[3].is_empty() else None
        axes = list(range(rank)) if given is None else array(given)
        if added is None or axes is None:
            return None
        axes = [int(axis) % rank for axis in axes]
        found = {axis: (int(added[i]), int(added[i + len(axes)])) for i, axis in enumerate(axes)}
        return found | {axis: (0, 0) for axis in range(rank) if axis not in found}


@rule("Gather")
class Gather(Rule):
    """Positions by number: constant ones are mended, a single one is frozen, and so are rows looked up by content.

    What the other axes hold goes through; of a constant that is an embedding's width.
    """

    follows_sizes = True

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        data, indices, result = (tensor.name for tensor in (*node.inputs, node.outputs[0]))
        axis = int(node.attrs.get("axis", 0)) % coupler.rank(data)
        chosen, rank = coupler.array(node.inputs[1]), coupler.rank(indices)
        guard(coupler, node.inputs[1:], (), f"Gather {node.name!r}")
        for slot in coupler.slots(data):
            if slot.axis != axis:
                after = slot.axis if slot.axis < axis else slot.axis + rank - 1
                coupler.same(slot, Slot(result, after))
                if coupler.is_constant(data) and chosen is None:
                    coupler.role(slot, "table")
                    coupler.kind(slot, "embedding")
        size = fixed(coupler, Slot(data, axis))
        if chosen is not None and chosen.ndim == 1 and chosen.size > 1 and size is not None:
            coupler.tie(Slot(data, axis), chosen % size, Slot(result, axis), np.arange(chosen.size))
            coupler.keep(Slot(data, axis))
            coupler.same(Slot(indices, 0), Slot(result, axis))
            return
        coupler.freeze(Slot(data, axis), "is picked by number" if chosen is not None else "is looked up by content")
        for number in range(rank):
            if chosen is None and coupler.is_data(indices):
                coupler.same(Slot(indices, number), Slot(result, axis + number))
            coupler.freeze(Slot(result, axis + number), _POSITIONS)

    def rewrite(self, node: gs.Node, cut: Cut, emitter: Emitter) -> None:
        chosen = cut.array(cut.graph.flow.nodes[node.name].inputs[1])
        data, result = node.inputs[0].name, node.outputs[0].name
        axis = int(node.attrs.get("axis", 0)) % len(cut.shape(data))
        before, after = Slot(data, axis), Slot(result, axis)
        if chosen is None or chosen.ndim != 1 or not (cut.is_cut(before) or cut.is_cut(after)):
            return
        size = int(_shape_before(cut, data)[axis] or 0)
        wanted = np.searchsorted(cut.kept(before), (chosen % size)[cut.kept(after)])
        cut.replace(node, 1, wanted.astype(chosen.dtype))


@rule("GatherND")
class GatherND(Rule):
    """Leading axes are looked up; what is behind them goes through (tables of relative positions)."""

    follows_sizes = True

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        data, indices, result = (tensor.name for tensor in (*node.inputs, node.outputs[0]))
        shape, batches = coupler.shape(indices) or (), int(node.attrs.get("batch_dims", 0))
        depth = shape[-1] if shape else None
        if batches or not isinstance(depth, int):
            return coupler.freeze_all(node, "its indices have batches or an unknown depth")
        guard(coupler, node.inputs[1:], (), f"GatherND {node.name!r}")
        behind = coupler.rank(data) - depth
        for axis in range(behind):
            slot = Slot(data, depth + axis)
            coupler.same(slot, Slot(result, coupler.rank(result) - behind + axis))
            coupler.role(slot, "table")
        for axis in range(depth):
            coupler.freeze(Slot(data, axis), "is looked up by content")
        for axis in range(coupler.rank(result) - behind):
            coupler.freeze(Slot(result, axis), _POSITIONS)


@rule("Resize", "Upsample")
class Resize(Rule):
    """Axes that keep their size go through; the others are space. Sizes that name the channels are mended."""

    follows_sizes = True

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        data, result = node.inputs[0].name, node.outputs[0].name
        before, after = coupler.shape(data) or (), coupler.shape(result) or ()
        for slot, one, two in zip(coupler.slots(data), before, after, strict=True):
            if one == two and (slot.axis < 2 or isinstance(one, str)):
                coupler.same(slot, Slot(result, slot.axis))
            else:
                for value in (data, result):
                    coupler.freeze(Slot(value, slot.axis), _POSITIONS)
        own = (*coupler.slots(data), *coupler.slots(result))
        coupler.defer(partial(guard, coupler, node.inputs[1:], own, f"{node.op} {node.name!r}"))
        sizes = _sizes_operand(node)
        if sizes is not None and size_chains(coupler.graph).elements(sizes) is None:
            for slot in own:
                coupler.freeze(slot, "is resized to computed sizes")

    def rewrite(self, node: gs.Node, cut: Cut, emitter: Emitter) -> None:
        sizes = _sizes_operand(cut.graph.flow.nodes[node.name])
        if sizes is None:
            return
        after = cut.shape(node.outputs[0].name)
        axes = node.attrs.get("axes") or list(range(len(after)))
        wanted: list[int | None] = []
        for axis, element in zip(axes, size_chains(cut.graph).elements(sizes) or (), strict=True):
            dim = after[axis]
            fits = follows(element, cut) == dim or not cut.is_cut(Slot(node.outputs[0].name, axis))
            wanted.append(None if fits or not isinstance(dim, int) else dim)
        mend(node, 3, wanted, cut, emitter)


def _sizes_operand(node: gs.Node) -> gs.Tensor | None:
    return node.inputs[3] if len(node.inputs) > 3 and not node.inputs[3].is_empty() else None


@rule("ReverseSequence", "Trilu")
class AlongAxes(Rule):
    """The order of positions matters along some axes; the others go through."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        data, result = node.inputs[0].name, node.outputs[0].name
        rank = coupler.rank(data)
        ordered = {rank - 2, rank - 1}
        if node.op == "ReverseSequence":
            ordered = {int(node.attrs.get("batch_axis", 1)), int(node.attrs.get("time_axis", 0))}
        others_same(coupler, data, result, without=ordered)
        for axis in ordered:
            for value in (data, result):
                coupler.freeze(Slot(value, axis), "the order of positions matters")
