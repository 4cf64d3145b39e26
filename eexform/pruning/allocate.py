"""From scores to cuts: how many units each group loses so that a target is met, and which.

All units that may go are put in one order; a prefix of it is cut, the shortest that meets the target. The order keeps
two promises: within a group the least important go first, and every prefix respects the limits (units kept, multiples).
So one bisection over the length of the prefix is enough, and no graph is built on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from eexform.errors import OptionError, need, suggest
from eexform.ir.groups import Group

SCOPES = ("global", "uniform")
NORMALISATIONS = ("family", "group", "rank", "none", "cost")

Cuts = dict[str, tuple[int, ...]]
Cost = Callable[[Mapping[str, Sequence[int]]], float]


@dataclass(frozen=True)
class Limits:
    """What every allocation respects.

    Attributes:
        scope: ``global``: groups compete by score; ``uniform``: each loses the same share of its units.
        normalise: the scale on which groups compete under ``global``. ``family``: scores are divided by their mean over
            the family (isomorphic groups compete with each other, families are on a par); ``group``: by their mean over
            the group; ``rank``: a score is replaced by its place in the family, 0..1 (Isomorphic Pruning, Fang et al.
            2024); ``none``: as they are; ``cost``: per what a unit saves of the cost, for scores that say how much is
            lost (``taylor``).
        round_to: what is left of a group that is cut fills channels to a multiple of this; a group where no smaller
            multiple exists stays whole.
        least: units that a group keeps at least.
        most: largest share of a group's units that is cut.
    """

    scope: str = "global"
    normalise: str = "family"
    round_to: int = 1
    least: int = 1
    most: float = 0.9

    def __post_init__(self) -> None:
        for name, known in (("scope", SCOPES), ("normalise", NORMALISATIONS)):
            given = getattr(self, name)
            need(given in known, f"{name}: {given!r} is not a choice: {suggest(str(given), known)}", OptionError)
        need(self.round_to >= 1, f"round_to: {self.round_to} must be 1 or more", OptionError)
        need(self.least >= 1, f"least: {self.least} must be 1 or more; nothing can be cut to zero", OptionError)
        need(0 < self.most <= 1, f"most: {self.most} is not a share between 0 and 1", OptionError)


class Step(NamedTuple):
    """One move of the order: the group is left with ``size - removed`` units."""

    key: float
    group: int
    removed: int


def multiple(group: Group, round_to: int) -> int:
    """Of what the number of kept units must be a multiple so that the group's channels are one of ``round_to``.

    A unit is one channel of most slots, and several of some (a grouped convolution ties a channel of each of its g
    groups: g at a time). What computes the channels decides; where nothing does, the weights that read them.
    """
    for roles in (("filter", "table"), ("reader",)):
        widths = {member.units.shape[1] for member in group.members if member.constant and member.role in roles}
        if widths:
            return math.lcm(*(round_to // math.gcd(width, round_to) for width in widths))
    return round_to


def kept_counts(group: Group, limits: Limits) -> tuple[int, ...]:
    """Numbers of units that the group may be left with, falling, its size first."""
    floor = max(1, min(limits.least, group.size), math.ceil(group.size * (1 - limits.most) - 1e-9))
    unit = multiple(group, limits.round_to)
    largest = (group.size - 1) // unit * unit
    return (group.size, *(count for count in range(largest, 0, -unit) if count >= floor))


def weakest_first(scores: np.ndarray) -> np.ndarray:
    """Units by rising score; equal ones by falling number, so that the first of them stay."""
    return np.lexsort((-np.arange(len(scores)), scores))


class Order:
    """The units of some groups in the order in which they go.

    Attributes:
        groups: the groups.
        steps: moves in order; every prefix is a valid cut.
        units: number of units of all groups.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        scores: Mapping[str, np.ndarray],
        families: Sequence[Sequence[str]],
        limits: Limits,
        savings: Mapping[str, float] | None = None,
    ) -> None:
        """Put the units in order.

        Args:
            groups: those that may be cut.
            scores: [size] of each.
            families: names of isomorphic groups; other names in them do not matter.
            limits: what to respect.
            savings: by group, how much of the cost one unit saves; asked for where scores are ``normalise``-d by it.
        """
        self.groups = tuple(groups)
        self.units = sum(group.size for group in groups)
        self._weakest = [weakest_first(scores[group.name]) for group in groups]
        keys = _keys(self.groups, scores, families, limits, savings or {})
        steps = []
        for place, group in enumerate(self.groups):
            mine = keys[place][self._weakest[place]]
            counts = kept_counts(group, limits)
            for before, after in pairwise(counts):
                first, last = group.size - before, group.size - after
                steps.append(Step(float(mine[first] if last - first == 1 else mine[first:last].mean()), place, last))
        self.steps = tuple(_monotone(steps))

    def cuts(self, length: int) -> Cuts:
        """The cut after the first ``length`` moves: units by group, rising; groups that lose nothing are left out."""
        return self.after(self.steps[:length])

    def after(self, steps: Sequence[Step]) -> Cuts:
        """The cut after the given moves; of each group, the first ones."""
        removed: dict[int, int] = {}
        for step in steps:
            removed[step.group] = step.removed
        return {
            self.groups[place].name: tuple(sorted(self._weakest[place][:count].tolist()))
            for place, count in sorted(removed.items())
        }

    def removed(self) -> np.ndarray:
        """Units that are gone after each number of moves, int [moves + 1], from 0."""
        last = dict.fromkeys(range(len(self.groups)), 0)
        total = [0]
        for step in self.steps:
            total.append(total[-1] + step.removed - last[step.group])
            last[step.group] = step.removed
        return np.array(total)

    def shortest(self, holds: Callable[[int], bool]) -> int | None:
        """The smallest number of moves for which ``holds`` is true (it stays true behind); ``None``: it never is."""
        if not holds(len(self.steps)):
            return None
        low, high = 0, len(self.steps)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle + 1, high)
        return low


