"""Recipes with fixed parameters, passes of third parties, and passes behind the exits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eexform.backends import ort
from eexform.cost_models import make
from eexform.errors import OptionError
from eexform.report.apply import apply
from eexform.search.limits import Limits
from eexform.search.run import Run
from tests import tiny
from tests.search.drop_block import registered
from tests.search.running import busiest, front_of, options, recipe, run_and_check, start


def test_recipe_with_fixed_sites_and_thresholds(tmp_path: Path, sites: list[str]) -> None:
    """Sites that the spread over the cost would not have picked are trained all the same."""
    given = {"sites": [sites[0], sites[2]], "thresholds": {sites[0]: 0.7, sites[2]: "always"}, "measure": "margin"}
    steps = recipe(("fold_batch_norm", {}), ("insert_exits", given))
    run = start(tmp_path / "run", recipe=steps, options=options(max_sites=1))
    assert len(run.front) >= 1
    data = tiny.digits(1797).bind(run.graph)
    for plan in run.front:
        assert [(exit_.site, exit_.measure, exit_.threshold) for exit_ in plan.exits] == [
            (sites[0], "margin", float(np.float32(0.7))),
            (sites[2], "margin", -math.inf),
        ]
        graph = run_and_check(plan, data, "select")
        run.save_plan(plan, tmp_path / "plan.toml")
        assert apply(tiny.trained(), tmp_path / "plan.toml").graph.digest == graph.digest


def test_recipe_with_fixed_heads_and_carry(tmp_path: Path, sites: list[str]) -> None:
    heads = {sites[1]: "none/avg", sites[2]: "mlp:1x8/avg"}
    given = {"heads": heads, "carry": 0.5, "final_temperature": 20.0}
    run = start(tmp_path / "run", recipe=recipe(("insert_exits", given)))
    found = {(exit_.site, exit_.head) for plan in run.front for exit_ in plan.exits}
    assert found <= set(heads.items())
    assert {plan.carry for plan in run.front if plan.exits} == {0.5}
    data = tiny.digits(1797).bind(run.graph)
    for plan in filter(lambda plan: plan.exits, run.front):
        for split in ("select", "test"):
            run_and_check(plan, data, split)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([("fold_batch_norm", {})], "needs the pass 'insert_exits' exactly once, found 0 times"),
        ([("insert_exits", {}), ("insert_exits", {})], "exactly once, found 2 times"),
        ([("insert_exits", {"untrained": True})], "a search is about trained heads"),
        ([("insert_exits", {}), ("lower", {})], "leave 'lower' out"),
        ([("insert_exits", {"sites": []})], "gives insert_exits no sites"),
        ([("insert_exits", {"sites": ["scores"]})], "'scores' is no site"),
        ([("insert_exits", {"sites": ["block0.conv_relu_out"], "heads": {}})], "heads, but none for the site"),
    ],
)
def test_recipes_that_cannot_be_searched(tmp_path: Path, steps: list[Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        start(tmp_path / "run", recipe=recipe(*steps))
    assert not (tmp_path / "run").exists()


def test_passes_behind_insert_exits_are_part_of_the_prediction(done: Run, tmp_path: Path) -> None:
    """What drop_idle_exits drops is dropped from the plan: scored without it, and replayed without rates."""
    steps = (("fold_batch_norm", {}), ("insert_exits", {"carry": 0.0}), ("drop_idle_exits", {}))
    run = start(tmp_path / "run", recipe=recipe(*steps), options=options(generations=0))
    data = tiny.digits(1797).bind(run.graph)
    for plan in run.front:
        assert [exit_.site for exit_ in plan.materialise().exits] == [exit_.site for exit_ in plan.exits]
        if plan.exits:
            assert all(rate > 0 for rate in plan.select["rates"][:-1])
            graph = run_and_check(plan, data, "select")
            run.save_plan(plan, tmp_path / "plan.toml")
            assert apply(tiny.trained(), tmp_path / "plan.toml").graph.digest == graph.digest


def test_settling_drops_an_idle_exit(done: Run, sites: list[str], tmp_path: Path) -> None:
    """An exit that nobody takes, planted."""
    given = {
        "sites": [sites[0], sites[2]],
        "heads": dict.fromkeys([sites[0], sites[2]], "none/avg"),
        "thresholds": {sites[0]: "never", sites[2]: 0.0},
        "measure": "max_prob",
        "carry": 0.0,
    }
    steps = (("fold_batch_norm", {}), ("insert_exits", given), ("drop_idle_exits", {}))
    run = start(tmp_path / "run", recipe=recipe(*steps))
    (plan,) = run.front
    assert [exit_.site for exit_ in plan.exits] == sites[2:]
    assert [name for name, _ in plan.recipe] == ["fold_batch_norm", "insert_exits"]
    assert len(plan.select["rates"]) == 2


def test_a_third_partys_pass_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with registered(monkeypatch):
        steps = (("drop_block", {}), ("fold_batch_norm", {}), ("insert_exits", {}))
        # only the shorter trunk has a dearest path this cheap
        run = start(tmp_path / "run", recipe=recipe(*steps), limits=Limits(max_worst="0.9x"))
        with_heads = {path.parent for path in run.folder.bank.glob("*/heads/*.safetensors")}
        assert len(with_heads) == 2
        assert len(run.front) >= 2
        data = tiny.digits(1797).bind(run.graph)
        for plan in run.front:
            assert dict(plan.recipe)["drop_block"] == {"count": 1}
            graph = run_and_check(plan, data, "test") if plan.exits else plan.materialise()
            assert sum(node.op == "Conv" and not node.name.startswith("exit") for node in graph.nodes) == 3
        plan = busiest(run)
        run.save_plan(plan, tmp_path / "plan.toml")
        assert apply(run.graph, tmp_path / "plan.toml").graph.digest == plan.materialise().digest
        assert run.front.trunk.select["macs"] > max(plan.worst["macs"] for plan in run.front)


def test_variants_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with registered(monkeypatch):
        steps = recipe(("drop_block", {}), ("insert_exits", {}))
        straight = start(tmp_path / "straight", recipe=steps)
        start(tmp_path / "run", recipe=steps, progress=tiny.Watch("searching", after=2))
        start(tmp_path / "run", recipe=steps, resume=True)
        assert front_of(tmp_path / "run") == front_of(straight.folder.path)
        assert {dict(plan.recipe).get("drop_block", {"count": 0})["count"] for plan in straight.front} <= {0, 1}


def test_a_site_that_a_variant_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sites: list[str]) -> None:
    """Without the last block its site is gone; plans there are scored and built without that exit."""
    with registered(monkeypatch):
        named = options(sites=tuple(sites), heads=("none/avg",), generations=2)
        steps = recipe(("drop_block", {}), ("insert_exits", {"carry": 0.0}))
        run = start(tmp_path / "run", recipe=steps, options=named, limits=Limits(max_worst="0.95x"))
        assert len(run.front) >= 2
        for plan in run.front:
            if "drop_block" in dict(plan.recipe):
                assert sites[-1] not in {exit_.site for exit_ in plan.exits}
            assert tuple(exit_.site for exit_ in plan.materialise().exits) == tuple(e.site for e in plan.exits)


def test_tunables_without_a_default_and_passes_that_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan is its recipe: whatever the search's seed, its trunk is made again from the recipe alone."""
    with registered(monkeypatch):
        run = start(tmp_path / "run", recipe=recipe(("undecided", {}), ("insert_exits", {})), options=options(seed=5))
        plan = max((plan for plan in run.front if "undecided" in dict(plan.recipe)), key=lambda plan: len(plan.exits))
        assert dict(plan.recipe)["undecided"] == {"count": 1}
        run.save_plan(plan, tmp_path / "plan.toml")
        assert apply(run.graph, tmp_path / "plan.toml").graph.digest == plan.materialise().digest
        assert run.front.trunk.materialise().digest == run.graph.digest


def test_plans_are_compared_with_the_model_that_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with what a pass has made of it before the first exit."""
    with registered(monkeypatch):
        steps = recipe(("drop_block", {"count": 1}), ("insert_exits", {}))
        run = start(tmp_path / "run", recipe=steps, limits=Limits(max_cost="0.8x"))
        assert run.front.trunk.select["macs"] == make("macs").cost(run.graph).total
        (batch,) = tiny.digits(1797).bind(run.graph).batches("select", 1000)
        right = ort.run(ort.session(run.graph), batch.feeds)[run.graph.final].argmax(axis=1) == batch.labels
        assert run.front.trunk.select["accuracy"] == run.facts["trunk"]["accuracy"]["select"] == right.mean()
        assert run.front.trunk.materialise().digest == run.graph.digest
        assert all(plan.select["macs"] <= 0.8 * run.front.trunk.select["macs"] for plan in run.front)
