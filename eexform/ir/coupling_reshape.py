"""Coupling rules of Reshape and Flatten: axes that are split and merged.

The sizes before and after are cut into common *factors* (as Torch's ``view`` thinks of strides): ``[N, 12, 8]`` to
``[N, 3, 4, 8]`` has the factors N, 3, 4, 8. An axis made of several factors is cut evenly: by one of its factors, at
every index of the others. So of the factors that share an axis one is *live* and the others are frozen: attention
heads rather than the features within a head, channels rather than the two halves of a shuffle. The choice is made when
all other operators have spoken; what is frozen or chosen elsewhere on the way decides it, so a merge follows its split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from weakref import WeakKeyDictionary

import numpy as np
import onnx_graphsurgeon as gs

from eexform.errors import GraphError
from eexform.ir.coupling import Coupler, Cut, Rule, Slot, positions_of, rule
from eexform.ir.coupling_sizes import Element, follows, guard, mend, size_chains
from eexform.ir.emit import Emitter
from eexform.ir.inference import split_dim
from eexform.ir.types import Dim

_LARGE = (1_000_000_007, 1_000_000_009, 1_000_000_021, 1_000_000_033, 1_000_000_087)
"""Primes that stand for symbols: no product of real sizes is one by chance."""


@dataclass(frozen=True)
class Axis:
    """One axis of one side as consecutive factors.

    Attributes:
        slot: the axis.
        factors: indices into the factors of the block, outermost first.
    """

    slot: Slot
    factors: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """Neighbouring axes before and after that hold the same elements in the same order.

    Attributes:
        axes: those before and after.
        sizes: size of each factor; 0 for one that is not a number, such as the batch.
    """

    axes: tuple[Axis, ...]
    sizes: tuple[int, ...]

    def positions(self, axis: Axis, factor: int) -> np.ndarray:
        """Index along ``factor`` of every position of ``axis``."""
        inner = 1
        for other in reversed(axis.factors):
            if other == factor:
                break
            inner *= max(self.sizes[other], 1)
        count = int(np.prod([max(self.sizes[other], 1) for other in axis.factors], dtype=np.int64))
        return (np.arange(count) // inner) % self.sizes[factor]

    def holders(self, factor: int) -> list[Axis]:
        """The axes that the factor is part of."""
        return [axis for axis in self.axes if factor in axis.factors]

    def numbers(self, axis: Axis) -> list[int]:
        """The factors of an axis that are numbers."""
        return [factor for factor in axis.factors if self.sizes[factor]]

    def regular(self, axis: Axis) -> bool:
        """Whether factors that are no numbers come first in the axis, as the positions of ``"3*N"`` have it."""
        symbols = [factor for factor in axis.factors if not self.sizes[factor]]
        return tuple(symbols) == axis.factors[: len(symbols)]


def blocks(before: Sequence[Dim], after: Sequence[Dim], data: str, result: str) -> list[Block] | None:
    """Factor a reshape; axes of size 1 are in no block.

    Args:
        before: shape of ``data``.
        after: shape of ``result``.
        data: name of the operand.
        result: name of the result.

    Returns:
        The blocks in order; one whose sizes have no common factors has none. ``None`` where a size is not known.
    """
    symbols: dict[str, int] = {}
    sides: list[list[tuple[Slot, int]]] = []
    for value, shape in ((data, before), (result, after)):
        side = []
        for axis, dim in enumerate(shape):
            number = _number(dim, symbols)
            if number is None:
                return None
            if number != 1:
                side.append((Slot(value, axis), number))
        sides.append(side)
    if _product(sides[0]) != _product(sides[1]) or 0 in (_product(sides[0]), _product(sides[1])):
        return None
    found = []
    ahead = [list(reversed(side)) for side in sides]
    while ahead[0] and ahead[1]:
        taken = [[ahead[0].pop()], [ahead[1].pop()]]
        while _product(taken[0]) != _product(taken[1]):
            shorter = 0 if _product(taken[0]) < _product(taken[1]) else 1
            taken[shorter].append(ahead[shorter].pop())
        found.append(_block(taken))
    return found


def _number(dim: Dim, symbols: dict[str, int]) -> int | None:
    if isinstance(dim, int):
        return dim
    if dim is None:
        return None
    factor, symbol = split_dim(dim)
    if symbol not in symbols and len(symbols) == len(_LARGE):
        return None
    return factor * symbols.setdefault(symbol, _LARGE[len(symbols) % len(_LARGE)])


def _product(side: Sequence[tuple[Slot, int]]) -> int:
    product = 1
    for _, number in side:
        product *= number
    return product


def _block(sides: Sequence[Sequence[tuple[Slot, int]]]) -> Block:
    """Factors are what lies between neighbouring strides of either side; each must divide the next."""
    strides = {1}
    for side in sides:
        stride = 1
        for _, number in reversed(side):
            stride *= number
            strides.add(stride)
    levels = sorted(strides, reverse=True)
    axes = tuple(Axis(slot, ()) for side in sides for slot, _ in side)
    if any(large % small for large, small in pairwise(levels)):
        return Block(axes, ())
    sizes = [large // small for large, small in pairwise(levels)]
    if any(size % prime == 0 and size != prime for size in sizes for prime in _LARGE):
        sizes, levels = _apart(sizes)
    made: list[Axis] = []
    for side in sides:
        stride = 1
        axes_here = []
        for slot, number in reversed(side):
            inside = [place for place, level in enumerate(levels[:-1]) if stride * number >= level > stride]
            axes_here.append(Axis(slot, tuple(inside)))
            stride *= number
        made += reversed(axes_here)
    return Block(tuple(made), tuple(0 if size in _LARGE else size for size in sizes))


def _apart(sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Factors such as ``3*N`` as N times 3: the order that the positions of such an axis have."""
    split: list[int] = []
    for size in sizes:
        number = size
        for prime in _LARGE:
            while number % prime == 0:
                split.append(prime)
                number //= prime
        if number != 1:
            split.append(number)
    levels = [1]
    for size in reversed(split):
        levels.append(levels[-1] * size)
    return split, levels[::-1]


