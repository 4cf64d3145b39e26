"""Fine-tuning: what each strategy moves, that it learns, that what comes back is what was trained, and refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eexform.backends import ort
from eexform.backends.fx import raise_to_fx
from eexform.errors import DataError, EexformError, ModelError, OptionError
from eexform.frontends.onnx import from_model
from eexform.heads import HeadSpec, head_graph, with_parameters
from eexform.ir.exit_nodes import head_digest
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.progress import Silent
from eexform.training import finetune as module
from eexform.training import network as network_module
from eexform.training.finetune_heads import trunk_of, with_new_heads
from eexform.training.finetune_options import FinetuneOptions
from eexform.training.finetune_parts import Teacher, assess, optimiser_for, schedule_for
from eexform.training.network import Arithmetic, Network
from eexform.training.objectives import parse
from eexform.training.student import head_seed
from tests import tiny, zoo
from tests.training import multi_exit
from tests.training.multi_exit import flat, gated, head_names, same, trunk_names, tune

CPU = Arithmetic(torch.device("cpu"), None, channels_last=True)
GATED = ("cross_entropy", "stick_breaking", "confidence_bce", "expected_cost:limit=0.5", "support")


# -- strategies --------------------------------------------------------------------------------------------------------


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


def test_decay_is_for_weights_alone() -> None:
    network, options = Network(flat(), CPU), FinetuneOptions(weight_decay=0.1, learning_rate=0.3)
    groups = list(network.groups(options, heads_only=False))
    assert [group["lr"] for group in groups] == [0.02, 0.02, 0.3, 0.3]
    for group in groups:
        assert all((tensor.ndim > 1) == (group["weight_decay"] > 0) for tensor in group["params"])
    count = sum(len(group["params"]) for group in groups)
    assert count == len([p for p in network.module.parameters() if p.requires_grad])


# -- learning ----------------------------------------------------------------------------------------------------------


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
        tune(tmp_path / "other", graph, data=data)


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


# -- parts -------------------------------------------------------------------------------------------------------------


def rates(options: FinetuneOptions, steps: int, done: int = 0) -> list[float]:
    """Learning rate of the heads at every step from ``done`` on."""
    optimiser = optimiser_for(Network(flat(), CPU), options, heads_only=True)
    schedule = schedule_for(optimiser, options, steps, done)
    found = []
    for _ in range(done, steps):
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    return found


@pytest.mark.parametrize("kind", ["one-cycle", "cosine", "linear", "constant"])
def test_schedules(kind: str) -> None:
    options = FinetuneOptions(schedule=kind, warmup=0.25, learning_rate=0.4)
    whole = rates(options, 40)
    assert whole[0] == pytest.approx(0.02)
    assert whole[10] == pytest.approx(0.4, rel=1e-2)
    assert max(whole) == pytest.approx(0.4, rel=1e-2)
    assert whole[:10] == sorted(whole[:10])
    assert whole[10:] == sorted(whole[10:], reverse=True)
    end = whole[-1]
    assert end == pytest.approx(0.4) if kind == "constant" else 0 < end < 0.02
    for done in (1, 10, 11, 25):
        assert rates(options, 40, done) == whole[done:]


def test_the_average_follows() -> None:
    network = Network(flat(), CPU, ema=0.75)
    name, parameter = network.heads[0]
    start = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(2.0)
    network.follow()
    first = 2 / 11 * start + 9 / 11 * 2.0  # the first steps average over few
    torch.testing.assert_close(network.state(averaged=True)[name], first)
    network.updates = 1000
    network.follow()
    torch.testing.assert_close(network.state(averaged=True)[name], 0.75 * first + 0.25 * 2.0)
    assert torch.equal(network.state()[name], torch.full_like(start, 2.0))


@pytest.mark.parametrize("half", [None, torch.bfloat16])
@pytest.mark.parametrize("probabilities", [False, True])
def test_the_teacher_answers_as_the_trunk(half: torch.dtype | None, probabilities: bool) -> None:
    trunk = tiny.trained(probabilities=probabilities)
    feeds = tiny.digits(50).bind(trunk).sample_feeds("test", 20)
    teacher = Teacher(trunk, Arithmetic(torch.device("cpu"), half, channels_last=half is not None))
    scores = teacher([CPU.tensor(feeds["image"])])
    expected = ort.run(ort.session(trunk), feeds)[trunk.final]
    found = (scores.exp() if probabilities else scores).numpy()
    np.testing.assert_allclose(
        found, expected, rtol=1e-5 if half is None else 0.02, atol=1e-5 if half is None else 0.15
    )
    assert not scores.requires_grad


def test_judgement() -> None:
    graph = flat()
    data = tiny.digits(300).bind(graph)
    labels = np.zeros(data.size("calibrate"), np.int64)
    found = assess(Network(graph, CPU), data, labels, 32)
    feeds = [data.batch("calibrate", np.arange(len(labels))).feeds["image"]]
    scores = ort.run(ort.session(graph), {"image": feeds[0]})
    for place, name in enumerate([*(item.logits for item in graph.exits), graph.final]):
        assert found.accuracy[place] == pytest.approx((scores[name].argmax(axis=1) == 0).mean())
    assert found.by_class.shape == (2, 10)
    for place in range(2):  # no samples of the others: what is known of the exit
        assert np.all(found.by_class[place] == found.accuracy[place])


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


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_graph_without_exits(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="the graph has no exits: nothing would be trained but the trunk"):
        tune(tmp_path, tiny.trained())


@pytest.mark.parametrize("text", GATED[1:])
def test_gates_are_asked_for(text: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"'{parse(text).name}' needs a learned confidence at every exit"):
        tune(tmp_path, flat(), losses=(text,))


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(EexformError, match=r"epoch \d+.*not finite; lower the learning rates") as caught:
        tune(tmp_path, flat(), learning_rate=1e30, trunk_learning_rate=1e30, clip=0, optimiser="sgd")
    assert "exit" in str(caught.value)


def test_scores_that_are_not_finite_are_named(tmp_path: Path) -> None:
    graph = flat()
    bad = graph.copy()
    bad.constants["exit1.classifier.bias"].values = np.full(10, np.nan, np.float32)
    with pytest.raises(EexformError, match="exit 1 at "):
        tune(tmp_path, bad)


def test_too_little_data(tmp_path: Path) -> None:
    graph = flat()
    data = tiny.digits(300).bind(graph)
    few = data.splits.head_train
    assert len(few) > 2
    object.__setattr__(few, "indices", few.indices[:1])
    with pytest.raises(DataError, match="at least 2 are needed"):
        tune(tmp_path, graph, data=data)


def test_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_module, "raise_to_fx", lambda graph: raise_to_fx(graph).double())
    with pytest.raises(ModelError, match="a network is trained in float32"):
        Network(flat(), CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "thawed"}, "strategy: 'thawed' is not a choice"),
        ({"schedule": "steps"}, "schedule"),
        ({"optimiser": "lion"}, "optimiser"),
        ({"amp": "fp8"}, "amp"),
        ({"epochs": 0}, "epochs: 0 must be at least 1"),
        ({"strategy": "heads-then-joint", "epochs": 2, "head_epochs": 2}, "head_epochs: 2 must be"),
        ({"batch_size": 1}, "batch_size: 1"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"trunk_learning_rate": -1.0}, "trunk_learning_rate"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"warmup": 1.0}, "warmup"),
        ({"clip": -1.0}, "clip"),
        ({"ema": 1.0}, "ema"),
        ({"patience": -1}, "patience"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"seed": -1}, "seed"),
        ({"losses": ()}, "losses: expected a list"),
        ({"losses": "distill"}, "losses: expected a list"),
        ({"losses": ("hinge",)}, "no loss is called 'hinge'"),
        ({"exit_weights": "some"}, "neither uniform, linear or cost"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        FinetuneOptions(**options)


def test_options_survive_json() -> None:
    options = FinetuneOptions(losses=("distill:weight=2",), exit_weights="1/0/2")
    again = FinetuneOptions.from_json(json.loads(json.dumps(options.to_json())))
    assert again == options
    assert again.digest == options.digest != FinetuneOptions().digest
    with pytest.raises(OptionError, match=r"\['depth'\] are not known"):
        FinetuneOptions.from_json({"depth": 2})


def test_exit_weights_that_do_not_fit_the_graph(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="expected 3 numbers, the final exit's last, found 2"):
        tune(tmp_path, flat(), exit_weights="1/2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there() -> None:
    graph: Graph = flat()
    with pytest.raises(OptionError, match="device 'cuda' cannot be used here"):
        Arithmetic.choose(graph, "cuda", "auto")
    with pytest.raises(OptionError, match="float16 needs a CUDA device"):
        Arithmetic.choose(graph, "cpu", "float16")
    assert Arithmetic.choose(graph, "auto", "off") == CPU


def test_heads_that_were_rewritten_cannot_start_anew() -> None:
    graph = flat()
    first, *others = graph.exits
    cut = graph.replace(exits=[type(first)(**{**vars(first), "parameters": first.parameters[1:]}), *others])
    with pytest.raises(EexformError, match="it cannot start anew"):
        with_new_heads(cut, 0)
    assert with_parameters(cut, {}).exits == cut.exits
