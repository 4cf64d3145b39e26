"""Objectives, targets and limits on any cost from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from eexform.cost_models import make
from eexform.search.driver import ROUND_TO, round_to_of
from eexform.search.objectives import Objectives
from tests.cli.support import SEARCH, fine, refused
from tests.cli.test_json import keys, section

COSTS = ("--cost", "macs@p95", "--cost", "0.5*macs+0.5*params")


@pytest.fixture(scope="module")
def three(model: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("three") / "run"
    limits = ("--max", "model_bytes=2x", "--max", "peak_ram_bytes=64KiB", "--constraints", "adaptive")
    done = fine("search", model, *SEARCH, *COSTS, *limits, "--heads-from", run, "--out", out)
    assert "cost: macs@p95, cost 2: 0.5*macs+0.5*params, worst: cost on the dearest path" in done.out
    assert "training heads" not in done.err
    return out


def test_two_costs(three: Path) -> None:
    plain = fine("pareto", three, "--json").json
    first, second = plain["run"]["objectives"]
    assert (first["label"], first["unit"]) == ("macs@p95", "MACs")
    assert (second["label"], second["unit"]) == ("0.5*macs+0.5*params", "x of the original")
    whole = plain["trunk"]["cost"]
    for plan in plain["plans"]:
        figures = plan["select"]
        assert figures["objectives"][0] == figures["percentiles"]["p95"]["macs"]
        shares = [figures["cost"][model] / whole[model] for model in ("macs", "params")]
        assert figures["objectives"][1] == pytest.approx(sum(shares) / 2)
        assert figures["cost"]["model_bytes"] <= 2 * whole["model_bytes"]
        assert plan["worst"]["cost"]["peak_ram_bytes"] <= 65536
    used = set(keys(plain))
    assert used <= section("`search` and `pareto`") | section("`inspect`")


def test_picking_by_the_second(three: Path, tmp_path: Path) -> None:
    plain = fine("pareto", three, "--json").json
    limit = sorted(plan["select"]["objectives"][1] for plan in plain["plans"])[len(plain["plans"]) // 2]
    pick = f"max-cost:0.5*macs+0.5*params={limit}"
    done = fine("export", three, "--pick", pick, "-o", tmp_path / "ee.onnx", "--json").json
    assert done["plan"]["select"]["objectives"][1] <= limit * (1 + 1e-9)
    assert [goal["label"] for goal in done["objectives"]] == ["macs@p95", "0.5*macs+0.5*params"]
    text = fine("export", three, "--pick", pick, "-o", tmp_path / "ee.onnx").out
    assert "% of the model's macs@p95, " in text
    assert "% of the model's 0.5*macs+0.5*params, worst case " in text
    refused(
        *("export", three, "--pick", "max-cost:flops=1x", "-o", tmp_path / "x.onnx"),
        says=["max-cost:flops: no cost of that name was computed"],
    )


def test_a_target(model: Path, run: Path, tmp_path: Path) -> None:
    aim = ("--target", "macs=0.5x", "--target-sided", "one", "--target-blend", "0.1")
    plain = fine("search", model, *SEARCH, *aim, "--heads-from", run, "--out", tmp_path / "run", "--json").json
    (goal,) = plain["run"]["objectives"]
    assert (goal["label"], goal["cost"], goal["sided"]) == ("macs to at most 0.5x", "macs", "one")
    assert goal["target"] == pytest.approx(0.5 * plain["trunk"]["macs"])
    assert plain["run"]["target_blend"] == 0.1
    assert min(plan["select"]["macs"] for plan in plain["plans"]) <= goal["target"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--cost", "mac"), ["no cost model is called 'mac': did you mean 'macs'?"]),
        (("--cost", "macs", "--cost", "params", "--cost", "macs@max"), ["3 objectives beside the error", "--max"]),
        (("--max", "model_bytes=little"), ["max model_bytes=little: 'little' is not a number bytes"]),
        (("--target", "macs"), ["target: 'macs' is not of the form TERM=VALUE"]),
        (("--target-blend", "0.1"), ["--target-sided and --target-blend belong to --target TERM=X"]),
        (("--target", "macs=1", "--target-sided", "both"), ["'both' is neither one- nor two-sided"]),
        (("--constraints", "none"), ["constraints: 'none' does not exist"]),
        (("--penalty", "5"), ["a penalty weight belongs to constraints penalty, not to feasible-first"]),
        (("--round-to", "4"), ["--round-to belongs to --prune"]),
        (("--fits", "no-such-board"), ["no-such-board"]),
    ],
    ids=lambda given: given[-1] if isinstance(given, tuple) else "",
)
def test_what_is_refused(model: Path, tmp_path: Path, given: tuple[str, ...], says: list[str]) -> None:
    refused("search", model, *SEARCH, *given, "--out", tmp_path / "run", says=says)
    assert not (tmp_path / "run").exists()


def test_what_pruning_rounds_to(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, why = round_to_of(Objectives.parse("macs"))
    assert usual == ROUND_TO
    assert why.startswith("the default")
    macs, params = type(make("macs")), type(make("params"))
    monkeypatch.setattr(macs, "channel_block", lambda self: 4)
    assert round_to_of(Objectives.parse("macs")) == (4, "channels that macs computes at once")
    monkeypatch.setattr(params, "channel_block", lambda self: 2)
    assert round_to_of(Objectives.parse(["params", "macs"]))[0] == 4
    assert round_to_of(Objectives.parse("0.5*params+0.5*params@max"))[0] == 2
    trunks = ("--prune", "--trunks", "1", "--trunk-population", "4", "--trunk-generations", "0", "--device", "cpu")
    few = ("--proxy-samples", "64", "--no-exits", "--out")
    done = fine("search", model, *SEARCH, *trunks, *few, tmp_path / "run")
    assert "--round-to 4: channels that macs computes at once" in done.err
    assert '"round_to": 4' in (tmp_path / "run" / "run.json").read_text()
    done = fine("search", model, *SEARCH, *trunks, "--round-to", "3", *few, tmp_path / "given")
    assert "--round-to" not in done.err
    assert '"round_to": 3' in (tmp_path / "given" / "run.json").read_text()
