"""Cached columns of plans in which an exit depends on the exits before it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from eexform.ir import measures, policy
from eexform.search.judge import Judge
from eexform.search.scores import HeadScores

BUDGET = 256 << 20
"""Bytes of states, and of what is derived from them, that are kept; the least recently used go first."""

Key = tuple[str, float, tuple[int, ...]]


class PathColumns:
    """Confidence and correctness at each exit of a plan.

    What an exit says depends on the heads passed so far where scores are carried on (``carry > 0``) or where the
    measure accumulates what gates say; never on thresholds. Plans that begin with the same heads share it, and a search
    meets the same beginnings again and again. Where nothing depends on the heads before, every path to a head shares.
    """

    def __init__(
        self, scores: HeadScores, heads: Sequence[tuple[str, str]], judge: Judge, budget: int = BUDGET
    ) -> None:
        self._scores = scores
        self._heads = tuple(heads)
        self._judge = judge
        self._budget = budget
        self._kept: OrderedDict[Key, tuple[np.ndarray, ...]] = OrderedDict()
        self._held = 0

    def confidence(self, carry: float, heads: tuple[int, ...], measure: str) -> np.ndarray:
        """Confidence at the last of ``heads`` after passing the others, float32 [samples]."""
        if measures.is_learned(measure):
            return self._gated(heads, measure)
        path = _path(carry, heads)

        def make() -> tuple[np.ndarray, ...]:
            # carried states are tempered already
            temperature = 1.0 if carry else self._scores.temperatures[self._heads[heads[-1]]]
            probabilities = measures.to_probabilities(self._state(carry, path), self._scores.scores, temperature)
            return (measures.get(measure).confidence(probabilities),)

        return self._get((measure, carry, path), make)[0]

    def answers(self, carry: float, heads: tuple[int, ...], *, final: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """What the last of ``heads``, or the final exit behind them all, gets right (bool) and its credit (float64)."""
        path = _path(carry, heads, final=final)

        def make() -> tuple[np.ndarray, ...]:
            predicted = self._state(carry, path, final=final).argmax(axis=1)
            return self._judge.right(predicted), self._judge.credit(predicted)

        right, credit = self._get(("final answers" if final else "answers", carry, path), make)
        return right, credit

    def _gated(self, heads: tuple[int, ...], measure: str) -> np.ndarray:
        rule = measures.get_gate(measure)
        path = heads if rule.sequential else heads[-1:]

        def make() -> tuple[np.ndarray, ...]:
            before = self._gated(path[:-1], measure) if len(path) > 1 else None
            return (rule.step(before, self._scores.gate(*self._heads[path[-1]])),)

        return self._get((measure, 0.0, path), make)[0]

    def _state(self, carry: float, path: tuple[int, ...], *, final: bool = False) -> np.ndarray:
        data = self._scores
        if not carry:
            return data.final if final else data.of(*self._heads[path[-1]])

        def make() -> tuple[np.ndarray, ...]:
            outputs = [data.of(*self._heads[head]) for head in path]
            temperatures = [data.temperatures[self._heads[head]] for head in path]
            if final:
                outputs.append(data.final)
                temperatures.append(data.final_temperature)
            before = path if final else path[:-1]
            if before and data.scores == "logits":
                # state = carry * state before + scores / temperature: one step from the state of the shorter path
                outputs = [self._state(carry, before), outputs[-1]]
                temperatures = [1.0, temperatures[-1]]
            return (np.asarray(policy.carry_states(outputs, temperatures, carry, data.scores)[-1]),)

        return self._get(("final state" if final else "state", carry, path), make)[0]

    def _get(self, key: Key, make: Callable[[], tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
        """What is kept under ``key``, made where it is not; old entries go, the one in use, which came last, stays."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = self._kept[key] = make()
        self._held += sum(array.nbytes for array in made)
        while self._held > self._budget and len(self._kept) > 1:
            _, gone = self._kept.popitem(last=False)
            self._held -= sum(array.nbytes for array in gone)
        return made


def _path(carry: float, heads: tuple[int, ...], *, final: bool = False) -> tuple[int, ...]:
    """The heads that scores at the end of a path depend on."""
    return heads if carry else () if final else heads[-1:]
