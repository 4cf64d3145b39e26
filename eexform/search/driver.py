"""The main job: candidates, heads, search, front."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eexform import files
from eexform.cost_models import CostModel, PathCosts, parse
from eexform.data import Dataset
from eexform.errors import OptionError, need
from eexform.ir.graph import Graph
from eexform.passes import PassContext, Recipe, Step
from eexform.progress import Progress, Silent
from eexform.search.bits import BitScorer
from eexform.search.evaluation import Evaluation
from eexform.search.folder import RunFolder
from eexform.search.front import build_front, describe_plan
from eexform.search.genome import Individual
from eexform.search.journal import Journal
from eexform.search.ledger import begin, outcome, timed
from eexform.search.limits import Limits
from eexform.search.nsga2 import Settings, State, evolve
from eexform.search.options import SearchOptions
from eexform.search.results import memorised, nearest, plan_of, without_exits
from eexform.search.run import Run, open_run
from eexform.search.scorer import Candidate, Scorer
from eexform.search.space import EXITS, Space, build_space
from eexform.search.stored_costs import model_settings
from eexform.search.variants import BoundRecipe, Origin, Variant, Variants
from eexform.training.options import TrainOptions

DEFAULT_RECIPE: tuple[tuple[str, Mapping[str, Any]], ...] = (("fold_batch_norm", {}), (EXITS, {}))
"""Batch normalisation of the trunk is folded, then exits are inserted; runtimes fold that of the heads on loading."""


def search(
    graph: Graph,
    data: Dataset,
    *,
    out: str | Path,
    cost: str | CostModel = "macs",
    recipe: Recipe | None = None,
    options: SearchOptions | None = None,
    train: TrainOptions | None = None,
    limits: Limits | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Train heads and search early-exit plans for a trained classifier.

    Args:
        graph: the trunk, from :func:`eexform.load`.
        data: from :func:`eexform.open_dataset`.
        out: the run's folder; a new one, or that of the run to ``resume``.
        cost: what to make small beside the error: a cost model, or its name with settings (``latency_ort:threads=1``).
        recipe: passes to apply, with ``insert_exits`` among them; tunables left open are searched. Default
            :data:`DEFAULT_RECIPE`.
        options: candidates and effort.
        train: head training.
        limits: what every plan must keep.
        resume: go on with an interrupted run; the settings must be the same.
        progress: who is told.

    Returns:
        The run, with its front. After Ctrl-C during the search it is readable, with the state ``interrupted``.

    Raises:
        EexformError: the input cannot be used, see the message. Where that shows before anything is trained, no folder
            is made; later the run's state is ``failed``.
        KeyboardInterrupt: Ctrl-C during head training; what is trained stays, and ``resume`` goes on.
    """
    options, train, show = options or SearchOptions(), train or TrainOptions(), progress or Silent()
    folder = RunFolder(out)
    if resume:
        folder.read()
    else:
        folder.fresh()
    dataset = data.bind(graph)
    steps = tuple((step.name, dict(step.given)) for step in recipe.steps) if recipe else DEFAULT_RECIPE
    prepared = prepare(
        graph,
        dataset,
        folder,
        cost=cost,
        steps=steps,
        options=options,
        train=train,
        limits=limits or Limits(),
        progress=show,
    )
    with folder.locked():
        facts = begin(folder, graph, dataset, prepared.settings, resume, show)
        with outcome(folder, facts):
            carry_out(prepared, facts)
    return open_run(folder.path)


