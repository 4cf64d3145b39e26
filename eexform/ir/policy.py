"""The rule for leaving, simulated from cached scores; and exits that carry what earlier exits said.

A sample leaves at the first exit whose confidence reaches the exit's threshold; samples that never leave get the final
scores. Comparisons are made in float32, as in the exported network. Scores that are not numbers are refused here; an
exported network has to go on, and there a confidence that is not a number never leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from eexform.errors import DataError, GraphError
from eexform.ir import measures
from eexform.ir.emit import Emitter
from eexform.ir.exits import Exit, Scores

TIE = 1e-6
"""Confidences this close to a threshold may fall on either side in another runtime."""

_TINY = 1e-12
_PLAIN = "max_prob"


@dataclass(frozen=True)
class Decisions:
    """What each sample gets.

    Attributes:
        exit_index: [n] int64: 0..E-1 the exit it leaves at, E the final one.
        scores: [n, classes] float32: the scores of that exit, not divided by its temperature.
        confidence: [n] float32: the confidence there.
    """

    exit_index: np.ndarray
    scores: np.ndarray
    confidence: np.ndarray

    def rates(self, exits: int) -> tuple[float, ...]:
        """Share of the samples that leaves at each of ``exits`` exits, the final one last."""
        counts = np.bincount(self.exit_index, minlength=exits + 1)
        return tuple((counts / max(1, len(self.exit_index))).tolist())


def confidences(
    exit_scores: Sequence[np.ndarray], exits: Sequence[Exit], kind: Scores, learned: Sequence[np.ndarray | None] = ()
) -> np.ndarray:
    """Confidence of every sample at every exit, passed or not: [exits, n] float32.

    Args:
        exit_scores: per exit, [n, classes].
        exits: measure and temperature of each.
        kind: what the scores hold.
        learned: per exit, the confidence that the network itself computed, [n]; ``None`` where the measure reads it off
            the scores, as it is for all exits by default.

    Raises:
        GraphError: the number of exits differs from that of ``exit_scores``, or an exit lacks its learned confidence.
        DataError: NaN.
    """
    if len(exit_scores) != len(exits):
        raise GraphError(f"{len(exits)} exits, but scores of {len(exit_scores)}")
    rows = []
    for scores, exit, given in zip(exit_scores, exits, learned or [None] * len(exits), strict=True):
        where = f"exit at {exit.site!r}"
        if given is not None:
            row = np.asarray(given, np.float32)
            if row.shape != (len(scores),) or np.isnan(row).any():
                raise DataError(f"{where}: its confidence has shape {list(row.shape)} or holds NaN; check the weights")
        elif exit.confidence:
            raise GraphError(f"{where}: its confidence is a value of the network ({exit.confidence!r}), not given here")
        else:
            row = measures.get(exit.measure).confidence(_probabilities(scores, kind, exit.temperature, where))
        rows.append(row)
    return np.stack(rows) if rows else np.zeros((0, 0), np.float32)


def final_measure(exits: Sequence[Exit]) -> str:
    """The measure of the final classifier's confidence: the last exit's, ``max_prob`` where that one is learned.

    The final classifier has no gate, and nothing is decided by its confidence.
    """
    name = exits[-1].measure if exits else _PLAIN
    return _PLAIN if measures.is_learned(name) else name


def decide(
    exit_scores: Sequence[np.ndarray],
    final: np.ndarray,
    exits: Sequence[Exit],
    kind: Scores,
    learned: Sequence[np.ndarray | None] = (),
) -> Decisions:
    """Simulate the leaving rule on scores that every exit gave to every sample.

    Args:
        exit_scores: per exit, [n, classes].
        final: the final exit's scores, [n, classes].
        exits: measure, threshold and temperature of each exit, in the order in which a sample meets them.
        kind: what the scores hold.
        learned: see :func:`confidences`.

    Returns:
        The decisions. The final confidence is taken with :func:`final_measure` at temperature 1.

    Raises:
        DataError: NaN scores, or shapes that do not fit each other.
        GraphError: the number of exits differs from that of ``exit_scores``.
    """
    last = measures.get(final_measure(exits))
    chosen = np.array(final, dtype=np.float32)
    confidence = last.confidence(_probabilities(final, kind, 1.0, "final exit"))
    index = np.full(len(chosen), len(exits), np.int64)
    for place, scores in enumerate(exit_scores):
        if np.shape(scores) != chosen.shape:
            raise DataError(
                f"exit {place}: scores have shape {list(np.shape(scores))}, the final ones {list(chosen.shape)}"
            )
    rows = confidences(exit_scores, exits, kind, learned)
    for place in reversed(range(len(exits))):  # so that an earlier exit overrules a later one
        leaves = rows[place] >= np.float32(exits[place].threshold)
        index[leaves] = place
        chosen[leaves] = np.asarray(exit_scores[place], np.float32)[leaves]
        confidence[leaves] = rows[place][leaves]
    return Decisions(index, chosen, confidence)


def near_ties(
    exit_scores: Sequence[np.ndarray],
    exits: Sequence[Exit],
    kind: Scores,
    learned: Sequence[np.ndarray | None] = (),
    *,
    tolerance: float = TIE,
) -> np.ndarray:
    """Samples whose exit rounding may change: within ``tolerance`` of the threshold of an exit that they reach.

    Returns:
        [n] bool; empty where there are no exits.
    """
    rows = confidences(exit_scores, exits, kind, learned)
    near = np.zeros(rows.shape[1], bool)
    inside = np.ones(rows.shape[1], bool)
    for row, exit in zip(rows, exits, strict=True):
        distance = row.astype(np.float64) - np.float64(np.float32(exit.threshold))
        near |= inside & (np.abs(distance) <= tolerance)
        inside &= ~(distance > tolerance)  # surely gone only where clearly above
    return near


def carry_states(
    scores: Sequence[np.ndarray], temperatures: Sequence[float], beta: float, kind: Scores
) -> list[np.ndarray]:
    """Scores of exits that remember: ``state_i = beta * state_(i-1) + logits_i / T_i``.

    Args:
        scores: per exit (the final one last, where it takes part), [n, classes].
        temperatures: of each.
        beta: weight of what was said before; 0 gives the tempered scores themselves.
        kind: ``probabilities`` are carried as their logarithms and turned back by a softmax.

    Returns:
        The new scores, of the same kind; their temperature is 1.
    """
    if len(scores) != len(temperatures):
        raise GraphError(f"{len(scores)} exits, but {len(temperatures)} temperatures")
    states: list[np.ndarray] = []
    state: np.ndarray | None = None
    for place, (each, temperature) in enumerate(zip(scores, temperatures, strict=True)):
        raw = np.asarray(each, dtype=np.float32)
        if np.isnan(raw).any():
            raise DataError(f"exit {place}: class scores are NaN; check inputs and weights")
        logits = np.log(np.maximum(raw, np.float32(_TINY))) if kind == "probabilities" else raw
        tempered = logits if temperature == 1.0 else logits / np.float32(temperature)
        state = tempered if state is None or beta == 0.0 else state * np.float32(beta) + tempered
        states.append(measures.softmax(state) if kind == "probabilities" else state)
    return states


def emit_carry(
    emitter: Emitter, scores: Sequence[gs.Variable], temperatures: Sequence[float], beta: float, kind: Scores
) -> list[gs.Variable]:
    """The nodes of :func:`carry_states`; a value that nothing changes is returned as it is.

    Args:
        emitter: where to; names start with ``carry0.``, ``carry1.``, ...
        scores: per exit (the final one last, where it takes part), [N, classes].
        temperatures: of each.
        beta: weight of what was said before.
        kind: what the scores hold.
    """
    if len(scores) != len(temperatures):
        raise GraphError(f"{len(scores)} exits, but {len(temperatures)} temperatures")
    states: list[gs.Variable] = []
    state: gs.Variable | None = None
    for place, (each, temperature) in enumerate(zip(scores, temperatures, strict=True)):
        scope, shape = emitter.scoped(f"carry{place}."), each.shape
        current = each
        if kind == "probabilities":
            current = scope.node("Log", scope.clip(each, _TINY, None, name="raised"), name="log", shape=shape)
        if temperature != 1.0:
            divisor = scope.constant("temperature", np.float32(temperature))
            current = scope.node("Div", current, divisor, name="tempered", shape=shape)
        if state is not None and beta != 0.0:
            weight = scope.constant("beta", np.float32(beta))
            kept = scope.node("Mul", state, weight, name="kept", shape=shape)
            current = scope.node("Add", kept, current, name="state", shape=shape)
        state = current
        if kind == "probabilities":
            current = scope.node("Softmax", current, name="scores", shape=shape, axis=1)
        states.append(current)
    return states


def emit_gates(emitter: Emitter, gates: Sequence[gs.Variable], measure: str) -> list[gs.Variable]:
    """The nodes of :meth:`GateMeasure.accumulate`: the confidence at each exit, [N]; names start with ``sure0.``, ...

    Args:
        emitter: where to.
        gates: what each exit's gate says, in the order in which a sample meets them, [N] each.
        measure: name of the measure.
    """
    found: list[gs.Variable] = []
    for place, gate in enumerate(gates):
        scope = emitter.scoped(f"sure{place}.")
        found.append(measures.get_gate(measure).emit(scope, found[-1] if found else None, gate))
    return found


def _probabilities(scores: np.ndarray, kind: Scores, temperature: float, where: str) -> np.ndarray:
    try:
        return measures.to_probabilities(scores, kind, temperature)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
