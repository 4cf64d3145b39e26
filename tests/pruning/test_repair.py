"""Repair: numbers against ground truth on small nets, and what cannot be mended said so."""

from __future__ import annotations

import numpy as np
import pytest

from eexform.errors import GraphError, PassError
from eexform.ir.cut import CUT
from eexform.ir.cut import cut as cut_units
from eexform.ir.graph import Graph
from eexform.passes import make
from eexform.passes.set_parameters import put
from eexform.pruning.repair import Repaired, repair
from eexform.pruning.repair_match import Match, touched
from eexform.pruning.repair_walk import Walk, peak
from tests.passes.helpers import graph_of
from tests.pruning.samples import Fixed, normal, values

HEAD = '<ir_version: 8, opset_import: ["": 17]>\nnet '

PLAIN = (
    HEAD
    + """(float[N, 3, 8, 8] image) => (float[N, 4] scores)
<float[6, 3, 3, 3] a_weight, float[6] a_bias, float[5, 6, 3, 3] b_weight, float[5] b_bias, float[4, 5] w, float[4] v>
{
    [a] ya = Conv<pads = [1, 1, 1, 1]>(image, a_weight, a_bias)
    [ra] xa = Relu(ya)
    [b] yb = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(xa, b_weight, b_bias)
    [rb] xb = Relu(yb)
    [p] pool = GlobalAveragePool(xb)
    [f] flat = Flatten(pool)
    [fc] scores = Gemm<transB = 1>(flat, w, v)
}
"""
)

DEPTHWISE = (
    HEAD
    + """(float[N, 3, 8, 8] image) => (float[N, 4] scores)
<float[6, 3, 1, 1] a_weight, float[6] a_bias, float[6, 1, 3, 3] d_weight, float[5, 6, 1, 1] b_weight, float[4, 5] w>
{
    [a] ya = Conv(image, a_weight, a_bias)
    [ra] xa = Relu(ya)
    [d] yd = Conv<pads = [1, 1, 1, 1], group = 6>(xa, d_weight)
    [b] yb = Conv(yd, b_weight)
    [rb] xb = Relu(yb)
    [p] pool = GlobalAveragePool(xb)
    [f] flat = Flatten(pool)
    [fc] scores = Gemm<transB = 1, alpha = 0.5>(flat, w)
}
"""
)

TOKENS = (
    HEAD
    + """(float[N, 7, 5] image) => (float[N, 4] scores)
<float[5, 6] a_weight, float[6] a_bias, float[6, 5] b_weight, float[1, 1, 5] b_bias, float[5, 4] w, float[4] v>
{
    [a] la = MatMul(image, a_weight)
    [ab] ya = Add(la, a_bias)
    [ra] xa = Relu(ya)
    [b] lb = MatMul(xa, b_weight)
    [bb] yb = Add(b_bias, lb)
    [rb] xb = Relu(yb)
    [p] pool = ReduceMean<axes = [1], keepdims = 0>(xb)
    [fc] scores = Gemm(pool, w, v)
}
"""
)

NORMED = (
    HEAD
    + """(float[N, 3, 8, 8] image) => (float[N, 4] scores)
<float[6, 3, 3, 3] a_weight, float[6] scale_a, float[6] shift_a, float[6] mean_a, float[6] var_a,
 float[6, 6, 3, 3] b_weight, float[6] scale_b, float[6] shift_b, float[6] mean_b, float[6] var_b,
 float[6] scale_c, float[6] shift_c, float[6] mean_c, float[6] var_c, float[4, 6] w, float[4] v>
{
    [a] ya = Conv<pads = [1, 1, 1, 1]>(image, a_weight)
    [na] za = BatchNormalization(ya, scale_a, shift_a, mean_a, var_a)
    [ra] xa = Relu(za)
    [b] yb = Conv<pads = [1, 1, 1, 1]>(xa, b_weight)
    [nb] zb = BatchNormalization(yb, scale_b, shift_b, mean_b, var_b)
    [rb] xb = Relu(zb)
    [nc] zc = BatchNormalization(xb, scale_c, shift_c, mean_c, var_c)
    [p] pool = GlobalAveragePool(zc)
    [f] flat = Flatten(pool)
    [fc] scores = Gemm<transB = 1>(flat, w, v)
}
"""
)

