"""Students: initial values of their own, averaged parameters, the best epoch kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eexform.errors import EexformError
from eexform.heads import HeadSpec
from eexform.training.options import TrainOptions
from eexform.training.student import Student
from tests import tiny
from tests.training import support


def student(spec: str = "conv:1x8/avg", *, place: int = 0, order: int = 0, **options: float) -> Student:
    site = support.sites(tiny.network())[place]
    return Student(order, site, HeadSpec.parse(spec), 10, TrainOptions(**options))  # type: ignore[arg-type]


def features(one: Student, count: int = 5) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, *one.site.shape)).astype(np.float32)


def fill(one: Student, value: float) -> None:
    with torch.no_grad():
        for parameter in one.module.parameters():
            parameter.fill_(value)


def test_initial_values_depend_on_seed_site_and_head_alone() -> None:
    plain = student().parameters()
    for other in (student(order=3), student(learning_rate=0.1)):
        assert all(np.array_equal(array, plain[name]) for name, array in other.parameters().items())
    changed = [student(seed=1), student("conv:1x8/avg+max"), student(place=1)]
    for other in changed:
        assert not np.array_equal(other.parameters()["classifier.weight"], plain["classifier.weight"])


def test_average_follows_the_parameters() -> None:
    one = student(ema=0.75)
    weights = one.average["classifier.weight"].clone()
    fill(one, 2.0)
    one.update_average()
    torch.testing.assert_close(one.average["classifier.weight"], 0.75 * weights + 0.25 * 2.0)
    one.update_average()
    torch.testing.assert_close(one.average["classifier.weight"], 0.75**2 * weights + (1 - 0.75**2) * 2.0)


def test_predictions_are_those_of_the_average_and_leave_the_module_as_it_was() -> None:
    one, plain = student(ema=0.9), student()
    given = features(one)
    expected = plain.predict(given)
    fill(one, 0.5)
    before = one.parameters()
    np.testing.assert_array_equal(one.predict(given), expected)  # the average still is the initial network
    assert all(np.array_equal(array, before[name]) for name, array in one.parameters().items())


def test_without_decay_there_is_no_average() -> None:
    one = student()
    one.update_average()
    assert not one.average
    fill(one, 0.0)
    np.testing.assert_array_equal(one.predict(features(one)), np.zeros((5, 10), np.float32))


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_best_epoch_is_kept(ema: float) -> None:
    one = student(ema=ema)
    for epoch, (loss, value) in enumerate([(2.0, 1.0), (1.0, 3.0), (1.5, 5.0), (1.0, 7.0)], start=1):
        fill(one, value)
        one.average = {name: torch.full_like(tensor, value) for name, tensor in one.average.items()}
        one.consider(loss, epoch)
    assert (one.best_loss, one.stale) == (1.0, 2)
    one.load_best()
    assert np.all(one.parameters()["classifier.weight"] == 3.0)


def test_parameters_that_are_not_finite_are_named() -> None:
    one = student()
    fill(one, float("nan"))
    with pytest.raises(EexformError, match=r"head conv:1x8/avg at .*parameter '.*' is not finite"):
        one.parameters()
