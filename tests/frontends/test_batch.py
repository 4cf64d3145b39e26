"""The batch becomes symbolic where that is provably safe; otherwise the node that forbids it is named."""

from __future__ import annotations

import numpy as np
import onnx
import onnxslim
import pytest

from eexform.backends import ort
from eexform.errors import ModelError
from eexform.frontends.onnx import from_model
from eexform.ir.checks import check
from eexform.ir.sites import find_sites
from tests import zoo
from tests.graphs import random_classifier
from tests.text import model, normal


def _fixed(source: onnx.ModelProto, batch: int = 1, others: dict[str, int] | None = None) -> onnx.ModelProto:
    """The model as exported for one batch size, everything that follows from it folded."""
    model_ = onnx.ModelProto()
    model_.CopyFrom(source)
    sizes = {"N": batch, **(others or {})}
    for value in (*model_.graph.input, *model_.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes[dim.dim_param]
    del model_.graph.value_info[:]
    return onnxslim.slim(model_)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_architecture_is_freed_from_a_batch_of_one(name: str) -> None:
    feeds = zoo.feeds(name, 3)
    source = zoo.build(name)
    symbols = {d.dim_param for v in source.graph.input for d in v.type.tensor_type.shape.dim if d.dim_param} - {"N"}
    length = next(iter(feeds.values())).shape[1]
    fixed = _fixed(source, others=dict.fromkeys(symbols, length))
    graph = from_model(fixed)
    check(graph)
    assert graph.types[graph.final].shape == ("N", zoo.CLASSES)
    expected = ort.run(ort.session(source), feeds)["logits"]
    np.testing.assert_allclose(ort.run(ort.session(graph), feeds)[graph.final], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 8])
def test_random_graphs_are_freed(batch: int) -> None:
    for seed in range(10):
        source = random_classifier(seed)
        graph = from_model(_fixed(source, batch))
        feeds = {"image": normal(3, 3, 8, 8, seed=seed)}
        expected = ort.run(ort.session(source), feeds)["scores"]
        np.testing.assert_allclose(ort.run(ort.session(graph), feeds)[graph.final], expected, rtol=1e-4, atol=1e-5)


def test_reshape_targets_are_freed() -> None:
    text = model(
        """h = Reshape(x, heads)
           m = Reshape(h, merged)
           t = Transpose<perm=[0,2,1]>(m)
           f = Reshape(t, flat)
           y = Gemm(f, w)""",
        {
            "heads": np.array([1, 4, 2, 3]),
            "merged": np.array([4, 2, 3]),
            "flat": np.array([1, -1]),
            "w": normal(24, 3),
        },
        inputs="float[1,24] x",
        outputs="float[1,3] y",
    )
    graph = from_model(text)
    assert graph.types["m"].shape == ("4*N", 2, 3)
    assert graph.types["f"].shape == ("N", 24)
    feeds = {"x": normal(5, 24)}
    rows = [ort.run(ort.session(text), {"x": row[None]})["y"] for row in feeds["x"]]
    np.testing.assert_allclose(ort.run(ort.session(graph), feeds)["y"], np.concatenate(rows), rtol=1e-5, atol=1e-6)


def test_a_symbolic_model_with_a_target_for_one_sample_is_repaired() -> None:
    text = model(
        "r = Reshape(x, s)\n y = Gemm(r, w)", {"s": np.array([1, 4]), "w": normal(4, 3)}, inputs="float[N,2,2] x"
    )
    assert from_model(text).types["r"].shape == ("N", 4)


@pytest.mark.parametrize(
    ("body", "weights", "node", "why"),
    [
        ("s = Softmax<axis=0>(x)\n y = Gemm(s, w)", {}, "Softmax_0", "over the batch axis"),
        ("s = CumSum(x, zero)\n y = Gemm(s, w)", {"zero": np.array(0)}, "CumSum_0", "along the batch axis"),
        ("s = ReduceMean<axes=[0],keepdims=1>(x)\n d = Sub(x, s)\n y = Gemm(d, w)", {}, "ReduceMean_0", "batch axis"),
        (
            "s = Slice(x, m1, far, zero1, m1)\n y = Gemm(s, w)",
            {"m1": np.array([-1]), "far": np.array([-(2**62)]), "zero1": np.array([0])},
            "Slice_0",
            "cuts or reverses",
        ),
        ("v, i = TopK<axis=0>(x, one)\n y = Gemm(v, w)", {"one": np.array([1])}, "TopK_0", "along the batch axis"),
        (
            "t = Transpose<perm=[1,0]>(x)\n g = MatMul(x, t)\n q = MatMul(g, x)\n y = Gemm(q, w)",
            {},
            "MatMul_0",
            "one another",
        ),
        ("n = LayerNormalization<axis=0>(x, x)\n y = Gemm(n, w)", {}, "LayerNormalization_0", "over the batch"),
        ("c = Concat<axis=0>(x, x)\n y = Gemm(c, w)", {}, "Concat_0", "along the batch"),
    ],
)
@pytest.mark.parametrize("batch", ["1", "N"])
def test_operators_that_mix_samples_are_named(
    body: str, weights: dict[str, np.ndarray], node: str, why: str, batch: str
) -> None:
    text = model(body, {"w": normal(4, 3), **weights}, inputs=f"float[{batch},4] x", outputs=f"float[{batch},3] y")
    with pytest.raises(ModelError, match="samples of a batch influence one another") as caught:
        from_model(text)
    assert f"{node!r}" in str(caught.value)
    assert why in str(caught.value)


