"""A search can be stopped anywhere, and goes on to the front it would have found."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from eexform.errors import RunError
from eexform.search import exits
from eexform.search.limits import Limits
from eexform.search.run import Run, open_run
from eexform.training import TrainOptions
from eexform.training.checkpoint import FILE as CHECKPOINT
from tests import tiny
from tests.search.running import busiest, facts_of, front_of, options, recipe, start


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
    evaluate = exits.Evaluation.evaluate

    def third(self: Any, individuals: Any) -> None:
        calls.append(len(individuals))
        if len(calls) == 3:
            raise KeyboardInterrupt
        evaluate(self, individuals)

    monkeypatch.setattr(exits.Evaluation, "evaluate", third)
    run = start(tmp_path / "run")
    assert run.state == "interrupted"
    assert len(run.front) >= 1
    assert start(tmp_path / "run", resume=True).state == "done"
    assert front_of(tmp_path / "run") == front_of(done.folder.path)


def test_interrupted_before_the_first_generation(done: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exits.Evaluation, "evaluate", never)
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
    from tests.search.running import Path, start

    class Kill(tiny.Watch):
        def reached(self, label, steps):
            if (label, steps) == (sys.argv[2], int(sys.argv[3])):
                os.kill(os.getpid(), signal.SIGKILL)

    start(Path(sys.argv[1]), progress=Kill())
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
        (
            {"options": options(population=20)},
            "cannot resume with other options than the run's: population was 16, now 20",
        ),
        ({"options": options(seed=3)}, "cannot resume with other options than the run's: seed was 0, now 3"),
        ({"train": TrainOptions(epochs=3)}, "cannot resume with other train than the run's: epochs was 2, now 3"),
        ({"cost": "params"}, "cannot resume with other objective than the run's: was 'macs', now 'params'"),
        (
            {"limits": Limits(max_cost="0.9x")},
            "cannot resume with other limits than the run's: max_cost was None, now '0.9x'",
        ),
        ({"data": "other"}, "cannot resume with other data digest than the run's"),
        ({"graph": "other"}, "cannot resume with other trunk digest than the run's"),
        ({"recipe": recipe(("insert_exits", {}))}, "cannot resume with other recipe than the run's"),
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


def test_another_number_of_threads_is_the_same_search(copy: Path) -> None:
    front = (copy / "front.json").read_bytes()
    start(copy, resume=True, options=options(threads=2))
    assert (copy / "front.json").read_bytes() == front
