"""The archive: every plan found that no other one found beats, exactly (no epsilon, no limit)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import numpy as np

from eexform.search.genome import Individual


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Indices of the points that no other point beats, by rising second value; of equal points the first counts.

    Args:
        points: float [n, 2], both columns to be made small.
    """
    order = np.lexsort((np.arange(len(points)), points[:, 0], points[:, 1]))
    best = np.minimum.accumulate(points[order, 0])
    keep = np.ones(len(order), bool)
    keep[1:] = points[order[1:], 0] < best[:-1]
    return order[keep]


def hypervolume(points: np.ndarray, reference: tuple[float, float]) -> float:
    """Area that the points dominate below ``reference`` (exact, two objectives to be made small)."""
    points = np.asarray(points, np.float64).reshape(-1, 2)
    inside = points[(points < np.asarray(reference)).all(axis=1)]
    if not len(inside):
        return 0.0
    front = inside[non_dominated(inside)]  # cost rises, error falls
    right = np.append(front[1:, 1], reference[1])
    return float(((reference[0] - front[:, 0]) * (right - front[:, 1])).sum())


class Archive:
    """Non-dominated individuals, by rising cost."""

    def __init__(self) -> None:
        self._members: list[Individual] = []
        self._costs: list[float] = []

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Individual]:
        return iter(self._members)

    @property
    def points(self) -> np.ndarray:
        """Error and cost of the members, float64 [members, 2], by rising cost."""
        return np.array([member.fitness.values for member in self._members], np.float64).reshape(-1, 2)

    def offer(self, individuals: Sequence[Individual]) -> list[Individual]:
        """Take in what is not beaten; individuals that violate a constraint are passed over.

        Returns:
            Those taken in (and still there after all were offered), in the order of the offer.
        """
        fit = [individual for individual in individuals if not individual.fitness.violation]
        if not fit:
            return []
        survivors = non_dominated(np.array([individual.fitness.values for individual in fit], np.float64))
        return [fit[index] for index in sorted(survivors.tolist()) if self._insert(fit[index])]

    def _insert(self, individual: Individual) -> bool:
        error, cost = individual.fitness.values
        place = bisect_left(self._costs, cost)
        # the member before is cheaper, one at the same cost stands at ``place``: members' errors fall as costs rise
        if place and self._members[place - 1].fitness.values[0] <= error:
            return False
        if place < len(self) and self._costs[place] == cost and self._members[place].fitness.values[0] <= error:
            return False
        stop = place
        while stop < len(self) and self._members[stop].fitness.values[0] >= error:
            stop += 1
        self._members[place:stop] = [individual]
        self._costs[place:stop] = [cost]
        return True
