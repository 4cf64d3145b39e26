"""Kernels: which nodes are one call, what it reads and writes, and that nothing is counted twice or lost."""

from __future__ import annotations

import onnx
import pytest

from eexform.cost_models import make
from eexform.cost_models._kernels import Kernel, free_nodes, kernels
from eexform.cost_models.roofline import computed_in, shrunk
from eexform.errors import GraphError, OptionError
from eexform.frontends.onnx import from_model
from eexform.ir.exits import Exit
from eexform.ir.extract import extract
from eexform.ir.graph import Graph
from tests.passes.helpers import CHAIN, graph_of
from tests.zoo import doors, modules
from tests.zoo.net import Net


def of(net: Net, scores: str, classes: int = 5) -> Graph:
    return from_model(net.model(scores, classes))


def by_op(graph: Graph) -> dict[str, list[Kernel]]:
    found: dict[str, list[Kernel]] = {}
    for kernel in kernels(graph):
        found.setdefault(kernel.op, []).append(kernel)
    return found


@pytest.mark.parametrize("door", doors.DOORS)
@pytest.mark.parametrize("name", modules.NAMES)
def test_kernels_partition_the_nodes(name: str, door: str) -> None:
    graph = doors.graph(name, door)
    found = kernels(graph)
    counted = [node for kernel in found for node in kernel.nodes] + list(free_nodes(graph))
    assert sorted(counted) == sorted(node.name for node in graph.nodes)
    assert sum(kernel.macs for kernel in found) == make("macs").cost(graph).total
    for kernel in found:
        assert kernel.name == kernel.nodes[-1]
        assert kernel.write_bytes > 0
        assert kernel.read_bytes + kernel.weight_bytes > 0
        assert kernel.sizes
    # in the order of execution: what a kernel reads was made by one before it
    done: set[str] = set(free_nodes(graph))
    for kernel in found:
        needed = graph.flow.ancestors([graph.flow.nodes[kernel.name].outputs[0].name])
        assert needed - done <= set(kernel.nodes)
        done.update(kernel.nodes)


def test_a_convolution_takes_along_normalisation_residual_and_activation() -> None:
    net = Net("block")
    x = net.input("image", 8, 6, 6)
    before = net.op("Relu", x)
    y = net.conv_bn_relu(before, 8, 8)
    y = net.op("Relu", net.op("Add", net.conv_bn(y, 8, 8), before))
    found = by_op(of(net, net.classifier(y, 8, 5)))
    assert [len(kernel.nodes) for kernel in found["Conv"]] == [3, 4]
    plain, residual = found["Conv"]
    assert plain.variant == "k3x3 s1x1 d1x1 Relu float32"
    assert residual.variant == "k3x3 s1x1 d1x1 Add Relu float32"
    assert residual.sizes == (8, 8, 6, 6)
    assert residual.macs == 6 * 6 * 8 * 8 * 9
    value = 4 * 8 * 6 * 6
    assert (residual.read_bytes, residual.write_bytes) == (2 * value, value)
    assert residual.weight_bytes == 4 * (8 * 8 * 9 + 8)  # normalisation is folded into weights and bias
    assert residual.channels == (8, 8)
    assert set(found) == {"Conv", "Relu", "GlobalAveragePool", "Gemm"}


def test_of_two_convolutions_that_meet_the_later_one_makes_the_sum() -> None:
    net = Net("meet")
    x = net.op("Relu", net.input("image", 4, 6, 6))
    left, right = net.conv(x, 4, 8), net.conv(x, 4, 8, kernel=1)
    found = by_op(of(net, net.classifier(net.op("Add", left, right), 8, 5)))
    assert [kernel.variant for kernel in found["Conv"]] == ["k3x3 s1x1 d1x1 float32", "k1x1 s1x1 d1x1 Add float32"]


def test_what_others_read_is_not_swallowed() -> None:
    net = Net("shared")
    x = net.conv(net.input("image", 4, 6, 6), 4, 4)
    twice = net.op("Add", net.op("Relu", x), net.op("Sigmoid", x))
    found = by_op(of(net, net.classifier(twice, 4, 5)))
    assert [len(kernel.nodes) for kernel in found["Conv"]] == [1]
    assert {"Relu", "Sigmoid", "Add"} <= set(found)


