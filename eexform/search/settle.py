"""What the passes behind ``insert_exits`` make of a plan, so that its figures are those of the graph it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eexform.errors import OptionError
from eexform.ir.exits import Exit
from eexform.ir.graph import Graph
from eexform.passes import PassContext, make
from eexform.search.front import Plan, describe_plan
from eexform.search.scorer import Candidate, PlannedExit, Scorer
from eexform.search.space import EXITS
from eexform.search.variants import Variant


def settle(plan: Plan, variant: Variant, scorer: Scorer) -> Plan:
    """The plan with the passes behind ``insert_exits`` carried out where they drop exits.

    Exits that a pass drops are taken out of the plan, which is then scored again; a pass that has nothing left to do is
    taken out of its recipe (applied elsewhere it might not have what it decides by, such as measured exit rates).

    Raises:
        OptionError: a pass changes exits otherwise than by dropping them, which cached scores cannot follow.
    """
    place = [name for name, _ in plan.recipe].index(EXITS)
    while place + 1 < len(plan.recipe):
        kept, graph = _applied(plan, place, variant)
        if len(graph.exits) == len(plan.exits):
            return _with_recipe(plan, [*plan.recipe[: place + 1], *kept])
        plan = _reduced(plan, place, [item.site for item in graph.exits], scorer)
    return plan


def _applied(plan: Plan, place: int, variant: Variant) -> tuple[list[tuple[str, Mapping[str, Any]]], Graph]:
    """The passes that change the plan's graph, up to the first one that drops exits, and the graph behind it."""
    graph = make(EXITS, **plan.recipe[place][1])(variant.graph, PassContext(heads=variant.bank)).graph
    kept: list[tuple[str, Mapping[str, Any]]] = []
    for name, parameters in plan.recipe[place + 1 :]:
        before = graph.exits
        result = make(name, **parameters)(graph, PassContext(exit_rates=tuple(plan.select["rates"])))
        graph = result.graph
        _check_dropped(name, before, graph.exits)
        if result.changed:
            kept.append((name, parameters))
        if len(graph.exits) < len(before):
            break
    return kept, graph


def _check_dropped(name: str, before: Sequence[Exit], after: Sequence[Exit]) -> None:
    left = iter(_rule(item) for item in before)
    if not all(_rule(item) in left for item in after):
        raise OptionError(
            f"pass {name!r} behind {EXITS!r} changes exits; a search cannot score that from cached scores: "
            f"put it before {EXITS}, or apply it to the plan that is picked"
        )


def _rule(item: Exit) -> tuple[Any, ...]:
    return item.site, item.head, item.measure, item.threshold, item.temperature, item.digest


def _reduced(plan: Plan, place: int, sites: Sequence[str], scorer: Scorer) -> Plan:
    """The plan with exits at ``sites`` only, scored anew."""
    name, parameters = plan.recipe[place]
    chosen = {**parameters, "sites": tuple(sites)}
    for part in ("heads", "thresholds"):
        chosen[part] = {site: parameters[part][site] for site in sites}
    exits = tuple(PlannedExit(item.site, item.head, item.threshold) for item in plan.exits if item.site in sites)
    candidate = Candidate(exits, plan.candidate.measure, plan.carry)
    recipe = [*plan.recipe[:place], (name, chosen), *plan.recipe[place + 1 :]]
    return describe_plan(candidate, scorer, index=plan.index, recipe=recipe, source=plan.source)


def _with_recipe(plan: Plan, recipe: Sequence[tuple[str, Mapping[str, Any]]]) -> Plan:
    return Plan(**{**vars(plan), "recipe": tuple(recipe)})
