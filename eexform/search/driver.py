"""The main job: candidates, heads, search, front."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eexform import files
from eexform.cost_models import CostModel, parse
from eexform.data import Dataset, memorisation, save_dataset
from eexform.errors import OptionError, RunError
from eexform.ir.graph import Graph
from eexform.ir.serialize import save
from eexform.passes import PassContext, Recipe, Step
from eexform.progress import Progress, Silent
from eexform.search.bits import BitScorer
from eexform.search.evaluation import Evaluation
from eexform.search.folder import RunFolder
from eexform.search.front import Front, Plan, build_front, describe_plan
from eexform.search.genome import Individual
from eexform.search.journal import Journal
from eexform.search.limits import Limits
from eexform.search.nsga2 import Settings, State, evolve
from eexform.search.options import SearchOptions
from eexform.search.run import Run, open_run
from eexform.search.scorer import Candidate, Scorer
from eexform.search.space import EXITS, Space, build_space
from eexform.search.variants import BoundRecipe, Variant, Variants
from eexform.training.options import TrainOptions

DEFAULT_RECIPE: tuple[tuple[str, Mapping[str, Any]], ...] = (("fold_batch_norm", {}), (EXITS, {}))
"""Batch normalisation of the trunk is folded, then exits are inserted; runtimes fold that of the heads when they load."""


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
        EexformError: the input cannot be used, see the message.
        KeyboardInterrupt: Ctrl-C during head training; what is trained stays, and ``resume`` goes on.
    """
    options, train, show = options or SearchOptions(), train or TrainOptions(), progress or Silent()
    limits = limits or Limits()
    dataset = data.bind(graph)
    steps = tuple((step.name, dict(step.given)) for step in recipe.steps) if recipe else DEFAULT_RECIPE
    models, objective = _models(cost)
    folder = RunFolder(out)
    facts: dict[str, Any] = {
        "state": "training",
        "trunk_digest": graph.digest,
        "data_digest": dataset.digest,
        "train_digest": train.digest,
        "scores": graph.scores,
        "objective": objective,
        "recipe": Recipe(tuple(Step(name, given) for name, given in steps)).to_plain(),
        "options": options.to_json(),
        "train": train.to_json(),
        "limits": limits.to_json(),
    }
    with folder.locked():
        _begin(folder, graph, dataset, facts, resume)
        variants = Variants(graph, dataset, folder.bank, models, options, train, show)
        started = time.perf_counter()
        try:
            return _searched(folder, variants, steps, objective, limits, facts, started, resume)
        except KeyboardInterrupt:
            folder.write({**facts, "state": "interrupted"})
            raise


def _begin(folder: RunFolder, graph: Graph, dataset: Dataset, facts: Mapping[str, Any], resume: bool) -> None:
    """Lay down a new run, or check that an old one is the same search."""
    if not resume:
        folder.fresh()
        save(graph, folder.trunk)
        save_dataset(dataset, folder.path)
        folder.write(facts)
        return
    before = folder.read()
    for key, value in facts.items():
        if key != "state" and before.get(key) != value:
            raise RunError(
                f"{folder.path}: cannot resume, the {key.replace('_', ' ')} is not that of the run: "
                f"{_difference(before.get(key), value)}; use the same options or another --out"
            )


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in new:
            if old.get(key) != new[key]:
                return f"{key} was {old.get(key)!r}, now {new[key]!r}"
    return f"was {str(old)[:80]!r}, now {str(new)[:80]!r}"


def _models(cost: str | CostModel) -> tuple[dict[str, CostModel], str]:
    """Cost models by name (MACs and parameters always), and the name of the objective."""
    chosen = parse(cost) if isinstance(cost, str) else cost
    models = {"macs": parse("macs"), "params": parse("params")}
    models[chosen.name] = chosen
    return models, chosen.name


