"""How much the output changes when parts of a network are left out, on samples and without labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from eexform.backends import ort
from eexform.ir import measures
from eexform.ir.graph import Graph
from eexform.pruning.samples import CalibrationData, first

_TINY = 1e-12
_BATCH = 64


@dataclass(frozen=True, order=True)
class Change:
    """The change of a classifier's output; smaller is less.

    Attributes:
        divergence: mean over the samples of the Kullback-Leibler divergence ``sum p log(p / q)`` in nats, with p the
            class probabilities before and q those after.
        distance: ``||after - before|| / ||before||`` of the raw scores over all samples.
    """

    divergence: float
    distance: float

    def __str__(self) -> str:
        return f"KL divergence {self.divergence:.4g} nats, scores moved by {100 * self.distance:.3g} %"


class Output:
    """The output of one graph on the first so many samples, to hold variants of the graph against.

    Args:
        graph: the network as it is.
        samples: where the inputs come from; labels are not looked at.
        count: how many of them.
    """

    def __init__(self, graph: Graph, samples: CalibrationData, count: int) -> None:
        self._kind = graph.scores
        self._feeds = [dict(feeds) for feeds, _ in first(samples, count, _BATCH)]
        self._scores = np.concatenate(list(self._run(graph)))
        self._before = self._probabilities(self._scores)

    def change(self, variant: Graph) -> Change:
        """What ``variant``, a network with the same inputs and classes, gives instead."""
        scores = np.concatenate(list(self._run(variant)))
        after = self._probabilities(scores)
        divergence = (self._before * (np.log(self._before) - np.log(after))).sum(axis=1).mean()
        moved = float(np.linalg.norm(scores.astype(np.float64) - self._scores))
        return Change(max(0.0, float(divergence)), moved / max(float(np.linalg.norm(self._scores)), _TINY))

    def _run(self, graph: Graph) -> Iterator[np.ndarray]:
        session = ort.session(graph)
        for feeds in self._feeds:
            yield ort.run(session, feeds, [graph.final])[graph.final]

    def _probabilities(self, scores: np.ndarray) -> np.ndarray:
        found = measures.to_probabilities(scores, self._kind).astype(np.float64)
        return np.maximum(found, _TINY)