RESIDUAL = (
    HEAD
    + """(float[N, 3, 8, 8] image) => (float[N, 4] scores)
<float[5, 3, 3, 3] s_weight, float[5] s_bias, float[6, 5, 3, 3] a_weight, float[6] a_bias, float[5, 6, 3, 3] b_weight,
 float[5] b_bias, float[6, 5, 3, 3] c_weight, float[6] c_bias, float[5, 6, 3, 3] d_weight, float[5] d_bias,
 float[4, 5] w, float[4] v>
{
    [s] ys = Conv<pads = [1, 1, 1, 1]>(image, s_weight, s_bias)
    [rs] xs = Relu(ys)
    [a] ya = Conv<pads = [1, 1, 1, 1]>(xs, a_weight, a_bias)
    [ra] xa = Relu(ya)
    [b] yb = Conv<pads = [1, 1, 1, 1]>(xa, b_weight, b_bias)
    [j1] t1 = Add(xs, yb)
    [rj] u1 = Relu(t1)
    [c] yc = Conv<pads = [1, 1, 1, 1]>(u1, c_weight, c_bias)
    [rc] xc = Relu(yc)
    [d] yd = Conv<pads = [1, 1, 1, 1]>(xc, d_weight, d_bias)
    [j2] t2 = Add(yd, u1)
    [p] pool = GlobalAveragePool(t2)
    [f] flat = Flatten(pool)
    [fc] scores = Gemm<transB = 1>(flat, w, v)
}
"""
)


def cut(graph: Graph, units: dict[str, list[int]]) -> Graph:
    """``graph`` without some output channels of the layers with these names."""
    return cut_units(graph, {f"{layer}_weight": gone for layer, gone in units.items()})


def with_arrays(graph: Graph, **arrays: np.ndarray) -> Graph:
    """``graph`` with new values of constants."""
    return put(graph, {name: np.asarray(values, np.float32) for name, values in arrays.items()})[0]


def twins(graph: Graph, *scaled: str) -> Graph:
    """Units 4 and 5 of the first layer follow from 0 and 1, so that a ReLU leaves them multiples of those."""
    made = {}
    for name in scaled:
        axis = 1 if graph.constants[name].values.shape == (5, 6) else 0
        values = np.moveaxis(graph.constants[name].values.copy(), axis, 0)
        values[4], values[5] = 2.0 * values[0], 0.5 * values[1]
        made[name] = np.moveaxis(values, 0, axis)
    return put(graph, made)[0]


def without_block(whole: Graph) -> Graph:
    """The residual net without its first block: what it read goes straight on."""
    draft = whole.copy().gs
    named = {node.name: node for node in draft.nodes}
    named["rj"].inputs = [named["j1"].inputs[0]]
    draft.nodes = [node for node in draft.nodes if node.name not in ("a", "ra", "b", "j1")]
    return whole.replace(draft)


def mended(graph: Graph, found: Repaired) -> Graph:
    return put(graph, found.arrays, found.biases)[0]


def away(graph: Graph, reference: Graph, samples: Fixed, name: str = "scores") -> float:
    """Squared error of a value beside what the reference says, over its variance."""
    theirs = Match(graph, reference).restrict(values(reference, samples, name)[name], name)
    mine = values(graph, samples, name)[name]
    return float(((mine - theirs) ** 2).mean() / theirs.var())


