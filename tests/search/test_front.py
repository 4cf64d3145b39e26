"""Plans and fronts: stored, ordered, picked."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from eexform.errors import OptionError, RunError
from eexform.search.front import Front, Plan, PlanExit, build_front, describe_plan
from eexform.search.scorer import Candidate, PlannedExit, Scorer
from tests.search import synthetic


def plan(accuracy: float, cost: float, index: int = 0) -> Plan:
    return Plan(index, (), (), 0.0, {"accuracy": accuracy, "cost": {"macs": cost}, "macs": cost})


TRUNK = plan(0.91, 40e6)
FRONT = build_front(
    [plan(0.91, 40e6), plan(0.905, 28e6), plan(0.80, 16e6), plan(0.90, 24e6), plan(0.89, 30e6), plan(0.60, 8e6)], TRUNK
)


def test_differences_to_the_trunk_are_judged_as_the_search_judged() -> None:
    def judged(accuracy: float, credit: float, cost: float) -> Plan:
        made = plan(accuracy, cost)
        return replace(made, select={**made.select, "judged": credit})

    lucky, steady = judged(0.92, 0.90, 20e6), judged(0.91, 0.915, 30e6)
    front = build_front([lucky, steady], judged(0.91, 0.92, 40e6))
    assert front.pick("min-accuracy=-0.5").select["accuracy"] == 0.91
    assert front.pick("min-accuracy=-2").select["accuracy"] == 0.92
    assert front.pick("min-accuracy=0.915").select["accuracy"] == 0.92  # an accuracy is an accuracy


def test_plans_that_nobody_would_deploy_do_not_bend_the_knee() -> None:
    useful = [plan(0.91, 40e6), plan(0.905, 28e6), plan(0.90, 24e6)]
    poor = [plan(0.2, 1e6), plan(0.5, 5e6), plan(0.85, 12e6)]
    assert build_front(useful + poor, TRUNK).knee().select == build_front(useful, TRUNK).knee().select
    assert build_front(poor, TRUNK).knee().select["accuracy"] == 0.5  # none is useful: all count


def test_the_trunk_alone_is_no_knee() -> None:
    one = replace(plan(0.90, 39e6), exits=(PlanExit("s", "none/avg", "max_prob", 0.5, 1.0),))
    assert build_front([plan(0.91, 40e6), one], TRUNK).knee().exits == one.exits


def test_front_is_ordered_and_numbered() -> None:
    assert [one.select["macs"] for one in FRONT] == [8e6, 16e6, 24e6, 28e6, 40e6]
    assert [one.index for one in FRONT] == [0, 1, 2, 3, 4]
    assert len(FRONT) == 5
    assert FRONT[3].select["accuracy"] == 0.905


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("knee", 3),
        ("3", 3),
        ("max-cost=0.6x", 2),
        ("max-cost=24.4e6", 2),
        ("max-cost=1x", 4),
        ("min-accuracy=-0.5", 3),
        ("min-accuracy=-1", 2),
        ("min-accuracy=-0", 4),
        ("min-accuracy=+0.0", 4),
        ("min-accuracy=0.85", 2),
        (" min-accuracy=-50 ", 0),
    ],
)
def test_pick(text: str, index: int) -> None:
    assert FRONT.pick(text).index == index


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("7", "there is no plan 7: the front has plans 0 to 4"),
        ("max-cost=0.1x", r"no plan costs at most 4e\+06 macs: the cheapest one costs 8e\+06 \(0.200x\)"),
        ("min-accuracy=0.99", r"the best one has 0.9100 \(\+0.00 points"),
        ("min-accuracy=91", "write points against the trunk with a sign"),
        ("min-accuracy=much", "'much' is not a number"),
        ("max-cost=nan", "'nan' is not a number"),
        ("best", "'best' picks no plan; write knee"),
        ("-1", "picks no plan"),
    ],
)
def test_pick_errors(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        FRONT.pick(text)


def test_small_fronts() -> None:
    assert build_front([TRUNK], TRUNK).knee().select == TRUNK.select
    with pytest.raises(OptionError, match="the front is empty"):
        build_front([], TRUNK).pick("0")


def test_plans_survive_json() -> None:
    where = synthetic.places(3, 2)
    splits = {"select": synthetic.scores(where, 100, seed=1), "test": synthetic.scores(where, 80, seed=2)}
    scorer = Scorer(splits, synthetic.costs(where))
    exits = (PlannedExit("s0", "h1", 0.75), PlannedExit("s1", "h0", math.inf), PlannedExit("s2", "h0", -math.inf))
    recipe = [
        ("insert_exits", {"sites": ("s0", "s1", "s2"), "thresholds": {"s0": 0.75, "s1": math.inf, "s2": -math.inf}})
    ]
    made = describe_plan(Candidate(exits, "entropy", 0.25), scorer, index=4, recipe=recipe)
    assert made.candidate == Candidate(exits, "entropy", 0.25)
    assert made.worst["macs"] == max(synthetic.costs(where)["macs"].path(made.candidate.pairs))
    assert made.test["rates"] != made.select["rates"]
    assert sum(made.test["rates"]) == pytest.approx(1)
    text = json.dumps(made.to_json(), allow_nan=False)
    again = Plan.from_json(json.loads(text))
    assert json.dumps(again.to_json(), allow_nan=False) == text
    assert again.exits == made.exits
    assert again.recipe[0][1]["thresholds"] == recipe[0][1]["thresholds"]
    front = Front((replace(made, index=0),), describe_plan(Candidate(), scorer))
    stored = json.loads(json.dumps(front.to_json(), allow_nan=False))
    assert Front.from_json(stored).to_json() == stored
    with pytest.raises(RunError, match="a stored plan is damaged"):
        Front.from_json({**stored, "plans": [{"index": 0}]})
    with pytest.raises(RunError, match="the stored front is damaged"):
        Front.from_json({})


def test_a_plan_without_its_run_says_so() -> None:
    with pytest.raises(OptionError, match="plan 0 was read without its run"):
        TRUNK.export("x.onnx")
    with pytest.raises(OptionError, match="open the run directory"):
        TRUNK.materialise()


def test_exit_thresholds_have_names() -> None:
    exit_ = PlanExit("s", "h", "margin", math.inf, 1.5)
    assert exit_.to_json()["threshold"] == "never"
    assert PlanExit.from_json(exit_.to_json()) == exit_
    assert np.isfinite(PlanExit.from_json({**exit_.to_json(), "threshold": 0.5}).threshold)
