"""The whole job, command by command, as a person types it."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from torch.export import ExportedProgram

from eexform.backends import torch_export
from eexform.cli import quick
from eexform.data import Dataset
from eexform.errors import DataError
from eexform.ir.graph import Graph
from eexform.report.quickstart import Quickstart
from eexform.runtime import StagedSession
from eexform.search.run import Run, open_run
from eexform.verification.bench import bench
from eexform.verification.verify import verify
from tests.cli.support import FRACTIONS, SITES, cli, fine, listing

EXIT = {"site", "head", "measure", "threshold", "temperature"}
FIGURES = {"accuracy", "cost", "macs", "macs_heads_free", "rates"}


def test_search_shows_the_front(place: Path, run: Path) -> None:
    shown = (place / "search.txt").read_text()
    assert "model alone: accuracy" in shown
    assert "* the knee" in shown
    assert fine("pareto", run).out == shown
    told = (place / "search.err").read_text().splitlines()
    for task in ("scoring the trunk", "training heads", "scoring heads", "searching"):
        assert any(line.startswith(f"{task}: done in ") for line in told), told
    assert not any("━" in line for line in told)  # no bars where there is no terminal


def test_inspect(model: Path) -> None:
    plain = fine("inspect", model, "--json").json
    assert {
        "name",
        "digest",
        "opset",
        "nodes",
        "inputs",
        "output",
        "classes",
        "scores",
        "exits",
        "macs",
        "params",
    } <= set(plain)
    assert [site["value"] for site in plain["sites"]] == list(SITES[:3])
    assert {"value", "kind", "shape", "channels", "stride", "macs_before", "params_before", "live"} == set(
        plain["sites"][0]
    )
    assert {"value", "reason"} == set(plain["rejected"][0])
    table = fine("inspect", model, "--rejected").out
    for site in SITES[:3]:
        assert site in table
    assert "why it is no site" in table
    assert "--rejected says why" in fine("inspect", model).out


def test_pareto(run: Path) -> None:
    plain = fine("pareto", run, "--json").json
    assert {"accuracy_select", "accuracy_test", "macs", "cost"} <= set(plain["trunk"])
    assert plain["run"]["state"] == "done"
    plans = plain["plans"]
    assert [plan["index"] for plan in plans] == list(range(len(plans)))
    assert plain["knee"] in range(len(plans))
    for plan in plans:
        assert set(plan["select"]) >= FIGURES
        assert set(plan["test"]) >= FIGURES
        assert set(plan["worst"]) >= {"macs", "cost"}
        assert all(set(exit_) == EXIT for exit_ in plan["exits"])
        assert len(plan["select"]["rates"]) == len(plan["exits"]) + 1
        assert sum(plan["test"]["rates"]) == pytest.approx(1)
    everything = fine("pareto", run, "--all").out
    shown = [line.split()[0] for line in everything.splitlines() if re.match(r" *\d+[* ] +\d", line)]
    assert [int(number.rstrip("*")) for number in shown] == list(range(len(plans)))
    assert f"{plans[0]['exits'][0]['site']}\n" in everything


@pytest.mark.parametrize("form", ["if", "stages", "multi"])
def test_export_verify_bench(form: str, place: Path, run: Path, model: Path) -> None:
    out = place / ("stages" if form == "stages" else f"{form}.onnx")
    table = fine("export", run, "--pick", "3", "--form", form, "-o", out).out
    assert f"(form {form}): plan 3" in table
    again = fine("export", run, "--pick", "3", "--form", form, "-o", out, "--json").json  # over the first one
    assert {"out", "form", "objective", "objectives", "trunk", "plan", "checked"} == set(again)
    assert again["checked"] is None
    assert again["plan"]["exits"]

    verified = fine("verify", out, "--against", model, "--run", run, "--samples", "40", "--quiet")
    assert "verified: " in verified.out
    assert verified.err == ""
    plain = fine("verify", out, "--against", model, "--data", "digits", "--samples", "12", "--json").json
    assert plain["ok"] is True
    assert plain["form"] == form
    assert all(set(check) == {"name", "ok", "detail"} for check in plain["checks"])
    assert ("skipped work" in [check["name"] for check in plain["checks"]]) == (form != "multi")

    timed = fine("bench", out, "--vs", model, "--run", run, "--batch", "4", "--samples", "16", "--json").json
    assert [(entry["file"], entry["batch"]) for entry in timed["results"]] == [(str(out), 4), (str(model), 4)]
    assert {"file", "batch", "threads", "median_ms", "mean_ms", "p95_ms", "count"} == set(timed["results"][0])
    assert all(entry["median_ms"] > 0 for entry in timed["results"])


def test_a_program_is_checked_before_it_is_written(place: Path, run: Path, model: Path) -> None:
    out = place / "ee.pt2"
    assert "decides like the simulator" in fine("export", run, "--pick", "3", "--form", "torch", "-o", out).out
    plain = fine("export", run, "--pick", "3", "--form", "torch", "-o", out, "--json").json["checked"]
    assert plain["ok"] is True
    assert (plain["form"], plain["samples"]) == ("torch", 32)
    for given in (("verify", out, "--against", model, "--run", run), ("bench", out, "--run", run), ("inspect", out)):
        done = cli(*given)
        assert done.code == 2
        assert "is a program of torch.export" in done.err


def test_a_program_that_cannot_be_checked_is_written_and_that_is_said(
    place: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(self: Run, data: object = None) -> Dataset:
        raise DataError("digits: no such folder")

    monkeypatch.setattr(Run, "dataset", gone)
    out = place / "unchecked.pt2"
    done = fine("export", run, "--pick", "3", "--form", "torch", "-o", out).out
    assert "NOT checked, there are no samples to run it on: digits: no such folder" in " ".join(done.split())
    assert "decides like the simulator" not in done
    assert out.stat().st_size
    plain = fine("export", run, "--pick", "3", "--form", "torch", "-o", out, "--json").json
    assert plain["checked"] == {"ok": None, "why_not": "digits: no such folder"}


def test_a_program_that_decides_otherwise_is_not_written(
    place: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(graph: Graph) -> ExportedProgram:
        exits = [replace(item, threshold=-np.inf) for item in graph.exits]
        return lower(graph.replace(exits=exits))

    lower = torch_export.lower_torch
    monkeypatch.setattr(torch_export, "lower_torch", other)
    out = place / "wrong.pt2"
    done = cli("export", run, "--pick", "3", "--form", "torch", "-o", out)
    assert done.code == 2
    assert "does not do what plan 3 says, so it was not written: thresholds: exit 0 compares with -inf" in done.err
    assert not out.exists()


def test_a_plan_is_replayed(place: Path, run: Path, model: Path, exported: Path) -> None:
    folder = place / "plan"
    assert "form plan" in fine("export", run, "--pick", "3", "--form", "plan", "-o", folder / "plan.toml").out
    assert listing(folder) == ["plan.safetensors", "plan.toml"]
    out = place / "applied.onnx"
    assert fine("apply", model, folder / "plan.toml", "-o", out).out.startswith(f"wrote {out} (form if)")
    image = np.random.default_rng(0).random((9, 1, 8, 8), np.float32)
    results = [onnxruntime.InferenceSession(path).run(None, {"image": image}) for path in (out, exported)]
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for form, target in (("none", "flat.onnx"), ("stages", "applied-stages"), ("multi", "multi2.onnx")):
        plain = fine("apply", model, folder / "plan.toml", "-o", place / target, "--form", form, "--json").json
        assert {"out", "plan", "form", "changed", "nodes", "exits", "notes", "skipped"} == set(plain)
        assert plain["form"] == form
    assert len(fine("inspect", place / "flat.onnx", "--json").json["exits"]) == len(plain["exits"])


def test_the_ways_to_pick(place: Path, run: Path) -> None:
    plans = fine("pareto", run, "--json").json
    trunk = plans["trunk"]

    def picked(text: str) -> dict:
        plan: dict = fine("export", run, "--pick", text, "-o", place / "picked.onnx", "--json").json["plan"]
        return plan

    assert picked("knee")["index"] == plans["knee"]
    assert picked("0")["index"] == 0
    assert picked("max-cost=0.6x")["select"]["macs"] <= 0.6 * trunk["macs"]
    assert picked(f"max-cost={0.9 * trunk['macs']}")["select"]["macs"] <= 0.9 * trunk["macs"]
    assert picked("min-accuracy=-40.5")["select"]["judged"] >= 0.45
    assert picked("min-accuracy=0.3")["select"]["accuracy"] >= 0.3


def test_thresholds_as_an_input(place: Path, run: Path, model: Path) -> None:
    out = place / "open.onnx"
    fine("export", run, "--pick", "3", "--thresholds-as-input", "-o", out)
    assert "thresholds" in [value.name for value in onnxruntime.InferenceSession(out).get_inputs()]
    fine("verify", out, "--against", model, "--run", run, "--samples", "12")


def test_a_fault_is_found(place: Path, run: Path, model: Path, exported: Path) -> None:
    """Exit code 1: it could be checked, and it is wrong."""
    plan = fine("export", run, "--pick", "3", "-o", place / "ee2.onnx", "--json").json["plan"]
    content = exported.read_bytes()
    thresholds = [np.float32(exit_["threshold"]).tobytes() for exit_ in plan["exits"]]
    once = [threshold for threshold in thresholds if content.count(threshold) == 1]
    broken = place / "broken.onnx"
    broken.write_bytes(content.replace(once[0], np.float32(0.999).tobytes()))
    done = cli("verify", broken, "--against", model, "--run", run, "--samples", "20")
    assert done.code == 1
    assert "FAILED" in done.out
    assert "NOT verified" in done.out
    assert "error" not in done.err
    done = cli("verify", broken, "--against", model, "--run", run, "--samples", "20", "--json")
    assert done.code == 1
    assert done.json["ok"] is False


def test_the_data_of_a_run(place: Path, run: Path, model: Path, exported: Path) -> None:
    """Data by run and by option; a run's own samples elsewhere."""
    split = ("--split", "select", "--samples", "8")
    fine("verify", exported, "--against", model, "--run", run, "--data", "digits", *split)
    timed = fine("bench", exported, "--run", run, "--batch", "1", "--batch", "1", "--samples", "4")
    assert timed.out.count("ee.onnx") == 1
    assert "timing: done in" in timed.err
    done = cli("bench", exported, "--run", run, "--scale", "1/255")
    assert (done.code, done.out) == (2, "")
    assert "--scale does not go with --run" in done.err


