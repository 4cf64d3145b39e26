"""Heads as graphs: they run at any batch and opset, are reproducible, and refuse what they cannot do with a reason."""

from __future__ import annotations

import numpy as np
import pytest

from eexform.errors import GraphError, ModelError, OptionError
from eexform.heads import HeadSpec, fold_head, head_graph, head_macs, unsupported, with_parameters
from tests.heads.support import SITES, run, samples, site

SPACE = ("none/avg", "none/avg/s4", "conv:1x8/avg/s2", "conv:2x8/avg+max/s8", "conv:3x8/avg", "dwsep:2x8/avg/s4",
         "bottleneck:1x8/avg+max/s2", "mlp:2x8/avg", "mlp:1x8/avg+max/s2")  # fmt: skip
TOKENS = ("none/cls", "none/mean", "mlp:2x8/cls", "mlp:1x8/mean", "none/avg+max")
FLAT = ("none/avg", "mlp:3x8/avg")

CASES = [
    *((name, text) for name in ("early", "late", "pixel", "uneven", "last", "line", "dynamic") for text in SPACE),
    *((name, text) for name in ("tokens", "dynamic_tokens") for text in TOKENS),
    *(("flat", text) for text in FLAT),
]


@pytest.mark.parametrize(("name", "text"), CASES)
def test_every_head_runs_at_any_batch(name, text):
    spec, where = HeadSpec.parse(text), SITES[name]
    assert unsupported(spec, where) is None
    graph = head_graph(spec, where, num_classes=4, seed=1)
    inputs = samples(where, 7)
    together = run(graph, inputs)
    assert together.shape == (7, 4)
    assert together.dtype == np.float32
    apart = np.concatenate([run(graph, inputs[place : place + 1]) for place in range(2)])
    np.testing.assert_allclose(apart, together[:2], atol=1e-5)
    assert np.ptp(together, axis=0).min() > 0, "the scores depend on the sample"


@pytest.mark.parametrize("text", ["conv:2x8/avg+max/s8", "mlp:1x8/avg", "dwsep:1x8/avg"])
@pytest.mark.parametrize("opset", [17, 18, 21, 23])
def test_the_same_head_at_every_opset(text, opset):
    spec, where = HeadSpec.parse(text), SITES["early"]
    found = run(head_graph(spec, where, num_classes=4, seed=2, opset=opset), samples(where, 3))
    np.testing.assert_allclose(found, run(head_graph(spec, where, num_classes=4, seed=2), samples(where, 3)), atol=1e-6)


def test_names_and_seeds():
    spec = HeadSpec.parse("conv:2x8/avg/s2")
    graph = head_graph(spec, SITES["early"], num_classes=4, seed=1)
    assert graph.inputs == ("site",)
    assert graph.outputs == ("scores",)
    batch_norm = ("weight", "bias", "running_mean", "running_var")
    expected = {"classifier.weight", "classifier.bias"}
    for layer in ("layer0", "layer1"):
        expected |= {f"{layer}.conv.weight", *(f"{layer}.bn.{part}" for part in batch_norm)}
    assert set(graph.parameters()) == expected
    again = head_graph(spec, SITES["early"], num_classes=4, seed=1).parameters()
    other = head_graph(spec, SITES["early"], num_classes=4, seed=2).parameters()
    for name, values in graph.parameters().items():
        np.testing.assert_array_equal(values, again[name])
    assert (other["layer0.conv.weight"] != again["layer0.conv.weight"]).all()
    deviation = np.sqrt(2 / (6 * 9))  # He: 2 / fan-in
    assert np.std(again["layer0.conv.weight"]) == pytest.approx(deviation, rel=0.15)


def test_stride_goes_to_the_layers_first():
    def work(text: str) -> list[tuple[str, list[int]]]:
        graph = head_graph(HeadSpec.parse(text), SITES["early"], num_classes=4)
        return [(node.op, node.attrs["strides"]) for node in graph.nodes if "strides" in node.attrs]

    assert work("conv:2x8/avg/s2") == [("Conv", [2, 2]), ("Conv", [1, 1])]
    assert work("conv:2x8/avg/s8") == [("AveragePool", [2, 2]), ("Conv", [2, 2]), ("Conv", [2, 2])]
    assert work("dwsep:1x8/avg/s2") == [("Conv", [2, 2]), ("Conv", [1, 1])]
    assert work("mlp:1x8/avg/s4") == [("AveragePool", [4, 4])]


def test_pooling_by_hand():
    where, inputs = SITES["last"], samples(SITES["last"], 3)
    graph = head_graph(HeadSpec.parse("none/avg+max"), where, num_classes=4, seed=3)
    weight, bias = graph.parameters()["classifier.weight"], graph.parameters()["classifier.bias"]
    features = np.concatenate([inputs.mean(axis=(1, 2)), inputs.max(axis=(1, 2))], axis=1)
    np.testing.assert_allclose(run(graph, inputs), features @ weight.T + bias, atol=1e-5)

    where, inputs = SITES["tokens"], samples(SITES["tokens"], 3)
    for pool, features in (("cls", inputs[:, 0]), ("mean", inputs.mean(axis=1))):
        graph = head_graph(HeadSpec(pool=pool), where, num_classes=4, seed=3)
        expected = features @ graph.parameters()["classifier.weight"].T
        np.testing.assert_allclose(run(graph, inputs), expected, atol=1e-5)


