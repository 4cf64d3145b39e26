"""The leaving rule against a loop written the plain way, and carried scores against their ONNX form."""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

from eexform.errors import DataError, GraphError
from eexform.ir import measures, policy
from eexform.ir.emit import Emitter
from eexform.ir.exits import Exit

RNG = np.random.default_rng(5)
SCORES = [(RNG.normal(size=(50, 4)) * scale).astype(np.float32) for scale in (1.0, 2.0, 3.0, 5.0)]


def exits(*rules: tuple[str, float, float]) -> list[Exit]:
    return [
        Exit(
            site=f"s{k}", head="none/avg", logits=f"l{k}", measure=measure, threshold=threshold, temperature=temperature
        )
        for k, (measure, threshold, temperature) in enumerate(rules)
    ]


def plainly(scores, final, rules, kind):
    """One sample at a time, in the order in which it meets the exits."""
    index, confidence, chosen = [], [], []
    for row in range(len(final)):
        place = len(rules)
        sure = measures.get(rules[-1].measure).confidence(measures.to_probabilities(final[row : row + 1], kind))[0]
        for k, rule in enumerate(rules):
            probabilities = measures.to_probabilities(scores[k][row : row + 1], kind, rule.temperature)
            found = measures.get(rule.measure).confidence(probabilities)[0]
            if found >= np.float32(rule.threshold):
                place, sure = k, found
                break
        index.append(place)
        confidence.append(sure)
        chosen.append((*scores, final)[place][row])
    return np.array(index), np.array(chosen), np.array(confidence)


def test_decide_is_the_plain_loop():
    rules = exits(("max_prob", 0.8, 1.3), ("margin", 0.5, 1.0), ("entropy", 0.6, 0.7))
    found = policy.decide(SCORES[:3], SCORES[3], rules, "logits")
    index, chosen, confidence = plainly(SCORES[:3], SCORES[3], rules, "logits")
    assert found.exit_index.dtype == np.int64
    assert found.scores.dtype == found.confidence.dtype == np.float32
    assert len(set(index.tolist())) == 4, "every exit is used"
    np.testing.assert_array_equal(found.exit_index, index)
    np.testing.assert_array_equal(found.scores, chosen)
    np.testing.assert_array_equal(found.confidence, confidence)
    assert found.rates(3) == pytest.approx(np.bincount(index, minlength=4) / 50)
    # a wrong threshold is visible
    wrong = exits(("max_prob", 0.5, 1.3), ("margin", 0.5, 1.0), ("entropy", 0.6, 0.7))
    assert (policy.decide(SCORES[:3], SCORES[3], wrong, "logits").exit_index != index).any()


def test_probabilities_ignore_temperature():
    probabilities = [measures.softmax(scores) for scores in SCORES]
    rules = exits(("max_prob", 0.8, 5.0), ("margin", 0.5, 1.0), ("entropy", 0.6, 1.0))
    found = policy.decide(probabilities[:3], probabilities[3], rules, "probabilities")
    index, _, _ = plainly(probabilities[:3], probabilities[3], rules, "probabilities")
    np.testing.assert_array_equal(found.exit_index, index)


@pytest.mark.parametrize(("threshold", "leaves"), [(-math.inf, True), (math.inf, False), (0.0, True), (1.0, True)])
def test_edge_thresholds(threshold, leaves):
    """Saturated scores reach confidence 1.0 exactly: ``inf``, not 1.0, is the threshold that nobody reaches."""
    saturated = np.array([[1e4, 0, 0, 0]], np.float32)
    found = policy.decide([saturated], -saturated, exits(("max_prob", threshold, 1.0)), "logits")
    assert found.exit_index.tolist() == [0 if leaves else 1]
    np.testing.assert_array_equal(found.scores, saturated if leaves else -saturated)


def test_thresholds_are_compared_in_float32():
    probabilities = np.array([[0.1, 0.9]], np.float32)  # float32(0.9) is below the double 0.9's neighbour above
    found = policy.decide([probabilities], probabilities, exits(("max_prob", 0.9, 1.0)), "probabilities")
    assert found.exit_index.tolist() == [0]


