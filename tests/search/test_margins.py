"""Thresholds between confidences: the same decisions, and no sample on the edge."""

from __future__ import annotations

import math

import numpy as np
import pytest

from eexform.ir import measures
from eexform.search.margins import with_margins
from eexform.search.scorer import Candidate, PlannedExit, Scorer, exit_outputs
from tests.search import synthetic

PLACES = [("early", ["none/avg"]), ("late", ["none/avg"])]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    data = synthetic.scores(PLACES)
    return Scorer({"select": data, "test": data}, synthetic.costs(PLACES))


def columns(candidate: Candidate, scorer: Scorer) -> list[np.ndarray]:
    """Confidence of every sample at every exit."""
    data = scorer.splits["select"]
    outputs = exit_outputs(data, candidate)[:-1]
    temperatures = [1.0 if candidate.carry else data.temperatures[pair] for pair in candidate.pairs]
    measure = measures.get(candidate.measure)
    return [
        measure.confidence(measures.to_probabilities(scores, data.scores, temperature))
        for scores, temperature in zip(outputs, temperatures, strict=True)
    ]


def planned(*thresholds: float, measure: str = "max_prob", carry: float = 0.0) -> Candidate:
    exits = [PlannedExit(site, heads[0], t) for (site, heads), t in zip(PLACES, thresholds, strict=True)]
    return Candidate(tuple(exits), measure, carry)


@pytest.mark.parametrize("carry", [0.0, 0.5])
@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_same_decisions_off_the_edge(scorer: Scorer, measure: str, carry: float, share: float) -> None:
    sure = columns(planned(0.5, 0.5, measure=measure, carry=carry), scorer)
    edges = [float(np.sort(column)[int(share * len(column))]) for column in sure]
    before = planned(*edges, measure=measure, carry=carry)
    after = with_margins(before, scorer)
    np.testing.assert_array_equal(scorer.decide(after, "select").exit_index, scorer.decide(before, "select").exit_index)
    for column, edge, exit_ in zip(sure, edges, after.exits, strict=True):
        below = column[column < np.float32(edge)]
        assert (below.max() if len(below) else 0.0) < exit_.threshold < edge
        assert float(np.float32(exit_.threshold)) == exit_.threshold


def test_given_and_infinite_thresholds_stay(scorer: Scorer) -> None:
    edge = float(columns(planned(0.5, 0.5), scorer)[0][7])
    assert with_margins(planned(edge, math.inf), scorer, keep=["early"]) == planned(edge, math.inf)
    assert with_margins(planned(-math.inf, edge), scorer).exits[0].threshold == -math.inf
    assert with_margins(Candidate(), scorer) == Candidate()


def test_neighbours_without_room_between_them(scorer: Scorer) -> None:
    edge = np.float32(0.5)
    data = scorer.splits["select"]
    column = np.full(len(data), np.nextafter(edge, np.float32(0)), np.float32)
    column[0] = edge
    crowded = Scorer(scorer.splits, scorer.costs)
    crowded._confidences["select", "early", "none/avg", "max_prob"] = column
    assert with_margins(planned(0.5, math.inf), crowded).exits[0].threshold == 0.5
