"""Fine-tuning from the command line: what it says, what it makes, how it goes on, what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import typer

from eexform.cli.app import app
from eexform.training.finetune_options import FinetuneOptions
from tests.cli.support import cli, fine, listing, refused
from tests.cli.test_json import keys, section
from tests.cli.test_process import interrupted, lines

TRAIN = (
    *("--epochs", "2", "--batch-size", "64", "--lr", "0.01", "--trunk-lr", "0.005", "--amp", "off"),
    *("--generations", "2", "--threads", "1", "--device", "cpu"),
)


@pytest.fixture(scope="module")
def pick(run: Path) -> str:
    """The plan with most exits."""
    plans = fine("pareto", run, "--json").json["plans"]
    return str(max(plans, key=lambda plan: len(plan["exits"]))["index"])


@pytest.fixture(scope="module")
def tuned(place: Path, run: Path, pick: str) -> Path:
    folder = place / "tuned"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = fine("train", run, "--pick", pick, *TRAIN, "--out", folder)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (place / "train.out").write_text(done.out)
    (place / "train.err").write_text(done.err)
    return folder


def test_it_says_what_it_does(place: Path, run: Path, pick: str, tuned: Path) -> None:
    said = (place / "train.err").read_text()
    first, second, *_ = said.splitlines()
    assert first.startswith(f"plan {pick} of {run}: exits at ")
    assert second.startswith("fine-tuning: strategy joint, 2 epochs of 539 samples, sgd; loss: cross_entropy + distill")
    assert "on cpu, float32" in second
    epochs = [line for line in said.splitlines() if line.startswith("epoch ")]
    assert [line.split(",")[0] for line in epochs] == ["epoch 1/2", "epoch 2/2"]
    for line in epochs:
        assert "loss " in line
        assert "exit 0 " in line
        assert "final " in line
    assert "fine-tuning: done" in said


def test_the_new_run_is_a_run(place: Path, run: Path, model: Path, tuned: Path, tmp_path: Path) -> None:
    shown = (place / "train.out").read_text()
    assert shown == fine("pareto", tuned).out
    assert "fine-tuned (joint, 2 epochs in " in " ".join(shown.split())
    old, new = fine("pareto", run, "--json").json, fine("pareto", tuned, "--json").json
    assert new["trunk"] == old["trunk"]
    assert old["tuned"] is None
    assert new["tuned"]["epochs"] == 2
    assert not set(keys(new)) - section("`search` and `pareto`")
    index = max(new["plans"], key=lambda plan: len(plan["exits"]))["index"]
    target = tmp_path / "ee.onnx"
    fine("export", tuned, "--pick", str(index), "-o", target)
    fine("verify", target, "--against", tuned / "trunk.onnx", "--run", tuned, "--samples", "32")
    assert cli("verify", target, "--against", model, "--run", tuned, "--samples", "32").code == 1


def test_ctrl_c_and_on(run: Path, pick: str, tmp_path: Path) -> None:
    command = ["train", run, "--pick", pick, *TRAIN, "--epochs", "20", "--out", tmp_path / "new"]
    history = tmp_path / "new" / "finetune" / "history.jsonl"
    done = interrupted(command, lambda: lines(history) >= 2, tmp_path / "errors")
    assert done.code == 130, done.err
    assert done.out == ""
    assert "interrupted: the epochs trained so far are kept" in done.err
    assert "Traceback" not in done.err
    assert json.loads((tmp_path / "new" / "run.json").read_text())["state"] == "interrupted"
    refused("pareto", tmp_path / "new", says=["no front", "interrupted", "eexform train --resume"])
    refused(*command, "--resume", "--lr", "0.02", says=["cannot resume", "options.learning_rate was 0.01, now 0.02"])
    resumed = fine(*command, "--resume")
    assert "going on after epoch" in resumed.err
    straight = fine(*command[:-1], tmp_path / "straight", "--json").json
    assert fine("pareto", tmp_path / "new", "--json").json["plans"] == straight["plans"]
    again = fine(*command, "--resume", "--json")
    assert "is finished, there is nothing to go on with" in again.err
    assert again.json["plans"] == straight["plans"]


def test_nothing_to_resume(run: Path, tmp_path: Path) -> None:
    command = ("train", run, *TRAIN, "--out", tmp_path / "none", "--resume")
    refused(*command, says=["none: holds no run", "nothing to go on with; leave --resume out"])
    assert not (tmp_path / "none").exists()


def test_the_last_word_on_training_is_the_last_epoch(place: Path, tuned: Path) -> None:
    """Not its last batch: 539 samples leave a batch of 27."""
    said = (place / "train.err").read_text().splitlines()
    epoch = next(line for line in said if line.startswith("epoch 2/2")).split("loss ")[1].split()[0]
    done = next(line for line in said if line.startswith("fine-tuning: done"))
    assert done.endswith(f"; epoch 2, loss {epoch}")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--pick", "99"), ["no plan 99", "0 to"]),
        (("--pick", "best"), ["'best'", "knee"]),
        (("--strategy", "jont"), ["strategy", "'jont'", "did you mean 'joint'"]),
        (("--optimiser", "lion"), ["optimiser", "'lion'", "sgd"]),
        (("--schedule", "step"), ["schedule", "'step'"]),
        (("--epochs", "0"), ["epochs", "0", "at least 1"]),
        (("--strategy", "heads-then-joint", "--head-epochs", "2"), ["head_epochs", "below the epochs"]),
        (("--loss", "cross_entrpy"), ["'cross_entrpy'", "did you mean 'cross_entropy'"]),
        (("--loss", "distill:wieght=1"), ["distill", "'wieght'", "did you mean 'weight'"]),
        (("--loss", "stick_breaking"), ["stick_breaking", "gate"]),
        (("--exit-weights", "1/0/2/3/4"), ["weights", "5"]),
        (("--loss", "cross_entropy:exits=1/0/2/3/4"), ["weights", "5"]),
        (("--device", "cud"), ["device 'cud' cannot be used here", "cpu"]),
        (("--amp", "float16"), ["float16 needs a CUDA device"]),
        (("--population", "10"), ["population", "10", "multiple of 4"]),
        (("--max-cost", "cheap"), ["max-cost", "cheap"]),
        (("--data", "nowhere.npz"), ["nowhere.npz"]),
    ],
)
def test_wrong_values(given: tuple[str, ...], says: list[str], run: Path, pick: str, tmp_path: Path) -> None:
    refused("train", run, "--pick", pick, *TRAIN, *given, "--out", tmp_path / "new", says=says)
    assert listing(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_where_there_is_none(run: Path, pick: str, tmp_path: Path) -> None:
    refused("train", run, *TRAIN, "--pick", pick, "--device", "cuda", "--out", tmp_path / "new", says=["device 'cuda'"])
    assert listing(tmp_path) == []


def test_places(run: Path, tuned: Path, tmp_path: Path) -> None:
    refused("train", run, *TRAIN, "--out", tuned, says=["holds a run already", "--resume"])
    refused("train", run, *TRAIN, "--out", run / "inside", says=["lies in the run"])
    refused("train", tmp_path / "none", *TRAIN, "--out", tmp_path / "new", says=["holds no run"])
    refused("train", run, *TRAIN, "--resume", "--out", tmp_path / "new", says=["holds no run"])
    refused("train", run, *TRAIN, "--resume", "--out", run, says=["eexform search"])
    (tmp_path / "file").touch()
    refused("train", run, *TRAIN, "--out", tmp_path / "file" / "new", says=["cannot be written"])
    assert listing(tmp_path) == ["file"]


def test_every_setting_has_an_option() -> None:
    parameters = typer.main.get_command(app).commands["train"].params  # type: ignore[attr-defined]
    given = {parameter.name: parameter.default for parameter in parameters}
    for field in dataclasses.fields(FinetuneOptions):
        if field.name == "losses":
            assert "loss" in given
        else:
            assert given[field.name] == field.default, field.name


def test_losses() -> None:
    shown = fine("losses").out
    for name in ("cross_entropy", "distill", "stick_breaking", "survivors", "temperature"):
        assert name in shown
    plain = fine("losses", "--json").json["losses"]
    assert {"cross_entropy", "distill"} <= {entry["name"] for entry in plain}
    assert all(entry["error"] is None and entry["summary"] for entry in plain)


def test_criteria() -> None:
    shown = fine("criteria").out
    for name in ("l1", "geometric_median", "taylor", "needs samples"):
        assert name in shown
    plain = fine("criteria", "--json").json["criteria"]
    assert {"l2", "activation", "bn_scale", "random"} <= {entry["name"] for entry in plain}
    assert all(entry["error"] is None and entry["summary"] for entry in plain)
