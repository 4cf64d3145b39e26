"""Variants of the trunk: what the passes before ``insert_exits`` make of it, each with heads of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eexform.cost_models import CostModel, PathCosts
from eexform.data.dataset import Dataset
from eexform.errors import ModelError, OptionError
from eexform.heads import HeadSpec
from eexform.ir.graph import Graph
from eexform.ir.sites import Site, find_sites
from eexform.passes import get
from eexform.progress import Progress
from eexform.search import adopt
from eexform.search.candidates import Places, choose, keep
from eexform.search.folder import RunFolder
from eexform.search.options import SearchOptions
from eexform.search.scorer import HeadScores, Scorer
from eexform.search.settling import BoundRecipe, replay_passes
from eexform.search.stored_costs import stored_path_costs
from eexform.training.bank import Bank
from eexform.training.options import TrainOptions

if TYPE_CHECKING:
    from eexform.training.trainer import TrainReport


def bank_of(
    folder: Path, trunk_digest: str, *, origin: str, data_digest: str, train_digest: str, labels: str = "given"
) -> Bank:
    """The bank of one variant of a run's trunk.

    Args:
        folder: where the banks are.
        trunk_digest: of the variant.
        origin: digest of the trunk as loaded.
        data_digest: of the data set.
        train_digest: of the training options.
        labels: ``none``: what counts as right are the loaded trunk's answers, so they are part of the data.
    """
    identity = bank_identity(
        trunk_digest, origin=origin, data_digest=data_digest, train_digest=train_digest, labels=labels
    )
    return Bank(folder, **identity)


def bank_identity(
    trunk_digest: str, *, origin: str, data_digest: str, train_digest: str, labels: str = "given"
) -> dict[str, str]:
    """What the bank of one variant is looked up by: the keyword arguments of :class:`Bank`; see :func:`bank_of`."""
    if labels == "none" and trunk_digest != origin:
        data_digest = hashlib.sha256(json.dumps([data_digest, "answers of", origin]).encode()).hexdigest()
    return {"trunk_digest": trunk_digest, "data_digest": data_digest, "options_digest": train_digest}


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
        temperature: of the trunk's own scores: calibrated, or what the recipe says.
        judge: the bank of the network that plans are compared with, where that is not this trunk.
    """

    graph: Graph
    sites: tuple[Site, ...]
    heads: Mapping[str, tuple[HeadSpec, ...]]
    bank: Bank
    costs: Mapping[str, PathCosts]
    report: TrainReport
    temperature: float
    judge: Bank | None = None

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
            final_temperature=self.temperature,
            gates={pair: self.bank.gates(*pair, split) for pair in pairs if HeadSpec.parse(pair[1]).gate},
            opinion=None if self.judge is None else (self.judge.final(split), float(self.judge.facts["temperature"])),
        )

    def scorer(self) -> Scorer:
        """Exact scorer over select and test."""
        return Scorer({split: self.scores(split) for split in ("select", "test")}, self.costs)


@dataclass(frozen=True)
class Origin:
    """What a fine-tuned trunk came from: the model that plans are compared with.

    Attributes:
        graph: the model as it was loaded for the first search.
        passes: those behind which its figures are taken; they leave its answers as they are.
    """

    graph: Graph
    passes: BoundRecipe = ()


