"""Confidence measures: how sure a classifier is of a sample.

There are two kinds. A :class:`Measure` reads the class probabilities. A :class:`GateMeasure` reads what heads with a
gate have learned to say of themselves, and may look at the exits before. Each exists twice, in numpy for the simulator
and as ONNX nodes for the exported network, with the same float32 operations in the same order: the two agree to 1e-6.
Confidence is in [0, 1] and higher means surer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from eexform import plugins
from eexform.errors import DataError, GraphError, OptionError
from eexform.ir.emit import Emitter
from eexform.ir.exits import Scores
from eexform.ir.graph import BATCH
from eexform.ir.types import Dim

_GROUP = "eexform.measures"
_TINY = 1e-12
"""Probabilities are raised to this before their logarithm is taken: ``p log p`` is 0 there to float32 precision."""


_FEW = 64
"""Up to so many classes are reduced column by column."""


class Measure(ABC):
    """A confidence measure that reads class probabilities; registered in the entry-point group ``eexform.measures``."""

    name: ClassVar[str]

    @abstractmethod
    def confidence(self, probabilities: np.ndarray) -> np.ndarray:
        """Confidence of each sample.

        Args:
            probabilities: [n, classes] float32.

        Returns:
            [n] float32 in [0, 1].
        """

    @abstractmethod
    def emit(self, emitter: Emitter, probabilities: gs.Variable) -> gs.Variable:
        """Add the nodes that compute the same.

        Args:
            emitter: where to.
            probabilities: [N, classes]; its ``shape`` must hold the number of classes.

        Returns:
            [N] float32.
        """


class MaxProb(Measure):
    """Probability of the most likely class."""

    name = "max_prob"

    def confidence(self, probabilities: np.ndarray) -> np.ndarray:
        return _unit(np.ascontiguousarray(_checked(probabilities).T).max(axis=0))

    def emit(self, emitter: Emitter, probabilities: gs.Variable) -> gs.Variable:
        return emitter.reduce("ReduceMax", probabilities, [1], name="max_prob", shape=[BATCH])


class Margin(Measure):
    """Probability of the most likely class minus that of the second."""

    name = "margin"

    def confidence(self, probabilities: np.ndarray) -> np.ndarray:
        checked = _checked(probabilities)
        _need_two(checked.shape[1])
        top = np.partition(checked, checked.shape[1] - 2, axis=1)[:, -2:]
        return _unit(top[:, 1] - top[:, 0])

    def emit(self, emitter: Emitter, probabilities: gs.Variable) -> gs.Variable:
        _need_two(_classes(probabilities))
        count = emitter.constant("margin.k", [2])
        top, _ = emitter.nodes("TopK", [probabilities, count], 2, name="margin.top", axis=1, largest=1, sorted=1)
        first = emitter.node("Gather", top, emitter.constant("margin.i0", np.int64(0)), name="margin.first", axis=1)
        second = emitter.node("Gather", top, emitter.constant("margin.i1", np.int64(1)), name="margin.second", axis=1)
        return emitter.node("Sub", first, second, name="margin", shape=[BATCH], dtype=np.float32)


class Entropy(Measure):
    """One minus the entropy of the probabilities, relative to that of a uniform guess."""

    name = "entropy"

    def confidence(self, probabilities: np.ndarray) -> np.ndarray:
        checked = _checked(probabilities)
        scale = _entropy_scale(checked.shape[1])
        logs = np.log(np.maximum(checked, np.float32(_TINY)))
        negative = (checked * logs).sum(axis=1, dtype=np.float32)  # -entropy
        return _unit(negative * scale + np.float32(1.0))

    def emit(self, emitter: Emitter, probabilities: gs.Variable) -> gs.Variable:
        scale = _entropy_scale(_classes(probabilities))
        raised = emitter.clip(probabilities, _TINY, None, name="entropy.raised")
        logs = emitter.node("Log", raised, name="entropy.log")
        terms = emitter.node("Mul", probabilities, logs, name="entropy.terms")
        negative = emitter.reduce("ReduceSum", terms, [1], name="entropy.sum")
        relative = emitter.node("Mul", negative, emitter.constant("entropy.scale", scale), name="entropy.relative")
        flipped = emitter.node("Add", relative, emitter.constant("entropy.one", 1.0), name="entropy.flipped")
        return emitter.clip(flipped, 0.0, 1.0, name="entropy", shape=[BATCH])


class GateMeasure(ABC):
    """A confidence measure that reads the gates of heads; registered in the entry-point group ``eexform.measures``.

    It is a recurrence along the exits that a sample meets: what crosses from one exit to the next is the confidence
    itself.

    Attributes:
        sequential: whether an exit's confidence depends on the exits before it.
    """

    name: ClassVar[str]
    sequential: ClassVar[bool]

    @abstractmethod
    def step(self, before: np.ndarray | None, gate: np.ndarray) -> np.ndarray:
        """Confidence of each sample at an exit.

        Args:
            before: the confidence at the exit before, [n] float32; ``None`` at the first exit.
            gate: what this exit's gate says, [n] float32 in [0, 1].

        Returns:
            [n] float32 in [0, 1].
        """

    @abstractmethod
    def emit(self, emitter: Emitter, before: gs.Variable | None, gate: gs.Variable) -> gs.Variable:
        """Add the nodes that compute the same; a value that nothing changes is returned as it is."""

    def accumulate(self, gates: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Confidence at each exit of a path, from its gates in order: [n] float32 each."""
        found: list[np.ndarray] = []
        for gate in gates:
            found.append(self.step(found[-1] if found else None, _gate(gate)))
        return found