def couple_blocks(coupler: Coupler, found: Sequence[Block], why: str) -> None:
    """Tie single factors at once, choose among the others when all nodes have spoken."""
    for block in found:
        if not block.sizes:
            for axis in block.axes:
                coupler.freeze(axis.slot, "is reshaped to sizes without common factors")
        elif all(len(block.numbers(axis)) < 2 for axis in block.axes):
            _tie(coupler, block, why)
        else:
            for axis in block.axes:
                coupler.keep(axis.slot)
            coupler.defer(partial(_choose, coupler, block, why))


def _tie(coupler: Coupler, block: Block, why: str) -> None:
    """Tie a block in which every axis has one number at most: nothing to choose."""
    for factor, size in enumerate(block.sizes):
        holders = block.holders(factor)
        regular = all(block.regular(axis) for axis in holders)
        for axis in holders if size else ():
            if regular:
                coupler.same(holders[0].slot, axis.slot)
            else:
                coupler.freeze(axis.slot, why)


def _choose(coupler: Coupler, block: Block, why: str) -> None:
    """Pick live factors, tie their positions, freeze the rest."""
    closed = {factor for factor, size in enumerate(block.sizes) if not size}
    for axis in block.axes:
        numbers = block.numbers(axis)
        if coupler.is_frozen(axis.slot) or not block.regular(axis):
            closed.update(numbers)
    heads = _heads(coupler, block) - closed
    order = sorted(
        (factor for factor in range(len(block.sizes)) if factor not in closed),
        key=lambda factor: (factor in heads, block.sizes[factor], factor),
        reverse=True,
    )
    live: set[int] = set()
    for factor in order:
        if all(live.isdisjoint(axis.factors) for axis in block.holders(factor)):
            live.add(factor)
    for axis in block.axes:
        if live.isdisjoint(axis.factors) and coupler.size(axis.slot.value, axis.slot.axis) is not None:
            coupler.freeze(axis.slot, why if live else "is split or merged with axes none of which may be cut")
    for factor in sorted(live):
        holders = sorted(block.holders(factor), key=lambda axis: len(axis.factors))
        first = holders[0]
        index = block.positions(first, factor)
        _, leader = np.unique(index, return_index=True)  # the first position of each index
        if len(index) > len(leader):
            coupler.join(first.slot, np.arange(len(index)), leader[index])
        for other in holders[1:]:
            if len(block.numbers(first)) == len(block.numbers(other)) == 1:
                coupler.same(first.slot, other.slot)
                continue
            index = block.positions(other, factor)
            coupler.tie(other.slot, np.arange(len(index)), first.slot, leader[index])
        if factor in heads:
            coupler.kind(first.slot, "heads")


def _heads(coupler: Coupler, block: Block) -> set[int]:
    """The factors that are attention heads somewhere."""
    marked = {coupler.axis_class(slot) for slot in head_slots(coupler)} - {None}
    found = set()
    for axis in block.axes:
        numbers = block.numbers(axis)
        if len(numbers) == 1 and coupler.axis_class(axis.slot) in marked:
            found.update(numbers)
    return found


_head_slots: WeakKeyDictionary[Coupler, list[Slot]] = WeakKeyDictionary()


