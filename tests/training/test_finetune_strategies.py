"""Fine-tuning: what each strategy moves, and where its heads begin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eexform.heads import HeadSpec, head_graph
from eexform.ir.exit_nodes import head_digest
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.passes import PassContext, make
from eexform.progress import Silent
from eexform.training.finetune_heads import trunk_of, with_new_heads
from eexform.training.finetune_parts import Teacher
from eexform.training.network import Arithmetic, Network
from eexform.training.student import head_seed
from tests import tiny
from tests.training.multi_exit import flat, head_names, same, trunk_names, tune

CPU = Arithmetic(torch.device("cpu"), None, channels_last=True)
GATED = ("cross_entropy", "stick_breaking", "confidence_bce", "expected_cost:limit=0.5", "support")


def test_frozen_leaves_the_trunk_as_it_was(tmp_path: Path) -> None:
    graph = flat()
    report = tune(tmp_path, graph, strategy="frozen")
    assert same(report.graph, graph, trunk_names(graph))  # statistics of the normalisation included
    assert trunk_of(report.graph).digest == trunk_of(graph).digest
    for item in graph.exits:
        assert not same(report.graph, graph, item.parameters)
    assert report.history[0]["calibrate"]["accuracy"][-1] == report.history[-1]["calibrate"]["accuracy"][-1]


def test_joint_moves_trunk_and_heads(tmp_path: Path) -> None:
    graph = flat()
    report = tune(tmp_path, graph)
    unmoved = [name for name in graph.parameters() if same(report.graph, graph, [name])]
    assert not unmoved
    assert report.graph.outputs == graph.outputs
    before, after = report.history[0]["calibrate"]["nll"], report.history[-1]["calibrate"]["nll"]
    assert all(new < old for new, old in zip(after[:-1], before[:-1], strict=True))


def test_every_exit_says_what_its_head_is_now(tmp_path: Path) -> None:
    report = tune(tmp_path, flat(), epochs=1)
    for item in report.graph.exits:
        arrays = {name: report.graph.parameters()[name] for name in item.parameters}
        assert item.digest == head_digest(arrays)


def near(left: Graph, right: Graph, names: list[str]) -> bool:
    """Whether parameters are the same but for steps of next to no size."""
    one, two = left.parameters(), right.parameters()
    return all(np.allclose(one[name], two[name], rtol=1e-6, atol=1e-20) for name in names)


@pytest.mark.parametrize("strategy", ["mixed", "heads-then-joint"])
def test_heads_start_anew(strategy: str, tmp_path: Path) -> None:
    trained = tune(tmp_path / "first", flat(), epochs=1).graph
    still: dict[str, Any] = {"learning_rate": 1e-30, "trunk_learning_rate": 1e-30, "epochs": 2, "head_epochs": 1}
    report = tune(tmp_path / "second", trained, strategy=strategy, **still)
    fresh = with_new_heads(trained, seed=0)
    weights = [name for name in head_names(trained) if "running" not in name]
    assert near(report.graph, fresh, weights)
    assert not near(report.graph, trained, weights)
    assert near(report.graph, trained, [name for name in trunk_names(trained) if "running" not in name])
    kept = tune(tmp_path / "third", trained, **still)
    assert near(kept.graph, trained, weights)


def test_new_heads_begin_as_the_banks_do() -> None:
    graph = flat()
    fresh = with_new_heads(graph, seed=3).parameters()
    for place, item in enumerate(graph.exits):
        site, spec = find_sites(tiny.trained()).site(item.site), HeadSpec.parse(item.head)
        expected = head_graph(spec, site, num_classes=10, seed=head_seed(3, item.site, spec)).parameters()
        assert {f"exit{place}.{name}" for name in expected} == set(item.parameters)
        for name, array in expected.items():
            np.testing.assert_array_equal(fresh[f"exit{place}.{name}"], array)
    assert same(with_new_heads(graph, seed=3), graph, trunk_names(graph))
    assert not same(with_new_heads(graph, seed=4), with_new_heads(graph, seed=3), ["exit0.classifier.weight"])


def test_heads_then_joint_moves_the_trunk_in_the_second_phase(tmp_path: Path) -> None:
    graph = flat()
    watch = tiny.Watch()
    report = tune(tmp_path, graph, strategy="heads-then-joint", epochs=3, head_epochs=1, progress=watch)
    phases = [entry["phase"] for entry in report.history]
    assert phases == ["before training", "heads", "trunk and heads", "trunk and heads"]
    assert [len(entry["learning_rates"]) for entry in report.history] == [0, 2, 4, 4]
    final = [entry["calibrate"]["nll"][-1] for entry in report.history]
    assert final[0] == final[1] != final[2]
    assert "heads" in watch.said[2]


def test_the_frozen_trunk_gets_no_gradient_and_its_statistics_rest() -> None:
    graph = flat()
    network = Network(graph, CPU)
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 1, 8, 8)).astype(np.float32))
    for heads_only in (True, False):
        before = network.state()
        network.train(heads_only=heads_only)
        sum(scores.square().mean() for scores in network([image]).logits).backward()  # type: ignore[union-attr]
        assert all((parameter.grad is None) == heads_only for _, parameter in network.trunk)
        assert all(parameter.grad is not None for _, parameter in network.heads)
        moved = {name for name, value in network.state().items() if not torch.equal(value, before[name])}
        assert any("exit" in name for name in moved)
        assert all("exit" in name for name in moved) == heads_only


@pytest.mark.parametrize("strategy", ["frozen", "joint"])
def test_a_frozen_trunk_is_its_own_teacher(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    answer = Teacher.__call__

    def counted(self: Teacher, feeds: Any) -> torch.Tensor:
        asked.append(len(feeds[0]))
        return answer(self, feeds)

    monkeypatch.setattr(Teacher, "__call__", counted)
    losses = ("cross_entropy", "distill")
    given = tune(tmp_path / "given", flat(), strategy=strategy, losses=losses, teacher=tiny.trained())
    assert bool(asked) == (strategy == "joint")
    asked.clear()
    other = tune(tmp_path / "other", flat(), strategy=strategy, losses=losses, teacher=tiny.trained(epochs=2))
    assert asked
    assert given.history[1]["losses"]["distill"] != other.history[1]["losses"]["distill"]


def test_heads_start_anew_where_others_were_dropped() -> None:
    graph = flat()
    rest = make("drop_idle_exits")(graph, PassContext(exit_rates=(0.0, 1.0, 0.0))).graph
    assert [item.site for item in rest.exits] == [graph.exits[1].site]
    assert same(with_new_heads(rest, seed=3), with_new_heads(graph, seed=3), rest.exits[0].parameters)


@pytest.mark.parametrize(("rest", "steps"), [(0, 2), (7, 2), (8, 3)])
def test_a_small_rest_is_left_out(rest: int, steps: int, tmp_path: Path) -> None:
    """A rest counts from a quarter of a batch of 32 on."""
    said: list[str] = []

    class Listening(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    graph = flat()
    data = tiny.digits(600).bind(graph)
    chosen = replace(data.splits.head_train, indices=data.splits.head_train.indices[: 64 + rest])
    few = replace(data, splits=replace(data.splits, head_train=chosen))
    tune(tmp_path, graph, data=few, epochs=1, progress=Listening())
    assert any(f"epochs of {steps} steps" in line for line in said), said


def test_it_is_said_where_training_made_things_worse(tmp_path: Path) -> None:
    said: list[str] = []

    class Listening(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    start = tune(tmp_path / "good", flat(), epochs=3, progress=Listening()).graph
    assert not any("made it worse" in line for line in said)
    wild = {"learning_rate": 2.0, "trunk_learning_rate": 2.0, "epochs": 1}
    tune(tmp_path / "bad", start, progress=Listening(), **wild)
    assert any("training made it worse" in line for line in said)
