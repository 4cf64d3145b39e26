"""Training through raised graphs: normalisation statistics, dropout, and a gradient for every kind of parameter."""

import copy

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from torch import nn

import eexform as ee
from eexform.backends import fx
from eexform.backends.fx import raise_to_fx
from eexform.backends.onnx_backend import import_model
from eexform.errors import ModelError
from tests.backends.random_ops import Case, built

SHAPES = {"matrix": (6, 4), "1d": (6, 4, 5), "2d": (6, 4, 5, 3), "3d": (6, 4, 3, 2, 2)}
NORMS = {"matrix": nn.BatchNorm1d, "1d": nn.BatchNorm1d, "2d": nn.BatchNorm2d, "3d": nn.BatchNorm3d}


class Normed(nn.Module):
    """A normalisation between something to train and scores."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.norm = norm
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        found = self.norm(x * self.scale)
        return self.last(found.flatten(2).mean(2) if found.dim() > 2 else found)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(("momentum", "eps"), [(0.1, 1e-5), (0.01, 1e-3), (0.37, 1e-2)])
def test_running_statistics_after_training_are_torchs(kind, momentum, eps):
    torch.manual_seed(0)
    original = Normed(NORMS[kind](4, momentum=momentum, eps=eps))
    nn.init.normal_(original.norm.weight)
    raised = ee.to_torch(ee.load(original.eval(), example_inputs=(torch.randn(1, *SHAPES[kind][1:]),)))
    for module in (original, raised):
        module.train()
    steps = [torch.optim.SGD(module.parameters(), 0.05, momentum=0.9) for module in (original, raised)]
    for number in range(6):
        x = torch.randn(*SHAPES[kind], generator=torch.Generator().manual_seed(number)) * 2 + 1
        for module, optimiser in zip((original, raised), steps, strict=True):
            optimiser.zero_grad()
            module(x).square().sum().backward()
            optimiser.step()
    wanted, found = original.state_dict(), raised.state_dict()
    assert wanted.keys() == found.keys()
    assert found["norm.num_batches_tracked"] == 6
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    original.eval(), raised.eval()
    torch.testing.assert_close(raised(x), original(x), rtol=1e-4, atol=1e-5)
    held = raised.get_buffer("norm.running_mean").clone()
    raised(x)
    assert torch.equal(raised.get_buffer("norm.running_mean"), held)  # evaluation leaves them alone


def test_statistics_move_where_the_scale_is_computed():
    class Positive(nn.BatchNorm2d):
        def forward(self, x):
            statistics = (self.running_mean, self.running_var)
            return nn.functional.batch_norm(
                x, *statistics, self.weight.abs(), self.bias, False, self.momentum, self.eps
            )

    norm = Positive(4, momentum=0.2)
    nn.init.normal_(norm.weight)
    original = Normed(norm).eval()
    raised = ee.to_torch(ee.load(original, example_inputs=(torch.randn(1, 4, 5, 3),)))
    x = torch.randn(6, 4, 5, 3)
    torch.testing.assert_close(raised(x), original(x))
    raised.train()
    raised(x).sum().backward()
    seen = (x * 1.5).mean((0, 2, 3)) * 0.2
    torch.testing.assert_close(raised.get_buffer("norm.running_mean"), seen, rtol=1e-4, atol=1e-5)
    assert {name for name, _ in raised.named_parameters()} == {name for name, _ in original.named_parameters()}
    assert all(parameter.grad is not None for parameter in raised.parameters())


def test_statistics_that_are_computed_have_gradients():
    operands = [torch.randn(size).numpy() for size in ((3, 4, 5), (4,), (4,), (4,))] + [np.full(4, 0.7, np.float32)]
    module = raise_to_fx(built(Case("BatchNormalization", operands), [True] * 5)).double()
    values = [torch.from_numpy(array).double().requires_grad_() for array in operands]
    assert torch.autograd.gradcheck(module, values)


def test_batch_norm_in_training_mode_of_onnx():
    torch.manual_seed(1)
    x, weight, bias = torch.randn(5, 4, 3), torch.randn(4), torch.randn(4)
    mean, var = torch.randn(4), torch.rand(4) + 0.5
    case = Case(
        "BatchNormalization",
        [held.numpy() for held in (x, weight, bias, mean, var)],
        {"training_mode": 1, "momentum": 0.8, "epsilon": 1e-3},
        outputs=3,
    )
    module = raise_to_fx(built(case, [True, False, False, False, False]))
    assert {name for name, _ in module.named_parameters()} == {"x1", "x2"}  # statistics are not trained
    (wanted, *statistics) = onnx.reference.ReferenceEvaluator(
        gs.export_onnx(built(case, [True] * 5).gs, do_type_check=False)
    ).run(None, {f"x{place}": held.numpy() for place, held in enumerate((x, weight, bias, mean, var))})
    for training in (True, False):  # the node says that it trains, whatever the module is told
        found, *moved = module.train(training)(x)
        np.testing.assert_allclose(found.detach(), wanted, rtol=1e-4, atol=1e-5)
        for one, other in zip(moved, statistics, strict=True):
            np.testing.assert_allclose(one.detach(), other, rtol=1e-4, atol=1e-5)


DROPOUT = """<ir_version: 10, opset_import: ["": 21]>
g (float[N, 1000] x) => (float[N, 1000] y%s) { y%s = Dropout(x, ratio%s) }"""


def _dropout(outputs: str = "", training: bool | None = None) -> nn.Module:
    types = ", bool[N, 1000] mask" if outputs else ""
    model = onnx.parser.parse_model(DROPOUT % (types, outputs, "" if training is None else ", training"))
    arrays = {"ratio": np.array(0.25, np.float32)} | ({} if training is None else {"training": np.array(training)})
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return raise_to_fx(import_model(model))


def test_dropout_follows_the_module_where_the_node_says_nothing():
    module, x = _dropout(), torch.ones(8, 1000)
    assert torch.equal(module.eval()(x), x)
    found = module.train()(x)
    kept = found != 0
    assert 0.72 < float(kept.float().mean()) < 0.78
    torch.testing.assert_close(found[kept], x[kept] / 0.75)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_does_what_the_node_says(training):
    module, x = _dropout(", mask", training), torch.ones(8, 1000, requires_grad=True)
    for mode in (True, False):
        found, mask = module.train(mode)(x)
        assert bool((mask == (found != 0)).all())
        share = float(mask.float().mean())
        assert 0.72 < share < 0.78 if training else share == 1.0
    found.sum().backward()
    torch.testing.assert_close(x.grad, found.detach())


@pytest.mark.parametrize("op", ["InstanceNormalization", "LayerNormalization", "GroupNormalization"])
def test_other_normalisation_is_the_same_while_training(op):
    width = 5 if op[0] == "L" else 4
    operands = [np.random.default_rng(0).normal(size=size).astype(np.float32) for size in ((3, 4, 5), width, width)]
    attrs = {"num_groups": 2} if op[0] == "G" else {}
    module = raise_to_fx(built(Case(op, operands, attrs), [True, False, False]))
    x = torch.from_numpy(operands[0])
    assert torch.equal(module.train()(x), copy.deepcopy(module).eval()(x))
    module(x).square().sum().backward()
    assert len([parameter.grad for parameter in module.parameters() if parameter.grad is not None]) == 2


# -- parameters of every kind --------------------------------------------------------------------------------------


class Everything(nn.Module):
    """One parameter of every kind, single numbers included."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.depth = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False)
        self.up, self.norm = nn.ConvTranspose2d(4, 4, 2, stride=2), nn.BatchNorm2d(4)
        self.slope, self.group = nn.PReLU(4), nn.GroupNorm(2, 4, eps=1e-3)
        self.power, self.top = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(2.0))
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("limit", torch.tensor(1.5))
        self.layer, self.token = nn.LayerNorm(4), nn.Parameter(torch.randn(1, 1, 4))
        self.gru, self.last = nn.GRU(4, 6, batch_first=True, bidirectional=True), nn.Linear(12, 3)

    def forward(self, x):
        found = self.group(self.slope(self.norm(self.up(self.depth(self.conv(x))))))
        found = torch.clamp(torch.clamp(found.clamp(min=1e-3), max=self.limit), max=self.top)
        pooled = found.pow(self.power).mean(3).pow(1.0 / self.power) * self.gain
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), pooled.transpose(1, 2)], 1)
        return self.last(self.gru(self.layer(tokens))[0][:, -1])


