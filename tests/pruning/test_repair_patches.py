"""What a convolution reads at some positions, against onnxruntime's own convolution; sums against numpy."""

from __future__ import annotations

import numpy as np
import pytest

from eexform.backends import ort
from eexform.pruning.repair_layers import as_stored, find_layers, rows, weights_of
from eexform.pruning.repair_patches import channels, positions
from eexform.pruning.repair_squares import Moments, solve
from tests.passes.helpers import graph_of

CONVS = {
    "plain": ("4, 9, 7", "6, 4, 3, 3", ""),
    "strides": ("4, 9, 7", "6, 4, 3, 3", "strides = [2, 3], pads = [1, 0, 2, 1]"),
    "dilated": ("4, 9, 7", "6, 4, 2, 3", "dilations = [3, 2], pads = [2, 1, 0, 3]"),
    "same upper": ("4, 9, 8", "6, 4, 2, 4", 'auto_pad = "SAME_UPPER", strides = [2, 3]'),
    "same lower": ("4, 9, 8", "6, 4, 2, 4", 'auto_pad = "SAME_LOWER", strides = [2, 3]'),
    "valid": ("4, 9, 8", "6, 4, 2, 4", 'auto_pad = "VALID"'),
    "groups": ("4, 9, 7", "6, 2, 3, 3", "group = 2, pads = [1, 1, 1, 1]"),
    "depthwise": ("4, 9, 7", "8, 1, 3, 3", "group = 4"),
    "1d": ("4, 9", "6, 4, 3", "pads = [1, 1]"),
    "3d": ("2, 5, 4, 6", "3, 2, 2, 3, 1", "strides = [1, 2, 1]"),
}


@pytest.mark.parametrize("case", CONVS)
@pytest.mark.parametrize("count", [5, 10_000])
def test_rows_times_weights_is_the_convolution(case: str, count: int) -> None:
    shape, weight, attributes = CONVS[case]
    out = int(weight.split(",")[0])
    graph = graph_of(
        f'<ir_version: 8, opset_import: ["": 17]> net (float[N, {shape}] x) => (float[N, {out}] scores) '
        f"<float[{weight}] w> {{ [conv] y = Conv<{attributes}>(x, w) [p] p = GlobalAveragePool(y) "
        f"[f] scores = Flatten(p) }}".replace("<>", "")
    )
    x = np.random.default_rng(1).standard_normal((3, *map(int, shape.split(",")))).astype(np.float32)
    y = ort.run(ort.session(ort.tap(graph, ["y"])), {"x": x})["y"]
    layers, refused = find_layers(graph)
    assert not refused
    node = graph.flow.nodes["conv"]
    seen = 0
    for read, said in rows(layers["conv"], node, x, y, count, np.random.default_rng(0)):
        made = np.einsum("rgi,goi->rgo", read, weights_of(node))
        np.testing.assert_allclose(made, said, rtol=1e-4, atol=1e-4)
        seen += len(read)
    assert seen == min(count, y.size // out)


@pytest.mark.parametrize("op", ["Gemm", "Gemm<transB = 1>", "Gemm<alpha = 0.5, transB = 1>", "MatMul"])
def test_rows_of_a_product(op: str) -> None:
    shape = "5, 4" if "transB" in op else "4, 5"
    graph = graph_of(
        f'<ir_version: 8, opset_import: ["": 17]> net (float[N, 4] x) => (float[N, 5] y) <float[{shape}] w> '
        f"{{ [m] y = {op}(x, w) }}"
    )
    x = np.random.default_rng(1).standard_normal((30, 4)).astype(np.float32)
    y = ort.run(ort.session(graph), {"x": x})["y"]
    node = graph.flow.nodes["m"]
    (read, said), *more = rows(find_layers(graph)[0]["m"], node, x, y, 12, np.random.default_rng(0))
    assert not more
    np.testing.assert_allclose(np.einsum("rgi,goi->rgo", read, weights_of(node)), said, rtol=1e-4, atol=1e-5)
    assert np.allclose(as_stored(node, weights_of(node)), node.inputs[1].values)
    assert len(read) == 12


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_channels_at_places(axis: int) -> None:
    array = np.random.default_rng(0).standard_normal((3, 4, 5, 6))
    places = positions(array.shape, axis, 11, np.random.default_rng(2))
    expected = np.moveaxis(array, axis, -1).reshape(-1, array.shape[axis])[places]
    assert np.array_equal(channels(array, axis, places), expected)
    assert len(np.unique(places)) == 11


def test_sums_and_errors() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((500, 2, 3)), rng.standard_normal((500, 2, 4)) + 3
    one, other = Moments(2, 3, 4), Moments(2, 3, 4)
    one.add(x[:200], y[:200])
    other.add(x[200:], y[200:])
    whole = one + other
    weight, offset = rng.standard_normal((2, 4, 3)), rng.standard_normal((2, 4))
    plain = ((np.einsum("rgi,goi->rgo", x, weight) + offset - y) ** 2).sum(axis=0)
    np.testing.assert_allclose(whole.error(weight, offset), plain, rtol=1e-9)
    np.testing.assert_allclose(whole.spread(), ((y - y.mean(axis=0)) ** 2).sum(axis=0), rtol=1e-9)


def test_the_solution_recovers_the_truth_and_survives_dead_inputs() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 1, 6))
    x[:, :, 3] = 0.0  # an input that never speaks
    truth, offset = rng.standard_normal((1, 2, 6)), np.array([[4.0, -2.0]])
    y = np.einsum("rgi,goi->rgo", x, truth) + offset
    fit, check = Moments(1, 6, 2), Moments(1, 6, 2)
    fit.add(x[:300], y[:300])
    check.add(x[300:], y[300:])
    start = np.ones((1, 2, 6))
    found = solve(fit, check, start, np.zeros((1, 2)))
    alive = [0, 1, 2, 4, 5]
    np.testing.assert_allclose(found.weight[..., alive], truth[..., alive], atol=1e-4)
    np.testing.assert_allclose(found.weight[..., 3], 1.0)
    np.testing.assert_allclose(found.intercept, offset, atol=1e-4)
    assert found.after < 1e-6 * found.before
    fixed = solve(fit, check, start, offset, free=False)
    np.testing.assert_allclose(fixed.weight[..., alive], truth[..., alive], atol=1e-4)
    assert np.array_equal(fixed.intercept, offset)


def test_noise_moves_nothing() -> None:
    """Targets that the inputs say nothing about beyond the weights that are there: the held-out rows say so."""
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((40, 1, 30)), rng.standard_normal((1, 1, 30))
    y = np.einsum("rgi,goi->rgo", x, weight) + 5 * rng.standard_normal((40, 1, 1))
    fit, check = Moments(1, 30, 1), Moments(1, 30, 1)
    fit.add(x[:30], y[:30])
    check.add(x[30:], y[30:])
    found = solve(fit, check, weight, np.zeros((1, 1)))
    assert np.isinf(found.ridge)
    assert np.array_equal(found.weight, weight)
