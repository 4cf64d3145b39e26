"""Fast exact scoring of whole populations: bit sets of samples per head and threshold level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eexform.cost_models.paths import PathCosts
from eexform.errors import OptionError, need
from eexform.ir import measures as measures_
from eexform.search.judge import PLANES, STEPS, Judge
from eexform.search.paths import PathColumns
from eexform.search.scorer import Candidate, PlannedExit
from eexform.search.scores import HeadScores

CHUNK = 256
"""Plans scored together: their bit sets of a few thousand samples stay in the second-level cache."""

MOST_LEVELS = 65_535
"""Levels are counted in 16 bits."""

TABLE_LIMIT = 4 << 30
"""Bytes that the bit sets may take at most."""


def level_ranks(samples: int, levels: int) -> np.ndarray:
    """Rank (0 = least sure) of the sample whose confidence is each level's threshold: int64 [levels], not falling.

    Cosine spacing: dense where few samples leave (an early exit takes only the surest) and where few stay (those who
    reach a late exit are the least sure), 1.6/levels of the samples apart in the middle.
    """
    places = (1.0 - np.cos(np.pi * np.arange(levels) / levels)) / 2.0
    return np.minimum((places * samples).astype(np.int64), samples - 1)


def grid(confidence: np.ndarray, levels: int) -> np.ndarray:
    """Thresholds of the levels, float32 [levels], not falling; each is the confidence of some sample."""
    return np.sort(confidence)[level_ranks(len(confidence), levels)]


@dataclass(frozen=True)
class Counts:
    """How plans fared.

    Attributes:
        correct: right answers, int64 [plans].
        left: samples that leave at each exit, the final one last, int64 [plans, exits + 1].
        credit: sum over samples of what the answers are worth, float64 [plans]; ``correct`` without trust.
    """

    correct: np.ndarray
    left: np.ndarray
    credit: np.ndarray


class BitScorer:
    """Scores plans whose thresholds are grid levels, by the ten thousand.

    For each head, measure and level there is the set of samples that would leave there; for each head the set of
    those it gets right. A plan is a handful of AND and XOR over such sets. Since a level's threshold *is* a float32
    confidence of some sample, the counts are those of :class:`eexform.search.scorer.Scorer`, not an approximation.
    Level ``levels`` means "never". Plans in which an exit depends on those before it (scores carried on, or a measure
    that accumulates gates) are scored from cached columns of their paths instead (slower).

    Args:
        scores: cached scores of the selection split.
        costs: path costs by cost model.
        places: the sites in the order in which a sample meets them, each with its heads.
        measures: names of the confidence measures that plans may use.
        levels: thresholds per head.
        fixed: thresholds that are not searched, by site: every level there means that value.
        trust: weight of the trunk's opinion in ``credit`` (see :class:`eexform.search.judge.Judge`).

    Memory: heads x measures x levels x samples / 8 bytes, filled as heads are first used.
    """

    def __init__(
        self,
        scores: HeadScores,
        costs: Mapping[str, PathCosts],
        places: Sequence[tuple[str, Sequence[str]]],
        *,
        measures: Sequence[str] = ("max_prob",),
        levels: int = 128,
        fixed: Mapping[str, float] | None = None,
        trust: float = 0.0,
    ) -> None:
        need(1 <= levels <= MOST_LEVELS, f"{levels} threshold levels: 1 to {MOST_LEVELS} are possible", OptionError)
        self.scores = scores
        self.costs = dict(costs)
        self.heads: tuple[tuple[str, str], ...] = tuple((site, head) for site, heads in places for head in heads)
        self.identity = {pair: index for index, pair in enumerate(self.heads)}
        self.site_of = np.array([rank for rank, (_, heads) in enumerate(places) for _ in heads], np.int64)
        self.sites = tuple(site for site, _ in places)
        self.measures = tuple(measures)
        self.levels = levels
        self.fixed = dict(fixed or {})
        self.samples = len(scores)
        self._words = -(-self.samples // 64)
        rows = len(self.heads) * len(self.measures) * levels + 1
        need(
            rows * self._words * 8 <= TABLE_LIMIT,
            f"{rows:,} threshold sets over {self.samples:,} samples need {rows * self._words * 8 / 2**30:.1f} GiB; "
            "use fewer levels, heads or selection samples",
            OptionError,
        )
        # row 0 is "never"; np.zeros is not paid for until a row is written
        self._table = np.zeros((rows, self._words), np.uint64)
        self._built = np.zeros((len(self.measures), len(self.heads)), bool)
        self._grids: dict[tuple[int, int], np.ndarray] = {}
        self._reached: dict[tuple[int, int], np.ndarray] = {}
        self.judge = Judge(scores, trust)
        self._planes = 1 + (PLANES if trust else 0)
        # bit planes of what an answer is worth, the last row for "no head": right or not, then the shortfall's bits
        self._worth = np.zeros((len(self.heads) + 1, self._planes, self._words), np.uint64)
        self.loss = np.ones((len(self.heads), self.samples), np.float32)
        for index, (site, head) in enumerate(self.heads):
            predicted = scores.of(site, head).argmax(axis=1)
            self._worth[index] = self._planes_of(predicted)
            self.loss[index] = 1.0 - self.judge.credit(predicted)
        predicted = scores.final.argmax(axis=1)
        self._final_worth = self._planes_of(predicted)
        self.final_right = self.judge.right(predicted)
        self.final_loss = 1.0 - self.judge.credit(predicted)
        self._all = self._pack(np.ones((1, self.samples), bool))[0]
        self._paths = PathColumns(scores, self.heads, self.judge)
        self._sequential = np.array([_is_sequential(name) for name in self.measures], bool)

    # -- thresholds ----------------------------------------------------------------------------------------------------

    def thresholds(self, head: int, measure: int) -> np.ndarray:
        """The grid of a head under a measure (plain plans): float32 [levels]."""
        self._build(measure, head)
        return self._grids[measure, head]

    def reached(self, head: int, measure: int) -> np.ndarray:
        """How many levels each sample reaches, uint16 [samples]: it leaves at level l where ``reached > l``."""
        self._build(measure, head)
        return self._reached[measure, head]

    def by_path(self, measure: int, carry: float) -> bool:
        """Whether an exit's confidence depends on the exits before it."""
        return bool(carry) or bool(self._sequential[measure])

    def columns(self, heads: Sequence[int], measure: int, carry: float) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Grids and reached levels of a plan's exits in order, carried or plain."""
        if not self.by_path(measure, carry):
            return [self.thresholds(h, measure) for h in heads], [self.reached(h, measure) for h in heads]
        grids, reached = [], []
        for stop in range(1, len(heads) + 1):
            confidence = self._paths.confidence(carry, tuple(heads[:stop]), self.measures[measure])
            found = self._grid_of(heads[stop - 1], confidence)
            grids.append(found)
            reached.append(_reached(found, confidence))
        return grids, reached

    def losses(self, heads: Sequence[int], carry: float) -> np.ndarray:
        """What each exit of a plan loses per sample (1 - credit), the final one last: float64 [exits + 1, samples]."""
        if not carry or not len(heads):
            return np.concatenate([self.loss[list(heads)], self.final_loss[None]])
        path = tuple(heads)
        credits = [self._paths.answers(carry, path[:stop])[1] for stop in range(1, len(path) + 1)]
        return 1.0 - np.stack([*credits, self._paths.answers(carry, path, final=True)[1]])

    def candidate(self, heads: Sequence[int], levels: Sequence[int], measure: int, carry: float) -> Candidate:
        """The plan with its thresholds as numbers."""
        grids, _ = self.columns(heads, measure, carry)
        exits = []
        for head, level, thresholds in zip(heads, levels, grids, strict=True):
            threshold = float(thresholds[level]) if level < self.levels else float("inf")
            exits.append(PlannedExit(*self.heads[head], threshold))
        return Candidate(tuple(exits), self.measures[measure], float(carry))

    # -- scoring -------------------------------------------------------------------------------------------------------

    def score(
        self, heads: np.ndarray, levels: np.ndarray, measure: np.ndarray, carry: np.ndarray | None = None
    ) -> Counts:
        """Count right answers and leavers of many plans.

        Args:
            heads: head of each exit in site order, int [plans, exits]; -1 is no exit (anywhere in the row).
            levels: level of each exit, same shape; ``self.levels`` is never.
            measure: index into :attr:`measures`, int [plans].
            carry: weight of carried scores per plan; ``None`` is all plain.
        """
        plans, width = heads.shape
        correct = np.zeros(plans, np.int64)
        left = np.zeros((plans, width + 1), np.int64)
        credit = np.zeros(plans, np.float64)
        carried = np.zeros(plans) if carry is None else np.asarray(carry)
        by_path = (carried != 0) | self._sequential[measure]
        for plan in np.flatnonzero(by_path):
            correct[plan], left[plan], credit[plan] = self._score_path(
                heads[plan], levels[plan], int(measure[plan]), float(carried[plan])
            )
        plain = np.flatnonzero(~by_path)
        if len(plain):
            self._score_plain(plain, heads, levels, measure, correct, left, credit)
        return Counts(correct, left, credit)

    def vectors(self, model: str, heads: np.ndarray) -> np.ndarray:
        """What leaving at each exit costs, the final one last: float64 [plans, exits + 1] (as ``PathCosts.path``)."""
        costs = self.costs[model]
        there = heads >= 0
        pairs = self.heads
        here = _looked_up([costs.head[pair] + costs.decision.get(pair[0], 0.0) for pair in pairs], heads)
        if not costs.per_sample:
            return np.repeat(costs.trunk + here.sum(axis=1, keepdims=True), heads.shape[1] + 1, axis=1)
        going = _looked_up([costs.onward.get(site, 0.0) for site, _ in pairs], heads)
        nothing = np.zeros((len(heads), 1))
        reached = np.concatenate([self._reach(costs, heads, there), nothing + costs.trunk], axis=1)
        here = np.concatenate([here, nothing], axis=1)
        if costs.combine == "sum":
            passed = np.cumsum(here[:, :-1] + going, axis=1)
            if costs.between:
                reached = reached + self._between(model, heads, there)
            return reached + np.concatenate([nothing, passed], axis=1) + here
        passed = np.maximum.accumulate(np.maximum(here[:, :-1], going), axis=1)
        held = np.maximum(here, np.concatenate([nothing, passed], axis=1))
        return np.maximum(np.maximum.accumulate(reached, axis=1), held)

    def between(self, model: str) -> np.ndarray:
        """``PathCosts.between`` by numbers of sites: float64 [sites + 1, sites + 1].

        The last row is the inputs, the last column the final classifier.
        """
        costs = self.costs[model]
        number = {site: place for place, site in enumerate(self.sites)} | {"": -1}
        found = np.zeros((len(self.sites) + 1, len(self.sites) + 1))
        for (before, after), cost in costs.between.items():
            if before in number and after in number:
                found[number[before], number[after]] = cost
        return found

    def mean_cost(self, model: str, heads: np.ndarray, counts: Counts) -> np.ndarray:
        """Mean cost per sample, float64 [plans]."""
        return (counts.left * self.vectors(model, heads)).sum(axis=1) / self.samples

    # -- inside --------------------------------------------------------------------------------------------------------

    def _between(self, model: str, heads: np.ndarray, there: np.ndarray) -> np.ndarray:
        """What the trunk has cost more at each exit because of the branches so far: float64 [plans, exits + 1]."""
        table = self.between(model)
        sites = np.where(there, self.site_of[heads], -1) if len(self.site_of) else np.full(heads.shape, -1)
        paid = np.zeros((len(heads), heads.shape[1] + 1))
        so_far, last = np.zeros(len(heads)), np.full(len(heads), -1)
        for place in range(heads.shape[1]):
            paid[:, place] = so_far + table[last, sites[:, place]]
            so_far = np.where(there[:, place], paid[:, place], so_far)
            last = np.where(there[:, place], sites[:, place], last)
        paid[:, -1] = np.where(there.any(axis=1), so_far + table[last, -1], 0.0)
        return paid

    def _reach(self, costs: PathCosts, heads: np.ndarray, there: np.ndarray) -> np.ndarray:
        """What has been paid for the trunk at each exit: float64 [plans, exits]."""
        if costs.nested:
            prefix = np.array([costs.prefix[site] for site, _ in self.heads] + [0.0], np.float64)[heads]
            return np.maximum.accumulate(prefix, axis=1)
        place = {site: index for index, site in enumerate(costs.sites)}
        sites = np.array([place[site] for site, _ in self.heads] + [0], np.int64)[heads]
        plans = np.arange(len(heads))[:, None]
        chosen = np.zeros((len(heads), len(costs.sites)), bool)
        np.logical_or.at(chosen, (plans, sites), there)
        return costs.reach_matrix(chosen)[plans, sites]

    def _pack(self, sets: np.ndarray) -> np.ndarray:
        """Boolean [sets, samples] to uint64 [sets, words], padded with zeros."""
        packed = np.zeros((len(sets), self._words * 8), np.uint8)
        octets = np.packbits(sets, axis=1, bitorder="little")
        packed[:, : octets.shape[1]] = octets
        return packed.view(np.uint64)

    def _planes_of(self, predicted: np.ndarray) -> np.ndarray:
        """Bit planes of what answers are worth: uint64 [planes, words]."""
        sets = [self.judge.right(predicted)]
        if self.judge.trust:
            shortfall = self.judge.shortfall(predicted)
            sets += [(shortfall >> bit & 1).astype(bool) for bit in range(PLANES)]
        return self._pack(np.stack(sets))

    def _credit(self, sums: np.ndarray) -> np.ndarray:
        """Credit from the planes' counts: int64 [plans, planes] to float64 [plans]."""
        if not self.judge.trust:
            return sums[:, 0].astype(np.float64)
        shortfall = sums[:, 1:] @ (1 << np.arange(PLANES)) / STEPS
        return (1.0 - self.judge.trust) * sums[:, 0] + self.judge.trust * (self.judge.own.sum() - shortfall)

    def _grid_of(self, head: int, confidence: np.ndarray) -> np.ndarray:
        site = self.heads[head][0]
        if site in self.fixed:
            return np.full(self.levels, self.fixed[site], np.float32)
        return grid(confidence, self.levels)

    def _build(self, measure: int, head: int) -> None:
        if self._built[measure, head]:
            return
        confidence = self._paths.confidence(0.0, (head,), self.measures[measure])
        found = self._grid_of(head, confidence)
        reached = _reached(found, confidence)
        start = 1 + (measure * len(self.heads) + head) * self.levels
        self._table[start : start + self.levels] = self._pack(
            reached > np.arange(self.levels, dtype=np.uint16)[:, None]
        )
        self._grids[measure, head], self._reached[measure, head] = found, reached
        self._built[measure, head] = True

    def _score_plain(
        self,
        plans: np.ndarray,
        heads: np.ndarray,
        levels: np.ndarray,
        measure: np.ndarray,
        correct: np.ndarray,
        left: np.ndarray,
        credit: np.ndarray,
    ) -> None:
        count = len(self.heads)
        ids, there = heads[plans], heads[plans] >= 0
        used = np.unique((measure[plans, None] * count + ids)[there])
        for place in used[~self._built.reshape(-1)[used]]:
            self._build(int(place) // count, int(place) % count)
        ids = np.where(there, ids, count)
        rows = 1 + (measure[plans, None] * count + ids) * self.levels + levels[plans]
        rows = np.where(there & (levels[plans] < self.levels), rows, 0)
        chunk = max(32, CHUNK // self._planes)
        size = min(chunk, len(plans))
        sets = np.empty((2, size, self._words), np.uint64)
        wide = np.empty((2, size, self._planes, self._words), np.uint64)
        bits, wide_bits = np.empty(sets.shape[1:], np.uint8), np.empty(wide.shape[1:], np.uint8)
        staying = np.empty((len(plans), heads.shape[1] + 1), np.int64)
        staying[:, 0] = self.samples
        sums = np.empty((len(plans), self._planes), np.int64)
        for start in range(0, len(plans), chunk):
            stop = min(start + chunk, len(plans))
            leaves, stay = sets[:, : stop - start]
            worth, total = wide[:, : stop - start]
            counted, wide_counted = bits[: stop - start], wide_bits[: stop - start]
            stay[:] = self._all
            total[:] = 0
            for place in range(heads.shape[1]):
                # mode "clip" writes straight into ``out``; the default checks indices through a temporary
                np.take(self._table, rows[start:stop, place], axis=0, out=leaves, mode="clip")
                np.bitwise_and(leaves, stay, out=leaves)
                np.bitwise_xor(stay, leaves, out=stay)
                np.take(self._worth, ids[start:stop, place], axis=0, out=worth, mode="clip")
                np.bitwise_and(worth, leaves[:, None], out=worth)
                np.bitwise_or(total, worth, out=total)
                np.bitwise_count(stay, out=counted)
                staying[start:stop, place + 1] = counted.sum(axis=1, dtype=np.int64)
            np.bitwise_and(stay[:, None], self._final_worth, out=worth)
            np.bitwise_or(total, worth, out=total)
            np.bitwise_count(total, out=wide_counted)
            sums[start:stop] = wide_counted.sum(axis=2, dtype=np.int64)
        correct[plans] = sums[:, 0]
        credit[plans] = self._credit(sums)
        left[plans, :-1] = staying[:, :-1] - staying[:, 1:]
        left[plans, -1] = staying[:, -1]

    def _score_path(
        self, heads: np.ndarray, levels: np.ndarray, measure: int, carry: float
    ) -> tuple[int, np.ndarray, float]:
        places = np.flatnonzero(heads >= 0)
        chosen = tuple(int(heads[place]) for place in places)
        left = np.zeros(len(heads) + 1, np.int64)
        stay = np.ones(self.samples, bool)
        right, credit = self.final_right, 1.0 - self.final_loss
        if chosen:
            right, credit = (found.copy() for found in self._paths.answers(carry, chosen, final=True))
        for index, place in enumerate(places):
            if levels[place] >= self.levels:
                continue
            path = chosen[: index + 1]
            confidence = self._paths.confidence(carry, path, self.measures[measure])
            leaves = stay & (confidence >= self._grid_of(chosen[index], confidence)[levels[place]])
            stay &= ~leaves
            left[place] = np.count_nonzero(leaves)
            for whole, part in zip((right, credit), self._paths.answers(carry, path), strict=True):
                np.copyto(whole, part, where=leaves)
        left[-1] = np.count_nonzero(stay)
        return int(np.count_nonzero(right)), left, float(credit.sum())


def _looked_up(figures: Sequence[float], heads: np.ndarray) -> np.ndarray:
    """The figure of each head, 0 where there is none (-1): float64, shaped like ``heads``."""
    return np.array([*figures, 0.0], np.float64)[heads]


def _is_sequential(name: str) -> bool:
    return measures_.is_learned(name) and measures_.get_gate(name).sequential


def _reached(thresholds: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """How many thresholds each confidence reaches, uint16 [samples]; one sort instead of a search per sample."""
    order = np.argsort(confidence)
    begins = np.searchsorted(confidence[order], thresholds)  # the first sample, by rank, that reaches each threshold
    reached = np.empty(len(confidence), np.uint16)
    reached[order] = np.cumsum(np.bincount(begins, minlength=len(confidence) + 1)[:-1])
    return reached
