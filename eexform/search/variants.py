"""Variants of the trunk: what the passes before ``insert_exits`` make of it, each with heads of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eexform.cost_models import CostModel, PathCosts, path_costs
from eexform.data.dataset import Dataset
from eexform.errors import OptionError
from eexform.heads import HeadSpec
from eexform.ir.graph import Graph
from eexform.ir.sites import Site, find_sites
from eexform.passes import PassContext, Pipeline, make
from eexform.progress import Progress
from eexform.search.candidates import choose_heads, choose_sites, named_sites
from eexform.search.options import SearchOptions
from eexform.search.scorer import HeadScores, Scorer
from eexform.training.bank import Bank
from eexform.training.options import TrainOptions
from eexform.training.trainer import TrainReport, train_bank

BoundRecipe = Sequence[tuple[str, Mapping[str, Any]]]


@dataclass
class Variant:
    """One trunk with its trained heads, ready for scoring.

    Attributes:
        graph: the trunk after the passes before ``insert_exits``.
        sites: candidate sites, in the order in which a sample meets them.
        heads: candidate heads per site.
        bank: trained heads and their scores.
        costs: path costs by cost model name.
        report: what training took this time.
    """

    graph: Graph
    sites: tuple[Site, ...]
    heads: Mapping[str, tuple[HeadSpec, ...]]
    bank: Bank
    costs: Mapping[str, PathCosts]
    report: TrainReport

    @property
    def places(self) -> list[tuple[str, list[str]]]:
        """Sites in order, each with the texts of its heads."""
        return [(site.value, [str(spec) for spec in self.heads[site.value]]) for site in self.sites]

    def scores(self, split: str) -> HeadScores:
        """Cached scores of a split."""
        pairs = [(site, head) for site, heads in self.places for head in heads]
        return HeadScores(
            final=self.bank.final(split),
            labels=np.asarray(self.bank.labels(split)),
            heads={pair: self.bank.scores(*pair, split) for pair in pairs},
            temperatures={pair: self.bank.records[pair].temperature for pair in pairs},
            scores=self.graph.scores,
            final_temperature=self.bank.facts["temperature"],
        )

    def scorer(self) -> Scorer:
        """Exact scorer over select and test."""
        return Scorer({split: self.scores(split) for split in ("select", "test")}, self.costs)


@dataclass
class Variants:
    """Makes and keeps the variants of one search; a bank is trained when its variant is first asked for.

    Attributes:
        trunk: the model as loaded.
        dataset: bound to it.
        folder: where the banks are.
        models: cost models by name; ``macs`` and ``params`` are always among them.
        options: which sites and heads are candidates.
        train: how heads are trained.
        progress: who is told.
    """

    trunk: Graph
    dataset: Dataset
    folder: Path
    models: Mapping[str, CostModel]
    options: SearchOptions
    train: TrainOptions
    progress: Progress

    def __post_init__(self) -> None:
        self._made: dict[str, Variant] = {}

    def transformed(self, passes: BoundRecipe) -> Graph:
        """The trunk after ``passes``, which stand before ``insert_exits``."""
        pipeline = Pipeline([make(name, **parameters) for name, parameters in passes])
        return pipeline(self.trunk, PassContext(seed=self.options.seed)).graph

    def of(self, passes: BoundRecipe) -> Variant:
        """The variant that ``passes`` make, with its heads trained."""
        graph = self.transformed(passes)
        if graph.digest not in self._made:
            self._made[graph.digest] = self._make(graph)
        return self._made[graph.digest]

    def _make(self, graph: Graph) -> Variant:
        options = self.options
        macs = self.models["macs"].cost(graph)
        report = find_sites(graph, max_live=options.max_live)
        if options.sites:
            sites = named_sites(report, options.sites)
        else:
            before = graph.flow.accumulate(macs.nodes)
            sites = choose_sites(report, before, macs.total, options.max_sites)
        heads = choose_heads(
            graph, sites, trunk_macs=macs.total, specs=options.heads, max_share=options.max_head_share
        )
        sites = tuple(site for site in sites if heads[site.value])
        if not sites:
            raise OptionError("no candidate head fits any candidate site; raise --max-head-share or name --head yourself")
        dataset = self.dataset.bind(graph)
        bank = Bank(
            self.folder,
            trunk_digest=graph.digest,
            data_digest=dataset.digest,
            options_digest=self.train.digest,
        )
        report_ = train_bank(
            graph, dataset, sites, heads, bank, self.train, threads=options.threads, progress=self.progress
        )
        costs = {}
        for name, model in self.models.items():
            costs[name] = path_costs(model, graph, sites, heads, num_classes=graph.num_classes)
        return Variant(graph, sites, heads, bank, costs, report_)
