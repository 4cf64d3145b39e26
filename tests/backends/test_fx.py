"""A graph raised to torch computes what onnxruntime computes, trains, and hands its parameters back by name."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch
from torch import nn

from eexform.backends.fx import fx_parameters, op, raise_to_fx, supported
from eexform.errors import ModelError
from eexform.heads import HeadSpec, head_graph, with_parameters
from eexform.ir.graph import Graph
from tests.heads.support import SITES, run, samples

RNG = np.random.default_rng(11)
IMAGE, TOKENS = (2, 6, 9, 8), (2, 5, 8)


def weights(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def one_node(name: str, inputs: list, *, outputs: int = 1, opset: int = 20, **attrs) -> tuple[Graph, np.ndarray]:
    """A graph of one node; the first operand (an array) is the graph's input ``x``, the others are constants."""
    value, *others = inputs
    source = gs.Variable("x", value.dtype, list(value.shape))
    operands = [
        gs.Variable.empty() if other is None else gs.Constant(f"c{k}", np.asarray(other))
        for k, other in enumerate(others)
    ]
    results = [gs.Variable(f"y{k}") for k in range(outputs)]
    node = gs.Node(name, name="the_node", attrs=attrs, inputs=[source, *operands], outputs=results)
    return Graph(gs.Graph(nodes=[node], inputs=[source], outputs=results, opset=opset)), value


def reference(graph: Graph, value: np.ndarray) -> list[np.ndarray]:
    model = gs.export_onnx(graph.gs, do_type_check=False)
    model.ir_version = 10
    for output in model.graph.output:  # types are not needed by onnxruntime, but it wants the field gone then
        output.ClearField("type")
    typed = onnx.shape_inference.infer_shapes(model)
    return ort.InferenceSession(typed.SerializeToString()).run(None, {"x": value})


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


X, T = weights(*IMAGE), weights(*TOKENS)
POSITIVE = np.abs(X) + 0.1
PLAIN = ("Relu", "Sigmoid", "HardSwish", "Mish", "Tanh", "Erf", "Exp", "Neg", "Abs", "Floor", "Ceil", "Round", "Sign",
         "Softplus", "Softsign")  # fmt: skip
