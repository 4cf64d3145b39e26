"""Trunks are searched, repaired, trained within a budget, and get exits; the front is that of all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eexform.cost_models import make
from eexform.errors import OptionError, RunError
from eexform.ir.graph import Graph
from eexform.passes.repair import Repair
from eexform.search import driver
from eexform.search.front import Plan
from eexform.search.limits import Limits
from eexform.search.proxy import Proxy
from eexform.search.run import Run, open_run
from eexform.training import distill
from tests import tiny
from tests.search.drop_block import registered
from tests.search.pruning import STEPS, TRUNKS, prune, pruned, trunks
from tests.search.retraining import TUNING
from tests.search.running import facts_of, front_of, options, recipe, run_and_check


def params_of(graph: Graph) -> float:
    return make("params").cost(graph).total


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prune(tmp_path_factory.mktemp("pruned") / "run")


def without_time(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "trunks.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_plans_come_from_smaller_trunks_and_are_realised(run: Run) -> None:
    data = tiny.digits(1797).bind(run.graph)
    assert run.state == "done"
    assert pruned(run)
    for plan in pruned(run)[:3]:
        assert plan.recipe[0][0] == "prune_channels"
        graph = run_and_check(plan, data, "test") if plan.exits else plan.materialise()
        whole = sum(np.size(values) for values in run.graph.parameters().values())
        heads = sum(name.startswith("exit") for name in graph.parameters())
        assert heads or sum(np.size(values) for values in graph.parameters().values()) < whole


def test_everything_is_compared_with_the_original(run: Run) -> None:
    assert run.front.trunk.select["macs"] == make("macs").cost(run.graph).total
    assert run.front.trunk.select["accuracy"] == run.facts["trunk"]["accuracy"]["select"]
    assert run.front.trunk.materialise().digest != ""


def test_what_was_spent_is_written_down(run: Run) -> None:
    facts, lines = run.facts, without_time(run.folder.path)
    trained = [line for line in lines if line.get("kind") == "trained"]
    assert facts["spent"]["trained"]["epochs"] == sum(line["epochs"] for line in trained) <= TRUNKS["epochs"]
    assert facts["spent"]["tried"]["count"] == len([line for line in lines if line.get("kind") == "tried"])
    assert sum(count * epochs for count, epochs in facts["rungs"]) == facts["spent"]["trained"]["epochs"]
    assert len(facts["trunks"]) == TRUNKS["survivors"]
    assert facts["seconds_trunks"] > 0
    assert len(list(run.folder.journals.glob("*.jsonl"))) == TRUNKS["survivors"] + 1
    kept = {given["digest"] for trunk in facts["trunks"] for name, given in trunk["passes"] if name == "set_parameters"}
    assert set(run.context().arrays) == kept


def test_the_budget_is_kept_and_the_original_is_never_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent: list[int] = []
    teach = distill.distill_trunk

    def counted(graph: Any, dataset: Any, teacher: Any, **given: Any) -> Any:
        spent.append(given["epochs"])
        assert params_of(graph) < params_of(teacher)
        return teach(graph, dataset, teacher, **given)

    monkeypatch.setattr(distill, "distill_trunk", counted)
    found = prune(tmp_path / "run", trunks=trunks(epochs=13, survivors=2))
    assert sum(spent) == found.facts["spent"]["trained"]["epochs"] <= 13
    assert len(spent) == sum(count for count, _ in found.facts["rungs"])
    watch = tiny.Watch()
    prune(tmp_path / "bare", trunks=trunks(epochs=0), progress=watch)
    assert len(spent) == sum(count for count, _ in found.facts["rungs"])
    assert any("none trained" in line for line in watch.said)


def test_the_front_is_that_of_all_trunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By brute force: a plan is on it where no plan of any trunk is better."""
    seen: list[Plan] = []
    build = driver.build_front

    def noted(plans: Any, *rest: Any) -> Any:
        seen.extend(plans)
        return build(plans, *rest)

    monkeypatch.setattr(driver, "build_front", noted)
    found = prune(tmp_path / "run")
    points = [(1 - plan.select["judged"], plan.select["macs"]) for plan in seen]
    best = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert {(1 - plan.select["judged"], plan.select["macs"]) for plan in found.front} == best
    assert len({json.dumps(plan.recipe[:-1]) for plan in seen}) == TRUNKS["survivors"] + 1


