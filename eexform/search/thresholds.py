"""The memetic step: thresholds, heads and sites of one plan improved on the cached confidences.

For a fixed weight w the score of a plan is the sum over samples of ``loss + w * cost``. With all other exits held,
the best level of one exit is found for all levels at once: what each sample would gain by leaving here is summed by
the number of levels it reaches, and a running sum over the levels gives the total of each. So one pass over the exits
costs a few array operations per exit, and "never" (which also saves the head) is just one more level.

The levels stay those of the grid (see :func:`eexform.search.bits.grid`). Thresholds at arbitrary confidences would
follow single samples of the selection split; the grid's steps of about a per cent of the samples are a guard against
that, and make the result exactly scorable by bit sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eexform.search.bits import BitScorer

SWEEPS = 4
"""Passes over the exits; it rarely takes more than three until nothing changes."""


@dataclass(frozen=True)
class Draft:
    """A plan by numbers: heads (ids of :class:`BitScorer`) in site order, their levels, measure id, carry."""

    heads: tuple[int, ...]
    levels: tuple[int, ...]
    measure: int
    carry: float = 0.0


@dataclass(frozen=True)
class _Figures:
    """Costs of one model as arrays, already multiplied by the weight.

    Attributes:
        prefix: of the trunk up to each head's site, per sample that leaves there.
        head: of each head, per sample that passes it.
        routing: of a decision, per sample that passes it.
        trunk: of the whole trunk, per sample that stays.
        once: of each head for all samples together, whoever passes it: what sizes cost.
    """

    prefix: np.ndarray
    head: np.ndarray
    routing: float
    trunk: float
    once: np.ndarray

    @classmethod
    def of(cls, scorer: BitScorer, model: str, weight: float) -> _Figures:
        costs = scorer.costs[model]
        trunk = weight * costs.trunk
        head = weight * np.array([costs.head[pair] for pair in scorer.heads])
        if not costs.per_sample:
            nothing = np.zeros(len(head))
            return cls(nothing + trunk, nothing, 0.0, trunk, scorer.samples * (head + weight * costs.routing))
        prefix = weight * np.array([costs.prefix[site] for site, _ in scorer.heads])
        return cls(prefix, head, weight * costs.routing, trunk, np.zeros(len(head)))


def descend(
    scorer: BitScorer, draft: Draft, model: str, weight: float, *, drop: bool = True, sweeps: int = SWEEPS
) -> Draft:
    """Coordinate descent on the levels; exits that do not pay are dropped.

    Args:
        scorer: holds confidences and right answers.
        draft: where to start.
        model: cost model of the objective.
        weight: loss (wrong answers, where there is no trust) that one unit of cost is worth.
        drop: whether exits may be dropped.
        sweeps: passes over the exits at most.

    Returns:
        A plan that is no worse for this weight; but for what dropping an exit does to the states of a carried plan, and
        to the shared parts of sites on different branches.
    """
    figures = _Figures.of(scorer, model, weight)
    for _ in range(sweeps):
        better = _sweep(scorer, draft, figures, drop)
        if better == draft:
            break
        draft = better
    return draft


def improve(
    scorer: BitScorer, draft: Draft, model: str, weight: float, *, allowed: Sequence[int] | None = None, moves: int = 24
) -> Draft:
    """Local search: :func:`descend`, and heads added or exchanged as long as that gains.

    Only where exits do not depend on those before them; else a new head would change what the later ones say.

    Args:
        scorer: holds confidences and right answers.
        draft: where to start; no heads is the trunk alone.
        model: cost model of the objective.
        weight: loss (wrong answers, where there is no trust) that one unit of cost is worth.
        allowed: heads that may be used (default: all).
        moves: how many heads may be added or exchanged at most.
    """
    draft = descend(scorer, draft, model, weight)
    if scorer.by_path(draft.measure, draft.carry):
        return draft
    figures = _Figures.of(scorer, model, weight)
    heads = range(len(scorer.heads)) if allowed is None else allowed
    for _ in range(moves):
        found = _best_move(scorer, draft, figures, heads)
        if found is None:
            break
        draft = descend(scorer, found, model, weight)
    return draft


def total(scorer: BitScorer, draft: Draft, model: str, weight: float) -> float:
    """The sum over samples of ``loss + weight * cost`` of a plan."""
    return _value(scorer, draft, _Figures.of(scorer, model, weight))


def _columns(scorer: BitScorer, draft: Draft) -> tuple[list[np.ndarray], np.ndarray]:
    _, reached = scorer.columns(draft.heads, draft.measure, draft.carry)
    return reached, scorer.losses(draft.heads, draft.carry)


def _first(reached: Sequence[np.ndarray], levels: Sequence[int], samples: int) -> np.ndarray:
    """The exit that each sample takes, int64 [samples]."""
    leave = np.full(samples, len(reached), np.int64)
    for index in reversed(range(len(reached))):
        leave[reached[index] > levels[index]] = index
    return leave


def _vector(figures: _Figures, heads: Sequence[int]) -> np.ndarray:
    """Weighted cost of leaving at each exit, the final one last."""
    ids = list(heads)
    passed = np.cumsum(figures.head[ids]) + figures.routing * np.arange(1, len(ids) + 1)
    prefix = np.maximum.accumulate(figures.prefix[ids])
    return np.append(prefix + passed, figures.trunk + (passed[-1] if ids else 0.0))


def _gains(reached: np.ndarray, gain: np.ndarray, levels: int) -> np.ndarray:
    """Sum of ``gain`` over the samples that leave, for each level: float64 [levels]."""
    by_level = np.bincount(reached, weights=gain, minlength=levels + 1)
    return np.cumsum(by_level[::-1])[::-1][1:]


def _sweep(scorer: BitScorer, draft: Draft, figures: _Figures, drop: bool) -> Draft:
    if not draft.heads:
        return draft
    reached, loss = _columns(scorer, draft)
    vector = _vector(figures, draft.heads)
    leave = _first(reached, draft.levels, scorer.samples)
    levels = list(draft.levels)
    onward = loss[-1] + vector[-1]  # what a sample costs if it goes on behind the exit under consideration
    for index in reversed(range(len(levels))):
        here = loss[index] + vector[index]
        arrives = leave >= index
        gains = _gains(reached[index][arrives], (here - onward)[arrives], scorer.levels)
        own = figures.head[draft.heads[index]] + figures.routing
        best = int(gains.argmin())
        if drop and -own * np.count_nonzero(arrives) - figures.once[draft.heads[index]] <= gains[best]:
            levels[index] = scorer.levels
            # everything behind gets cheaper by the head that is no longer passed
            onward = onward - own
        else:
            current = levels[index]
            if current >= scorer.levels or gains[best] < gains[current]:
                levels[index] = best
            onward = np.where(reached[index] > levels[index], here, onward)
    kept = [index for index, level in enumerate(levels) if level < scorer.levels]
    return Draft(
        tuple(draft.heads[index] for index in kept),
        tuple(levels[index] for index in kept),
        draft.measure,
        draft.carry,
    )


def _best_move(scorer: BitScorer, draft: Draft, figures: _Figures, heads: Sequence[int]) -> Draft | None:
    """The one head whose adding (or exchange, where its site has an exit) gains most; ``None`` where none gains."""
    start = _value(scorer, draft, figures)
    best, found = start - 1e-9 * max(1.0, abs(start)), None
    at_site: dict[int, list[int]] = {}
    for head in heads:
        at_site.setdefault(int(scorer.site_of[head]), []).append(head)
    for site, options in at_site.items():
        kept = [index for index, head in enumerate(draft.heads) if scorer.site_of[head] != site]
        base = Draft(
            tuple(draft.heads[i] for i in kept), tuple(draft.levels[i] for i in kept), draft.measure, draft.carry
        )
        place = sum(1 for head in base.heads if scorer.site_of[head] < site)
        reached, loss = _columns(scorer, base)
        vector = _vector(figures, base.heads)
        leave = _first(reached, base.levels, scorer.samples)
        onward = loss[leave, np.arange(scorer.samples)] + vector[leave]
        value = onward.sum() + figures.once[list(base.heads)].sum()
        arrives = leave >= place
        if not arrives.any():
            continue
        going_on = onward[arrives]
        passed = figures.head[list(base.heads[:place])].sum() + figures.routing * place
        floor = figures.prefix[list(base.heads[:place])].max(initial=0.0)
        for head in options:
            own = figures.head[head] + figures.routing
            here = scorer.loss[head][arrives] + (max(floor, figures.prefix[head]) + passed + own)
            levels = _gains(scorer.reached(head, draft.measure)[arrives], here - going_on - own, scorer.levels)
            level = int(levels.argmin())
            worth = value + figures.once[head] + own * len(going_on) + levels[level]
            if worth < best:
                best = worth
                found = Draft(
                    (*base.heads[:place], head, *base.heads[place:]),
                    (*base.levels[:place], level, *base.levels[place:]),
                    draft.measure,
                    draft.carry,
                )
    return found


def _value(scorer: BitScorer, draft: Draft, figures: _Figures) -> float:
    reached, loss = _columns(scorer, draft)
    leave = _first(reached, draft.levels, scorer.samples)
    paid = loss[leave, np.arange(scorer.samples)] + _vector(figures, draft.heads)[leave]
    return float(paid.sum() + figures.once[list(draft.heads)].sum())
