"""Graphs as onnxruntime executes them: what the operators are, whose time theirs is, and what their time depends on."""

from __future__ import annotations

import numpy as np
import pytest

from eexform.cost_models import _ort_kernels
from eexform.cost_models._ort_describe import Call, Value, describe
from eexform.frontends.onnx import from_model
from eexform.ir.arithmetic import node_macs
from eexform.ir.graph import Graph
from tests import zoo
from tests.passes.helpers import CHAIN, graph_of


def floats(*shape: int, **more: object) -> Value:
    return Value("float32", shape, **more)  # type: ignore[arg-type]


def whole(*numbers: int) -> Value:
    return Value("int64", (len(numbers),), constant=True, whole=numbers)


def sized(op: str, inputs: list[Value], output: Value, **attributes: object) -> tuple[str, tuple[int, ...]]:
    found = describe(Call(op, attributes, tuple(inputs), (output,)))
    return " ".join(found.tokens), found.sizes


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_operator_belongs_to_a_node(name: str) -> None:
    graph = from_model(zoo.build(name))
    bindings = {"seq": 6}
    found = _ort_kernels.kernels(graph, bindings)
    names = {node.name for node in graph.nodes}
    assert found
    assert {kernel.name for kernel in found} <= names
    assert all(min(kernel.sizes) >= 1 and kernel.write_bytes >= 0 for kernel in found)
    # channels are padded to whole blocks: never fewer multiply-accumulates than the graph has
    assert sum(kernel.macs for kernel in found) >= sum(
        node_macs(node, graph.types, bindings) or 0 for node in graph.nodes
    )


def test_fused_operators_and_their_owners() -> None:
    graph = graph_of(CHAIN)
    found = _ort_kernels.kernels(graph)
    convolutions = [kernel for kernel in found if kernel.kind == "conv"]
    assert len(convolutions) == 3
    assert all(kernel.variant.endswith("Relu") for kernel in convolutions), "the activation is part of the convolution"
    assert [kernel.name for kernel in convolutions] == ["relu1", "relu2", "relu3"]
    assert found[-1].op == "Gemm"
    assert found[-1].name == "fc"
    assert not any(kernel.op == "Relu" for kernel in found)


def test_layout_changes_belong_to_what_follows_them() -> None:
    graph = graph_of("""
    <ir_version: 8, opset_import: ["": 17]>
    mixed (float[N, 32, 8, 8] image) => (float[N, 2048] scores)
    <float[32, 32, 3, 3] w>
    {
        [sum] s = Add(image, image)
        [conv] c = Conv<pads = [1, 1, 1, 1]>(s, w)
        [soft] t = Softmax<axis = 1>(c)
        [flat] scores = Flatten(t)
    }
    """)
    owners = [(kernel.op.rpartition(".")[2], kernel.name) for kernel in _ort_kernels.kernels(graph)]
    assert ("Add", "sum") in owners
    assert ("Softmax", "soft") in owners
    assert all(name == "conv" for op, name in owners if op in ("Conv", "ReorderInput", "ReorderOutput"))


def test_symbolic_sizes_are_bound() -> None:
    graph = graph_of("""
    <ir_version: 8, opset_import: ["": 17]>
    tokens (float[N, seq, 4] x) => (float[N, 3] scores)
    <float[4, 3] w>
    {
        [m] m = MatMul(x, w)
        [mean] scores = ReduceMean<axes = [1], keepdims = 0>(m)
    }
    """)
    with pytest.raises(Exception, match="seq"):
        _ort_kernels.kernels(graph)
    found = _ort_kernels.kernels(graph, {"seq": 6})
    assert found[0].sizes == (1, 6, 3, 4)
    assert found[0].macs == 72


