"""Fine-tuning: that it learns, stops and keeps the best, and that what comes back is what was trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eexform.backends import ort
from eexform.errors import OptionError
from eexform.frontends.onnx import from_model
from eexform.progress import Silent
from eexform.training import finetune as module
from eexform.training.finetune_options import FinetuneOptions
from eexform.training.finetune_parts import assess
from eexform.training.network import Arithmetic, Network
from tests import tiny, zoo
from tests.training import multi_exit
from tests.training.multi_exit import flat, gated, same, tune

CPU = Arithmetic(torch.device("cpu"), None, channels_last=True)
GATED = ("cross_entropy", "stick_breaking", "confidence_bce", "expected_cost:limit=0.5", "support")


@pytest.mark.parametrize(
    "optimiser", [{"optimiser": "sgd"}, {"optimiser": "adamw", "learning_rate": 0.03, "trunk_learning_rate": 3e-3}]
)
def test_loss_falls_and_accuracy_rises(optimiser: dict[str, Any], tmp_path: Path) -> None:
    report = tune(tmp_path, flat(), epochs=6, **optimiser)
    losses = [sum(entry["losses"].values()) for entry in report.history[1:]]
    assert losses[-1] < 0.9 * losses[0]
    first, last = report.history[0]["calibrate"]["accuracy"], report.history[-1]["calibrate"]["accuracy"]
    assert last[1] > first[1] + 0.2
    assert last[-1] > 0.85


def test_gates_learn_where_nothing_is_said_of_the_loss(tmp_path: Path) -> None:
    for name, graph in (("gates", gated()), ("none", flat())):
        report = tune(tmp_path / name, graph, epochs=1)
        assert ("confidence_bce" in report.history[-1]["losses"]) == (name == "gates")


@pytest.mark.parametrize("measure", ["gate", "stick"])
def test_gates_learn(measure: str, tmp_path: Path) -> None:
    graph = gated(measure)
    report = tune(tmp_path, graph, epochs=4, losses=GATED)
    assert set(report.history[-1]["losses"]) == {text.partition(":")[0] for text in GATED}
    assert not same(report.graph, graph, ["exit0.gate.weight"])
    assert not same(report.graph, graph, ["exit1.gate.bias"])
    alone: dict[str, Any] = {"strategy": "frozen", "losses": ("confidence_bce",), "learning_rate": 0.3}
    learned = tune(tmp_path / "alone", report.graph, epochs=6, **alone)
    first, last = (learned.history[epoch]["losses"]["confidence_bce"] for epoch in (1, 6))
    assert last < first


@pytest.mark.parametrize("carry", [0.0, 0.5])
@pytest.mark.parametrize("softness", [0, 0.2])
def test_survivors_and_self_distillation(softness: float, carry: float, tmp_path: Path) -> None:
    losses = (f"survivors:softness={softness}", "distill:teacher=final", "distill")
    report = tune(tmp_path, flat(carry=carry), losses=losses)
    assert set(report.history[-1]["losses"]) == {"survivors", "distill", "distill#2"}
    assert report.history[-1]["losses"]["survivors"] < report.history[1]["losses"]["survivors"]


def test_without_labels_the_trunk_teaches(tmp_path: Path) -> None:
    graph = flat()
    data = tiny.digits(600, labels="none").bind(graph)
    watch = tiny.Watch()
    report = tune(tmp_path, graph, data=data, losses=("distill",), epochs=3, progress=watch)
    assert report.history[0]["calibrate"]["accuracy"][-1] == 1.0  # it agrees with itself
    assert report.history[-1]["losses"]["distill"] < report.history[1]["losses"]["distill"]
    assert "agreement with the original trunk" in watch.said[-1]
    with pytest.raises(OptionError, match="'cross_entropy' needs labels, and the data set has none"):
        tune(tmp_path / "other", graph, data=data, losses=("cross_entropy",))
    settled = tune(tmp_path / "settled", graph, data=data, epochs=1)  # nothing named: what can be learnt from
    assert list(settled.history[-1]["losses"]) == ["distill"]


def test_without_labels_gates_learn_where_their_exit_is_right(tmp_path: Path) -> None:
    graph = gated()
    data = tiny.digits(600, labels="none").bind(graph)
    report = tune(tmp_path, graph, data=data, losses=("distill", "confidence_bce"))
    for place in range(2):
        assert not same(report.graph, graph, [f"exit{place}.gate.weight"])


def test_blended_samples(tmp_path: Path) -> None:
    graph = flat()
    data = tiny.digits(600).with_augment("mixup:0.4").bind(graph)
    report = tune(tmp_path, graph, data=data, losses=("cross_entropy:exits=linear", "distill", "survivors"))
    assert all(math.isfinite(value) for entry in report.history for value in entry["losses"].values())


def test_probabilities(tmp_path: Path) -> None:
    graph = flat(tiny.trained(probabilities=True))
    report = tune(tmp_path, graph, epochs=3)
    losses = [sum(entry["losses"].values()) for entry in report.history[1:]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["resnet", "convnext", "mobilenet", "vit"])
def test_zoo(name: str, tmp_path: Path) -> None:
    trunk = from_model(zoo.build(name))
    heads = ("none/mean",) if name == "vit" else ("conv:1x8/avg",)
    graph = flat(trunk, heads=heads, last=True)
    data = multi_exit.patterns(graph, zoo.CLASSES)
    report = tune(tmp_path, graph, data=data, epochs=4, learning_rate=0.02, trunk_learning_rate=0.01)
    losses = [sum(entry["losses"].values()) for entry in report.history[1:]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", ["plain", "average", "gates", "carry", "probabilities"])
def test_what_comes_back_is_what_was_trained(kind: str, tmp_path: Path) -> None:
    graph = {
        "plain": flat,
        "average": flat,
        "gates": lambda: gated("stick"),
        "carry": lambda: flat(carry=0.5),
        "probabilities": lambda: flat(tiny.trained(probabilities=True)),
    }[kind]()
    options = FinetuneOptions(**{**multi_exit.QUICK, "ema": 0.5 if kind == "average" else 0.0, "optimiser": "adamw"})
    data = tiny.digits(300).bind(graph)
    training = module._Training(graph, data, options, tmp_path, None, Silent(), "cpu")
    report = training.run()
    feeds = data.sample_feeds("test", 60)
    session = ort.session(report.graph)
    found = ort.run(session, feeds)
    training.network.module.eval()
    with torch.inference_mode():
        outputs = training.network([torch.from_numpy(feeds["image"])])
    names = [*(item.logits for item in graph.exits), graph.final]
    for name, scores in zip(names, outputs.logits, strict=True):
        expected = scores.exp() if graph.scores == "probabilities" else scores
        np.testing.assert_allclose(found[name], expected.numpy(), rtol=1e-5, atol=1e-5)
    for item, learned in zip(graph.exits, outputs.learned, strict=True):
        if learned is not None:
            np.testing.assert_allclose(found[item.confidence], learned.numpy(), rtol=1e-5, atol=1e-5)
    other = ort.run(ort.session(graph), feeds)  # planted: the untrained graph does not pass for it
    assert not np.allclose(other[names[0]], found[names[0]], atol=1e-3)


@pytest.mark.parametrize("amp", ["bfloat16", "off"])
def test_parameters_stay_in_single_precision(amp: str, tmp_path: Path) -> None:
    report = tune(tmp_path, flat(), amp=amp, epochs=3)
    assert ("bfloat16" in report.device) == (amp == "bfloat16")
    assert {array.dtype for array in report.graph.parameters().values()} == {np.dtype(np.float32)}
    losses = [sum(entry["losses"].values()) for entry in report.history[1:]]
    assert losses[-1] < losses[0]


def test_a_sample_left_over_is_left_out(tmp_path: Path) -> None:
    graph = flat()
    data = tiny.digits(300).bind(graph)
    size = data.size("head_train")
    watch = tiny.Watch()
    report = tune(tmp_path, graph, data=data, batch_size=size - 1, epochs=1, progress=watch)
    assert watch.steps["fine-tuning"] == 1
    assert math.isfinite(report.history[-1]["calibrate"]["loss"])


def test_training_stops_when_nothing_improves(tmp_path: Path) -> None:
    options: dict[str, Any] = {"learning_rate": 1e-30, "strategy": "frozen", "epochs": 9, "patience": 2}
    report = tune(tmp_path, flat(heads=("none/avg", "none/avg")), **options)
    assert (report.epochs, report.best_epoch) == (3, 1)


def test_patience_does_not_end_the_heads_phase(tmp_path: Path) -> None:
    options: dict[str, Any] = {"learning_rate": 1e-30, "trunk_learning_rate": 1e-30, "patience": 1}
    graph = flat(heads=("none/avg", "none/avg"))
    report = tune(tmp_path, graph, strategy="heads-then-joint", epochs=5, head_epochs=3, **options)
    assert report.epochs > 3


def test_the_best_epoch_comes_back(tmp_path: Path) -> None:
    # the second half undoes the first: the rates only rise
    report = tune(tmp_path, flat(), epochs=4, schedule="constant", warmup=0.99, learning_rate=30.0, clip=0)
    losses = [entry["calibrate"]["loss"] for entry in report.history[1:]]
    assert report.best_epoch == int(np.argmin(losses)) + 1 < 4
    data = tiny.digits(600).bind(report.graph)
    labels = data.labels_of("calibrate")
    assert labels is not None
    again = assess(Network(report.graph, CPU), data, labels, 32)
    assert again.nll.mean() == pytest.approx(min(losses), rel=1e-4)


def test_history_and_words(tmp_path: Path) -> None:
    watch = tiny.Watch()
    report = tune(tmp_path, flat(), progress=watch)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines == list(report.history)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert watch.said[0].startswith("fine-tuning (joint): 2 heads with")
    assert "on cpu, float32" in watch.said[0]
    assert watch.said[1].startswith("before training: accuracy on calibrate: exit 0 ")
    assert watch.said[2].startswith("epoch 1/2, trunk and heads: loss ")
    assert "cross_entropy" in watch.said[2]
    assert "final" in watch.said[2]
