"""Out to torch and back: to_torch, write_back and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import fx, nn

import eexform as ee
from eexform.backends import ort
from eexform.backends.lower_multi import lower_multi
from eexform.backends.metadata import TRUNK
from eexform.errors import ModelError
from eexform.ir.exit_nodes import head_digest
from eexform.ir.kinds import TIED
from tests.backends.test_fx_nesting import Builder, Small, batch, exported
from tests.lowering import nets


def trained(graph: ee.Graph, steps: int = 3) -> nn.Module:
    module = ee.to_torch(graph).train()
    optimiser = torch.optim.SGD(module.parameters(), 0.05)
    call = module.all_exits if graph.exits else lambda x: (module(x),)
    shape = [size if isinstance(size, int) else 6 for size in graph.gs.inputs[0].shape]
    for step in range(steps):
        optimiser.zero_grad()
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        sum(scores.square().mean() for scores in call(x)).backward()
        optimiser.step()
    return module.eval()


def test_without_exits_it_is_the_fx_module_in_evaluation_mode():
    original = Small().eval()
    module = ee.to_torch(exported(original))
    assert isinstance(module, fx.GraphModule)
    assert not module.training
    torch.testing.assert_close(module(batch()), original(batch()))


def test_a_plan_is_materialised():
    class Plan:
        def materialise(self, *, lean: bool = True) -> ee.Graph:
            return nets.with_exits("resnet", 2)

    assert len(ee.to_torch(Plan()).thresholds) == 2


@pytest.mark.parametrize("as_state_dict", [False, True])
def test_what_was_trained_returns_and_is_what_onnxruntime_runs(as_state_dict):
    graph = nets.with_exits("resnet", 2)
    module = trained(graph)
    before = graph.digest
    written = ee.write_back(graph, module.state_dict() if as_state_dict else module)
    assert written.digest != before
    assert graph.digest == ee.Graph(graph.gs, exits=graph.exits, scores=graph.scores).digest == before
    name = graph.inputs[0]
    x = np.random.default_rng(0).normal(size=(5, *graph.gs.inputs[0].shape[1:])).astype(np.float32)
    found = list(ort.run(ort.session(lower_multi(written)), {name: x}).values())
    *exits, final = module.all_exits(torch.from_numpy(x))
    for mine, theirs in zip(found, [final, *exits], strict=True):
        np.testing.assert_allclose(mine, theirs.detach().numpy(), atol=1e-4, rtol=1e-4)
    for item, old in zip(written.exits, graph.exits, strict=True):
        arrays = {key: written.parameters()[key] for key in item.parameters}
        assert item.digest == head_digest(arrays) != old.digest
    assert TRUNK in graph.metadata
    assert TRUNK not in written.metadata


def test_heads_alone_leave_the_trunks_digest():
    graph = nets.with_exits("resnet", 2)
    module = ee.to_torch(graph)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("exit0."):
                parameter += 1
    written = ee.write_back(graph, module)
    assert written.metadata[TRUNK] == graph.metadata[TRUNK]
    assert written.exits[0].digest != graph.exits[0].digest
    assert written.exits[1] == graph.exits[1]
    assert ee.write_back(graph, ee.to_torch(graph)).digest == graph.digest


def test_from_the_module_that_the_graph_was_loaded_from():
    original = Small()
    graph = exported(original)
    other = Small()
    other(batch())  # moves the running statistics
    wrapped = {f"module.{name}": tensor for name, tensor in other.state_dict().items()}
    for source in (other, other.state_dict(), wrapped):
        written = ee.write_back(graph, source)
        torch.testing.assert_close(ee.to_torch(written)(batch()), other.eval()(batch()))
        other.train()


def test_names_that_are_no_path_and_tensors_that_are_not_used_return_from_the_original():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("x y", nn.Linear(4, 4))
            self.last = nn.Linear(4, 3)
            self.auxiliary = nn.Linear(4, 2)

        def forward(self, x):
            return self.last(torch.relu(self._modules["x y"](x)))

    original, x = Odd(), torch.randn(3, 4)
    graph = ee.load(original, (x,))
    with pytest.raises(ModelError, match=r"does not have auxiliary.bias, auxiliary.weight \(strict=False leaves"):
        ee.write_back(graph, original)
    other = Odd().eval()
    torch.testing.assert_close(ee.to_torch(ee.write_back(graph, other, strict=False))(x), other(x))


def test_a_linear_layer_whose_weight_is_computed():
    original = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(3, 4)
    module = ee.to_torch(ee.load(original, (x,)))
    torch.testing.assert_close(module(x), original(x))
    assert {name for name, _ in module.named_parameters()} == {name for name, _ in original.named_parameters()}


def test_what_does_not_fit_is_named():
    graph, state = exported(Small()), Small().state_dict()
    cases = {
        "missing are fc.bias": {name: tensor for name, tensor in state.items() if name != "fc.bias"},
        "missing are layer1.0.1.running_var": {k: v for k, v in state.items() if k != "layer1.0.1.running_var"},
        "does not have more.weight": {**state, "more.weight": torch.ones(2)},
        r"'fc.bias': the graph has shape \[5\], the module \[6\]": {**state, "fc.bias": torch.ones(6)},
        "'shift' holds NaN": {**state, "shift": torch.full((4, 1, 1), torch.nan)},
    }
    for message, wrong in cases.items():
        with pytest.raises(ModelError, match=message):
            ee.write_back(graph, wrong)
    assert ee.write_back(graph, cases["does not have more.weight"], strict=False).digest != graph.digest
    with pytest.raises(ModelError, match="missing are"):
        ee.write_back(nets.with_exits("resnet", 2), ee.to_torch(graph))


def test_aliases_must_agree():
    weight = np.eye(4, dtype=np.float32)
    builder = Builder({"embed.weight": weight}, ["N", 4]).add("Gemm", "embed.weight", transB=1)
    graph = builder.graph(**{TIED: json.dumps({"proj.weight": "embed.weight"})})
    double = torch.eye(4) * 2
    for state in (
        {"proj.weight": double},
        {"embed.weight": double},
        dict.fromkeys(("proj.weight", "embed.weight"), double),
    ):
        np.testing.assert_array_equal(ee.write_back(graph, state).parameters()["embed.weight"], double.numpy())
    with pytest.raises(ModelError, match="are one tensor in the graph, but differ"):
        ee.write_back(graph, {"proj.weight": double, "embed.weight": torch.eye(4)})


def test_numbers_come_from_a_module_or_a_state_dict():
    with pytest.raises(ModelError, match="takes a module or a state dict, found int"):
        ee.write_back(exported(Small().eval()), 5)
