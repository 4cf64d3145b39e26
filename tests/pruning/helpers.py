"""Samples and small networks for the tests of pruning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from eexform.ir.graph import Graph
from eexform.ir.groups import Group
from tests.passes.helpers import graph_of

NORMED = """
<ir_version: 8, opset_import: ["": 17]>
normed (float[N, 2, 8, 8] image) => (float[N, 4] scores)
<float[6, 2, 3, 3] w1, float[6] scale1, float[6] b1, float[6] m1, float[6] var1,
 float[8, 6, 3, 3] w2, float[8] c2, float[8, 8, 3, 3] w3, float[4, 8] w4, float[4] b4>
{
    [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(image, w1)
    [norm1] n1 = BatchNormalization(c1, scale1, b1, m1, var1)
    [relu1] r1 = Relu(n1)
    [conv2] x2 = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(r1, w2, c2)
    [relu2] r2 = Relu(x2)
    [conv3] x3 = Conv<pads = [1, 1, 1, 1]>(r2, w3)
    [add] a3 = Add(x3, r2)
    [relu3] r3 = Relu(a3)
    [pool] p = GlobalAveragePool(r3)
    [flat] f = Flatten(p)
    [fc] scores = Gemm<transB = 1>(f, w4, b4)
}
"""
"""Groups w1 (6 units, with batch normalisation) and w2 (8 units: w2, c2, w3 both ways, read by w4); 4 classes."""


@dataclass(frozen=True)
class Samples:
    """Samples in memory."""

    feeds: Mapping[str, np.ndarray]
    labels: np.ndarray | None = None

    @property
    def digest(self) -> str:
        return "0" * 64

    @property
    def size(self) -> int:
        return len(next(iter(self.feeds.values())))

    def batches(self, batch_size: int) -> Iterator[tuple[Mapping[str, np.ndarray], np.ndarray | None]]:
        for start in range(0, self.size, batch_size):
            part = slice(start, start + batch_size)
            yield (
                {name: array[part] for name, array in self.feeds.items()},
                None if self.labels is None else self.labels[part],
            )


def samples_for(graph: Graph, count: int = 16, seed: int = 1, *, labelled: bool = False) -> Samples:
    """Normal numbers for every input, and labels at random."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for name in graph.inputs:
        shape = [dim if isinstance(dim, int) else count for dim in graph.types[name].shape or ()]
        if np.issubdtype(graph.types[name].dtype, np.integer):
            feeds[name] = rng.integers(0, 2, shape)
        else:
            feeds[name] = rng.standard_normal(shape).astype(np.float32)
    labels = rng.integers(0, graph.num_classes, count) if labelled else None
    return Samples(feeds, labels)


def normed(seed: int = 0) -> Graph:
    """:data:`NORMED` with random weights."""
    return graph_of(NORMED, seed)


def made_by(graph: Graph, weight: str) -> Group:
    """The group whose units are the output channels of ``weight``."""
    return next(
        group
        for group in graph.groups.groups
        if any(member.slot.value == weight and member.role == "filter" for member in group.members)
    )


def with_arrays(graph: Graph, arrays: Mapping[str, np.ndarray]) -> Graph:
    """The graph with other numbers in some of its constants."""
    draft = graph.copy()
    for name, values in arrays.items():
        draft.constants[name].values = np.asarray(values, draft.constants[name].dtype)
    return graph.replace(draft.gs)
