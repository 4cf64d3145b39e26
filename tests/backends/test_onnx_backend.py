"""The fx backend under onnx's interface: what models it takes, what it gives back, what it refuses."""

import numpy as np
import onnx
import onnx.parser
import pytest
import torch

from eexform.backends.onnx_backend import EexformBackend, import_model
from eexform.errors import ModelError

X = np.array([[1.0, -2.0, 3.0]], np.float32)


def model(text, opset=20):
    return onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : {opset}]>\n{text}')


def test_outputs_come_in_order_with_their_types():
    prepared = EexformBackend.prepare(
        model(
            "agraph (float[N,3] x) => (int64[2] s, float[N,3] y, bool[N,3] b) {s = Shape(x) y = Relu(x) b = IsNaN(x)}"
        )
    )
    assert (prepared.inputs, prepared.outputs) == (("x",), ("s", "y", "b"))
    for inputs in ([X], {"x": X}, X):
        shape, y, flags = prepared.run(inputs)
        assert (shape.dtype, y.dtype, flags.dtype) == (np.int64, np.float32, np.bool_)
        np.testing.assert_array_equal(shape, [1, 3])
        np.testing.assert_array_equal(y, np.maximum(X, 0))


def test_models_without_work():
    """Outputs that are an input or a constant, and no input at all."""
    passed = EexformBackend.run_model(model("agraph (float[N,3] x) => (float[N,3] y) {y = Identity(x)}"), [X])
    np.testing.assert_array_equal(passed[0], X)
    constant = model(
        "agraph () => (float[2] y, float z) "
        "{y = Constant<value = float[2] {1.0, 2.0}>() z = Constant<value_float = 3.0>()}"
    )
    y, z = EexformBackend.run_model(constant, [])
    np.testing.assert_array_equal(y, np.array([1, 2], np.float32))
    assert (z.shape, z.dtype, float(z)) == ((), np.float32, 3.0)


def test_empty_tensors_and_scalars():
    added = model("agraph (float[N,3] x, float s) => (float[N,3] y) {y = Add(x, s)}")
    (found,) = EexformBackend.run_model(added, [X[:0], np.array(2.0, np.float32)])
    assert (found.shape, found.dtype) == ((0, 3), np.float32)


def test_functions_are_inlined():
    text = """<ir_version: 9, opset_import: ["" : 20, "own" : 1]>
    agraph (float[N,3] x) => (float[N,3] y) {y = own.twice(x)}
    <opset_import: ["" : 20], domain: "own">
    twice (a) => (b) {b = Add(a, a)}"""
    (found,) = EexformBackend.run_model(onnx.parser.parse_model(text), [X])
    np.testing.assert_array_equal(found, X + X)


def test_old_operator_sets_keep_their_meaning():
    """Softmax over a matrix, axes as attributes: opset 9 through onnx's converter."""
    old = model("agraph (float[2,3,4] x) => (float[2,3,4] y) {y = Softmax<axis = 1>(x)}", opset=9)
    value = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    (found,) = EexformBackend.run_model(old, [value])
    np.testing.assert_allclose(found.reshape(2, -1).sum(1), 1.0, rtol=1e-6)


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float16", "uint16"])
def test_types_that_numpy_does_not_have_pass_unharmed(name):
    kind = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.DataType.Value(name.upper().replace("_", "")))
    value = np.array([[1, 2, 3]], np.float32).astype(kind)
    info = onnx.helper.make_tensor_value_info("x", onnx.helper.np_dtype_to_tensor_dtype(value.dtype), [1, 3])
    out = onnx.helper.make_tensor_value_info("y", onnx.helper.np_dtype_to_tensor_dtype(value.dtype), [1, 3])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    whole = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [info], [out]))
    (found,) = EexformBackend.run_model(whole, [value])
    assert found.dtype == value.dtype
    np.testing.assert_array_equal(found.astype(np.float32), [[1, 2, 3]])


def test_one_node_at_a_time():
    node = onnx.helper.make_node("Gemm", ["a", "b", ""], ["c"], transB=1)
    weight = np.eye(3, dtype=np.float32) * 2
    (found,) = EexformBackend.run_node(node, [X, weight])
    np.testing.assert_array_equal(found, X @ weight.T)
    values, places = EexformBackend.run_node(
        onnx.helper.make_node("TopK", ["x", "k"], ["v", "i"]), {"x": X, "k": np.array([2])}
    )
    np.testing.assert_array_equal(values, [[3.0, 1.0]])
    np.testing.assert_array_equal(places, [[2, 0]])
    with pytest.raises(ModelError, match="has 2 inputs, 1 values were given"):
        EexformBackend.run_node(node, [X])


def test_what_it_cannot_run_it_says():
    unknown = model("agraph (float[N,3] x) => (float[N,3] y) {y = Bernoulli(x)}")
    assert not EexformBackend.is_compatible(unknown)
    with pytest.raises(ModelError, match="operator 'Bernoulli' cannot be raised"):
        EexformBackend.prepare(unknown)
    known = model("agraph (float[N,3] x) => (float[N,3] y) {y = Relu(x)}")
    assert EexformBackend.is_compatible(known)
    with pytest.raises(ModelError, match="1 inputs, 2 values"):
        EexformBackend.prepare(known).run([X, X])
    assert EexformBackend.supports_device("CPU")
    assert EexformBackend.supports_device("CUDA") == torch.cuda.is_available()
    with pytest.raises(ModelError, match="device 'TPU' is not there"):
        EexformBackend.prepare(known, "TPU")
    broken = model("agraph (float[N,3] x) => (float[N,3] y) {y = Relu(nothing)}")
    with pytest.raises(onnx.checker.ValidationError):
        EexformBackend.prepare(broken)


def test_the_given_model_is_not_changed():
    text = "agraph (float[N,3] x) => (float[N,3] y) {c = Constant<value = float[3] {1.0, 2.0, 3.0}>() y = Add(x, c)}"
    whole = model(text)
    before = whole.SerializeToString()
    graph = import_model(whole)
    assert whole.SerializeToString() == before
    assert [node.op for node in graph.nodes] == ["Add"]
