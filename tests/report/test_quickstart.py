"""The quickstart end to end, and the plain values that reports print."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from eexform.backends import metadata
from eexform.frontends.onnx import load
from eexform.report.pareto import pareto
from eexform.report.quickstart import free_folder, quickstart
from eexform.search.run import open_run
from tests import tiny


def test_free_folder_never_overwrites(tmp_path: Path) -> None:
    wanted = tmp_path / "quick"
    assert free_folder(wanted) == wanted
    wanted.mkdir()
    assert free_folder(wanted) == tmp_path / "quick-2"
    (tmp_path / "quick-2").write_text("a file counts too")
    assert free_folder(str(wanted)) == tmp_path / "quick-3"
    (tmp_path / "quick-4").mkdir()
    assert free_folder(wanted) == tmp_path / "quick-3"


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    watch = tiny.Watch()
    done = quickstart(tmp_path / "quick", threads=1, progress=watch)
    folder = tmp_path / "quick"
    assert sorted(entry.name for entry in folder.iterdir()) == ["model.ee.onnx", "model.onnx", "run"]
    assert [line[:3] for line in watch.said if line[1:3] == "/5"] == [f"{step}/5" for step in range(1, 6)]

    plain = json.loads(json.dumps(done.to_json(), allow_nan=False))
    assert set(plain) == {"model", "exported", "run", "plan", "pareto", "verify", "bench"}
    assert plain["verify"]["ok"] is True
    assert all(set(check) >= {"name", "ok", "detail"} for check in plain["verify"]["checks"])
    assert {Path(entry["file"]).name for entry in plain["bench"]["results"]} == {"model.onnx", "model.ee.onnx"}
    for entry in plain["bench"]["results"]:
        assert {"batch", "threads", "median_ms", "mean_ms", "p95_ms"} <= set(entry)

    run = open_run(folder / "run")
    assert run.state == "done"
    assert plain["pareto"] == json.loads(json.dumps(pareto(run)))
    report = plain["pareto"]
    assert set(report["trunk"]) >= {"accuracy_select", "accuracy_test", "macs"}
    for plan in report["plans"]:
        assert set(plan) >= {"index", "exits", "select", "test", "worst"}
        assert set(plan["select"]) == set(plan["test"]) >= {"accuracy", "macs", "macs_heads_free", "rates"}
        assert all({"site", "head", "measure", "threshold"} <= set(exit_) for exit_ in plan["exits"])
        assert "macs" in plan["worst"]

    # a network worth its exits: it has learned, and a plan that loses little does much less work
    trunk, near = run.front.trunk, run.front.pick("min-accuracy=-1")
    assert trunk.test["accuracy"] > 0.93
    assert near.test["macs"] < 0.6 * trunk.test["macs"]
    assert near.test["accuracy"] > trunk.test["accuracy"] - 0.06
    assert run.front[done.plan].exits

    exported = onnx.load(folder / "model.ee.onnx")
    keys = {entry.key: entry.value for entry in exported.metadata_props}
    assert {metadata.PLAN, metadata.TRUNK} <= set(keys)
    assert str(tmp_path) not in "".join(keys.values())
    assert load(folder / "model.onnx").digest == run.graph.digest
