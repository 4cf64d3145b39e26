"""Heads trained on the tiny network, in as few lines as a test can do with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eexform.data import Dataset
from eexform.heads import HeadSpec
from eexform.ir.graph import Graph
from eexform.ir.sites import Site, find_sites
from eexform.progress import Progress
from eexform.training import Bank, TrainOptions, TrainReport, train_bank

HEADS = ("none/avg", "conv:1x8/avg")
OPTIONS = TrainOptions(epochs=2, batch_size=32)


def sites(graph: Graph) -> tuple[Site, ...]:
    """The network's first two sites."""
    return find_sites(graph).sites[:2]


def open_bank(root: Path, graph: Graph, data: Dataset, options: TrainOptions = OPTIONS) -> Bank:
    """The bank for just this."""
    return Bank(root, trunk_digest=graph.digest, data_digest=data.digest, options_digest=options.digest)


def train(
    root: Path,
    graph: Graph,
    data: Dataset,
    *,
    heads: Sequence[str] = HEADS,
    options: TrainOptions = OPTIONS,
    progress: Progress | None = None,
    at: Sequence[Site] | None = None,
    bank: Bank | None = None,
) -> tuple[Bank, TrainReport]:
    """Train ``heads`` at every one of the sites ``at``; one thread, so that sums have one order."""
    chosen = sites(graph) if at is None else at
    specs = {site.value: [HeadSpec.parse(text) for text in heads] for site in chosen}
    bank = bank or open_bank(root, graph, data, options)
    report = train_bank(graph, data.bind(graph), chosen, specs, bank, options, threads=1, progress=progress)
    return bank, report


def content(bank: Bank) -> dict[str, bytes]:
    """Every file of a bank, by its name."""
    return {
        str(path.relative_to(bank.folder)): path.read_bytes()
        for path in sorted(bank.folder.rglob("*"))
        if path.is_file()
    }