# -- least squares -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "same"),
    [
        (PLAIN, ["a_weight", "a_bias"]),
        (DEPTHWISE, ["a_weight", "a_bias"]),
        (TOKENS, ["a_weight", "a_bias"]),
    ],
    ids=["conv", "depthwise", "matmul"],
)
@pytest.mark.parametrize("method", ["least_squares", "all"])
def test_what_the_kept_channels_span_comes_back_exactly(text: str, same: list[str], method: str) -> None:
    whole = twins(graph_of(text), *same)
    if text is DEPTHWISE:  # the filters of twins have to be twins, too
        filters = whole.constants["d_weight"].values.copy()
        filters[4], filters[5] = filters[0], filters[1]
        whole = with_arrays(whole, d_weight=filters)
    samples = normal(whole, 160)
    small = cut(whole, {"a": [4, 5]})
    assert away(small, whole, samples) > 1e-2
    found = repair(small, whole, samples, method=method)
    assert away(mended(small, found), whole, samples) < 1e-7
    unseen = normal(whole, 50, seed=77)
    assert away(mended(small, found), whole, unseen) < 1e-7
    assert not set(found.arrays) & {"a_weight", "a_bias"}, "the first layer sees what it saw"


def test_the_fit_is_the_least_squares_solution() -> None:
    """Of one layer, all positions taken: the same as numpy's own solver."""
    whole = graph_of(PLAIN)
    samples = normal(whole, 40)
    small = cut(whole, {"a": [1, 3]})
    found = repair(small, whole, samples, method="least_squares", ridge=1e-12)
    read, said = values(small, samples, "xa")["xa"], values(whole, samples, "yb")["yb"]
    padded = np.pad(read, [(0, 0), (0, 0), (1, 1), (1, 1)]).astype(np.float64)
    taps = [padded[:, :, i : i + 8 : 2, j : j + 8 : 2] for i in range(3) for j in range(3)]
    x = np.stack(taps, axis=2).transpose(0, 3, 4, 1, 2).reshape(-1, 4 * 9)  # [n, c, k, h, w] -> rows
    x = np.hstack([x, np.ones((len(x), 1))])
    y = said.transpose(0, 2, 3, 1).reshape(-1, 5)
    expected = np.linalg.lstsq(x, y, rcond=None)[0]
    np.testing.assert_allclose(found.arrays["b_weight"].reshape(5, -1).T, expected[:-1], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.arrays["b_bias"], expected[-1], rtol=1e-3, atol=1e-5)


def test_the_ridge_holds_on_to_the_weights() -> None:
    whole = graph_of(PLAIN)
    samples = normal(whole, 64)
    small = cut(whole, {"a": [1, 3]})
    held = repair(small, whole, samples, method="least_squares", ridge=1e9).arrays["b_weight"]
    np.testing.assert_allclose(held, small.constants["b_weight"].values, rtol=1e-3, atol=1e-5)


def test_few_samples_do_no_harm() -> None:
    """Two samples, more unknowns than rows at the last layer: on others it is still no worse than before."""
    whole = graph_of(PLAIN)
    small = cut(whole, {"a": [1, 3]})
    found = repair(small, whole, normal(whole, 2), method="least_squares")
    unseen = normal(whole, 200, seed=9)
    assert away(mended(small, found), whole, unseen) < 2 * away(small, whole, unseen)