@dataclass(frozen=True)
class Prepared:
    """A search that was checked as far as that is possible without training anything."""

    variants: Variants
    steps: BoundRecipe
    objective: str
    limits: Limits

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for a resume, as plain values."""
        variants = self.variants
        options = variants.options.to_json().items()
        return {
            "trunk_digest": variants.trunk.digest,
            "data_digest": variants.dataset.digest,
            "scores": variants.trunk.scores,
            "labels": variants.dataset.labels,
            "objective": self.objective,
            "cost": model_settings(variants.models[self.objective]),
            "recipe": Recipe(tuple(Step(name, given) for name, given in self.steps)).to_plain(),
            # how many threads work changes no decision, so a resume may have another number
            "options": {name: value for name, value in options if name != "threads"},
            "train": variants.train.to_json(),
            "train_digest": variants.train.digest,  # after what it is made from: a difference is named in words
            "limits": self.limits.to_json(),
        }


def prepare(
    graph: Graph,
    dataset: Dataset,
    folder: RunFolder,
    *,
    cost: str | CostModel,
    steps: BoundRecipe,
    options: SearchOptions,
    train: TrainOptions,
    limits: Limits,
    progress: Progress,
    origin: Origin | None = None,
    trained: Mapping[tuple[str, str], Mapping[str, np.ndarray]] | None = None,
) -> Prepared:
    """Check a search before it begins; nothing is written.

    Args:
        graph: the trunk.
        dataset: bound to it.
        folder: of the run.
        cost: as in :func:`search`.
        steps: the recipe's passes with what each is given.
        options: candidates and effort.
        train: head training.
        limits: what every plan must keep.
        progress: who is told.
        origin: where the trunk was fine-tuned, the model that it came from.
        trained: parameters of heads that are trained already, by (site, head text).

    Raises:
        EexformError: the recipe cannot be searched, a limit is no number, or no candidate fits.
    """
    before = _before_exits(steps)
    models, objective = _models(cost)
    given = steps[len(before)][1]
    variants = Variants(
        graph, dataset, folder, models, options, train, progress, given=given, origin=origin, trained=trained or {}
    )
    limits.bind(cost=1.0, params=1.0, accuracy=0.5)  # what is no number shows now, not after training
    variants.places(variants.transformed(before))
    return Prepared(variants, steps, objective, limits)


def _models(cost: str | CostModel) -> tuple[dict[str, CostModel], str]:
    """Cost models by name (MACs and parameters always), and the name of the objective."""
    chosen = parse(cost) if isinstance(cost, str) else cost
    models = {"macs": parse("macs"), "params": parse("params")}
    models[chosen.name] = chosen
    return models, chosen.name


def carry_out(prepared: Prepared, facts: dict[str, Any]) -> None:
    """Train, search and write the front; ``facts`` learns what comes to light and ends with the run's state."""
    variants, steps, objective, limits = prepared.variants, prepared.steps, prepared.objective, prepared.limits
    options, show, folder = variants.options, variants.progress, variants.folder
    before = _before_exits(steps)
    with timed(facts, "seconds_training"):
        base = variants.of(before)
        given, given_passes = variants.compared(before)
    facts["trunk"] = dict(given.bank.facts)
    if variants.origin is not None:
        facts["tuned_trunk"] = dict(base.bank.facts)
    facts["memory_step_bytes"] = max(base.report.memory_bytes, facts.get("memory_step_bytes", 0))
    facts["memorisation"] = memorised(given, variants.dataset, show)
    facts["uncounted"] = [list(pair) for pair in base.costs["macs"].unknown]
    facts["state"] = "searching"
    folder.write(facts)

    graphs = [*variants.stages(before)[:-1], *[base.graph] * (len(steps) - len(before))]
    space = build_space(steps, graphs, PassContext(heads=base.bank, seed=options.seed), levels=options.levels)

    def variant_of(individual: Individual) -> Variant:
        return variants.of(space.before_exits(individual.genome))

    def bit_scorer(individual: Individual) -> BitScorer:
        variant = variant_of(individual)
        return BitScorer(
            variant.scores("select"),
            {**variant.costs, objective: _with_fee(variant.costs[objective], options.exit_fee)},
            variant.places,
            measures=_measures(space),
            levels=options.levels,
            fixed=space.fixed_thresholds(),
            trust=options.trust,
        )

    constraints = limits.bind(
        cost=given.costs[objective].trunk,
        params=given.costs["params"].trunk,
        accuracy=facts["trunk"]["accuracy"]["select"],
    )
    evaluation = Evaluation(space, bit_scorer, objective, constraints)
    settings = Settings(population=options.population, generations=options.generations)
    identity = {key: facts[key] for key in ("trunk_digest", "data_digest", "train_digest", "objective", "limits")}
    weighing = {"trust": options.trust, "exit_fee": options.exit_fee}
    journal = Journal(folder.journal, space, {**settings.to_json(), **identity, **weighing}, options.seed)
    with timed(facts, "seconds_searching"):
        state = _evolve(space, evaluation, settings, journal, options.seed, show)
    facts["evaluated"] = state.evaluated
    scorers: dict[int, Scorer] = {}

    def scorer(variant: Variant) -> Scorer:
        key = id(variant)  # all of them live as long as ``variants``
        if key not in scorers:
            scorers[key] = replace(variant.scorer(), trust=options.trust)
        return scorers[key]

    alone = describe_plan(Candidate(), scorer(given), recipe=without_exits(space, given_passes))
    plans = [plan_of(individual, evaluation, variant_of(individual), scorer) for individual in state.archive]
    if not (plans or state.interrupted):
        raise OptionError(nearest(state, evaluation, variant_of, scorer, constraints))
    files.write_json(folder.front, build_front(plans, alone, objective).to_json())
    facts["state"] = "interrupted" if state.interrupted else "done"


def _evolve(
    space: Space, evaluation: Evaluation, settings: Settings, journal: Journal, seed: int, show: Progress
) -> State:
    """Search on from where the journal ends; Ctrl-C gives the last whole generation, where there is one."""
    last = journal.resume() if journal.path.exists() else None
    if last is None:
        journal.begin()
    with show.task("searching", settings.generations + 1) as task:
        task.advance(0 if last is None else last.generation + 1)

        def report(now: State) -> None:
            nonlocal last
            last = now
            journal.append(now)
            task.advance(1, f"{len(now.archive)} plans on the front, {now.evaluated} scored")

        try:
            return evolve(space, evaluation, settings, seed=seed, state=last, on_generation=report)
        except KeyboardInterrupt:
            if last is None:
                raise
            last.interrupted = True
            return last


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


def _with_fee(costs: PathCosts, fee: float) -> PathCosts:
    """Path costs as the search sees them: every exit that is passed counts ``fee`` of the trunk more."""
    return replace(costs, routing=costs.routing + fee * costs.trunk)


def _measures(space: Space) -> tuple[str, ...]:
    place = space.exits_place
    gene = space.genes.get((place, "measure"))
    if gene is not None:
        return tuple(getattr(gene.domain, "values", ("max_prob",)))
    return (str(space.recipe[place][1].get("measure", "max_prob")),)
