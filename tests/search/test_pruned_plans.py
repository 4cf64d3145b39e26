"""Plans of pruned trunks: replayed without data to the same digest, and verified against the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import eexform as ee
from eexform.backends.metadata import PLAN
from eexform.errors import OptionError, RunError
from eexform.report.apply import apply
from eexform.search.run import Run
from eexform.verification.verify import Report, verify
from tests import tiny
from tests.search.pruning import prune, pruned, trunks


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prune(tmp_path_factory.mktemp("pruned") / "run", trunks=trunks(epochs=4))


def checked(path: Path, run: Run, *, graph: Any = None, **given: Any) -> Report:
    graph = run.graph if graph is None else graph
    return verify(path, graph, tiny.digits(1797).bind(graph), samples=40, **given)


def apply_of(run: Run, plan: Any, folder: Path) -> str:
    return apply(run.graph, run.save_plan(plan, folder / "plan.toml")).graph.digest


def said(report: Report, name: str = "trunk") -> str:
    return next(check.detail for check in report.checks if check.name == name)


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_saved_plan_gives_the_same_digest_without_data(run: Run, tmp_path: Path, suffix: str) -> None:
    some = pruned(run)
    for plan in (some[0], some[-1]):
        run.save_plan(plan, tmp_path / f"plan.{suffix}")
        assert apply(tiny.trained(), tmp_path / f"plan.{suffix}").graph.digest == plan.materialise().digest


@pytest.mark.parametrize("form", ["if", "stages", "multi"])
def test_an_exported_plan_verifies_against_the_original(run: Run, tmp_path: Path, form: str) -> None:
    plan = pruned(run)[0]
    assert plan.exits
    out = tmp_path / ("ee" if form == "stages" else "ee.onnx")
    plan.export(out, form=form)
    from_file = checked(out, run)
    from_file.require()
    assert "parameters are stored ones and taken from the file" in said(from_file)
    from_run = checked(out, run, arrays=run.context().arrays)
    from_run.require()
    assert "taken from the file" not in said(from_run)
    assert plan.materialise().digest == apply_of(run, plan, tmp_path)
    for arrays in (None, run.context().arrays):
        other = checked(out, run, graph=tiny.network(seed=4), arrays=arrays)
        assert not other.ok
        assert "the plan was made from the model" in said(other)


def test_a_changed_number_shows(run: Run, tmp_path: Path) -> None:
    plan = pruned(run)[0]
    plan.export(tmp_path / "ee.onnx", form="multi")
    model = onnx.load(tmp_path / "ee.onnx")
    weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("block1.conv.weight"))
    values = numpy_helper.to_array(weight).copy()
    values.flat[0] += 1e-3
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "ee.onnx")
    report = checked(tmp_path / "ee.onnx", run)
    assert not report.ok
    assert "or parameters of the file have changed" in said(report)
    assert not checked(tmp_path / "ee.onnx", run, arrays=run.context().arrays).ok


def test_another_cut_in_the_plan_shows(run: Run, tmp_path: Path) -> None:
    plan = pruned(run)[0]
    plan.export(tmp_path / "ee.onnx", form="multi")
    model = onnx.load(tmp_path / "ee.onnx")
    entry = next(prop for prop in model.metadata_props if prop.key == PLAN)
    described = json.loads(entry.value)
    step = next(step for step in described["recipe"]["pass"] if step["name"] == "prune_channels")
    name, units = next(iter(step["cut"].items()))
    step["cut"][name] = units[1:]
    if not units[1:]:
        del step["cut"][name]
    entry.value = json.dumps(described)
    onnx.save(model, tmp_path / "ee.onnx")
    assert not checked(tmp_path / "ee.onnx", run).ok


def test_a_trunk_alone_is_an_ordinary_network(tmp_path: Path) -> None:
    run = prune(tmp_path / "run", trunks=trunks(exits=False, epochs=0))
    plan = next(plan for plan in pruned(run))
    plan.export(tmp_path / "small.onnx")
    checked(tmp_path / "small.onnx", run).require()
    checked(tmp_path / "small.onnx", run, arrays=run.context().arrays).require()
    loaded = ee.load(tmp_path / "small.onnx")
    assert sum(map(np.size, loaded.parameters().values())) < sum(map(np.size, run.graph.parameters().values()))
    with pytest.raises(OptionError, match="has no exits, so it has neither stages nor thresholds"):
        plan.export(tmp_path / "stages", form="stages")
    run.save_plan(plan, tmp_path / "plan.toml")
    assert apply(tiny.trained(), tmp_path / "plan.toml").graph.digest == plan.materialise().digest
    with pytest.raises(OptionError, match="the model as it was given, without any exit: there is nothing to write"):
        run.export(run.front.trunk, tmp_path / "whole.onnx")


def test_numbers_that_are_gone_or_damaged(run: Run, tmp_path: Path) -> None:
    plan = pruned(run)[0]
    digest = next(str(given["digest"]) for name, given in plan.recipe if name == "set_parameters")
    stored = run.folder.trunks / f"{digest}.safetensors"
    data = stored.read_bytes()
    try:
        stored.write_bytes(data[:-4] + b"\0\0\0\1")
        with pytest.raises(RunError, match="its parameters do not match their digest"):
            _ = run.context().arrays[digest]
        stored.unlink()
        with pytest.raises(RunError, match="of a trunk are gone"):
            plan.materialise()
    finally:
        stored.write_bytes(data)
