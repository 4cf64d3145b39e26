"""Archive, fronts and hypervolume for three objectives and more, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eexform.search.archive import Archive, hypervolume, non_dominated
from eexform.search.genome import Individual

CELLS = 5


def individual(values: tuple[float, ...], violation: float = 0.0) -> Individual:
    one = Individual({}, str(values))
    one.fitness.values = values
    one.fitness.violation = violation
    return one


def beaten(point: np.ndarray, others: np.ndarray) -> bool:
    return bool(((others <= point).all(axis=1) & (others < point).any(axis=1)).any())


def clouds(objectives: int) -> st.SearchStrategy[list[tuple[int, ...]]]:
    return st.lists(st.tuples(*[st.integers(0, CELLS - 1)] * objectives), min_size=1, max_size=40)


drawn = st.integers(2, 4).flatmap(clouds)


@settings(max_examples=150, deadline=None)
@given(drawn)
def test_non_dominated_points(cloud: list[tuple[int, ...]]) -> None:
    points = np.array(cloud, np.float64)
    kept = non_dominated(points).tolist()
    brute = {tuple(point) for point in points if not beaten(point, points)}
    assert {tuple(points[place]) for place in kept} == brute
    assert len(kept) == len(brute)  # of equal points one
    assert all(cloud.index(cloud[place]) == place for place in kept)  # the first one
    order = [(*points[place, 1:], points[place, 0]) for place in kept]
    assert order == sorted(order)


@settings(max_examples=100, deadline=None)
@given(drawn, st.integers(1, 7))
def test_an_archive_is_the_front_of_all_that_was_offered(cloud: list[tuple[int, ...]], size: int) -> None:
    archive = Archive()
    everyone: list[Individual] = []
    for start in range(0, len(cloud), size):
        batch = [individual(tuple(map(float, point))) for point in cloud[start : start + size]]
        before = list(archive)
        added = archive.offer([*batch, individual(tuple(-1.0 for _ in cloud[0]), violation=0.1)])
        everyone += batch
        assert added == [one for one in batch if one in list(archive)]
        assert all(one in before or one in added for one in archive)
    points = np.array([one.fitness.values for one in everyone])
    np.testing.assert_array_equal(archive.points, points[non_dominated(points)])
    assert [one.fitness.violation for one in archive] == [0.0] * len(archive)
    assert len(archive) == len({tuple(point) for point in points if not beaten(point, points)})


@settings(max_examples=100, deadline=None)
@given(drawn)
def test_hypervolume_is_the_share_of_cells_covered(cloud: list[tuple[int, ...]]) -> None:
    points = np.array(cloud, np.float64)
    objectives = points.shape[1]
    corners = np.stack(np.meshgrid(*[np.arange(CELLS)] * objectives, indexing="ij"), -1).reshape(-1, objectives)
    covered = (points[:, None] <= corners[None]).all(axis=2).any(axis=0).sum()
    assert hypervolume(points, (float(CELLS),) * objectives) == pytest.approx(covered)
    assert hypervolume(points, (0.0,) * objectives) == 0.0


def test_fitness_takes_as_many_values_as_there_are() -> None:
    low, high = individual((0.1, 2.0, 3.0)), individual((0.1, 2.0, 4.0))
    assert low.fitness.values == (0.1, 2.0, 3.0)
    assert low.fitness.dominates(high.fitness)
    assert not high.fitness.dominates(low.fitness)
    assert not individual((0.2, 1.0, 3.0)).fitness.dominates(low.fitness)
    assert individual((9.0, 9.0, 9.0)).fitness.dominates(individual((0.0, 0.0, 0.0), 0.1).fitness)


def test_an_empty_archive_has_no_points() -> None:
    assert Archive().points.shape == (0, 2)
    assert Archive().offer([]) == []
    assert hypervolume(np.empty((0, 3)), (1.0, 1.0, 1.0)) == 0.0
    assert non_dominated(np.empty((0, 3))).tolist() == []
