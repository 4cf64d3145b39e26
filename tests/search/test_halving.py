"""Rungs within a budget, and who is kept."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eexform.errors import OptionError
from eexform.search.archive import non_dominated
from eexform.search.halving import Rung, plan_rungs, spread
from eexform.search.trunk_options import TrunkOptions


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 300), st.integers(1, 8), st.integers(0, 60), st.integers(1, 5))
def test_rungs_keep_the_budget(budget: int, survivors: int, available: int, most: int) -> None:
    rungs = plan_rungs(budget, survivors, available, most)
    last = min(survivors, available)
    assert bool(rungs) == (last > 0 and budget >= last)
    spent = sum(rung.spent for rung in rungs)
    assert spent <= budget
    if rungs:
        assert budget - spent < rungs[-1].candidates  # what is left is not an epoch for each
        assert len(rungs) <= most
        assert rungs[0].candidates <= available
        assert rungs[-1].candidates == last
        assert all(rung.epochs >= 1 for rung in rungs)
        assert all(a.candidates > b.candidates for a, b in pairwise(rungs))


def test_rungs_by_hand() -> None:
    assert plan_rungs(36, 3, 100) == (Rung(12, 1), Rung(6, 2), Rung(3, 4))
    assert plan_rungs(36, 3, 8) == (Rung(8, 1), Rung(6, 2), Rung(3, 5))
    assert plan_rungs(36, 3, 3) == (Rung(3, 12),)
    assert plan_rungs(4, 4, 100) == (Rung(4, 1),)
    assert plan_rungs(0, 3, 100) == plan_rungs(36, 3, 0) == ()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 12))
def test_those_kept_are_the_best_fronts(seed: int, size: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    points = np.column_stack([rng.integers(0, 8, size) / 8, rng.integers(1, 9, size)]).astype(float)
    kept = spread(points, count)
    assert len(kept) == len(set(kept)) == min(count, size)
    assert [points[place, 1] for place in kept] == sorted(points[place, 1] for place in kept)
    front = set(non_dominated(points).tolist())
    assert set(kept) <= front if len(front) >= count else front <= set(kept)


def test_the_middles_of_equal_parts_of_the_cost() -> None:
    points = np.array([[1.0 / cost, float(cost)] for cost in range(1, 10)])
    assert points[spread(points, 3), 1].tolist() == [2.0, 5.0, 8.0]
    assert points[spread(points, 3, anchor=(0.0, 19.0)), 1].tolist() == [4.0, 8.0, 9.0]
    assert points[spread(points, 1), 1].tolist() == [5.0]


def test_what_the_original_beats_comes_last() -> None:
    points = np.array([[0.5, 1.0], [0.3, 6.0], [0.4, 2.0]])
    assert spread(points, 2, anchor=(0.2, 5.0)) == [0, 2]
    assert spread(points, 3, anchor=(0.2, 5.0)) == [0, 2, 1]
    assert spread(points, 1) == [2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 3}, "trunk_epochs: 3 is not an epoch for each of 4 trunks"),
        ({"epochs": -1}, "trunk_epochs: -1 must not be negative"),
        ({"survivors": 0}, "trunks: 0 must be at least 1"),
        ({"population": 6}, "trunk_population: 6 must be a multiple of 4"),
        ({"samples": 1}, "proxy_samples: 1 must be at least 2"),
    ],
)
def test_options_that_are_none(changed: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        TrunkOptions(**changed)