@pytest.mark.parametrize(
    ("op", "inputs", "output", "attributes", "expected"),
    [
        ("Transpose", [floats(4, 8, 6)], floats(8, 4, 6), {"perm": [1, 0, 2]}, ("float32 order102", (4, 8, 6))),
        ("Transpose", [floats(1, 4, 8, 6)], floats(1, 8, 6, 4), {"perm": [0, 2, 3, 1]}, ("float32 order10", (4, 48))),
        ("Transpose", [floats(1, 9)], floats(9, 1), {"perm": [1, 0]}, ("float32 order0", (9,))),
        ("Add", [floats(1, 8, 5), floats(5)], floats(1, 8, 5), {}, ("float32 x.|xx", (8, 5))),
        ("Add", [floats(2, 8, 5), floats(2, 8, 5)], floats(2, 8, 5), {}, ("float32 xx", (80,))),
        ("ReduceMean", [floats(1, 8, 4, 4), whole(2, 3)], floats(1, 8), {}, ("float32 kept-reduced", (8, 16))),
        ("ReduceMean", [floats(1, 8, 4)], floats(1, 4), {"axes": [1]}, ("float32 reduced-kept", (8, 4))),
        ("Softmax", [floats(2, 3, 7)], floats(2, 3, 7), {}, ("float32", (6, 7))),
        ("LayerNormalization", [floats(1, 5, 6)], floats(1, 5, 6), {"axis": -1}, ("float32", (5, 6))),
        ("Concat", [floats(2, 3, 4), floats(2, 5, 4)], floats(2, 8, 4), {"axis": 1}, ("float32 parts2", (2, 32))),
        (
            "Slice",
            [floats(1, 8, 4), whole(0), whole(2), whole(1), whole(1)],
            floats(1, 2, 4),
            {},
            ("float32", (1, 8)),
        ),
        (
            "Slice",
            [floats(1, 8, 4), whole(0), whole(4), whole(2), whole(2)],
            floats(1, 8, 2),
            {},
            ("float32 steps", (16, 1)),
        ),
        ("Reshape", [floats(1, 8, 4), whole(1, 32)], floats(1, 32), {}, ("float32 alias", (1,))),
        ("MatMul", [floats(2, 3, 4, 5), floats(2, 3, 5, 7)], floats(2, 3, 4, 7), {}, ("float32", (6, 4, 7, 5))),
        (
            "Gemm",
            [floats(1, 5), floats(7, 5, constant=True), floats(7, constant=True)],
            floats(1, 7),
            {"transB": 1},
            ("float32 right-transposed weights bias", (1, 1, 7, 5)),
        ),
        (
            "Conv",
            [floats(1, 6, 8, 8), floats(6, 1, 3, 3, constant=True)],
            floats(1, 6, 8, 8),
            {"group": 6, "pads": [1, 1, 1, 1]},
            ("float32 depthwise 3x3 p1", (6, 64)),
        ),
        ("Unheard", [floats(2, 3)], floats(2, 9), {"power": 2}, ("float32 power=2 inputs1", (18,))),
    ],
)  # fmt: skip
def test_what_time_depends_on(
    op: str, inputs: list[Value], output: Value, attributes: dict[str, object], expected: tuple[str, tuple[int, ...]]
) -> None:
    assert sized(op, inputs, output, **attributes) == expected


def test_a_form_that_a_rule_does_not_know_is_described_in_general() -> None:
    variant, sizes = sized("Conv", [floats(1, 6, 8, 8)], floats(1, 6, 8, 8))
    assert variant.startswith("float32")
    assert sizes == (384,)


def test_subnormal_numbers_are_seen() -> None:
    graph = graph_of("""
    <ir_version: 8, opset_import: ["": 17]>
    tiny (float[N, 4] x) => (float[N, 4] scores)
    <float[4] small>
    {
        [scale] m = Mul(x, small)
        [other] scores = Tanh(m)
    }
    """, arrays={"small": np.full(4, 1e-41, np.float32)})  # fmt: skip
    assert all(kernel.variant.endswith("subnormal") for kernel in _ort_kernels.kernels(graph))
    plain: Graph = graph_of(CHAIN)
    assert not any("subnormal" in kernel.variant for kernel in _ort_kernels.kernels(plain))
