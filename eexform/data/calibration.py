"""A fixed, small choice of samples for passes that have to look at data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from eexform.data.dataset import Dataset
from eexform.errors import DataError, OptionError

_STREAM = 0xCA11  # keeps this draw apart from others with the same seed


@dataclass(frozen=True, eq=False)
class Calibration:
    """Some samples of one split, never augmented, in the same order every time.

    Implements :class:`eexform.pruning.samples.CalibrationData`. The samples are drawn without regard to labels.

    Attributes:
        dataset: bound to the model that the samples are for (:meth:`eexform.data.Dataset.bind`).
        split: where they come from. The default is the one split that nothing is judged on.
        size: samples wanted; afterwards those there are: fewer where the split is smaller.
        seed: of the draw.
    """

    dataset: Dataset
    split: str = "head_train"
    size: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise OptionError(f"calibration samples: expected at least 1, found {self.size}")
        if self.seed < 0:
            raise OptionError(f"calibration seed: expected a whole number from 0, found {self.seed}")
        if self.dataset.feeds is None:
            raise DataError("calibration: the data set is not bound to a model; give Dataset.bind(graph)")
        object.__setattr__(self, "split", self.split.replace("-", "_"))
        object.__setattr__(self, "size", min(self.size, self.dataset.size(self.split)))

    @cached_property
    def positions(self) -> np.ndarray:
        """Where the samples are in the split, int64, as drawn: the first few of them are a draw as well."""
        whole = self.dataset.size(self.split)
        return np.random.default_rng([self.seed, _STREAM]).permutation(whole)[: self.size]

    @cached_property
    def digest(self) -> str:
        """Sha-256 of source, preprocessing, label mode and the indices drawn; augmentation plays no part."""
        chosen = self.dataset.splits[self.split]
        about = [self.dataset.source.digest, self.dataset.preprocess.digest, self.dataset.labels, chosen.part]
        hasher = hashlib.sha256(json.dumps(["eexform calibration 1", *about]).encode())
        hasher.update(chosen.indices[self.positions].astype("<i8").tobytes())
        return hasher.hexdigest()

    def batches(self, batch_size: int) -> Iterator[tuple[Mapping[str, np.ndarray], np.ndarray | None]]:
        """Feeds and labels (``None`` in label-free mode) of every sample, ``batch_size`` at a time.

        Raises:
            DataError: a sample holds NaN or infinity, or cannot be decoded.
        """
        if batch_size < 1:
            raise OptionError(f"batch size: expected at least 1, found {batch_size}")
        for start in range(0, self.size, batch_size):
            batch = self.dataset.batch(self.split, self.positions[start : start + batch_size])
            yield batch.feeds, batch.labels
