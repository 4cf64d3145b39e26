"""Verification of programs and modules in memory: what eexform makes passes, and every planted fault is found."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import eexform as ee
from eexform.backends.multi_exit import MultiExitModule
from eexform.backends.torch_export import lower_torch, packed, unpacked
from eexform.errors import DataError, ModelError, OptionError
from eexform.verification import programs
from eexform.verification.simulate import simulate
from eexform.verification.verify import Report
from tests import zoo
from tests.lowering import nets

SAMPLES = 40


@cache
def ready(name: str = "resnet", count: int = 2):
    graph = nets.with_exits(name, count)
    return nets.set_thresholds(graph, nets.spread(nets.scores(name, count, SAMPLES)))


@cache
def program(name: str = "resnet"):
    return unpacked(packed(lower_torch(ready(name)), ready(name)))


def feeds(name: str = "resnet"):
    return zoo.feeds(name, SAMPLES, seed=3)


def failed(report: Report) -> set[str]:
    return {item.name for item in report.checks if not item.ok}


@pytest.mark.parametrize("form", ["module", "torch"])
def test_what_is_made_passes(form):
    made = ee.to_torch(ready()) if form == "module" else program()
    before = made.thresholds if isinstance(made, MultiExitModule) else str(made.graph_module.code)
    told: list[tuple[str, int, int]] = []
    report = ee.verify(made, ready(), feeds(), progress=lambda *said: told.append(said))
    assert report.ok, failed(report)
    assert (report.form, report.samples) == (form, SAMPLES)
    names = [item.name for item in report.checks]
    assert {"parameters", "decisions at batch 7", "mixed batches", "forced to exit 1", "skipped work"} <= set(names)
    assert told == [(name, place, len(names)) for place, name in enumerate(names)]
    after = made.thresholds if isinstance(made, MultiExitModule) else str(made.graph_module.code)
    assert before == after
    text = [module.code for module in program().graph_module.modules() if hasattr(module, "code")]
    assert not any("inf" in code for code in text), "the program itself was put under other thresholds"


def test_modules_in_training_mode_and_a_split_of_feeds():
    module = ee.to_torch(ready()).train()
    report = ee.verify(module, ready(), feeds(), samples=5)
    assert report.ok
    assert report.samples == 5
    assert module.training


@pytest.mark.parametrize("form", ["module", "torch"])
def test_other_thresholds_and_parameters_are_found(form):
    made = ee.to_torch(ready()) if form == "module" else program()
    other = nets.set_thresholds(ready(), [0.25, 0.5])
    report = ee.verify(made, other, feeds())
    assert "thresholds" in failed(report)
    assert "decisions at batch 32" in failed(report)
    assert "mixed batches" not in failed(report), "under the same thresholds it is the same network"
    trained = ee.to_torch(ready())
    with torch.no_grad():
        next(trained.parameters()).mul_(1.5)
    graph = ee.write_back(ready(), trained)
    report = ee.verify(made, graph, feeds())
    assert {"parameters", "mixed batches"} <= failed(report)
    assert ee.verify(trained, graph, feeds()).ok
    report = ee.verify(made, nets.with_exits("resnet", 3), feeds())
    assert failed(report) == {"exits"}


def test_work_for_everybody_is_found(monkeypatch):
    def everything(self, *inputs):
        self.all_exits(*inputs)
        return forward(self, *inputs)

    forward = MultiExitModule.forward
    monkeypatch.setattr(MultiExitModule, "forward", everything)
    report = ee.verify(ee.to_torch(ready()), ready(), feeds())
    assert failed(report) == {"skipped work"}
    assert "a sample that leaves at exit 0 costs" in report.checks[-1].detail


def test_a_little_that_an_exit_does_not_need_is_found(monkeypatch):
    def early(self, *inputs):
        """As if the way to the next exit were begun before it is known who goes there."""
        found = forward(self, *inputs)
        if bool((found.exit_index == 0).all()):
            torch.mm(torch.ones(1, 1), torch.ones(1, 1))
        return found

    forward = MultiExitModule.forward
    monkeypatch.setattr(MultiExitModule, "forward", early)
    report = ee.verify(ee.to_torch(ready()), ready(), feeds())
    assert failed(report) == {"skipped work"}
    assert "leaves at exit 0 costs 1.00 times what the way there needs" in report.checks[-1].detail


@pytest.mark.parametrize(
    ("name", "made"), [("resnet", {"measure": "gate"}), ("vit", {"measure": "stick"}), ("resnet", {"carry": 0.5})]
)
def test_gates_and_carried_scores(name, made):
    graph = nets.with_exits(name, 2, **made)
    graph = nets.set_thresholds(graph, nets.spread(simulate(graph, feeds(name))))
    for form in (ee.to_torch(graph), unpacked(packed(lower_torch(graph), graph))):
        report = ee.verify(form, graph, feeds(name))
        assert report.ok, [item for item in report.checks if not item.ok]


def test_rows_that_are_computed_further_are_found(monkeypatch):
    def masked(self, *inputs):
        """Decides like the module, but every sample goes as far as the last one."""
        scores, index, confidence = [], [], []
        for row in range(len(inputs[0])):
            one = original(self, *(value[row : row + 1] for value in inputs))
            scores.append(one.logits)
            index.append(one.exit_index)
            confidence.append(one.confidence)
        deepest = int(torch.cat(index).max())
        kept, self.thresholds = self.thresholds, (np.inf,) * deepest + (-np.inf,) * (len(self.thresholds) - deepest)
        original(self, *inputs)
        self.thresholds = kept
        return type(one)(torch.cat(scores), torch.cat(index), torch.cat(confidence))

    original = MultiExitModule.forward
    monkeypatch.setattr(MultiExitModule, "forward", masked)
    assert failed(ee.verify(ee.to_torch(ready()), ready(), feeds())) == {"skipped work"}


@pytest.mark.parametrize(("off", "passes"), [(6e-6, True), (6e-5, False)])
def test_rounding_of_another_runtime_is_no_fault(off, passes, monkeypatch):
    """A confidence as near to the threshold as torch and onnxruntime differ, and one that is not."""
    graph = nets.with_exits("resnet", 1)
    confidence = np.sort(simulate(graph, feeds()).confidences()[0].astype(np.float64))
    place = 1 + int(np.diff(confidence)[1:].argmax())  # it alone is near
    graph = nets.set_thresholds(graph, [confidence[place] + off / 2])
    placed = programs._Module.place
    monkeypatch.setattr(programs._Module, "place", lambda self, given: placed(self, [value - off for value in given]))
    report = ee.verify(ee.to_torch(graph), graph, feeds())
    assert report.ok is passes
    assert report.near_ties == (1 if passes else 0)
    if not passes:
        assert any("1 of 40 samples leave elsewhere" in item.detail for item in report.checks)


def test_what_cannot_be_verified_is_said():
    with pytest.raises(OptionError, match="this graph has no exits"):
        ee.verify(ee.to_torch(ready()), nets.trunk("resnet"), feeds())
    with pytest.raises(OptionError, match="found str"):
        ee.verify(ee.to_torch(ready()), "model.onnx", feeds())  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"a module with exits that to_torch made, not Linear"):
        ee.verify(nn.Linear(2, 2), ready(), feeds())  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"not its \.module\(\)"):
        ee.verify(program().module(), ready(), feeds())  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"data: expected a data set .* found str"):
        ee.verify(ee.to_torch(ready()), ready(), "data.npz")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="inputs are"):
        ee.verify(ee.to_torch(ready()), ready(), {"other": np.zeros((2, 3, 16, 16), np.float32)})
    other = torch.export.export(nn.Linear(2, 2), (torch.zeros(3, 2),))
    assert failed(ee.verify(other, ready(), feeds())) == {"exits"}
    broken = ee.to_torch(ready()).double()
    report = ee.verify(broken, ready(), feeds())
    assert "decisions at batch 1" in failed(report)
    assert any("cannot run a batch of 1" in item.detail for item in report.checks)
