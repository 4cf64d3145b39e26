"""What a search predicts is what the exported network does, to the sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import eexform as ee
from eexform.backends import ort
from eexform.backends.lower_multi import lower_multi
from eexform.backends.multi_exit import to_torch
from eexform.errors import ModelError
from eexform.ir import policy
from eexform.report.apply import apply
from eexform.search.run import Run, open_run
from tests import tiny
from tests.search.drop_block import DropBlock, registered
from tests.search.running import busiest, check_realised, chosen, recipe, run_and_check, start


@pytest.mark.parametrize("split", ["select", "test"])
def test_scores_and_rule_realise_the_prediction(done: Run, split: str) -> None:
    data = tiny.digits(1797).bind(done.graph)
    plans = chosen(done)
    assert {bool(plan.carry) for plan in plans} == {True, False}
    for plan in plans:
        run_and_check(plan, data, split)


def test_exported_file_realises_the_prediction(done: Run, tmp_path: Path) -> None:
    data = tiny.digits(1797).bind(done.graph)
    for plan in chosen(done, count=2):
        plan.export(tmp_path / "ee.onnx")
        session = ort.session(tmp_path / "ee.onnx")
        parts = [ort.run(session, batch.feeds) for batch in data.batches("test", 32)]
        index, scores = (np.concatenate([part[name] for part in parts]) for name in ("exit_index", done.graph.final))
        check_realised(plan, plan.materialise(), data, "test", index, scores)


@pytest.mark.parametrize("lean", [True, False])
def test_a_module_realises_the_prediction(done: Run, lean: bool) -> None:
    """As exported, or with normalisation still there to be trained and the original's names."""
    data = tiny.digits(1797).bind(done.graph)
    for plan in chosen(done, count=1):
        module = to_torch(plan.materialise() if lean else plan)
        kept = {name for name in module.state_dict() if not name.startswith("exit")}
        own = set(done.graph.parameters())
        assert (kept >= own) is not lean
        with torch.no_grad():
            parts = [module(*map(torch.from_numpy, batch.feeds.values())) for batch in data.batches("test", 100)]
        index = np.concatenate([part.exit_index.numpy() for part in parts])
        scores = np.concatenate([part.logits.numpy() for part in parts])
        check_realised(plan, plan.materialise(), data, "test", index, scores)


def test_what_a_plan_was_trained_to_is_exported(done: Run, tmp_path: Path) -> None:
    plan = chosen(done, count=1)[0]
    module = to_torch(plan)
    optimiser = torch.optim.SGD(module.parameters(), 0.01)
    feeds = tiny.digits(1797).bind(done.graph).batch("test", np.arange(40)).feeds
    scores = module.train().all_exits(*map(torch.from_numpy, feeds.values()))
    sum(item.logsumexp(dim=1).mean() for item in scores).backward()
    optimiser.step()
    written = ee.write_back(plan, module)
    assert written.digest != plan.materialise(lean=False).digest
    ee.export(written, tmp_path / "ee.onnx")
    found = ort.run(ort.session(tmp_path / "ee.onnx"), feeds)
    with torch.no_grad():
        made = module.eval()(*map(torch.from_numpy, feeds.values()))
    np.testing.assert_array_equal(found["exit_index"], made.exit_index.numpy())
    np.testing.assert_allclose(found[done.graph.final], made.logits.numpy(), atol=1e-4, rtol=1e-4)
    with pytest.raises(ModelError, match=r"write_back takes a graph .* or a plan of a run .*, not Run"):
        ee.write_back(done, module)


def test_probabilities_realise_the_prediction(tmp_path: Path) -> None:
    graph, data = tiny.trained(probabilities=True), tiny.digits(1797)
    run = start(tmp_path / "run", graph=graph)
    assert run.facts["scores"] == "probabilities"
    for plan in chosen(run, count=2):
        plan.export(tmp_path / "ee.onnx")
        session = ort.session(tmp_path / "ee.onnx")
        parts = [ort.run(session, batch.feeds) for batch in data.bind(graph).batches("select", 32)]
        index, scores = (np.concatenate([part[name] for part in parts]) for name in ("exit_index", graph.final))
        np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
        check_realised(plan, plan.materialise(), data.bind(graph), "select", index, scores)


def test_saved_plan_replays_to_the_same_graph(done: Run, tmp_path: Path) -> None:
    for plan in chosen(done, count=1):
        for name in ("plan.toml", "plan.json"):
            done.save_plan(plan, tmp_path / name)
            assert apply(tiny.trained(), tmp_path / name).graph.digest == plan.materialise().digest


def test_run_opened_again_is_the_same(done: Run) -> None:
    again = open_run(done.folder.path)
    assert again.front.to_json() == done.front.to_json()
    assert busiest(again).materialise().digest == busiest(done).materialise().digest
    assert again.graph.digest == tiny.trained().digest
    assert again.dataset(tiny.digits(1797).source).digest == tiny.digits(1797).digest


def test_label_free(tmp_path: Path) -> None:
    out, data = tmp_path / "run", tiny.digits(1797, labels="none")
    run = start(out, data=data)
    assert run.facts["labels"] == "none"
    assert run.front.trunk.select["accuracy"] == run.front.trunk.test["accuracy"] == 1.0
    assert run.facts["memorisation"]["message"].startswith("label-free")
    plan = busiest(run)
    graph, bound = plan.materialise(), data.bind(run.graph)
    (batch,) = bound.batches("test", 1000)
    assert batch.labels is None
    final, *exits = ort.run(ort.session(lower_multi(graph)), batch.feeds).values()
    answers = policy.decide(exits, final, graph.exits, graph.scores).scores.argmax(axis=1)
    trunk = ort.run(ort.session(run.graph), batch.feeds)[run.graph.final].argmax(axis=1)
    assert (answers == trunk).mean() == plan.test["accuracy"]


def test_label_free_means_the_answers_of_the_model_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that spoils the trunk must not be judged by the spoilt trunk's own answers."""
    with registered(monkeypatch):
        data = tiny.digits(1797, labels="none")
        steps = recipe(("drop_block", {"count": 1}), ("insert_exits", {}))
        run = start(tmp_path / "run", data=data, recipe=steps)
        (batch,) = data.bind(run.graph).batches("select", 1000)
        right = ort.run(ort.session(run.graph), batch.feeds)[run.graph.final].argmax(axis=1)
        assert run.front.trunk.select["accuracy"] == 1.0
        spoilt = DropBlock(1)(run.graph).graph
        answers = ort.run(ort.session(spoilt), batch.feeds)[spoilt.final].argmax(axis=1)
        agreement = (answers == right).mean()
        assert agreement < 0.9
        alone = [plan.select["accuracy"] for plan in run.front if not plan.exits]
        assert all(accuracy == agreement for accuracy in alone)
        plan = busiest(run)
        graph = plan.materialise()  # its heads are in the bank that belongs to these answers
        final, *exits = ort.run(ort.session(lower_multi(graph)), batch.feeds).values()
        decided = policy.decide(exits, final, graph.exits, graph.scores)
        assert (decided.scores.argmax(axis=1) == right).mean() == plan.select["accuracy"]
