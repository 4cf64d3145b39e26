"""Times of kernels that a table does not hold, from those that it holds.

Inside the range of known sizes: a power law in the sizes, fitted to the entries of the same operator and variant, times
what the nearest entries deviate from it (inverse-distance weights in the logarithms of the sizes). It passes through
every entry and is exact where time is a power law; the cost of a launch is taken off first, for it does not scale.
Outside that range: the nearest entry, scaled by the product of the sizes (between windows by their areas, too), and why
it is only an estimate. What the operator's smallest entry takes beyond its work does not scale, and no kernel is taken
to be faster for its size than the fastest that was seen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

_RIDGE = 1e-4
"""Pull towards time in proportion to the product of sizes, where entries do not say otherwise."""

_WEIGHTY = 3
_WINDOW = re.compile(r"k?([1-9]\d*(x[1-9]\d*)*)")  # 3x3, in fused tables k3x3
_PADS = re.compile(r"p[\d.]+")

_LEAST = 0.02
"""Share of a time that is left, at least, when a launch was taken off."""

_LEAST_US = 1e-3
"""No kernel takes less: where nothing could be measured a time is 0, and a power law has no logarithm of that."""


@dataclass(frozen=True)
class Entry:
    """One measured kernel: what it is, and microseconds."""

    op: str
    variant: str
    sizes: tuple[int, ...]
    us: float


@dataclass(frozen=True)
class Estimate:
    """Microseconds; and why they are not from the table's range, or ``None``."""

    us: float
    why: str | None = None


@dataclass(frozen=True)
class _Floor:
    """What the smallest kernel of an operator takes beyond its work, and least microseconds per unit of size."""

    us: float
    rate: float

    def least(self, total: float) -> float:
        return self.rate * math.exp(total)


@dataclass(eq=False)
class _Group:
    """Entries of one operator and variant with as many sizes."""

    sizes: np.ndarray
    us: np.ndarray
    launch: float

    def __post_init__(self) -> None:
        self.logs = np.log(self.sizes)
        self.body = np.log(np.maximum(self.us - self.launch, np.maximum(_LEAST * self.us, _LEAST_US)))

    def inside(self, logs: np.ndarray) -> bool:
        return bool((logs >= self.logs.min(0) - 1e-9).all() and (logs <= self.logs.max(0) + 1e-9).all())

    def interpolated(self, logs: np.ndarray) -> float:
        apart = np.sqrt(((self.logs - logs) ** 2).sum(1))
        weights = 1.0 / np.maximum(apart, 1e-6) ** 2
        residual = self.body - self._law(self.logs)
        return self.launch + math.exp(float(self._law(logs[None])[0]) + float(weights @ residual / weights.sum()))

    def nearest(self, logs: np.ndarray) -> int:
        return int(((self.logs - logs) ** 2).sum(1).argmin())

    def scaled(self, place: int, total: float, area: float, floor: _Floor) -> float:
        """The entry's time for another product of sizes (its logarithm is ``total``), times ``area``."""
        grown = math.exp(total - float(self.logs[place].sum())) * area
        return floor.us + max((float(self.us[place]) - floor.us) * grown, floor.least(total))

    def _law(self, logs: np.ndarray) -> np.ndarray:
        centre, level, slopes = self._fitted
        return level + (logs - centre) @ slopes

    @cached_property
    def _fitted(self) -> tuple[np.ndarray, float, np.ndarray]:
        """log time = level + slopes (log sizes - centre); least squares with slopes drawn to 1."""
        centre, level = self.logs.mean(0), float(self.body.mean())
        steps = self.logs - centre
        off = self.body - level - steps.sum(1)
        normal = steps.T @ steps + _RIDGE * np.eye(steps.shape[1])
        return centre, level, 1.0 + np.linalg.solve(normal, steps.T @ off)


