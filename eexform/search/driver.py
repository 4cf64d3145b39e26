"""The main job: candidates, heads, search, front."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from eexform import files
from eexform.cost_models import CostModel, PathCosts, parse
from eexform.data import Dataset, memorisation, save_dataset
from eexform.errors import EexformError, OptionError, RunError, StorageError, need
from eexform.ir.graph import Graph
from eexform.ir.serialize import save
from eexform.passes import PassContext, Recipe, Step, get
from eexform.progress import Progress, Silent
from eexform.search.bits import BitScorer
from eexform.search.evaluation import Evaluation
from eexform.search.folder import RunFolder
from eexform.search.front import Plan, build_front, describe_plan
from eexform.search.genome import Constraints, Individual
from eexform.search.journal import Journal
from eexform.search.limits import Limits
from eexform.search.margins import with_margins
from eexform.search.nsga2 import Settings, State, evolve
from eexform.search.options import SearchOptions
from eexform.search.run import Run, open_run
from eexform.search.scorer import Candidate, Scorer
from eexform.search.settle import settle
from eexform.search.space import EXITS, Space, build_space
from eexform.search.stored_costs import model_settings
from eexform.search.variants import BoundRecipe, Variant, Variants
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
    limits = limits or Limits()
    folder = RunFolder(out)
    if resume:
        folder.read()
    else:
        folder.fresh()
    dataset = data.bind(graph)
    steps = tuple((step.name, dict(step.given)) for step in recipe.steps) if recipe else DEFAULT_RECIPE
    before = _before_exits(steps)
    models, objective = _models(cost)
    variants = Variants(graph, dataset, folder, models, options, train, show, given=steps[len(before)][1])
    limits.bind(cost=1.0, params=1.0, accuracy=0.5)  # what is no number shows now, not after training
    variants.places(variants.transformed(before))
    settings: dict[str, Any] = {
        "trunk_digest": graph.digest,
        "data_digest": dataset.digest,
        "scores": graph.scores,
        "labels": dataset.labels,
        "objective": objective,
        "cost": model_settings(models[objective]),
        "recipe": Recipe(tuple(Step(name, given) for name, given in steps)).to_plain(),
        # how many threads work changes no decision, so a resume may have another number
        "options": {name: value for name, value in options.to_json().items() if name != "threads"},
        "train": train.to_json(),
        "train_digest": train.digest,  # after what it is made from, so that a difference is named in words
        "limits": limits.to_json(),
    }
    with folder.locked():
        facts = _begin(folder, graph, dataset, settings, resume, show)
        with _outcome(folder, facts):
            _search(folder, variants, steps, objective, limits, facts)
    return open_run(folder.path)


def _begin(
    folder: RunFolder,
    graph: Graph,
    dataset: Dataset,
    settings: Mapping[str, Any],
    resume: bool,
    show: Progress,
) -> dict[str, Any]:
    """Lay down a new run, or check that an old one is the same search. Returns the facts to go on from."""
    if not resume:
        folder.fresh()
        save(graph, folder.trunk)
        save_dataset(dataset, folder.path)
        facts = {"state": "training", **settings}
        folder.write(facts)
        return facts
    facts = folder.read()
    for key, value in settings.items():
        if key not in facts or facts[key] == value:
            continue
        if key == "limits" and not folder.front.exists():
            # no head depends on them, and limits that nothing could keep must not cost the training
            show.say("the limits have changed: the search starts anew, with the heads that are trained")
            folder.journal.unlink(missing_ok=True)
            continue
        raise RunError(
            f"{folder.path}: cannot resume with other {key.replace('_', ' ')} than the run's: "
            f"{_difference(facts[key], value)}; use the same options or another --out"
        )
    facts.pop("error", None)
    facts.update(settings, state="training")
    folder.write(facts)
    return facts


@contextlib.contextmanager
def _outcome(folder: RunFolder, facts: dict[str, Any]) -> Iterator[None]:
    """Write down how the search ended, with all that is known by then, whichever way that is."""
    begun, earlier = time.perf_counter(), facts.get("seconds", 0.0)

    def close(state: str) -> None:
        facts.update(state=state, seconds=round(earlier + time.perf_counter() - begun, 2))
        folder.write(facts)

    try:
        yield
    except KeyboardInterrupt:
        close("interrupted")
        raise
    except EexformError as error:
        facts["error"] = str(error)
        with contextlib.suppress(StorageError):  # a full disk may be what the error is about
            close("failed")
        raise
    close(facts["state"])


@contextlib.contextmanager
def _timed(facts: dict[str, Any], key: str) -> Iterator[None]:
    """Add the seconds spent inside to ``facts[key]``, interrupted or not: those of a resumed run add up."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        facts[key] = round(facts.get(key, 0.0) + time.perf_counter() - begun, 2)


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


