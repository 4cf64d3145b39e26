"""A fine-tuning can be stopped anywhere, killed even, and goes on to the run it would have made."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eexform.errors import RunError, StorageError, TrainingError
from eexform.frontends.onnx import load
from eexform.search.limits import Limits
from eexform.search.run import Run, open_run
from tests import tiny
from tests.search.retraining import TUNING, content, tune
from tests.search.running import front_of, start


@pytest.mark.parametrize(
    ("label", "after", "raises"),
    [
        ("fine-tuning", 3, True),
        ("fine-tuning", 14, True),
        ("scoring the trunk", 300, True),
        ("scoring heads", 1, True),
        ("searching", 2, False),
    ],
)
def test_interrupted_anywhere_resumes_to_the_same(
    done: Run, tuned: Run, tmp_path: Path, label: str, after: int, raises: bool
) -> None:
    out = tmp_path / "run"
    if raises:
        with pytest.raises(KeyboardInterrupt):
            tune(done, out, progress=tiny.Watch(label, after=after))
        assert open_run(out).state == "interrupted"
        with pytest.raises(RunError, match=r"there is no front yet .*`eexform train --resume`"):
            _ = open_run(out).front
    else:
        assert tune(done, out, progress=tiny.Watch(label, after=after)).state == "interrupted"
    watch = tiny.Watch()
    new = tune(done, out, resume=True, progress=watch)
    assert ("fine-tuning" in watch.steps) == (label == "fine-tuning")
    assert new.state == "done"
    assert new.graph.digest == tuned.graph.digest
    assert front_of(out) == front_of(tuned.folder.path)


KILLED = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from tests import tiny
    from tests.search.retraining import tune

    class Killing(tiny.Watch):
        def reached(self, label, steps):
            if label == "fine-tuning" and steps >= 14:
                os.kill(os.getpid(), signal.SIGKILL)

    tune(Path(sys.argv[1]), Path(sys.argv[2]), progress=Killing())
""")


def test_killed_while_training(done: Run, tuned: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(done.folder.path), str(out)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert open_run(out).state == "finetuning"
    with pytest.raises(RunError, match="the fine-tuning is not finished"):
        _ = open_run(out).graph
    watch = tiny.Watch()
    new = tune(done, out, resume=True, progress=watch)
    assert any("going on after epoch 1" in line for line in watch.said)
    assert new.graph.digest == tuned.graph.digest
    assert front_of(out) == front_of(tuned.folder.path)


def test_resuming_what_is_finished_says_so(done: Run, tuned: Run, tmp_path: Path) -> None:
    out = Path(shutil.copytree(tuned.folder.path, tmp_path / "copy"))
    before, watch = content(out), tiny.Watch()
    again = tune(done, out, resume=True, progress=watch)
    assert any("is finished, there is nothing to go on with" in line for line in watch.said)
    assert not watch.steps
    assert again.state == "done"
    assert {k: v for k, v in content(out).items() if k != ".lock"} == {k: v for k, v in before.items() if k != ".lock"}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"options": replace(TUNING, epochs=3)}, "options.*epochs"),
        (
            {"options": replace(TUNING, strategy="mixed")},
            "settings of the training than the run's: strategy was 'joint', now 'mixed'",
        ),
        ({"pick": "0"}, "plan was [0-9]+, now 0"),
        ({"generations": 7}, "options than the run's: generations was 2, now 7"),
        ({"limits": Limits(max_cost="0.9x")}, "limits.*max_cost"),
    ],
)
def test_resuming_with_other_options(done: Run, tuned: Run, tmp_path: Path, changed: dict[str, Any], says: str) -> None:
    out = Path(shutil.copytree(tuned.folder.path, tmp_path / "copy"))
    with pytest.raises(RunError, match=rf"cannot resume with other .*{says}"):
        tune(done, out, resume=True, **changed)


def test_each_command_resumes_its_own(done: Run, tuned: Run, copy: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(tuned.folder.path, tmp_path / "tuned"))
    with pytest.raises(RunError, match="came out of `eexform train`"):
        start(out, graph=load(out / "trunk.onnx"), resume=True)
    with pytest.raises(RunError, match="is one of `eexform search`"):
        tune(done, copy, resume=True)


def test_a_training_that_diverged_is_not_told_to_go_on(done: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    wild = replace(TUNING, learning_rate=1e6, trunk_learning_rate=1e6, clip=0.0)
    with pytest.raises(TrainingError, match="not finite; lower the learning rates"):
        tune(done, out, options=wild)
    run = open_run(out)
    assert (run.state, run.facts["diverged"]) == ("failed", True)
    for look in ("front", "graph"):
        with pytest.raises(
            RunError, match="diverged, and --resume with the same options would come to the same: begin"
        ):
            getattr(run, look)
    with pytest.raises(RunError, match="holds a run whose training diverged; delete it, or choose another --out"):
        tune(done, out)
    watch = tiny.Watch()
    with pytest.raises(TrainingError, match="not finite"):  # who asks for it all the same gets the same
        tune(done, out, options=wild, resume=True, progress=watch)
    assert any(line.startswith("going on with a run that failed: epoch 1, step ") for line in watch.said)


def test_what_failed_for_another_reason_can_go_on(done: Run, tuned: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(StorageError):
        tune(done, out, progress=tiny.Watch("fine-tuning", 14, error=StorageError))
    run = open_run(out)
    assert (run.state, run.facts.get("diverged")) == ("failed", None)
    again = tune(done, out, resume=True)
    assert again.state == "done"
    assert "error" not in again.facts
    assert front_of(out) == front_of(tuned.folder.path)


def test_what_a_killed_process_left_half_written_is_swept_away(done: Run, tuned: Run, tmp_path: Path) -> None:
    out = Path(shutil.copytree(tuned.folder.path, tmp_path / "copy"))
    (out / "cache").mkdir()
    halves = [
        out / ".run.json.abc.part",
        out / "finetune" / ".finetune.safetensors.x1.part",
        out / "bank" / ".y.part" / "z",
    ]
    kept = [
        out / "cache" / ".pixels.npy.k.part",
        out / "notes.part",
        out / "bank" / ".hidden",
        out / ".ee.onnx.k.part",  # an export that goes on beside it
        out / "exports" / ".ee.onnx.k.part",
    ]
    for path in (*halves, *kept):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    tune(done, out, resume=True)
    assert not any(path.exists() for path in halves)
    assert not (out / "bank" / ".y.part").exists()
    assert all(path.exists() for path in kept)


def test_a_process_killed_before_it_wrote_anything_whole_blocks_no_folder(done: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / ".lock").touch()
    (out / ".run.json.abc.part").write_bytes(b"{")
    with pytest.raises(KeyboardInterrupt):
        tune(done, out, progress=tiny.Watch("fine-tuning", 1))
    assert [path.name for path in out.glob(".*")] == [".lock"]
