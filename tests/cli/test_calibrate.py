"""Calibration from the command line: what it writes and says, how it goes on, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eexform.cost_models import make
from eexform.frontends.onnx import load
from tests.cli.support import cli, fine, listing, refused
from tests.cli.test_json import section


@pytest.fixture(scope="module")
def calibrated(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrated") / "here.json"
    done = fine("calibrate", model, "--no-grid", "--repeats", "2", "-o", path)
    assert "kernels of 1 models: about" in done.err, "what is going to be measured is said first"
    assert model.name in done.out
    assert "a call takes" in " ".join(done.out.split()), "whatever the width"
    return path


def test_the_file_is_a_table(calibrated: Path, model: Path) -> None:
    assert listing(calibrated.parent) == [calibrated.name]
    cost = make("table", device=str(calibrated)).cost(load(model))
    assert cost.total > 0
    assert cost.unknown == ()
    assert cost.estimated == ()


def test_json_says_what_the_file_holds(calibrated: Path, model: Path) -> None:
    said = fine("calibrate", model, "--no-grid", "--repeats", "1", "--resume", "-o", calibrated, "--json", "--quiet")
    plain = json.loads(calibrated.read_text())
    assert said.err == ""
    known = section("`calibrate`")
    assert not set(said.json) - known
    assert not {key for name in ("models", "refused") for entry in said.json[name] for key in entry} - known
    assert not set(said.json["runtime"]) - known
    assert said.json["entries"] == len(plain["table"])
    assert said.json["out"] == str(calibrated)
    assert said.json["models"] == plain["models"]
    assert {"model", "measured_us", "spread_us", "predicted_us", "kernels"} == set(said.json["models"][0])


def test_interruption_keeps_what_is_measured(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "t.json"
    from eexform.cost_models import calibrate as calibrating

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(calibrating, "_call_us", interrupt)
        done = cli("calibrate", model, "--no-grid", "--repeats", "1", "-o", out)
    assert done.code == 130
    assert "--resume" in done.err
    before = json.loads(out.read_text())
    assert before["table"]
    assert not before["finished"]
    fine("calibrate", model, "--no-grid", "--repeats", "1", "-o", out, "--resume")
    after = json.loads(out.read_text())
    assert after["finished"]
    assert after["table"] == before["table"]


def test_what_is_refused(model: Path, calibrated: Path, tmp_path: Path) -> None:
    refused("calibrate", model, "-o", calibrated, says=["exists already", "--resume"])
    refused("calibrate", model, "-o", tmp_path / "t.toml", says=["must end in .json"])
    refused("calibrate", model, "-o", tmp_path, says=["is a folder"])
    refused("calibrate", model, "--runtime", "tvm", "-o", tmp_path / "t.json", says=["'tvm' cannot be measured"])
    refused("calibrate", tmp_path / "none.onnx", "-o", tmp_path / "t.json", says=["none.onnx"])
    assert listing(tmp_path) == []
