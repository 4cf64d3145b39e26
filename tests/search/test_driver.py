"""The main job on the digits: what a search predicts is what the exported network does; it can be stopped anywhere."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eexform.backends import ort
from eexform.backends.lower_multi import lower_multi
from eexform.cost_models import exit_costs, make
from eexform.cost_models.latency_ort import LatencyOrt
from eexform.data import ArraySource, Dataset
from eexform.errors import DataError, EexformError, ModelError, OptionError, RunError, StorageError
from eexform.ir import policy
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.passes import Recipe
from eexform.report.apply import apply
from eexform.search import driver
from eexform.search.archive import non_dominated
from eexform.search.driver import search
from eexform.search.folder import FORMAT
from eexform.search.front import Plan
from eexform.search.limits import Limits
from eexform.search.options import SearchOptions
from eexform.search.run import Run, open_run
from eexform.training import TrainOptions
from eexform.training.checkpoint import FILE as CHECKPOINT
from tests import tiny
from tests.search.drop_block import DropBlock, registered

HEADS = ("none/avg", "conv:1x8/avg")
OPTIONS: dict[str, Any] = {"heads": HEADS, "population": 16, "generations": 3, "threads": 1}
TRAIN = TrainOptions(epochs=2, batch_size=64, learning_rate=0.02)


def options(**changed: Any) -> SearchOptions:
    return SearchOptions(**{**OPTIONS, **changed})


def start(out: Path, **given: Any) -> Run:
    """A search over the tiny network and all digits, or what is ``given`` instead."""
    graph, data = given.pop("graph", None) or tiny.trained(), given.pop("data", None) or tiny.digits(1797)
    return search(graph, data, out=out, **{"options": options(), "train": TRAIN, **given})


def recipe(*steps: tuple[str, Mapping[str, Any]]) -> Recipe:
    return Recipe.parse({"pass": [{"name": name, **given} for name, given in steps]})


def front_of(out: Path) -> Any:
    return json.loads((out / "front.json").read_text())


def facts_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return start(tmp_path_factory.mktemp("done") / "run")


@pytest.fixture
def copy(done: Run, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may damage."""
    return Path(shutil.copytree(done.folder.path, tmp_path / "copy"))


@pytest.fixture(scope="module")
def sites() -> list[str]:
    return [site.value for site in find_sites(tiny.trained()).sites]


# -- the front --------------------------------------------------------------------------------------------------------


def test_front_is_not_dominated_and_in_order(done: Run) -> None:
    points = np.array([(1 - plan.select["judged"], plan.select["macs"]) for plan in done.front])
    assert len(points) >= 5
    assert non_dominated(points).tolist() == list(range(len(points)))
    assert [plan.index for plan in done.front] == list(range(len(points)))
    assert any(plan.carry for plan in done.front)
    assert any(not plan.carry and len(plan.exits) >= 1 for plan in done.front)
    assert done.front[0].select["macs"] < 0.5 * done.front.trunk.select["macs"]
    assert done.front[-1].select["accuracy"] > done.front[0].select["accuracy"] + 0.5


def test_the_trunk_beside_it(done: Run) -> None:
    trunk = done.front.trunk
    assert trunk.exits == ()
    assert trunk.select["rates"] == [1.0]
    assert trunk.select["accuracy"] == done.facts["trunk"]["accuracy"]["select"]
    assert trunk.worst["macs"] == trunk.select["macs"]


def test_facts_are_complete(done: Run) -> None:
    facts = done.facts
    assert done.state == facts["state"] == "done"
    wanted = {
        "format", "eexform", "state", "trunk_digest", "data_digest", "train_digest", "scores", "labels", "objective",
        "cost", "recipe", "options", "train", "limits", "trunk", "memorisation", "memory_step_bytes", "uncounted",
        "evaluated", "seconds_training", "seconds_searching", "seconds",
    }  # fmt: skip
    assert set(facts) == wanted
    assert facts["evaluated"] >= OPTIONS["population"]
    assert facts["seconds"] >= facts["seconds_training"] > 0
    assert facts["memorisation"]["verdict"] in ("unseen", "undecided", "memorised")


def test_same_seed_same_front(done: Run, tmp_path: Path) -> None:
    start(tmp_path / "again")
    assert front_of(tmp_path / "again") == front_of(done.folder.path)
    start(tmp_path / "other", options=options(seed=1))
    assert front_of(tmp_path / "other") != front_of(done.folder.path)


# -- predicted = realised ---------------------------------------------------------------------------------------------


def busiest(run: Run) -> Plan:
    """The plan with most exits."""
    return max(run.front, key=lambda plan: len(plan.exits))


def chosen(run: Run, count: int = 3) -> list[Plan]:
    """Some plans that carry and some that do not, with as many exits as there are."""
    by_exits = sorted(run.front, key=lambda plan: -len(plan.exits))
    return [plan for plan in by_exits if plan.carry][:count] + [plan for plan in by_exits if not plan.carry][:count]


