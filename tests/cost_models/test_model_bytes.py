"""Bytes of constants, counted by hand, against the arrays that a file holds, and through exits and lowering."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from eexform.cost_models import exit_costs, get, make, parse
from eexform.errors import OptionError
from eexform.frontends.onnx import from_model
from eexform.ir.elements import bits, dtype_of, file_bytes, is_float
from eexform.ir.graph import Graph
from eexform.passes import make as make_pass
from tests.graphs import random_classifier
from tests.passes.helpers import CHAIN, graph_of

# float32: 3*2*9, 6*3*9, 6*6*9, 4*6 + 4
BYTES = {"conv1": 4 * 54, "conv2": 4 * 162, "conv3": 4 * 324, "fc": 4 * 28}


def constant(kind: str, *shape: int) -> gs.Constant:
    """A constant of an ONNX element type."""
    dtype = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, kind))
    return gs.Constant(f"c_{kind}_{'x'.join(map(str, shape))}", np.ones(shape).astype(dtype))


def reading(*constants: gs.Constant) -> Graph:
    """A graph of one node per constant, which reads it."""
    nodes = [
        gs.Node("Odd", name=f"n{k}", inputs=[tensor], outputs=[gs.Variable(f"o{k}")], domain="somebody")
        for k, tensor in enumerate(constants)
    ]
    return Graph(gs.Graph(nodes=nodes, outputs=[node.outputs[0] for node in nodes], opset=17))


def test_by_hand():
    cost = make("model_bytes").cost(graph_of(CHAIN))
    assert {name: size for name, size in cost.nodes.items() if size} == BYTES
    assert cost.total == sum(BYTES.values()) == sum(cost.nodes.values())
    assert cost.conditions == {"bytes": {"float32": cost.total}}
    assert (get("model_bytes").unit, get("model_bytes").per_sample, get("model_bytes").additive) == (
        "bytes",
        False,
        True,
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("DOUBLE", 168), ("FLOAT", 84), ("FLOAT16", 42), ("BFLOAT16", 42), ("FLOAT8E4M3FN", 21), ("INT64", 168),
        ("INT32", 84), ("INT8", 21), ("UINT8", 21), ("BOOL", 21), ("INT4", 11), ("UINT4", 11), ("FLOAT4E2M1", 11),
    ],
)  # fmt: skip
def test_types(kind, expected):
    """21 elements: what onnx itself writes for them."""
    tensor = constant(kind, 3, 7)
    assert make("model_bytes").cost(reading(tensor)).total == expected
    assert expected == len(numpy_helper.from_array(tensor.values).raw_data)
    floating = kind.startswith(("FLOAT", "BFLOAT", "DOUBLE"))
    assert is_float(tensor.values.dtype) == floating
    assert make("params").cost(reading(tensor)).total == 21 * floating


def test_each_constant_is_packed_for_itself_and_counts_once():
    odd, other = constant("INT4", 3), constant("INT4", 5)
    cost = make("model_bytes").cost(reading(odd, other, odd))
    assert cost.nodes == {"n0": 2, "n1": 3, "n2": 0}
    assert cost.conditions == {"bytes": {"int4": 5}}


def test_text_and_types_by_name():
    text = helper.make_tensor("words", TensorProto.STRING, [2], ["one", "grün"])
    node = helper.make_node("Identity", ["words"], ["out"])
    output = helper.make_tensor_value_info("out", TensorProto.STRING, [2])
    graph = Graph(gs.import_onnx(helper.make_model(helper.make_graph([node], "text", [], [output], [text]))))
    cost = make("model_bytes").cost(graph)
    assert (cost.total, cost.conditions) == (3 + 5, {"bytes": {"string": 8}})
    assert dtype_of(None) is None
    assert dtype_of(TensorProto.FLOAT16) == np.float16
    assert bits(np.dtype("complex64")) == 64
    assert file_bytes(np.dtype("bool"), 9) == 9


@pytest.mark.parametrize(
    ("dtype", "share"), [("float64", 2.0), ("float32", 1.0), ("float16", 0.5), ("bfloat16", 0.5), ("int8", 0.25)]
)
def test_what_if(dtype, share):
    graph = graph_of(CHAIN)
    cost = parse(f"model_bytes:dtype={dtype}").cost(graph)
    assert cost.total == share * make("model_bytes").cost(graph).total
    assert cost.conditions == {"bytes": {dtype: cost.total}}


def test_what_if_leaves_integers_as_they_are():
    graph = reading(constant("FLOAT16", 3), constant("BFLOAT16", 3), constant("INT64", 3), constant("INT8", 3))
    cost = make("model_bytes", dtype="int4").cost(graph)
    assert cost.nodes == {"n0": 2, "n1": 2, "n2": 24, "n3": 3}
    assert cost.conditions == {"bytes": {"int4": 4, "int64": 24, "int8": 3}}


def test_mistakes_are_named():
    with pytest.raises(OptionError, match="there is no 'int9': did you mean 'int"):
        parse("model_bytes:dtype=int9")


def test_exits_and_branches():
    graph = graph_of(CHAIN)
    insert = make_pass("insert_exits", sites=["r1"], heads={"r1": "none/avg"}, thresholds={"r1": 0.5}, untrained=True)
    with_exit = insert(graph).graph
    model = make("model_bytes")
    whole = model.cost(with_exit).total
    assert whole > model.cost(graph).total
    assert set(exit_costs(with_exit, model)) == {whole}  # in the file whatever path a sample takes
    lowered = make_pass("lower")(with_exit).graph
    # the parameters behind the exit moved into a branch; thresholds, axes and the like come with control flow
    found = model.cost(lowered)
    assert any(node.op == "If" and found.nodes[node.name] >= BYTES["conv2"] + BYTES["conv3"] for node in lowered.nodes)
    assert 0 <= found.conditions["bytes"]["float32"] - whole < 80
    assert 0 < found.total - whole < 400


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_as_much_as_the_file_holds(seed):
    proto = random_classifier(seed)
    graph = from_model(proto)
    cost = make("model_bytes").cost(graph)
    read = {name for node in proto.graph.node for name in node.input}
    held = sum(
        math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in proto.graph.initializer
        if tensor.name in read
    )
    assert cost.total == held == sum(cost.nodes.values()) == sum(cost.conditions["bytes"].values())
    assert cost.total == sum(tensor.values.nbytes for tensor in graph.constants.values())
    assert cost.conditions["bytes"]["float32"] == 4 * make("params").cost(graph).total
    assert cost.total < len(onnx.ModelProto.SerializeToString(proto))
