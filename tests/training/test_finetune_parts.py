"""Parts of fine-tuning: schedules, averages, the teacher, the judgement on held-out samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eexform.backends import ort
from eexform.training.finetune_options import SCHEDULES, FinetuneOptions
from eexform.training.finetune_parts import Teacher, assess, optimiser_for, schedule_for
from eexform.training.losses import balanced_bce
from eexform.training.network import Arithmetic, Network
from tests import tiny
from tests.training.multi_exit import flat, gated

CPU = Arithmetic(torch.device("cpu"), None, channels_last=True)
GATED = ("cross_entropy", "stick_breaking", "confidence_bce", "expected_cost:limit=0.5", "support")


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


@pytest.mark.parametrize("kind", SCHEDULES)
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


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2])
def test_schedules_of_hardly_any_step(kind: str, steps: int) -> None:
    found = rates(FinetuneOptions(schedule=kind, learning_rate=0.4), steps)
    assert len(found) == steps
    assert all(0 < rate <= 0.4 for rate in found)


def test_decay_is_for_weights_alone() -> None:
    network, options = Network(flat(), CPU), FinetuneOptions(weight_decay=0.1, learning_rate=0.3)
    groups = list(network.groups(options, heads_only=False))
    assert [group["lr"] for group in groups] == [0.02, 0.02, 0.3, 0.3]
    for group in groups:
        assert all((tensor.ndim > 1) == (group["weight_decay"] > 0) for tensor in group["params"])
    count = sum(len(group["params"]) for group in groups)
    assert count == len([p for p in network.module.parameters() if p.requires_grad])


def test_scales_with_axes_of_one_are_not_decayed() -> None:
    scale = torch.nn.Parameter(torch.ones(6, 1, 1))
    row = torch.nn.Parameter(torch.ones(1, 6))
    network, options = Network(flat(), CPU), FinetuneOptions(weight_decay=0.1)
    module = network.module
    module.scale, module.layer = scale, torch.nn.Linear(6, 1)
    module.layer.weight = row
    with module.graph.inserting_before():
        module.graph.get_attr("scale")
    network.trunk += [("scale", scale), ("layer.weight", row)]
    decayed = {
        id(p): group["weight_decay"] > 0 for group in network.groups(options, heads_only=False) for p in group["params"]
    }
    assert not decayed[id(scale)]
    assert decayed[id(row)]  # the weight of one output is still one


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_gates_that_are_sure_still_learn_in_half_precision(ema: float) -> None:
    half = Arithmetic(torch.device("cpu"), torch.bfloat16, channels_last=True)
    network = Network(gated("stick"), half, ema=ema)
    parameters = dict(network.heads)
    with torch.no_grad():
        for place in range(2):
            parameters[f"exit{place}.gate.weight"].zero_()
            parameters[f"exit{place}.gate.bias"].fill_(9.0)  # a sigmoid in bfloat16 is 1 there, and has no slope
    network.train(heads_only=False)
    gates = network([torch.zeros(4, 1, 8, 8)]).gates
    for gate in gates:
        assert gate is not None
        assert gate.dtype == torch.float32
        torch.testing.assert_close(gate.detach(), torch.full((4,), 9.0).sigmoid())
        balanced_bce(gate, torch.zeros(4)).backward(retain_graph=True)
    for place in range(2):
        slope = parameters[f"exit{place}.gate.bias"].grad
        assert slope is not None
        assert slope.item() == pytest.approx(1, rel=0.02)


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