def test_parameters_of_every_kind_have_the_originals_gradients():
    torch.manual_seed(3)
    original = Everything().eval()
    raised = ee.to_torch(ee.load(original, example_inputs=(torch.randn(1, 3, 6, 6),)))
    x = torch.randn(2, 3, 6, 6)
    for module in (original, raised):
        module(x).square().sum().backward()
    found = dict(raised.named_parameters())
    assert found.keys() == dict(original.named_parameters()).keys()
    for name, parameter in original.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-3, atol=1e-4, msg=name)
    changed = {name: tensor * 0.9 for name, tensor in original.state_dict().items()}
    for module in (original, raised):  # nothing is remembered besides the state
        module.load_state_dict(changed)
    torch.testing.assert_close(raised(x), original(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_all_state_moves_with_the_module(kind):
    raised = ee.to_torch(ee.load(Everything().eval(), example_inputs=(torch.randn(1, 3, 6, 6),)))
    x = torch.randn(2, 3, 6, 6)
    moved = copy.deepcopy(raised).to(kind)
    found = moved(x.to(kind))
    assert found.dtype == kind
    torch.testing.assert_close(found.float(), raised(x), rtol=0.1, atol=0.1)
    assert copy.deepcopy(raised).to("meta")(x.to("meta")).shape == (2, 3)
    kept = [name for module in raised.modules() for name, held in vars(module).items() if torch.is_tensor(held)]
    assert kept == []


# -- what cannot be raised -----------------------------------------------------------------------------------------


def test_refusals_name_node_operator_set_and_way_out():
    x = np.ones((1, 2, 4, 4), np.float32)
    for op, attrs, opset, pattern in (
        (
            "Made",
            {},
            21,
            r"node 'the_node': operator 'Made' cannot.*opset 21; register a rule with eexform.backends.fx",
        ),
        ("Pad", {"mode": "stretch"}, 19, r"node 'the_node' \(Pad\): mode 'stretch'.*opset 19; register a rule"),
        ("MaxPool", {}, 20, r"node 'the_node' \(MaxPool\): .*'kernel_shape' is missing.*opset 20; register a rule"),
    ):
        with pytest.raises(ModelError, match=pattern):
            raise_to_fx(built(Case(op, [x], attrs, opset=opset), [True]))
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21, "com.mine": 3]>
        g (float[N] x) => (float[N] y) { y = com.mine.Fancy(x) }""")
    with pytest.raises(ModelError, match=r"operator 'com.mine::Fancy' cannot be raised.*version 3 of its domain"):
        raise_to_fx(import_model(model))


def test_a_refusal_says_what_failed_and_is_not_its_own_cause():
    @fx.op("com.mine::Failing")
    def _failing(raiser, node):
        return {"alpha": 1.0}["gamma"]

    text = """<ir_version: 10, opset_import: ["": 21, "com.mine": 3]> g (float[N] x, bool c) => (float[N] y) {
        y = If(c) <then_branch = t () => (float[N] a) { a = com.mine.Failing(x) },
                   else_branch = e () => (float[N] b) { b = Relu(x) }> }"""
    try:
        with pytest.raises(ModelError, match=r"its rule fails \(KeyError: 'gamma'\).*the rule is wrong") as caught:
            raise_to_fx(import_model(onnx.parser.parse_model(text)))
    finally:
        del fx._OPS["com.mine::Failing"]
    assert isinstance(caught.value.__cause__, KeyError)
    assert str(caught.value).count("register a rule") == 1