class Gate(GateMeasure):
    """What the exit's own gate says."""

    name = "gate"
    sequential = False

    def step(self, before: np.ndarray | None, gate: np.ndarray) -> np.ndarray:
        return gate

    def emit(self, emitter: Emitter, before: gs.Variable | None, gate: gs.Variable) -> gs.Variable:
        return gate


class Stick(GateMeasure):
    """Stick-breaking: ``1 - prod over j <= i of (1 - c_j)`` of the gates c_j up to exit i.

    Each gate breaks its share off what the exits before it left of a stick of length 1; the confidence is what has been
    broken off so far (Pomponi, Scardapane & Uncini, "A probabilistic re-interpretation of confidence scores in
    multi-exit models", 2022; the NACHOS search leaves by it). Computed as ``before + (1 - before) * c_i``, which never
    falls along the way.
    """

    name = "stick"
    sequential = True

    def step(self, before: np.ndarray | None, gate: np.ndarray) -> np.ndarray:
        return gate if before is None else before + (np.float32(1.0) - before) * gate

    def emit(self, emitter: Emitter, before: gs.Variable | None, gate: gs.Variable) -> gs.Variable:
        if before is None:
            return gate
        one = emitter.constant("stick.one", np.float32(1.0))
        rest = emitter.node("Sub", one, before, name="stick.rest", shape=[BATCH], dtype=np.float32)
        broken = emitter.node("Mul", rest, gate, name="stick.broken", shape=[BATCH], dtype=np.float32)
        return emitter.node("Add", before, broken, name="stick", shape=[BATCH], dtype=np.float32)


def names() -> tuple[str, ...]:
    """The registered measures."""
    return plugins.names(_GROUP)


def of_kind(*, learned: bool) -> tuple[str, ...]:
    """The registered measures that read gates (``learned``), or those that read probabilities."""
    return tuple(name for name in plugins.available(_GROUP) if is_learned(name) == learned)


def is_learned(name: str) -> bool:
    """Whether the measure reads gates.

    Raises:
        OptionError: there is no such measure.
    """
    return isinstance(_find(name), GateMeasure)


def get(name: str) -> Measure:
    """The measure registered as ``name``, which reads probabilities.

    Raises:
        OptionError: there is none, or it reads gates; the message lists the choices.
    """
    measure = _find(name)
    if not isinstance(measure, Measure):
        choices = ", ".join(of_kind(learned=False))
        raise OptionError(
            f"measure {name!r} reads what a head's gate says, not its scores; for heads without /gate take one of "
            f"{choices}"
        )
    return measure


def get_gate(name: str) -> GateMeasure:
    """The measure registered as ``name``, which reads gates.

    Raises:
        OptionError: there is none, or it reads probabilities; the message lists the choices.
    """
    measure = _find(name)
    if not isinstance(measure, GateMeasure):
        raise OptionError(
            f"measure {name!r} reads scores; heads with /gate take one of {', '.join(of_kind(learned=True))}"
        )
    return measure


def _find(name: str) -> Measure | GateMeasure:
    found = plugins.load(_GROUP, name)
    measure = found() if isinstance(found, type) else found
    if not isinstance(measure, Measure | GateMeasure):
        raise OptionError(
            f"measure {name!r}: {found!r} is not a sub-class of eexform.ir.measures.Measure or GateMeasure"
        )
    return measure


