"""What is held while a program runs, and where an allocator puts it: buffers, steps, timelines, arenas.

A *step* is what a runtime executes as one call. A *buffer* is born by the step that writes it and is free again when
the last step that reads it has run; results are held to the end. Where a step may write its result over an operand that
nobody needs any more, the result takes that buffer over. A program is made by :mod:`eexform.cost_models._program`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Buffer:
    """Memory of one value and of the views of it.

    Attributes:
        values: their names.
        bytes: its size.
        fed: it is there before the first step: a graph input.
        held: it is there after the last step: a result.
    """

    values: tuple[str, ...]
    bytes: int
    fed: bool = False
    held: bool = False


@dataclass(frozen=True)
class Step:
    """One call; buffers are numbers.

    Attributes:
        name: node that makes the result; where nodes are fused, the last one.
        reads: each once.
        writes: the first is the one that may take over another.
        over: among ``reads``, what may be overwritten, in the order of preference; as large as the first of ``writes``.
        stage: steps of a stage run before those of the next.
    """

    name: str
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    over: tuple[int, ...] = ()
    stage: int = 0


@dataclass(frozen=True)
class Program:
    """What a runtime does with a graph.

    Attributes:
        steps: in the file's order, stage by stage.
        buffers: what they read and write.
        unknown: ``(node, operator)`` of what could not be counted.
    """

    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    unknown: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Block:
    """Buffers that follow each other in one place: ``bytes`` from step ``first`` to step ``last``, both included."""

    buffers: tuple[int, ...]
    bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Timeline:
    """What is held while the steps run.

    Attributes:
        order: numbers of steps.
        live: bytes held during each, operands and results included.
        blocks: what an allocator must place.
    """

    order: tuple[int, ...]
    live: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def peak(self) -> int:
        """The most that is held at a time: no allocator needs less for this order."""
        return max(self.live, default=sum(block.bytes for block in self.blocks))

    @property
    def busiest(self) -> int:
        """Position in ``order`` where that is, the first of several.

        Raises:
            ValueError: there are no steps.
        """
        return self.live.index(self.peak)


def timeline(program: Program, order: Sequence[int] | None = None) -> Timeline:
    """Let the steps run in ``order`` (default: the file's)."""
    steps, buffers = program.steps, program.buffers
    ran = tuple(range(len(steps)) if order is None else order)
    waiting = readers(program)
    blocks: list[list[int]] = []  # the buffers of each, in turn
    spans: list[list[int]] = []  # first and last step of each
    block_of: dict[int, int] = {}
    held = 0

    def born(number: int, at: int) -> int:
        block_of[number] = len(blocks)
        blocks.append([number])
        spans.append([at, at])
        return buffers[number].bytes

    for number, buffer in enumerate(buffers):
        if buffer.fed and (waiting[number] or buffer.held):
            held += born(number, 0)
    live = []
    for at, place in enumerate(ran):
        step = steps[place]
        over = taken_over(step, buffers, waiting)
        for number in step.writes:
            if over is not None and number == step.writes[0]:
                block_of[number] = block_of[over]
                blocks[block_of[over]].append(number)
            else:
                held += born(number, at)
        live.append(held)
        for number in step.reads:
            waiting[number] -= 1
        for number in (*step.reads, *step.writes):
            if not waiting[number] and not buffers[number].held:
                spans[block_of[number]][1] = at
                held -= 0 if number == over else buffers[number].bytes
    for number, block in block_of.items():
        if buffers[number].held:
            spans[block][1] = max(len(ran) - 1, 0)
    sized = [Block(tuple(chain), buffers[chain[0]].bytes, *span) for chain, span in zip(blocks, spans, strict=True)]
    return Timeline(ran, tuple(live), tuple(sized))


def readers(program: Program) -> list[int]:
    """Number of steps that read each buffer."""
    found = [0] * len(program.buffers)
    for step in program.steps:
        for number in step.reads:
            found[number] += 1
    return found


def taken_over(step: Step, buffers: Sequence[Buffer], waiting: Sequence[int]) -> int | None:
    """The operand that the step's result is written over; ``waiting`` counts the steps that still have to read."""
    for number in step.over:
        if waiting[number] == 1 and not buffers[number].held:
            return number
    return None


def place_blocks(blocks: Sequence[Block]) -> tuple[int, ...]:
    """Offset of each block in one arena: *greedy by size*.

    The largest block first, each into the smallest gap that holds it between the blocks placed before it whose time
    overlaps with its own, or behind them all (Pisarchyk & Lee, "Efficient memory management for deep neural net
    inference", 2020, arXiv:2001.03288; TensorFlow Lite and its micro version plan so). Quadratic, in numpy: 10,000
    blocks take about a second.
    """
    offsets = [0] * len(blocks)
    ranked = sorted(range(len(blocks)), key=lambda i: (-blocks[i].bytes, blocks[i].first, i))
    # what is placed so far, by offset: start, end, first step, last step
    placed = np.empty((4, 0), dtype=np.int64)
    for number in ranked:
        block = blocks[number]
        if not block.bytes:
            continue
        near = placed[:, (placed[2] <= block.last) & (placed[3] >= block.first)]
        ends = np.maximum.accumulate(near[1])
        before = np.concatenate([[0], ends])  # where a gap may begin
        gaps = near[0] - before[:-1]
        fitting = np.flatnonzero(gaps >= block.bytes)
        at = int(before[fitting[np.argmin(gaps[fitting])]] if fitting.size else before[-1])
        offsets[number] = at
        column = np.array([[at], [at + block.bytes], [block.first], [block.last]], dtype=np.int64)
        where = int(np.searchsorted(placed[0], at, side="right"))
        placed = np.concatenate([placed[:, :where], column, placed[:, where:]], axis=1)
    return tuple(offsets)


@dataclass(frozen=True)
class Memory:
    """What a graph needs in RAM.

    Attributes:
        program: steps and buffers.
        timeline: what is live during each step.
        found_by: where the order is from: ``file``, ``heuristic``, or ``exact``: no order holds less.
        constants: bytes of constants that lie in RAM.
    """

    program: Program
    timeline: Timeline
    found_by: str = "file"
    constants: int = 0

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Offset of each of ``timeline.blocks`` in the arena."""
        return place_blocks(self.timeline.blocks)

    @cached_property
    def arena(self) -> int:
        """Bytes from the arena's start to the end of its last block."""
        return self.high_water(0, len(self.timeline.order))

    @property
    def total(self) -> int:
        """Arena and constants."""
        return self.arena + self.constants

    @property
    def order(self) -> tuple[str, ...]:
        """The steps by name, as they run."""
        return tuple(self.program.steps[number].name for number in self.timeline.order)

    @property
    def node(self) -> str:
        """The step during which the most is live; empty where nothing runs."""
        return self.order[self.timeline.busiest] if self.timeline.order else ""

    def alive(self, position: int | None = None) -> dict[str, int]:
        """Values that are live during a step (default: the busiest) and their bytes, the largest first.

        Where a result is written over an operand, the operand is named.
        """
        if not self.timeline.order:
            return {}
        at = self.timeline.busiest if position is None else position
        when = {number: place for place, number in enumerate(self.timeline.order)}
        made = {n: when[place] for place, step in enumerate(self.program.steps) for n in step.writes}
        found = {}
        for block in self.timeline.blocks:
            if block.first <= at <= block.last and block.bytes:
                here = [number for number in block.buffers if made.get(number, 0) < max(at, 1)] or block.buffers[:1]
                found[self.program.buffers[here[-1]].values[0]] = block.bytes
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def high_water(self, begin: int, end: int) -> int:
        """How far the arena is in use during the steps at positions ``begin`` (included) to ``end`` (not included)."""
        ends = (
            at + block.bytes
            for block, at in zip(self.timeline.blocks, self.offsets, strict=True)
            if (block.first < end and block.last >= begin) or not self.timeline.order
        )
        return max(ends, default=0)
