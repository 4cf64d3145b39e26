"""Temperatures, likelihood and calibration error against figures known beforehand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.special import softmax

from eexform.training import calibrate, expected_calibration_error, fit_temperature, negative_log_likelihood


def drawn(temperature: float, count: int = 20000, classes: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from ``softmax(logits / temperature)``."""
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((count, classes))).astype(np.float32)
    chances = softmax(logits.astype(np.float64) / temperature, axis=1).cumsum(axis=1)
    return logits, (rng.random((count, 1)) > chances).sum(axis=1)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_recovers_the_temperature_that_made_the_labels(temperature: float) -> None:
    found = fit_temperature(*drawn(temperature))
    assert found == pytest.approx(temperature, rel=0.03)
    assert found == float(np.float32(found)) == json.loads(json.dumps(found))


def test_scaled_logits_scale_the_temperature() -> None:
    logits, labels = drawn(1.5, count=3000)
    assert fit_temperature(logits * 4, labels) == pytest.approx(4 * fit_temperature(logits, labels), rel=1e-3)


def test_fit_is_a_minimum() -> None:
    logits, labels = drawn(2.0, count=2000)
    best = fit_temperature(logits, labels)
    at = [negative_log_likelihood(logits, labels, temperature=best * factor) for factor in (0.95, 1.0, 1.05)]
    assert at[1] < min(at[0], at[2])


def test_temperature_stays_within_bounds() -> None:
    logits = np.eye(3, dtype=np.float32)[[0, 1, 2] * 5]
    assert fit_temperature(logits, np.array([0, 1, 2] * 5)) == pytest.approx(calibrate.LOW, rel=0.01)
    assert fit_temperature(logits, np.array([1, 2, 0] * 5)) == pytest.approx(calibrate.HIGH, rel=0.01)
    assert fit_temperature(np.zeros((0, 3), np.float32), np.zeros(0, np.int64)) == 1.0


def test_likelihood_by_hand_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = drawn(1.0, count=50)
    chances = softmax(logits.astype(np.float64), axis=1)[np.arange(50), labels]
    expected = -np.log(chances).mean()
    assert negative_log_likelihood(logits, labels) == pytest.approx(expected, rel=1e-12)
    assert negative_log_likelihood(logits * 2, labels, temperature=2.0) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(calibrate, "CHUNK", 7)
    assert negative_log_likelihood(logits, labels) == pytest.approx(expected, rel=1e-12)
    huge = np.array([[1e4, 0.0]], np.float32)
    assert negative_log_likelihood(huge, np.array([1])) == pytest.approx(1e4)


def test_calibration_error_by_hand() -> None:
    # two bins of 0.5: {0.2 wrong, 0.4 right} -> |0.6 - 1| and {0.9 right, 0.8 right} -> |1.7 - 2|, over four samples
    confidence = np.array([0.2, 0.4, 0.9, 0.8])
    assert expected_calibration_error(confidence, np.array([0, 1, 1, 1]), bins=2) == pytest.approx((0.4 + 0.3) / 4)
    assert expected_calibration_error(np.ones(8), np.ones(8)) == 0.0
    assert expected_calibration_error(np.ones(8), np.zeros(8)) == 1.0
    assert expected_calibration_error(np.zeros(0), np.zeros(0)) == 0.0


def test_the_fitted_temperature_calibrates() -> None:
    logits, labels = drawn(3.0)

    def error(temperature: float) -> float:
        chances = softmax(logits / temperature, axis=1)
        return expected_calibration_error(chances.max(axis=1), chances.argmax(axis=1) == labels)

    assert error(fit_temperature(logits, labels)) < 0.02 < 0.1 < error(1.0)
