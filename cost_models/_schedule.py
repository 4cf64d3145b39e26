"""In which order to run a program's steps so that little is held at a time.

What is live depends only on *which* steps have run, not on their order. So a program falls apart, at every step that
has to run after all before it and before all behind it, into parts that can be ordered one by one. A part is ordered by

1. two heuristics: always the step that leaves the least behind it (list scheduling), and depth-first, of several
   operands the one first whose making needs most beyond what it leaves (best for trees: Liu, "On the storage
   requirement in the out-of-core multifrontal method for sparse factorization", 1986);
2. a search over the sets of steps that may have run, the cheapest peak first, which is exact where it ends within
   :data:`MOVES` (the recursion of Liberis & Lane, "Neural networks on microcontrollers: saving memory at inference via
   operator reordering", 2019, arXiv:1910.05110, explored best-first and bounded by the heuristics' peak).

The least number of bytes at a time is NP-hard to find in general.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import networkx as nx

from eexform.cost_models._lifetimes import Program, readers

MOVES = 200_000
"""Steps tried in all parts together before the search gives up, half of what is left in each; some two seconds."""


@dataclass(frozen=True)
class Schedule:
    """An order of steps.

    Attributes:
        order: numbers of steps.
        exact: no order of these steps holds less at its worst moment.
    """

    order: tuple[int, ...]
    exact: bool


def best_order(program: Program, *, moves: int = MOVES) -> Schedule:
    """The order with the least live bytes that is found; where nothing better is found, the file's."""
    needs = _dependencies(program)
    waiting = readers(program)
    live = sum(b.bytes for b, left in zip(program.buffers, waiting, strict=True) if b.fed and (left or b.held))
    order: list[int] = []
    exact = True
    for steps in _parts(program, needs):
        part = _Part(program, steps, needs, waiting, live, -(-moves // 2))
        chosen, proven = part.solve()
        order += chosen
        exact, moves = exact and proven, moves // 2 + part.moves
        live = part.after(live)
        for step in steps:
            for number in program.steps[step].reads:
                waiting[number] -= 1
    return Schedule(tuple(order), exact)


def _dependencies(program: Program) -> list[tuple[int, ...]]:
    """Per step, those that make what it reads."""
    maker = {number: place for place, step in enumerate(program.steps) for number in step.writes}
    return [tuple(sorted({maker[n] for n in step.reads if n in maker})) for step in program.steps]


def _parts(program: Program, needs: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Stretches of steps, each ending with a step that no step can trade places with (or with its stage)."""
    size = len(program.steps)
    after: list[list[int]] = [[] for _ in range(size)]
    for step, before in enumerate(needs):
        for other in before:
            after[other].append(step)
    stages = [step.stage for step in program.steps]
    lowest = _only_ends(range(size), needs, stages)  # all before it in its stage lead to it
    highest = _only_ends(range(size - 1, -1, -1), after, stages)  # it leads to all behind it in its stage
    part: list[int] = []
    for step in range(size):
        part.append(step)
        if (lowest[step] and highest[step]) or step + 1 == size or stages[step + 1] != stages[step]:
            yield part
            part = []


def _only_ends(walk: range, links: Sequence[Sequence[int]], stages: Sequence[int]) -> list[bool]:
    """Per step, whether every other one of its stage that was walked before it leads to it.

    Walked in topological order, a step is reached by all others of its stage if it links to each that nothing was
    linked to so far.
    """
    found = [False] * len(links)
    loose: set[int] = set()
    stage: int | None = None
    for step in walk:
        if stages[step] != stage:
            stage, loose = stages[step], set()
        loose.difference_update(links[step])
        found[step] = not loose
        loose.add(step)
    return found


class _State(NamedTuple):
    """Bit sets of the steps that have run and of those that can run next, and the bytes held."""

    done: int
    ready: int
    live: int


def _members(bits: int) -> Iterator[int]:
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


class _Part:
    """Steps that are ordered among themselves; inside, steps and buffers have numbers of their own."""

    def __init__(
        self,
        program: Program,
        steps: Sequence[int],
        needs: Sequence[Sequence[int]],
        waiting: Sequence[int],
        live: int,
        moves: int,
    ) -> None:
        self.steps, self.live, self.moves = steps, live, moves
        here = {step: place for place, step in enumerate(steps)}
        self.before = [sum(1 << here[n] for n in needs[step] if n in here) for step in steps]
        self.operands = [[here[n] for n in needs[step] if n in here] for step in steps]
        self.behind: list[list[int]] = [[] for _ in steps]
        for place, operands in enumerate(self.operands):
            for other in operands:
                self.behind[other].append(place)
        own = [program.steps[step] for step in steps]
        self.reads, self.writes, self.over = ([getattr(s, what) for s in own] for what in ("reads", "writes", "over"))
        touched = {number for step in own for number in (*step.reads, *step.writes)}
        self.bytes = {number: program.buffers[number].bytes for number in touched}
        self.readers = dict.fromkeys(touched, 0)  # buffer -> the part's steps that read it
        for place, step in enumerate(own):
            for number in step.reads:
                self.readers[number] |= 1 << place
        self.kept = {
            number
            for number in touched
            if program.buffers[number].held or waiting[number] > self.readers[number].bit_count()
        }
        self.everything = (1 << len(steps)) - 1

    def move(self, place: int, done: int, live: int) -> tuple[int, int]:
        """What is held during a step, and after it, when ``done`` have run before and ``live`` is held."""
        mine = 1 << place
        made = sum(self.bytes[number] for number in self.writes[place])
        dying = [n for n in self.reads[place] if n not in self.kept and not self.readers[n] & ~(done | mine)]
        freed = sum(self.bytes[number] for number in dying)
        unread = sum(self.bytes[n] for n in self.writes[place] if n not in self.kept and not self.readers[n])
        shared = next((self.bytes[number] for number in self.over[place] if number in dying), 0)
        return live + made - shared, live + made - freed - unread

    def after(self, live: int) -> int:
        """What is held when the part has run: the same in any order."""
        done = 0
        for place in range(len(self.steps)):
            live, done = self.move(place, done, live)[1], done | 1 << place
        return live

    def peak(self, order: Sequence[int]) -> int:
        done, live, peak = 0, self.live, 0
        for place in order:
            during, live = self.move(place, done, live)
            done, peak = done | 1 << place, max(peak, during)
        return peak

    def solve(self) -> tuple[list[int], bool]:
        """Steps in the order found, and whether it is proven the best."""
        best = list(range(len(self.steps)))
        if len(best) == 1:
            return [self.steps[0]], True
        least = self._least()
        peak = self.peak(best)
        for heuristic in (self._greedy, self._depth_first):
            if peak == least:
                break
            order = heuristic()
            if (found := self.peak(order)) < peak:
                best, peak = order, found
        proven = peak == least
        if not proven:
            better, proven = self._search(least, peak)
            best = better or best
        return [self.steps[place] for place in best], proven

    def _least(self) -> int:
        """No order holds less: what each step needs by itself, and what is kept in any case."""
        least = 0
        for place in range(len(self.steps)):
            made = sum(self.bytes[number] for number in self.writes[place])
            shared = max((self.bytes[n] for n in self.over[place] if n not in self.kept), default=0)
            least = max(least, made - shared + sum(self.bytes[number] for number in self.reads[place]))
        return max(least, self.live)

    # -- heuristics ----------------------------------------------------------------------------------------------------

    def _greedy(self) -> list[int]:
        """Always the step that leaves the least behind it, of equal ones that which holds less meanwhile."""
        done, live = 0, self.live
        order: list[int] = []
        current: dict[int, tuple[int, int, int]] = {}
        heap: list[tuple[int, int, int]] = []

        def offer(place: int) -> None:
            during, after = self.move(place, done, live)
            current[place] = (after - live, during - live, place)
            heapq.heappush(heap, current[place])

        for place, before in enumerate(self.before):
            if not before:
                offer(place)
        while heap:
            entry = heapq.heappop(heap)
            place = entry[2]
            if current.get(place) != entry:
                continue  # offered again since, when the last other reader of an operand ran
            del current[place]
            live = self.move(place, done, live)[1]
            done |= 1 << place
            order.append(place)
            for reader in self.behind[place]:
                if not self.before[reader] & ~done:
                    offer(reader)
            for number in self.reads[place]:
                left = self.readers[number] & ~done
                if left.bit_count() == 1 and left.bit_length() - 1 in current:
                    offer(left.bit_length() - 1)
        return order

    def _depth_first(self) -> list[int]:
        """Each step as late as what needs it allows, its operands by Liu's rule, as if the part were a tree."""
        graph = nx.DiGraph()
        end = len(self.steps)
        graph.add_nodes_from(range(end + 1))
        spare = [0] * end  # what making a step's results needs at its worst moment, beyond what they leave
        for place in range(end):
            operands = self.operands[place]
            graph.add_edges_from((place, other) for other in operands)
            held, worst = 0, 0
            for other in sorted(operands, key=lambda p: -spare[p]):
                size = self._size(other)
                worst, held = max(worst, held + size + spare[other]), held + size
            spare[place] = max(worst, held + self._size(place)) - self._size(place)
        graph.add_edges_from((end, place) for place in range(end) if not self.behind[place])
        walk = nx.dfs_postorder_nodes(graph, end, sort_neighbors=lambda nodes: sorted(nodes, key=lambda p: -spare[p]))
        return [place for place in walk if place != end]

    def _size(self, place: int) -> int:
        return sum(self.bytes[number] for number in self.writes[place])

    # -- exact ---------------------------------------------------------------------------------------------------------

    def _search(self, least: int, bound: int) -> tuple[list[int] | None, bool]:
        """An order with a peak below ``bound``: the best there is, or ``None``; whether the search came to its end.

        A step that leaves no more behind it than was there, and holds no more than the peak so far, is taken at once
        and alone: whatever would run before it holds no more behind it (its operands are free earlier, and what can be
        written over an operand then still can), so no order is lost that is better.
        """
        ticket = count()
        origin: dict[
            int, tuple[int, tuple[int, ...]]
        ] = {}  # what has run -> what had run before, and the steps between
        ready = sum(1 << place for place, operands in enumerate(self.operands) if not operands)
        heap: list[tuple[int, int, int, _State, int, tuple[int, ...]]]
        heap = [(least, 0, next(ticket), _State(0, ready, self.live), 0, ())]
        while heap:
            peak, _, _, state, parent, steps = heapq.heappop(heap)
            if state.done in origin:
                continue
            origin[state.done] = parent, steps
            if state.done == self.everything:
                return self._trace(origin), True
            for place in _members(state.ready):
                if self.moves <= 0:
                    return None, False
                self.moves -= 1
                during, after = self.move(place, state.done, state.live)
                if max(peak, during) >= bound:
                    continue
                then, ran = self._eager(self._step(state, place, after), max(peak, during))
                if then.done not in origin:
                    rank = max(peak, during), -then.done.bit_count(), next(ticket)
                    heapq.heappush(heap, (*rank, then, state.done, (place, *ran)))
        return None, True

    def _step(self, state: _State, place: int, live: int) -> _State:
        done = state.done | 1 << place
        ready = state.ready & ~(1 << place)
        for other in self.behind[place]:
            if not self.before[other] & ~done:
                ready |= 1 << other
        return _State(done, ready, live)

    def _eager(self, state: _State, peak: int) -> tuple[_State, list[int]]:
        """The steps that are taken at once, and the state behind them."""
        ran: list[int] = []
        again = True
        while again:
            again = False
            for place in _members(state.ready):
                if self.moves <= 0:
                    return state, ran
                self.moves -= 1
                during, after = self.move(place, state.done, state.live)
                if after <= state.live and during <= peak:
                    ran.append(place)
                    state, again = self._step(state, place, after), True
        return state, ran

    def _trace(self, origin: dict[int, tuple[int, tuple[int, ...]]]) -> list[int]:
        done = self.everything
        order: list[int] = []
        while done:
            done, steps = origin[done]
            order = [*steps, *order]
        return order
