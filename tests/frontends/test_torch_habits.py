"""Habits of real modules that a door may stumble over: each in a few layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import eexform as ee
from eexform.backends import ort
from eexform.errors import ModelError
from eexform.ir.graph import Graph
from eexform.ir.kinds import kinds
from eexform.ir.provenance import origins
from tests.frontends.torch_nets import Head

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Habit(nn.Module):
    """``habit`` of the layer in front, then a classifier; the habit's own path is ``inner``."""

    class Inner(nn.Module):
        def __init__(self, habit: Callable[[nn.Module, Tensor], Tensor]) -> None:
            super().__init__()
            self.linear, self.habit = nn.Linear(4, 4), habit

        def forward(self, x: Tensor) -> Tensor:
            return self.habit(self.linear, x)

    def __init__(self, habit: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.last = self.Inner(habit), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


def _answers(graph: Graph, x: Tensor) -> np.ndarray:
    return ort.run(ort.session(graph), {graph.inputs[0]: x.numpy()})[graph.final]


@pytest.mark.parametrize(
    "habit",
    [
        lambda linear, x: linear(x).data * 2,
        lambda linear, x: nn.functional.linear(x, linear.weight.data.sign(), linear.bias),
        lambda linear, x: linear(x).data.mul_(2),
    ],
    ids=["of a value", "of a weight", "written into"],
)
def test_data_is_read_as_detached(habit: Callable[[nn.Module, Tensor], Tensor]) -> None:
    module = Habit(habit)
    graph = ee.load(module, (X,))
    with torch.no_grad():
        np.testing.assert_allclose(_answers(graph, X[:2]), module(X[:2]), rtol=1e-5, atol=1e-6)


def test_what_the_exporter_cannot_see_is_no_graph_of_something_else() -> None:
    def replaced(linear: nn.Module, x: Tensor) -> Tensor:
        y = linear(x)
        y.data = y.detach() * 2
        return y

    with pytest.raises(ModelError, match="what was exported does not compute what the module computes"):
        ee.load(Habit(replaced), (X,))


class Frugal(torch.autograd.Function):
    """Doubles, frees what it does not need and leaves gradients to a rule of its own, as reversible networks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            copied = x.chunk(2, 1)[0].contiguous()
            result = torch.cat((copied * 2, x.chunk(2, 1)[1]), 1)
            copied.set_()
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_what_is_freed_without_gradients_is_not_in_the_way() -> None:
    module = Habit(lambda linear, x: Frugal.apply(linear(x)))
    graph = ee.load(module, (X,))
    with torch.no_grad():
        np.testing.assert_allclose(_answers(graph, X[:2]), module(X[:2]), rtol=1e-5, atol=1e-6)


def test_a_bound_on_the_batch_size_is_told_with_its_place() -> None:
    def halved(linear: nn.Module, x: Tensor) -> Tensor:
        return linear(x) * int(x.size(0) * 0.5)

    with pytest.raises(
        ModelError, match=r"in 'inner' \(Inner\): its code works for some batch sizes only \(the ex"
    ) as e:
        ee.load(Habit(halved), (X,))
    assert "as long as the batch" not in str(e.value)  # no second input is to blame


def test_examples_that_forward_writes_into_stay_as_they_are() -> None:
    class Normalised(Head):
        def forward(self, x: Tensor) -> Tensor:
            x.sub_(0.5).mul_(4)
            return super().forward(x)

    module, given = Normalised(), X.clone()
    graph = ee.load(module, (given,))
    torch.testing.assert_close(given, X, rtol=0, atol=0)
    with torch.no_grad():
        np.testing.assert_allclose(_answers(graph, X[:1]), module(X[:1].clone()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "view",
    [lambda x: x.view(x.size(0), -1), lambda x: x.view(-1, 4), lambda x: x.reshape(x.shape[0], 4)],
    ids=["size and -1", "-1", "size"],
)
def test_flattening_needs_no_sizes(view: Callable[[Tensor], Tensor]) -> None:
    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(view(nn.functional.avg_pool2d(self.conv(x), 4)))

    graph = ee.load(Flattened(), (torch.zeros(1, 3, 6, 6),))
    assert [node.op for node in graph.nodes] == ["Conv", "AveragePool", "Reshape", "Gemm"]


def test_pieces_are_called_after_the_module_that_splits() -> None:
    class Shuffle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first, second = x.chunk(2, 1)
            return torch.cat((second, first), 1)

    convolution = nn.Conv2d(3, 4, 3)
    module = nn.Sequential(convolution, Shuffle(), Shuffle(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    graph = ee.load(module, (torch.zeros(1, 3, 6, 6),))
    splits = [node for node in graph.nodes if node.op == "Split"]
    assert [node.name for node in splits] == ["1.split", "2.split"]
    assert [origins(graph)[node.name].module for node in splits] == ["1", "2"]


def test_a_frozen_parameter_is_not_trained_unless_all_are_frozen() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    module[0].weight.requires_grad_(False)
    graph = ee.load(module, (X,))
    assert kinds(graph.metadata)["0.weight"] == "buffer"
    raised = ee.to_torch(graph)
    assert raised.state_dict().keys() == module.state_dict().keys()
    raised(X).sum().backward()
    assert {name for name, value in raised.named_parameters() if value.grad is None} == {"0.weight"}

    everything = ee.load(module.requires_grad_(False), (X,))  # for inference
    assert set(kinds(everything.metadata).values()) == {"parameter"}


@pytest.mark.parametrize("stopped", [False, True])
def test_gradients_are_those_of_what_forward_computes(stopped: bool) -> None:
    """Documented: where a module stops gradients or makes its own, the graph does not know."""

    def without(linear: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return linear(x)

    module = Habit(without if stopped else lambda linear, x: linear(x).detach())
    raised = ee.to_torch(ee.load(module, (X,)))
    raised(X).square().sum().backward()
    gradient = raised.get_parameter("inner.linear.weight").grad
    assert gradient is not None
    assert gradient.abs().max() > 0
