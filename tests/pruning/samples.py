"""Samples that are simply there, and small networks whose channels depend on each other in known ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from eexform.backends import ort
from eexform.ir.digest import digest_arrays
from eexform.ir.graph import Graph


@dataclass(frozen=True)
class Fixed:
    """Calibration data from arrays, batch on axis 0."""

    feeds: Mapping[str, np.ndarray]
    labels: np.ndarray | None = None

    @cached_property
    def digest(self) -> str:
        return digest_arrays(self.feeds)

    @property
    def size(self) -> int:
        return len(next(iter(self.feeds.values())))

    def batches(self, batch_size: int) -> Iterator[tuple[Mapping[str, np.ndarray], np.ndarray | None]]:
        for start in range(0, self.size, batch_size):
            some = slice(start, start + batch_size)
            feeds = {name: array[some] for name, array in self.feeds.items()}
            yield feeds, None if self.labels is None else self.labels[some]


def normal(graph: Graph, count: int = 96, seed: int = 5) -> Fixed:
    """``count`` samples from the normal distribution."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for name in graph.inputs:
        shape = [dim if isinstance(dim, int) else count for dim in graph.types[name].shape or ()]
        feeds[name] = rng.standard_normal(shape).astype(np.float32)
    return Fixed(feeds)


def values(graph: Graph, samples: Fixed, *names: str) -> dict[str, np.ndarray]:
    """What some values hold on all samples."""
    inner = [name for name in names if name not in graph.outputs]
    return ort.run(ort.session(ort.tap(graph, inner), optimize=False), samples.feeds, list(names))