@pytest.mark.parametrize(("label", "after"), [("trying trunks", 3), ("trying trunks", 11), ("fine-tuning", 4)])
def test_interrupted_and_resumed(run: Run, tmp_path: Path, label: str, after: int) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        prune(out, progress=Press(label, after))
    assert facts_of(out)["state"] == "interrupted"
    prune(out, resume=True)
    assert front_of(out) == front_of(run.folder.path)
    assert without_time(out) == without_time(run.folder.path)


def test_interrupted_among_the_exits(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert prune(out, progress=Press("searching", 3)).state == "interrupted"
    assert len(open_run(out).front) >= 1
    prune(out, resume=True)
    assert front_of(out) == front_of(run.folder.path)
    before = without_time(out)
    prune(out, resume=True)  # a finished one: nothing is tried, trained or settled again
    assert without_time(out) == before
    assert front_of(out) == front_of(run.folder.path)


class Press(tiny.Watch):
    """Presses Ctrl-C once after so many steps of all tasks of a label together."""

    def __init__(self, label: str, after: int) -> None:
        super().__init__()
        self.left = after
        self.wanted = label

    def reached(self, label: str, steps: int) -> None:
        if label.startswith(self.wanted):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def test_limits_are_checked_before_anything_runs_on_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 0.6 * params_of(tiny.trained())
    seen: list[float] = []
    error, mend = Proxy.error, Repair.run

    def ranked(self: Any, graph: Any) -> float:
        seen.append(params_of(graph))
        return error(self, graph)

    def mended(self: Any, graph: Any, context: Any) -> Any:
        seen.append(params_of(graph))
        return mend(self, graph, context)

    monkeypatch.setattr(Proxy, "error", ranked)
    monkeypatch.setattr(Repair, "run", mended)
    found = prune(tmp_path / "run", limits=Limits(max_params="0.6x"), trunks=trunks(epochs=2, generations=2))
    whole = params_of(tiny.trained())
    assert len(seen) > 10
    # the original alone is ranked to compare with, and the first trunk of all stays whatever the limits say
    assert sum(params > limit * 1.05 for params in seen if params < whole * 0.999) == 0
    assert all(plan.select["cost"]["params"] <= limit for plan in found.front)


def test_other_limits_after_an_interruption(tmp_path: Path) -> None:
    """What was tried then was not priced by what is limited now: it is priced anew, and nothing is trained twice."""
    out, limits = tmp_path / "run", Limits(max_terms=("model_bytes=1.02x",))
    with pytest.raises(KeyboardInterrupt):
        prune(out, progress=Press("training heads", 1))
    before = [line["of"] for line in without_time(out) if line.get("kind") == "trained"]
    assert before
    prune(out, resume=True, limits=limits)
    prune(tmp_path / "straight", limits=limits)
    assert front_of(out) == front_of(tmp_path / "straight")
    trained = [line["of"] for line in without_time(out) if line.get("kind") == "trained"]
    assert trained[: len(before)] == before
    assert len({json.dumps(of) for of in trained}) == len(trained)
    assert facts_of(out)["trunks"] == facts_of(tmp_path / "straight")["trunks"]


def test_limits_that_no_trunk_keeps(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="none of the plans tried keeps the cost limits"):
        prune(tmp_path / "run", limits=Limits(max_params="10"))
    assert facts_of(tmp_path / "run")["state"] == "failed"


def test_trunks_alone(tmp_path: Path) -> None:
    found = prune(tmp_path / "run", trunks=trunks(exits=False, epochs=4))
    assert not list(found.folder.bank.glob("*/heads/*.safetensors"))
    assert all(not plan.exits for plan in found.front)
    assert pruned(found)
    data = tiny.digits(1797).bind(found.graph)
    for plan in found.front:
        graph = plan.materialise()
        assert make("macs").cost(graph).total == plan.select["macs"]
        error = Proxy(found.graph, data, 10**6).error(graph)
        assert 0 <= error <= 1
    with pytest.raises(OptionError, match="there are to be no exits, and the recipe has no pass that changes"):
        prune(tmp_path / "other", recipe=recipe(("insert_exits", {})), trunks=trunks(exits=False, epochs=0))


def test_a_recipe_that_leaves_nothing_open(tmp_path: Path) -> None:
    """One trunk, which the original does not compete with; it takes the whole budget."""
    fixed = recipe(("prune_channels", {"ratio": 0.3, "scope": "uniform", "criterion": "activation", "ratios": {}}),
                   ("repair", {"method": "all"}), ("fold_batch_norm", {}), ("insert_exits", {}))  # fmt: skip
    found = prune(tmp_path / "run", recipe=fixed, trunks=trunks(epochs=3, survivors=1))
    assert found.facts["rungs"] == [[1, 3]]
    assert len(pruned(found)) == len(found.front)
    cuts = {json.dumps(dict(plan.recipe)["prune_channels"], sort_keys=True) for plan in found.front}
    assert len(cuts) == 1
    assert "cut" in json.loads(cuts.pop())
    with pytest.raises(OptionError, match="leaves the trunk as it is, so there is nothing to be trained"):
        prune(tmp_path / "other", recipe=None, trunks=trunks(epochs=3, survivors=1))


def test_a_plan_of_a_pruned_trunk_is_trained_on(run: Run, tmp_path: Path) -> None:
    plan = next(plan for plan in pruned(run) if plan.exits)
    from eexform.search.retrain import train

    new = train(run, pick=str(plan.index), out=tmp_path / "new", data=tiny.digits(1797).source, options=TUNING,
                generations=1, threads=1, device="cpu")  # fmt: skip
    assert new.front.trunk.select["accuracy"] == run.front.trunk.select["accuracy"]
    assert params_of(new.graph) < params_of(run.graph)


def test_label_free_trunks_are_ranked_by_disagreement(tmp_path: Path) -> None:
    found = prune(tmp_path / "run", data=tiny.digits(1797, labels="none"), trunks=trunks(epochs=2))
    lines = without_time(tmp_path / "run")
    whole = [line for line in lines if line.get("kind") == "ranked" and line["of"] == found.graph.digest]
    assert [line["error"] for line in whole] == [0.0]
    assert found.front.trunk.select["accuracy"] == 1.0


def test_a_third_partys_pass_that_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with registered(monkeypatch):
        steps = recipe(("drop_block", {}), ("fold_batch_norm", {}), ("insert_exits", {}))
        found = prune(tmp_path / "run", recipe=steps, trunks=trunks(epochs=2, survivors=2))
        assert len(found.facts["trunks"]) == 1  # there is one besides the original
        assert {dict(plan.recipe).get("drop_block", {}).get("count", 0) for plan in pruned(found)} == {1}


def test_other_settings_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot resume with other trunk options than the run's: epochs was 8, now 9"):
        prune(run.folder.path, resume=True, trunks=trunks(epochs=9))
    with pytest.raises(RunError, match="cannot resume with other recipe"):
        prune(
            run.folder.path, resume=True, recipe=recipe(*[(s.name, s.given) for s in STEPS.steps if s.name != "repair"])
        )


def test_measured_costs(tmp_path: Path) -> None:
    cost = "latency_ort:repeats=2,warmup=1"
    found = prune(
        tmp_path / "run",
        cost=cost,
        trunks=trunks(epochs=0, population=4, generations=0),
        options=options(generations=0),
    )
    assert found.front.objective == "latency_ort"
    first = front_of(tmp_path / "run")
    prune(
        tmp_path / "run",
        cost=cost,
        trunks=trunks(epochs=0, population=4, generations=0),
        options=options(generations=0),
        resume=True,
    )
    assert front_of(tmp_path / "run") == first
