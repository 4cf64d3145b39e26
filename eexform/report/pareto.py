"""The front of a run as plain values."""

from __future__ import annotations

from functools import partial
from typing import Any

from eexform import cost_models
from eexform.errors import OptionError
from eexform.search.front import Plan
from eexform.search.goals import Goal, Goals
from eexform.search.run import Run


def pareto(run: Run) -> dict[str, Any]:
    """What ``eexform pareto --json`` prints; the keys are stable.

    ``trunk``: accuracy and cost of the model itself. ``tuned``: what fine-tuning made of it; ``None`` where there was
    none. ``plans``: by rising cost; ``test`` has the keys of ``select``.
    """
    front = run.front
    goals = front.goals
    trunk, facts = front.trunk, run.facts
    return {
        "run": {
            "state": run.state,
            "objective": front.objective,
            "unit": _unit(goals.listed[0]),
            "objectives": [{**goal.to_json(), "unit": _unit(goal)} for goal in goals.listed],
            "target_blend": goals.blend,
            "labels": run.facts.get("labels", "given"),
            "memorisation": facts.get("memorisation"),
            "seconds_training": facts.get("seconds_training"),
            "seconds_searching": facts.get("seconds_searching"),
            "plans_scored": facts.get("evaluated"),
            "uncounted": [{"node": node, "operator": operator} for node, operator in facts.get("uncounted", [])],
        },
        "trunk": {
            "accuracy_select": trunk.select["accuracy"],
            "accuracy_test": trunk.test["accuracy"],
            "accuracy_train": facts["trunk"]["accuracy"]["head_train"],
            "macs": trunk.select["macs"],
            "cost": dict(trunk.select["cost"]),
            "objectives": [goal.amount(trunk.figure) for goal in goals.listed],
            "samples": facts["trunk"]["samples"],
        },
        "tuned": _tuned(run),
        "plans": [_without_recipe(described(plan, goals)) for plan in front],
        "knee": front.knee().index if len(front) else None,
    }


def _tuned(run: Run) -> dict[str, Any] | None:
    """The fine-tuned trunk without exits, and how it was made."""
    if not run.trained_from:
        return None
    accuracy, done = run.facts["tuned_trunk"]["accuracy"], run.facts["finetuned"]
    return {
        "strategy": run.trained_from["strategy"],
        "plan": run.trained_from["plan"],
        "epochs": done["epochs"],
        "seconds": done["seconds"],
        "device": done["device"],
        "accuracy_select": accuracy["select"],
        "accuracy_test": accuracy["test"],
        "accuracy_train": accuracy["head_train"],
    }


def _unit(goal: Goal) -> str:
    if goal.unit:
        return goal.unit
    try:  # of a run from before units were kept
        return str(cost_models.get(goal.label).unit)
    except OptionError:  # a plug-in that is not installed here: the run can be read all the same
        return ""


def described(plan: Plan, goals: Goals) -> dict[str, Any]:
    """A plan as plain values, with what it costs by each objective."""
    plain = plan.to_json()
    for split in ("select", "test"):
        if plain[split]:
            figure = partial(plan.figure, split=split)
            plain[split]["objectives"] = [goal.amount(figure) for goal in goals.listed]
    plain["worst"]["objectives"] = [goal.amount.dearest()(plan.figure) for goal in goals.listed]
    return plain


def _without_recipe(plain: dict[str, Any]) -> dict[str, Any]:
    del plain["recipe"]
    return plain
