"""The main job on the digits: the front, and what a run writes down about itself."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eexform.cost_models.latency_ort import LatencyOrt
from eexform.errors import EexformError, RunError, StorageError
from eexform.search import driver, exits
from eexform.search.archive import non_dominated
from eexform.search.run import Run
from tests import tiny
from tests.search.running import OPTIONS, facts_of, front_of, options, start


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
        patch.setattr(exits.Journal, "append", full)
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


def test_measured_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, cost = tmp_path / "run", "latency_ort:repeats=3,warmup=1"
    run = start(out, cost=cost, progress=tiny.Watch("searching", after=2))
    assert run.front.objective == run.facts["objective"] == "latency_ort"
    assert (run.facts["cost"]["repeats"], run.facts["cost"]["threads"]) == (3, 1)
    for plan in run.front:
        assert 0 < plan.select["cost"]["latency_ort"] < 100
        assert plan.select["macs"] > 0
    with pytest.raises(RunError, match="cannot resume with other cost than the run's: repeats was 3, now 4"):
        start(out, cost="latency_ort:repeats=4,warmup=1", resume=True)
    trunk = run.front.trunk.select["cost"]["latency_ort"]

    def again(*_: Any) -> None:
        raise AssertionError("measured again: the figures of both halves of the search would not be comparable")

    monkeypatch.setattr(LatencyOrt, "costs", again)
    run = start(out, cost=cost, resume=True)
    assert run.state == "done"
    assert run.front.trunk.select["cost"]["latency_ort"] == trunk
    (stored,) = (out / "latencies").iterdir()
    stored.write_text('{"trunk": 1}')
    with pytest.raises(RunError, match=r"\.json: damaged measurements .* delete the file to measure anew"):
        start(out, cost=cost, resume=True)
