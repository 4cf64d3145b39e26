"""Local search towards a target: a plan is moved along the front of error and cost until it costs what is wanted.

What an exchange of error for cost leads to is found by coordinate descent; the exchange itself is halved (on a
logarithmic scale) until the cost is that of the target. Descent meets the corners of the front only, so single
thresholds are moved last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from eexform.search.bits import BitScorer
from eexform.search.goals import Goal
from eexform.search.terms import Term
from eexform.search.thresholds import Draft, descend

HALVINGS = 6

Judged = Callable[[Sequence[Draft]], tuple[np.ndarray, np.ndarray]]
"""What drafts cost by the goal that has the target, and the error of each: float64 [drafts] twice."""


def aim(
    scorer: BitScorer,
    draft: Draft,
    goal: Goal,
    judged: Judged,
    weights: Callable[[float], Mapping[Term, float]],
    span: tuple[float, float],
    *,
    drop: bool,
) -> Draft:
    """A plan with the draft's exits, or fewer, that is as near to the goal's target as was found.

    Args:
        scorer: holds confidences and right answers.
        draft: where to start.
        goal: with a target.
        judged: scores drafts.
        weights: scalarisation of the goals for an exchange of error for cost.
        span: least and largest exchange.
        drop: whether exits may be dropped.
    """
    assert goal.target is not None
    low, high = span
    found = [draft]
    for _ in range(HALVINGS):
        exchange = math.sqrt(low * high)
        found.append(descend(scorer, draft, weights(exchange), drop=drop))
        cost = float(judged(found[-1:])[0][0])
        low, high = (exchange, high) if cost > goal.target else (low, exchange)
    nearest = _nearest(found, goal, judged)
    if scorer.by_path(nearest.measure, nearest.carry):  # scored one by one: too many
        return nearest
    return _nearest([nearest, *_neighbours(nearest, scorer.levels)], goal, judged)


def _neighbours(draft: Draft, levels: int) -> list[Draft]:
    """Every plan that differs in one threshold."""
    return [
        replace(draft, levels=(*draft.levels[:place], level, *draft.levels[place + 1 :]))
        for place, own in enumerate(draft.levels)
        for level in range(levels)
        if level != own
    ]


def _nearest(drafts: Sequence[Draft], goal: Goal, judged: Judged) -> Draft:
    """The least distance to the target, then the least error."""
    cost, error = judged(drafts)
    distance = np.asarray(goal.distance(cost))
    return drafts[int(np.lexsort((error, distance))[0])]
