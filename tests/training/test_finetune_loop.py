"""Fine-tuning: that what is asked for reaches the steps: clipping, rates, averages, smoothing, augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eexform.data.dataset import Dataset
from eexform.training import finetune as module
from eexform.training.finetune_options import FinetuneOptions
from eexform.training.finetune_parts import optimiser_for, schedule_for
from eexform.training.loss_terms import CrossEntropy
from eexform.training.network import Arithmetic, Network
from eexform.training.objectives import ExitBatch
from tests import tiny
from tests.training.multi_exit import flat, gated, same, trunk_names, tune

CPU = Arithmetic(torch.device("cpu"), None, channels_last=True)
STEPS = 8  # of 240 samples for training, 32 a step


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each step of SGD found: rates by group, and the norm of all gradients together."""
    found: list[dict[str, Any]] = []
    step = torch.optim.SGD.step

    def noted(self: torch.optim.SGD, *given: Any) -> Any:
        slopes = [p.grad for group in self.param_groups for p in group["params"]]
        assert all(slope is not None for slope in slopes)
        norm = torch.cat([slope.flatten() for slope in slopes if slope is not None]).norm()
        found.append({"rates": [group["lr"] for group in self.param_groups], "norm": norm.item()})
        return step(self, *given)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    return found


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[ExitBatch]:
    """What the loss was given, step by step."""
    found: list[ExitBatch] = []
    value = CrossEntropy.value

    def noted(self: CrossEntropy, batch: ExitBatch) -> torch.Tensor:
        found.append(batch)
        return value(self, batch)

    monkeypatch.setattr(CrossEntropy, "value", noted)
    return found


def test_the_norm_of_all_gradients_together_is_cut(stepped: list[dict[str, Any]], tmp_path: Path) -> None:
    still: dict[str, Any] = {"learning_rate": 1e-30, "trunk_learning_rate": 1e-30, "epochs": 1}
    tune(tmp_path / "free", flat(), clip=0, **still)
    free = [entry["norm"] for entry in stepped]
    most = float(np.median(free))
    stepped.clear()
    tune(tmp_path / "cut", flat(), clip=most, **still)
    assert [entry["norm"] for entry in stepped] == pytest.approx([min(norm, most) for norm in free], rel=1e-3)


def test_rates_change_with_every_step(stepped: list[dict[str, Any]], tmp_path: Path) -> None:
    options = FinetuneOptions(schedule="one-cycle", warmup=0.25, learning_rate=0.03, trunk_learning_rate=0.01)
    given = {name: getattr(options, name) for name in ("schedule", "warmup", "learning_rate", "trunk_learning_rate")}
    tune(tmp_path, flat(), epochs=2, **given)
    expected, network = [], Network(flat(), CPU)
    for step in range(2 * STEPS):
        optimiser = optimiser_for(network, options, heads_only=False)
        schedule_for(optimiser, options, 2 * STEPS, step)
        expected.append([group["lr"] for group in optimiser.param_groups])
    assert [entry["rates"] for entry in stepped] == expected
    assert len({tuple(rates) for rates in expected}) == 2 * STEPS


def test_momentum_and_decay_reach_the_optimiser() -> None:
    options = FinetuneOptions(momentum=0.7, nesterov=True, weight_decay=0.25)
    for given, looks_ahead in ((options, True), (FinetuneOptions(momentum=0.0), False)):
        optimiser = optimiser_for(Network(flat(), CPU), given, heads_only=False)
        assert {group["momentum"] for group in optimiser.param_groups} == {given.momentum}
        assert {group["nesterov"] for group in optimiser.param_groups} == {looks_ahead}
        assert {group["weight_decay"] for group in optimiser.param_groups} == {0.0, given.weight_decay}
    assert not optimiser_for(Network(flat(), CPU), FinetuneOptions(nesterov=False), heads_only=True).defaults[
        "nesterov"
    ]