def test_probabilities_for_trunks_that_end_in_a_softmax():
    spec, inputs = HeadSpec.parse("mlp:1x8/avg"), samples(SITES["flat"], 5)
    logits = run(head_graph(spec, SITES["flat"], num_classes=4, seed=1), inputs)
    graph = head_graph(spec, SITES["flat"], num_classes=4, seed=1, scores="probabilities")
    assert graph.scores == "probabilities"
    powers = np.exp(logits)
    np.testing.assert_allclose(run(graph, inputs), powers / powers.sum(axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize(
    ("text", "name", "reason"),
    [
        ("conv:1x8/avg", "tokens", "need a site with space"),
        ("dwsep:1x8/avg", "flat", "need a site with space"),
        ("none/cls", "early", "no pooling 'cls': choose from avg, avg\\+max"),
        ("none/avg", "tokens", "choose from cls, mean"),
        ("mlp:1x8/avg/s2", "flat", "no space to reduce by 2"),
    ],
)
def test_what_does_not_fit_says_why(text, name, reason):
    with pytest.raises(OptionError, match=reason):
        head_graph(HeadSpec.parse(text), SITES[name], num_classes=4)


def test_other_refusals():
    with pytest.raises(OptionError, match="at least 2 classes"):
        head_graph(HeadSpec(), SITES["flat"], num_classes=1)
    volume = site("spatial", 4, 1, (4, 3, 3, 3))
    assert "one or two spatial axes" in unsupported(HeadSpec.parse("conv:1x8/avg"), volume)
    assert unsupported(HeadSpec(), volume) is None


def test_with_parameters():
    graph = head_graph(HeadSpec.parse("mlp:1x8/avg"), SITES["flat"], num_classes=4, seed=1)
    inputs = samples(SITES["flat"], 3)
    before = run(graph, inputs)
    bias = np.array([0, 10, 0, 0], np.float32)
    changed = with_parameters(graph, {"classifier.bias": bias})
    np.testing.assert_allclose(run(changed, inputs), before + bias, atol=1e-6)
    np.testing.assert_array_equal(run(graph, inputs), before)  # the graph given is untouched
    with pytest.raises(GraphError, match=r"no parameter 'classifier\.bios'.*classifier\.bias"):
        with_parameters(graph, {"classifier.bios": bias})
    with pytest.raises(GraphError, match=r"expected shape \[4\], found \[5\]"):
        with_parameters(graph, {"classifier.bias": np.zeros(5, np.float32)})
    with pytest.raises(ModelError, match="NaN or infinite"):
        with_parameters(graph, {"classifier.bias": bias * np.nan})


@pytest.mark.parametrize("text", ["conv:2x8/avg/s2", "dwsep:1x8/avg", "bottleneck:1x8/avg+max"])
def test_folding_keeps_the_scores(text):
    where = SITES["early"]
    graph = head_graph(HeadSpec.parse(text), where, num_classes=4, seed=1)
    rng = np.random.default_rng(0)
    statistics = {
        name: rng.uniform(0.5, 2.0, values.shape).astype(np.float32)
        for name, values in graph.parameters().items()
        if "bn." in name
    }
    graph = with_parameters(graph, statistics)
    folded = fold_head(graph)
    assert "BatchNormalization" not in {node.op for node in folded.nodes}
    assert "BatchNormalization" in {node.op for node in graph.nodes}, "the graph given is untouched"
    before, after = run(graph, samples(where, 5)), run(folded, samples(where, 5))
    np.testing.assert_allclose(after, before, atol=1e-4, rtol=1e-4)
    wrong = {name: values + (0.1 if name.endswith("running_var") else 0) for name, values in statistics.items()}
    assert np.abs(run(fold_head(with_parameters(graph, wrong)), samples(where, 5)) - before).max() > 1e-3


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("none/avg", "early", 6 * 4),
        ("conv:1x8/avg/s2", "early", 8 * 8 * 8 * 6 * 9 + 8 * 4),
        ("dwsep:1x8/avg", "early", 256 * 6 * 9 + 256 * 6 * 8 + 8 * 4),
        ("conv:1x8/avg", "line", 20 * 8 * 12 * 3 + 8 * 4),
        ("conv:1x8/avg+max", "last", 63 * 8 * 5 * 9 + 16 * 4),
        ("mlp:1x8/mean", "dynamic_tokens", 16 * 8 + 8 * 4),
    ],
)
def test_macs_by_hand(text, name, expected):
    assert head_macs(HeadSpec.parse(text), SITES[name], num_classes=4) == expected


def test_macs_need_the_size():
    with pytest.raises(GraphError, match="not known"):
        head_macs(HeadSpec.parse("conv:1x8/avg"), SITES["dynamic"], num_classes=4)
