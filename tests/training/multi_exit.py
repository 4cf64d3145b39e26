"""Graphs with exits to fine-tune, and data for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from eexform.data import ArraySource, Dataset, open_dataset
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.passes import PassContext
from eexform.passes.insert_exits import InsertExits
from eexform.progress import Progress
from eexform.training.finetune import FinetuneReport, finetune
from eexform.training.finetune_options import FinetuneOptions
from tests import tiny

HEADS = ("none/avg", "conv:1x8/avg")
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 32, "amp": "off"}


def flat(
    trunk: Graph | None = None,
    *,
    heads: tuple[str, ...] = HEADS,
    measure: str = "max_prob",
    threshold: float = 0.8,
    carry: float = 0.0,
    last: bool = False,
) -> Graph:
    """A trunk (the tiny trained one) with untrained heads at its first (or ``last``) sites, not lowered."""
    graph = tiny.trained() if trunk is None else trunk
    found = [site.value for site in find_sites(graph).sites]
    sites = found[-len(heads) :] if last else found[: len(heads)]
    inserted = InsertExits(
        sites=tuple(sites),
        heads=dict(zip(sites, heads, strict=True)),
        thresholds=dict.fromkeys(sites, threshold),
        measure=measure,
        carry=carry,
        untrained=True,
    )
    return inserted.run(graph, PassContext()).graph


def gated(measure: str = "gate") -> Graph:
    """The same with heads that have a gate."""
    return flat(heads=tuple(f"{head}/gate" for head in HEADS), measure=measure)


def patterns(graph: Graph, classes: int, count: int = 240) -> Dataset:
    """Images of a faint pattern per class in noise, for a graph with one image input, bound."""
    (name,) = graph.inputs
    shape = [int(size) for size in graph.types[name].shape[1:]]  # type: ignore[index, arg-type]
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, count)
    images = rng.normal(size=(count, *shape)) + 0.7 * rng.normal(size=(classes, *shape))[labels]
    source = ArraySource("patterns", {"all": ({None: images.astype(np.float32)}, labels)}, layout="nchw")
    return open_dataset(source, fractions=tiny.FRACTIONS).bind(graph)


def tune(
    folder: Path,
    graph: Graph,
    *,
    data: Dataset | None = None,
    progress: Progress | None = None,
    teacher: Graph | None = None,
    **options: Any,
) -> FinetuneReport:
    """Fine-tune on some digits, on one thread, so that sums have one order."""
    bound = tiny.digits(600).bind(graph) if data is None else data
    settings = FinetuneOptions(**{**QUICK, **options})
    return finetune(graph, bound, settings, folder=folder, teacher=teacher, threads=1, progress=progress, device="cpu")


def same(left: Graph, right: Graph, names: Any) -> bool:
    """Whether parameters are the same in both, bit for bit."""
    one, two = left.parameters(), right.parameters()
    return all(np.array_equal(one[name], two[name]) for name in names)


def head_names(graph: Graph) -> set[str]:
    """Parameters of all heads."""
    return {name for item in graph.exits for name in item.parameters}


def trunk_names(graph: Graph) -> set[str]:
    """Parameters of the trunk, batch-normalisation statistics included."""
    return set(graph.parameters()) - head_names(graph)