def check_realised(plan: Plan, graph: Graph, data: Dataset, split: str, index: np.ndarray, scores: np.ndarray) -> None:
    """Accuracy, rates and costs of a run are those that the plan states for the split."""
    stated = getattr(plan, split)
    labels = np.concatenate([_labels(batch.labels) for batch in data.batches(split, 500)])
    assert (scores.argmax(axis=1) == labels).mean() == stated["accuracy"]
    counts = np.bincount(index, minlength=len(plan.exits) + 1)
    assert (counts / len(index)).tolist() == stated["rates"]
    for free, name in ((False, "macs"), (True, "macs_heads_free")):
        paid = np.array(exit_costs(graph, make("macs"), heads_free=free))
        assert paid[index].mean() == pytest.approx(stated[name], rel=1e-12)
    assert max(exit_costs(graph, make("macs"))) == plan.worst["macs"]


def _labels(labels: np.ndarray | None) -> np.ndarray:
    assert labels is not None
    return labels


@pytest.mark.parametrize("split", ["select", "test"])
def test_scores_and_rule_realise_the_prediction(done: Run, split: str) -> None:
    data = tiny.digits(1797).bind(done.graph)
    plans = chosen(done)
    assert {bool(plan.carry) for plan in plans} == {True, False}
    for plan in plans:
        graph = plan.materialise()
        session = ort.session(lower_multi(graph))
        parts = [list(ort.run(session, batch.feeds).values()) for batch in data.batches(split, 100)]
        final, *exits = (np.concatenate(rows) for rows in zip(*parts, strict=True))
        decided = policy.decide(exits, final, graph.exits, graph.scores)
        check_realised(plan, graph, data, split, decided.exit_index, decided.scores)


def test_exported_file_realises_the_prediction(done: Run, tmp_path: Path) -> None:
    data = tiny.digits(1797).bind(done.graph)
    for plan in chosen(done, count=2):
        plan.export(tmp_path / "ee.onnx")
        session = ort.session(tmp_path / "ee.onnx")
        parts = [ort.run(session, batch.feeds) for batch in data.batches("test", 32)]
        index, scores = (np.concatenate([part[name] for part in parts]) for name in ("exit_index", done.graph.final))
        check_realised(plan, plan.materialise(), data, "test", index, scores)


def test_probabilities_realise_the_prediction(tmp_path: Path) -> None:
    graph, data = tiny.trained(probabilities=True), tiny.digits(1797)
    run = start(tmp_path / "run", graph=graph)
    assert run.facts["scores"] == "probabilities"
    for plan in chosen(run, count=2):
        plan.export(tmp_path / "ee.onnx")
        session = ort.session(tmp_path / "ee.onnx")
        parts = [ort.run(session, batch.feeds) for batch in data.bind(graph).batches("select", 32)]
        index, scores = (np.concatenate([part[name] for part in parts]) for name in ("exit_index", graph.final))
        np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
        check_realised(plan, plan.materialise(), data.bind(graph), "select", index, scores)


def test_saved_plan_replays_to_the_same_graph(done: Run, tmp_path: Path) -> None:
    for plan in chosen(done, count=1):
        for name in ("plan.toml", "plan.json"):
            done.save_plan(plan, tmp_path / name)
            assert apply(tiny.trained(), tmp_path / name).graph.digest == plan.materialise().digest


def test_run_opened_again_is_the_same(done: Run) -> None:
    again = open_run(done.folder.path)
    assert again.front.to_json() == done.front.to_json()
    assert busiest(again).materialise().digest == busiest(done).materialise().digest
    assert again.graph.digest == tiny.trained().digest
    assert again.dataset(tiny.digits(1797).source).digest == tiny.digits(1797).digest


# -- stopped and gone on with -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 2, 4])
def test_interrupted_search_is_readable_and_resumes_to_the_same_front(done: Run, tmp_path: Path, after: int) -> None:
    out = tmp_path / "run"
    run = start(out, progress=tiny.Watch("searching", after=after))
    assert run.state == facts_of(out)["state"] == "interrupted"
    assert len(run.front) >= 1
    busiest(run).materialise()
    assert len((out / "journal.jsonl").read_text().splitlines()) == 1 + after
    assert set(facts_of(out)) == set(done.facts)
    watch = tiny.Watch()
    run = start(out, resume=True, progress=watch)
    assert run.state == "done"
    assert front_of(out) == front_of(done.folder.path)
    assert set(facts_of(out)) == set(done.facts)
    assert "training heads" not in watch.steps