def test_the_averages_are_what_is_judged_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decay, states = 0.6, []
    follow = Network.follow

    def noted(self: Network) -> None:
        states.append(self.state())
        follow(self)

    monkeypatch.setattr(Network, "follow", noted)
    graph = flat()
    report = tune(tmp_path, graph, epochs=1, ema=decay)
    average = Network(graph, CPU).state()
    for step, state in enumerate(states, 1):
        share = min(decay, (1 + step) / (10 + step))
        for name, value in state.items():
            average[name] = share * average[name] + (1 - share) * value if value.is_floating_point() else value
    assert len(states) == STEPS
    kept = Network(report.graph, CPU)
    counters = {name for name in average if name.endswith("num_batches_tracked")}  # no parameters of the graph
    for name in average.keys() - counters:
        torch.testing.assert_close(kept.state()[name], average[name], rtol=1e-4, atol=1e-6)
        last = states[-1][name]
        assert not torch.allclose(last, average[name], rtol=1e-4, atol=1e-6) or last.numel() == 0, name
    data = tiny.digits(600).bind(report.graph)
    labels = data.labels_of("calibrate")
    assert labels is not None
    judged = module.assess(kept, data, labels, 32)
    assert judged.accuracy.tolist() == report.history[-1]["calibrate"]["accuracy"]
    assert judged.nll.tolist() == pytest.approx(report.history[-1]["calibrate"]["nll"], rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema": 0.5},
        {"amp": "bfloat16"},
        {"optimiser": "adamw", "weight_decay": 0.3, "learning_rate": 0.01},
        {"losses": ("cross_entropy", "stick_breaking", "confidence_bce", "support", "survivors")},
    ],
)
def test_a_frozen_trunk_stays_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    graph = gated("stick")
    report = tune(tmp_path, graph, strategy="frozen", **options)
    assert same(report.graph, graph, trunk_names(graph))
    for item in graph.exits:
        assert not same(report.graph, graph, item.parameters)


def test_smoothing_and_weights_reach_the_loss(looked: list[ExitBatch], tmp_path: Path) -> None:
    tune(tmp_path / "given", flat(), epochs=1, label_smoothing=0.3, exit_weights="0.5/0/2")
    assert {batch.smoothing for batch in looked} == {0.3}
    assert {tuple(batch.weights.tolist()) for batch in looked} == {(0.5, 0.0, 2.0)}
    looked.clear()
    tune(tmp_path / "cost", flat(), epochs=1, exit_weights="cost")
    costs = looked[0].path_costs
    assert costs[-1] > 1  # the heads that were passed are paid for
    torch.testing.assert_close(looked[0].weights, 3 * costs / costs.sum())


def test_support_is_measured_before_every_epoch(
    looked: list[ExitBatch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = []
    assess = module.assess

    def noted(*given: Any) -> Any:
        judged.append(assess(*given))
        return judged[-1]

    monkeypatch.setattr(module, "assess", noted)
    tune(tmp_path, gated(), epochs=3, losses=("cross_entropy", "support"))
    assert len(judged) == 4
    assert len(looked) == 3 * STEPS
    for step, batch in enumerate(looked):
        assert batch.support is not None
        expected = torch.tensor(judged[step // STEPS].by_class, dtype=torch.float32)
        torch.testing.assert_close(batch.support, expected)
    assert not np.array_equal(judged[0].by_class, judged[2].by_class)


def test_only_training_samples_are_augmented_and_only_two_splits_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[tuple[str, bool]] = set()
    batch = Dataset.batch

    def noted(self: Dataset, split: str, positions: Any, **given: Any) -> Any:
        asked.add((split, given.get("augment", False)))
        return batch(self, split, positions, **given)

    monkeypatch.setattr(Dataset, "batch", noted)
    graph = gated()
    data = tiny.digits(600).with_augment("crop:1,flip").bind(graph)
    tune(tmp_path, graph, data=data, losses=("cross_entropy", "survivors", "support", "distill"))
    assert asked == {("head_train", True), ("calibrate", False)}


def test_another_rest_is_left_out_each_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []
    look = module._Training._look

    def noted(self: Any, batch: Any, **given: Any) -> Any:
        seen.append(batch.positions)
        return look(self, batch, **given)

    monkeypatch.setattr(module._Training, "_look", noted)
    graph = flat()
    data = tiny.digits(600).bind(graph)
    size = data.size("head_train")
    rest = size % 47
    assert 0 < rest < 47 // 4
    tune(tmp_path, graph, data=data, batch_size=47, epochs=2)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    left = [set(range(size)) - set(np.concatenate(part).tolist()) for part in (first, second)]
    assert [len(part) for part in left] == [rest, rest]
    assert left[0] != left[1]
