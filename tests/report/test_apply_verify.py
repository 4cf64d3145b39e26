"""What ``apply`` makes can be verified against the model it was applied to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import eexform as ee
from tests.tiny import network


@pytest.mark.parametrize("carry", [0.0, 0.5])
def test_an_applied_recipe_verifies(tmp_path: Path, carry: float) -> None:
    """The trunk changes before the exits are inserted; the exported file has to say how."""
    graph = network()
    site = ee.find_sites(graph).sites[1].value
    recipe = ee.Recipe.parse(
        {
            "pass": [
                {"name": "fold_batch_norm"},
                {
                    "name": "insert_exits",
                    "sites": [site],
                    "heads": {site: "none/avg"},
                    "thresholds": {site: 0.15},
                    "carry": carry,
                    "final_temperature": 2.0,
                    "untrained": True,
                },
            ]
        }
    )
    result = ee.apply(graph, recipe)
    assert result.graph.exits
    ee.export(result.graph, tmp_path / "ee.onnx")
    feeds = {"image": np.random.default_rng(0).random((40, 1, 8, 8), np.float32)}
    report = ee.verify(tmp_path / "ee.onnx", graph, feeds)
    assert report.ok, [check for check in report.checks if not check.ok]


def test_a_recipe_without_exits_leaves_no_plan() -> None:
    result = ee.apply(network(), ee.Recipe.parse({"pass": [{"name": "fold_batch_norm"}]}))
    assert result.changed
    assert "eexform.plan" not in result.graph.metadata
