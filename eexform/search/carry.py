"""Cached states of plans that carry scores from exit to exit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from eexform.ir import measures, policy
from eexform.search.judge import Judge
from eexform.search.scores import HeadScores

BUDGET = 256 << 20
"""Bytes of states, and of what is derived from them, that are kept; the least recently used states go first."""

Key = tuple[float, tuple[int, ...], bool]


class CarriedColumns:
    """Confidence and correctness at each exit of plans with ``carry > 0``.

    The state at an exit depends on the weight and on the heads passed so far, not on thresholds: plans that begin
    with the same heads share it, and a search meets the same beginnings again and again.
    """

    def __init__(
        self, scores: HeadScores, heads: Sequence[tuple[str, str]], judge: Judge, budget: int = BUDGET
    ) -> None:
        self._scores = scores
        self._heads = tuple(heads)
        self._judge = judge
        self._budget = budget
        self._states: OrderedDict[Key, np.ndarray] = OrderedDict()
        self._derived: dict[Key, dict[str, np.ndarray]] = {}
        self._held = 0

    def confidence(self, carry: float, heads: tuple[int, ...], measure: str) -> np.ndarray:
        """Confidence at the last of ``heads`` after passing the others, float32 [samples]."""
        state = self._state((carry, heads, False))
        derived = self._derived[carry, heads, False]
        if measure not in derived:
            probabilities = measures.to_probabilities(state, self._scores.scores, 1.0)
            derived[measure] = measures.get(measure).confidence(probabilities)
            self._hold(derived[measure].nbytes)
        return derived[measure]

    def answers(self, carry: float, heads: tuple[int, ...], *, final: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """What the last of ``heads``, or the final exit behind them all, gets right (bool) and its credit (float64)."""
        key = (carry, heads, final)
        state = self._state(key)
        derived = self._derived[key]
        if "right" not in derived:
            predicted = state.argmax(axis=1)
            derived["right"], derived["credit"] = self._judge.right(predicted), self._judge.credit(predicted)
            self._hold(derived["right"].nbytes + derived["credit"].nbytes)
        return derived["right"], derived["credit"]

    def _state(self, key: Key) -> np.ndarray:
        if key in self._states:
            self._states.move_to_end(key)
            return self._states[key]
        carry, heads, final = key
        data = self._scores
        outputs = [data.of(*self._heads[head]) for head in heads]
        temperatures = [data.temperatures[self._heads[head]] for head in heads]
        if final:
            outputs.append(data.final)
            temperatures.append(data.final_temperature)
        before: Key = (carry, heads if final else heads[:-1], False)
        if before[1] and data.scores == "logits":
            # state = carry * state before + scores / temperature: one step from the state of the shorter path
            outputs = [self._state(before), outputs[-1]]
            temperatures = [1.0, temperatures[-1]]
        state = np.asarray(policy.carry_states(outputs, temperatures, carry, data.scores)[-1])
        self._states[key] = state
        self._derived[key] = {}
        self._hold(state.nbytes)
        return state

    def _hold(self, size: int) -> None:
        """Count ``size`` more bytes, and let old states go; the one in use, which came last, stays."""
        self._held += size
        while self._held > self._budget and len(self._states) > 1:
            gone, array = self._states.popitem(last=False)
            self._held -= array.nbytes + sum(each.nbytes for each in self._derived.pop(gone).values())
