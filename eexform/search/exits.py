"""The search for exits on one trunk, whose heads are trained: its plans, scored exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eexform.errors import OptionError
from eexform.passes import PassContext
from eexform.progress import Progress
from eexform.search.bits import BitScorer
from eexform.search.evaluation import Evaluation
from eexform.search.front import Plan, describe_plan
from eexform.search.genome import Constraints
from eexform.search.goals import Goals
from eexform.search.journal import Journal
from eexform.search.nsga2 import Settings, State, evolve
from eexform.search.options import SearchOptions
from eexform.search.results import nearest, plan_of, without_exits
from eexform.search.scorer import Candidate, Scorer
from eexform.search.settling import BoundRecipe
from eexform.search.space import Space, build_space
from eexform.search.variants import Variant


@dataclass(frozen=True)
class Found:
    """What the search on one trunk gave.

    Attributes:
        plans: non-dominated among themselves by what the search compares.
        evaluated: how many were scored.
        interrupted: Ctrl-C came before the last generation.
        lacking: why there is no plan, where there is none.
    """

    plans: tuple[Plan, ...]
    evaluated: int
    interrupted: bool = False
    lacking: str = ""


@dataclass(frozen=True)
class ExitSearch:
    """How exits are searched, whatever the trunk.

    Attributes:
        steps: ``insert_exits`` and what stands behind it, with what each is given.
        goals: what is made small beside the error.
        options: effort.
        constraints: limits of every plan.
        identity: of data, heads and limits, for the journals.
        progress: who is told.
    """

    steps: BoundRecipe
    goals: Goals
    options: SearchOptions
    constraints: Constraints
    identity: Mapping[str, Any]
    progress: Progress

    def run(self, variant: Variant, passes: BoundRecipe, journal: Path, scorer: Callable[[Variant], Scorer]) -> Found:
        """Search the exits of one trunk, from where the journal ends.

        Args:
            variant: the trunk.
            passes: that make it, settled.
            journal: the file.
            scorer: exact scorer of a variant.
        """
        if not variant.places:
            return self._alone(passes, scorer(variant))
        options = self.options
        recipe = [*passes, (self.steps[0][0], _present(self.steps[0][1], variant)), *self.steps[1:]]
        space = build_space(
            recipe, variant.graph, PassContext(heads=variant.bank, seed=options.seed), levels=options.levels
        )
        aimed = {term.model for goal in self.goals.listed if goal.target is not None for term in goal.amount.terms}
        charged = {  # a fee would move what is aimed at
            model: variant.costs[model].with_fee(options.exit_fee) for model in self.goals.models if model not in aimed
        }
        bits = BitScorer(
            variant.scores("select"),
            {**variant.costs, **charged},
            variant.places,
            measures=_measures(space),
            levels=options.levels,
            fixed=space.fixed_thresholds(),
            trust=options.trust,
        )
        evaluation = Evaluation(space, bits, self.goals, self.constraints)
        settings = Settings(population=options.population, generations=options.generations, handling=options.handling)
        weighing = {"trust": options.trust, "exit_fee": options.exit_fee}
        book = Journal(journal, space, {**settings.to_json(), **self.identity, **weighing}, options.seed)
        try:
            state = _evolve(space, evaluation, settings, book, options.seed, self.progress)
        except OptionError as error:
            return Found((), 0, lacking=str(error))
        plans = tuple(plan_of(individual, evaluation, variant, scorer(variant)) for individual in state.archive)
        lacking = "" if plans else nearest(state, evaluation, scorer(variant), self.constraints)
        return Found(plans, state.evaluated, state.interrupted, lacking)

    def _alone(self, passes: BoundRecipe, scorer: Scorer) -> Found:
        """The trunk without exits, where it keeps the limits."""
        plan = describe_plan(Candidate(), scorer, recipe=without_exits(passes, self.steps[0][1]))
        short = float(self.constraints.after(plan.figure, plan.select["accuracy"]))
        if short:
            return Found((), 1, lacking=f"a trunk without exits breaks the limits by {100 * short:.1f} %")
        return Found((plan,), 1)


def unite(found: Sequence[Found]) -> tuple[list[Plan], str]:
    """All plans of all trunks; and where there is none, why (that of the first trunk)."""
    plans = [plan for one in found for plan in one.plans]
    return plans, "" if plans else next((one.lacking for one in found if one.lacking), "")


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


def _present(given: Mapping[str, Any], variant: Variant) -> Mapping[str, Any]:
    """What is given to ``insert_exits``, without sites that this trunk does not have."""
    known = {site for site, _ in variant.places}
    kept = dict(given)
    if "sites" in given:
        kept["sites"] = tuple(site for site in given["sites"] if site in known)
    for part in ("heads", "thresholds"):
        if part in given:
            kept[part] = {site: value for site, value in given[part].items() if site in known}
    return kept


def _measures(space: Space) -> tuple[str, ...]:
    place = space.exits_place
    gene = space.genes.get((place, "measure"))
    if gene is not None:
        return tuple(getattr(gene.domain, "values", ("max_prob",)))
    return (str(space.recipe[place][1].get("measure", "max_prob")),)