def to_cost(order: Order, cost: Cost, ratio: float) -> tuple[Cuts, bool]:
    """What saves ``ratio`` of the cost, and whether that much can be saved (else: all there is).

    It is the shortest prefix that does, without what it takes in excess: its last move may have saved much more than
    was missing, so the most important units in front of it come back as long as the target is still met.

    Args:
        order: of the units.
        cost: what a cut graph costs; never rises with the cut.
        ratio: share of the uncut cost to save, 0-1.
    """
    bound = cost({}) * (1 - ratio)
    limit = bound * (1 + 1e-12)
    found = order.shortest(lambda length: cost(order.cuts(length)) <= limit)
    if found is None:
        return order.cuts(len(order.steps)), False
    if not found:
        return {}, True
    *before, last = order.steps[:found]

    def without(count: int) -> list[Step]:
        """The prefix without the last ``count`` moves before its final one; moves of that one's group stay."""
        at = len(before) - count
        return [*before[:at], *(step for step in before[at:] if step.group == last.group), last]

    low, high = 0, len(before)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(order.after(without(middle))) <= limit else (low, middle - 1)
    return order.after(without(low)), True


def to_share(order: Order, ratio: float) -> tuple[Cuts, bool]:
    """The shortest prefix that removes ``ratio`` of all units, and whether that many can go (else: all that can)."""
    removed = order.removed()
    found = order.shortest(lambda length: removed[length] >= ratio * order.units - 1e-9)
    return order.cuts(len(order.steps) if found is None else found), found is not None


def nearest_share(order: Order, ratio: float) -> Cuts:
    """The prefix that removes the number of units nearest to ``ratio`` of all, the larger of two that are as near."""
    distance = np.abs(order.removed() - ratio * order.units)
    near = np.flatnonzero(distance <= distance.min() + 1e-9)
    return order.cuts(int(near[-1]))


def _keys(
    groups: Sequence[Group],
    scores: Mapping[str, np.ndarray],
    families: Sequence[Sequence[str]],
    limits: Limits,
    savings: Mapping[str, float],
) -> list[np.ndarray]:
    """What the units of all groups are ordered by, [size] per group; it rises with the score within a group."""
    if limits.scope == "uniform":
        keys = []
        for group in groups:
            place = np.empty(group.size)
            place[weakest_first(scores[group.name])] = (np.arange(group.size) + 0.5) / group.size
            keys.append(place)
        return keys
    if limits.normalise == "none":
        return [scores[group.name] for group in groups]
    if limits.normalise == "cost":  # what saves nothing goes last
        return [
            scores[group.name] / saved if (saved := savings.get(group.name, 1.0)) > 0 else np.full(group.size, np.inf)
            for group in groups
        ]
    if limits.normalise == "group":
        return [_relative(scores[group.name], scores[group.name]) for group in groups]
    known = {group.name for group in groups}
    found: dict[str, np.ndarray] = {}
    for family in families:
        names = [name for name in family if name in known]
        if not names:
            continue
        together = np.concatenate([scores[name] for name in names])
        if limits.normalise == "rank":
            rank = np.empty(len(together))
            rank[weakest_first(together)] = (np.arange(len(together)) + 0.5) / len(together)
            parts = np.split(rank, np.cumsum([len(scores[name]) for name in names])[:-1])
        else:
            parts = [_relative(scores[name], together) for name in names]
        found.update(zip(names, parts, strict=True))
    return [found.get(group.name, scores[group.name]) for group in groups]


def _relative(scores: np.ndarray, whole: np.ndarray) -> np.ndarray:
    mean = float(whole.mean())
    return scores / mean if mean > 0 else scores


def _monotone(steps: Sequence[Step]) -> list[Step]:
    """The steps by key, then group; those of one group keep their order even where rounding turned keys around."""
    highest: dict[int, float] = {}
    raised = []
    for step in steps:
        key = max(step.key, highest.get(step.group, -math.inf))
        highest[step.group] = key
        raised.append(step._replace(key=key))
    return sorted(raised, key=lambda step: (step.key, step.group, step.removed))
