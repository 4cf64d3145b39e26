"""The run that comes out of fine-tuning: what it holds, what it is compared with, how it goes on."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from eexform import cost_models
from eexform.backends import ort
from eexform.errors import DataError, EexformError, OptionError, RunError
from eexform.heads import HeadSpec
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.passes import make
from eexform.report import tables
from eexform.report.pareto import pareto
from eexform.search.limits import Limits
from eexform.search.run import Run
from eexform.search.space import EXITS
from eexform.search.tuning import split, tuning_of
from eexform.search.variants import bank_of
from eexform.training import TrainOptions, train_bank
from eexform.training.finetune_options import FinetuneOptions
from eexform.training.trainer import trunk_answers
from eexform.verification.verify import verify
from tests import tiny
from tests.search import drop_block
from tests.search.retraining import TUNING, content, tune
from tests.search.running import busiest, facts_of, options, recipe, run_and_check, start

# -- what is trained ---------------------------------------------------------------------------------------------------


def test_what_is_trained_is_the_plan_with_its_normalisation_still_there(done: Run) -> None:
    plan = busiest(done)
    tuning = tuning_of(done, plan)
    assert [node.op for node in tuning.trunk.nodes].count("BatchNormalization") == 4
    assert tuning.left_out == ("fold_batch_norm",)
    assert [(exit_.site, exit_.head) for exit_ in tuning.graph.exits] == [(e.site, e.head) for e in plan.exits]
    plain = tuning_of(done, replace(plan, carry=0.0, recipe=_with(plan.recipe, carry=0.0)))
    deployed = done.materialise(replace(plan, carry=0.0, recipe=_with(plan.recipe, carry=0.0)))
    feeds = tiny.digits(64).bind(done.graph).sample_feeds("test", 16)
    for given in (tuning.graph, plain.graph):
        ours, theirs = ort.run(ort.session(given), feeds), ort.run(ort.session(deployed), feeds)
        assert list(ours) == list(theirs)
        for name, scores in ours.items():
            np.testing.assert_allclose(scores, theirs[name], rtol=1e-3, atol=1e-3)


def macs(graph: Graph) -> float:
    return float(cost_models.make("macs").cost(graph).total)


def _with(steps: Any, **changed: Any) -> Any:
    return tuple((name, {**given, **changed}) if name == EXITS else (name, given) for name, given in steps)


def test_trunk_and_heads_come_apart_as_they_were_put_together(done: Run) -> None:
    tuning = tuning_of(done, busiest(done))
    trunk, store = split(tuning, tuning.graph)
    assert trunk.digest == tuning.trunk.digest == done.graph.digest
    for place, exit_ in enumerate(tuning.graph.exits):
        parameters = store.trained(trunk.digest, exit_.site, exit_.head).parameters
        assert set(parameters) == {name.partition(".")[2] for name in exit_.parameters}
        for name, values in parameters.items():
            np.testing.assert_array_equal(values, tuning.graph.parameters()[f"exit{place}.{name}"])


def test_passes_that_change_answers_are_applied_before_and_the_rest_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with drop_block.registered(monkeypatch):
        old = start(
            tmp_path / "old",
            recipe=recipe(("drop_block", {"count": 1}), ("fold_batch_norm", {}), (EXITS, {"carry": 0.0})),
            options=options(generations=1),
        )
        new = tune(old, tmp_path / "new")
    assert [step.name for step in new.recipe.steps] == ["fold_batch_norm", EXITS]
    assert new.recipe.steps[1].given["carry"] == 0.0
    assert [node.op for node in new.graph.nodes].count("BatchNormalization") == 3
    # the whole model, not the one with a block less, is still what plans are compared with
    assert new.original.digest == old.graph.digest
    assert new.front.trunk.select == old.front.trunk.select
    assert new.front.trunk.select["macs"] > macs(new.graph)


# -- what the new run holds --------------------------------------------------------------------------------------------


def test_the_old_run_stays_as_it_is(done: Run, before: dict[str, bytes], tuned: Run) -> None:
    assert content(done.folder.path) == before


def test_new_trunk_under_the_old_names(done: Run, tuned: Run) -> None:
    assert tuned.state == "done"
    old, new = done.graph, tuned.graph
    assert new.digest == tuned.facts["trunk_digest"] != old.digest
    assert [node.name for node in new.nodes] == [node.name for node in old.nodes]
    assert new.metadata == old.metadata
    assert not new.exits
    arrays = new.parameters()
    moved = {name for name, values in old.parameters().items() if not np.array_equal(values, arrays[name])}
    assert {"classifier.weight", "block0.norm.mean"} <= moved or len(moved) == len(arrays)


def test_only_the_plans_sites_and_heads_are_searched(done: Run, tuned: Run) -> None:
    allowed = {(exit_.site, exit_.head) for exit_ in busiest(done).exits}
    found = {(exit_.site, exit_.head) for plan in tuned.front for exit_ in plan.exits}
    assert found <= allowed
    assert found
    bank = tuned.bank(_folded(tuned))
    assert set(bank.records) == allowed


def _folded(run: Run) -> Graph:
    return make("fold_batch_norm")(run.graph).graph


def test_same_splits(done: Run, tuned: Run) -> None:
    for name in ("splits.npz", "data.json"):
        assert (tuned.folder.path / name).read_bytes() == (done.folder.path / name).read_bytes()
    assert tuned.facts["data_digest"] == done.facts["data_digest"]


def test_everything_is_compared_with_the_model_of_the_first_search(done: Run, tuned: Run) -> None:
    assert tuned.original.digest == done.graph.digest
    assert tuned.front.trunk.select == done.front.trunk.select
    assert tuned.front.trunk.test == done.front.trunk.test
    assert tuned.facts["trunk"] == done.facts["trunk"]
    own = tuned.facts["tuned_trunk"]["accuracy"]
    assert own != tuned.facts["trunk"]["accuracy"]
    plain = pareto(tuned)
    assert plain["trunk"] == pareto(done)["trunk"]
    assert plain["tuned"]["accuracy_select"] == own["select"]
    assert plain["tuned"]["strategy"] == "joint"
    assert pareto(done)["tuned"] is None
    alone = [plan for plan in tuned.front if not plan.exits]
    assert all(plan.select["accuracy"] == own["select"] for plan in alone)
    judged = tuned.front.trunk.select["judged"]
    for points in (-2.0, -5.0):
        plan = tuned.front.pick(f"min-accuracy={points}")
        assert plan.select["judged"] >= judged + points / 100 - 1e-6
    shown = _text(tables.pareto(plain))
    assert "fine-tuned (joint, 2 epochs" in shown
    assert f"{100 * own['select']:.2f} % on select" in shown
    assert "fine-tuned" not in _text(tables.pareto(pareto(done)))


def _text(renderable: Any) -> str:
    console = Console(width=200, file=io.StringIO())
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_facts_say_where_it_came_from(done: Run, tuned: Run) -> None:
    came = facts_of(tuned.folder.path)["trained_from"]
    plan = busiest(done)
    assert came["trunk_digest"] == done.facts["trunk_digest"]
    assert came["plan"] == plan.index
    assert came["recipe"] == plan.to_json()["recipe"]
    assert (came["strategy"], came["options"]) == ("joint", TUNING.settled(labelled=True, gated=False).to_json())
    finished = facts_of(tuned.folder.path)["finetuned"]
    assert finished["epochs"] == 2
    assert finished["seconds"] > 0
    assert finished["device"].startswith("cpu")
    history = [json.loads(line) for line in (tuned.folder.finetune / "history.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in history][-1] == 2


def test_predicted_is_realised_and_verified_against_the_trained_trunk(done: Run, tuned: Run, tmp_path: Path) -> None:
    plan = busiest(tuned)
    data = tiny.digits(1797).bind(tuned.graph)
    for split_name in ("select", "test"):
        run_and_check(plan, data, split_name)
    target = tmp_path / "ee.onnx"
    plan.export(target)
    assert verify(target, tuned.graph, data, samples=64).ok
    assert not verify(target, done.graph, data, samples=64).ok


def test_given_heads_are_scored_and_calibrated_as_they_are(done: Run, tmp_path: Path) -> None:
    folded = _folded(done)
    old = done.bank(folded)
    sites = [site for site in find_sites(folded).sites if site.value in old.sites(folded.digest)]
    heads = {site.value: [HeadSpec.parse(text) for text in old.heads(folded.digest, site.value)] for site in sites}
    given = {pair: old.trained(folded.digest, *pair).parameters for pair in old.records}
    left = sites[0].value, str(heads[sites[0].value][0])
    del given[left]
    data = tiny.digits(1797).bind(folded)
    bank = bank_of(tmp_path, folded.digest, origin="", data_digest=data.digest, train_digest="other")
    brief = TrainOptions(epochs=1, batch_size=64)
    report = train_bank(folded, data, sites, heads, bank, brief, threads=1, trained=given)
    assert (report.trained, report.reused) == (1, len(given))
    assert set(bank.records) == set(old.records)
    for pair, record in bank.records.items():
        same = record.digest == old.records[pair].digest
        assert same == (pair != left)
        if same:
            assert record.order == old.records[pair].order
            assert record.temperature == pytest.approx(old.records[pair].temperature, rel=1e-3)
            assert record.loss == pytest.approx(old.records[pair].loss, rel=1e-3)
            np.testing.assert_allclose(bank.scores(*pair, "test"), old.scores(*pair, "test"), rtol=1e-4, atol=1e-5)


# -- other ways to train -----------------------------------------------------------------------------------------------


def test_frozen_leaves_the_trunk_as_it_is(done: Run, tmp_path: Path) -> None:
    new = tune(done, tmp_path / "new", options=replace(TUNING, strategy="frozen", epochs=1))
    assert new.graph.digest == done.graph.digest
    assert new.facts["tuned_trunk"] == new.facts["trunk"] == done.facts["trunk"]
    old, bank = done.bank(_folded(done)), new.bank(_folded(new))
    assert all(record.digest != old.records[pair].digest for pair, record in bank.records.items())


def test_training_what_was_trained(done: Run, tuned: Run, tmp_path: Path) -> None:
    before = content(tuned.folder.path)
    again = tune(tuned, tmp_path / "again", options=replace(TUNING, epochs=1, seed=1))
    assert content(tuned.folder.path) == before
    assert again.original.digest == done.graph.digest
    assert again.front.trunk.select == done.front.trunk.select
    assert again.trained_from["earlier"] == tuned.trained_from
    assert again.trained_from["trunk_digest"] == tuned.facts["trunk_digest"] != again.facts["trunk_digest"]


def test_without_labels_the_original_answers_count(tmp_path: Path) -> None:
    data = tiny.digits(1797, labels="none")
    old = start(tmp_path / "old", data=data, options=options(generations=1))
    new = tune(old, tmp_path / "new")
    assert new.trained_from["options"]["losses"] == ["distill:weight=1,temperature=2"]
    answers = trunk_answers(old.graph, data.bind(old.graph), TrainOptions(), threads=1)
    for split_name, expected in answers.items():
        np.testing.assert_array_equal(new.bank(_folded(new)).labels(split_name), expected)
    assert new.front.trunk.select["accuracy"] == 1.0
    assert new.facts["tuned_trunk"]["accuracy"]["select"] < 1.0
    assert new.materialise(busiest(new)).exits
    with pytest.raises(OptionError, match=r"cross_entropy.*labels"):
        tune(old, tmp_path / "other", options=replace(TUNING, losses=("cross_entropy",)))
    assert not (tmp_path / "other").exists()


def test_gates_are_trained_on(tmp_path: Path) -> None:
    old = start(tmp_path / "old", options=options(heads=("none/avg/gate",), generations=1))
    plan = busiest(old)
    assert TUNING.settled(labelled=False, gated=True).losses == ("distill:weight=1,temperature=2", "confidence_bce")
    for measure in ("gate", "stick"):  # thresholds are on the scale of the plan's measure
        other = replace(plan, exits=tuple(replace(exit_, measure=measure) for exit_ in plan.exits))
        assert {exit_.measure for exit_ in tuning_of(old, other).graph.exits} == {measure}
    watch = tiny.Watch("fine-tuning", after=1)
    with pytest.raises(KeyboardInterrupt):
        tune(old, tmp_path / "untaught", options=replace(TUNING, losses=("cross_entropy",)), progress=watch)
    assert any("no term of the loss trains the gates" in line for line in watch.said)
    watch = tiny.Watch()
    new = tune(old, tmp_path / "new", generations=1, progress=watch)
    assert not any("no term of the loss trains the gates" in line for line in watch.said)
    assert new.trained_from["options"]["losses"][-1] == "confidence_bce"
    assert {exit_.head for one in new.front for exit_ in one.exits} == {"none/avg/gate"}
    before, after = old.bank(_folded(old)), new.bank(_folded(new))
    for exit_ in plan.exits:
        left, right = (bank.trained(bank.trunk_digest, exit_.site, exit_.head).parameters for bank in (before, after))
        assert not np.array_equal(left["gate.weight"], right["gate.weight"])
    run_and_check(busiest(new), tiny.digits(1797).bind(new.graph), "test")


def test_limits_are_against_the_original(done: Run, tmp_path: Path) -> None:
    new = tune(done, tmp_path / "new", limits=Limits(max_cost="0.9x"), options=replace(TUNING, epochs=1))
    whole = done.front.trunk.select["cost"]["macs"]
    assert all(plan.select["macs"] <= 0.9 * whole for plan in new.front)
    assert len(new.front)
    with pytest.raises(OptionError, match=r"no plan keeps the limits.*--resume"):
        tune(done, tmp_path / "none", limits=Limits(min_accuracy="1"), options=replace(TUNING, epochs=1))
    loosened = tune(done, tmp_path / "none", limits=Limits(), options=replace(TUNING, epochs=1), resume=True)
    assert loosened.state == "done"


# -- refused before anything is done -----------------------------------------------------------------------------------


def test_refused(done: Run, tmp_path: Path, copy: Path) -> None:
    out = tmp_path / "new"
    with pytest.raises(RunError, match="holds a run already"):
        tune(done, copy)
    with pytest.raises(RunError, match="lies in the run that is trained from"):
        tune(copy, copy / "inside")
    with pytest.raises(OptionError, match="there is no plan 999"):
        tune(done, out, pick="999")
    with pytest.raises(OptionError, match="nothing to train for exits"):
        tuning_of(done, replace(busiest(done), exits=()))
    with pytest.raises(OptionError, match="device 'tpu9' cannot be used here"):
        tune(done, out, device="tpu9")
    with pytest.raises(DataError, match="data has changed"):
        tune(done, out, data=tiny.digits(1700).source)
    with pytest.raises(DataError, match="came from Python"):
        tune(done, out, data=None)
    with pytest.raises(OptionError, match="population: 10"):
        tune(done, out, population=10)
    with pytest.raises(OptionError, match="'cross_entrpy'"):
        tune(done, out, options=FinetuneOptions(losses=("cross_entrpy",)))
    with pytest.raises(OptionError, match=r"confidence_bce.*gate"):
        tune(done, out, options=replace(TUNING, losses=("cross_entropy", "confidence_bce")))
    with pytest.raises(EexformError, match="max-cost: 'cheap' is not a number"):
        tune(done, out, limits=Limits(max_cost="cheap"))
    assert not out.exists()


def test_sites_that_only_a_pass_made(done: Run) -> None:
    plan = busiest(done)
    renamed = replace(plan, exits=(replace(plan.exits[0], site="renamed"), *plan.exits[1:]))
    with pytest.raises(RunError, match="'renamed', which is no site of the trunk before fold_batch_norm"):
        tuning_of(done, renamed)


def test_it_says_what_it_will_do(done: Run, tmp_path: Path) -> None:
    watch = tiny.Watch("fine-tuning", after=1)
    with pytest.raises(KeyboardInterrupt):
        tune(done, tmp_path / "run", progress=watch)
    said = "\n".join(watch.said)
    plan = busiest(done)
    assert f"plan {plan.index} of {done.folder.path}: exits at {plan.exits[0].site} ({plan.exits[0].head})" in said
    assert "strategy joint, 2 epochs of 719 samples, sgd; loss: cross_entropy + distill:weight=0.5" in said
    assert "on cpu, float32" in said
    assert "applied again after training, not before: fold_batch_norm" in said