def _searched(
    folder: RunFolder,
    variants: Variants,
    steps: BoundRecipe,
    objective: str,
    limits: Limits,
    facts: dict[str, Any],
    started: float,
    resume: bool,
) -> Run:
    options, show = variants.options, variants.progress
    base = _base(variants, steps)
    facts["trunk"] = dict(base.bank.facts)
    facts["seconds_training"] = round(base.report.seconds + base.report.seconds_scoring, 1)
    facts["memory_step_bytes"] = base.report.memory_bytes
    facts["memorisation"] = _memorised(base, variants.dataset, show)
    facts["uncounted"] = [list(pair) for pair in base.costs["macs"].unknown]
    folder.write({**facts, "state": "searching"})

    steps = _with_final_temperature(steps, base)
    graphs = [base.graph] * len(steps)
    space = build_space(steps, graphs, PassContext(heads=base.bank, seed=options.seed), levels=options.levels)

    def variant_of(individual: Individual) -> Variant:
        return variants.of(space.before_exits(individual.genome))

    def bit_scorer(individual: Individual) -> BitScorer:
        variant = variant_of(individual)
        return BitScorer(
            variant.scores("select"),
            variant.costs,
            variant.places,
            measures=_measures(space),
            levels=options.levels,
            fixed=space.fixed_thresholds(),
            trust=options.trust,
        )

    constraints = limits.bind(
        cost=base.costs[objective].trunk, params=base.costs["params"].trunk, accuracy=facts["trunk"]["accuracy"]["select"]
    )
    evaluation = Evaluation(space, bit_scorer, objective, constraints)
    settings = Settings(population=options.population, generations=options.generations)
    identity = {key: facts[key] for key in ("trunk_digest", "data_digest", "train_digest", "objective", "limits")}
    journal = Journal(folder.journal, space, {**settings.to_json(), **identity, "trust": options.trust}, options.seed)
    state = journal.resume() if resume and folder.journal.exists() else None
    if state is None:
        journal.begin()
    begun = time.perf_counter()
    with show.task("searching", settings.generations + 1) as task:
        task.advance(0 if state is None else state.generation + 1)

        def report(now: State) -> None:
            journal.append(now)
            task.advance(1, f"{len(now.archive)} plans on the front, {now.evaluated} scored")

        state = evolve(space, evaluation, settings, seed=options.seed, state=state, on_generation=report)
    facts["seconds_searching"] = round(time.perf_counter() - begun, 2)
    facts["evaluated"] = state.evaluated
    front = _front(state, evaluation, variant_of, base, objective, options)
    files.write_json(folder.front, front.to_json())
    facts["seconds"] = round(time.perf_counter() - started, 1)
    folder.write({**facts, "state": "interrupted" if state.interrupted else "done"})
    return open_run(folder.path)


def _base(variants: Variants, steps: BoundRecipe) -> Variant:
    """The trunk from which sites and heads are taken: open tunables of trunk passes at their defaults."""
    names = [name for name, _ in steps]
    if names.count(EXITS) != 1:
        raise OptionError(f"a recipe to search needs the pass {EXITS!r} exactly once, found {names.count(EXITS)} times")
    return variants.of(steps[: names.index(EXITS)])


def _with_final_temperature(steps: BoundRecipe, base: Variant) -> list[tuple[str, Mapping[str, Any]]]:
    """The calibrated temperature of the trunk, for plans that carry scores, unless the recipe says one."""
    temperature = base.bank.facts["temperature"]
    return [
        (name, {"final_temperature": temperature, **given} if name == EXITS else dict(given)) for name, given in steps
    ]


def _measures(space: Space) -> tuple[str, ...]:
    place = space.exits_place
    gene = space.genes.get((place, "measure"))
    if gene is not None:
        return tuple(getattr(gene.domain, "values", ("max_prob",)))
    return (str(space.recipe[place][1].get("measure", "max_prob")),)


def _memorised(base: Variant, dataset: Dataset, show: Progress) -> dict[str, Any]:
    """Has the trunk seen select? Say so before anyone trusts the thresholds."""
    accuracy, samples = base.bank.facts["accuracy"], base.bank.facts["samples"]
    if dataset.labels == "none":
        return {"verdict": "undecided", "message": "label-free: accuracy means agreement with the trunk"}
    parts = {name: split.part for name, split in dataset.splits.items()}
    own_test = parts["test"] != parts["select"]
    verdict = memorisation(
        accuracy["head_train"],
        accuracy["select"],
        n_train=samples["head_train"],
        n_select=samples["select"],
        trunk_correct_test=accuracy["test"] if own_test else None,
        n_test=samples["test"] if own_test else None,
        same_part=parts["head_train"] == parts["select"],
    )
    show.say(verdict.message)
    return {"verdict": verdict.verdict, "message": verdict.message}


def _front(
    state: State,
    evaluation: Evaluation,
    variant_of: Any,
    base: Variant,
    objective: str,
    options: SearchOptions,
) -> Front:
    """Every archived plan scored exactly on select and test; those that others beat on select are left out."""
    scorers: dict[str, Scorer] = {}

    def scorer(variant: Variant) -> Scorer:
        digest = variant.graph.digest
        if digest not in scorers:
            scorers[digest] = replace(variant.scorer(), trust=options.trust)
        return scorers[digest]

    plans: list[Plan] = []
    for individual in state.archive:
        variant = variant_of(individual)
        candidate = evaluation.candidate(individual)
        plans.append(describe_plan(candidate, scorer(variant), recipe=evaluation.recipe(individual)))
    alone = describe_plan(Candidate(), scorer(base), recipe=_alone(evaluation.space))
    return build_front(plans, alone, objective)


def _alone(space: Space) -> Sequence[tuple[str, Mapping[str, Any]]]:
    empty: dict[str, Any] = {"sites": (), "heads": {}, "thresholds": {}}
    return [(name, {**given, **empty} if name == EXITS else dict(given)) for name, given in space.recipe]