def test_interrupted_inside_a_generation(done: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    evaluate = driver.Evaluation.evaluate

    def third(self: Any, individuals: Any) -> None:
        calls.append(len(individuals))
        if len(calls) == 3:
            raise KeyboardInterrupt
        evaluate(self, individuals)

    monkeypatch.setattr(driver.Evaluation, "evaluate", third)
    run = start(tmp_path / "run")
    assert run.state == "interrupted"
    assert len(run.front) >= 1
    assert start(tmp_path / "run", resume=True).state == "done"
    assert front_of(tmp_path / "run") == front_of(done.folder.path)


def test_interrupted_before_the_first_generation(done: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(driver.Evaluation, "evaluate", never)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert run.state == "interrupted"
    with pytest.raises(RunError, match=r"there is no front yet \(state: interrupted\); go on with"):
        _ = run.front
    start(tmp_path / "run", resume=True)
    assert front_of(tmp_path / "run") == front_of(done.folder.path)


@pytest.mark.parametrize(("label", "after"), [("scoring the trunk", 300), ("training heads", 14), ("scoring heads", 1)])
def test_interrupted_training_resumes(done: Run, tmp_path: Path, label: str, after: int) -> None:
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        start(out, progress=tiny.Watch(label, after=after))
    run = open_run(out)
    assert run.state == "interrupted"
    assert run.facts["seconds_training"] > 0
    with pytest.raises(RunError, match="there is no front yet"):
        _ = run.front
    assert bool(list(out.rglob(CHECKPOINT))) == (label != "scoring the trunk")
    run = start(out, resume=True)
    assert (run.state, front_of(out)) == ("done", front_of(done.folder.path))
    assert not list(out.rglob(CHECKPOINT))


KILLED = textwrap.dedent("""
    import os, signal, sys
    from tests import tiny
    from tests.search import test_driver as here

    class Kill(tiny.Watch):
        def reached(self, label, steps):
            if (label, steps) == (sys.argv[2], int(sys.argv[3])):
                os.kill(os.getpid(), signal.SIGKILL)

    here.start(here.Path(sys.argv[1]), progress=Kill())
""")


def test_killed_hard_while_training(done: Run, tmp_path: Path) -> None:
    """No handler runs: the lock, the checkpoint and the half-written files are as the kill left them."""
    out = tmp_path / "run"
    steps = 18  # twelve to an epoch
    command = [sys.executable, "-c", KILLED, str(out), "training heads", str(steps)]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert facts_of(out)["state"] == "training"
    assert open_run(out).state == "training"
    watch = tiny.Watch()
    run = start(out, resume=True, progress=watch)
    assert "going on after epoch 1 of an interrupted training" in watch.said
    assert (run.state, front_of(out)) == ("done", front_of(done.folder.path))


def test_times_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    start(out, progress=tiny.Watch("searching", after=2))
    before = facts_of(out)
    (out / "run.json").write_text(
        json.dumps({**before, "seconds": 1000.0, "seconds_training": 600.0, "seconds_searching": 300.0})
    )
    start(out, resume=True)
    after = facts_of(out)
    assert 1000 < after["seconds"] < 1100
    assert 600 <= after["seconds_training"] < 700
    assert 300 <= after["seconds_searching"] < 400
    for key in ("trunk", "memory_step_bytes", "memorisation", "options"):
        assert after[key] == before[key]


def test_resuming_what_is_done_changes_nothing(copy: Path) -> None:
    front, journal = (copy / "front.json").read_bytes(), (copy / "journal.jsonl").read_bytes()
    assert start(copy, resume=True).state == "done"
    assert ((copy / "front.json").read_bytes(), (copy / "journal.jsonl").read_bytes()) == (front, journal)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"options": options(population=20)}, "the options is not that of the run: population was 16, now 20"),
        ({"options": options(seed=3)}, "options is not that of the run: seed was 0, now 3"),
        ({"train": TrainOptions(epochs=3)}, "the train is not that of the run: epochs was 2, now 3"),
        ({"cost": "params"}, "the objective is not that of the run: was 'macs', now 'params'"),
        ({"limits": Limits(max_cost="0.9x")}, "the limits is not that of the run: max_cost was None, now '0.9x'"),
        ({"data": "other"}, "the data digest is not that of the run"),
        ({"graph": "other"}, "the trunk digest is not that of the run"),
        ({"recipe": recipe(("insert_exits", {}))}, "the recipe is not that of the run"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_resume_with_other_settings_says_which(copy: Path, changed: dict[str, Any], message: str) -> None:
    if changed == {"data": "other"}:
        changed = {"data": tiny.digits(1797, seed=4)}
    if changed == {"graph": "other"}:
        changed = {"graph": tiny.network(seed=4)}
    before = (copy / "run.json").read_bytes()
    with pytest.raises(RunError, match=message.replace("(", r"\(")) as caught:
        start(copy, resume=True, **changed)
    assert "use the same options or another --out" in str(caught.value)
    assert (copy / "run.json").read_bytes() == before


# -- folders ----------------------------------------------------------------------------------------------------------


def test_folder_that_holds_a_run(copy: Path) -> None:
    with pytest.raises(RunError, match=r"holds a run already; go on with --resume, or choose another --out"):
        start(copy)


def test_folder_that_holds_other_things(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RunError, match="is not empty and holds no run"):
        start(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run \(no run\.json\)"):
        start(tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_out_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises((RunError, StorageError), match="run"):
        start(tmp_path / "run")
    assert (tmp_path / "run").read_text() == "a file"


HOLD = textwrap.dedent("""
    import sys, time
    from eexform.search.folder import RunFolder

    with RunFolder(sys.argv[1]).locked():
        print("held", flush=True)
        time.sleep(60)
""")


@pytest.mark.parametrize("resume", [False, True])
def test_folder_in_use_by_another_process(copy: Path, tmp_path: Path, resume: bool) -> None:
    out = copy if resume else tmp_path / "new"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = sorted(path.name for path in out.iterdir())
        with pytest.raises(RunError, match="another process is working in this run; wait for it or use another --out"):
            start(out, resume=resume)
        assert sorted(path.name for path in out.iterdir()) == before
    finally:
        holder.kill()
        holder.wait()
    assert start(out, resume=resume).state == "done"  # the system gave the lock back


def test_run_of_a_newer_version(copy: Path) -> None:
    (copy / "run.json").write_text(json.dumps({**facts_of(copy), "format": FORMAT + 1, "eexform": "9.1"}))
    for use in (lambda: open_run(copy), lambda: start(copy, resume=True)):
        with pytest.raises(RunError, match=rf"written by eexform 9\.1 \(format {FORMAT + 1}\).*upgrade eexform"):
            use()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read as JSON"),
        (lambda text: "", "cannot be read as JSON"),
        (lambda text: "[1, 2]", "is not a description of a run"),
        (lambda text: json.dumps({"format": FORMAT}), "lacks state, trunk_digest"),
        (lambda text: json.dumps({**json.loads(text), "format": "new"}), "is not a description of a run"),
    ],
)
def test_damaged_run_json(copy: Path, damage: Any, message: str) -> None:
    (copy / "run.json").write_text(damage((copy / "run.json").read_text()))
    for use in (lambda: open_run(copy), lambda: start(copy, resume=True)):
        with pytest.raises(RunError, match=rf"run\.json: {message}"):
            use()


def _without(*keys: str) -> Any:
    def damaged(text: str) -> str:
        plain = json.loads(text)
        for key in keys:
            del (plain["plans"][0] if key not in plain else plain)[key]
        return json.dumps(plain)

    return damaged


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-30],
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "plans": 5}),
        lambda text: text.replace('"threshold": 0', '"threshold": "perhaps'),
        _without("trunk"),
        _without("objective"),
        _without("select"),
        _without("recipe"),
    ],
)
def test_damaged_front(copy: Path, damage: Any) -> None:
    (copy / "front.json").write_text(damage((copy / "front.json").read_text()))
    with pytest.raises(RunError, match=r"damaged|cannot be read"):
        _ = open_run(copy).front
    start(copy, resume=True)  # everything it was made from is still there
    assert len(open_run(copy).front) >= 5


