"""State-dict keys of a raised module are the names of the graph's constants; shared things stay shared."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from torch import nn

from eexform.backends.fx import fx_parameters, raise_to_fx
from eexform.ir.graph import Graph
from eexform.ir.kinds import KINDS, TIED, with_kinds


class Small(nn.Module):
    """What the graph of :func:`exported` was exported from."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)))
        self.shift = nn.Parameter(torch.randn(4, 1, 1))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.layer1(x) + self.shift).mean((2, 3)))


class Builder:
    """Nodes one after the other, each on the output of the one before."""

    def __init__(self, arrays: dict[str, np.ndarray], shape: list) -> None:
        self.constants = {name: gs.Constant(name, array) for name, array in arrays.items()}
        self.source = gs.Variable("x", np.float32, shape)
        self.nodes: list[gs.Node] = []
        self.value = self.source

    def add(self, op: str, *names: str, **attrs) -> Builder:
        out = gs.Variable(f"v{len(self.nodes)}", np.float32)
        inputs = [self.value, *(self.constants[name] for name in names)]
        self.nodes.append(gs.Node(op, name=f"node{len(self.nodes)}", attrs=attrs, inputs=inputs, outputs=[out]))
        self.value = out
        return self

    def graph(self, **metadata: str) -> Graph:
        plain = gs.Graph(nodes=self.nodes, inputs=[self.source], outputs=[self.value], opset=20)
        return Graph(plain, metadata=metadata)


def exported(module: Small) -> Graph:
    arrays = {name: tensor.detach().numpy().copy() for name, tensor in module.state_dict().items()}
    statistics = [f"layer1.0.1.{name}" for name in ("weight", "bias", "running_mean", "running_var")]
    builder = Builder({**arrays, "axes": np.array([2, 3])}, ["N", 3, 8, 8])
    builder.add("Conv", "layer1.0.0.weight", pads=[1, 1, 1, 1])
    for node in builder.nodes:  # the rank is taken from types
        node.outputs[0].shape = ["N", 4, 8, 8]
    builder.add("BatchNormalization", *statistics, momentum=0.9).add("Add", "shift").add("Relu")
    return builder.add("ReduceMean", "axes", keepdims=0).add("Gemm", "fc.weight", "fc.bias", transB=1).graph()