def head_slots(coupler: Coupler) -> list[Slot]:
    """Axes of attention heads: the batch axes of products of two computed values, heads of Attention operators."""
    if coupler not in _head_slots:
        found = []
        for name in coupler.flow.topological:
            node = coupler.flow.nodes[name]
            if node.op == "MatMul" and len(coupler.flow.data_inputs(name)) == 2:
                found += [Slot(node.outputs[0].name, axis) for axis in range(coupler.rank(node.outputs[0].name) - 2)]
            elif node.op == "Attention" and coupler.rank(node.inputs[0].name) == 4:
                found.append(Slot(node.inputs[0].name, 1))
        _head_slots[coupler] = [slot for slot in found if coupler.size(slot.value, slot.axis) is not None]
    return _head_slots[coupler]


@rule("Reshape")
class Reshape(Rule):
    """Numbers in the target are mended; where its sizes are computed, it is written anew if nothing else helps."""

    follows_sizes = True

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        data, result = node.inputs[0].name, node.outputs[0].name
        before, after = coupler.shape(data), coupler.shape(result)
        found = None if before is None or after is None else blocks(before, after, data, result)
        if before is None or after is None or found is None:
            return coupler.freeze_all(node, "is reshaped to sizes that are not known")
        for slot in (*coupler.slots(data), *coupler.slots(result)):
            if coupler.size(slot.value, slot.axis) == 1:
                coupler.keep(slot)
        couple_blocks(coupler, found, "shares an axis with what is cut instead")
        own = (*coupler.slots(data), *coupler.slots(result))
        coupler.defer(partial(guard, coupler, node.inputs[1:], own, f"Reshape {node.name!r}"))
        if literal(before, after) is None:
            coupler.defer(partial(_only_what_follows, coupler, node))

    def rewrite(self, node: gs.Node, cut: Cut, emitter: Emitter) -> None:
        elements = size_chains(cut.graph).elements(cut.graph.flow.nodes[node.name].inputs[1])
        before, after = cut.shape(node.inputs[0].name), cut.shape(node.outputs[0].name)
        old = cut.graph.types[node.inputs[0].name].shape or ()
        if elements is None:
            elements = [frozenset[Slot]()] * len(after)
        wrong = {place for place, element in enumerate(elements) if not self._fits(node, place, element, cut, old)}
        if not wrong:
            return
        if all(isinstance(elements[place], int) and isinstance(after[place], int) for place in wrong):
            numbers = [dim if place in wrong and isinstance(dim, int) else None for place, dim in enumerate(after)]
            return mend(node, 1, numbers, cut, emitter)
        target = literal(before, after)
        if target is None:
            raise GraphError(f"node {node.name!r} (Reshape): its target {list(after)} cannot be written as numbers")
        node.inputs[1] = emitter.constant(f"{node.name}.shape", target)
        node.attrs["allowzero"] = 0

    @staticmethod
    def _fits(node: gs.Node, place: int, element: Element, cut: Cut, old: Sequence[Dim]) -> bool:
        """Whether an element of the target says the right thing after the cut without being touched."""
        wanted = cut.shape(node.outputs[0].name)[place]
        if element == -1:
            return True
        if element == 0 and not node.attrs.get("allowzero", 0):
            return place < len(old) and cut.shape(node.inputs[0].name)[place] == wanted
        if isinstance(element, frozenset):
            return not cut.is_cut(Slot(node.outputs[0].name, place)) and not any(cut.is_cut(slot) for slot in element)
        return follows(element, cut) == wanted


def literal(before: Sequence[Dim], after: Sequence[Dim]) -> list[int] | None:
    """A shape as numbers: 0 for what is copied from the same place, -1 for one more size that is no number."""
    target: list[int] = []
    for place, dim in enumerate(after):
        if isinstance(dim, int):
            target.append(dim)
        elif place < len(before) and before[place] == dim:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None


def _only_what_follows(coupler: Coupler, node: gs.Node) -> None:
    """Freeze what would need another target, where none can be written."""
    result = node.outputs[0].name
    elements = size_chains(coupler.graph).elements(node.inputs[1])
    for slot in coupler.slots(result):
        element = None if elements is None or slot.axis >= len(elements) else elements[slot.axis]
        follows_alone = isinstance(element, Slot) and coupler.axis_class(element) == coupler.axis_class(slot)
        if element != -1 and not follows_alone:
            coupler.freeze(slot, "its size in the target cannot be mended")


@rule("Flatten")
class Flatten(Rule):
    """Two axes: all before ``axis``, all from there."""

    def couple(self, node: gs.Node, coupler: Coupler) -> None:
        data, result = node.inputs[0].name, node.outputs[0].name
        before, after = coupler.shape(data), coupler.shape(result)
        found = None if before is None or after is None else blocks(before, after, data, result)
        if found is None:
            return coupler.freeze_all(node, "is flattened from sizes that are not known")
        for slot in (*coupler.slots(data), *coupler.slots(result)):
            if positions_of((coupler.shape(slot.value) or ())[slot.axis]) == 1:
                coupler.keep(slot)
        couple_blocks(coupler, found, "shares an axis with what is cut instead")
