"""Losses against formulas written out in numpy, and their gradients against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from eexform.data.dataset import Batch
from eexform.training.losses import cross_entropy, distillation, head_loss
from eexform.training.options import TrainOptions

N, K = 6, 4


def batch(*, labels: bool = True, mixed: bool = False) -> Batch:
    rng = np.random.default_rng(1)
    places = np.arange(N)
    mix = (rng.integers(0, K, N), rng.random(N).astype(np.float32)) if mixed else None
    return Batch({}, rng.integers(0, K, N) if labels else None, places, places, mix)


def scores(seed: int = 2) -> np.ndarray:
    return 2 * np.random.default_rng(seed).standard_normal((N, K))


def reference_cross_entropy(values: np.ndarray, labels: np.ndarray, smoothing: float) -> np.ndarray:
    """Per sample: ``-(1 - s) log p[label] - s * mean_k log p[k]``."""
    logs = log_softmax(values, axis=1)
    return -(1 - smoothing) * logs[np.arange(N), labels] - smoothing * logs.mean(axis=1)


def reference_distillation(values: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    target, ours = log_softmax(teacher / temperature, axis=1), log_softmax(values / temperature, axis=1)
    return float(temperature**2 * (np.exp(target) * (target - ours)).sum(axis=1).mean())


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_distillation_formula(temperature: float) -> None:
    ours, teacher = scores(), scores(3)
    found = distillation(torch.from_numpy(ours), torch.from_numpy(teacher), temperature).item()
    assert found == pytest.approx(reference_distillation(ours, teacher, temperature), rel=1e-9)
    alike = distillation(torch.from_numpy(ours), torch.from_numpy(ours + 3), temperature).item()
    assert alike == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("mixed", [False, True])
def test_cross_entropy_formula(smoothing: float, mixed: bool) -> None:
    values, samples = scores(), batch(mixed=mixed)
    assert samples.labels is not None
    expected = reference_cross_entropy(values, samples.labels, smoothing)
    if samples.mix is not None:
        other, share = samples.mix
        expected = share * expected + (1 - share) * reference_cross_entropy(values, other, smoothing)
    found = cross_entropy(torch.from_numpy(values), samples, smoothing).item()
    assert found == pytest.approx(expected.mean(), rel=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mixed", [False, True])
def test_head_loss_adds_its_parts(share: float, mixed: bool) -> None:
    values, teacher = torch.from_numpy(scores()), torch.from_numpy(scores(3))
    options = TrainOptions(distill=share, distill_temperature=3.0, label_smoothing=0.1)
    samples = batch(mixed=mixed)
    expected = (1 - share) * cross_entropy(values, samples, 0.1) + share * distillation(values, teacher, 3.0)
    assert head_loss(values, teacher, samples, options).item() == pytest.approx(expected.item())
    free = head_loss(values, teacher, batch(labels=False), options)
    assert free.item() == pytest.approx(distillation(values, teacher, 3.0).item())


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_gradients_against_finite_differences(share: float, mixed: bool) -> None:
    options = TrainOptions(distill=share, distill_temperature=2.5, label_smoothing=0.1)
    teacher, samples, values = torch.from_numpy(scores(3)), batch(mixed=mixed), scores()

    def loss(at: np.ndarray) -> float:
        return head_loss(torch.from_numpy(at), teacher, samples, options).item()

    free = torch.from_numpy(values.copy()).requires_grad_()
    head_loss(free, teacher, samples, options).backward()
    assert free.grad is not None
    step = 1e-5
    for row in range(N):
        for column in range(K):
            moved = np.zeros_like(values)
            moved[row, column] = step
            slope = (loss(values + moved) - loss(values - moved)) / (2 * step)
            assert free.grad[row, column].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_the_teacher_gets_no_gradient() -> None:
    teacher = torch.from_numpy(scores(3)).requires_grad_()
    ours = torch.from_numpy(scores()).requires_grad_()
    distillation(ours, teacher, 2.0).backward()
    assert ours.grad is not None
    assert teacher.grad is None
