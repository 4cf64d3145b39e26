"""What a search ends with: an individual written down as a plan, and what to say where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eexform.data import Dataset, memorisation
from eexform.passes import get
from eexform.progress import Progress
from eexform.search.evaluation import Evaluation
from eexform.search.front import Plan, describe_plan
from eexform.search.genome import Constraints, Individual
from eexform.search.margins import with_margins
from eexform.search.nsga2 import State
from eexform.search.scorer import Scorer
from eexform.search.settle import settle
from eexform.search.space import EXITS
from eexform.search.variants import BoundRecipe, Variant


def memorised(base: Variant, dataset: Dataset, show: Progress) -> dict[str, Any]:
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


def plan_of(individual: Individual, evaluation: Evaluation, variant: Variant, scorer: Scorer) -> Plan:
    """An individual's plan, scored exactly on select and test."""
    space = evaluation.space
    candidate = with_margins(evaluation.candidate(individual), scorer, keep=space.fixed_thresholds())
    thresholds = {exit_.site: exit_.threshold for exit_ in candidate.exits}
    genome = dict(individual.genome)
    if (space.exits_place, "sites") in genome:  # its trunk may lack a site that the genome names
        genome[space.exits_place, "sites"] = tuple(thresholds)
    recipe = [
        # the trunk's temperature counts where scores are carried: each variant has its own
        (name, {"final_temperature": variant.temperature, **parameters} if name == EXITS else parameters)
        for name, parameters in space.bind(genome, thresholds)
    ]
    return settle(describe_plan(candidate, scorer, recipe=recipe), variant, scorer)


def without_exits(passes: BoundRecipe, given: Mapping[str, Any]) -> BoundRecipe:
    """The recipe of a trunk alone.

    Args:
        passes: that make it.
        given: what the searched recipe gives ``insert_exits``.
    """
    empty: dict[str, Any] = {"sites": (), "heads": {}, "thresholds": {}}
    return [*passes, (EXITS, {**get(EXITS).checked(given), **empty})]


def nearest(state: State, evaluation: Evaluation, scorer: Scorer, limits: Constraints) -> str:
    """What to say where no plan keeps the limits: which one comes nearest, and what it lacks."""
    best = min(state.population, key=lambda one: one.fitness.violation)
    found = scorer.exact(evaluation.candidate(best), "select")
    figures = [(limit.label, float(limit.amount(found.figure)), limit.most) for limit in limits.limits]
    lacks = [f"{name} {value:.6g} (at most {most:.6g})" for name, value, most in figures if value > most]
    if found.accuracy < limits.min_accuracy:
        lacks.append(f"accuracy {found.accuracy:.4f} on select (at least {limits.min_accuracy:.4f})")
    if not lacks:  # what the search adds to the cost of an exit is not in the figures
        lacks.append(f"to be {100 * best.fitness.violation:.2g} % better")
    return (
        f"no plan keeps the limits; the nearest one has {', '.join(lacks)}: loosen them and go on with --resume, "
        "the trained heads are kept"
    )
