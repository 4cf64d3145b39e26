"""One temperature per classifier, fitted on data that neither the trunk nor the head was trained on."""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax

LOW, HIGH = 0.05, 20.0
"""Bounds of the search; a classifier that wants more than this is not usefully calibrated by a temperature."""

CHUNK = 4096
"""Rows that are widened to float64 at a time, so that scores may stay on disk."""


def fit_temperature(scores: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that minimises the negative log-likelihood.

    Guo et al., "On Calibration of Modern Neural Networks" (2017).

    Args:
        scores: logits, float32 [n, classes].
        labels: int64 [n].

    Returns:
        A positive number; 1.0 where ``n`` is 0.
    """
    from scipy.optimize import minimize_scalar  # slow to import, and only those who train need it

    if len(labels) == 0:
        return 1.0

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(scores, labels, temperature=float(np.exp(log_temperature)))

    found = minimize_scalar(loss, bounds=(np.log(LOW), np.log(HIGH)), method="bounded", options={"xatol": 1e-4})
    # Round so that the value survives a trip through JSON and float32 unchanged.
    return float(np.float32(np.exp(found.x)))


def negative_log_likelihood(scores: np.ndarray, labels: np.ndarray, *, temperature: float = 1.0) -> float:
    """Mean cross-entropy of ``softmax(scores / temperature)`` ([n, classes]) with ``labels`` (int [n]), in nats."""
    total = 0.0
    for start in range(0, len(labels), CHUNK):
        rows = slice(start, start + CHUNK)
        logs = log_softmax(np.asarray(scores[rows], np.float64) / temperature, axis=1)
        total -= float(np.take_along_axis(logs, np.asarray(labels[rows])[:, None], axis=1).sum())
    return total / max(1, len(labels))


def expected_calibration_error(probabilities: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of the top-1 probability (Naeini et al. 2015), equal-width bins.

    Args:
        probabilities: confidence of each prediction, [n].
        correct: whether it was right, bool [n].
    """
    place = np.minimum((probabilities * bins).astype(int), bins - 1)
    total = np.bincount(place, minlength=bins)
    gap = np.abs(
        np.bincount(place, weights=probabilities, minlength=bins) - np.bincount(place, weights=correct, minlength=bins)
    )
    return float(gap[total > 0].sum() / max(1, len(correct)))
