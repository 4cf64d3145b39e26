"""What a search gives: the plans that no other one beats, and ways to pick one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from eexform import cost_models
from eexform.errors import OptionError, RunError, suggest
from eexform.search.archive import non_dominated
from eexform.search.goals import Goal, Goals
from eexform.search.objectives import usual
from eexform.search.plans import Plan, PlanExit, PlanSource, describe_plan
from eexform.search.quantities import amount_of
from eexform.search.terms import STATISTICS

__all__ = ["USEFUL", "Front", "Plan", "PlanExit", "PlanSource", "build_front", "describe_plan"]

USEFUL = 5.0
"""Points below the trunk down to which a plan counts when the knee is looked for."""


@dataclass(frozen=True)
class Front:
    """The plans of a run, by rising first objective on select; index = place.

    Attributes:
        plans: no two alike.
        trunk: the trunk alone, which every plan is compared with.
        goals: what the plans were chosen by, beside the error.
    """

    plans: tuple[Plan, ...]
    trunk: Plan
    goals: Goals = field(default_factory=lambda: Goals.of("macs"))

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[Plan]:
        return iter(self.plans)

    def __getitem__(self, index: int) -> Plan:
        return self.plans[index]

    @property
    def objective(self) -> str:
        """What the first objective is called: the cost model, where it is the mean under one."""
        return self.goals.listed[0].label

    def cost(self, plan: Plan, objective: int = 0) -> float:
        """What a plan costs on select by an objective, in its unit."""
        return float(self.goals.listed[objective].amount(plan.figure))

    def knee(self) -> Plan:
        """The plan farthest from the line between the cheapest and the most accurate one, both axes scaled to 0..1;
        where there are several objectives, the scaled costs' mean counts.

        Only plans within :data:`USEFUL` points of the trunk count (all, where there is none): the cheap end of a front
        holds plans that nobody would deploy, and they would bend the axis on which the others are compared. The trunk
        alone is a plan of the front where nothing beats it, but no knee while there is a plan with exits.
        """
        if not self.plans:
            raise OptionError("the front is empty: no plan kept the constraints; loosen them and search again")
        floor = _judged(self.trunk) - USEFUL / 100
        plans = [plan for plan in self.plans if plan.exits] or list(self.plans)
        plans = [plan for plan in plans if _judged(plan) >= floor] or plans
        points = np.array([[_judged(plan), *self._values(plan)] for plan in plans], np.float64)
        span = np.ptp(points, axis=0)
        scaled = (points - points.min(axis=0)) / np.where(span > 0, span, 1.0)
        # from (0, 0), the cheapest, to (1, 1), the most accurate: above the line is accuracy minus cost
        distance = scaled[:, 0] - scaled[:, 1:].mean(axis=1)
        return plans[int(np.flatnonzero(distance == distance.max())[-1])]

    def pick(self, text: str) -> Plan:
        """A plan by description.

        Args:
            text: ``knee``; an index; ``max-cost=0.6x`` (of the trunk) or ``max-cost=24.4e6`` (in the objective's
                unit): the plan judged best within; ``max-cost:params=1.1x`` by another objective, or by any cost that
                was computed; ``min-accuracy=-0.5`` (points below the trunk, on select, judged as the search did) or
                ``min-accuracy=0.91``: the cheapest plan that has it.

        Raises:
            OptionError: not understood, or no plan fits; the message gives the front's range.
        """
        text = text.strip()
        if text == "knee" or not self.plans:
            return self.knee()
        if re.fullmatch(r"\d+", text):
            if int(text) >= len(self.plans):
                raise OptionError(f"there is no plan {text}: the front has plans 0 to {len(self.plans) - 1}")
            return self.plans[int(text)]
        name, _, value = text.rpartition("=")
        if name == "max-cost" or name.startswith("max-cost:"):
            return self._cheap_enough(name.removeprefix("max-cost").removeprefix(":"), value)
        if name == "min-accuracy":
            return self._good_enough(value)
        raise OptionError(
            f"{text!r} picks no plan; write knee, an index, max-cost=0.6x, max-cost=24.4e6, max-cost:params=1.1x, "
            "min-accuracy=-0.5 or min-accuracy=0.91"
        )

    def to_json(self) -> dict[str, Any]:
        """Trunk, objectives and plans as plain values."""
        return {
            "objective": self.objective,
            **self.goals.to_json(),
            "trunk": self.trunk.to_json(),
            "plans": [p.to_json() for p in self.plans],
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any], source: PlanSource | None = None) -> Front:
        """Inverse of :meth:`to_json`.

        Raises:
            RunError: fields are missing.
        """
        try:
            plans = tuple(Plan.from_json(entry, source) for entry in plain["plans"])
            first = str(plain["objective"])
            goals = Goals.from_json(plain) if "objectives" in plain else Goals.of(first)
            return cls(plans, Plan.from_json(plain["trunk"], source), goals)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"the stored front is damaged ({error!r}); the run cannot be read") from error

    def _values(self, plan: Plan) -> tuple[float, ...]:
        return tuple(float(goal.value(plan.figure)) for goal in self.goals.listed)

    def _goal(self, name: str) -> Goal:
        """The objective of that name, or any cost that was computed; the first one without a name."""
        named = {text: goal for goal in reversed(self.goals.listed) for text in (goal.label, goal.cost_label)}
        if name in named or not name:
            return named.get(name, self.goals.listed[0])
        model, _, kind = name.rpartition("@")
        if not model or kind not in STATISTICS:
            model, kind = name, ""
        unit, meant = _declared(model)
        goal = Goal.of(model, kind or meant, unit)
        try:
            goal.amount(self.trunk.figure)
        except OptionError as error:
            known = {*named, *self.trunk.select["cost"]}
            raise OptionError(f"max-cost:{name}: no cost of that name was computed: {suggest(name, known)}") from error
        return goal

    def _cheap_enough(self, name: str, value: str) -> Plan:
        goal = self._goal(name)
        trunk = float(goal.amount(self.trunk.figure))
        limit = amount_of(value, trunk, f"max-cost={value}", goal.unit)
        costs = {plan.index: float(goal.amount(plan.figure)) for plan in self.plans}
        fitting = [plan for plan in self.plans if costs[plan.index] <= limit]
        if not fitting:
            least = min(costs.values())
            raise OptionError(
                f"no plan costs at most {limit:.6g} {goal.cost_label}: the cheapest one costs {least:.6g} "
                f"({least / trunk:.3f}x)"
            )
        return max(fitting, key=lambda plan: (_judged(plan), -costs[plan.index]))

    def _good_enough(self, value: str) -> Plan:
        number = _number(value, f"min-accuracy={value}")
        relative = value.strip()[:1] in ("-", "+")
        if not relative and not 0.0 < number <= 1.0:
            raise OptionError(
                f"min-accuracy={value}: write points against the trunk with a sign (-0.5), or an accuracy in 0..1"
            )
        # A difference to the trunk is judged as the search judged: the plain one flatters plans that won on select.
        figure = _judged if relative else _accuracy
        base = figure(self.trunk)
        # half a millionth: an accuracy is a fraction of samples, the limit a rounded decimal
        limit = (base + number / 100.0 if relative else number) - 5e-7
        fitting = [plan for plan in self.plans if figure(plan) >= limit]
        if not fitting:
            best = max(map(figure, self.plans))
            raise OptionError(
                f"no plan has an accuracy of {limit:.4f} on select: the best one has {best:.4f} "
                f"({100 * (best - base):+.2f} points against the trunk)"
            )
        return min(fitting, key=lambda plan: (self._values(plan)[0], -figure(plan)))


def build_front(plans: Sequence[Plan], trunk: Plan, goals: Goals | None = None) -> Front:
    """Order plans by cost, drop those that others beat on select (judged as the search did), number them."""
    goals = goals or Goals.of("macs")
    if not plans:
        return Front((), trunk, goals)
    points = np.array([goals.values(1.0 - _judged(plan), plan.figure) for plan in plans], np.float64)
    kept = [plans[index] for index in non_dominated(points).tolist()]
    return Front(tuple(replace(plan, index=index) for index, plan in enumerate(kept)), trunk, goals)


def _declared(model: str) -> tuple[str, str]:
    """Unit of a cost model, and the statistic that is meant where none is named (as in limits)."""
    try:
        found = cost_models.get(model.partition(":")[0])
    except OptionError:  # a plug-in that is not installed here: the run can be read all the same
        return "", "mean"
    return found.unit, usual(found)


def _accuracy(plan: Plan) -> float:
    return float(plan.select["accuracy"])


def _judged(plan: Plan) -> float:
    """What a search compares: the accuracy, or the credit where answers are judged with the trunk's opinion."""
    return float(plan.select.get("judged", plan.select["accuracy"]))


def _number(text: str, whole: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise OptionError(f"{whole}: {text!r} is not a number")
    return number