def test_the_staged_runner_reads_what_is_exported(place: Path, run: Path) -> None:
    folder = place / "stages-for-runtime"
    fine("export", run, "--pick", "3", "--form", "stages", "-o", folder)
    decisions = StagedSession(folder).run({"image": np.zeros((3, 1, 8, 8), np.float32)})
    assert decisions.scores.shape == (3, 10)


def test_nothing_exported_names_a_local_path(place: Path, run: Path) -> None:
    out = place / "out-paths"
    for form, name in (("if", "a.onnx"), ("stages", "b"), ("multi", "c.onnx"), ("plan", "d.toml")):
        fine("export", run, "--pick", "3", "--form", form, "-o", out / name)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) >= 7
    for path in files:
        content = path.read_bytes()
        for secret in (place.name.encode(), str(Path.home()).encode() + b"/", b"/tmp/"):
            assert secret not in content, path


def test_a_run_moves_with_its_folder(place: Path, run: Path, model: Path) -> None:
    moved = place / "moved"
    shutil.copytree(run, moved)
    assert fine("pareto", moved, "--json").json == fine("pareto", run, "--json").json
    fine("export", moved, "-o", place / "from-moved.onnx")


def test_listings() -> None:
    passes = fine("passes", "--json").json["passes"]
    assert {"name", "summary", "distribution", "preserves_outputs", "parameters", "error"} == set(passes[0])
    assert {"name", "required", "default", "tunable", "type", "domain", "help"} == set(passes[2]["parameters"][0])
    costs = fine("costs", "--json").json["costs"]
    assert {
        "name",
        "summary",
        "distribution",
        "unit",
        "measured",
        "additive",
        "per_sample",
        "settings",
        "error",
    } == set(costs[0])
    shown = fine("passes").out + fine("costs").out
    for entry in [*passes, *costs]:
        assert entry["name"] in shown
        for item in entry.get("parameters", entry.get("settings")):
            assert item["name"] in shown


