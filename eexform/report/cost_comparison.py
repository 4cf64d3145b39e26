"""Cost models side by side, and how far they are from the one that was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Column:
    """What one cost model says about every row.

    Attributes:
        label: its name.
        unit: of the figures.
        measured: whether they were.
        differences: whether a stretch is what two measurements differ by.
        adds_up: whether a figure is work or time, which another unit can be scaled to; sizes and memory are not.
        figures: one per row.
        whole: figures of all rows together, by name: ``total``; or the mean over a split.
    """

    label: str
    unit: str
    measured: bool
    differences: bool
    adds_up: bool
    figures: tuple[float, ...]
    whole: Mapping[str, float]


@dataclass(frozen=True)
class Judged:
    """A column against the measured one.

    Attributes:
        scale: what its figures were multiplied with to be in the measured unit, where they are in another: the one
            constant that makes the sums of the rows equal. ``None``: they are in it already.
        errors: per row, (predicted - measured) / measured; ``None`` where nothing was measured.
        whole: the same for the figures of :attr:`Column.whole`.
        median: of the errors' absolute values.
        worst: row with the largest one.
        tau: Kendall's rank correlation (tau-b) over the rows; ``None`` where all are equal, or there is one only.
    """

    scale: float | None
    errors: tuple[float | None, ...]
    whole: Mapping[str, float | None]
    median: float | None
    worst: int | None
    tau: float | None


@dataclass(frozen=True)
class Comparison:
    """Cost models side by side.

    Attributes:
        rows: value at which each stretch or path ends; empty: the graph's own classifier.
        paths: whether a row is what a sample pays that leaves there, or the stretch of the trunk alone.
        columns: one per cost model.
        reference: place of the measured one that the others are judged by; ``None`` where none was measured.
        judged: per column; ``None`` for the reference and for what cannot be compared with it.
    """

    rows: tuple[str, ...]
    paths: bool
    columns: tuple[Column, ...]
    reference: int | None
    judged: tuple[Judged | None, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; the keys are stable."""
        return {
            "rows": [row or None for row in self.rows],
            "of": "paths" if self.paths else "stretches",
            "measured": None if self.reference is None else self.columns[self.reference].label,
            "columns": [
                {
                    "label": column.label,
                    "unit": column.unit,
                    "measured": column.measured,
                    "differences": column.differences,
                    "figures": list(column.figures),
                    "whole": dict(column.whole),
                    "judged": None if judged is None else _plain(judged),
                }
                for column, judged in zip(self.columns, self.judged, strict=True)
            ],
        }


def compared(columns: Sequence[Column], rows: Sequence[str], *, paths: bool) -> Comparison:
    """Put cost models side by side; the first measured one of work or time is what the others are judged by."""
    reference = next((i for i, column in enumerate(columns) if column.measured and column.adds_up), None)
    judged = [
        None if reference is None or place == reference else _judge(column, columns[reference])
        for place, column in enumerate(columns)
    ]
    return Comparison(tuple(rows), paths, tuple(columns), reference, tuple(judged))


def _judge(column: Column, measured: Column) -> Judged | None:
    if not column.adds_up:
        return None
    scale = None
    if column.unit != measured.unit:
        total = sum(column.figures)
        if not total:
            return None
        scale = sum(measured.figures) / total
    factor = 1.0 if scale is None else scale
    errors = tuple(_error(factor * ours, theirs) for ours, theirs in zip(column.figures, measured.figures, strict=True))
    known = {row: abs(error) for row, error in enumerate(errors) if error is not None}
    return Judged(
        scale,
        errors,
        {name: _error(factor * column.whole[name], measured.whole[name]) for name in column.whole},
        median(known.values()) if known else None,
        max(known, key=known.__getitem__) if known else None,
        _tau(column.figures, measured.figures),
    )


def _error(predicted: float, measured: float) -> float | None:
    return (predicted - measured) / measured if measured > 0 else None


def _tau(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    from scipy.stats import kendalltau

    tau = float(kendalltau(ours, theirs).statistic) if len(ours) > 1 else math.nan
    return None if math.isnan(tau) else tau


def _plain(judged: Judged) -> dict[str, Any]:
    return {
        "scale": judged.scale,
        "errors": list(judged.errors),
        "whole": dict(judged.whole),
        "median_error": judged.median,
        "worst_row": judged.worst,
        "kendall_tau": judged.tau,
    }
