"""`search --gates` to a verified export, as a person types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.support import FRACTIONS, fine, refused, save_network

QUICK = (
    *("--data", "digits", "--fractions", FRACTIONS, "--epochs", "4", "--batch-size", "32", "--learning-rate", "0.03"),
    *("--max-sites", "2", "--max-head-share", "0.5", "--threads", "1", "--population", "16", "--generations", "6"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gates")
    save_network(folder / "net.onnx")
    fine("search", folder / "net.onnx", *QUICK, "--gates", "--out", folder / "run")
    return folder


def test_from_search_to_verified_exports(place: Path) -> None:
    plans = fine("pareto", place / "run", "--json").json["plans"]
    exits = [exit_ for plan in plans for exit_ in plan["exits"]]
    assert exits
    assert all(exit_["head"].endswith("/gate") and exit_["measure"] in ("gate", "stick") for exit_ in exits)
    chosen = max(plans, key=lambda plan: len(plan["exits"]))["index"]
    for form, name in (("if", "ee.onnx"), ("multi", "all.onnx"), ("stages", "stages")):
        fine("export", place / "run", "--pick", chosen, "--form", form, "-o", place / name)
        found = fine("verify", place / name, "--against", place / "net.onnx", "--data", "digits", "--json").json
        assert found["ok"], found


def test_recipe_and_heads_must_go_together(place: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[[pass]]\nname = "insert_exits"\nmeasure = "max_prob"\n')
    says = ("'max_prob', which reads scores, but the heads have gates", "without /gate")
    refused(
        *("search", place / "net.onnx", *QUICK, "--gates", "--recipe", tmp_path / "r.toml", "--out", tmp_path / "run"),
        says=says,
    )
    heads = ("--head", "none/avg", "--head", "none/avg+max/gate")
    refused("search", place / "net.onnx", *QUICK, *heads, "--out", tmp_path / "run", says=("or none",))
    assert not (tmp_path / "run").exists()