@dataclass(eq=False)
class Lookup:
    """A table that answers for any kernel of an operator that it knows.

    Attributes:
        entries: kernels that stand there more than once count with their mean.
        launch_us: what a call of the smallest kernel takes.
    """

    entries: Sequence[Entry]
    launch_us: float = 0.0
    _exact: dict[tuple[str, str, tuple[int, ...]], float] = field(init=False)
    _groups: dict[str, dict[str, dict[int, _Group]]] = field(init=False)
    _floors: dict[str, tuple[float, float]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._exact = {key: float(np.mean(times)) for key, times in _collected(self.entries).items()}
        self._groups = {}
        sorted_in: dict[tuple[str, str, int], list[tuple[tuple[int, ...], float]]] = {}
        for (op, variant, sizes), us in self._exact.items():
            sorted_in.setdefault((op, variant, len(sizes)), []).append((sizes, us))
        for (op, variant, rank), rows in sorted_in.items():
            times = np.array([time for _, time in rows])
            group = _Group(
                np.array([sizes for sizes, _ in rows], dtype=np.float64), times, min(self.launch_us, times.min())
            )
            self._groups.setdefault(op, {}).setdefault(variant, {})[rank] = group

    def __contains__(self, op: str) -> bool:
        return op in self._groups

    def estimate(self, op: str, variant: str, sizes: tuple[int, ...]) -> Estimate | None:
        """Microseconds of one kernel; ``None`` for an operator that the table does not know at all."""
        known = self._exact.get((op, variant, sizes))
        if known is not None:
            return Estimate(known)
        if op not in self._groups:
            return None
        logs = np.log(np.maximum(np.asarray(sizes, dtype=np.float64), 1.0))
        total = float(logs.sum())
        group = self._groups[op].get(variant, {}).get(len(sizes))
        if group is not None:
            if group.inside(logs):
                return Estimate(group.interpolated(logs))
            place = group.nearest(logs)
            low, high = (getattr(group.sizes, which)(0).astype(int).tolist() for which in ("min", "max"))
            why = f"sizes {list(sizes)} are outside the table's {low} to {high}; scaled from {_shown(group, place)}"
            return Estimate(group.scaled(place, total, 1.0, self._floor(op, variant)), why)
        other, group = self._likest(op, variant, len(sizes))
        place = group.nearest(logs) if group.logs.shape[1] == len(sizes) else _closest(group, total)
        why = f"no entry of {op} ({variant}); scaled from ({other}) {_shown(group, place)}"
        area = _area(variant) / _area(other)
        return Estimate(group.scaled(place, total, area, self._floor(op, variant)), why)

    def _floor(self, op: str, variant: str) -> _Floor:
        if op not in self._floors:
            rows = [
                (math.exp(work) * _area(name), us)
                for name, ranks in self._groups[op].items()
                for group in ranks.values()
                for us, work in zip(group.us.tolist(), group.logs.sum(1).tolist(), strict=True)
            ]
            rate = min(us / work for work, us in rows)
            work, us = min(rows)
            self._floors[op] = max(us - rate * work, min(self.launch_us, us)), rate
        us, rate = self._floors[op]
        return _Floor(us, rate * _area(variant))

    def _likest(self, op: str, variant: str, rank: int) -> tuple[str, _Group]:
        """The variant with the fewest words that differ, the same number of sizes preferred."""
        wanted = set(variant.split())
        found = [
            (
                count != rank,
                _apart(wanted, set(other.split())) + 2 * abs(math.log(_area(variant) / _area(other))),
                other,
                count,
            )
            for other, ranks in self._groups[op].items()
            for count in ranks
        ]
        _, _, other, count = min(found)
        return other, self._groups[op][other][count]


def _apart(wanted: set[str], other: set[str]) -> int:
    """How different two variants are: another way of computing weighs more than what is fused or padded."""
    words = (word for word in wanted ^ other if not _WINDOW.fullmatch(word))
    return sum(_WEIGHTY if word[0].islower() and not _PADS.fullmatch(word) else 1 for word in words)


def _area(variant: str) -> int:
    """Positions of a variant's window, such as 9 for ``3x3`` (``k3x3`` in fused tables); 1 where it has none."""
    for word in variant.split():
        window = _WINDOW.fullmatch(word)
        if window:
            return math.prod(map(int, window[1].split("x")))
    return 1


def _closest(group: _Group, total: float) -> int:
    return int(np.abs(group.logs.sum(1) - total).argmin())


def _shown(group: _Group, place: int) -> list[int]:
    return [int(size) for size in group.sizes[place]]


def _collected(entries: Iterable[Entry]) -> dict[tuple[str, str, tuple[int, ...]], list[float]]:
    found: dict[tuple[str, str, tuple[int, ...]], list[float]] = {}
    for entry in entries:
        found.setdefault((entry.op, entry.variant, entry.sizes), []).append(entry.us)
    return found
