"""What an answer is worth during the search: right or wrong, softened by what the trunk thinks of it."""

from __future__ import annotations

import numpy as np

from eexform.errors import OptionError, need
from eexform.ir import measures
from eexform.search.scores import HeadScores

PLANES = 4
"""Bits per sample for the trunk's opinion: sixteen steps, of which averages over thousands of samples show nothing."""

STEPS = 2**PLANES - 1


class Judge:
    """Credit of an answer: ``(1 - trust) * [answer = label] + trust * p_trunk(answer)``.

    On a finite selection split the best of many plans is partly the luckiest. The trunk's calibrated probability of an
    answer is its expected correctness and varies less than the answer's being right. The probability enters as that of
    the trunk's own answer minus a shortfall in sixteen steps (0 where the answer is the trunk's), so that bit sets can
    count it; every scorer uses these same numbers.

    A trunk that was changed does not judge itself: a fine-tuned one agrees with its own exits. Its plans are judged by
    the network that they are compared with.

    Args:
        scores: of the split, with the ``opinion`` that judges; by default the trunk's own, calibrated by
            ``final_temperature``.
        trust: 0 is plain accuracy, 1 the trunk's opinion alone.
    """

    def __init__(self, scores: HeadScores, trust: float) -> None:
        need(0.0 <= trust <= 1.0, f"trust {trust} is not in 0..1", OptionError)
        self.trust = trust
        self._labels = scores.labels
        if trust:
            final, temperature = scores.opinion or (scores.final, scores.final_temperature)
            self._opinion = opinion = measures.to_probabilities(final, scores.scores, temperature)
            self._own = np.take_along_axis(opinion, final.argmax(axis=1)[:, None], axis=1)[:, 0]
            self.own = self._own.astype(np.float64)

    def right(self, predicted: np.ndarray) -> np.ndarray:
        """Whether each answer is the label, bool [samples]."""
        return np.asarray(predicted == self._labels)

    def shortfall(self, predicted: np.ndarray) -> np.ndarray:
        """By how many steps of 1/15 the trunk prefers its own answer, uint8 [samples]; only with ``trust``."""
        answer = np.take_along_axis(self._opinion, np.asarray(predicted)[:, None], axis=1)[:, 0]
        return np.rint(np.clip(self._own - answer, 0.0, 1.0) * STEPS).astype(np.uint8)

    def credit(self, predicted: np.ndarray) -> np.ndarray:
        """Credit of each answer, float64 [samples]."""
        right = self.right(predicted).astype(np.float64)
        if not self.trust:
            return right
        return (1.0 - self.trust) * right + self.trust * (self.own - self.shortfall(predicted) / STEPS)
