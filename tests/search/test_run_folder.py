"""Folders in use, of other versions, holding other things, damaged: each is said in one sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from eexform.errors import EexformError, ModelError, RunError
from eexform.search.folder import FORMAT
from eexform.search.run import Run, open_run
from tests import tiny
from tests.search.running import busiest, facts_of, front_of, options, start


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
    with pytest.raises(RunError, match="run: is a file, and a run is a folder; choose another --out"):
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
