"""Thresholds moved off the very confidences that they were found on, so that rounding elsewhere changes no decision."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

import numpy as np

from eexform.search.scorer import Candidate, Scorer


def with_margins(candidate: Candidate, scorer: Scorer, *, keep: Collection[str] = ()) -> Candidate:
    """The plan with each threshold halfway down to the next lower confidence: every decision on select stays the same.

    A search takes confidences of select samples as thresholds. Left there, the sample itself would sit exactly on the
    edge, and another runtime, batch size or machine, whose scores differ in the last bit, might send it elsewhere.

    Args:
        candidate: thresholds are confidences of select samples, or infinite.
        scorer: of its trunk.
        keep: sites whose thresholds were given, and stay.
    """
    moved = []
    for exit_, sure in zip(candidate.exits, scorer.confidences(candidate, "select"), strict=True):
        if exit_.site in keep or math.isinf(exit_.threshold):
            moved.append(exit_)
            continue
        moved.append(replace(exit_, threshold=_between(sure, exit_.threshold)))
    return replace(candidate, exits=tuple(moved))


def _between(confidence: np.ndarray, threshold: float) -> float:
    """The float32 halfway between ``threshold`` and the highest confidence below it (0 where there is none)."""
    edge = np.float32(threshold)
    below = confidence[confidence < edge]
    low = below.max() if len(below) else np.float32(0.0)
    middle = np.float32((float(low) + float(edge)) / 2)
    return float(middle if low < middle <= edge else edge)
