"""The main job: candidates, heads, search, front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eexform import files
from eexform.cost_models import CostModel
from eexform.data import Dataset
from eexform.errors import OptionError, need
from eexform.ir.graph import Graph
from eexform.passes import Recipe, Step, get
from eexform.progress import Progress, Silent
from eexform.search.exits import ExitSearch, Found, unite
from eexform.search.folder import RunFolder
from eexform.search.front import build_front, describe_plan
from eexform.search.ledger import begin, outcome, timed
from eexform.search.limits import Limits
from eexform.search.objectives import Objectives, Target
from eexform.search.options import SearchOptions
from eexform.search.reach import check_reachable
from eexform.search.results import memorised, without_exits
from eexform.search.run import Run, open_run
from eexform.search.scorer import Candidate, Scorer
from eexform.search.settling import BoundRecipe
from eexform.search.space import EXITS
from eexform.search.stored_costs import files_read
from eexform.search.trunk_options import TrunkOptions
from eexform.search.trunk_trials import Trunk
from eexform.search.trunks import TrunkStage
from eexform.search.variants import Origin, Variant, Variants
from eexform.training.options import TrainOptions

DEFAULT_RECIPE: tuple[tuple[str, Mapping[str, Any]], ...] = (("fold_batch_norm", {}), (EXITS, {}))
"""Batch normalisation of the trunk is folded, then exits are inserted; runtimes fold that of the heads on loading."""

ROUND_TO = 8
"""Layers of pruned trunks have a multiple of so many channels: CPU runtimes compute in blocks of 8 (16 with AVX-512),
and a layer of 13 channels can take longer than the 16 that it had."""


def pruning_recipe(round_to: int = ROUND_TO) -> Recipe:
    """What is searched with ``--prune``: blocks that go, the share of channels that each family loses, then exits.

    Args:
        round_to: what is left of a group that is cut is a multiple of this many channels.
    """
    cutting = [("drop_blocks", {}), ("prune_channels", {"criterion": "l2", "round_to": round_to})]
    return Recipe(tuple(Step(name, given) for name, given in (*cutting, ("repair", {}), *DEFAULT_RECIPE)))


def round_to_of(objectives: Objectives) -> tuple[int, str]:
    """How many channels layers of pruned trunks have a multiple of, and why.

    What the cost models of the objectives know of their devices counts, the largest where they differ.
    """
    named = {term.model for one in objectives.listed for _, term in one.parts}
    blocks = {key: objectives.models[key].channel_block() for key in sorted(named)}
    known = {key: block for key, block in blocks.items() if block is not None}
    if not known:
        return ROUND_TO, "the default; the cost model knows no device that computes channels in blocks"
    key = max(known, key=lambda one: known[one])
    return known[key], f"channels that {key} computes at once"


def search(
    graph: Graph,
    data: Dataset,
    *,
    out: str | Path,
    cost: str | CostModel | Sequence[str | CostModel] | Objectives | None = None,
    target: Target | None = None,
    recipe: Recipe | None = None,
    options: SearchOptions | None = None,
    train: TrainOptions | None = None,
    limits: Limits | None = None,
    trunks: TrunkOptions | None = None,
    heads_from: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    device: str = "auto",
) -> Run:
    """Train heads and search early-exit plans for a trained classifier.

    Where the recipe leaves parameters open in front of ``insert_exits``, trunks are searched first
    (:mod:`eexform.search.trunks`), then exits for those found and for the original; the front is that of all of them.

    Args:
        graph: the trunk, from :func:`eexform.load`.
        data: from :func:`eexform.open_dataset`.
        out: the run's folder; a new one, or that of the run to ``resume``.
        cost: what to make small beside the error, one thing or two: a cost model, its name with settings
            (``latency_ort:threads=1``), a statistic (``macs@p95``), a weighted sum; see
            :mod:`eexform.search.objectives`. Default MACs.
        target: a cost to come near to, instead of below.
        recipe: passes to apply, with ``insert_exits`` among them; tunables left open are searched. Default
            :data:`DEFAULT_RECIPE`.
        options: candidates and effort.
        train: head training.
        limits: what every plan must keep.
        trunks: how trunks are searched and trained; see :func:`pruning_recipe`.
        heads_from: folder of another run over the same model, data and training options: its trained heads are copied
            instead of trained anew, for another objective, other limits or more effort.
        resume: go on with an interrupted run; the settings must be the same.
        progress: who is told.
        device: to train trunks on: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``, ``cuda:1``.

    Returns:
        The run, with its front. After Ctrl-C during the search it is readable, with the state ``interrupted``.

    Raises:
        EexformError: the input cannot be used, see the message. Where that shows before anything is trained, no folder
            is made; later the run's state is ``failed``.
        KeyboardInterrupt: Ctrl-C before the search for exits; what is trained stays, and ``resume`` goes on.
    """
    options, train, show = options or SearchOptions(), train or TrainOptions(), progress or Silent()
    folder = RunFolder(out)
    if resume:
        folder.read()
    else:
        folder.fresh()
    if isinstance(cost, Objectives):
        need(target is None, "target: cost holds objectives already; give the target to Objectives.parse", OptionError)
        objectives = cost
    else:
        objectives = Objectives.parse(cost, target)
    dataset = data.bind(graph)
    steps = tuple((step.name, dict(step.given)) for step in recipe.steps) if recipe else DEFAULT_RECIPE
    prepared = prepare(
        graph,
        dataset,
        folder,
        objectives=objectives,
        steps=steps,
        options=options,
        train=train,
        limits=limits or Limits(),
        progress=show,
        trunks=trunks,
        device=device,
        heads_from=None if heads_from is None else Path(heads_from),
    )
    with folder.locked():
        facts = begin(folder, graph, dataset, prepared.settings, resume, show)
        with outcome(folder, facts):
            carry_out(prepared, facts)
    return open_run(folder.path)


@dataclass(frozen=True)
class Prepared:
    """A search that was checked as far as that is possible without training anything.

    Attributes:
        variants: makes trunks with heads.
        steps: the recipe's passes with what each is given.
        objectives: what is made small beside the error, with every cost model that is computed.
        limits: of every plan.
        asked: the passes in front of ``insert_exits``.
        before: what they come to; with a ``stage`` only those that leave all answers as they are.
        stage: the search for trunks; ``None`` where there is one trunk, known without data.
    """

    variants: Variants
    steps: BoundRecipe
    objectives: Objectives
    limits: Limits
    asked: BoundRecipe
    before: BoundRecipe
    stage: TrunkStage | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for a resume, as plain values."""
        variants = self.variants
        options = variants.options.to_json().items()
        read = files_read(variants.models.values())
        return {
            "trunk_digest": variants.trunk.digest,
            "data_digest": variants.dataset.digest,
            "scores": variants.trunk.scores,
            "labels": variants.dataset.labels,
            **self.objectives.to_json(),
            "recipe": Recipe(tuple(Step(name, given) for name, given in self.steps)).to_plain(),
            # how many threads work changes no decision, so a resume may have another number
            "options": {name: value for name, value in options if name != "threads"},
            "train": variants.train.to_json(),
            "train_digest": variants.train.digest,  # after what it is made from: a difference is named in words
            "limits": self.limits.to_json(),
            **({"cost_files": read} if read else {}),
            **({} if self.stage is None else {"trunk_options": self.stage.options.to_json()}),
        }


