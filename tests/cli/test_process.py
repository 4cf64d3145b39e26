"""What only a process of its own shows: signals, a full disk, closed pipes, streams of the real program."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.support import (
    SEARCH,
    Done,
    check_refused,
    cli,
    command,
    environment,
    fine,
    listing,
    refused,
    shell,
)


def interrupted(arguments: list[object], when: Callable[[], bool], errors: Path) -> Done:
    """Run a command, send Ctrl-C once ``when`` holds, wait for its end."""
    with open(errors, "w") as stream:
        process = subprocess.Popen(
            command(*arguments), stdout=subprocess.PIPE, stderr=stream, text=True, env=environment()
        )
        try:
            deadline = time.monotonic() + 60
            while not when():
                assert process.poll() is None, errors.read_text()
                assert time.monotonic() < deadline, errors.read_text()
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    return Done(process.returncode, out, errors.read_text())


THREADS = """
import os, eexform.backends.ort, onnxruntime
with open("/proc/self/maps") as maps:
    assert "onnxruntime" in maps.read()
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_no_thread_that_reports_home() -> None:
    """Such a thread sends what nobody asked for, and may abort a process that is done."""
    quiet = environment(OPENBLAS_NUM_THREADS="1")
    counts = {}
    for off, variables in (("default", {}), ("0", {"ORT_DISABLE_TELEMETRY": "0"})):
        quiet.pop("ORT_DISABLE_TELEMETRY", None)  # this process imported eexform: it is set already
        done = subprocess.run(
            [sys.executable, "-c", THREADS], capture_output=True, text=True, check=True, env={**quiet, **variables}
        )
        counts[off] = int(done.stdout)
    assert counts["default"] == 1
    assert counts["0"] >= counts["default"]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_ctrl_c_while_heads_train(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    search = ["search", model, *SEARCH, "--epochs", "24", "--batch-size", "128", "--generations", "2", "--out", run]
    done = interrupted(search, lambda: any(run.glob("bank/*/training.safetensors")), tmp_path / "errors")
    assert done.code == 130, done.err
    assert done.out == ""
    assert "interrupted: the epochs trained so far are kept" in done.err
    assert "--resume" in done.err
    assert "Traceback" not in done.err
    assert json.loads((run / "run.json").read_text())["state"] == "interrupted"
    refused("pareto", run, says=["no front", "interrupted", "--resume"])
    resumed = fine(*search, "--resume")
    assert "going on after epoch" in resumed.err
    straight = fine(*search[:-1], tmp_path / "straight", "--json").json
    assert fine("pareto", run, "--json").json["plans"] == straight["plans"]


def test_ctrl_c_while_plans_are_searched(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    search = ["search", model, *SEARCH, "--generations", "120", "--out", run]
    done = interrupted(search, lambda: lines(run / "journal.jsonl") >= 4, tmp_path / "errors")
    assert done.code == 130, done.err
    assert "interrupted: the front so far is kept" in done.err
    assert "the run is not finished (state: interrupted)" in done.out
    assert fine("pareto", run, "--json").json["run"]["state"] == "interrupted"
    fine("export", run, "--pick", "1", "-o", tmp_path / "early.onnx")
    resumed = fine(*search, "--resume", "--json").json
    assert resumed["run"]["state"] == "done"
    straight = fine(*search[:-1], tmp_path / "straight", "--json").json
    assert resumed["plans"] == straight["plans"]


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Files of this process may not grow beyond ``size`` bytes: what a full disk does, without filling one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk(model: Path, run: Path, tmp_path: Path) -> None:
    target, fresh = tmp_path / "out", tmp_path / "run"
    with limited(4096):
        done = cli("export", run, "--pick", "3", "-o", target / "x.onnx")
        staged = cli("export", run, "--pick", "3", "--form", "stages", "-o", target / "stages")
    check_refused(done, ["x.onnx", "cannot be written", "File too large"])
    assert ".part" not in check_refused(staged, ["stages", "cannot be written", "File too large"])
    assert listing(target) == []
    with limited(19_000):
        done = cli("search", model, *SEARCH, "--out", fresh)
    check_refused(done, ["run", "scores", "cannot be written", "File too large"])
    refused("pareto", fresh, says=["no front", "failed"])
    assert fine("search", model, *SEARCH, "--out", fresh, "--resume", "--json").json["run"]["state"] == "done"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_on_a_full_disk() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("costs", "--json"), stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), check=False
        )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: standard output: No space left on device"


def test_a_reader_that_goes_away(run: Path) -> None:
    """As with ``| head -1``: silence."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        command("pareto", run, "--json"),
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        check=False,
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 1


def test_streams(model: Path, run: Path, exported: Path) -> None:
    done = shell("verify", exported, "--against", model, "--run", run, "--samples", "8", "--json")
    assert done.code == 0
    assert done.json["ok"] is True
    assert re.fullmatch(r"verifying: done in [\d.]+ s; \d+ checks\n", done.err)