def to_probabilities(scores: np.ndarray, kind: Scores, temperature: float = 1.0) -> np.ndarray:
    """Class probabilities of raw scores.

    Args:
        scores: [n, classes] logits or probabilities.
        kind: what ``scores`` holds. Probabilities are taken as they are: no second softmax, no temperature.
        temperature: logits are divided by it.

    Returns:
        [n, classes] float32.

    Raises:
        DataError: not two-dimensional, or NaN.
    """
    checked = _checked(scores)
    if kind == "probabilities":
        return checked
    scaled = checked if temperature == 1.0 else checked / np.float32(temperature)
    return softmax(scaled)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax of [n, classes] over the classes, in float32.

    Few classes are put first inside: numpy reduces a few long rows several times faster than many short ones, and
    searches call this a lot. With many classes the pairwise sum along a row is the more exact one.
    """
    if logits.shape[-1] <= _FEW:
        columns = np.ascontiguousarray(logits.T, dtype=np.float32)
        powers = np.exp(columns - columns.max(axis=0))
        return np.ascontiguousarray((powers / powers.sum(axis=0, dtype=np.float32)).T)
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True), dtype=np.float32)
    return powers / powers.sum(axis=-1, keepdims=True, dtype=np.float32)


def emit_probabilities(
    emitter: Emitter, scores: gs.Variable, *, kind: Scores, temperature: float = 1.0, num_classes: int
) -> gs.Variable:
    """The nodes of :func:`to_probabilities`; the value returned knows its shape ``[N, num_classes]``."""
    shape: list[Dim] = [BATCH, num_classes]
    if kind == "probabilities":
        if scores.shape is not None and isinstance(scores.shape[-1], int):
            return scores
        return emitter.node("Identity", scores, name="probabilities", shape=shape)
    scaled = scores
    if temperature != 1.0:
        divisor = emitter.constant("temperature", np.float32(temperature))
        scaled = emitter.node("Div", scores, divisor, name="tempered", shape=shape)
    return emitter.node("Softmax", scaled, name="probabilities", shape=shape, axis=1)


def emit_confidence(
    emitter: Emitter,
    scores: gs.Variable,
    *,
    measure: str,
    kind: Scores,
    temperature: float = 1.0,
    num_classes: int,
) -> gs.Variable:
    """From raw scores ``[N, num_classes]`` to confidence ``[N]`` in one call."""
    probabilities = emit_probabilities(emitter, scores, kind=kind, temperature=temperature, num_classes=num_classes)
    return get(measure).emit(emitter, probabilities)


def _checked(scores: np.ndarray) -> np.ndarray:
    """``scores`` as [n, classes] float32; NaN and +inf refused (-inf is a masked class and may stay)."""
    array = np.asarray(scores, dtype=np.float32)
    if array.ndim != 2 or array.shape[1] < 1:
        raise DataError(f"class scores must have shape [samples, classes], found {list(array.shape)}")
    if array.size and not array.max() < np.inf:  # false for NaN, too (one pass over all, rows only on failure)
        rows = np.flatnonzero(~(array.max(axis=1) < np.inf))
        raise DataError(
            f"class scores of {len(rows)} samples are NaN or infinite (first: sample {rows[0]}); "
            "check inputs and weights"
        )
    if array.size and array.min() == -np.inf and np.isneginf(array).all(axis=1).any():
        raise DataError("a sample's class scores are all -infinity; check inputs and weights")
    return array


def _gate(values: np.ndarray) -> np.ndarray:
    """What a gate says, as [n] float32; NaN refused."""
    array = np.asarray(values, dtype=np.float32)
    if array.ndim != 1 or (array.size and not (array.min() >= 0 and array.max() <= 1)):
        raise DataError(
            f"a gate gives one number 0..1 per sample, found shape {list(array.shape)}"
            + (f" between {array.min()} and {array.max()}" if array.size else "")
            + "; check inputs and weights"
        )
    return array


def _unit(confidence: np.ndarray) -> np.ndarray:
    return np.clip(confidence, np.float32(0.0), np.float32(1.0)).astype(np.float32, copy=False)


def _need_two(classes: int) -> None:
    if classes < 2:
        raise DataError(f"margin and entropy compare classes: at least 2 are needed, found {classes}")


def _entropy_scale(classes: int) -> np.float32:
    _need_two(classes)
    return np.float32(1.0 / math.log(classes))


def _classes(probabilities: gs.Variable) -> int:
    if not probabilities.shape or not isinstance(probabilities.shape[-1], int):
        raise GraphError(
            f"value {probabilities.name!r}: the number of classes is not known (shape {probabilities.shape})"
        )
    return int(probabilities.shape[-1])