def test_fractions_are_those_of_the_options(run: Path) -> None:
    samples = fine("pareto", run, "--json").json["trunk"]["samples"]
    assert samples["select"] == pytest.approx(1797 * float(FRACTIONS.split(",")[2]), abs=10)


def test_the_quickstart_shows_what_it_made(
    place: Path, run: Path, model: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own work has a test elsewhere; here is what a person sees."""
    opened = open_run(run)
    data = opened.dataset()
    made = Quickstart(
        opened,
        model,
        exported,
        3,
        verify(exported, opened.graph, data, samples=8),
        bench([exported, model], data.sample_feeds("test", 8), batches=(4,)),
    )
    asked: list[Path] = []

    def stand_in(out: Path, **_: object) -> Quickstart:
        asked.append(out)
        return made

    monkeypatch.setattr(quick, "run_all", stand_in)
    monkeypatch.chdir(place)
    shown = fine("quickstart").out
    for part in ("front: ", "3+", "skipped work", "verified: ", "median ms", f"next: eexform inspect {model}"):
        assert part in shown
    plain = fine("quickstart", "--json", "--out", place / "quick").json
    assert set(plain) == {"model", "exported", "run", "plan", "pareto", "verify", "bench"}
    assert asked == [Path("eexform-quickstart"), place / "quick"]