def test_other_damage(copy: Path, done: Run) -> None:
    run = open_run(copy)
    plan = busiest(run)
    for path in (copy / "bank").glob("*/heads/*.safetensors"):
        path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(EexformError, match=r"safetensors: cannot be read .*delete it to train the head again"):
        plan.materialise()
    tiny_other = start(copy.parent / "other", graph=tiny.network(seed=9), options=options(generations=0))
    shutil.copy(tiny_other.folder.trunk, copy / "trunk.onnx")
    with pytest.raises(RunError, match=r"trunk\.onnx: is not the model that was searched"):
        _ = open_run(copy).graph
    (copy / "trunk.onnx").write_bytes(b"gone")
    with pytest.raises(ModelError):
        _ = open_run(copy).graph


def test_torn_journal_loses_one_generation_only(copy: Path, done: Run) -> None:
    journal = copy / "journal.jsonl"
    whole = journal.read_text()
    journal.write_text(whole[:-40])
    start(copy, resume=True)
    assert front_of(copy) == front_of(done.folder.path)


# -- limits -----------------------------------------------------------------------------------------------------------


def test_limits_hold_for_every_plan(done: Run, tmp_path: Path) -> None:
    limits = Limits(max_cost="0.8x", max_worst="1.5x", max_params="2x", min_accuracy="-30")
    front = start(tmp_path / "run", limits=limits).front
    trunk = front.trunk
    assert len(front)
    for plan in front:
        assert plan.select["macs"] <= 0.8 * trunk.select["macs"]
        assert plan.worst["macs"] <= 1.5 * trunk.select["macs"]
        assert plan.select["cost"]["params"] <= 2 * trunk.select["cost"]["params"]
        assert plan.select["accuracy"] >= trunk.select["accuracy"] - 0.3
    assert any(plan.select["macs"] > 0.8 * trunk.select["macs"] for plan in done.front)


