"""Learned confidences in every form: what the gates say decides, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eexform.backends import ort
from eexform.backends.blocks import split
from eexform.backends.lower_if import lower_if
from eexform.backends.lower_multi import lower_multi
from eexform.backends.lower_stages import save_stages
from eexform.ir.policy import Decisions, confidences, decide
from eexform.runtime import StagedSession
from tests import zoo
from tests.lowering import nets
from tests.lowering.test_forms import COUNT, SAMPLES, agree, order, run_if

CASES = [("gate", 0.0), ("gate", 0.5), ("stick", 0.0), ("stick", 0.5)]


@pytest.mark.parametrize(("measure", "carry"), CASES)
@pytest.mark.parametrize("name", ["resnet", "vit", "bert"])
def test_every_form_decides_like_the_simulator(name: str, measure: str, carry: float, tmp_path: Path) -> None:
    graph = nets.with_exits(name, COUNT, carry=carry, measure=measure)
    expected = nets.scores(name, COUNT, SAMPLES, carry, measure)
    thresholds = nets.spread(expected)
    expected, graph = expected.with_thresholds(thresholds), nets.set_thresholds(graph, thresholds)
    assert len(set(expected.decisions().exit_index.tolist())) > 2
    feeds = zoo.feeds(name, SAMPLES, seed=3)
    model, multi = ort.session(lower_if(graph)), ort.session(lower_multi(graph))
    save_stages(graph, tmp_path / "stages")
    session = StagedSession(tmp_path / "stages")

    def by_if(part: dict[str, np.ndarray]) -> Decisions:
        found = ort.run(model, part)
        return Decisions(found["exit_index"], found["logits"], found["confidence"])

    def by_multi(part: dict[str, np.ndarray]) -> Decisions:
        found = ort.run(multi, part)
        names = [f"{what}{place}" for what in ("exit", "confidence") for place in range(COUNT)]
        assert list(found) == ["logits", *names]
        values = list(found.values())
        return decide(values[1 : 1 + COUNT], values[0], graph.exits, graph.scores, values[1 + COUNT :])

    for size in (1, 7, 32):
        for run in (by_if, by_multi, lambda part: Decisions(*order(session.run(part)))):
            agree(expected, run, feeds, graph, size)


def test_what_is_handed_on() -> None:
    """Own gates stay where they are; what the stick has lost so far goes with the sample, one number each."""
    for measure, handed in (("gate", 0), ("stick", 1)):
        graph = nets.with_exits("resnet", COUNT, measure=measure)
        blocks = split(graph)
        sure = {item.confidence for item in graph.exits}
        assert [len(sure & set(block.live)) for block in blocks] == [handed] * (COUNT - 1) + [0, 0]


def test_stick_differs_from_the_gates_alone() -> None:
    own = nets.scores("resnet", COUNT, SAMPLES, 0.0, "gate").confidences()
    stick = nets.scores("resnet", COUNT, SAMPLES, 0.0, "stick").confidences()
    np.testing.assert_allclose(stick, 1 - np.cumprod(1 - own.astype(np.float64), axis=0), atol=1e-6)
    assert (stick[1:] > own[1:]).all()


def test_thresholds_as_input_and_carried_scores() -> None:
    graph = nets.with_exits("resnet", COUNT, carry=0.5, measure="stick")
    expected = nets.scores("resnet", COUNT, SAMPLES, 0.5, "stick")
    plain = nets.scores("resnet", COUNT, SAMPLES, 0.0, "stick")
    np.testing.assert_array_equal(expected.confidences(), plain.confidences())  # carry moves scores, not gates
    assert np.abs(expected.exit_scores[1] - plain.exit_scores[1]).max() > 1e-3
    model = lower_if(graph, thresholds_as_input=True)
    feeds = zoo.feeds("resnet", SAMPLES, seed=3)
    for thresholds in (nets.spread(expected), [np.inf] * 3, [-np.inf] * 3, [np.inf, -np.inf, 0.5]):
        forced = expected.with_thresholds(thresholds)
        given = np.array(thresholds, np.float32)
        agree(forced, lambda part, t=given: run_if(model, part, thresholds=t), feeds, graph, 32)


def test_the_final_classifier_has_the_plain_confidence() -> None:
    expected = nets.scores("resnet", COUNT, SAMPLES, 0.0, "stick").with_thresholds([np.inf] * COUNT)
    found = expected.decisions().confidence
    logits = expected.final.astype(np.float64)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(found, (powers / powers.sum(axis=1, keepdims=True)).max(axis=1), atol=1e-6)


def test_a_confidence_that_is_not_given_is_an_error() -> None:
    from eexform.errors import DataError, GraphError

    expected = nets.scores("resnet", COUNT, SAMPLES, 0.0, "gate")
    with pytest.raises(GraphError, match="its confidence is a value of the network"):
        confidences(expected.exit_scores, expected.exits, expected.kind)
    wrong = [np.full(SAMPLES, np.nan, np.float32)] * COUNT
    with pytest.raises(DataError, match="holds NaN"):
        confidences(expected.exit_scores, expected.exits, expected.kind, wrong)
