"""Distillation from the command line: what it makes and says, how it goes on, what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import eexform as ee
from eexform.ir.graph import Graph
from tests import tiny
from tests.cli.support import cli, fine, listing, refused
from tests.cli.test_json import keys, section
from tests.cli.test_process import interrupted, lines

GIVEN = (
    *("--data", "digits", "--scale", "1/16", "--fractions", "0.4,0.1,0.25,0.25", "--batch-size", "32", "--amp", "off"),
    *("--threads", "1", "--device", "cpu", "--lr", "0.1"),
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "original.onnx"
    ee.save(tiny.trained(), path)
    return path


@pytest.fixture(scope="module")
def small(teacher: Path) -> Path:
    graph = tiny.network(1, widths=(4, 6, 6))
    path = teacher.with_name("small.onnx")
    ee.save(graph.replace(metadata={**graph.metadata, "eexform.cut": "{}"}), path)
    return path


def test_it_learns_and_says_so(small: Path, teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "taught.onnx"
    done = fine("distill", small, "--teacher", teacher, *GIVEN, "--epochs", "4", "-o", out, "--json")
    plain = done.json
    assert not set(keys(plain)) - section("`distill`")
    assert plain["out"] == str(out)
    assert plain["digest"] == ee.load(out).digest
    assert plain["teacher"] == tiny.trained().digest
    assert plain["epochs"] == len(plain["losses"]) == len(plain["agreement"]) - 1 == 4
    assert plain["agreement"][-1] > plain["agreement"][0] + 0.3
    assert plain["test"]["after"]["agreement"] > plain["test"]["before"]["agreement"] + 0.3
    assert ee.load(out).metadata["eexform.cut"] == "{}"
    assert "fine-tuning (distill): " in done.err
    assert listing(tmp_path) == ["taught.onnx"]


def test_words(small: Path, teacher: Path, tmp_path: Path) -> None:
    command = ("distill", small, "--teacher", teacher, *GIVEN, "--epochs", "1", "-o", tmp_path / "a.onnx")
    shown = fine(*command).out
    first, second, third = shown.splitlines()
    assert first.startswith(f"wrote {tmp_path / 'a.onnx'}: 1 epoch in 0.")
    assert second.startswith("agreement with the teacher on 449 samples of test: ")
    assert third.startswith("accuracy there: ")
    assert third.rpartition(", the teacher ")[2].endswith(" %")
    quiet = fine(*command[:-1], tmp_path / "b.onnx", "--labels", "none", "--quiet")
    assert len(quiet.out.splitlines()) == 2
    assert quiet.err == ""


def test_ctrl_c_and_on(small: Path, teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "taught.onnx"
    command = ["distill", small, "--teacher", teacher, *GIVEN, "--epochs", "30", "--augment", "crop:1", "--out", out]
    history = tmp_path / "taught.onnx.training" / "history.jsonl"
    done = interrupted(command, lambda: lines(history) >= 2, tmp_path / "errors")
    assert done.code == 130, done.err
    assert done.out == ""
    assert "interrupted: the epochs trained so far are kept" in done.err
    assert not out.exists()
    refused(*command, says=["holds a distillation that was begun", "resume"])
    refused(*command, "--resume", "--lr", "0.02", says=["of a training with other options"])
    resumed = fine(*command, "--resume", "--json")
    assert "going on after epoch" in resumed.err
    straight = fine(*command[:-1], tmp_path / "straight.onnx", "--json").json
    assert resumed.json["digest"] == straight["digest"]
    assert resumed.json["losses"] == straight["losses"]
    refused(*command, "--resume", says=["there is nothing to go on with"])


def test_a_folder_of_its_own(small: Path, teacher: Path, tmp_path: Path) -> None:
    command = ("distill", small, "--teacher", teacher, *GIVEN, "--epochs", "1", "-o", tmp_path / "a.onnx")
    fine(*command, "--work", tmp_path / "work")
    assert listing(tmp_path / "work") == ["finetune.safetensors", "history.jsonl"]
    assert "going on after epoch 1" in fine(*command, "--work", tmp_path / "work", "--resume").err


def _other_classes(path: Path) -> Path:
    draft = tiny.network().copy()
    draft.constants["classifier.weight"].values = np.zeros((7, 8), np.float32)
    draft.constants["classifier.bias"].values = np.zeros(7, np.float32)
    draft.gs.outputs[0].shape = ["N", 7]
    ee.save(Graph(draft.gs, scores="logits"), path)
    return path


def test_refused(small: Path, teacher: Path, tmp_path: Path) -> None:
    command = ("distill", small, "--teacher", teacher, "--epochs", "1", "-o", tmp_path / "a.onnx")
    other = _other_classes(tmp_path / "seven.onnx")
    refused("distill", small, "--teacher", other, *GIVEN, "-o", tmp_path / "a.onnx", says=["tells 7 classes apart"])
    refused(*command, *GIVEN, "--data", "nowhere.npz", says=["nowhere.npz"])
    refused(*command, says=["no data: give --data"])
    refused(*command, *GIVEN, "--teacher", tmp_path / "none.onnx", says=["none.onnx"])
    refused(*command, *GIVEN, "--optimiser", "lion", says=["optimiser", "'lion'"])
    refused(*command, *GIVEN, "--loss", "distil", says=["'distil'", "did you mean 'distill'"])
    refused(*command, *GIVEN, "--loss", "stick_breaking", says=["stick_breaking", "gate"])
    refused(*command, *GIVEN, "--labels", "none", "--loss", "cross_entropy", says=["needs labels"])
    refused(*command, *GIVEN, "--amp", "float16", says=["float16 needs a CUDA device"])
    refused(*command[:-1], tmp_path, *GIVEN, says=["is a folder"])
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "wide.npz", x=rng.normal(size=(60, 12, 12, 1)).astype(np.float32), y=rng.integers(0, 10, 60))
    wide = refused(*command, *GIVEN, "--data", tmp_path / "wide.npz", "--layout", "nhwc", says=["12"])
    assert "8" in wide
    done = cli(*command, *GIVEN, "--lr", "1e30", "--clip", "0")
    assert done.code == 2
    assert "not finite; lower the learning rates" in done.err
    assert listing(tmp_path) == ["seven.onnx", "wide.npz"]