def prepare(
    graph: Graph,
    dataset: Dataset,
    folder: RunFolder,
    *,
    objectives: Objectives,
    steps: BoundRecipe,
    options: SearchOptions,
    train: TrainOptions,
    limits: Limits,
    progress: Progress,
    origin: Origin | None = None,
    trained: Mapping[tuple[str, str], Mapping[str, np.ndarray]] | None = None,
    trunks: TrunkOptions | None = None,
    device: str = "auto",
    heads_from: Path | None = None,
) -> Prepared:
    """Check a search before it begins; nothing is written.

    Args:
        graph: the trunk.
        dataset: bound to it.
        folder: of the run.
        objectives: what to make small beside the error.
        steps: the recipe's passes with what each is given.
        options: candidates and effort.
        train: head training.
        limits: what every plan must keep.
        progress: who is told.
        origin: where the trunk was fine-tuned, the model that it came from.
        trained: parameters of heads that are trained already, by (site, head text).
        trunks: how what stands in front of ``insert_exits`` is searched and trained.
        device: to train trunks on.
        heads_from: as in :func:`search`.

    Raises:
        EexformError: the recipe cannot be searched, a limit is no number, or no candidate fits.
    """
    asked = _before_exits(steps)
    objectives, limited = limits.priced(objectives)
    given = steps[len(asked)][1]
    settings = trunks or TrunkOptions()
    none = "there are to be no exits" if not settings.exits else "the recipe gives insert_exits no sites"
    exits = settings.exits and len(given.get("sites", ("any",))) > 0
    settings = replace(settings, exits=exits)
    stage = TrunkStage(
        graph, dataset, folder, objectives, asked, settings, options.seed, options.threads, device, progress, limited
    )
    variants = Variants(
        graph,
        dataset,
        folder,
        objectives.models,
        options,
        train,
        progress,
        given=given,
        origin=origin,
        trained=trained or {},
        arrays=stage.store,
        exits=exits,
        heads_from=heads_from,
    )
    need(exits or heads_from is None, "heads_from: " + none + ", so there are no heads to take", OptionError)
    ones = dict.fromkeys(objectives.models, 1.0)
    limits.bind(objectives, objectives.goals(ones), ones, 0.5)  # what is no number shows now, not after training
    before = stage.settled_without_data()
    changes = any(not get(name).preserves_outputs for name, _ in asked)
    if not changes and not stage.searched and origin is None:
        untrained = "trunk_epochs: the recipe leaves the trunk as it is, so there is nothing to be trained"
        need(not settings.epochs, untrained, OptionError)
        bare = f"{none}, and the recipe has no pass that changes the trunk, such as prune_channels"
        need(exits, f"{bare}: there is nothing to search", OptionError)
    if before is not None and not settings.epochs:
        trunk = variants.transformed(before)
        places = variants.places(trunk)
        variants.check_heads_from(before)
        _check_prices(objectives.models, trunk)
        if limits != Limits(min_accuracy=limits.min_accuracy):
            check_reachable(limits, objectives, trunk, places, variants.reference(before))
        return Prepared(variants, steps, objectives, limits, asked, before)
    variants.places(variants.transformed(stage.plain))
    if stage.searched:
        variants.check_heads_from(stage.plain)
    _check_prices(objectives.models, variants.transformed(stage.plain))
    return Prepared(variants, steps, objectives, limits, asked, stage.plain, stage)


