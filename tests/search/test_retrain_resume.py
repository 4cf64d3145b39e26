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

from eexform.errors import RunError
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
