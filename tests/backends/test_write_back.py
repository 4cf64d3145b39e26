"""What write_back is given by mistake is refused by name."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from eexform.backends.multi_exit import to_torch
from eexform.backends.write_back import write_back
from eexform.errors import ModelError
from tests.lowering import nets

KEY = "weight_1"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda held: held.numpy(), "expected a tensor, found ndarray"),
        (lambda held: None, "expected a tensor, found NoneType"),
        (lambda held: held.long(), "expected floating-point numbers, found torch.int64"),
        (lambda held: held.to(torch.complex64), "expected floating-point numbers, found torch.complex64"),
        (lambda held: held.to("meta"), "lies on the meta device"),
        (lambda held: held.double() * 1e300, "NaN or infinite"),
        (lambda held: held[:1], "the graph has shape"),
    ],
)
def test_what_is_no_tensor_of_the_graph(change, says):
    graph = nets.with_exits("resnet", 2)
    state = to_torch(graph).state_dict()
    state[KEY] = change(state[KEY])
    with pytest.raises(ModelError, match=f"{KEY}.*{says}"):
        write_back(graph, state)


def test_other_widths_and_layouts_are_taken():
    graph = nets.with_exits("resnet", 2)
    module = to_torch(graph)
    state = dict(module.state_dict())
    state[KEY] = state[KEY].to_sparse()
    assert write_back(graph, state).digest == graph.digest
    narrow = write_back(graph, copy.deepcopy(module).bfloat16()).parameters()
    for name, values in graph.parameters().items():
        assert narrow[name].dtype == values.dtype
        np.testing.assert_allclose(narrow[name], values, rtol=1e-2)


def test_keys_and_modules_that_cannot_be_meant():
    graph = nets.with_exits("resnet", 2)
    with pytest.raises(ModelError, match="names, found 5"):
        write_back(graph, {**to_torch(graph).state_dict(), 5: torch.zeros(1)})
    with pytest.raises(ModelError, match="meta device"):
        write_back(graph, to_torch(graph).to("meta"))
    with pytest.raises(ModelError, match=r"the graph does not have exit2\.classifier"):
        write_back(graph, to_torch(nets.with_exits("resnet", 3)))


def test_a_parametrised_module_is_told_what_is_gone():
    graph = nets.with_exits("resnet", 2)
    module = to_torch(graph).graph_module
    path = next(name for name, part in module.named_modules() if isinstance(getattr(part, "weight", None), Parameter))
    torch.nn.utils.parametrizations.weight_norm(module.get_submodule(path))
    with pytest.raises(ModelError, match=f"no '{path}.weight' any more: remove parametrisations"):
        write_back(graph, module)
    torch.nn.utils.parametrize.remove_parametrizations(module.get_submodule(path), "weight")
    for name, values in write_back(graph, module).parameters().items():
        np.testing.assert_allclose(values, graph.parameters()[name], rtol=1e-5, atol=1e-6)
