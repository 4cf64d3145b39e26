"""Heads with a gate: a second output that says how sure the head is."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

from eexform.heads import HeadSpec, fold_head, head_graph, head_macs, portfolio, with_parameters
from eexform.ir.graph import Graph
from tests.heads.support import SITES, samples

TEXTS = [
    ("none/avg+max/gate", "early"),
    ("conv:2x16/avg+max/s2/gate", "early"),
    ("dwsep:1x8/avg/gate", "late"),
    ("mlp:1x12/cls/gate", "tokens"),
    ("mlp:1x12/avg/gate", "flat"),
    ("none/avg/gate", "last"),
]


def run(graph: Graph, inputs: np.ndarray) -> list[np.ndarray]:
    model = gs.export_onnx(graph.gs)
    model.ir_version = 10
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs})


@pytest.mark.parametrize(("text", "name"), TEXTS)
@pytest.mark.parametrize("opset", [17, 21])
def test_scores_are_those_without_a_gate(text: str, name: str, opset: int) -> None:
    where, spec = SITES[name], HeadSpec.parse(text)
    graph = head_graph(spec, where, num_classes=4, seed=1, opset=opset)
    plain = head_graph(HeadSpec.parse(text.removesuffix("/gate")), where, num_classes=4, seed=1, opset=opset)
    assert graph.outputs == ("scores", "gate")
    assert set(graph.parameters()) - set(plain.parameters()) == {"gate.weight", "gate.bias"}
    for count in (1, 5):
        inputs = samples(where, count)
        scores, gate = run(graph, inputs)
        np.testing.assert_array_equal(scores, run(plain, inputs)[0])
        assert gate.shape == (count,)
        assert gate.dtype == np.float32
        assert ((gate > 0) & (gate < 1)).all()
    assert len(set(gate.tolist())) > 1


def test_the_gate_is_a_logistic_regression_on_features_and_best_scores() -> None:
    where = SITES["flat"]
    graph = head_graph(HeadSpec.parse("none/avg/gate"), where, num_classes=4, seed=1)
    inputs = samples(where, 6)
    scores, gate = run(graph, inputs)
    best = np.sort(scores.astype(np.float64), axis=1)[:, :-3:-1]
    np.testing.assert_allclose(gate, 1 / (1 + np.exp(best[:, 1] - best[:, 0])), atol=1e-6)  # so it begins
    weight, bias = np.random.default_rng(0).normal(size=(1, 22)), np.array([0.3])
    trained = with_parameters(graph, {"gate.weight": weight, "gate.bias": bias})
    odds = np.concatenate([inputs, best], axis=1) @ weight[0] + bias
    np.testing.assert_allclose(run(trained, inputs)[1], 1 / (1 + np.exp(-odds)), atol=1e-5)


def test_two_classes_have_a_gate() -> None:
    where = SITES["flat"]
    scores, gate = run(head_graph(HeadSpec.parse("none/avg/gate"), where, num_classes=2, seed=1), samples(where, 3))
    np.testing.assert_allclose(gate, 1 / (1 + np.exp(-np.abs(scores[:, 0] - scores[:, 1]))), atol=1e-6)


def test_probabilities_leave_the_gate_as_it_is() -> None:
    where, spec = SITES["flat"], HeadSpec.parse("mlp:1x8/avg/gate")
    inputs = samples(where, 3)
    logits = run(head_graph(spec, where, num_classes=4, seed=1), inputs)
    probabilities = run(head_graph(spec, where, num_classes=4, seed=1, scores="probabilities"), inputs)
    np.testing.assert_array_equal(logits[1], probabilities[1])
    np.testing.assert_allclose(probabilities[0].sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "name", "features"), [("none/avg+max/gate", "early", 12), ("mlp:1x8/avg/gate", "flat", 8)]
)
def test_macs_count_the_gate(text: str, name: str, features: int) -> None:
    plain = head_macs(HeadSpec.parse(text.removesuffix("/gate")), SITES[name], num_classes=4)
    assert head_macs(HeadSpec.parse(text), SITES[name], num_classes=4) == plain + features + 2


def test_folding_keeps_both_outputs() -> None:
    where = SITES["early"]
    graph = head_graph(HeadSpec.parse("conv:2x8/avg/s2/gate"), where, num_classes=4, seed=1)
    folded = fold_head(graph)
    assert folded.outputs == graph.outputs
    assert all(node.op != "BatchNormalization" for node in folded.nodes)
    inputs = samples(where, 3)
    for ours, theirs in zip(run(folded, inputs), run(graph, inputs), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("name", ["early", "late", "tokens", "flat"])
def test_the_portfolio_with_gates_is_the_same_otherwise(name: str) -> None:
    plain = portfolio(SITES[name], trunk_macs=4e6, num_classes=4)
    gated = portfolio(SITES[name], trunk_macs=4e6, num_classes=4, gates=True)
    assert [str(spec) for spec in gated] == [f"{spec}/gate" for spec in plain]