def test_no_exits_and_no_samples():
    found = policy.decide([], SCORES[0], [], "logits")
    assert (found.exit_index == 0).all()
    np.testing.assert_array_equal(found.confidence, measures.softmax(SCORES[0]).max(axis=1))
    assert policy.near_ties([], [], "logits").shape == (0,)
    empty = np.zeros((0, 4), np.float32)
    found = policy.decide([empty], empty, exits(("margin", 0.5, 1.0)), "logits")
    assert found.exit_index.shape == (0,)
    assert found.rates(1) == (0.0, 0.0)


def test_bad_scores():
    bad = SCORES[0].copy()
    bad[7, 2] = np.nan
    rules = exits(("max_prob", 0.5, 1.0))
    with pytest.raises(DataError, match=r"exit at 's0'.*first: sample 7"):
        policy.decide([bad], SCORES[1], rules, "logits")
    with pytest.raises(DataError, match="final exit"):
        policy.decide([SCORES[1]], bad, rules, "logits")
    with pytest.raises(DataError, match="exit 0: scores have shape"):
        policy.decide([SCORES[0][:10]], SCORES[1], rules, "logits")
    with pytest.raises(GraphError, match="1 exits, but scores of 2"):
        policy.decide(SCORES[:2], SCORES[2], rules, "logits")


def test_near_ties_only_where_they_matter():
    first = np.array([[0.9, 0.1], [0.5, 0.5], [0.5, 0.5], [0.60000002, 0.4]], np.float32)
    second = np.array([[0.7, 0.3], [0.7, 0.3], [0.9, 0.1], [0.5, 0.5]], np.float32)
    rules = exits(("max_prob", 0.6, 1.0), ("max_prob", 0.7, 1.0))
    near = policy.near_ties([first, second], rules, "probabilities")
    assert near.tolist() == [False, True, False, True], "sample 0 has left before the exit at which it is close"
    assert policy.near_ties([first], exits(("max_prob", math.inf, 1.0)), "probabilities").sum() == 0


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_carry_numpy_and_onnx_agree(kind, beta):
    scores = [measures.softmax(each) if kind == "probabilities" else each for each in SCORES]
    temperatures = [1.0, 2.0, 0.5, 1.0]
    ours = policy.carry_states(scores, temperatures, beta, kind)

    inputs = [gs.Variable(f"s{k}", np.float32, ["N", 4]) for k in range(4)]
    draft = gs.Graph(inputs=inputs, opset=20)
    outputs = policy.emit_carry(Emitter(draft), inputs, temperatures, beta, kind)
    outputs = [Emitter(draft).node("Identity", value, dtype=np.float32, shape=["N", 4]) for value in outputs]
    draft.outputs = outputs
    model = gs.export_onnx(draft)
    model.ir_version = 10
    session = ort.InferenceSession(model.SerializeToString())
    theirs = session.run(None, {item.name: scores[int(item.name[1:])] for item in session.get_inputs()})
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5, rtol=1e-5)
        if kind == "probabilities":
            np.testing.assert_allclose(mine.sum(axis=1), 1.0, atol=1e-5)


def test_carry_by_hand():
    states = policy.carry_states([np.array([[2.0, 4.0]]), np.array([[1.0, 0.0]])], [2.0, 1.0], 0.5, "logits")
    np.testing.assert_allclose(states[0], [[1.0, 2.0]])
    np.testing.assert_allclose(states[1], [[1.5, 1.0]])
    same = policy.carry_states([np.array([[2.0, 4.0]]), np.array([[1.0, 0.0]])], [1.0, 1.0], 0.0, "logits")
    np.testing.assert_allclose(same[1], [[1.0, 0.0]])
    with pytest.raises(DataError, match="exit 0"):
        policy.carry_states([np.array([[np.nan, 4.0]])], [1.0], 0.5, "logits")
    with pytest.raises(GraphError, match="temperatures"):
        policy.carry_states([np.array([[1.0, 4.0]])], [1.0, 2.0], 0.5, "logits")