def _check_prices(models: Mapping[str, CostModel], trunk: Graph) -> None:
    """Price the trunk once: a table that cannot be read, or a program that fails, shows now and not after training."""
    for model in models.values():
        if not model.measured:
            model.cost(trunk)


def carry_out(prepared: Prepared, facts: dict[str, Any]) -> None:
    """Train, search and write the front; ``facts`` learns what comes to light and ends with the run's state."""
    variants, objectives, stage = prepared.variants, prepared.objectives, prepared.stage
    options, show, folder = variants.options, variants.progress, variants.folder
    recipes, trunks = [prepared.before], []
    if stage is not None:
        trunks = _find_trunks(prepared, stage, facts)
        recipes = [*([stage.plain] if stage.searched else []), *(trunk.passes for trunk in trunks)]
    try:
        with timed(facts, "seconds_training"):
            found = {variant.graph.digest: (variant, passes) for passes in recipes for variant in [variants.of(passes)]}
            given, given_passes = variants.compared(recipes[0])
    finally:  # of an interrupted run, too: what it took is not taken again
        if variants.adopted:
            facts["heads_from"] = [*facts.get("heads_from", ()), *variants.adopted]
    bases = [variant for variant, _ in found.values()]
    facts["trunk"] = dict(given.bank.facts)
    if variants.origin is not None:
        facts["tuned_trunk"] = dict(bases[0].bank.facts)
    memory = [variant.report.memory_bytes for variant in bases]
    facts["memory_step_bytes"] = max(*memory, facts.get("memory_step_bytes", 0))
    facts["memorisation"] = memorised(given, variants.dataset, show)
    facts["uncounted"] = [list(pair) for pair in bases[0].costs["macs"].unknown]
    facts["state"] = "searching"
    folder.write(facts)

    originals = {model: costs.trunk for model, costs in given.costs.items()}
    goals = objectives.goals(originals)
    constraints = prepared.limits.bind(objectives, goals, originals, facts["trunk"]["accuracy"]["select"])
    identity = {key: facts[key] for key in ("trunk_digest", "data_digest", "train_digest", "objective", "limits")}
    exits = prepared.steps[len(prepared.asked) :]
    search_ = ExitSearch(exits, goals, options, constraints, identity, show)
    scorers: dict[int, Scorer] = {}

    def scorer(variant: Variant) -> Scorer:
        key = id(variant)  # all of them live as long as ``variants``
        if key not in scorers:
            scorers[key] = replace(variant.scorer(), trust=options.trust)
        return scorers[key]

    outcomes = []
    with timed(facts, "seconds_searching"):
        for digest, (variant, passes) in found.items():
            journal = folder.journal if stage is None else folder.journal_of(digest)
            try:
                outcomes.append(search_.run(variant, passes, journal, scorer))
            except KeyboardInterrupt:
                if not outcomes:
                    raise
                outcomes.append(Found((), 0, interrupted=True))
            if outcomes[-1].interrupted:
                break
    facts["evaluated"] = sum(one.evaluated for one in outcomes)
    alone = describe_plan(Candidate(), scorer(given), recipe=without_exits(given_passes, exits[0][1]))
    plans, lacking = unite(outcomes)
    interrupted = outcomes[-1].interrupted
    if not (plans or interrupted):
        raise OptionError(lacking)
    files.write_json(folder.front, build_front(plans, alone, goals).to_json())
    if stage is not None and not interrupted:
        stage.tidy(trunks)
    facts["state"] = "interrupted" if interrupted else "done"


def _find_trunks(prepared: Prepared, stage: TrunkStage, facts: dict[str, Any]) -> list[Trunk]:
    """The trunks that get exits; limits are what they are for the original."""
    folder = prepared.variants.folder
    facts["state"] = "trunks"
    folder.write(facts)
    originals = stage.prices.of(stage.lean)
    constraints = prepared.limits.bind(prepared.objectives, stage.prices.goals, originals, 0.5)
    with timed(facts, "seconds_trunks"):
        found = stage.run(constraints, facts)
    facts["state"] = "training"
    folder.write(facts)
    return found


def _before_exits(steps: BoundRecipe) -> BoundRecipe:
    """The passes in front of ``insert_exits``.

    Raises:
        OptionError: the recipe cannot be searched.
    """
    names = [name for name, _ in steps]
    found = names.count(EXITS)
    need(found == 1, f"a recipe to search needs the pass {EXITS!r} exactly once, found {found} times", OptionError)
    place = names.index(EXITS)
    need(not steps[place][1].get("untrained"), f"{EXITS}.untrained: a search is about trained heads", OptionError)
    need("lower" not in names, "leave 'lower' out: `eexform export` lowers the plan that you pick", OptionError)
    return steps[:place]
