"""One temperature per classifier, fitted on data that neither the trunk nor the head was trained on."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

LOW, HIGH = 0.05, 20.0
"""Bounds of the search; a classifier that wants more than this is not usefully calibrated by a temperature."""


def fit_temperature(scores: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that minimises the negative log-likelihood (Guo et al. 2017, "On Calibration of Modern Neural Networks").

    Args:
        scores: logits, float32 [n, classes].
        labels: int64 [n].

    Returns:
        A positive number; 1.0 where ``n`` is 0.
    """
    if len(labels) == 0:
        return 1.0
    wide = np.asarray(scores, np.float64)

    def loss(log_temperature: float) -> float:
        return negative_log_likelihood(wide * np.exp(-log_temperature), labels)

    found = minimize_scalar(loss, bounds=(np.log(LOW), np.log(HIGH)), method="bounded", options={"xatol": 1e-4})
    # Round so that the value survives a trip through JSON and float32 unchanged.
    return float(np.float32(np.exp(found.x)))


def negative_log_likelihood(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean cross-entropy of ``softmax(scores)`` (float [n, classes]) with ``labels`` (int [n]), in nats."""
    rows = np.arange(len(labels))
    return float(-log_softmax(np.asarray(scores, np.float64), axis=1)[rows, labels].mean())


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