def test_a_sum_makes_up_for_the_other_branch() -> None:
    """The last layer's target is what is missing of the sum, so that the sum is nearer than with the layer's own."""
    whole = graph_of(RESIDUAL)
    samples = normal(whole, 200)
    small = cut(without_block(whole), {"c": [0]})
    found = mended(small, repair(small, whole, samples, method="least_squares"))
    assert away(found, whole, samples, "t2") < 0.5 * away(small, whole, samples, "t2")
    taps = np.lib.stride_tricks.sliding_window_view(
        np.pad(values(found, samples, "xc")["xc"], [(0, 0), (0, 0), (1, 1), (1, 1)]), (3, 3), axis=(2, 3)
    )
    x = np.pad(taps.transpose(0, 2, 3, 1, 4, 5).reshape(200 * 64, -1), [(0, 0), (0, 1)], constant_values=1.0)
    own = values(whole, samples, "yd")["yd"].transpose(0, 2, 3, 1).reshape(200 * 64, -1)
    said = (x @ np.linalg.lstsq(x, own, rcond=None)[0]).reshape(200, 8, 8, 5).transpose(0, 3, 1, 2)
    total = values(whole, samples, "t2")["t2"]
    with_own_target = ((values(found, samples, "u1")["u1"] + said - total) ** 2).mean() / total.var()
    assert away(found, whole, samples, "t2") < with_own_target


