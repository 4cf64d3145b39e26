"""``eexform apply`` of recipes that look at data: pruned, repaired, and written down as a plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from eexform.frontends.onnx import load
from tests.cli.support import FRACTIONS, fine, listing, refused

RECIPE = """
[[pass]]
name = "prune_channels"
ratio = 0.3

[[pass]]
name = "repair"
samples = 128
"""
DATA = ("--data", "digits", "--fractions", FRACTIONS)


def test_pruned_repaired_and_replayed(model: Path, tmp_path: Path) -> None:
    recipe, plan, first, second = (tmp_path / name for name in ("r.toml", "small.toml", "1.onnx", "2.onnx"))
    recipe.write_text(RECIPE)
    done = fine("apply", model, recipe, *DATA, "--samples", "128", "-o", first, "--plan-out", plan)
    assert f"wrote {plan}: the settled plan" in done.out
    assert "repair: fitted the weights of" in " ".join(done.out.split())
    said = fine("apply", model, plan, "-o", second, "--json").json
    assert said["plan"] is None
    assert said["changed"]
    assert load(first).digest == load(second).digest
    small, whole = onnx.load(first), onnx.load(model)
    sizes = [sum(np.prod(item.dims) for item in graph.graph.initializer) for graph in (small, whole)]
    assert sizes[0] < sizes[1]


def test_without_data(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE)
    before = listing(tmp_path)
    given = ("apply", model, recipe, "-o", tmp_path / "x.onnx", "--plan-out", tmp_path / "p.toml")
    refused(*given, says=["pass 'repair' (after prune_channels)", "there are none: give --data"])
    refused(*given, *DATA, "--split", "train", says=["no split is called 'train'"])
    assert listing(tmp_path) == before


def test_the_plan_is_written_last(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[[pass]]\nname = "remove_dead"\n')
    before = listing(tmp_path)
    given = ("apply", model, recipe, "-o", tmp_path / "x.onnx", "--plan-out")
    refused(*given, tmp_path / "p.toml", "--form", "if", says=["--form if"])
    refused(*given, tmp_path / "p.yaml", says=["p.yaml: a plan is a .toml or a .json file"])
    refused(*given, tmp_path, says=["is a folder; give the name of a file"])
    assert listing(tmp_path) == before
