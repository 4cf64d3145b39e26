"""Limits and candidates: kept by every plan, or refused with what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eexform.data import ArraySource, Dataset
from eexform.errors import DataError, OptionError, RunError
from eexform.ir.sites import find_sites
from eexform.search.limits import Limits
from eexform.search.run import Run, open_run
from tests import tiny
from tests.search.running import facts_of, front_of, options, start


def test_limits_hold_for_every_plan(done: Run, tmp_path: Path) -> None:
    limits = Limits(max_cost="0.8x", max_worst="1.5x", max_params="2x", min_accuracy="-30")
    front = start(tmp_path / "run", limits=limits).front
    trunk = front.trunk
    assert len(front)
    for plan in front:
        assert plan.select["macs"] <= 0.8 * trunk.select["macs"]
        assert plan.worst["macs"] <= 1.5 * trunk.select["macs"]
        assert plan.select["cost"]["params"] <= 2 * trunk.select["cost"]["params"]
        assert plan.select["accuracy"] >= trunk.select["accuracy"] - 0.3
    assert any(plan.select["macs"] > 0.8 * trunk.select["macs"] for plan in done.front)


def test_limits_in_numbers(done: Run, tmp_path: Path) -> None:
    most = done.front.trunk.select["macs"] * 0.7
    front = start(tmp_path / "run", limits=Limits(max_cost=f"{most}", min_accuracy="0.2")).front
    assert all(plan.select["macs"] <= most and plan.select["accuracy"] >= 0.2 for plan in front)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_cost": "0.01x"}, r"none of the plans tried keeps the cost limits; the nearest exceeds them by \d+"),
        ({"max_params": "10"}, r"none of the plans tried keeps the cost limits; the nearest exceeds them by \d+"),
        ({"min_accuracy": "1.0"}, r"nearest one has accuracy 0\.\d+ on select \(at least 1\.0000\): loosen them"),
        ({"min_accuracy": "+1", "max_cost": "0.5x"}, r"nearest one has .*mean macs \d.* \(at most \d|accuracy 0\."),
    ],
)
def test_impossible_limits_name_the_nearest_and_keep_the_heads(
    tmp_path: Path, limits: dict[str, str], message: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises(OptionError, match=message) as caught:
        start(out, limits=Limits(**limits))
    facts = facts_of(out)
    assert (facts["state"], facts["error"]) == ("failed", str(caught.value))
    with pytest.raises(RunError, match=r"there is no front yet \(state: failed\)"):
        _ = open_run(out).front
    watch = tiny.Watch()
    run = start(out, resume=True, progress=watch, limits=Limits(max_cost="0.95x"))
    assert run.state == "done"
    assert "error" not in run.facts
    assert run.facts["limits"]["max_cost"] == "0.95x"
    assert "training heads" not in watch.steps
    assert any("the limits have changed" in line for line in watch.said)
    start(tmp_path / "straight", limits=Limits(max_cost="0.95x"))
    assert front_of(out) == front_of(tmp_path / "straight")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_cost": "cheap"}, "max-cost: 'cheap' is not a number"),
        ({"max_cost": "-1x"}, "max_cost: -1.0 must be a positive number"),
        ({"max_worst": "nan"}, "max-worst: 'nan' is not a number"),
        ({"min_accuracy": "91"}, "min-accuracy: '91' is neither an accuracy in 0..1 nor points"),
    ],
)
def test_limits_that_are_none_leave_nothing_behind(tmp_path: Path, limits: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        start(tmp_path / "run", limits=Limits(**limits))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"sites": ("block9.conv_relu_out",)}, OptionError, "no value 'block9.conv_relu_out': did you mean"),
        ({"sites": ("scores",)}, OptionError, "'scores' is no site: "),
        ({"heads": ("dense/avg",)}, OptionError, "head layer 'dense' does not exist"),
        ({"heads": ("none/cls",)}, OptionError, "no candidate head fits any candidate site: .*no pooling 'cls'"),
    ],
)
def test_candidates_that_are_none(tmp_path: Path, changed: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        start(tmp_path / "run", options=options(**changed))
    assert not (tmp_path / "run").exists()


def test_rejected_site_comes_with_its_reason(tmp_path: Path) -> None:
    rejected = find_sites(tiny.trained()).rejected[0]
    with pytest.raises(OptionError) as caught:
        start(tmp_path / "run", options=options(sites=(rejected.value,)))
    assert f"{rejected.value!r} is no site: {rejected.reason}" in str(caught.value)


def test_named_sites_and_heads_are_the_only_ones(tmp_path: Path, sites: list[str]) -> None:
    watch = tiny.Watch()
    heads = ("none/avg", "none/cls", "mlp:1x8/avg")
    run = start(tmp_path / "run", options=options(sites=(sites[1],), heads=heads), progress=watch)
    found = {(exit_.site, exit_.head) for plan in run.front for exit_ in plan.exits}
    assert found <= {(sites[1], "none/avg"), (sites[1], "mlp:1x8/avg")}
    assert found
    assert any("head none/cls is not tried at" in line for line in watch.said)


def test_default_portfolio(tmp_path: Path) -> None:
    run = start(tmp_path / "run", options=options(heads=(), max_sites=2, max_head_share=0.3, generations=1))
    assert len(run.front) >= 2


def test_data_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    good = tiny.digits(300)
    wide = {"all": ({None: np.zeros((300, 1, 9, 9), np.float32)}, good.source.labels("all"))}
    bad = Dataset(ArraySource("wide", wide), good.preprocess, good.splits)
    with pytest.raises(DataError):
        start(tmp_path / "run", data=bad)
    assert not (tmp_path / "run").exists()
