"""The front of a run as plain values."""

from __future__ import annotations

from typing import Any

from eexform import cost_models
from eexform.errors import OptionError
from eexform.search.front import Plan
from eexform.search.run import Run


def pareto(run: Run) -> dict[str, Any]:
    """What ``eexform pareto --json`` prints; the keys are stable.

    ``trunk``: accuracy and cost of the model itself. ``tuned``: what fine-tuning made of it; ``None`` where there was
    none. ``plans``: by rising cost; ``test`` has the keys of ``select``.
    """
    front = run.front
    trunk, facts = front.trunk, run.facts
    return {
        "run": {
            "state": run.state,
            "objective": front.objective,
            "unit": _unit(front.objective),
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
            "samples": facts["trunk"]["samples"],
        },
        "tuned": _tuned(run),
        "plans": [_plan(plan) for plan in front],
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


def _unit(objective: str) -> str:
    try:
        return str(cost_models.get(objective).unit)
    except OptionError:  # a plug-in that is not installed here: the run can be read all the same
        return ""


def _plan(plan: Plan) -> dict[str, Any]:
    plain = plan.to_json()
    del plain["recipe"]
    return plain
