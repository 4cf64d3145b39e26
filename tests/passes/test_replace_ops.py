"""replace_ops: before/after pairs, spellings of one function, polynomials, pools, white-lists."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eexform.errors import OptionError, PassError
from eexform.frontends.onnx import from_model
from eexform.ir.graph import Graph
from eexform.passes import make
from eexform.pruning.activations import FUNCTIONS, find_activations
from eexform.pruning.substitutions import CLOSEST, SUBSTITUTES, Fit, polynomial
from tests import zoo
from tests.passes.helpers import CHAIN, assert_same_outputs, graph_of, ops, run

BEFORE = """
<ir_version: 8, opset_import: ["": 17]>
small (float[N, 2, 6, 6] image) => (float[N, 3] scores)
<float[4, 2, 3, 3] w1, float[4, 4, 3, 3] w2, float[3, 4] w, float three = {3}, float zero = {0}, float six = {6}>
{
    [conv1] c1 = Conv(image, w1)
    [add] a = Add(c1, three)
    [clip] k = Clip(a, zero, six)
    [mul] m = Mul(c1, k)
    [div] s = Div(m, six)
    [conv2] c2 = Conv<pads = [1, 1, 1, 1]>(s, w2)
    [swish] t = HardSwish(c2)
    [pool] p = MaxPool<kernel_shape = [2, 2], strides = [2, 2], pads = [1, 1, 1, 1]>(t)
    [mean] g = GlobalAveragePool(p)
    [flat] f = Flatten(g)
    [fc] scores = Gemm<transB = 1>(f, w)
}
"""

AFTER = """
<ir_version: 8, opset_import: ["": 17]>
small (float[N, 2, 6, 6] image) => (float[N, 3] scores)
<float[4, 2, 3, 3] w1, float[4, 4, 3, 3] w2, float[3, 4] w>
{
    [conv1] c1 = Conv(image, w1)
    [relu1] s = Relu(c1)
    [conv2] c2 = Conv<pads = [1, 1, 1, 1]>(s, w2)
    [relu2] t = Relu(c2)
    [pool] p = AveragePool<kernel_shape = [2, 2], strides = [2, 2], pads = [1, 1, 1, 1], count_include_pad = 0>(t)
    [mean] g = GlobalAveragePool(p)
    [flat] f = Flatten(g)
    [fc] scores = Gemm<transB = 1>(f, w)
}
"""


def named(graph: Graph) -> dict[str, str]:
    return {node.outputs[0].name: node.op for node in graph.nodes}


NUMBERS = {
    "c0": 0.0, "c1": 1.0, "c3": 3.0, "c6": 6.0, "sixth": 1 / 6, "half": 0.5, "root2": 1.4142135, "over2": 0.70710677,
    "cube": 0.044715, "pi2": 0.7978846, "quick": 1.702, "leak": 0.01, "down": -1.0,
}  # fmt: skip


def one(body: str) -> Graph:
    """An activation written as ``body`` from ``x`` to ``y``, nodes apart by ``|``, between two layers."""
    numbers = ", ".join(f"float {name} = {{{number}}}" for name, number in NUMBERS.items())
    nodes = body.replace("|", "\n")
    return graph_of(f"""
    <ir_version: 9, opset_import: ["": 20]>
    one (float[N, 4] image) => (float[N, 3] scores)
    <float[4, 4] first, float[4, 3] last, float[4] ones = {{1, 1, 1, 1}}, {numbers}>
    {{
        x = MatMul(image, first)
        {nodes}
        scores = MatMul(y, last)
    }}
    """)


def test_before_and_after() -> None:
    result = make("replace_ops", replace={"hard_swish": "relu", "max_pool": "average_pool"})(graph_of(BEFORE))
    after = graph_of(AFTER)
    assert result.changed
    assert named(result.graph) == named(after)
    assert not result.skipped
    assert len(result.notes) == 3
    assert_same_outputs(after, result.graph)


SPELLINGS = {
    "hard_swish": [
        "a = Add(x, c3) | k = Clip(a, c0, c6) | d = Div(k, c6) | y = Mul(x, d)",
        "a = Add(c3, x) | k = Clip(a, c0, c6) | m = Mul(k, x) | y = Mul(m, sixth)",
        "h = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x) | y = Mul(h, x)",
        "y = HardSwish(x)",
    ],
    "silu": ["s = Sigmoid(x) | y = Mul(x, s)", "s = Sigmoid(x) | y = Mul(s, x)"],
    "gelu": [
        "y = Gelu(x)",
        'y = Gelu<approximate = "tanh">(x)',
        "d = Div(x, root2) | e = Erf(d) | a = Add(e, c1) | m = Mul(x, a) | y = Mul(m, half)",
        "d = Mul(x, over2) | e = Erf(d) | a = Add(c1, e) | m = Mul(x, half) | y = Mul(m, a)",
        "p = Pow(x, c3) | q = Mul(p, cube) | a = Add(x, q) | b = Mul(a, pi2) | t = Tanh(b) | u = Add(t, c1)"
        "| v = Mul(x, u) | y = Mul(v, half)",
    ],
    "relu6": ["y = Clip(x, c0, c6)", "r = Relu(x) | y = Min(r, c6)"],
    "relu": ["y = Relu(x)", "y = Max(x, c0)", "y = Clip(x, c0)"],
    "mish": ["s = Softplus(x) | t = Tanh(s) | y = Mul(x, t)", "y = Mish(x)"],
    "quick_gelu": ["a = Mul(x, quick) | s = Sigmoid(a) | y = Mul(x, s)"],
    "leaky_relu": ["y = LeakyRelu<alpha = 0.2>(x)", "s = Mul(x, leak) | y = Max(x, s)"],
    "elu": ["y = Elu(x)", "y = Elu<alpha = 0.3>(x)"],
    "hard_sigmoid": ["y = HardSigmoid(x)", "a = Add(x, c3) | k = Clip(a, c0, c6) | y = Div(k, c6)"],
    "sigmoid": ["y = Sigmoid(x)"],
    "tanh": ["y = Tanh(x)"],
    "softplus": ["y = Softplus(x)"],
    "hard_tanh": ["y = Clip(x, down, c1)"],
}


@pytest.mark.parametrize(
    ("function", "place"), [(name, i) for name, each in SPELLINGS.items() for i in range(len(each))]
)
def test_every_spelling_is_found_and_replaced(function: str, place: int) -> None:
    graph = one(SPELLINGS[function][place])
    (found,) = find_activations(graph, frozenset(FUNCTIONS))
    assert (found.function, found.source, found.result) == (function, "x", "y")
    target = "tanh" if function != "tanh" else "relu"
    after = make("replace_ops", replace={function: target})(graph).graph
    assert ops(after) == ["MatMul", {"tanh": "Tanh", "relu": "Relu"}[target], "MatMul"]


def test_all_functions_have_spellings_and_substitutes() -> None:
    assert set(SPELLINGS) == set(FUNCTIONS) == set(CLOSEST)
    assert {name for each in CLOSEST.values() for name in each} <= set(SUBSTITUTES)


NOT_ONE = {
    "something else reads its inside": "s = Sigmoid(x) | m = Mul(x, s) | y = Add(m, s)",
    "a number per channel": "s = Mul(x, ones) | t = Sigmoid(s) | y = Mul(x, t)",
    "another function": "s = Sigmoid(x) | u = Mul(s, c3) | y = Mul(x, u)",
}


@pytest.mark.parametrize("case", NOT_ONE)
def test_what_only_looks_like_one_stays(case: str) -> None:
    graph = one(NOT_ONE[case])
    result = make("replace_ops", replace={"silu": "relu"})(graph)
    assert not result.changed
    assert result.graph is graph
    assert [skip.why for skip in result.skipped] == ["it has no silu"]


def test_the_sigmoid_of_a_silu_is_one_where_silu_is_not_asked_for() -> None:
    graph = one(SPELLINGS["silu"][0])
    result = make("replace_ops", replace={"sigmoid": "hard_sigmoid"})(graph)
    assert ops(result.graph) == ["MatMul", "HardSigmoid", "Mul", "MatMul"]
    both = make("replace_ops", replace={"sigmoid": "hard_sigmoid", "silu": "relu"})(graph)
    assert ops(both.graph) == ["MatMul", "Relu", "MatMul"]


@pytest.mark.parametrize("target", SUBSTITUTES)
def test_substitutes_compute_what_they_are_called(target: str) -> None:
    old = "softplus"
    graph = one("y = Softplus(x)")
    after = make("replace_ops", replace={old: target}, interval=(-2, 3), degree=4)(graph).graph
    feeds = {"image": np.linspace(-2, 2, 40, dtype=np.float32).reshape(10, 4)}
    weights = graph.parameters()
    x = feeds["image"] @ weights["first"]
    expected = {
        "identity": x,
        "square": x * x,
        "polynomial": np.polynomial.Polynomial(polynomial(FUNCTIONS[old], Fit(-2, 3, 4)))(x),
    }.get(target)
    y = FUNCTIONS[target](x) if expected is None else expected
    np.testing.assert_allclose(run(after, feeds)["scores"], y @ weights["last"], rtol=1e-4, atol=1e-5)
    assert {node.op for node in after.nodes} - {"MatMul"} <= SUBSTITUTES[target].ops


@pytest.mark.parametrize("a", [1.0, 4.0, 7.5])
def test_the_quadratic_of_a_relu_by_hand(a: float) -> None:
    found = polynomial(FUNCTIONS["relu"], Fit(-a, a, 2))
    np.testing.assert_allclose(found, [3 * a / 32, 0.5, 15 / (32 * a)], rtol=1e-9)


def test_no_other_polynomial_is_closer() -> None:
    fit = Fit(-3.0, 5.0, 3)
    x = np.linspace(fit.low, fit.high, 20001)
    best = polynomial(FUNCTIONS["silu"], fit)

    def error(coefficients: np.ndarray) -> float:
        return float(np.mean((np.polynomial.Polynomial(coefficients)(x) - FUNCTIONS["silu"](x)) ** 2))

    for place in range(4):
        for step in (-1e-2, 1e-2):
            moved = best.copy()
            moved[place] += step
            assert error(moved) > error(best)


def test_a_polynomial_of_an_activation_with_parameters_fits_those() -> None:
    after = make("replace_ops", replace={"leaky_relu": "polynomial"}, degree=1)(one("y = LeakyRelu<alpha = 0.2>(x)"))
    slope = next(c.values for name, c in after.graph.constants.items() if name.endswith("c1"))
    assert math.isclose(float(slope), 0.6, rel_tol=1e-6), "half of 0.2 and 1"


POOLS = {
    "the places of its maxima": (
        "v, i = MaxPool<kernel_shape = [2, 2]>(image)\n j = Cast<to = 1>(i)\n y = Add(v, j)",
        17,
    ),
    "from opset 19 on": ("y = MaxPool<kernel_shape = [2, 2], dilations = [2, 2]>(image)", 17),
    "reaches over the edge": ("y = MaxPool<kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1>(image)", 17),
}
GOOD_POOLS = {
    "plain": ("y = MaxPool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(image)", 17),
    "same": ('y = MaxPool<kernel_shape = [2, 2], auto_pad = "SAME_UPPER">(image)', 17),
    "ceil that fits": ("y = MaxPool<kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1>(image)", 17),
    "dilated": ("y = MaxPool<kernel_shape = [2, 2], dilations = [2, 2]>(image)", 19),
    "global": ("y = GlobalMaxPool(image)", 17),
}


def pooled(body: str, opset: int) -> Graph:
    return graph_of(f"""
    <ir_version: 9, opset_import: ["": {opset}]>
    one (float[N, 2, 7, 7] image) => (float[N, 3] scores)
    <float[2, 3] last>
    {{
        {body}
        g = GlobalAveragePool(y)
        f = Flatten(g)
        scores = MatMul(f, last)
    }}
    """)


@pytest.mark.parametrize("reason", POOLS)
def test_pools_that_stay_say_why(reason: str) -> None:
    graph = pooled(*POOLS[reason])
    result = make("replace_ops", replace={"max_pool": "average_pool"})(graph)
    assert not result.changed
    (skip,) = result.skipped
    assert reason in skip.why


@pytest.mark.parametrize("case", GOOD_POOLS)
def test_pools_keep_their_windows(case: str) -> None:
    graph = pooled(*GOOD_POOLS[case])
    after = make("replace_ops", replace={"max_pool": "average_pool"})(graph).graph
    assert after.types["y"].shape == graph.types["y"].shape
    flat = {"image": np.full((2, 2, 7, 7), 1.5, np.float32)}
    np.testing.assert_allclose(
        run(after, flat)["scores"], run(graph, flat)["scores"], rtol=1e-6, err_msg="padding took part"
    )


DEVICE = ("Conv", "Relu", "MaxPool", "GlobalAveragePool", "Flatten", "Gemm", "Add", "Identity")


def test_a_white_list_replaces_what_it_can_and_names_the_rest() -> None:
    graph = from_model(zoo.build("mobilenet"))
    result = make("replace_ops", allowed=DEVICE)(graph)
    left = {node.name: node.op for node in result.graph.nodes if node.op not in DEVICE}
    assert set(left.values()) == {"HardSigmoid", "Mul", "BatchNormalization"}
    assert {skip.where for skip in result.skipped} == set(left), "every node that stays outside has a reason"
    reasons = {left[skip.where]: skip.why for skip in result.skipped}
    assert "sigmoid: Sigmoid" in reasons["HardSigmoid"]
    assert "nothing here can stand in" in reasons["BatchNormalization"]
    assert run(result.graph, zoo.feeds("mobilenet"))["logits"].shape == (2, 5)


def test_encrypted_arithmetic_has_sums_and_products_only() -> None:
    graph = from_model(zoo.build("resnet"))
    allowed = ("Conv", "Gemm", "Add", "Mul", "GlobalAveragePool", "Flatten", "Identity", "BatchNormalization")
    result = make("replace_ops", allowed=allowed, interval=(-6, 6))(graph)
    assert "Relu" not in ops(result.graph)
    assert not result.skipped
    assert sum("relu became polynomial" in note for note in result.notes) == ops(graph).count("Relu")


MAPS = [
    {"replace": {"gelu": "relu", "silu": "hard_swish", "sigmoid": "hard_sigmoid", "tanh": "hard_tanh"}},
    {"allowed": DEVICE},
]


@pytest.mark.parametrize("name", zoo.NAMES)
@pytest.mark.parametrize("settings", MAPS, ids=["map", "list"])
def test_twice_is_once(name: str, settings: dict[str, object]) -> None:
    step = make("replace_ops", **settings)
    once = step(from_model(zoo.build(name))).graph
    twice = step(once)
    assert not twice.changed
    assert twice.graph is once
    run(once, zoo.feeds(name))


WRONG = {
    "there is no operation 'hardswish'": {"replace": {"hardswish": "relu"}},
    "cannot become 'average_pool'": {"replace": {"relu": "average_pool"}},
    "cannot become 'relu'": {"replace": {"max_pool": "relu"}},
    "which is itself replaced by 'polynomial'": {"replace": {"hard_swish": "relu", "relu": "polynomial"}},
    "is no ONNX operator": {"allowed": ["Relu7"]},
    "not 1..15": {"degree": 0},
    "low < high": {"interval": [1, 1]},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_settings_are_refused(message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make("replace_ops", **WRONG[message])


def test_an_operator_that_the_opset_lacks() -> None:
    graph = graph_of(CHAIN.replace('"": 17', '"": 13'), seed=0)
    result = make("replace_ops", replace={"relu": "hard_swish"})(graph)
    if graph.opset >= 14:
        assert result.changed, "the door lifts the opset"
    else:
        assert "needs opset 14" in result.skipped[0].why


def test_trained_heads_and_nothing_to_do() -> None:
    trunk = graph_of(CHAIN)
    insert = make("insert_exits", sites=["r1"], heads={"r1": "none/avg"}, thresholds={"r1": 0.5}, untrained=True)
    with pytest.raises(PassError, match="before insert_exits"):
        make("replace_ops", replace={"relu": "square"})(insert(trunk).graph)
    result = make("replace_ops")(trunk)
    assert result.graph is trunk
    assert "neither replace nor allowed" in result.skipped[0].why
