"""Successive halving: which trunks are trained and for how long, within a budget that is known beforehand.

Every rung trains its candidates for the same number of epochs and keeps about half of them; each rung is given the same
share of the budget, so that few are trained long. (Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and
Hyperparameter Optimization", 2016, with several arms kept: those that no other one beats, spread over the cost.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from eexform.search.archive import non_dominated


@dataclass(frozen=True)
class Rung:
    """How many candidates are trained, and for how many epochs each."""

    candidates: int
    epochs: int

    @property
    def spent(self) -> int:
        """Epochs of all candidates together."""
        return self.candidates * self.epochs


def plan_rungs(budget: int, survivors: int, available: int, most: int = 3) -> tuple[Rung, ...]:
    """The rungs that fit a budget.

    Args:
        budget: epochs of all candidates together, over all rungs.
        survivors: candidates of the last rung.
        available: candidates that there are.
        most: rungs at most; fewer where the budget gives somebody no epoch, or nobody is to go.

    Returns:
        Rungs whose epochs are at most ``budget`` in all; none where that is 0, there is no candidate, or not an epoch
        for each survivor.
    """
    last = min(survivors, available)
    if last < 1 or budget < last:
        return ()
    for count in range(max(1, most), 0, -1):
        sizes = [min(available, last * 2 ** (count - 1 - place)) for place in range(count)]
        epochs = [budget // count // size for size in sizes]
        if count == 1 or (all(epochs) and all(a > b for a, b in pairwise(sizes))):
            break
    left = budget - sum(size * each for size, each in zip(sizes, epochs, strict=True))
    epochs[-1] += left // sizes[-1]
    return tuple(Rung(size, each) for size, each in zip(sizes, epochs, strict=True))


def spread(points: np.ndarray, count: int, anchor: Sequence[float] | None = None) -> list[int]:
    """Up to ``count`` of the points: the non-dominated ones first, evenly over the cost.

    The range of costs, up to the anchor's where there is one, is divided into ``count`` equal parts, and what is
    nearest to the middle of each is taken: the ends of a front are the hopeless and the hardly changed ones.

    Args:
        points: float [n, objectives]: error and costs, all to be made small; by the first cost they are spread.
        count: how many.
        anchor: a point that takes part and is not counted: what it beats comes after what it does not.

    Returns:
        Indices by rising cost.
    """
    points = np.asarray(points, np.float64)
    if not len(points):
        return []
    everyone = points if anchor is None else np.vstack([points, np.asarray(anchor, np.float64)])
    left = list(range(len(everyone)))
    chosen: list[int] = []
    while left and len(chosen) < count:
        front = [left[place] for place in non_dominated(everyone[left]).tolist()]
        left = [place for place in left if place not in front]
        front = [place for place in front if place < len(points)]
        room = count - len(chosen)
        top = float(everyone[-1, 1]) if anchor is not None else -np.inf
        chosen += front if len(front) <= room else _evenly(points, front, room, top)
    return sorted(chosen, key=lambda place: (points[place, 1], points[place, 0], place))


def _evenly(points: np.ndarray, front: Sequence[int], count: int, top: float) -> list[int]:
    """``count`` of a front: nearest to the middles of equal parts of its costs, up to ``top`` if that is more."""
    costs = points[list(front), 1]
    low, high = float(costs.min()), max(top, float(costs.max()))
    chosen: list[int] = []
    for target in low + (high - low) * (np.arange(count) + 0.5) / count:
        free = [place for place in front if place not in chosen]
        chosen.append(min(free, key=lambda place: (abs(points[place, 1] - target), points[place, 0], place)))
    return chosen