def test_values_of_exits_and_outputs_are_not_swallowed() -> None:
    graph = graph_of(CHAIN)
    assert ("conv2", "relu2") in [kernel.nodes for kernel in kernels(graph)]
    at_site = graph.replace(exits=[Exit(site="c2", head="none/avg", logits="scores")])
    as_output = extract(graph, graph.inputs, ["c2", "scores"])
    for changed in (at_site, as_output):
        found = [kernel.nodes for kernel in kernels(changed)]
        assert ("conv2",) in found
        assert ("relu2",) in found
        assert ("conv3", "relu3") in found


@pytest.mark.parametrize(
    ("name", "nodes"),
    [("Swish", 2), ("HardSwish", 4), ("Gelu", 5), ("Gelu tanh", 8), ("Mish", 3)],
)
def test_decomposed_activations(name: str, nodes: int) -> None:
    net = Net("activation")
    x = net.conv(net.input("image", 4, 6, 6), 4, 4)
    if name == "Swish":
        y = net.op("Mul", x, net.op("Sigmoid", x))
    elif name == "HardSwish":
        clipped = net.op("Clip", net.op("Add", x, net.scalar(3)), net.scalar(0), net.scalar(6))
        y = net.op("Div", net.op("Mul", x, clipped), net.scalar(6))
    elif name == "Gelu":
        y = net.gelu(x)
    elif name == "Mish":
        y = net.op("Mul", x, net.op("Tanh", net.op("Softplus", x)))
    else:
        cube = net.op("Mul", net.scalar(0.044715), net.op("Pow", x, net.scalar(3)))
        inner = net.op("Tanh", net.op("Mul", net.op("Add", x, cube), net.scalar(0.7978846)))
        y = net.op("Mul", net.op("Mul", x, net.op("Add", inner, net.scalar(1))), net.scalar(0.5))
    conv = by_op(of(net, net.classifier(y, 4, 5)))["Conv"]
    assert [len(kernel.nodes) for kernel in conv] == [1 + nodes]
    assert conv[0].variant.split()[-2] == name.split()[0]
    assert conv[0].flops > 0


def test_squeeze_and_excite_is_no_activation() -> None:
    net = Net("se")
    x = net.op("Relu", net.conv(net.input("image", 4, 6, 6), 4, 4))
    gate = net.op("Sigmoid", net.conv(net.op("GlobalAveragePool", x), 4, 4, kernel=1))
    found = by_op(of(net, net.classifier(net.op("Mul", x, gate), 4, 5)))
    assert [kernel.variant.split()[-2] for kernel in found["Conv"]] == ["Relu", "Sigmoid"]
    assert [kernel.variant for kernel in found["Mul"]] == ["broadcast float32"]


def test_decomposed_normalisation_and_softmax() -> None:
    net = Net("norm")
    x = net.op("Relu", net.input("tokens", 6, 8))
    middle = net.op("Sub", x, net.op("ReduceMean", x, axes=[-1]))
    spread = net.op("ReduceMean", net.op("Pow", middle, net.scalar(2)), axes=[-1])
    root = net.op("Sqrt", net.op("Add", spread, net.scalar(1e-5)))
    scaled = net.op("Mul", net.op("Div", middle, root), net.weight(8))
    normed = net.op("Add", scaled, net.weight(8))
    most = net.op("Exp", net.op("Sub", normed, net.op("ReduceMax", normed, axes=[-1])))
    probable = net.op("Div", most, net.op("ReduceSum", most, net.const([-1])))
    found = by_op(of(net, net.linear(net.pick(probable, 0, 1), 8, 5)))
    assert [(len(kernel.nodes), kernel.sizes) for kernel in found["LayerNormalization"]] == [(9, (6, 8))]
    assert [(len(kernel.nodes), kernel.sizes) for kernel in found["Softmax"]] == [(5, (6, 8))]


def test_products_of_tokens() -> None:
    net = Net("attention")
    x = net.op("Relu", net.input("tokens", 6, 8))
    q, k = net.linear(x, 8, 8), net.linear(x, 8, 8)
    scores = net.op("MatMul", net.op("Mul", q, net.scalar(0.35)), net.transpose(k, 0, 2, 1))
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), x)
    found = by_op(of(net, net.linear(net.pick(net.gelu(net.linear(mixed, 8, 16)), 0, 1), 16, 5)))
    # scale and swapped axes belong to the product; the sum with a bias and the activation too
    variants = [(kernel.variant, kernel.sizes, len(kernel.nodes)) for kernel in found["MatMul"]]
    assert ("values float32", (1, 6, 8, 6), 2) in variants or ("values float32", (1, 6, 8, 6), 3) in variants
    assert ("weights Gelu float32", (6, 8, 16), 7) in variants
    assert "Transpose" not in found
    assert set(found) == {"Relu", "MatMul", "Softmax", "Gather"}