def test_limits_in_numbers(done: Run, tmp_path: Path) -> None:
    most = done.front.trunk.select["macs"] * 0.7
    front = start(tmp_path / "run", limits=Limits(max_cost=f"{most}", min_accuracy="0.2")).front
    assert all(plan.select["macs"] <= most and plan.select["accuracy"] >= 0.2 for plan in front)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_cost": "0.01x"}, r"none of the plans tried keeps the cost limits; the nearest exceeds them by \d+"),
        ({"max_params": "10"}, r"none of the plans tried keeps the cost limits; the nearest exceeds them by \d+"),
        ({"min_accuracy": "1.0"}, r"nearest one has accuracy 0\.\d+ on select \(at least 1\.0000\): loosen them"),
        ({"min_accuracy": "+1", "max_cost": "0.5x"}, r"nearest one has .*mean macs \d.* \(at most \d|accuracy 0\."),
    ],
)
def test_impossible_limits_name_the_nearest_and_keep_the_heads(
    tmp_path: Path, limits: dict[str, str], message: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises(OptionError, match=message) as caught:
        start(out, limits=Limits(**limits))
    facts = facts_of(out)
    assert (facts["state"], facts["error"]) == ("failed", str(caught.value))
    with pytest.raises(RunError, match=r"there is no front yet \(state: failed\)"):
        _ = open_run(out).front
    watch = tiny.Watch()
    run = start(out, resume=True, progress=watch, limits=Limits(max_cost="0.95x"))
    assert run.state == "done"
    assert "error" not in run.facts
    assert run.facts["limits"]["max_cost"] == "0.95x"
    assert "training heads" not in watch.steps
    assert any("the limits have changed" in line for line in watch.said)
    start(tmp_path / "straight", limits=Limits(max_cost="0.95x"))
    assert front_of(out) == front_of(tmp_path / "straight")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_cost": "cheap"}, "max-cost: 'cheap' is not a number"),
        ({"max_cost": "-1x"}, "max_cost: -1.0 must be a positive number"),
        ({"max_worst": "nan"}, "max-worst: 'nan' is not a number"),
        ({"min_accuracy": "91"}, "min-accuracy: '91' is neither an accuracy in 0..1 nor points"),
    ],
)
def test_limits_that_are_none_leave_nothing_behind(tmp_path: Path, limits: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        start(tmp_path / "run", limits=Limits(**limits))
    assert not (tmp_path / "run").exists()


# -- candidates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"sites": ("block9.conv_relu_out",)}, OptionError, "no value 'block9.conv_relu_out': did you mean"),
        ({"sites": ("scores",)}, OptionError, "'scores' is no site: "),
        ({"heads": ("dense/avg",)}, OptionError, "head layer 'dense' does not exist"),
        ({"heads": ("none/cls",)}, OptionError, "no candidate head fits any candidate site: .*no pooling 'cls'"),
    ],
)
def test_candidates_that_are_none(tmp_path: Path, changed: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        start(tmp_path / "run", options=options(**changed))
    assert not (tmp_path / "run").exists()


def test_rejected_site_comes_with_its_reason(tmp_path: Path) -> None:
    rejected = find_sites(tiny.trained()).rejected[0]
    with pytest.raises(OptionError) as caught:
        start(tmp_path / "run", options=options(sites=(rejected.value,)))
    assert f"{rejected.value!r} is no site: {rejected.reason}" in str(caught.value)


def test_named_sites_and_heads_are_the_only_ones(tmp_path: Path, sites: list[str]) -> None:
    watch = tiny.Watch()
    heads = ("none/avg", "none/cls", "mlp:1x8/avg")
    run = start(tmp_path / "run", options=options(sites=(sites[1],), heads=heads), progress=watch)
    found = {(exit_.site, exit_.head) for plan in run.front for exit_ in plan.exits}
    assert found <= {(sites[1], "none/avg"), (sites[1], "mlp:1x8/avg")}
    assert found
    assert any("head none/cls is not tried at" in line for line in watch.said)


def test_default_portfolio(tmp_path: Path) -> None:
    run = start(tmp_path / "run", options=options(heads=(), max_sites=2, max_head_share=0.3, generations=1))
    assert len(run.front) >= 2


def test_data_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    good = tiny.digits(300)
    wide = {"all": ({None: np.zeros((300, 1, 9, 9), np.float32)}, good.source.labels("all"))}
    bad = Dataset(ArraySource("wide", wide), good.preprocess, good.splits)
    with pytest.raises(DataError):
        start(tmp_path / "run", data=bad)
    assert not (tmp_path / "run").exists()


# -- recipes ----------------------------------------------------------------------------------------------------------


def test_recipe_with_fixed_sites_and_thresholds(tmp_path: Path, sites: list[str]) -> None:
    """Sites that the spread over the cost would not have picked are trained all the same."""
    given = {"sites": [sites[0], sites[2]], "thresholds": {sites[0]: 0.7, sites[2]: "always"}, "measure": "margin"}
    steps = recipe(("fold_batch_norm", {}), ("insert_exits", given))
    run = start(tmp_path / "run", recipe=steps, options=options(max_sites=1))
    assert len(run.front) >= 1
    data = tiny.digits(1797).bind(run.graph)
    for plan in run.front:
        assert [(exit_.site, exit_.measure, exit_.threshold) for exit_ in plan.exits] == [
            (sites[0], "margin", float(np.float32(0.7))),
            (sites[2], "margin", -math.inf),
        ]
        graph = plan.materialise()
        (batch,) = data.batches("select", 1000)
        final, *exits = ort.run(ort.session(lower_multi(graph)), batch.feeds).values()
        decided = policy.decide(exits, final, graph.exits, graph.scores)
        check_realised(plan, graph, data, "select", decided.exit_index, decided.scores)
        run.save_plan(plan, tmp_path / "plan.toml")
        assert apply(tiny.trained(), tmp_path / "plan.toml").graph.digest == graph.digest


def test_recipe_with_fixed_heads_and_carry(tmp_path: Path, sites: list[str]) -> None:
    heads = {sites[1]: "none/avg", sites[2]: "mlp:1x8/avg"}
    given = {"heads": heads, "carry": 0.5, "final_temperature": 3.0}
    run = start(tmp_path / "run", recipe=recipe(("insert_exits", given)))
    found = {(exit_.site, exit_.head) for plan in run.front for exit_ in plan.exits}
    assert found <= set(heads.items())
    assert {plan.carry for plan in run.front if plan.exits} == {0.5}
    data = tiny.digits(1797).bind(run.graph)
    plan = busiest(run)
    graph = plan.materialise()
    (batch,) = data.batches("test", 1000)
    final, *exits = ort.run(ort.session(lower_multi(graph)), batch.feeds).values()
    decided = policy.decide(exits, final, graph.exits, graph.scores)
    check_realised(plan, graph, data, "test", decided.exit_index, decided.scores)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([("fold_batch_norm", {})], "needs the pass 'insert_exits' exactly once, found 0 times"),
        ([("insert_exits", {}), ("insert_exits", {})], "exactly once, found 2 times"),
        ([("insert_exits", {"untrained": True})], "a search is about trained heads"),
        ([("insert_exits", {}), ("lower", {})], "leave 'lower' out"),
        ([("insert_exits", {"sites": []})], "gives insert_exits no sites"),
        ([("insert_exits", {"sites": ["scores"]})], "'scores' is no site"),
        ([("insert_exits", {"sites": ["block0.conv_relu_out"], "heads": {}})], "heads, but none for the site"),
    ],
)
def test_recipes_that_cannot_be_searched(tmp_path: Path, steps: list[Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        start(tmp_path / "run", recipe=recipe(*steps))
    assert not (tmp_path / "run").exists()


def test_passes_behind_insert_exits_are_part_of_the_prediction(done: Run, tmp_path: Path) -> None:
    """What drop_idle_exits drops is dropped from the plan: scored without it, and replayed without rates."""
    steps = (("fold_batch_norm", {}), ("insert_exits", {"carry": 0.0}), ("drop_idle_exits", {}))
    run = start(tmp_path / "run", recipe=recipe(*steps), options=options(generations=0))
    data = tiny.digits(1797).bind(run.graph)
    (batch,) = data.batches("select", 1000)
    for plan in run.front:
        graph = plan.materialise()
        assert [exit_.site for exit_ in graph.exits] == [exit_.site for exit_ in plan.exits]
        if plan.exits:
            assert all(rate > 0 for rate in plan.select["rates"][:-1])
            final, *exits = ort.run(ort.session(lower_multi(graph)), batch.feeds).values()
            decided = policy.decide(exits, final, graph.exits, graph.scores)
            check_realised(plan, graph, data, "select", decided.exit_index, decided.scores)
            run.save_plan(plan, tmp_path / "plan.toml")
            assert apply(tiny.trained(), tmp_path / "plan.toml").graph.digest == graph.digest


def test_settling_drops_an_idle_exit(done: Run, sites: list[str], tmp_path: Path) -> None:
    """An exit that nobody takes, planted."""
    given = {
        "sites": [sites[0], sites[2]],
        "heads": dict.fromkeys([sites[0], sites[2]], "none/avg"),
        "thresholds": {sites[0]: "never", sites[2]: 0.0},
        "measure": "max_prob",
        "carry": 0.0,
    }
    steps = (("fold_batch_norm", {}), ("insert_exits", given), ("drop_idle_exits", {}))
    run = start(tmp_path / "run", recipe=recipe(*steps))
    (plan,) = run.front
    assert [exit_.site for exit_ in plan.exits] == sites[2:]
    assert [name for name, _ in plan.recipe] == ["fold_batch_norm", "insert_exits"]
    assert len(plan.select["rates"]) == 2


# -- variants of the trunk --------------------------------------------------------------------------------------------


def test_a_third_partys_pass_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with registered(monkeypatch):
        steps = (("drop_block", {}), ("fold_batch_norm", {}), ("insert_exits", {}))
        # only the shorter trunk has a dearest path this cheap
        run = start(tmp_path / "run", recipe=recipe(*steps), limits=Limits(max_worst="0.9x"))
        with_heads = {path.parent for path in run.folder.bank.glob("*/heads/*.safetensors")}
        assert len(with_heads) == 2
        assert len(run.front) >= 2
        data = tiny.digits(1797).bind(run.graph)
        (batch,) = data.batches("test", 1000)
        for plan in run.front:
            assert dict(plan.recipe)["drop_block"] == {"count": 1}
            graph = plan.materialise()
            assert sum(node.op == "Conv" and not node.name.startswith("exit") for node in graph.nodes) == 3
            if plan.exits:
                final, *exits = ort.run(ort.session(lower_multi(graph)), batch.feeds).values()
                decided = policy.decide(exits, final, graph.exits, graph.scores)
                check_realised(plan, graph, data, "test", decided.exit_index, decided.scores)
        plan = busiest(run)
        run.save_plan(plan, tmp_path / "plan.toml")
        assert apply(run.graph, tmp_path / "plan.toml").graph.digest == plan.materialise().digest
        assert run.front.trunk.select["macs"] > max(plan.worst["macs"] for plan in run.front)


def test_variants_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with registered(monkeypatch):
        steps = recipe(("drop_block", {}), ("insert_exits", {}))
        straight = start(tmp_path / "straight", recipe=steps)
        start(tmp_path / "run", recipe=steps, progress=tiny.Watch("searching", after=2))
        start(tmp_path / "run", recipe=steps, resume=True)
        assert front_of(tmp_path / "run") == front_of(straight.folder.path)
        assert {dict(plan.recipe)["drop_block"]["count"] for plan in straight.front} <= {0, 1}


def test_a_site_that_a_variant_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sites: list[str]) -> None:
    """Without the last block its site is gone; plans there are scored and built without that exit."""
    with registered(monkeypatch):
        named = options(sites=tuple(sites), heads=("none/avg",), generations=2)
        steps = recipe(("drop_block", {}), ("insert_exits", {"carry": 0.0}))
        run = start(tmp_path / "run", recipe=steps, options=named, limits=Limits(max_worst="0.95x"))
        assert len(run.front) >= 2
        for plan in run.front:
            if dict(plan.recipe)["drop_block"]["count"]:
                assert sites[-1] not in {exit_.site for exit_ in plan.exits}
            assert tuple(exit_.site for exit_ in plan.materialise().exits) == tuple(e.site for e in plan.exits)


def test_tunables_without_a_default_and_passes_that_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is its recipe: whatever the search's seed, its trunk is made again from the recipe alone."""
    with registered(monkeypatch):
        run = start(tmp_path / "run", recipe=recipe(("undecided", {}), ("insert_exits", {})), options=options(seed=5))
        plan = busiest(run)
        assert dict(plan.recipe)["undecided"] == {"count": 1}
        run.save_plan(plan, tmp_path / "plan.toml")
        assert apply(run.graph, tmp_path / "plan.toml").graph.digest == plan.materialise().digest
        assert run.front.trunk.materialise().digest == run.graph.digest


# -- other objectives and modes ---------------------------------------------------------------------------------------


def test_measured_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, cost = tmp_path / "run", "latency_ort:repeats=3,warmup=1"
    run = start(out, cost=cost, progress=tiny.Watch("searching", after=2))
    assert run.front.objective == run.facts["objective"] == "latency_ort"
    assert (run.facts["cost"]["repeats"], run.facts["cost"]["threads"]) == (3, 1)
    for plan in run.front:
        assert 0 < plan.select["cost"]["latency_ort"] < 100
        assert plan.select["macs"] > 0
    with pytest.raises(RunError, match="the cost is not that of the run: repeats was 3, now 4"):
        start(out, cost="latency_ort:repeats=4,warmup=1", resume=True)
    trunk = run.front.trunk.select["cost"]["latency_ort"]

    def again(*_: Any) -> None:
        raise AssertionError("measured again: the figures of both halves of the search would not be comparable")

    monkeypatch.setattr(LatencyOrt, "_timed", again)
    run = start(out, cost=cost, resume=True)
    assert run.state == "done"
    assert run.front.trunk.select["cost"]["latency_ort"] == trunk
    (stored,) = (out / "latencies").iterdir()
    stored.write_text('{"trunk": 1}')
    with pytest.raises(RunError, match=r"\.json: damaged measurements .* delete the file to measure anew"):
        start(out, cost=cost, resume=True)


def test_label_free(tmp_path: Path) -> None:
    out, data = tmp_path / "run", tiny.digits(1797, labels="none")
    run = start(out, data=data)
    assert run.facts["labels"] == "none"
    assert run.front.trunk.select["accuracy"] == run.front.trunk.test["accuracy"] == 1.0
    assert run.facts["memorisation"]["message"].startswith("label-free")
    plan = busiest(run)
    graph, bound = plan.materialise(), data.bind(run.graph)
    (batch,) = bound.batches("test", 1000)
    assert batch.labels is None
    final, *exits = ort.run(ort.session(lower_multi(graph)), batch.feeds).values()
    answers = policy.decide(exits, final, graph.exits, graph.scores).scores.argmax(axis=1)
    trunk = ort.run(ort.session(run.graph), batch.feeds)[run.graph.final].argmax(axis=1)
    assert (answers == trunk).mean() == plan.test["accuracy"]


def test_label_free_means_the_answers_of_the_model_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that spoils the trunk must not be judged by the spoilt trunk's own answers."""
    with registered(monkeypatch):
        data = tiny.digits(1797, labels="none")
        steps = recipe(("drop_block", {"count": 1}), ("insert_exits", {}))
        run = start(tmp_path / "run", data=data, recipe=steps)
        (batch,) = data.bind(run.graph).batches("select", 1000)
        right = ort.run(ort.session(run.graph), batch.feeds)[run.graph.final].argmax(axis=1)
        assert run.front.trunk.select["accuracy"] == 1.0
        spoilt = DropBlock(1)(run.graph).graph
        answers = ort.run(ort.session(spoilt), batch.feeds)[spoilt.final].argmax(axis=1)
        agreement = (answers == right).mean()
        assert agreement < 0.9
        alone = [plan.select["accuracy"] for plan in run.front if not plan.exits]
        assert all(accuracy == agreement for accuracy in alone)
        plan = busiest(run)
        graph = plan.materialise()  # its heads are in the bank that belongs to these answers
        final, *exits = ort.run(ort.session(lower_multi(graph)), batch.feeds).values()
        decided = policy.decide(exits, final, graph.exits, graph.scores)
        assert (decided.scores.argmax(axis=1) == right).mean() == plan.select["accuracy"]


def test_plans_are_compared_with_the_model_that_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with what a pass has made of it before the first exit."""
    with registered(monkeypatch):
        steps = recipe(("drop_block", {"count": 1}), ("insert_exits", {}))
        run = start(tmp_path / "run", recipe=steps, limits=Limits(max_cost="0.8x"))
        assert run.front.trunk.select["macs"] == make("macs").cost(run.graph).total
        (batch,) = tiny.digits(1797).bind(run.graph).batches("select", 1000)
        right = ort.run(ort.session(run.graph), batch.feeds)[run.graph.final].argmax(axis=1) == batch.labels
        assert run.front.trunk.select["accuracy"] == run.facts["trunk"]["accuracy"]["select"] == right.mean()
        assert run.front.trunk.materialise().digest == run.graph.digest
        assert all(plan.select["macs"] <= 0.8 * run.front.trunk.select["macs"] for plan in run.front)


# -- every state is written whole -------------------------------------------------------------------------------------


def test_every_state_is_written_with_all_that_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, Any]] = []
    write = driver.RunFolder.write

    def noted(self: Any, facts: Mapping[str, Any]) -> None:
        written.append(dict(facts))
        write(self, facts)

    monkeypatch.setattr(driver.RunFolder, "write", noted)
    start(tmp_path / "run")
    assert [facts["state"] for facts in written] == ["training", "searching", "done"]
    for earlier, later in pairwise(written):
        assert set(earlier) < set(later)
        assert all(later[key] == value for key, value in earlier.items() if key not in ("state", "seconds"))


def test_errors_in_mid_run_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise StorageError("journal.jsonl: cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(driver.Journal, "append", full)
        with pytest.raises(EexformError, match="No space left"):
            start(tmp_path / "run")
    assert facts_of(tmp_path / "run")["state"] == "failed"
    assert "No space left" in facts_of(tmp_path / "run")["error"]
    assert start(tmp_path / "run", resume=True).state == "done"


def test_no_file_is_left_half_written(done: Run) -> None:
    assert not [path for path in done.folder.path.rglob("*") if path.name.endswith(".part")]
    names = {entry.name for entry in os.scandir(done.folder.path)}
    kept = {"run.json", "trunk.onnx", "data.json", "splits.npz", "bank", "journal.jsonl", "front.json"}
    assert names == {".lock", *kept}
