"""General operators of the fx backend: random cases against onnxruntime, and what onnx's suite leaves out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from eexform.backends.fx import fx_parameters, raise_to_fx
from eexform.backends.torch_types import to_array, to_tensor
from eexform.errors import ModelError
from eexform.ir.graph import Graph

OPSET = 21
FLOATS, NUMBERS = ("float32", "float64"), ("float32", "float64", "int32", "int64")


def built(op: str, operands: list[Any], attrs: dict[str, Any], computed: list[bool], outputs: int = 1) -> Graph:
    """A graph of one node; operands (``None``: left out) are constants where not ``computed``, else inputs."""
    tensors: list[gs.Tensor] = []
    for place, (array, fed) in enumerate(zip(operands, computed, strict=True)):
        if array is None:
            tensors.append(gs.Variable.empty())
        elif fed:
            tensors.append(gs.Variable(f"x{place}", array.dtype, [None] * array.ndim))
        else:
            tensors.append(gs.Constant(f"x{place}", array))
    results = [gs.Variable(f"y{place}") for place in range(outputs)]
    node = gs.Node(op, name="the_node", attrs=attrs, inputs=tensors, outputs=results)
    inputs = [tensor for tensor in tensors if isinstance(tensor, gs.Variable) and not tensor.is_empty()]
    return Graph(gs.Graph(nodes=[node], inputs=inputs, outputs=results, opset=OPSET))


def by_onnxruntime(graph: Graph, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    model = gs.export_onnx(graph.gs, do_type_check=False)
    model.ir_version = 10
    for output in model.graph.output:
        output.ClearField("type")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    typed = onnx.shape_inference.infer_shapes(model).SerializeToString()
    return ort.InferenceSession(typed, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def compare(op: str, operands: list[Any], attrs: dict[str, Any], computed: list[bool], outputs: int = 1) -> None:
    """The raised module, a deep copy of it and onnxruntime agree; gradients are finite."""
    operands = [None if array is None else np.asarray(array) for array in operands]
    graph = built(op, operands, attrs, computed, outputs)
    fed = [array for array, is_fed in zip(operands, computed, strict=True) if is_fed and array is not None]
    expected = by_onnxruntime(graph, dict(zip(graph.inputs, fed, strict=True)))
    module = raise_to_fx(graph)
    values = [to_tensor(array) for array in fed]
    for value in values:
        value.requires_grad_(value.is_floating_point())
    found = module(*values)
    found = (found,) if outputs == 1 else found
    for result, again, wanted in zip(found, _listed(copy.deepcopy(module)(*values), outputs), expected, strict=True):
        array = to_array(result)
        assert array.dtype == wanted.dtype, (op, array.dtype, wanted.dtype)
        np.testing.assert_allclose(array, wanted, rtol=1e-4, atol=1e-5, err_msg=op)
        np.testing.assert_array_equal(to_array(again), array)
    trained = [result.double().sum() for result in found if result.requires_grad]
    if trained:
        sum(trained).backward()
        for value in (*values, *module.parameters()):
            assert value.grad is None or bool(torch.isfinite(value.grad).all()), op


def _listed(found: Any, outputs: int) -> Any:
    return (found,) if outputs == 1 else found


# -- random cases --------------------------------------------------------------------------------------------------


class Draw:
    """What a case draws its operands with."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))

    def pick(self, choices: Any) -> Any:
        return self.data.draw(st.sampled_from(list(choices)))

    def number(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def shape(self, low: int = 1, high: int = 4) -> tuple[int, ...]:
        return tuple(self.data.draw(st.lists(st.integers(1, 4), min_size=low, max_size=high)))

    def array(self, shape: tuple[int, ...], kinds: Any = NUMBERS) -> np.ndarray:
        values = self.random.normal(size=shape) * 3
        kind = np.dtype(self.pick(kinds))
        values = np.round(values) + (self.random.random(shape) < 0.5) if kind.kind == "i" else values
        return np.asarray(values, kind)

    def axes(self, rank: int) -> np.ndarray:
        chosen = sorted(self.data.draw(st.sets(st.integers(0, rank - 1), max_size=rank)))
        return np.array([axis - rank if self.number(0, 1) else axis for axis in chosen], np.int64)


Case = tuple[str, list[Any], dict[str, Any], int]


def elementwise(draw: Draw) -> Case:
    op = draw.pick(["Sin", "Atan", "Tanh", "Erf", "Round", "Floor", "IsNaN", "Abs", "Neg", "Sign", "Exp", "Asinh"])
    kinds = ("float32",) if op in ("Atan", "Erf", "Asinh") else FLOATS
    return op, [draw.array(draw.shape(), kinds)], {}, 1


def binary(draw: Draw) -> Case:
    op = draw.pick(["Add", "Sub", "Mul", "Div", "Max", "Min", "Mod", "Greater", "LessOrEqual", "Equal", "Pow"])
    shape = draw.shape()
    left = draw.array(shape)
    right = draw.array(shape[draw.number(0, len(shape)) :], (left.dtype.name,))
    attrs = {}
    if op in ("Div", "Mod"):
        right = np.where(np.abs(right) < 1, np.ones_like(right), right)
    if op == "Mod":
        attrs["fmod"] = 1 if left.dtype.kind == "f" else 0
    if op == "Pow":
        left, right = np.abs(left) + left.dtype.type(1), np.abs(right) % right.dtype.type(3)
    return op, [left, right], attrs, 1


def many(draw: Draw) -> Case:
    op, shape = draw.pick(["Sum", "Mean", "Max", "Min"]), draw.shape()
    return op, [draw.array(shape[place % 2 :], ("float32",)) for place in range(draw.number(1, 4))], {}, 1


def clip(draw: Draw) -> Case:
    value = draw.array(draw.shape())
    bounds = [np.array(draw.number(-2, 2), value.dtype) if draw.number(0, 2) else None for _ in range(2)]
    if bounds[0] is not None and bounds[1] is not None and bounds[0] > bounds[1]:
        bounds.reverse()
    return "Clip", [value, *bounds], {}, 1


def reduction(draw: Draw) -> Case:
    op = draw.pick(["L1", "L2", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"])
    value = draw.array(draw.shape(), ("float32",))
    attrs = {"keepdims": draw.number(0, 1), "noop_with_empty_axes": 0}
    return f"Reduce{op}", [value, draw.axes(value.ndim)], attrs, 1


def arg(draw: Draw) -> Case:
    value = np.round(draw.array(draw.shape(), ("float32",)))
    axis = draw.number(-value.ndim, value.ndim - 1)
    attrs = {"axis": axis, "keepdims": draw.number(0, 1), "select_last_index": draw.number(0, 1)}
    return draw.pick(["ArgMax", "ArgMin"]), [value], attrs, 1


def top_k(draw: Draw) -> Case:
    value = draw.array(draw.shape(), ("float32",))
    axis = draw.number(-value.ndim, value.ndim - 1)
    count = np.array([draw.number(1, value.shape[axis])], np.int64)
    return "TopK", [value, count], {"axis": axis, "largest": draw.number(0, 1)}, 2


def cumulative(draw: Draw) -> Case:
    value = draw.array(draw.shape())
    axis = np.array(draw.number(-value.ndim, value.ndim - 1), np.int64)
    return "CumSum", [value, axis], {"exclusive": draw.number(0, 1), "reverse": draw.number(0, 1)}, 1


def cut(draw: Draw) -> Case:
    value = draw.array(draw.shape())
    axes = draw.axes(value.ndim)
    starts, ends = (np.array([draw.number(-6, 6) for _ in axes], np.int64) for _ in range(2))
    steps = np.array([draw.pick([-2, -1, 1, 2]) for _ in axes], np.int64)
    ends = np.where(draw.number(0, 3) == 0, np.where(steps < 0, -(2**40), 2**40), ends)
    return "Slice", [value, starts, ends, axes, steps], {}, 1


def pad(draw: Draw) -> Case:
    mode = draw.pick(["constant", "edge", "wrap", "reflect"])
    value = draw.array(tuple(size + 2 for size in draw.shape()), ("float32",))
    pads = np.array([draw.number(-1 if mode == "constant" else 0, 2) for _ in range(2 * value.ndim)], np.int64)
    return "Pad", [value, pads, np.array(1.5, np.float32) if mode == "constant" else None], {"mode": mode}, 1


def gather(draw: Draw) -> Case:
    value = draw.array(draw.shape())
    axis = draw.number(-value.ndim, value.ndim - 1)
    size = value.shape[axis]
    places = draw.random.integers(-size, size, draw.shape(0, 2))
    return "Gather", [value, np.asarray(places, draw.pick([np.int32, np.int64]))], {"axis": axis}, 1


def gather_elements(draw: Draw) -> Case:
    value = draw.array(draw.shape())
    axis = draw.number(-value.ndim, value.ndim - 1)
    places = draw.random.integers(-value.shape[axis], value.shape[axis], value.shape)
    return "GatherElements", [value, places], {"axis": axis}, 1


def scatter_elements(draw: Draw) -> Case:
    value = draw.array(draw.shape(), ("float32",))
    axis = draw.number(-value.ndim, value.ndim - 1)
    places = np.argsort(draw.random.random(value.shape), axis)  # no place twice
    reduction = draw.pick(["none", "add", "mul", "max", "min"])
    return "ScatterElements", [value, places, draw.array(value.shape, ("float32",))], {
        "axis": axis,
        "reduction": reduction,
    }, 1  # fmt: skip


def scatter_nd(draw: Draw) -> Case:
    value = draw.array(draw.shape(2, 3), ("float32",))
    rows = np.arange(value.shape[0])[: draw.number(1, value.shape[0])].reshape(-1, 1)
    updates = draw.array((len(rows), *value.shape[1:]), ("float32",))
    return "ScatterND", [value, rows, updates], {"reduction": draw.pick(["none", "add", "mul", "max", "min"])}, 1


def one_hot(draw: Draw) -> Case:
    places = draw.random.integers(-5, 5, draw.shape(1, 3))
    values = np.array([-1.0, 2.0], np.float32)
    return "OneHot", [places, np.array(4), values], {"axis": draw.number(-1, places.ndim)}, 1


def split(draw: Draw) -> Case:
    value = draw.array(draw.shape(), ("float32",))
    axis = draw.number(-value.ndim, value.ndim - 1)
    first = draw.number(0, value.shape[axis])
    return "Split", [value, np.array([first, value.shape[axis] - first])], {"axis": axis}, 2


def quantize(draw: Draw) -> Case:
    value = draw.array(draw.shape(2, 3), ("float32",))
    axis, kind = draw.number(-value.ndim, value.ndim - 1), draw.pick([np.int8, np.uint8, np.int16])
    scale = np.asarray(draw.random.uniform(0.05, 1, value.shape[axis]), np.float32)
    zero = np.asarray(draw.random.integers(0, 20, value.shape[axis]), kind)
    return "QuantizeLinear", [value, scale, zero], {"axis": axis}, 1


CASES: list[Callable[[Draw], Case]] = [
    elementwise, binary, many, clip, reduction, arg, top_k, cumulative, cut, pad, gather, gather_elements,
    scatter_elements, scatter_nd, one_hot, split, quantize,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_operators_compute_what_onnxruntime_computes(case, data):
    draw = Draw(data)
    op, operands, attrs, outputs = case(draw)
    computed = [True, *(bool(draw.number(0, 1)) for _ in operands[1:])]
    compare(op, operands, attrs, computed, outputs)


# -- types torch has no kernels for --------------------------------------------------------------------------------

WIDE = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.floor_divide, "Mod": np.remainder,
    "Max": np.maximum, "Min": np.minimum, "Less": np.less, "GreaterOrEqual": np.greater_equal, "Equal": np.equal,
    "BitwiseAnd": np.bitwise_and, "BitwiseXor": np.bitwise_xor,
}  # fmt: skip


@pytest.mark.parametrize("kind", [np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize("op", WIDE)
def test_wide_unsigned_integers_over_their_whole_range(op, kind):
    random, top = np.random.default_rng(3), np.iinfo(kind).max
    edges = np.array([0, 1, 2, top // 2, top // 2 + 1, top - 1, top], kind)
    left = np.concatenate([np.repeat(edges, 7), random.integers(0, top, 50, kind, endpoint=True)])
    right = np.concatenate([np.tile(edges, 7), random.integers(0, top, 50, kind, endpoint=True)])
    right = np.where(right == 0, 1, right).astype(kind) if op in ("Div", "Mod") else right
    found = raise_to_fx(built(op, [left, right], {}, [True, True]))(to_tensor(left), to_tensor(right))
    np.testing.assert_array_equal(to_array(found), WIDE[op](left, right))


@pytest.mark.parametrize("kind", [np.uint16, np.uint64])
def test_wide_unsigned_integers_are_moved_and_sorted(kind):
    value = np.array([[5, np.iinfo(kind).max, 7], [2, 0, np.iinfo(kind).max - 1]], kind)
    places = np.array([[2, -1, 0], [0, 0, 1]])
    for op, others, attrs, expected in (
        ("GatherElements", [places], {"axis": 1}, np.take_along_axis(value, places, 1)),
        ("Trilu", [], {"upper": 0}, np.tril(value)),
        ("ReduceMax", [np.array([1])], {"keepdims": 0}, value.max(1)),
        ("ScatterElements", [np.array([[1]]), np.array([[9]], kind)], {"axis": 1, "reduction": "max"}, value),
        ("CumSum", [np.array(1)], {}, np.cumsum(value, 1, kind)),
        ("NonZero", [], {}, np.stack(np.nonzero(value))),
    ):
        graph = built(op, [value, *others], attrs, [True] * (1 + len(others)))
        found = raise_to_fx(graph)(*(to_tensor(array) for array in (value, *others)))
        np.testing.assert_array_equal(to_array(found), expected, err_msg=op)


def test_casts_to_few_bits_and_strings():
    value = np.array([-9.7, -8, -1.2, 0.4, 7.9, 8.2, 15.0], np.float32)
    for kind in ("INT4", "UINT4", "FLOAT8E4M3FN", "FLOAT4E2M1"):
        element = onnx.TensorProto.DataType.Value(kind)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
        found = raise_to_fx(built("Cast", [value], {"to": element}, [True]))(to_tensor(value))
        wanted = value.astype(np.int32).astype(dtype) if "INT" in kind else value.astype(dtype)
        np.testing.assert_array_equal(to_array(found, dtype).astype(np.float32), wanted.astype(np.float32))
    with pytest.raises(ModelError, match=r"node 'the_node' .Cast.: a cast to strings cannot be raised"):
        raise_to_fx(built("Cast", [value], {"to": onnx.TensorProto.STRING}, [True]))


def test_extremes_of_nothing_and_norms_at_zero():
    empty = torch.zeros(2, 0)
    for op, limit in (("ReduceMax", -np.inf), ("ReduceMin", np.inf)):
        found = raise_to_fx(built(op, [empty.numpy(), np.array([1])], {"keepdims": 0}, [True, False]))(empty)
        assert found.tolist() == [limit, limit]
    zero = torch.zeros(2, 3, requires_grad=True)
    raise_to_fx(built("ReduceL2", [zero.detach().numpy(), np.array([1])], {}, [True, False]))(zero).sum().backward()
    assert zero.grad is not None
    assert zero.grad.tolist() == [[0.0] * 3] * 2


def test_a_table_becomes_an_embedding_that_counts_from_the_end_too():
    table, places = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32), np.array([[0, -1], [4, 2]])
    source, result = gs.Variable("ids", np.int64, ["N", 2]), gs.Variable("y", np.float32)
    node = gs.Node("Gather", name="n", inputs=[gs.Constant("words.weight", table), source], outputs=[result])
    module = raise_to_fx(Graph(gs.Graph(nodes=[node], inputs=[source], outputs=[result], opset=OPSET)))
    assert isinstance(module.get_submodule("words"), nn.Embedding)
    np.testing.assert_array_equal(module(torch.from_numpy(places)).detach().numpy(), table[places])


# -- control flow --------------------------------------------------------------------------------------------------


def _model(text: str, **tensors: np.ndarray) -> Graph:
    from eexform.backends.onnx_backend import import_model

    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in tensors.items())
    return import_model(model)


IF = """<ir_version: 10, opset_import: ["": 21]>
g (float[N, 3] x, bool which) => (float[N, 3] y) {
  h = Mul(x, w)
  y = If(which) <
    then_branch = a () => (float[N, 3] p) { q = Add(h, w) p = Mul(q, v) },
    else_branch = b () => (float[N, 3] r) { r = Neg(x) }>
}"""


def test_branches_use_and_train_what_lies_outside():
    w, v = np.array([1.0, 2.0, 3.0], np.float32), np.array([2.0, 0.5, -1.0], np.float32)
    graph = _model(IF, w=w, v=v)
    module = copy.deepcopy(raise_to_fx(graph))
    for rows in (1, 4):
        x = torch.randn(rows, 3)
        np.testing.assert_allclose(module(x, torch.tensor(True)).detach().numpy(), (x.numpy() * w + w) * v, rtol=1e-6)
        np.testing.assert_array_equal(module(x, torch.tensor(False)).detach().numpy(), -x.numpy())
    module(torch.ones(2, 3), torch.tensor(True)).sum().backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    assert len(gradients) == 2  # w once, though it is used inside and outside
    assert all(gradient is not None for gradient in gradients)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 1
    trained = fx_parameters(module)
    np.testing.assert_array_equal(trained["w"], w + 1)
    np.testing.assert_array_equal(trained["v"], v + 1)


LOOP = """<ir_version: 10, opset_import: ["": 21]>
g (int64 times, float[2] x) => (float[2] y, float[M, 2] each) {
  y, each = Loop(times, , x) <body = b (int64 i, bool c, float[2] s) => (bool k, float[2] t, float[2] u) {
    k = Identity(c) t = Mul(s, w) u = Add(t, x) }>
}"""


@pytest.mark.parametrize("times", [0, 1, 3])
def test_loops_collect_and_may_not_run_at_all(times):
    w, x = np.array([2.0, 0.5], np.float32), torch.tensor([1.0, 3.0], requires_grad=True)
    last, each = raise_to_fx(_model(LOOP, w=w))(torch.tensor(times), x)
    np.testing.assert_allclose(last.detach().numpy(), x.detach().numpy() * w**times)
    assert each.shape == (times, 2)
    last.sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), w**times)
