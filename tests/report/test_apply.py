"""``apply`` with passes that look at data: the settled plan gives the same graph without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import eexform as ee
from eexform.data import Calibration
from eexform.errors import OptionError, PassError
from eexform.ir.sites import find_sites
from eexform.passes import PlanStore
from tests.tiny import digits, network

PRUNED: dict[str, Any] = {
    "pass": [{"name": "prune_channels", "ratio": 0.3}, {"name": "repair"}, {"name": "fold_batch_norm"}]
}


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_the_settled_plan_gives_the_same_graph(tmp_path: Path, suffix: str) -> None:
    graph, path = network(), tmp_path / f"small.{suffix}"
    result = ee.apply(graph, ee.Recipe.parse(PRUNED), data=digits(200), plan_out=path)
    assert (tmp_path / "small.safetensors").is_file()
    again = ee.apply(graph, path)
    assert again.graph.digest == result.graph.digest
    settled = ee.Recipe.load(path)
    assert [step.name for step in settled.steps] == ["prune_channels", "set_parameters", "fold_batch_norm"]
    third = tmp_path / "again" / f"again.{suffix}"
    ee.apply(graph, path, plan_out=third)
    assert ee.apply(graph, third).graph.digest == result.graph.digest


def test_samples_are_asked_for_and_may_be_chosen() -> None:
    graph = network()
    recipe = ee.Recipe.parse(PRUNED)
    with pytest.raises(PassError, match="has to look at samples"):
        ee.apply(graph, recipe)
    data = digits(200).bind(graph)
    whole = ee.apply(graph, recipe, data=data).graph.digest
    assert ee.apply(graph, recipe, data=Calibration(data)).graph.digest == whole
    assert ee.apply(graph, recipe, data=Calibration(data, size=16)).graph.digest != whole


def test_no_file_beside_a_plan_that_needs_none(tmp_path: Path) -> None:
    graph = network()
    recipe = ee.Recipe.parse({"pass": [{"name": "fold_batch_norm"}]})
    result = ee.apply(graph, recipe, plan_out=tmp_path / "plan.toml")
    assert not (tmp_path / "plan.safetensors").exists()
    assert ee.apply(graph, tmp_path / "plan.toml").graph.digest == result.graph.digest


def test_a_wrong_suffix_is_told_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"plan\.yaml: a plan is a \.toml or a \.json"):
        ee.apply(network(), ee.Recipe.parse(PRUNED), plan_out=tmp_path / "plan.yaml")


def test_with_exits_the_settled_recipe_is_in_the_metadata(tmp_path: Path) -> None:
    graph = network()
    site = find_sites(graph).sites[1].value
    exits = {
        "name": "insert_exits",
        "sites": [site],
        "heads": {site: "none/avg"},
        "thresholds": {site: 0.2},
        "untrained": True,
    }
    result = ee.apply(
        graph, ee.Recipe.parse({"pass": [*PRUNED["pass"], exits]}), data=digits(200), plan_out=tmp_path / "plan.toml"
    )
    assert "set_parameters" in result.graph.metadata["eexform.plan"]
    assert ee.apply(graph, tmp_path / "plan.toml").graph.digest == result.graph.digest
    (digest,) = result.arrays
    assert set(PlanStore.load(tmp_path / "plan.safetensors").arrays) == {digest}


def test_another_models_plan_is_refused(tmp_path: Path) -> None:
    ee.apply(network(), ee.Recipe.parse(PRUNED), data=digits(200), plan_out=tmp_path / "plan.toml")
    with pytest.raises(PassError, match=r"set_parameters|prune_channels"):
        ee.apply(network(widths=(4, 8, 8, 12)), tmp_path / "plan.toml")
