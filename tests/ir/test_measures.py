"""The numpy and the ONNX form of every measure give the same numbers."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

from eexform.errors import DataError, GraphError, OptionError
from eexform.ir import measures
from eexform.ir.emit import Emitter
from eexform.ir.policy import emit_gates

MEASURES = ("entropy", "margin", "max_prob")


def emitted(scores: np.ndarray, *, measure: str, kind: str, temperature: float = 1.0, opset: int = 20) -> np.ndarray:
    """Confidence as onnxruntime computes it from the emitted nodes."""
    source = gs.Variable("scores", np.float32, ["N", scores.shape[1]])
    draft = gs.Graph(inputs=[source], opset=opset)
    out = measures.emit_confidence(
        Emitter(draft, "exit0."),
        source,
        measure=measure,
        kind=kind,
        temperature=temperature,
        num_classes=scores.shape[1],
    )
    out.dtype = np.dtype(np.float32)
    draft.outputs = [out]
    model = gs.export_onnx(draft)
    model.ir_version = 10
    onnx.checker.check_model(model, full_check=True)
    (found,) = ort.InferenceSession(model.SerializeToString()).run(None, {"scores": scores})
    return found


def awkward_logits(classes: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    rows = [*(rng.normal(size=(200, classes)) * rng.uniform(0.1, 30, size=(200, 1)))]
    rows.append(np.zeros(classes))  # all equal
    rows.append(np.full(classes, 1e4))  # equal and large
    rows.append(np.eye(classes)[0] * 1e4)  # saturated
    rows.append(np.eye(classes)[0] * -1e4)
    rows.append(np.eye(classes)[0] * 88.8)  # exp(88.8) overflows float32
    tie = np.zeros(classes)
    tie[[0, 1]] = 7.0
    rows.append(tie)
    return np.asarray(rows, np.float32)


@pytest.mark.parametrize("opset", [17, 18, 23])
@pytest.mark.parametrize("classes", [2, 3, 10, 1000])
@pytest.mark.parametrize("name", MEASURES)
def test_numpy_and_onnx_agree(name, classes, opset):
    scores = awkward_logits(classes)
    for temperature in (1.0, 2.7):
        ours = measures.get(name).confidence(measures.to_probabilities(scores, "logits", temperature))
        theirs = emitted(scores, measure=name, kind="logits", temperature=temperature, opset=opset)
        assert ours.dtype == np.float32
        assert ours.shape == theirs.shape == (len(scores),)
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)
        assert ours.min() >= 0
        assert ours.max() <= 1


@pytest.mark.parametrize("name", MEASURES)
def test_probabilities_get_no_second_softmax(name):
    probabilities = measures.softmax(awkward_logits(10))
    ours = measures.get(name).confidence(measures.to_probabilities(probabilities, "probabilities", 3.0))
    np.testing.assert_allclose(
        ours, emitted(probabilities, measure=name, kind="probabilities", temperature=3.0), atol=1e-6
    )
    second = measures.get(name).confidence(measures.softmax(probabilities))
    assert np.abs(ours - second).max() > 0.1, "the planted second softmax must be visible"


def test_values_by_hand():
    probabilities = np.array([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3], [0, 1, 0], [0.4, 0.4, 0.2]], np.float32)
    np.testing.assert_allclose(measures.MaxProb().confidence(probabilities), [0.7, 1 / 3, 1, 0.4], atol=1e-6)
    np.testing.assert_allclose(measures.Margin().confidence(probabilities), [0.5, 0, 1, 0], atol=1e-6)
    entropy = -(0.7 * np.log(0.7) + 0.2 * np.log(0.2) + 0.1 * np.log(0.1)) / np.log(3)
    np.testing.assert_allclose(measures.Entropy().confidence(probabilities)[:3], [1 - entropy, 0, 1], atol=1e-6)


def test_a_planted_fault_is_seen():
    """Entropy to base 2, margin to the third class: differences far above the tolerance of the comparison."""
    scores = awkward_logits(10)
    theirs = emitted(scores, measure="margin", kind="logits")
    top = np.sort(measures.softmax(scores), axis=1)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(top[:, -1] - top[:, -3], theirs, atol=1e-6, rtol=0)


def test_masked_classes_and_bad_scores():
    masked = np.array([[1.0, -np.inf, 2.0]], np.float32)
    for name in MEASURES:
        ours = measures.get(name).confidence(measures.to_probabilities(masked, "logits"))
        np.testing.assert_allclose(ours, emitted(masked, measure=name, kind="logits"), atol=1e-6)
    for bad in (np.nan, np.inf):
        scores = np.ones((4, 3), np.float32)
        scores[2, 1] = bad
        with pytest.raises(DataError, match="first: sample 2"):
            measures.to_probabilities(scores, "logits")
    with pytest.raises(DataError, match="all -infinity"):
        measures.to_probabilities(np.full((1, 3), -np.inf, np.float32), "logits")
    with pytest.raises(DataError, match=r"\[samples, classes\]"):
        measures.to_probabilities(np.ones(3, np.float32), "logits")
    with pytest.raises(DataError, match="at least 2"):
        measures.Margin().confidence(np.ones((3, 1), np.float32))
    assert measures.to_probabilities(np.zeros((0, 5), np.float32), "logits").shape == (0, 5)


def test_names_and_unknown_measure():
    assert set(MEASURES) <= set(measures.names())
    with pytest.raises(OptionError, match="max_prob"):
        measures.get("maxprob")


def test_emission_needs_the_number_of_classes():
    source = gs.Variable("p", np.float32)
    with pytest.raises(GraphError, match="number of classes"):
        measures.Entropy().emit(Emitter(gs.Graph(inputs=[source], opset=20)), source)


def test_emitter_names_are_unique_and_prefixed():
    source = gs.Variable("x", np.float32, ["N", 3])
    taken = gs.Node("Relu", name="e.max_prob", inputs=[source], outputs=[gs.Variable("e.max_prob_out")])
    draft = gs.Graph(nodes=[taken], inputs=[source], outputs=taken.outputs, opset=20)
    emitter = Emitter(draft, "e.")
    first = measures.MaxProb().emit(emitter, source)
    second = measures.MaxProb().emit(emitter.scoped("inner."), source)
    third = measures.MaxProb().emit(emitter, source)
    names = [node.name for node in draft.nodes]
    assert len(set(names)) == len(names)
    assert len({first.name, second.name, third.name, "e.max_prob_out"}) == 4
    assert second.name.startswith("e.inner.")
    with pytest.raises(GraphError, match="has that name already"):
        emitter.rename(first, "e.max_prob")
    assert emitter.rename(first, "confidence").name == "confidence"


def path(count: int, samples: int = 4000, seed: int = 3) -> list[np.ndarray]:
    """Gates of an exit each, extremes included."""
    rng = np.random.default_rng(seed)
    gates = [rng.beta(0.6, 0.6, samples).astype(np.float32) for _ in range(count)]
    for gate in gates:
        gate[:3] = 0, 1, 1e-7
    return gates


def accumulated(gates: list[np.ndarray], measure: str) -> list[np.ndarray]:
    inputs = [gs.Variable(f"c{place}", np.float32, ["N"]) for place in range(len(gates))]
    draft = gs.Graph(inputs=inputs, opset=20)
    emitter = Emitter(draft)
    found = emit_gates(emitter, inputs, measure)
    draft.outputs = [emitter.node("Identity", value, shape=["N"]) for value in found]
    model = gs.export_onnx(draft)
    model.ir_version = 10
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: gate for value, gate in zip(inputs, gates, strict=True)})


def test_a_gate_speaks_for_itself():
    gates = path(3)
    for ours, theirs, gate in zip(
        measures.get_gate("gate").accumulate(gates), accumulated(gates, "gate"), gates, strict=True
    ):
        np.testing.assert_array_equal(ours, gate)
        np.testing.assert_array_equal(theirs, gate)


def test_stick_breaking_is_the_product_formula_in_both_forms():
    gates = path(8)
    ours, theirs = measures.get_gate("stick").accumulate(gates), accumulated(gates, "stick")
    for place in range(8):
        product = np.prod([1 - gate.astype(np.float64) for gate in gates[: place + 1]], axis=0)
        np.testing.assert_allclose(ours[place], 1 - product, atol=1e-6)
        np.testing.assert_allclose(ours[place], theirs[place], atol=1e-6)
        # the same operations in the same order: thresholds decide alike
        for threshold in np.float32([0.1, 0.5, 0.9, 0.999]):
            assert ((ours[place] >= threshold) == (theirs[place] >= threshold)).all()
        assert ours[place].dtype == np.float32
        assert ours[place].min() >= 0
        assert ours[place].max() <= 1
        if place:
            assert (ours[place] >= ours[place - 1]).all()


def test_gates_are_numbers_between_0_and_1():
    for wrong in ([0.5, np.nan], [0.5, 1.5], [[0.5]], [-0.1]):
        with pytest.raises(DataError, match=r"one number 0\.\.1 per sample"):
            measures.get_gate("stick").accumulate([np.array(wrong, np.float32)])


def test_the_two_kinds_of_measures():
    assert measures.of_kind(learned=True) == ("gate", "stick")
    assert set(MEASURES) <= set(measures.of_kind(learned=False))
    assert measures.is_learned("stick")
    assert not measures.is_learned("max_prob")
    with pytest.raises(OptionError, match=r"reads what a head's gate says, not its scores.*entropy, margin, max_prob"):
        measures.get("gate")
    with pytest.raises(OptionError, match="reads scores; heads with /gate take one of gate, stick"):
        measures.get_gate("margin")