def test_training_mode_is_refused() -> None:
    text = model(
        "b, m, v = BatchNormalization<training_mode=1>(x, s, s, s, s)\n y = Gemm(b, w)",
        {"s": np.ones(4, np.float32), "w": normal(4, 3)},
    )
    with pytest.raises(ModelError, match=r"training mode.*evaluation mode"):
        from_model(text)


def test_custom_operators_forbid_freeing_but_not_a_symbol() -> None:
    body, weights = "c = acme.Magic(x)\n y = Gemm(c, w)", {"w": normal(4, 3)}

    def text(batch: str) -> onnx.ModelProto:
        made = model(body, weights, inputs=f"float[{batch},4] x", outputs=f"float[{batch},3] y", domains=', "acme" : 1')
        dims = [1 if batch == "1" else batch, 4]
        made.graph.value_info.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, dims))
        return made

    assert from_model(text("batch")).types["c"].shape == ("N", 4)
    with pytest.raises(ModelError, match=r"batch of 1 and it cannot be shown.*'Magic_0'.*custom operator"):
        from_model(text("1"))


def test_a_fixed_batch_that_cannot_be_freed_names_the_node() -> None:
    text = model(
        "e = Expand(x, s)\n y = Gemm(e, w)",
        {"s": np.array([8, 4]), "w": normal(4, 3)},
        inputs="float[8,4] x",
        outputs="float[8,3] y",
    )
    with pytest.raises(ModelError, match=r"exported for a batch of 8.*'Expand_0'"):
        from_model(text)


def test_symbols_are_renamed() -> None:
    text = model(
        "e = Gather(table, ids)\n m = Cast<to=1>(mask)\n u = Unsqueeze(m, one)\n p = Mul(e, u)\n"
        " r = ReduceMean<axes=[1],keepdims=0>(p)\n y = Gemm(r, w)",
        {"table": normal(10, 4), "w": normal(4, 3), "one": np.array([2])},
        inputs="int64[batch,seq] ids, int64[batch,seq] mask",
        outputs="float[batch,3] y",
    )
    graph = from_model(text)
    assert graph.types["ids"].shape == ("N", "seq")
    assert graph.types["p"].shape == ("N", "seq", 4)
    assert graph.types["y"].shape == ("N", 3)


def test_a_batch_that_is_not_first() -> None:
    text = model(
        "t = Transpose<perm=[1,0,2]>(x)\n r = ReduceMean<axes=[1],keepdims=0>(t)\n y = Gemm(r, w)",
        {"w": normal(4, 3)},
        inputs="float[time,batch,4] x",
        outputs="float[batch,3] y",
    )
    graph = from_model(text)
    assert graph.types["x"].shape == ("time", "N", 4)
    assert graph.types["x"].batch_axis == 1


def test_another_symbol_called_n_gives_way() -> None:
    text = model(
        "r = ReduceMean<axes=[1],keepdims=0>(x)\n y = Gemm(r, w)",
        {"w": normal(4, 3)},
        inputs="float[batch,N,4] x",
        outputs="float[batch,3] y",
    )
    assert from_model(text).types["x"].shape == ("N", "N_", 4)


def test_inputs_of_different_batch_are_refused() -> None:
    text = model(
        "s = Add(x, z)\n y = Gemm(s, w)",
        {"w": normal(4, 3)},
        inputs="float[2,4] x, float[1,4] z",
        outputs="float[2,3] y",
    )
    with pytest.raises(ModelError, match=r"different first dimensions.*'x'.*'z'"):
        from_model(text)


AS_STRIDED = """flat = Reshape(x, all) size = Shape<start=0, end=1>(x) count = Squeeze(size)
                rows = Range(zero, count, one) first = Mul(rows, {stride}) column = Unsqueeze(first, axis1)
                index = Add(column, columns) h = Gather<axis=0>(flat, index) y = Gemm(h, w)"""