@dataclass
class Variants:
    """Makes and keeps the variants of one search; a bank is trained when its variant is first asked for.

    Attributes:
        trunk: the model as loaded.
        dataset: bound to it.
        folder: of the run.
        models: cost models by name; ``macs`` and ``params`` are always among them.
        options: which sites and heads are candidates.
        train: how heads are trained.
        progress: who is told.
        given: what the recipe gives ``insert_exits``: sites and heads that are not searched are the only candidates.
        origin: where the trunk was fine-tuned, the model that it came from.
        trained: parameters of heads that are trained already, by (site, head text): they are scored as they are.
        arrays: stored numbers that passes need, by digest.
        exits: look for sites; without, every variant is a trunk alone.
        heads_from: folder of another run, whose trained heads are copied where they fit; the first variant must find
            some there.
        adopted: what was copied from there, for the run's facts.
    """

    trunk: Graph
    dataset: Dataset
    folder: RunFolder
    models: Mapping[str, CostModel]
    options: SearchOptions
    train: TrainOptions
    progress: Progress
    given: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin | None = None
    trained: Mapping[tuple[str, str], Mapping[str, np.ndarray]] = field(default_factory=dict)
    arrays: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    exits: bool = True
    heads_from: Path | None = None

    def __post_init__(self) -> None:
        self.adopted: list[dict[str, Any]] = []
        self._made: dict[str, Variant] = {}
        self._graphs: dict[str, Graph] = {}
        self._places: Places | None = None
        self._original: Variant | None = None

    def transformed(self, passes: BoundRecipe) -> Graph:
        """The trunk after ``passes``."""
        key = json.dumps([[name, dict(parameters)] for name, parameters in passes], sort_keys=True, default=str)
        if key not in self._graphs:
            self._graphs[key] = replay_passes(passes, self.trunk, self.arrays)[-1]
        return self._graphs[key]

    def places(self, graph: Graph) -> Places:
        """Candidate sites of ``graph`` with their heads.

        On the first graph asked for there must be some. On those after it they are chosen anew, unless sites were
        named: then they are those of that name which there still are. A graph may have none.

        Raises:
            OptionError: a named site is none, a named head fits nowhere, or nothing fits.
            ModelError: the trunk has no site.
        """
        if not self.exits:
            return Places((), {})
        macs = self.models["macs"].cost(graph)
        report = find_sites(graph, max_live=self.options.max_live)
        if self._places is None:
            self._places = choose(graph, report, macs, self.options, self.given)
            for line in self._places.left_out:
                self.progress.say(line)
            return self._places
        if self.options.sites or any(part in self.given for part in ("sites", "heads", "thresholds")):
            return keep(self._places, report)
        try:
            return choose(graph, report, macs, self.options, self.given)
        except (OptionError, ModelError):
            return Places((), {})

    def check_heads_from(self, passes: BoundRecipe) -> None:
        """Check that the other run has heads for what ``passes`` make of the trunk, if there is another run.

        Raises:
            OptionError: there is nothing to take; the message says what differs.
        """
        if self.heads_from is not None:
            graph = self.transformed(passes)
            adopt.check(self.folder, self.heads_from, self._wanted(graph, self.places(graph)))

    def _wanted(self, graph: Graph, places: Places) -> adopt.Wanted:
        dataset = self.dataset.bind(graph)
        answering = self.trunk if self.origin is None else self.origin.graph
        identity = bank_identity(
            graph.digest,
            origin=answering.digest,
            data_digest=dataset.digest,
            train_digest=self.train.digest,
            labels=dataset.labels,
        )
        return adopt.Wanted.of(
            graph, dataset, places.sites, places.heads, identity, self.train, origin=answering.digest
        )

    def of(self, passes: BoundRecipe) -> Variant:
        """The variant that ``passes`` make, with its heads trained."""
        graph = self.transformed(passes)
        if graph.digest not in self._made:
            made = self._scored(graph, self.places(graph))
            if self.origin is not None:
                made = replace(made, judge=self._untrained(made).bank)
            elif not all(get(name).preserves_outputs for name, _ in passes):
                made = replace(made, judge=self.original().bank)
            self._made[graph.digest] = made
        return self._made[graph.digest]

    def original(self) -> Variant:
        """The trunk as loaded, to compare with; without heads, unless the passes have left it as it is."""
        if self._original is None:
            self._original = self._made.get(self.trunk.digest) or self._scored(self.trunk, Places((), {}))
        return self._original

    def compared(self, passes: BoundRecipe) -> tuple[Variant, BoundRecipe]:
        """What plans are compared with, and the passes behind which its figures are taken.

        That is the model that was given. Passes that leave its answers as they are make it no other model: its cost is
        the one behind them. For a fine-tuned trunk it is the model before any fine-tuning.
        """
        if self.origin is not None:
            return self._untrained(self.of(passes)), self.origin.passes
        if all(get(name).preserves_outputs for name, _ in passes):
            return self.of(passes), passes
        return self.original(), ()

    def reference(self, passes: BoundRecipe) -> Graph:
        """The graph of what plans are compared with (see :meth:`compared`)."""
        if self.origin is not None:
            return replay_passes(self.origin.passes, self.origin.graph, self.arrays)[-1]
        preserved = all(get(name).preserves_outputs for name, _ in passes)
        return self.transformed(passes) if preserved else self.trunk

    def _untrained(self, base: Variant) -> Variant:
        graph = self.reference(())
        # a measurement of its own would differ from that of the same nodes with other numbers by noise alone
        same = _structure(graph) == _structure(base.graph)
        return self._made.get(graph.digest) or self._scored(graph, Places((), {}), base.costs if same else None)

    def _scored(self, graph: Graph, places: Places, costs: Mapping[str, PathCosts] | None = None) -> Variant:
        from eexform.training.trainer import train_bank, trunk_answers  # imports torch, which takes a second or two

        sites, heads = places.sites, places.heads
        dataset = self.dataset.bind(graph)
        answering = self.trunk if self.origin is None else self.origin.graph
        bank = bank_of(
            self.folder.bank,
            graph.digest,
            origin=answering.digest,
            data_digest=dataset.digest,
            train_digest=self.train.digest,
            labels=dataset.labels,
        )
        if self.heads_from is not None and sites:
            taken = adopt.adopt(
                self.folder,
                self.heads_from,
                self._wanted(graph, places),
                required=not self._made,
                progress=self.progress,
            )
            self.adopted += [taken] if taken else []
        answers = None
        if dataset.labels == "none" and graph.digest != answering.digest and not bank.facts:
            answers = trunk_answers(answering, self.dataset, self.train, threads=self.options.threads)
        report = train_bank(
            graph,
            dataset,
            sites,
            heads,
            bank,
            self.train,
            threads=self.options.threads,
            progress=self.progress,
            answers=answers,
            trained=self.trained,
        )
        if costs is None:
            costs = {
                name: stored_path_costs(self.folder.latencies, model, graph, sites, heads)
                for name, model in self.models.items()
            }
        temperature = float(self.given.get("final_temperature", bank.facts["temperature"]))
        return Variant(graph, sites, heads, bank, costs, report, temperature)


def _structure(graph: Graph) -> list[tuple[Any, ...]]:
    """Nodes with what they read and the shapes of their constants: what a cost depends on, the numbers left out."""
    constants = graph.constants
    return sorted(
        (
            node.name,
            node.op,
            repr(sorted(node.attrs.items(), key=lambda item: item[0])),
            tuple(tensor.name for tensor in (*node.inputs, *node.outputs)),
            tuple(str(constants[t.name].shape) for t in node.inputs if t.name in constants),
        )
        for node in graph.nodes
    )