def batch(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_keys_are_those_of_the_module():
    original = Small()
    module = raise_to_fx(exported(original))
    assert set(module.state_dict()) - {"axes"} == set(original.state_dict())
    assert {name for name, _ in module.named_parameters()} == {name for name, _ in original.named_parameters()}
    assert type(module.get_submodule("layer1.0.0")) is nn.Conv2d
    assert type(module.get_submodule("layer1.0.1")) is nn.BatchNorm2d
    assert type(module.fc) is nn.Linear
    other = Small()
    module.load_state_dict(other.state_dict(), strict=False)
    torch.testing.assert_close(module.eval()(batch()), other.eval()(batch()))


def test_it_trains_like_the_module_and_leaves_the_graph_alone():
    original = Small()
    graph = exported(original)
    before = {name: array.copy() for name, array in graph.parameters().items()}
    module = raise_to_fx(graph)
    for each in (original, module):
        optimiser = torch.optim.SGD(each.parameters(), 0.1, momentum=0.9)
        for step in range(3):
            optimiser.zero_grad()
            each(batch(step)).square().sum().backward()
            optimiser.step()
    state = module.state_dict()
    for name, expected in original.state_dict().items():
        torch.testing.assert_close(state[name], expected, rtol=1e-5, atol=1e-6)
    assert state["layer1.0.1.num_batches_tracked"] == 3
    torch.testing.assert_close(module.eval()(batch(9)), original.eval()(batch(9)), rtol=1e-5, atol=1e-5)
    for name, array in before.items():
        np.testing.assert_array_equal(graph.parameters()[name], array)
    moved = fx_parameters(module)
    assert all((moved[name] != before[name]).any() for name in before)


def test_copies_and_torch_export_keep_the_keys():
    module = raise_to_fx(exported(Small())).eval()
    copied = copy.deepcopy(module)
    assert list(copied.state_dict()) == list(module.state_dict())
    with torch.no_grad():
        copied.fc.bias += 1
    torch.testing.assert_close(copied(batch()) - 1, module(batch()))
    program = torch.export.export(module, (batch(),), dynamic_shapes=({0: torch.export.Dim("n", min=1)},))
    assert set(program.state_dict) == set(module.state_dict())
    for rows in (1, 5):
        torch.testing.assert_close(program.module()(batch()[:rows]), module(batch()[:rows]))


def test_a_module_called_twice_is_one_module():
    rng = np.random.default_rng(0)
    arrays = {"cell.weight": rng.normal(size=(4, 4)), "cell.bias": rng.normal(size=4)}
    builder = Builder({name: array.astype(np.float32) for name, array in arrays.items()}, ["N", 4])
    graph = builder.add("Gemm", "cell.weight", "cell.bias", transB=1).add("Tanh")
    module = raise_to_fx(graph.add("Gemm", "cell.weight", "cell.bias", transB=1).graph())
    assert set(module.state_dict()) == {"cell.weight", "cell.bias"}
    assert [node.target for node in module.graph.nodes if node.op == "call_module"] == ["cell", "cell"]
    x = torch.ones(2, 4)
    torch.testing.assert_close(module(x), module.cell(torch.tanh(module.cell(x))))


@pytest.mark.parametrize("first", ["with bias", "without"])
def test_one_weight_in_two_different_modules_stays_one_tensor(first):
    """The same convolution weight with and without its bias, and at two strides; one batch norm at two epsilons."""
    rng = np.random.default_rng(0)
    names = ("weight", "bias", "running_mean", "running_var")
    arrays = {"conv.weight": rng.normal(size=(3, 3, 3, 3)), "conv.bias": rng.normal(size=3)}
    arrays |= {f"bn.{name}": np.abs(rng.normal(size=3)) + 0.1 for name in names}
    builder = Builder({name: array.astype(np.float32) for name, array in arrays.items()}, ["N", 3, 9, 9])
    uses = [("conv.weight", "conv.bias"), ("conv.weight",)]
    for use in uses if first == "with bias" else uses[::-1]:
        builder.add("Conv", *use, pads=[1, 1, 1, 1])
    builder.add("Conv", "conv.weight", "conv.bias", strides=[2, 2])
    for node in builder.nodes:
        node.outputs[0].shape = ["N", 3, 9, 9]
    for epsilon in (1e-5, 0.1):
        builder.add("BatchNormalization", *(f"bn.{name}" for name in names), epsilon=epsilon)
        builder.value.shape = ["N", 3, 4, 4]
    module = raise_to_fx(builder.graph())
    # a module that has no bias cannot take one later without using it: such a bias gets another name
    given = {"conv_bias" if name == "conv.bias" and first == "without" else name for name in arrays}
    assert set(module.state_dict()) - {"bn.num_batches_tracked"} == given
    x = torch.randn(2, 3, 9, 9)
    state = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    weight, bias, value = state["conv.weight"], state["conv.bias"], x
    for use in uses if first == "with bias" else uses[::-1]:
        value = nn.functional.conv2d(value, weight, bias if len(use) == 2 else None, padding=1)
    value = nn.functional.conv2d(value, weight, bias, stride=2)
    mean, var, scale, shift = (state[f"bn.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    for training in (True, False):
        module.train(training)
        found = module(x)
        expected = value
        for epsilon in (1e-5, 0.1):
            expected = nn.functional.batch_norm(expected, mean, var, scale, shift, training, 0.1, epsilon)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module.state_dict()["bn.running_var"], var)


def test_aliases_are_keys_too():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 4)).astype(np.float32)
    builder = Builder({"embed.weight": weight}, ["N", 4]).add("Gemm", "embed.weight", transB=1)
    graph = builder.graph(**{TIED: json.dumps({"out.proj.weight": "embed.weight"})})
    module = raise_to_fx(graph)
    assert set(module.state_dict()) == {"embed.weight", "out.proj.weight"}
    assert module.embed.weight is module.out.proj.weight
    copied = copy.deepcopy(module)
    assert set(copied.state_dict()) == set(module.state_dict())
    assert copied.embed.weight is copied.out.proj.weight
    assert len(list(copied.parameters())) == 1


def test_what_the_module_did_not_train_is_not_trained():
    arrays = {name: np.ones(shape, np.float32) for name, shape in
              {"scale": 1, "mask": 4, "table": 4, "gain": (), "free": 4}.items()}  # fmt: skip
    builder = Builder(arrays, ["N", 4])
    for name in arrays:
        builder.add("Mul", name)
    bare = builder.graph()
    kinds = {"scale": "parameter", "mask": "buffer", "table": "constant", "gain": "parameter"}
    module = raise_to_fx(bare.replace(metadata=with_kinds({}, kinds)))
    assert {name for name, _ in module.named_parameters()} == {"scale", "gain", "free"}
    assert set(module.state_dict()) == {"scale", "gain", "free", "mask"}
    assert {name for name, _ in raise_to_fx(bare).named_parameters()} == {"mask", "table", "free"}
    copied = copy.deepcopy(module)
    torch.testing.assert_close(copied(torch.full((1, 4), 2.0)), torch.full((1, 4), 2.0))


@pytest.mark.parametrize("name", ["onnx::MatMul_7", "a/b", "graph", "forward.weight", "x.training.y", "1", "deep.1.w"])
def test_any_name_of_a_constant_will_do(name):
    array = np.eye(4, dtype=np.float32) * 3
    module = raise_to_fx(Builder({name: array}, ["N", 4]).add("MatMul", name).graph())
    torch.testing.assert_close(module(torch.ones(1, 4)), torch.full((1, 4), 3.0))
    (key,) = module.state_dict()
    assert (key == name) == (name in ("1", "deep.1.w"))
    np.testing.assert_array_equal(fx_parameters(module)[name], array)
    assert KINDS not in module.meta


def test_a_tensor_where_a_container_would_have_to_be():
    ones = np.ones(4, np.float32)
    names = ("a", "a.b", "c.weight", "c")
    builder = Builder(dict.fromkeys(names, ones), ["N", 4])
    for name in names:
        builder.add("Add", name)
    module = raise_to_fx(builder.graph())
    assert len(module.state_dict()) == len(list(module.parameters())) == 4
    torch.testing.assert_close(module(torch.zeros(1, 4)), torch.full((1, 4), 4.0))