CASES = {
    "conv": ("Conv", [X, weights(4, 6, 3, 3), weights(4)], {"pads": [1, 1, 1, 1], "strides": [2, 1]}),
    "conv, groups, dilation": ("Conv", [X, weights(6, 2, 3, 3)], {"group": 3, "dilations": [2, 1]}),
    "conv, uneven pads": ("Conv", [X, weights(4, 6, 3, 3)], {"pads": [0, 1, 2, 0]}),
    "conv, same": ("Conv", [X, weights(4, 6, 4, 3)], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "conv, same lower": ("Conv", [X, weights(4, 6, 4, 3)], {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "conv 1d": ("Conv", [T, weights(4, 5, 3)], {}),
    "conv transpose": (
        "ConvTranspose",
        [X, weights(6, 2, 3, 3), weights(2)],
        {"strides": [2, 2], "pads": [1, 1, 1, 1]},
    ),
    "batch norm": ("BatchNormalization", [X, weights(6), weights(6), weights(6), np.abs(weights(6))], {}),
    "layer norm": ("LayerNormalization", [T, weights(8), weights(8)], {"axis": -1}),
    "layer norm, two axes": ("LayerNormalization", [T, weights(5, 8)], {"axis": 1, "epsilon": 1e-3}),
    "instance norm": ("InstanceNormalization", [X, weights(6), weights(6)], {}),
    "gemm": ("Gemm", [weights(3, 8), weights(4, 8), weights(4)], {"transB": 1}),
    "gemm, all": ("Gemm", [weights(8, 3), weights(8, 4), weights(3, 1)], {"transA": 1, "alpha": 0.5, "beta": 2.0}),
    "matmul": ("MatMul", [T, weights(8, 3)], {}),
    "einsum": ("Einsum", [T, weights(8, 3)], {"equation": "btc,cd->bdt"}),
    "prelu": ("PRelu", [X, weights(6, 1, 1)], {}),
    "leaky": ("LeakyRelu", [X], {"alpha": 0.2}),
    "elu": ("Elu", [X], {"alpha": 0.7}),
    "selu": ("Selu", [X], {}),
    "hard sigmoid": ("HardSigmoid", [X], {"alpha": 1 / 6}),
    "gelu": ("Gelu", [X], {}),
    "gelu, tanh": ("Gelu", [X], {"approximate": "tanh"}),
    "clip": ("Clip", [X, np.float32(-0.5), np.float32(0.7)], {}),
    "clip, one side": ("Clip", [X, None, np.float32(0.7)], {}),
    "softmax": ("Softmax", [T], {"axis": 1}),
    "log softmax": ("LogSoftmax", [T], {}),
    "pow": ("Pow", [POSITIVE, np.float32(1.5)], {}),
    "div by vector": ("Div", [X, weights(8)], {}),
    "int div": ("Div", [ints(-7, 7), ints(2)], {}),
    "mod": ("Mod", [ints(-7, 7), ints(3)], {}),
    "fmod": ("Mod", [X, np.float32(0.3)], {"fmod": 1}),
    "max": ("Max", [X, weights(8), np.float32(0.1)], {}),
    "mean": ("Mean", [X, weights(8)], {}),
    "average pool": ("AveragePool", [X], {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "average pool, padding counted": (
        "AveragePool",
        [X],
        {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1},
    ),
    "average pool, uneven": ("AveragePool", [X], {"kernel_shape": [3, 3], "pads": [0, 0, 2, 1], "strides": [2, 2]}),
    "average pool, ceil": ("AveragePool", [X], {"kernel_shape": [2, 3], "strides": [2, 3], "ceil_mode": 1}),
    "max pool": ("MaxPool", [X], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "max pool, uneven": ("MaxPool", [X], {"kernel_shape": [2, 2], "strides": [2, 2], "pads": [0, 1, 1, 0]}),
    "global average": ("GlobalAveragePool", [X], {}),
    "global max": ("GlobalMaxPool", [T], {}),
    "reduce mean, input": ("ReduceMean", [X, ints(2, -1)], {"keepdims": 0}),
    "reduce all": ("ReduceMax", [X], {}),
    "reduce noop": ("ReduceSum", [X], {"noop_with_empty_axes": 1}),
    "reduce l2": ("ReduceL2", [X, ints(1)], {}),
    "reduce prod": ("ReduceProd", [X, ints(1, 2)], {"keepdims": 0}),
    "arg max": ("ArgMax", [X], {"axis": 1, "keepdims": 0}),
    "concat": ("Concat", [T, weights(2, 3, 8)], {"axis": 1}),
    "flatten": ("Flatten", [X], {"axis": 2}),
    "flatten to one row": ("Flatten", [X], {"axis": 0}),
    "reshape": ("Reshape", [X, ints(0, -1, 4)], {}),
    "squeeze": ("Squeeze", [weights(2, 1, 3, 1), ints(1, -1)], {}),
    "unsqueeze": ("Unsqueeze", [T, ints(0, -1)], {}),
    "transpose": ("Transpose", [X], {"perm": [0, 2, 3, 1]}),
    "transpose, default": ("Transpose", [X], {}),
    "gather one": ("Gather", [T, np.int64(-1)], {"axis": 1}),
    "gather many": ("Gather", [T, np.array([[0, -1], [2, 2]])], {"axis": 1}),
    "gather elements": ("GatherElements", [T, RNG.integers(-5, 5, (2, 3, 8))], {"axis": 1}),
    "slice": ("Slice", [X, ints(1, 0), ints(2**62, -2), ints(1, -1), ints(2, 1)], {}),
    "slice, backwards": ("Slice", [X, ints(-1), ints(-(2**62)), ints(2), ints(-2)], {}),
    "split, equal": ("Split", [weights(2, 7, 3)], {"axis": 1, "num_outputs": 3}, 3),
    "split, sizes": ("Split", [weights(2, 7, 3), ints(1, 6)], {"axis": 1}, 2),
    "pad": ("Pad", [X, ints(0, 1, 2, 0, 0, 0, -1, 3), np.float32(2.0)], {}),
    "pad, axes": ("Pad", [X, ints(1, 2), None, ints(-1)], {}),
    "pad, reflect": ("Pad", [X, ints(0, 0, 1, 2, 0, 0, 2, 1)], {"mode": "reflect"}),
    "expand": ("Expand", [weights(2, 1, 3), ints(4, 1)], {}),
    "tile": ("Tile", [T, ints(1, 2, 1)], {}),
    "cast": ("Cast", [X], {"to": 7}),
    "shape": ("Shape", [X], {"start": 1}),
    "constant of shape": ("ConstantOfShape", [ints(2, 3)], {"value": gs.Constant("v", np.array([3], np.int64))}),
    "top k": ("TopK", [T, ints(2)], {"axis": 1}, 2),
    "depth to space": ("DepthToSpace", [weights(1, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}),
    **{name: (name, [X], {}) for name in PLAIN},
    **{name: (name, [POSITIVE], {}) for name in ("Log", "Sqrt", "Reciprocal")},
}


@pytest.mark.parametrize("case", CASES)
def test_every_operator_is_what_onnxruntime_does(case):
    name, inputs, attrs, *rest = CASES[case]
    graph, value = one_node(name, inputs, outputs=rest[0] if rest else 1, **attrs)
    module = raise_to_fx(graph).eval()
    found = module(torch.from_numpy(value))
    found = found if isinstance(found, tuple) else (found,)
    for mine, theirs in zip(found, reference(graph, value), strict=True):
        assert mine.detach().numpy().dtype == theirs.dtype
        np.testing.assert_allclose(mine.detach().numpy(), theirs, atol=2e-5, rtol=1e-4)
    constants = {n for n, c in graph.constants.items() if np.issubdtype(c.dtype, np.floating) and c.values.size > 1}
    assert constants <= set(fx_parameters(module)), "an array of the graph is not in the module"


@pytest.mark.parametrize("opset", [17, 18])
def test_axes_moved_from_attribute_to_input(opset):
    inputs, attrs = ([X], {"axes": [1, 2]}) if opset < 18 else ([X, ints(1, 2)], {})
    graph, value = one_node("ReduceMean", inputs, opset=opset, keepdims=0, **attrs)
    (expected,) = reference(graph, value)
    np.testing.assert_allclose(raise_to_fx(graph)(torch.from_numpy(value)).numpy(), expected, atol=1e-6)


def test_computed_shapes():
    """Shape -> Gather -> Concat -> Reshape, as exporters write ``x.view(len(x), -1)``; any batch goes through."""
    source, shape, count, target, out = (gs.Variable(name) for name in ("x", "shape", "count", "target", "y"))
    source.dtype, source.shape = np.dtype(np.float32), ["N", 3, 4]
    nodes = [
        gs.Node("Shape", inputs=[source], outputs=[shape]),
        gs.Node("Gather", inputs=[shape, gs.Constant("zero", ints(0))], outputs=[count]),
        gs.Node("Concat", attrs={"axis": 0}, inputs=[count, gs.Constant("rest", ints(-1))], outputs=[target]),
        gs.Node("Reshape", inputs=[source, target], outputs=[out]),
    ]
    module = raise_to_fx(Graph(gs.Graph(nodes=nodes, inputs=[source], outputs=[out], opset=20)))
    for batch in (1, 5):
        assert module(torch.zeros(batch, 3, 4)).shape == (batch, 12)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("early", "conv:2x8/avg+max/s8"),
        ("early", "dwsep:2x8/avg"),
        ("last", "bottleneck:1x8/avg"),
        ("line", "conv:1x8/avg/s2"),
        ("tokens", "mlp:1x8/mean"),
        ("tokens", "none/cls"),
        ("flat", "mlp:2x8/avg"),
    ],
)
def test_trained_parameters_come_back(name, text):
    where = SITES[name]
    graph = head_graph(HeadSpec.parse(text), where, num_classes=4, seed=1)
    module = raise_to_fx(graph)
    assert set(fx_parameters(module)) == set(graph.parameters())
    for key, values in fx_parameters(module).items():
        np.testing.assert_array_equal(values, graph.parameters()[key])

    inputs, labels = torch.from_numpy(samples(where, 16)), torch.arange(16) % 4
    optimiser = torch.optim.SGD(module.parameters(), 0.1)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(module(inputs), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    module.eval()
    arrays = fx_parameters(module)
    for key, values in arrays.items():
        assert (values != graph.parameters()[key]).any(), f"{key} did not move"
    trained = with_parameters(graph, arrays)
    mine, theirs = module(inputs).detach().numpy(), run(trained, inputs.numpy())
    np.testing.assert_allclose(mine, theirs, atol=1e-5)
    assert np.abs(run(graph, inputs.numpy()) - theirs).max() > 1e-3, (
        "the graph given must not have been trained in place"
    )
    # what a forgotten running statistic would look like
    if "layer0.bn.running_mean" in arrays:
        arrays["layer0.bn.running_mean"] = np.zeros_like(arrays["layer0.bn.running_mean"])
        assert np.abs(run(with_parameters(graph, arrays), inputs.numpy()) - mine).max() > 1e-3


def test_modules_and_running_statistics():
    graph = head_graph(HeadSpec.parse("conv:1x8/avg"), SITES["early"], num_classes=4, seed=1)
    module = raise_to_fx(graph)
    kinds = {name: type(part) for name, part in module.named_modules() if name}
    container = kinds.pop("layer0")
    assert container is nn.Module
    assert kinds == {"layer0.conv": nn.Conv2d, "layer0.bn": nn.BatchNorm2d, "classifier": nn.Linear}
    keys = {f"layer0.bn.{key}" for key in nn.BatchNorm2d(1).state_dict()}
    assert set(module.state_dict()) == keys | {"layer0.conv.weight", "classifier.weight", "classifier.bias"}
    inputs = torch.from_numpy(samples(SITES["early"], 16))
    module(inputs)
    conv, batch_norm = module.layer0.conv, module.layer0.bn
    expected = 0.1 * conv(inputs).mean(dim=(0, 2, 3))  # torch's momentum on statistics that start at 0
    np.testing.assert_allclose(batch_norm.running_mean.numpy(), expected.detach().numpy(), atol=1e-6)
    assert fx_parameters(module)["layer0.bn.running_mean"].any()
    module.eval()
    kept = fx_parameters(module)
    module(inputs * 3)
    for name, values in fx_parameters(module).items():
        np.testing.assert_array_equal(values, kept[name])


def test_a_copy_still_knows_the_names():
    graph = head_graph(HeadSpec.parse("conv:1x8/avg"), SITES["early"], num_classes=4, seed=1)
    module = copy.deepcopy(raise_to_fx(graph))
    assert set(fx_parameters(module)) == set(graph.parameters())
    with pytest.raises(ModelError, match="not made by raise_to_fx"):
        fx_parameters(torch.fx.symbolic_trace(nn.Linear(2, 2)))


def test_a_constant_used_twice_is_one_parameter():
    source, middle, out = (gs.Variable(name, np.float32, ["N", 4]) for name in ("x", "m", "y"))
    shared = gs.Constant("w", weights(4, 4))
    nodes = [
        gs.Node("Gemm", name="a", attrs={"transB": 1}, inputs=[source, shared], outputs=[middle]),
        gs.Node("MatMul", name="b", inputs=[middle, shared], outputs=[out]),
    ]
    module = raise_to_fx(Graph(gs.Graph(nodes=nodes, inputs=[source], outputs=[out], opset=20)))
    assert len(list(module.parameters())) == 1
    before = fx_parameters(module)["w"]
    module(torch.ones(2, 4)).sum().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= parameter.grad
    after = fx_parameters(module)["w"]
    assert (before != after).any()
    expected = torch.ones(2, 4) @ torch.from_numpy(after).T @ torch.from_numpy(after)
    np.testing.assert_allclose(module(torch.ones(2, 4)).detach().numpy(), expected.numpy(), rtol=1e-5)


def test_unknown_operators_are_named_and_can_be_added(monkeypatch):
    from eexform.backends import fx

    graph, value = one_node("GridSample", [X, weights(2, 3, 3, 2)])
    assert "GridSample" in supported()
    monkeypatch.setattr(fx, "_OPS", {name: rule for name, rule in fx._OPS.items() if name != "GridSample"})
    with pytest.raises(ModelError, match=r"node 'the_node': operator 'GridSample' cannot be raised"):
        raise_to_fx(graph)

    @op("GridSample")
    def grid_sample(raiser, node):
        grid = raiser.value(node, 1)
        return raiser.call(nn.functional.grid_sample, raiser.value(node, 0), grid, align_corners=False)

    assert "GridSample" in supported()
    (expected,) = reference(graph, value)
    np.testing.assert_allclose(raise_to_fx(graph)(torch.from_numpy(value)).detach().numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "inputs", "outputs", "attrs", "message"),
    [
        ("MaxPool", [X], 1, {"kernel_shape": [2, 2, 2, 2]}, "4 spatial axes"),
        ("GridSample", [weights(1, 2, 3, 3, 3), weights(1, 2, 2, 2, 3)], 1, {"mode": "cubic"}, "mode 'cubic' on 5"),
        ("Pad", [X, ints(0, 0, 0, 0, 0, 0, 0, 1)], 1, {"mode": "stretch"}, "mode 'stretch'"),
    ],
)
def test_forms_torch_does_not_have(name, inputs, outputs, attrs, message):
    graph, _ = one_node(name, inputs, outputs=outputs, **attrs)
    with pytest.raises(ModelError, match=rf"node 'the_node'.*{message}"):
        raise_to_fx(graph)


@pytest.mark.shared_data
@pytest.mark.parametrize("file", ["ic_resnet8_cifar10.onnx", "kws_dscnn.onnx", "cifar10_resnet20_opset17.onnx"])
def test_real_networks(shared, file):
    from eexform.frontends.onnx import load

    graph = load(shared / "models" / file)
    tensor = graph.gs.inputs[0]
    value = RNG.normal(size=(2, *tensor.shape[1:])).astype(np.float32)
    found = raise_to_fx(graph).eval()(torch.from_numpy(value)).detach().numpy()
    np.testing.assert_allclose(found, run(graph, value), atol=1e-4, rtol=1e-4)
