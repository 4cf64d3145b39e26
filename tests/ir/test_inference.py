"""Types: every value's shape is what a run of the model shows, with symbols where sizes vary."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eexform.backends import ort
from eexform.errors import GraphError
from eexform.frontends.onnx import from_model
from eexform.ir.graph import Graph
from eexform.ir.inference import split_dim
from eexform.ir.order import ordered
from tests import zoo
from tests.counting import function_calls
from tests.graphs import random_classifier
from tests.text import model, normal


def _check_against_a_run(graph: Graph, feeds: dict[str, np.ndarray]) -> None:
    """Every computed value, run for real, has the inferred type."""
    sizes: dict[str, int] = {}
    for name, array in feeds.items():
        for dim, size in zip(graph.types[name].shape or (), array.shape, strict=True):
            if isinstance(dim, str):
                sizes[dim] = size
    values = [t.name for node in graph.nodes for t in node.outputs if t.name and t.name not in graph.outputs]
    found = ort.run(ort.session(ort.tap(graph, values), optimize=False), feeds)
    for name, array in found.items():
        known = graph.types[name]
        assert known.dtype == array.dtype, name
        assert known.shape is not None, name
        for dim, size in zip(known.shape, array.shape, strict=True):
            factor, symbol = split_dim(dim) if isinstance(dim, str) else (dim, None)
            assert factor is not None, name
            assert size == factor * (sizes[symbol] if symbol else 1), (name, known.shape, array.shape)
        if known.batch_axis is not None:
            assert known.shape[known.batch_axis] == "N"


@pytest.mark.parametrize("name", zoo.NAMES)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_architecture(name: str, batch: int) -> None:
    _check_against_a_run(from_model(zoo.build(name)), zoo.feeds(name, batch))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 9))
def test_random_graphs(seed: int, batch: int) -> None:
    _check_against_a_run(from_model(random_classifier(seed)), {"image": normal(batch, 3, 8, 8)})


def test_shape_arithmetic_is_followed() -> None:
    graph = from_model(
        model(
            """s = Shape(x)
               n = Gather<axis=0>(s, zero)
               nn = Mul(n, eight)
               u = Unsqueeze(nn, zero1)
               t = Concat<axis=0>(u, minus)
               m = Reshape(x, t)
               u2 = Unsqueeze(n, zero1)
               back = Concat<axis=0>(u2, minus)
               b = Reshape(m, back)
               y = Gemm(b, w)""",
            {
                "zero": np.array(0),
                "zero1": np.array([0]),
                "eight": np.array(8),
                "minus": np.array([-1]),
                "w": normal(64, 3),
            },
            inputs="float[N,8,8] x",
        )
    )
    assert graph.types["m"].shape == ("8*N", 8)
    assert graph.types["m"].batch_axis is None
    assert graph.types["b"].batch_axis == 0
    assert graph.types["s"].shape == (3,)
    assert graph.types["s"].batch_dependent
    assert graph.types["t"].batch_dependent
    assert graph.types["m"].batch_dependent
    assert not graph.types["w"].batch_dependent


def test_arithmetic_on_other_sizes_does_not_depend_on_the_batch() -> None:
    graph = from_model(
        model(
            "s = Shape(x)\n c = Gather<axis=0>(s, one)\n t = Concat<axis=0>(minus, c)\n"
            " r = Reshape(x, t)\n y = Gemm(r, w)",
            {"one": np.array([1]), "minus": np.array([-1]), "w": normal(4, 3)},
        )
    )
    assert graph.types["s"].batch_dependent
    assert not graph.types["c"].batch_dependent
    assert graph.types["r"].shape == ("N", 4)


def test_a_large_computed_value_stays_marked_as_batch_dependent() -> None:
    graph = from_model(
        model(
            "s = Shape(x)\n n = Gather<axis=0>(s, zero)\n e = Expand(n, wide)\n"
            " f = Cast<to=1>(e)\n r = ReduceMean<keepdims=0>(f)\n a = Add(x, r)\n y = Gemm(a, w)",
            {"zero": np.array(0), "wide": np.array([100_000]), "w": normal(4, 3)},
        )
    )
    assert graph.types["e"].shape == (100_000,)
    assert graph.types["e"].batch_dependent
    assert graph.types["r"].batch_dependent


def test_operators_that_onnx_has_no_rule_for() -> None:
    graph = from_model(
        model(
            "m = MeanVarianceNormalization<axes=[2,3]>(x)\n p = GlobalAveragePool(m)\n f = Flatten(p)\n y = Gemm(f, w)",
            {"w": normal(4, 3)},
            inputs="float[N,4,8,8] x",
        )
    )
    assert graph.types["m"].shape == ("N", 4, 8, 8)


def test_unknown_operators_make_unknown_types() -> None:
    text = model(
        "c = acme.Magic(x)\n r = Reshape(c, s)\n y = Gemm(r, w)",
        {"w": normal(4, 3), "s": np.array([-1, 4])},
        domains=', "acme" : 1',
    )
    graph = from_model(text)  # the declared output is all there is behind the custom operator
    assert (graph.types["c"].dtype, graph.types["c"].shape) == (None, None)
    assert graph.types["y"].shape == ("N", 3)
    text.graph.value_info.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, ["N", "n_tokens", 4]))
    known = from_model(text)
    assert known.types["c"].shape == ("N", None, 4)


def test_nodes_in_any_order_are_sorted_and_cycles_are_named() -> None:
    graph = from_model(random_classifier(0))
    shuffled = list(graph.nodes)
    np.random.default_rng(0).shuffle(shuffled)
    place = {node.name: i for i, node in enumerate(ordered(shuffled))}
    for node in graph.nodes:
        for tensor in node.inputs:
            for before in tensor.inputs:
                assert place[before.name] < place[node.name]
    a, b = gs.Variable("a"), gs.Variable("b")
    with pytest.raises(GraphError, match=r"cycle.*'one'.*'two'"):
        ordered([gs.Node("Relu", "one", inputs=[a], outputs=[b]), gs.Node("Relu", "two", inputs=[b], outputs=[a])])


def test_work_grows_with_the_number_of_nodes() -> None:
    """Not quadratic, in function calls (seconds are the benchmark's): eight times the nodes, eight times the calls."""

    def calls(count: int) -> int:
        body = "\n".join(f"v{i + 1} = Relu(v{i})" for i in range(count))
        text = model(f"v0 = Neg(x)\n{body}\n y = Gemm(v{count}, w)", {"w": normal(4, 3)})
        return function_calls(lambda: from_model(text))

    calls(10)
    assert calls(2400) < 10 * calls(300)
