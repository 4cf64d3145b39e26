"""Distilling plans of a run: with exits, and smaller networks that have none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eexform.backends import ort
from eexform.errors import OptionError
from eexform.search.run import open_run
from eexform.training.finetune_options import FinetuneOptions, losses_of
from tests import tiny
from tests.search.pruning import prune, pruned, trunks
from tests.search.retraining import tune

OPTIONS = FinetuneOptions(strategy="distill", epochs=2, batch_size=64, trunk_learning_rate=0.05, amp="off")


def test_a_plan_without_exits(tmp_path: Path) -> None:
    source = prune(tmp_path / "run", trunks=trunks(exits=False, epochs=0))
    plan = pruned(source)[0]
    before = plan.materialise()
    made = tune(source, tmp_path / "new", pick=str(plan.index), options=OPTIONS)
    assert made.state == "done"
    assert made.facts["trained_from"]["options"]["losses"] == list(losses_of("distill"))
    (found,) = made.front.plans
    assert found.exits == ()
    graph = found.materialise()
    assert {node.name for node in graph.nodes} == {node.name for node in before.nodes}
    assert graph.digest != before.digest
    assert found.select["macs"] == pytest.approx(plan.select["macs"])
    feeds = made.dataset(tiny.digits(1797).source).bind(graph).sample_feeds("test", 8)
    assert ort.run(ort.session(graph), feeds)[graph.final].shape == (8, 10)
    assert open_run(tmp_path / "new").front.plans == made.front.plans
    with pytest.raises(OptionError, match="is about heads, and the graph has no exits"):
        tune(
            source,
            tmp_path / "other",
            pick=str(plan.index),
            options=FinetuneOptions(strategy="frozen", epochs=2, amp="off"),
        )
    assert not (tmp_path / "other").exists()


def test_a_plan_with_exits_learns_from_the_original(tmp_path: Path) -> None:
    source = prune(tmp_path / "run", trunks=trunks(epochs=0))
    plan = pruned(source)[0]
    assert plan.exits
    made = tune(source, tmp_path / "new", pick=str(plan.index), options=OPTIONS)
    assert {exit_.site for found in made.front.plans for exit_ in found.exits} <= {exit_.site for exit_ in plan.exits}
    lines = (tmp_path / "new" / "finetune" / "history.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert set(last["losses"]) == {"distill", "cross_entropy"}
    assert len(last["calibrate"]["agreement"]) == len(plan.exits) + 1
