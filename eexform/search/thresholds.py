"""The memetic step: thresholds, heads and sites of one plan improved on the cached confidences.

For fixed weights w the score of a plan is the sum over samples of ``loss + w * cost``, added up over the terms of the
objectives. A percentile is no sum over samples; the mean stands for it here, and what is found is then scored by what
was asked for.

With all other exits held, the best level of one exit is found for all levels at once: what each sample would gain by
leaving here is summed by the number of levels it reaches, and a running sum over the levels gives the total of each. So
one pass over the exits costs a few array operations per exit, and "never" (which also saves the head) is just one more
level.

The levels stay those of the grid (see :func:`eexform.search.bits.grid`). Thresholds at arbitrary confidences would
follow single samples of the selection split; the grid's steps of about a per cent of the samples are a guard against
that, and make the result exactly scorable by bit sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eexform.search.bits import BitScorer
from eexform.search.terms import Term

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
    """Costs as arrays, already multiplied by the weights and added up over the terms.

    Attributes:
        prefix: of the trunk up to each head's site, per sample that leaves there.
        here: of each head and its decision, per sample that reaches it.
        passed: the same and what going on costs, per sample that passes it.
        trunk: of the whole trunk, per sample that stays.
        once: of each head for all samples together, whoever passes it: what sizes cost.
        between: of the trunk from exit to exit beside its share of the whole, [sites + 1, sites + 1]: from the site of
            the row to that of the column; the last row is the inputs, the last column the final classifier.
        dearest: the same for all samples together, of terms about the dearest path.
        site: of each head, by number.
    """

    prefix: np.ndarray
    here: np.ndarray
    passed: np.ndarray
    trunk: float
    once: np.ndarray
    between: np.ndarray
    dearest: np.ndarray
    site: np.ndarray

    @classmethod
    def of(cls, scorer: BitScorer, weights: Mapping[Term, float]) -> _Figures:
        parts = [cls._of_term(scorer, term, weight) for term, weight in weights.items()]
        added = [name for name in cls.__dataclass_fields__ if name != "site"]
        return cls(**{name: sum(getattr(part, name) for part in parts) for name in added}, site=scorer.site_of)

    @classmethod
    def _of_term(cls, scorer: BitScorer, term: Term, weight: float) -> _Figures:
        costs = scorer.costs[term.model]
        trunk = weight * costs.trunk
        nothing = np.zeros(len(scorer.heads))
        apart = scorer.between(term.model)
        none = 0.0 * apart
        if costs.combine == "max":  # no sum over exits: only the errors are improved
            return cls(nothing, nothing, nothing, 0.0, nothing, none, none, scorer.site_of)
        here = weight * np.array([costs.head[pair] + costs.decision.get(pair[0], 0.0) for pair in scorer.heads])
        if not costs.per_sample:
            return cls(nothing + trunk, nothing, nothing, trunk, scorer.samples * here, none, none, scorer.site_of)
        going = weight * np.array([costs.onward.get(site, 0.0) for site, _ in scorer.heads])
        if term.statistic == "max":  # the dearest path passes every exit, whoever leaves there
            once = scorer.samples * (here + going)
            return cls(
                nothing + trunk, nothing, nothing, trunk, once, none, scorer.samples * weight * apart, scorer.site_of
            )
        prefix = weight * np.array([costs.prefix[site] for site, _ in scorer.heads])
        return cls(prefix, here, here + going, trunk, nothing, weight * apart, none, scorer.site_of)

    def detour(self, heads: Sequence[int], place: int, head: int) -> tuple[float, float]:
        """What lies more between the neighbours of an exit because it is there: per sample that goes on, and once.

        Args:
            heads: the others, in order.
            place: how many of them come before.
            head: the exit's.
        """
        before = self.site[heads[place - 1]] if place else -1
        after = self.site[heads[place]] if place < len(heads) else -1
        here = self.site[head]
        per_sample, once = (
            float(table[before, here] + table[here, after] - (table[before, after] if heads else 0.0))
            for table in (self.between, self.dearest)
        )  # without any exit there is no branch
        return per_sample, once

    def fixed(self, heads: Sequence[int]) -> float:
        """What exits cost all samples together, whoever leaves where."""
        ids = list(heads)
        return float(self.once[ids].sum() + (self.dearest[self.way(ids)].sum() if ids else 0.0))

    def way(self, heads: Sequence[int]) -> tuple[list[int], list[int]]:
        """Rows and columns of ``between`` along a plan: from the inputs over its exits to the final classifier."""
        sites = self.site[list(heads)].tolist()
        return [-1, *sites], [*sites, -1]


def descend(
    scorer: BitScorer, draft: Draft, weights: Mapping[Term, float], *, drop: bool = True, sweeps: int = SWEEPS
) -> Draft:
    """Coordinate descent on the levels; exits that do not pay are dropped.

    Args:
        scorer: holds confidences and right answers.
        draft: where to start.
        weights: loss (wrong answers, where there is no trust) that one unit of each term is worth.
        drop: whether exits may be dropped.
        sweeps: passes over the exits at most.

    Returns:
        A plan that is no worse for this weight; but for what dropping an exit does to the states of a carried plan, and
        to the shared parts of sites on different branches.
    """
    figures = _Figures.of(scorer, weights)
    for _ in range(sweeps):
        better = _sweep(scorer, draft, figures, drop)
        if better == draft:
            break
        draft = better
    return draft


def improve(
    scorer: BitScorer,
    draft: Draft,
    weights: Mapping[Term, float],
    *,
    allowed: Sequence[int] | None = None,
    moves: int = 24,
) -> Draft:
    """Local search: :func:`descend`, and heads added or exchanged as long as that gains.

    Only where exits do not depend on those before them; else a new head would change what the later ones say.

    Args:
        scorer: holds confidences and right answers.
        draft: where to start; no heads is the trunk alone.
        weights: loss (wrong answers, where there is no trust) that one unit of each term is worth.
        allowed: heads that may be used (default: all).
        moves: how many heads may be added or exchanged at most.
    """
    draft = descend(scorer, draft, weights)
    if scorer.by_path(draft.measure, draft.carry):
        return draft
    figures = _Figures.of(scorer, weights)
    heads = range(len(scorer.heads)) if allowed is None else allowed
    for _ in range(moves):
        found = _best_move(scorer, draft, figures, heads)
        if found is None:
            break
        draft = descend(scorer, found, weights)
    return draft


def total(scorer: BitScorer, draft: Draft, weights: Mapping[Term, float]) -> float:
    """The sum over samples of ``loss + weight * cost`` of a plan, for every term."""
    return _value(scorer, draft, _Figures.of(scorer, weights))


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
    passed = np.append(0.0, np.cumsum(figures.passed[ids]))
    if ids:
        passed += np.cumsum(figures.between[figures.way(ids)])
    prefix = np.maximum.accumulate(figures.prefix[ids])
    return np.append(prefix + passed[:-1] + figures.here[ids], figures.trunk + passed[-1])


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
    still = set(range(len(levels)))  # exits that are not dropped
    onward = loss[-1] + vector[-1]  # what a sample costs if it goes on behind the exit under consideration
    for index in reversed(range(len(levels))):
        here = loss[index] + vector[index]
        arrives = leave >= index
        gains = _gains(reached[index][arrives], (here - onward)[arrives], scorer.levels)
        head = draft.heads[index]
        others = [*draft.heads[:index], *(draft.heads[i] for i in range(index + 1, len(levels)) if i in still)]
        detour, once = figures.detour(others, index, head)
        own, once = figures.passed[head] + detour, figures.once[head] + once
        best = int(gains.argmin())
        if drop and -own * np.count_nonzero(arrives) - once <= gains[best]:
            levels[index] = scorer.levels
            still.discard(index)
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
        value = onward.sum() + figures.fixed(base.heads)
        arrives = leave >= place
        if not arrives.any():
            continue
        going_on = onward[arrives]
        passed = figures.passed[list(base.heads[:place])].sum()
        before, here_to = figures.way(base.heads[:place])
        passed += figures.between[before[:-1], here_to[:-1]].sum()
        floor = figures.prefix[list(base.heads[:place])].max(initial=0.0)
        for head in options:
            detour, once = figures.detour(base.heads, place, head)
            own = figures.passed[head] + detour
            reached_by = passed + figures.between[before[-1], figures.site[head]]
            leaving = max(floor, figures.prefix[head]) + reached_by + figures.here[head]
            here = scorer.loss[head][arrives] + leaving
            levels = _gains(scorer.reached(head, draft.measure)[arrives], here - going_on - own, scorer.levels)
            level = int(levels.argmin())
            worth = value + figures.once[head] + once + own * len(going_on) + levels[level]
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
    return float(paid.sum()) + figures.fixed(draft.heads)
