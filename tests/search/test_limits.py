"""Limits and candidates: kept by every plan, or refused with what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eexform.data import ArraySource, Dataset
from eexform.errors import DataError, OptionError, RunError
from eexform.ir.sites import find_sites
from eexform.search.limits import Limits, fitting
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
        ({"max_cost": "0.01x"}, r"mean macs at or below 254\.\d+: the cheapest is an exit at 'block0\S+' \(none/avg\)"),
        ({"max_terms": ("macs@p90=0.01x",)}, r"no plan can keep macs@p90 .*, which comes to \d+ \(0\.\d+x of the orig"),
        ({"max_worst": "0.9x"}, r"worst macs .* the cheapest is the network without exits, which comes to \d+ \(1x of"),
        ({"max_params": "10"}, r"params at or below 10: the cheapest is the network without exits.*; raise the limit"),
        ({"max_terms": ("peak_ram_bytes=1KiB",)}, r"no plan can keep peak_ram_bytes@max at or below 1024: "),
    ],
)
def test_limits_below_the_cheapest_plan_are_refused_before_training(
    tmp_path: Path, limits: dict[str, Any], message: str
) -> None:
    watch = tiny.Watch()
    with pytest.raises(OptionError, match=message):
        start(tmp_path / "run", limits=Limits(**limits), progress=watch)
    assert not watch.steps
    assert not (tmp_path / "run").exists()


def test_the_cheapest_plan_is_reached(tmp_path: Path) -> None:
    """What is refused begins right below what a plan can have: one exit that every sample takes."""
    with pytest.raises(OptionError, match="the cheapest is") as caught:
        start(tmp_path / "run", limits=Limits(max_cost="0.01x"))
    cheapest = float(str(caught.value).partition("comes to ")[2].split()[0])
    front = start(tmp_path / "run", limits=Limits(max_cost=f"{1.2 * cheapest}"), options=options(generations=4)).front
    assert all(cheapest <= plan.select["macs"] <= 1.2 * cheapest for plan in front)
    with pytest.raises(OptionError, match="the cheapest is"):
        start(tmp_path / "other", limits=Limits(max_cost=f"{0.999 * cheapest}"))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_cost": "cheap"}, "max-cost: 'cheap' is not a number"),
        ({"max_cost": "-1x"}, "max-cost: '-1x' must be a positive amount"),
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


# -- limits on any cost ------------------------------------------------------------------------------------------------

BOARD = """
name = "board"
title = "a board"
[compute]
peak_gflops_float32 = 0.1
[memory]
bandwidth_gb_per_s = 0.2
{sizes}
[sources]
"compute.peak_gflops_float32" = "made up"
"memory.bandwidth_gb_per_s" = "made up"
{sources}
"""


def board(folder: Path, **sizes: int) -> Path:
    """A device file with these memories."""
    path = folder / "board.toml"
    lines = {"sizes": "\n".join(f"{key} = {size}" for key, size in sizes.items())}
    lines["sources"] = "\n".join(f'"memory.{key}" = "made up"' for key in sizes)
    path.write_text(BOARD.format(**lines))
    return path


def test_any_cost_can_be_limited(done: Run, tmp_path: Path) -> None:
    limits = Limits(max_terms=("macs@p90=1.001x", "model_bytes=1.02x", "peak_ram_bytes=1.5x"))
    run = start(tmp_path / "run", limits=limits)
    whole = run.front.trunk
    assert len(run.front)
    for plan in run.front:
        assert plan.select["percentiles"]["p90"]["macs"] <= 1.001 * whole.select["macs"]
        assert plan.worst["cost"]["model_bytes"] <= 1.02 * whole.worst["cost"]["model_bytes"]
        assert plan.worst["cost"]["peak_ram_bytes"] <= 1.5 * whole.worst["cost"]["peak_ram_bytes"]
    assert any(plan.select["percentiles"]["p90"]["macs"] > 1.001 * whole.select["macs"] for plan in done.front)
    assert run.facts["objective"] == "macs"
    assert "models" not in run.facts  # what the limits name stands in them
    assert run.facts["limits"]["max_terms"] == list(limits.max_terms)
    assert Limits.from_json(run.facts["limits"]) == limits
    assert set(whole.select["cost"]) == {"macs", "params", "model_bytes", "peak_ram_bytes"}


def test_what_every_plan_would_break_is_said_before_scoring(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"none of the plans tried keeps the cost limits; the nearest exceeds them"):
        # either can be kept: the first by exits, the second by a network that has none
        start(tmp_path / "run", limits=Limits(max_cost="0.5x", max_terms=("model_bytes=1x",)))


def test_the_nearest_plan_is_told_by_what_it_lacks(tmp_path: Path) -> None:
    """The median of the samples cannot pay so little and the others be right."""
    with pytest.raises(
        OptionError, match=r"nearest one has macs@p50 \d.* \(at most \d[^,]*\), accuracy 0|accuracy 0\."
    ):
        start(tmp_path / "run", limits=Limits(max_terms=("macs@p50=0.2x",), min_accuracy="-1"))


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ("macs", "max: 'macs' is not of the form TERM=VALUE, such as peak_ram_bytes=256KiB"),
        ("=3", "max: '=3' is not of the form TERM=VALUE"),
        ("mac=3", "no cost model is called 'mac': did you mean 'macs'"),
        ("macs@p94=3", "'p94' is no statistic"),
        ("macs=cheap", "max macs=cheap: 'cheap' is not a number MACs"),
        ("macs=3KiB", "max macs=3KiB: '3KiB' is not a number MACs"),
        ("0.5*macs+0.5*params=1x", "is a weighted sum, and one cost model is meant here"),
        ("macs=0", "max macs=0: '0' must be a positive amount"),
    ],
)
def test_limits_on_costs_that_are_none(tmp_path: Path, term: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        start(tmp_path / "run", limits=Limits(max_terms=(term,)))
    assert not (tmp_path / "run").exists()


def test_a_device_limits_memory_and_size(tmp_path: Path) -> None:
    path = board(tmp_path, ram_bytes=65536, flash_bytes=1 << 20)
    assert fitting(str(path)) == ("peak_ram_bytes=65536", "model_bytes=1048576")
    assert fitting(f"{path}:dtype=int8") == ("peak_ram_bytes:dtype=int8=65536", "model_bytes:dtype=int8=1048576")
    run = start(tmp_path / "run", limits=Limits(max_terms=fitting(str(path))))
    assert all(plan.worst["cost"]["peak_ram_bytes"] <= 65536 for plan in run.front)
    small = fitting(str(board(tmp_path, ram_bytes=1000, flash_bytes=1 << 20)))
    with pytest.raises(OptionError, match="no plan can keep peak_ram_bytes@max at or below 1000: "):
        start(tmp_path / "small", limits=Limits(max_terms=small))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"flash_bytes": 1}, r"device 'board' does not say its memory.ram_bytes.*\(--max peak_ram_bytes=1MiB\)"),
        ({"ram_bytes": 1}, r"device 'board' does not say its memory.flash_bytes.*\(--max model_bytes=1MiB\)"),
    ],
)
def test_a_device_without_sizes_limits_nothing(tmp_path: Path, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        fitting(str(board(tmp_path, **sizes)))
    with pytest.raises(OptionError, match="nowhere"):
        fitting("nowhere")
