"""A module becomes a graph that computes the same, with names of the state dict, and is left as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import eexform as ee
from eexform.backends import ort
from eexform.cost_models.macs import Macs
from eexform.errors import ModelError, OptionError
from eexform.frontends.torch import from_module, load_weights
from eexform.ir.checks import check
from eexform.ir.graph import Graph
from eexform.ir.kinds import kinds, tied
from eexform.ir.provenance import Origin, origins
from eexform.passes.fold_batch_norm import FoldBatchNorm
from eexform.passes.remove_dead import RemoveDead
from tests.frontends.torch_nets import Head, ResNet, Several, Text


def _scores(graph: Graph, *inputs: Tensor) -> np.ndarray:
    feeds = {name: value.numpy() for name, value in zip(graph.inputs, inputs, strict=True)}
    return ort.run(ort.session(graph), feeds)[graph.final]


def _stirred(module: nn.Module) -> nn.Module:
    """With statistics as if trained, so that no normalisation is an identity."""
    random = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1, generator=random)  # type: ignore[union-attr]
            part.running_var.uniform_(0.5, 1.5, generator=random)  # type: ignore[union-attr]
    return module


@pytest.fixture(scope="module")
def resnet() -> ResNet:
    torch.manual_seed(0)
    return _stirred(ResNet(width=4))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def graph(resnet: ResNet) -> Graph:
    return ee.load(resnet, example_inputs=(torch.zeros(1, 3, 8, 8),))


@pytest.mark.parametrize("batch", [1, 7])
def test_computes_the_same_for_any_batch(resnet: ResNet, graph: Graph, batch: int) -> None:
    check(graph)
    x = torch.randn(batch, 3, 8, 8)
    expected = copy.deepcopy(resnet).eval()(x).detach().numpy()
    np.testing.assert_allclose(_scores(graph, x), expected, rtol=1e-5, atol=1e-5)


def test_constants_are_the_state_dict_and_nothing_is_folded(resnet: ResNet, graph: Graph) -> None:
    state = {name: value for name, value in resnet.state_dict().items() if "num_batches" not in name}
    assert set(graph.parameters()) - {"layer2.0.pad.in2", "layer3.0.pad.in2"} == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(graph.constants[name].values, value.numpy())
    operators = [node.op for node in graph.nodes]
    assert operators.count("BatchNormalization") == 7
    assert operators.count("Conv") == 7
    assert not {"Cast", "CastLike", "Shape", "Expand", "Concat", "Constant", "Identity"} & set(operators)
    assert all(len(node.inputs) == 2 for node in graph.nodes if node.op == "Conv"), "no bias that the module has not"


def test_values_and_nodes_are_called_after_the_modules(graph: Graph) -> None:
    names = [node.name for node in graph.nodes]
    assert names[:6] == ["conv1", "bn1", "relu", "layer1.0.conv1", "layer1.0.bn1", "layer1.0.relu"]
    assert "layer1.0.relu_1" in names
    assert all(node.name == node.outputs[0].name for node in graph.nodes[:-1])
    assert graph.inputs == ("x",)
    assert graph.outputs == ("scores",)
    assert "layer2.0.relu_1" in {site.value for site in ee.find_sites(graph).sites}


def test_every_node_knows_where_it_comes_from(graph: Graph) -> None:
    found = origins(graph)
    assert set(found) == {node.name for node in graph.nodes}
    assert found["layer1.0.conv1"] == Origin("layer1.0.conv1", "conv2d_1")
    assert found["layer1.0.relu"].module == "layer1.0"
    assert found["relu"].module == ""


def test_kinds_of_constants_are_known(graph: Graph) -> None:
    found = kinds(graph.metadata)
    assert set(found) == set(graph.constants)
    assert found["bn1.weight"] == "parameter"
    assert found["bn1.running_var"] == "buffer"
    assert found["view.in1"] == "constant"
    assert tied(graph.metadata) == {}


def test_folding_is_a_pass(graph: Graph) -> None:
    folded = FoldBatchNorm()(graph).graph
    assert "BatchNormalization" not in {node.op for node in folded.nodes}
    assert Macs().cost(folded).total == Macs().cost(graph).total
    assert set(origins(folded)) == {node.name for node in folded.nodes} & set(origins(graph))


def test_saving_tells_nothing_of_the_machine_and_keeps_the_digest(graph: Graph, tmp_path: Path) -> None:
    ee.save(graph, tmp_path / "net.onnx")
    content = (tmp_path / "net.onnx").read_bytes()
    assert b".py" not in content
    assert b"stack_trace" not in content
    again = ee.load(tmp_path / "net.onnx")
    assert again.digest == graph.digest
    assert origins(again) == origins(graph)


def test_loading_twice_gives_the_same_digest(resnet: ResNet, graph: Graph) -> None:
    assert ee.load(resnet, (torch.ones(3, 3, 8, 8),)).digest == graph.digest


def test_the_module_is_left_as_found(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    module = _stirred(ResNet(width=4)).train()
    module.layer1.eval()  # type: ignore[union-attr]
    module(torch.randn(2, 3, 8, 8)).sum().backward()
    flags = {name: part.training for name, part in module.named_modules()}
    state = {name: value.clone() for name, value in module.state_dict().items()}
    gradients = {name: value.grad for name, value in module.named_parameters()}
    held = {name: id(value) for name, value in module.named_parameters()}
    random = torch.get_rng_state()
    from_module(module, (torch.randn(2, 3, 8, 8, generator=torch.Generator()),))
    assert {name: part.training for name, part in module.named_modules()} == flags
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(value.grad is gradients[name] for name, value in module.named_parameters())
    assert {name: id(value) for name, value in module.named_parameters()} == held
    assert "forward" not in vars(module)
    assert torch.equal(torch.get_rng_state(), random)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_buffers_that_forward_replaces_are_put_back() -> None:
    class Counting(Head):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return super().forward(x)

    module = Counting()
    held = module.calls
    ee.load(module, (torch.zeros(1, 4),))
    assert module.calls is held
    assert held.item() == 0


def test_a_table_of_two_rows_is_not_taken_for_two_samples() -> None:
    class Table(Head):
        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return super().forward(x) + table[0] - table[1]

    graph = ee.load(Table(), (torch.zeros(1, 4), torch.zeros(2, 3)))
    assert [graph.types[name].shape for name in graph.inputs] == [("N", 4), (2, 3)]


def test_recurrent_layers_are_left_as_found_too(recwarn: pytest.WarningsRecorder) -> None:
    class Spotter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 6, batch_first=True)
            self.linear = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.gru(x)[0][:, -1])

    module = Spotter().eval()
    x = torch.randn(5, 7, 4)
    expected = module(x).detach().numpy()
    graph = from_module(module, x)
    assert not recwarn.list
    np.testing.assert_allclose(_scores(graph, x), expected, atol=1e-5)
    np.testing.assert_array_equal(module(x).detach().numpy(), expected)
    assert all(a is b for a, b in zip(module.gru._flat_weights, module.gru.parameters(), strict=True))


def test_keyword_inputs_integers_dicts_and_tied_weights() -> None:
    module = Text().train()
    ids, mask = torch.randint(0, 11, (2, 5)), torch.ones(2, 5, dtype=torch.int64)
    graph = ee.load(module, {"attention_mask": mask, "input_ids": ids})
    assert graph.inputs == ("input_ids", "attention_mask")
    assert graph.final == "logits"
    assert {graph.types[name].dtype for name in graph.inputs} == {np.dtype(np.int64)}
    assert all(graph.types[name].shape == ("N", 5) for name in graph.inputs)
    assert tied(graph.metadata) == {"project.weight": "embedding.weight"}
    assert "project.weight" not in graph.constants
    assert kinds(graph.metadata)["positions"] == "buffer"
    ids, mask = torch.randint(0, 11, (7, 5)), torch.randint(0, 2, (7, 5)).index_fill(1, torch.tensor([0]), 1)
    expected = module.eval()(ids, mask)["logits"].detach().numpy()
    np.testing.assert_allclose(_scores(graph, ids, mask), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "output", "name"),
    [
        ("tuple", None, "scores"),
        ("tuple", 1, "scores"),
        ("tuple", "-1", "scores"),
        ("two", 1, "scores"),
        ("named", "first", "first"),
        ("named", 0, "first"),
        ("dict", "b", "b"),
        ("dataclass", None, "logits"),
    ],
)
def test_scores_are_found_in_what_the_module_returns(form: str, output: str | int | None, name: str) -> None:
    module = Several(form)
    graph = ee.load(module, (torch.zeros(2, 4),), output=output)
    assert graph.outputs == (name,)
    x = torch.randn(3, 4)
    np.testing.assert_allclose(_scores(graph, x), module.linear(x).detach().numpy(), atol=1e-6)
    assert "other.weight" not in graph.constants


def test_wrappers_are_taken_off_and_numpy_is_fine() -> None:
    plain = Head()
    wrapped = nn.DataParallel(plain)
    assert set(ee.load(wrapped, (np.zeros((1, 4), np.float32),)).parameters()) == {"linear.weight", "linear.bias"}
    compiled = torch.compile(plain)
    assert ee.load(compiled, (torch.zeros(1, 4),)).inputs == ("x",)


def test_a_softmax_at_the_end_makes_probabilities() -> None:
    graph = ee.load(nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), (torch.zeros(2, 4),))
    assert graph.scores == "probabilities"
    given = ee.load(nn.Linear(4, 3), (torch.zeros(2, 4),), scores="probabilities")
    assert given.scores == "probabilities"


def test_linear_on_sequences_keeps_its_parameter() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(4, 4)
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.relu(self.mix(x)).mean(1))

    module = Mixer()
    graph = ee.load(module, (torch.zeros(2, 6, 4),))
    np.testing.assert_array_equal(graph.constants["mix.weight"].values, module.mix.weight.detach().numpy())
    x = torch.randn(3, 6, 4)
    np.testing.assert_allclose(_scores(graph, x), module(x).detach().numpy(), atol=1e-6)


def test_frozen_parameters_do_not_take_the_fused_encoder() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    module = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)).requires_grad_(False).eval()
    graph = ee.load(module, (torch.randn(2, 3, 8),))
    x = torch.randn(5, 3, 8)
    np.testing.assert_allclose(_scores(graph, x), module(x).numpy(), atol=1e-5)
    assert set(graph.parameters()) >= {"0.self_attn.in_proj_weight", "0.norm1.weight"}


def test_two_inputs_that_are_one_tensor_stay_two() -> None:
    class Pair(Head):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.linear(x - 2 * y)

    module, x = Pair(), torch.zeros(1, 4)
    graph = ee.load(module, (x, x))
    assert graph.inputs == ("x", "y")
    a, b = torch.randn(2, 3, 4)
    np.testing.assert_allclose(_scores(graph, a, b), module(a, b).detach().numpy(), atol=1e-6)


def test_the_door_takes_models_in_memory_and_refuses_what_does_not_belong(graph: Graph) -> None:
    from eexform.ir.serialize import to_model

    assert ee.load(to_model(graph)).digest == graph.digest
    with pytest.raises(OptionError, match="example_inputs is for PyTorch modules"):
        ee.load(to_model(graph), (torch.zeros(1, 3, 8, 8),))
    with pytest.raises(OptionError, match="a module does not say what it takes"):
        ee.load(Head())
    with pytest.raises(OptionError, match="input_shapes is for ONNX"):
        ee.load(Head(), (torch.zeros(1, 4),), input_shapes={"x": [1, 4]})
    with pytest.raises(OptionError, match="outputs go by name"):
        ee.load(to_model(graph), output=1)
    with pytest.raises(ModelError, match="cannot load a dict"):
        ee.load({})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="opset 13"):
        ee.load(Head(), (torch.zeros(1, 4),), min_opset=13)


@pytest.mark.shared_data
@pytest.mark.slow
@pytest.mark.parametrize(("layers", "blocks"), [(20, 3), (56, 9)])
def test_cifar_resnets_are_the_same_through_both_doors(shared: Path, layers: int, blocks: int) -> None:
    module = ResNet(blocks)
    load_weights(module, shared / "models" / f"cifar10_resnet{layers}.pt")
    graph = ee.load(module, (torch.zeros(1, 3, 32, 32),))
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = module.eval()(x).detach().numpy()
    error = np.abs(_scores(graph, x) - expected).max() / np.abs(expected).max()
    assert error < 1e-5
    assert sum(node.op == "BatchNormalization" for node in graph.nodes) == layers - 1
    other = ee.load(shared / "models" / f"cifar10_resnet{layers}.onnx")
    folded = RemoveDead()(FoldBatchNorm()(graph).graph).graph
    assert Macs().cost(folded).total == Macs().cost(FoldBatchNorm()(other).graph).total
    places, others = (ee.find_sites(each).sites for each in (graph, other))
    assert [site.shape for site in places] == [site.shape for site in others]
    assert json.loads(graph.metadata["eexform.provenance"])["layer3.0.conv2"][0] == "layer3.0.conv2"