def _strided(stride: str, opset: int = 17) -> onnx.ModelProto:
    weights = {
        "all": np.array([-1]), "zero": np.array(0), "one": np.array(1), "axis1": np.array([1]), "four": np.array(4),
        "columns": np.arange(4), "w": normal(4, 3),
    }  # fmt: skip
    return model(AS_STRIDED.format(stride=stride), weights, opset=opset)


def test_a_view_written_as_a_pick_by_computed_places_is_a_reshape() -> None:
    """torch's ``as_strided``, into which ``AdaptiveAvgPool1d(1)`` is decomposed."""
    source = _strided("four")
    graph = from_model(source)
    assert [node.op for node in graph.nodes if node.op == "Gather"] == []
    assert graph.types["h"].shape == ("N", 4)
    feeds = {"x": normal(6, 4, seed=1)}
    expected = ort.run(ort.session(source), feeds)["y"]
    np.testing.assert_array_equal(ort.run(ort.session(graph), feeds)["y"], expected)


def test_a_pick_in_another_order_is_refused() -> None:
    """Rows that overlap: each sample sees a part of the next."""
    with pytest.raises(ModelError, match="picks along the batch axis"):
        from_model(_strided("one"))


def test_a_view_written_for_one_batch_is_freed() -> None:
    text = "flat = Reshape(x, all) h = Gather<axis=0>(flat, index) y = Gemm(h, w)"
    weights = {"all": np.array([12]), "index": np.arange(12).reshape(3, 4), "w": normal(4, 3)}
    graph = from_model(model(text, weights, inputs="float[3,4] x", outputs="float[3,3] y"))
    feeds = {"x": normal(5, 4, seed=1)}
    np.testing.assert_allclose(ort.run(ort.session(graph), feeds)["y"], feeds["x"] @ weights["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", ["GRU", "LSTM", "RNN"])
@pytest.mark.parametrize("directions", [1, 2])
def test_frames_between_recurrent_layers_are_there_batch_first(op: str, directions: int) -> None:
    gates = {"GRU": 3, "LSTM": 4, "RNN": 1}[op]
    way = 'direction="bidirectional"' if directions == 2 else 'direction="forward"'
    text = f"""t = Transpose<perm=[1,0,2]>(x) a = {op}<hidden_size=6, {way}>(t, w1, r1)
               b = Transpose<perm=[0,2,1,3]>(a) c = Reshape(b, joined) d, last = {op}<hidden_size=6>(c, w2, r2)
               e = Squeeze(last, first) y = Gemm(e, out)"""
    weights = {
        "w1": normal(directions, gates * 6, 4), "r1": normal(directions, gates * 6, 6, seed=1),
        "w2": normal(1, gates * 6, 6 * directions, seed=2), "r2": normal(1, gates * 6, 6, seed=3),
        "joined": np.array([0, 0, 6 * directions]), "first": np.array([0]), "out": normal(6, 3, seed=4),
    }  # fmt: skip
    source = model(text, weights, inputs="float[N,5,4] x")
    graph = from_model(source)
    found = find_sites(graph).sites
    assert [(site.kind, site.shape, site.channels) for site in found] == [
        ("sequence", (5, 6 * directions), 6 * directions)
    ]
    feeds = {"x": normal(7, 5, 4, seed=5)}
    expected = ort.run(ort.session(source), feeds)["y"]
    np.testing.assert_allclose(ort.run(ort.session(graph), feeds)["y"], expected, rtol=1e-5, atol=1e-6)


def test_a_time_first_residual_stream_has_sites() -> None:
    """Both kinds of blocks: normalisation in front of the layers and behind the sum."""
    text = """h0 = MatMul(x, w0) t = Transpose<perm=[1,0,2]>(h0)
              a = MatMul(t, w1) b = Relu(a) s1 = Add(b, t) l1 = LayerNormalization(s1, g, g)
              c = MatMul(l1, w2) d = Tanh(c) s2 = Add(d, l1)
              l2 = LayerNormalization(s2, g, g) e = MatMul(l2, w3) f = Tanh(e) s3 = Add(f, s2)
              m = ReduceMean<axes=[0], keepdims=0>(s3) y = Gemm(m, out)"""
    weights = {f"w{i}": normal(6 if i else 4, 6, seed=i) for i in range(4)} | {"g": normal(6), "out": normal(6, 3)}
    source = model(text, weights, inputs="float[N,5,4] x")
    graph = from_model(source)
    values = [site.value for site in find_sites(graph).sites if site.shape == (5, 6)]
    assert "l1.N.first" in values
    assert "s2.N.first" in values
    feeds = {"x": normal(7, 5, 4, seed=5)}
    expected = ort.run(ort.session(source), feeds)["y"]
    np.testing.assert_allclose(ort.run(ort.session(graph), feeds)["y"], expected, rtol=1e-5, atol=1e-6)
