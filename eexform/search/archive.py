"""The archive: every plan found that no other one found beats, exactly (no epsilon, no limit).

Two objectives have a short cut: sorted by cost, the errors of a front fall. For more, moocore's algorithms are used
(Kung, Luccio and Preparata, 1975; Fonseca, Paquete and López-Ibáñez, 2006), which are exact, too.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

import moocore
import numpy as np

from eexform.search.genome import Individual


def non_dominated(points: np.ndarray) -> np.ndarray:
    """Indices of the points that no other point beats, by rising second value (then third..., then first); of equal
    points the first counts.

    Args:
        points: float [n, objectives], all columns to be made small.
    """
    points = np.asarray(points, np.float64)
    if points.shape[1] > 2:
        kept = np.flatnonzero(moocore.is_nondominated(points)) if len(points) else np.empty(0, np.int64)
        return kept[_by_cost(points[kept])]
    order = _by_cost(points)
    best = np.minimum.accumulate(points[order, 0])
    keep = np.ones(len(order), bool)
    keep[1:] = points[order[1:], 0] < best[:-1]
    return order[keep]


def hypervolume(points: np.ndarray, reference: Sequence[float]) -> float:
    """Volume that the points dominate below ``reference`` (exact, all objectives to be made small)."""
    corner = np.asarray(reference, np.float64)
    points = np.asarray(points, np.float64).reshape(-1, len(corner))
    inside = points[(points < corner).all(axis=1)]
    if not len(inside):
        return 0.0
    if len(corner) > 2:
        return float(moocore.hypervolume(inside, ref=corner))
    front = inside[non_dominated(inside)]  # cost rises, error falls
    right = np.append(front[1:, 1], corner[1])
    return float(((corner[0] - front[:, 0]) * (right - front[:, 1])).sum())


def _by_cost(points: np.ndarray) -> np.ndarray:
    """The order by second value, then by the third..., then by the first; equal points stay in theirs."""
    columns = [*range(1, points.shape[1]), 0]
    return np.lexsort((np.arange(len(points)), *(points[:, column] for column in reversed(columns))))


class Archive:
    """Non-dominated individuals, by rising (first) cost."""

    def __init__(self) -> None:
        self._members: list[Individual] = []
        self._costs: list[float] = []

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Individual]:
        return iter(self._members)

    @property
    def points(self) -> np.ndarray:
        """Error and costs of the members, float64 [members, objectives], by rising cost."""
        values = [member.fitness.values for member in self._members]
        return np.array(values, np.float64).reshape(len(values), len(values[0]) if values else 2)

    def offer(self, individuals: Sequence[Individual]) -> list[Individual]:
        """Take in what is not beaten; individuals that violate a constraint are passed over.

        Returns:
            Those taken in (and still there after all were offered), in the order of the offer.
        """
        fit = [individual for individual in individuals if not individual.fitness.violation]
        if not fit:
            return []
        values = np.array([individual.fitness.values for individual in fit], np.float64)
        if values.shape[1] > 2:
            return self._merge(fit, values)
        survivors = non_dominated(values)
        return [fit[index] for index in sorted(survivors.tolist()) if self._insert(fit[index])]

    def _merge(self, fit: Sequence[Individual], values: np.ndarray) -> list[Individual]:
        """Members and newcomers together, the members first: they stay where a newcomer is only as good."""
        old, everyone = len(self._members), [*self._members, *fit]
        kept = non_dominated(np.concatenate([self.points, values]) if old else values).tolist()
        self._members = [everyone[index] for index in kept]
        return [everyone[index] for index in sorted(kept) if index >= old]

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
