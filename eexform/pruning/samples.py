"""Samples that pruning passes look at: to score channels, and to mend what a cut has moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

Batch = tuple[Mapping[str, np.ndarray], np.ndarray | None]
"""Feeds by input name, and int64 labels ``[n]``, or ``None`` where there are none."""


class CalibrationData(Protocol):
    """A fixed, small choice of samples; :class:`eexform.data.Calibration` draws one from a data set."""

    @property
    def digest(self) -> str:
        """Sha-256 of which samples these are and of what is done to them."""

    @property
    def size(self) -> int:
        """Number of samples."""

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every sample once, in the same order every time; the last batch may be smaller."""


def first(samples: CalibrationData, count: int, batch_size: int) -> Iterator[Batch]:
    """The first ``count`` samples (all, where there are fewer) in batches of at most ``batch_size``.

    Arrays are cut along axis 0: for models whose batch is another axis take whole batches.
    """
    left = count
    for feeds, labels in samples.batches(min(batch_size, max(count, 1))):
        size = len(next(iter(feeds.values()))) if labels is None else len(labels)
        if size > left:
            feeds = {name: array[:left] for name, array in feeds.items()}
            labels = None if labels is None else labels[:left]
        yield feeds, labels
        left -= size
        if left <= 0:
            return
