"""Calibration: what is measured, that it survives interruption, and that its file is what cost models read.

Nothing here depends on how fast a machine is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import eexform as ee
from eexform.backends import ort
from eexform.cost_models import _grid, _measure_kernels, _ort_kernels, make
from eexform.cost_models import calibrate as calibrating
from eexform.cost_models._grid import planned
from eexform.cost_models._measure_kernels import Timing, measure, summarised
from eexform.cost_models._table_file import read_table
from eexform.errors import OptionError, RunError
from eexform.frontends.onnx import from_model
from eexform.ir.graph import Graph
from tests import zoo
from tests.passes.helpers import CHAIN, graph_of


@pytest.fixture(scope="module")
def graph() -> Graph:
    return graph_of(CHAIN)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routing and the effect of caches are measured in tests of their own."""
    from eexform.cost_models._routing import RoutingFit

    monkeypatch.setattr(calibrating, "measure_routing", lambda **_: RoutingFit(4.0, 0.1, 2.0, 1.0))
    monkeypatch.setattr(calibrating, "_COPIES", (2, 3))


def keys(graph: Graph) -> set[Any]:
    return {(k.op, k.variant, k.sizes) for k in _ort_kernels.kernels(graph)}


def test_a_calibration_is_a_table_and_a_device(short: None, tmp_path: Path) -> None:
    graph = from_model(zoo.build("resnet"))
    made = calibrating.calibrate({"resnet": graph}, repeats=2, grid=False)
    path = tmp_path / "here.json"
    made.save(path)
    plain = json.loads(path.read_text())
    assert {row.key for row in made.rows} == keys(graph)
    assert all(row.us >= 0 and row.repeats >= 1 for row in made.rows)
    assert plain["format"] == 1
    assert plain["finished"]
    assert plain["kernels"] == "onnxruntime"
    assert {"device", "onnxruntime", "cores"} <= set(plain["runtime"]["machine"])
    assert plain["runtime"]["threads"] == 1
    assert plain["runtime"]["call_us"] > 0
    assert all("calibrated" in why for why in plain["device"]["sources"].values())
    (checked,) = made.checked
    cost = make("table", device=str(path)).cost(graph)
    assert cost.estimated == ()
    assert cost.unknown == ()
    assert cost.total == pytest.approx(checked.predicted_us / 1e3)
    assert "warnings" not in cost.conditions
    assert make("roofline", device=str(path)).cost(graph).total > 0


def test_it_is_what_the_package_exports() -> None:
    assert ee.calibrate is calibrating.calibrate


