"""``eexform search --prune`` from the command line to a verified file."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.support import SEARCH, cli, fine, refused

PRUNE = (
    *("--prune", "--trunks", "2", "--trunk-epochs", "4", "--trunk-population", "4", "--trunk-generations", "1"),
    *("--proxy-samples", "64", "--trunk-lr", "0.001", "--trunk-batch-size", "64", "--device", "cpu"),
)


def test_from_search_to_verified_file(model: Path, tmp_path: Path) -> None:
    out, file, plan = tmp_path / "run", tmp_path / "ee.onnx", tmp_path / "plan.toml"
    done = fine("search", model, *SEARCH, *PRUNE, "--out", out)
    assert "trunks: at most 8 are tried" in done.err
    assert "then at most 4 epochs of training in all; 2 of them and the original get exits" in done.err
    front = json.loads((out / "front.json").read_text())["plans"]
    smaller = [one for one in front if any(name == "prune_channels" for name, _ in one["recipe"])]
    assert smaller
    pick = max(smaller, key=lambda one: len(one["exits"]))["index"]
    fine("export", out, "--pick", pick, "--out", file)
    assert fine("verify", file, "--against", model, "--run", out, "--samples", "32", "--json").json["ok"]
    fine("export", out, "--pick", pick, "--form", "plan", "--out", plan)
    fine("apply", model, plan, "--out", tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").stat().st_size > 0
    assert fine("verify", tmp_path / "again.onnx", "--against", model, "--data", "digits", "--samples", "32", "--json")


def test_trunks_alone(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fine("search", model, *SEARCH, *PRUNE, "--no-exits", "--trunk-epochs", "0", "--out", out)
    front = json.loads((out / "front.json").read_text())["plans"]
    assert front
    assert not any(one["exits"] for one in front)
    small = next(one["index"] for one in front if one["recipe"][0][0] != "fold_batch_norm")
    fine("export", out, "--pick", small, "--out", tmp_path / "small.onnx")
    assert fine("verify", tmp_path / "small.onnx", "--against", model, "--run", out, "--json").json["ok"]
    fine("inspect", tmp_path / "small.onnx")


def test_what_is_refused(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[pass]]\nname = "insert_exits"\n')
    out = tmp_path / "run"
    refused(
        "search", model, *SEARCH, "--prune", "--recipe", recipe, "--out", out, says=["--prune is a recipe of its own"]
    )
    refused("search", model, *SEARCH, "--no-exits", "--out", out, says=["no pass that changes the trunk"])
    refused("search", model, *SEARCH, "--trunk-epochs", "9", "--out", out, says=["nothing to be trained"])
    refused(
        "search", model, *SEARCH, *PRUNE, "--trunks", "9", "--out", out, says=["is not an epoch for each of 9 trunks"]
    )
    assert not out.exists()
    assert cli("search", "--help").code == 0