def test_depthwise_and_grouped() -> None:
    net = Net("groups")
    x = net.conv(net.input("image", 8, 6, 6), 8, 8, group=8)
    y = net.conv(x, 8, 16, group=4)
    depthwise, grouped = by_op(of(net, net.classifier(y, 16, 5)))["Conv"]
    assert (depthwise.kind, depthwise.sizes, depthwise.channels) == ("depthwise", (8, 6, 6), (1, 8))
    assert (grouped.kind, grouped.channels) == ("conv", (2, 16))
    assert "g4" in grouped.variant


def test_picking_rows_reads_what_is_picked() -> None:
    net = Net("words")
    ids = net.input("ids", 4, dtype=onnx.TensorProto.INT64)
    rows = net.op("Gather", net.weight(1000, 8), ids)
    gather = by_op(of(net, net.linear(net.pick(rows, 0, 1), 8, 5)))["Gather"][0]
    assert gather.weight_bytes == gather.write_bytes == 4 * 4 * 8
    assert gather.read_bytes == 4 * 8  # the numbers of the rows, int64


def test_operators_without_a_rule_are_kernels_without_work() -> None:
    graph = graph_of("""
    <ir_version: 8, opset_import: ["": 17, "somebody": 1]>
    custom (float[N, 4] x) => (float[N, 3] scores)
    <float[4, 3] w>
    {
        [m] m = MatMul(x, w)
        [odd] scores = somebody.Odd(m)
    }
    """)
    odd = kernels(graph)[-1]
    assert (odd.op, odd.macs, odd.flops) == ("somebody.Odd", 0, 0)


def test_symbolic_sizes_need_a_binding() -> None:
    graph = graph_of("""
    <ir_version: 8, opset_import: ["": 17]>
    tokens (float[N, seq, 4] x) => (float[N, 3] scores)
    <float[4, 3] w>
    {
        [m] m = MatMul(x, w)
        [r] scores = ReduceMean<axes = [1], keepdims = 0>(m)
    }
    """)
    with pytest.raises(GraphError, match="'seq'"):
        kernels(graph)
    assert kernels(graph, {"seq": 10})[0].macs == 10 * 4 * 3


def test_the_type_that_is_computed_with_where_the_result_does_not_tell() -> None:
    graph = graph_of("""
    <ir_version: 8, opset_import: ["": 17]>
    mixed (float[N, 4] x) => (float[N, 3] scores)
    <float[1] zero, float s = {0.05}, uint8 z = {3}, uint8[4, 3] v = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}>
    {
        [greater] g = Greater(x, zero)
        [cast] c = Cast<to = 1>(g)
        [mul] m = Mul(x, c)
        [q] u = QuantizeLinear(m, s, z)
        [product] i = MatMulInteger(u, v, z)
        [real] scores = Cast<to = 1>(i)
    }
    """)
    found = {kernel.name: kernel for kernel in kernels(graph)}
    greater, product, mul = found["greater"], found["product"], found["mul"]
    assert (greater.dtype, greater.arithmetic) == ("bool", "float32")
    assert (product.dtype, product.arithmetic) == ("int32", "uint8")
    assert (mul.dtype, mul.arithmetic) == ("float32", "")
    assert (computed_in(greater, ""), computed_in(greater, "int8"), computed_in(product, "")) == (
        "float32", "int8", "int8"
    )  # fmt: skip
    assert (shrunk(greater, "int8"), shrunk(greater, ""), shrunk(product, "float16")) == (0.25, 1.0, 1.0)
    energy = make("energy", device="rpi4")
    with pytest.raises(OptionError, match=r"in int8: use by=power, or put 'energy.pj_per_mac_int8' into its file"):
        energy.cost(graph)
    assert make("energy", device="rpi5").cost(graph).nodes["greater"] > 0
    assert not any("int32" in text for text in make("roofline", device="rpi5").cost(graph).conditions["assumed"])
