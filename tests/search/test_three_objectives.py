"""Searches with an error and two costs: exact, resumable, and what a run makes of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eexform.cost_models import _device, make
from eexform.errors import OptionError, RunError
from eexform.report.pareto import pareto
from eexform.search.archive import hypervolume, non_dominated
from eexform.search.front import Front, Plan, PlanExit, build_front
from eexform.search.genome import Individual
from eexform.search.goals import Goal, Goals
from eexform.search.journal import Journal
from eexform.search.limits import Limits
from eexform.search.nsga2 import Settings, evolve
from eexform.search.objectives import Objectives, Target
from eexform.search.run import Run, open_run
from eexform.search.scorer import Scorer
from eexform.search.terms import Term
from tests import tiny
from tests.search import synthetic
from tests.search.pruning import prune
from tests.search.retraining import tune
from tests.search.running import facts_of, front_of, options, start

WHERE = synthetic.places(4, 3)
DATA = synthetic.scores(WHERE, 250)
SMALL = Settings(population=16, generations=6, refine_every=2, refine_elites=4)
GOALS = Goals((Goal.of("macs"), Goal.of("params")))


def searched(goals: Goals, seed: int = 0, **given: Any) -> tuple[Any, Any, list[Individual]]:
    """Evaluation and last state of a search, and all that was scored."""
    evaluation = synthetic.evaluation(WHERE, DATA, goals=goals, **given)
    seen: list[Individual] = []
    score = evaluation.evaluate

    def evaluate(individuals: Any) -> None:
        score(individuals)
        seen.extend(individuals)

    evaluation.evaluate = evaluate  # type: ignore[method-assign]
    return evaluation, evolve(evaluation.space, evaluation, SMALL, seed=seed), seen


@pytest.mark.parametrize(
    "goals",
    [
        GOALS,
        Goals((Goal.of("macs", "p95"), Goal.of("macs"))),
        Goals((Goal("macs to 20M", Goal.of("macs").amount, "MACs", 20e6), Goal.of("params")), blend=0.1),
    ],
    ids=lambda goals: "-".join(goal.label.replace(" ", "_") for goal in goals.listed),
)
def test_the_archive_is_exact(goals: Goals) -> None:
    evaluation, state, seen = searched(goals)
    points = np.array([one.fitness.values for one in seen])
    assert points.shape[1] == 3
    np.testing.assert_array_equal(state.archive.points, points[non_dominated(points)])
    exact = Scorer({"select": DATA}, synthetic.costs(WHERE))
    for one in list(state.archive)[::5]:
        scored = exact.exact(evaluation.candidate(one), "select")
        assert one.fitness.values == pytest.approx(goals.values(1 - scored.judged, scored.figure))
    front = {tuple(point[[0, 2]]) for point in points[non_dominated(points[:, [0, 2]])]}
    assert front <= {tuple(point[[0, 2]]) for point in state.archive.points}  # two objectives alone lose nothing


def test_two_costs_are_both_looked_after() -> None:
    """Of each pair of objectives the front comes near to that of a search with those two alone."""
    _, both, _ = searched(GOALS)
    for column, model, whole in ((1, "macs", 44e6), (2, "params", 300e3)):
        _, alone, _ = searched(Goals.of(model))
        reference = (1.0, whole)
        found = hypervolume(both.archive.points[:, [0, column]], reference)
        assert found > 0.93 * hypervolume(alone.archive.points, reference)


def test_the_trunk_alone_can_cost_least_by_one_of_them() -> None:
    _, state, seen = searched(GOALS)
    smallest = state.archive.points[:, 2].min()
    assert smallest == 270e3 == seen[0].fitness.values[2]


@pytest.mark.parametrize("killed_after", [0, 3])
def test_resumed_equals_straight_run(tmp_path: Path, killed_after: int) -> None:
    def frozen(state: Any) -> str:
        members = [[one.key, one.fitness.values] for one in (*state.population, *state.archive)]
        return json.dumps([state.generation, members, state.evaluated, state.rng.bit_generator.state])

    _, expected, _ = searched(GOALS, seed=7)
    first = synthetic.evaluation(WHERE, DATA, goals=GOALS)
    journal = Journal(tmp_path / "journal.jsonl", first.space, {}, 7)
    journal.begin()
    cut = Settings(**{**vars(SMALL), "generations": killed_after})
    evolve(first.space, first, cut, seed=7, on_generation=journal.append)
    second = synthetic.evaluation(WHERE, DATA, goals=GOALS)
    state = Journal(tmp_path / "journal.jsonl", second.space, {}, 7).resume()
    assert state is not None
    assert state.archive.points.shape[1] == 3
    assert frozen(evolve(second.space, second, SMALL, seed=7, state=state)) == frozen(expected)


def test_a_target_is_met() -> None:
    goals = Goals((Goal("macs to 20M", Goal.of("macs").amount, "MACs", 20e6),))
    evaluation, state, _ = searched(goals, seed=1)
    nearest = next(iter(state.archive))
    exact = Scorer({"select": DATA}, synthetic.costs(WHERE)).exact(evaluation.candidate(nearest), "select")
    assert exact.cost["macs"] == pytest.approx(20e6, rel=0.02)
    assert nearest.fitness.values[1] == pytest.approx(abs(exact.cost["macs"] - 20e6) / 20e6)


# -- fronts ------------------------------------------------------------------------------------------------------------


def plan(accuracy: float, macs: float, params: float) -> Plan:
    cost = {"macs": macs, "params": params}
    return Plan(0, (), (), 0.0, {"accuracy": accuracy, "cost": cost, "macs": macs}, worst={"cost": cost})


TRUNK = plan(0.9, 40e6, 100e3)
FRONT = build_front(
    [
        TRUNK,
        plan(0.89, 20e6, 130e3),
        plan(0.89, 24e6, 110e3),
        plan(0.88, 24e6, 120e3),  # beaten
        plan(0.86, 19e6, 105e3),
    ],
    TRUNK,
    GOALS,
)


def test_a_front_of_three() -> None:
    assert [one.select["macs"] for one in FRONT] == [19e6, 20e6, 24e6, 40e6]
    assert FRONT.objective == "macs"
    assert FRONT.cost(FRONT[1], 1) == 130e3
    assert FRONT.cost(FRONT.trunk, 1) == 100e3
    again = Front.from_json(json.loads(json.dumps(FRONT.to_json())))
    assert again.goals == FRONT.goals
    assert again.to_json() == FRONT.to_json()


@pytest.mark.parametrize(
    ("text", "macs"),
    [
        ("max-cost=0.55x", 20e6),
        ("max-cost:macs=24M", 20e6),
        ("max-cost:params=1.1x", 40e6),
        ("max-cost:params=1x", 40e6),
        ("max-cost:params@max=100k", 40e6),
        ("min-accuracy=0.885", 20e6),
    ],
)
def test_picking_by_any_cost(text: str, macs: float) -> None:
    assert FRONT.pick(text).select["macs"] == macs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-cost:param=1x", "max-cost:param: no cost of that name was computed: did you mean 'params'"),
        ("max-cost:macs@p95=1x", "max-cost:macs@p95: no cost of that name was computed"),
        ("max-cost:params=0.5x", "no plan costs at most 50000 params: the cheapest one costs 100000 .1.000x."),
    ],
)
def test_picking_what_is_not_there(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        FRONT.pick(text)


def test_picking_by_memory_is_about_the_worst_path() -> None:
    """As in limits; and in bytes, which a unit may stand behind."""

    def held(plan: Plan, mean: float, most: float) -> Plan:
        select = {**plan.select, "cost": {**plan.select["cost"], "peak_ram_bytes": mean}}
        return replace(plan, select=select, worst={"cost": {**plan.worst["cost"], "peak_ram_bytes": most}})

    front = replace(FRONT, plans=(held(FRONT[0], 2e3, 3e3), held(FRONT[1], 1e3, 9e3)), trunk=held(TRUNK, 4e3, 4e3))
    assert front.pick("max-cost:peak_ram_bytes=3KiB").index == 0
    assert front.pick("max-cost:peak_ram_bytes=0.75x").index == 0
    assert front.pick("max-cost:peak_ram_bytes@mean=1kB").index == 1
    with pytest.raises(OptionError, match="no plan costs at most 2000 peak_ram_bytes@max: the cheapest one costs 3000"):
        front.pick("max-cost:peak_ram_bytes=2kB")


def test_the_knee_of_three() -> None:
    exits = (PlanExit("s", "none/avg", "max_prob", 0.5, 1.0),)
    front = build_front([TRUNK, *(replace(one, exits=exits) for one in FRONT.plans[:-1])], TRUNK, GOALS)
    assert front.knee().select["macs"] == 24e6  # 20e6 is as good and costs less, but for the parameters
    alone = build_front(front.plans, TRUNK, Goals.of("macs"))
    assert alone.knee().select["macs"] == 20e6


def test_fronts_from_before_there_were_objectives() -> None:
    stored = FRONT.to_json()
    del stored["objectives"], stored["target_blend"]
    assert Front.from_json(stored).goals == Goals.of("macs")


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("three") / "run"
    return start(out, cost=["macs@p95", "0.5*macs+0.5*params"], limits=Limits(max_terms=("model_bytes=3x",)))


def test_a_run_with_two_costs(run: Run) -> None:
    assert run.facts["objective"] == "macs@p95; 0.5*macs+0.5*params"
    assert set(run.facts["models"]) == {"macs", "params"}
    assert run.facts["limits"]["max_terms"] == ["model_bytes=3x"]
    goals, trunk = run.front.goals, run.front.trunk
    assert [goal.label for goal in goals.listed] == ["macs@p95", "0.5*macs+0.5*params"]
    assert goals.listed[1].amount(trunk.figure) == pytest.approx(1.0)
    points = np.array([goals.values(1 - plan.select["judged"], plan.figure) for plan in run.front])
    assert len(points) >= 5
    assert non_dominated(points).tolist() == list(range(len(points)))
    for plan in run.front:
        assert plan.figure(Term("model_bytes")) <= 3 * trunk.figure(Term("model_bytes"))
        assert plan.figure(Term("macs", "p95"), "test") == plan.test["percentiles"]["p95"]["macs"]
    with pytest.raises(OptionError, match="'flops' was not computed for this plan"):
        run.front[0].figure(Term("flops"))
    shown = pareto(run)
    assert shown["run"]["objective"] == "macs@p95"
    assert shown["trunk"]["objectives"] == [trunk.select["macs"], pytest.approx(1.0)]
    first = shown["plans"][0]
    assert first["select"]["objectives"] == [first["select"]["percentiles"]["p95"]["macs"], points[0, 2]]
    assert first["worst"]["objectives"][0] == first["worst"]["macs"]


def test_a_table_that_cannot_be_read_shows_before_training(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(OptionError, match=r"broken\.json"):
        start(tmp_path / "run", cost=f"table:device={tmp_path / 'broken.json'}")
    assert not (tmp_path / "run").exists()


def test_a_resume_notices_another_device_behind_the_same_name(tmp_path: Path) -> None:
    board = tmp_path / "board.toml"
    board.write_text((Path(_device.__file__).parent / "devices" / "rpi5.toml").read_text())
    cost = f"roofline:device={board}"
    start(tmp_path / "run", cost=cost)
    start(tmp_path / "run", cost=cost, resume=True)
    board.write_text(board.read_text() + "# bandwidth measured again\n")
    with pytest.raises(RunError, match="other contents of the files that costs are read from than the run's"):
        start(tmp_path / "run", cost=cost, resume=True)


def test_a_run_with_two_costs_is_resumed_and_only_as_it_was(run: Run, tmp_path: Path) -> None:
    limits = Limits(max_terms=("model_bytes=3x",))
    cost = ["macs@p95", "0.5*macs+0.5*params"]
    out = tmp_path / "run"
    cut = start(out, cost=cost, limits=limits, progress=tiny.Watch("searching", after=2))
    assert cut.state == "interrupted"
    start(out, cost=cost, limits=limits, resume=True)
    assert front_of(out) == front_of(run.folder.path)
    copy = shutil.copytree(run.folder.path, tmp_path / "copy")
    for other in ("macs@p95", "macs", ["macs@p95", "0.5*macs+0.4*params"]):
        with pytest.raises(RunError, match="cannot resume with other objective than the run's"):
            start(copy, cost=other, limits=limits, resume=True)
    with pytest.raises(RunError, match="cannot resume with other limits than the run's"):
        start(copy, cost=cost, resume=True)
    with pytest.raises(RunError, match="cannot resume with other options than the run's"):
        start(copy, cost=cost, limits=limits, resume=True, options=options(constraints="adaptive"))


def test_training_goes_on_with_the_same_objectives(run: Run, tmp_path: Path) -> None:
    pick = next(plan for plan in run.front if plan.exits)
    tuned = tune(run, tmp_path / "tuned", pick=str(pick.index))
    assert tuned.facts["objective"] == run.facts["objective"]
    assert tuned.facts["models"] == run.facts["models"]
    assert [goal.label for goal in tuned.front.goals.listed] == [goal.label for goal in run.front.goals.listed]
    assert tuned.front.goals.listed[1].amount(tuned.front.trunk.figure) == pytest.approx(1.0)
    for plan in tuned.front:
        assert plan.figure(Term("model_bytes")) <= 3 * run.front.trunk.figure(Term("model_bytes"))


def test_target_of_a_run(tmp_path: Path) -> None:
    found = start(tmp_path / "run", target=Target("macs=0.6x", blend=0.1), options=options(generations=6))
    assert found.facts["objective"] == "macs to 0.6x (x 0.1 added to the error)"
    whole = found.front.trunk.select["macs"]
    goal = found.front.goals.listed[0]
    assert goal.target == pytest.approx(0.6 * whole)
    distances = [goal.value(plan.figure) for plan in found.front]
    assert distances == sorted(distances)
    assert found.front[0].select["macs"] == pytest.approx(0.6 * whole, rel=0.05)
    assert open_run(tmp_path / "run").front.goals == found.front.goals


def test_trunks_are_searched_by_all_of_them(tmp_path: Path) -> None:
    limits = Limits(max_terms=("model_bytes=1.05x",))
    found = prune(tmp_path / "run", cost=["macs", "params"], limits=limits)
    size = found.front.trunk.figure(Term("model_bytes"))
    assert found.state == "done"
    assert any(plan.recipe[0][0] == "prune_channels" for plan in found.front)
    assert all(plan.figure(Term("model_bytes")) <= 1.05 * size for plan in found.front)
    tried = [json.loads(line) for line in (tmp_path / "run" / "trunks.jsonl").read_text().splitlines()[1:]]
    prices = [line["prices"] for line in tried if line["kind"] == "tried"]
    assert prices
    assert all(set(one) == {"macs", "params", "model_bytes"} for one in prices)
    assert set(facts_of(tmp_path / "run")["trunks"][0]["prices"]) == {"macs", "params", "model_bytes"}


def test_objects_are_objectives_too() -> None:
    assert Objectives.parse([make("macs"), "params"]) == Objectives.parse(["macs", "params"])


@pytest.mark.parametrize("sided", ["one", "two"])
@pytest.mark.parametrize("wanted", [12e6, 20e6, 33e6])
def test_aiming_comes_nearer(wanted: float, sided: Any) -> None:
    goal = Goal("aimed", Goal.of("macs").amount, "MACs", wanted, sided)
    evaluation = synthetic.evaluation(WHERE, DATA, goals=Goals((goal,)))
    exact = Scorer({"select": DATA}, synthetic.costs(WHERE))
    rng = np.random.default_rng(0)
    for one in (evaluation.space.sample(rng) for _ in range(6)):
        draft = evaluation.draft(one)
        if not draft.heads or evaluation.scorer.by_path(draft.measure, draft.carry):
            continue
        aimed = evaluation._aimed(draft, goal, (1.0,))
        before, after = (
            goal.value(exact.exact(evaluation.scorer.candidate(d.heads, d.levels, d.measure, d.carry), "select").figure)
            for d in (draft, aimed)
        )
        assert after <= before
        assert set(aimed.heads) <= set(draft.heads)