# -- normalisations ----------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_data() -> None:
    """Of each normalisation's input as the repaired layers before it make it."""
    whole = graph_of(NORMED)
    samples = normal(whole, 90)
    small = cut(whole, {"a": [0, 2]})
    found = repair(small, whole, samples, method="batch_norm")
    assert set(found.arrays) == {"mean_b", "var_b", "mean_c", "var_c"}
    result = mended(small, found)
    for source, name in (("yb", "b"), ("xb", "c")):
        held = values(result, samples, source)[source].astype(np.float64)
        np.testing.assert_allclose(found.arrays[f"mean_{name}"], held.mean(axis=(0, 2, 3)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.arrays[f"var_{name}"], held.var(axis=(0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_all_three_remedies_help_a_normalised_net() -> None:
    whole = graph_of(NORMED)
    samples = normal(whole, 200)
    moved = with_arrays(whole, a_weight=whole.constants["a_weight"].values * 2)
    whole = mended(moved, repair(moved, whole, samples, method="batch_norm"))  # statistics that fit the data
    small = cut(whole, {"a": [0, 2]})
    before = away(small, whole, samples)
    after = {
        method: away(mended(small, repair(small, whole, samples, method=method)), whole, samples)
        for method in ("bias", "least_squares", "all")
    }
    assert all(error < before for error in after.values()), (before, after)
    assert after["least_squares"] < after["bias"]


# -- means -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [PLAIN, DEPTHWISE, TOKENS], ids=["conv", "depthwise", "matmul"])
def test_means_agree(text: str) -> None:
    whole = graph_of(text)
    samples = normal(whole, 130)
    small = cut(whole, {"a": [1, 4, 5]})
    found = repair(small, whole, samples, method="bias")
    result = mended(small, found)
    for name in [name for name in ("yb", "yd", "scores") if name in whole.tensors]:
        axis = 2 if text is TOKENS and name == "yb" else 1
        theirs = Match(small, whole).restrict(values(whole, samples, name)[name], name)
        mine = values(result, samples, name)[name]
        other = tuple(at for at in range(mine.ndim) if at != axis)
        np.testing.assert_allclose(mine.mean(axis=other), theirs.mean(axis=other), rtol=1e-3, atol=1e-4)
    if text is DEPTHWISE:
        assert found.biases == {"b": "b_bias", "fc": "w.bias"}


def test_means_agree_behind_a_normalisation() -> None:
    whole = graph_of(NORMED)
    samples = normal(whole, 100)
    small = cut(whole, {"a": [0, 2]})
    found = repair(small, whole, samples, method="bias")
    assert set(found.arrays) == {"shift_b", "v"}
    theirs, mine = (values(which, samples, "zb")["zb"] for which in (whole, mended(small, found)))
    np.testing.assert_allclose(mine.mean(axis=(0, 2, 3)), theirs.mean(axis=(0, 2, 3)), rtol=1e-3, atol=1e-4)


# -- graphs that are no longer alike -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bias", "least_squares", "all"])
def test_folded_after_the_cut(method: str) -> None:
    whole = graph_of(NORMED)
    samples = normal(whole, 150)
    small = make("fold_batch_norm")(cut(whole, {"a": [0, 2]})).graph
    assert [node.op for node in small.nodes].count("BatchNormalization") == 1
    before = away(small, whole, samples)
    assert away(mended(small, repair(small, whole, samples, method=method)), whole, samples) < before


def test_a_dropped_block() -> None:
    """Values that went with the block are not compared; what is behind it makes up for it."""
    whole = graph_of(RESIDUAL)
    samples = normal(whole, 150)
    small = without_block(whole)
    found = repair(small, whole, samples, method="least_squares")
    assert {"c_weight", "d_weight", "w"} <= set(found.arrays)
    assert away(mended(small, found), whole, samples) < 0.5 * away(small, whole, samples)


def test_cut_twice() -> None:
    """The reference may have been cut before: positions are those that are left of it."""
    first = cut(graph_of(PLAIN), {"a": [0, 3]})
    samples = normal(first, 60)
    second = cut(first, {"a": [1]})
    assert Match(second, first).kept("ya", 1).tolist() == [0, 2, 3]  # type: ignore[union-attr]
    found = repair(second, first, samples, method="least_squares")
    assert away(mended(second, found), first, samples) < away(second, first, samples)


def test_nothing_cut_nothing_found() -> None:
    whole = graph_of(NORMED)
    for method in ("batch_norm", "bias", "least_squares", "all"):
        found = repair(whole, whole, normal(whole, 8), method=method)
        assert not found.arrays
        assert not found.skipped


# -- what cannot be mended is said -------------------------------------------------------------------------------------


def test_a_wrong_reference_is_noticed() -> None:
    whole = graph_of(PLAIN)
    small = cut(whole, {"a": [1], "b": [0]})
    bare = small.replace(metadata={key: value for key, value in small.metadata.items() if key != CUT})
    found = repair(bare, whole, normal(whole, 8), method="least_squares")
    assert ("a", "axis 1 of 'ya' has 5 positions, of 6 in the reference 6 should be left") in found.skipped
    renamed = graph_of(PLAIN.replace("yb", "zz"))
    found = repair(small, renamed, normal(whole, 8), method="bias")
    assert ("b", "the reference has no value 'yb' to compare with") in found.skipped


def test_shared_weights_keep_their_values() -> None:
    text = RESIDUAL.replace("(u1, c_weight, c_bias)", "(u1, a_weight, c_bias)").replace(
        "float[6, 5, 3, 3] c_weight, ", ""
    )
    whole = graph_of(text)
    samples = normal(whole, 60)
    small = with_arrays(whole, s_weight=whole.constants["s_weight"].values * 0.5)
    found = repair(small, whole, samples, method="all")
    assert "a_weight" not in found.arrays
    assert {"a_bias", "c_bias"} <= set(found.arrays)
    assert ("c", "its weights 'a_weight' are shared with another node") in found.skipped


@pytest.mark.parametrize("method", ["batch_norm", "bias", "least_squares", "all"])
def test_nan_is_refused(method: str) -> None:
    whole = graph_of(NORMED)
    small = cut(whole, {"a": [0, 2]})
    samples = normal(whole, 40)
    samples.feeds["image"][7, 0, 0, 0] = np.nan
    with pytest.raises(PassError, match="value 'image' holds NaN or infinity on the samples"):
        repair(small, whole, samples, method=method)
    broken = with_arrays(small, shift_a=np.full(4, np.inf))
    with pytest.raises(PassError, match="holds NaN or infinity on the samples"):
        repair(broken, whole, normal(whole, 40), method=method)


def test_samples_that_do_not_feed_the_model() -> None:
    whole = graph_of(PLAIN)
    small = cut(whole, {"a": [0]})
    with pytest.raises(PassError, match=r"feed no inputs \['image'\]"):
        repair(small, whole, Fixed({"picture": np.zeros((4, 3, 8, 8), np.float32)}), method="bias")


# -- memory and repetition ---------------------------------------------------------------------------------------------


def test_the_same_numbers_every_time() -> None:
    whole = graph_of(RESIDUAL)
    small = cut(whole, {"a": [0, 1]})
    one, other = (repair(small, whole, normal(whole, 50)) for _ in range(2))
    assert one.arrays.keys() == other.arrays.keys()
    assert all(np.array_equal(values, other.arrays[name]) for name, values in one.arrays.items())


def test_fewer_samples_where_memory_is_short() -> None:
    whole = graph_of(PLAIN.replace("8, 8]", "40, 40]"))
    small = cut(whole, {"a": [0]})
    each = peak(small) + peak(whole)
    fits = (1 << 20) // each
    assert 2 < fits < 60
    found = repair(small, whole, normal(whole, 60), method="bias", memory=1)
    assert found.notes[0] == f"{fits} samples, more would take over 1 MiB"


def test_a_walk_holds_the_live_set_only() -> None:
    graph = graph_of(RESIDUAL)
    samples = normal(graph, 6)
    walk = Walk(graph, [feeds for feeds, _ in samples.batches(4)])
    expected = values(graph, samples, "xs", "xa", "u1", "xc", "scores")
    most = 0
    for name in expected:
        walk.reach([name])
        np.testing.assert_allclose(np.concatenate(list(walk.arrays(name))), expected[name], rtol=1e-4, atol=1e-4)
        most = max(most, sum(array.nbytes for held in walk._held for array in held.values()))
        assert len(walk._held[0]) <= 3
    assert most <= 6 * peak(graph)
    walk.reach(["scores"])
    with pytest.raises(GraphError, match="were computed and let go"):
        walk.reach(["xa"])


def test_what_sees_something_new() -> None:
    """A layer that only says less, and what follows it channel by channel, is as it was."""
    for text, expected in (
        (PLAIN, {"b", "rb", "p", "f", "fc"}),
        (DEPTHWISE, {"b", "rb", "p", "f", "fc"}),
        (TOKENS, {"b", "bb", "rb", "p", "fc"}),
        (NORMED, {"b", "nb", "rb", "nc", "p", "f", "fc"}),
    ):
        whole = graph_of(text)
        small = cut(whole, {"a": [1, 4]})
        assert touched(small, whole) == expected
        assert touched(whole, whole) == frozenset()
        changed = with_arrays(small, a_bias=[0, 0, 0, 0]) if "a_bias" in small.constants else None
        assert changed is None or touched(changed, whole) & {"a", "ab"}


def test_statistics_move_by_what_the_cut_has_moved() -> None:
    """With ``all``, behind layers that come back exactly, statistics that never fitted the samples stay what they were.

    A dead channel of the reference is no reason to divide by zero.
    """
    whole = twins(graph_of(NORMED), "a_weight", "scale_a", "shift_a", "mean_a", "var_a")
    scale, mean, var = (whole.constants[f"{name}_a"].values.copy() for name in ("scale", "mean", "var"))
    scale[4:], mean[4:], var[4:] = scale[:2], [2 * mean[0], 0.5 * mean[1]], [4 * var[0], 0.25 * var[1]]
    shift = whole.constants["shift_a"].values.copy()
    shift[4:] = shift[:2]
    whole = with_arrays(whole, scale_a=scale, mean_a=mean, var_a=var, shift_a=shift)
    samples = normal(whole, 80)
    small = cut(whole, {"a": [4, 5]})
    found = repair(small, whole, samples, method="all", ridge=1e-8)
    for name in ("mean_c", "var_c"):
        np.testing.assert_allclose(found.arrays[name], whole.constants[name].values, rtol=1e-2, atol=1e-3)
    plain = repair(small, whole, samples, method="batch_norm")
    assert np.abs(plain.arrays["var_c"] - whole.constants["var_c"].values).max() > 0.05