def test_interruption_loses_nothing_that_was_handed_over(
    graph: Graph, short: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_measure_kernels, "_CHUNK", 2)
    path = tmp_path / "t.json"

    def keep(partial: Any) -> None:
        partial.save(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrating.calibrate([graph], repeats=1, grid=False, keep=keep)
    kept = read_table(path)
    assert len(kept.rows) == 2
    assert not kept.finished
    with pytest.raises(OptionError, match="--resume"):
        make("table", device=str(path)).cost(graph)

    asked = []

    def watched(operators: Mapping[Any, Any], **named: Any) -> Any:
        asked.append(set(operators))
        return measure(operators, **named)

    monkeypatch.setattr(calibrating, "measure", watched)
    made = calibrating.calibrate([graph], repeats=1, grid=False, resume=path)
    assert asked[0] == keys(graph) - {row.key for row in kept.rows}
    assert made.finished
    assert {row.key for row in made.rows} == keys(graph)
    assert set(kept.rows) <= set(made.rows), "what was measured stays as it was"


def test_more_models_are_added_to_a_file(graph: Graph, short: None, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    other = graph_of(CHAIN.replace("[pool] p = GlobalAveragePool(r3)", "[pool] p = GlobalMaxPool(r3)"))
    calibrating.calibrate([graph], repeats=1, grid=False).save(path)
    made = calibrating.calibrate([other], repeats=1, grid=False, resume=path)
    assert {row.key for row in made.rows} == keys(graph) | keys(other)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"machine": {"device": "Another", "onnxruntime": "1"}}, "device 'Another'"),
        ({"threads": 64}, "threads 64"),
        ({"machine": {}}, "device None"),
    ],
)
def test_measurements_of_two_machines_are_not_mixed(
    graph: Graph, tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    path = tmp_path / "t.json"
    runtime = {"threads": 1, "machine": calibrating.machine(), **changed}
    row = {"op": "Relu", "variant": "", "sizes": [4], "us": 1.0}
    path.write_text(json.dumps({"kernels": "onnxruntime", "runtime": runtime, "table": [row]}))
    with pytest.raises(RunError, match=says):
        calibrating.calibrate([graph], repeats=1, grid=False, resume=path)


def test_what_cannot_be_calibrated_is_refused(graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="at least one model"):
        calibrating.calibrate([])
    with pytest.raises(OptionError, match=r"'model.onnx' is no graph: load it"):
        calibrating.calibrate(["model.onnx"])  # type: ignore[list-item]
    with pytest.raises(OptionError, match="repeats: 0"):
        calibrating.calibrate([graph], repeats=0)
    fused = tmp_path / "t.json"
    fused.write_text(json.dumps({"table": [{"op": "Relu", "variant": "", "sizes": [4], "us": 1.0}]}))
    with pytest.raises(RunError, match="not those of onnxruntime"):
        calibrating.calibrate([graph], resume=fused)


# -- what is measured ------------------------------------------------------------------------------------------------


def test_the_grid_holds_cut_networks_and_heads(graph: Graph) -> None:
    own, more = planned({"chain": graph}, grid=False), planned({"chain": graph})
    assert set(own.operators) == keys(graph)
    assert own.models == more.models
    assert list(own.models) == ["chain"]
    assert set(own.operators) < set(more.operators)
    assert more.refused == []
    concat = [key for key in more.operators if key[0] == "Concat"]
    assert concat, "the default heads put two poolings together"
    narrow = {sizes[:2] for op, variant, sizes in more.operators if op.endswith("Conv") and "3x3" in variant}
    assert len(narrow) > len({sizes[:2] for op, _, sizes in own.operators if op.endswith("Conv")})
    assert list(planned({"chain": graph}).operators) == list(more.operators), "the same seed gives the same grid"


def test_a_graph_of_the_grid_that_does_not_open_is_reported(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OptionError("no head of this kind")

    monkeypatch.setattr(_grid, "head_graph", refuse)
    plan = planned({"chain": graph})
    assert plan.refused
    assert all(why == "no head of this kind" for _, why in plan.refused)
    assert all(what.startswith("chain: head ") for what, _ in plan.refused)


@pytest.mark.parametrize("name", ["mobilenet", "vit", "swin"])
def test_every_kernel_runs_on_its_own(name: str) -> None:
    plan = planned({name: from_model(zoo.build(name))}, grid=False)
    timings, refused = measure(plan.operators, repeats=1)
    assert refused == {}
    assert set(timings) == set(plan.operators)


def test_copies_compute_what_the_operator_does(graph: Graph) -> None:
    for execution in _ort_kernels.executions(graph):
        once, often = (ort.session(_measure_kernels._beside(execution, count), optimize=False) for count in (1, 4))
        feeds = _measure_kernels._fed(execution)
        for left, right in zip(once.run(None, feeds), often.run(None, feeds), strict=True):
            np.testing.assert_array_equal(left, right)


def test_outliers_are_dropped_by_the_rule() -> None:
    found = summarised([10.0, 11.0, 10.5, 10.2, 10.8, 500.0])
    assert found.dropped == 1
    assert found.repeats == 5
    assert found.us == pytest.approx(10.5)
    assert found.spread_us == pytest.approx(0.6)
    assert summarised([3.0]) == Timing(3.0, 0.0, 1, 0)
    assert summarised([1.0, 2.0]).dropped == 0