def _search(
    folder: RunFolder,
    variants: Variants,
    steps: BoundRecipe,
    objective: str,
    limits: Limits,
    facts: dict[str, Any],
) -> None:
    """Train, search and write the front; ``facts`` learns what comes to light and ends with the run's state."""
    options, show = variants.options, variants.progress
    before = _before_exits(steps)
    with _timed(facts, "seconds_training"):
        base = variants.of(before)
        # what plans are compared with is the model that was given, unless the passes leave its answers as they are
        faithful = all(get(name).preserves_outputs for name, _ in before)
        given = base if faithful else variants.original()
    facts["trunk"] = dict(given.bank.facts)
    facts["memory_step_bytes"] = max(base.report.memory_bytes, facts.get("memory_step_bytes", 0))
    facts["memorisation"] = _memorised(given, variants.dataset, show)
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
    with _timed(facts, "seconds_searching"):
        state = _evolve(space, evaluation, settings, journal, options.seed, show)
    facts["evaluated"] = state.evaluated
    scorers: dict[int, Scorer] = {}

    def scorer(variant: Variant) -> Scorer:
        key = id(variant)  # all of them live as long as ``variants``
        if key not in scorers:
            scorers[key] = replace(variant.scorer(), trust=options.trust)
        return scorers[key]

    alone = describe_plan(Candidate(), scorer(given), recipe=_alone(space, variants.bound(before) if faithful else ()))
    plans = [_plan(individual, evaluation, variant_of(individual), scorer) for individual in state.archive]
    if not (plans or state.interrupted):
        raise OptionError(_nearest(state, evaluation, variant_of, scorer, constraints))
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


def _memorised(base: Variant, dataset: Dataset, show: Progress) -> dict[str, Any]:
    """Has the trunk seen select? Say so before anyone trusts the thresholds."""
    accuracy, samples = base.bank.facts["accuracy"], base.bank.facts["samples"]
    if dataset.labels == "none":
        return {"verdict": "undecided", "message": "label-free: accuracy means agreement with the trunk"}
    classes = base.graph.num_classes
    if accuracy["select"] < 1.5 / classes:
        show.say(
            f"warning: the model gets {100 * accuracy['select']:.1f} % of select right, about what guessing among "
            f"{classes} classes gives: check the preprocessing (--preset, --scale, --mean, --std, --layout) and the "
            "order of the labels"
        )
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


def _plan(
    individual: Individual, evaluation: Evaluation, variant: Variant, scorer: Callable[[Variant], Scorer]
) -> Plan:
    """An individual's plan, scored exactly on select and test."""
    space = evaluation.space
    candidate = with_margins(evaluation.candidate(individual), scorer(variant), keep=space.fixed_thresholds())
    thresholds = {exit_.site: exit_.threshold for exit_ in candidate.exits}
    genome = dict(individual.genome)
    if (space.exits_place, "sites") in genome:  # its trunk may lack a site that the genome names
        genome[space.exits_place, "sites"] = tuple(thresholds)
    recipe = [
        # the trunk's temperature counts where scores are carried: each variant has its own
        (name, {"final_temperature": variant.temperature, **parameters} if name == EXITS else parameters)
        for name, parameters in space.bind(genome, thresholds)
    ]
    return settle(describe_plan(candidate, scorer(variant), recipe=recipe), variant, scorer(variant))


def _alone(space: Space, before: BoundRecipe) -> BoundRecipe:
    """The recipe without exits: what every plan is compared with."""
    empty: dict[str, Any] = {"sites": (), "heads": {}, "thresholds": {}}
    return [*before, (EXITS, {**space.recipe[space.exits_place][1], **empty})]


def _nearest(
    state: State,
    evaluation: Evaluation,
    variant_of: Callable[[Individual], Variant],
    scorer: Callable[[Variant], Scorer],
    limits: Constraints,
) -> str:
    """What to say where no plan keeps the limits: which one comes nearest, and what it lacks."""
    best = min(state.population, key=lambda one: one.fitness.violation)
    found = scorer(variant_of(best)).exact(evaluation.candidate(best), "select")
    objective = evaluation.objective
    figures = [
        (f"mean {objective}", found.cost[objective], limits.max_cost),
        (f"worst {objective}", found.worst[objective], limits.max_worst),
        ("params", found.cost["params"], limits.max_params),
    ]
    lacks = [f"{name} {value:.6g} (at most {limit:.6g})" for name, value, limit in figures if value > limit]
    if found.accuracy < limits.min_accuracy:
        lacks.append(f"accuracy {found.accuracy:.4f} on select (at least {limits.min_accuracy:.4f})")
    if not lacks:  # what the search adds to the cost of an exit is not in the figures
        lacks.append(f"to be {100 * best.fitness.violation:.2g} % better")
    return (
        f"no plan keeps the limits; the nearest one has {', '.join(lacks)}: loosen them and go on with --resume, "
        "the trained heads are kept"
    )
