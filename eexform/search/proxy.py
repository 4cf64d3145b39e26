"""A cheap figure to rank trunks by: how often one is wrong on samples of calibrate, as it is, run by onnxruntime."""

from __future__ import annotations

import os

import numpy as np

from eexform.backends import ort
from eexform.data.dataset import Dataset
from eexform.ir.graph import Graph

_BATCH = 250


class Proxy:
    """Error of trunks on some samples of calibrate.

    Without labels it is the share of samples on which a trunk gives another answer than the original. Scores that are
    not numbers count as wrong.

    Args:
        original: what the trunks were made from.
        dataset: bound to it.
        most: samples at most; they lie evenly over the split.
        threads: of onnxruntime; 0 is one per core.
    """

    def __init__(self, original: Graph, dataset: Dataset, most: int, threads: int = 0) -> None:
        self.dataset, self.threads = dataset, threads or os.cpu_count() or 1
        whole = dataset.size("calibrate")
        self.positions = np.unique(np.linspace(0, whole - 1, min(most, whole)).astype(np.int64))
        self._original = original
        self._wanted: np.ndarray | None = None

    @property
    def samples(self) -> int:
        return len(self.positions)

    def error(self, graph: Graph) -> float:
        """Share of the samples that ``graph`` gets wrong."""
        wanted = self._labels()
        return float((self._answers(graph) != wanted).mean()) if len(wanted) else 0.0

    def _labels(self) -> np.ndarray:
        if self._wanted is None:
            labels = self.dataset.labels_of("calibrate")
            self._wanted = self._answers(self._original) if labels is None else labels[self.positions]
        return self._wanted

    def _answers(self, graph: Graph) -> np.ndarray:
        """The class given to each sample, -1 where a score is not a number: int64 [samples]."""
        session = ort.session(graph, threads=self.threads)
        found = []
        for start in range(0, len(self.positions), _BATCH):
            batch = self.dataset.batch("calibrate", self.positions[start : start + _BATCH])
            scores = ort.run(session, batch.feeds, [graph.final])[graph.final]
            found.append(np.where(np.isfinite(scores).all(axis=1), scores.argmax(axis=1), -1))
        return np.concatenate(found).astype(np.int64)
