"""The fast scorer, the exact scorer and the simulator of the leaving rule say the same, sample by sample."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eexform.cost_models.paths import PathCosts
from eexform.errors import DataError, OptionError
from eexform.ir import policy
from eexform.ir.exits import Exit
from eexform.search.bits import BitScorer, level_ranks
from eexform.search.judge import Judge
from eexform.search.paths import PathColumns
from eexform.search.scorer import Candidate, HeadScores, PlannedExit, Scorer
from tests.search import synthetic

WHERE = synthetic.places(4, 2)


def setup(
    samples: int,
    kind: str,
    coarse: bool,
    seed: int,
    levels: int,
    trust: float = 0.0,
    measures: tuple[str, ...] = synthetic.MEASURES,
) -> tuple[BitScorer, Scorer]:
    data = synthetic.scores(WHERE, samples, 4, seed, kind, coarse)
    costs = synthetic.costs(WHERE, routing=1234.5)
    bits = BitScorer(data, costs, WHERE, measures=measures, levels=levels, trust=trust)
    return bits, Scorer({"select": data}, costs, trust)


plans = st.lists(
    st.tuples(
        st.lists(
            st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(0, 9)), max_size=4, unique_by=lambda e: e[0]
        ),
        st.integers(0, 4),
        st.sampled_from([0.0, 0.0, 0.5, 1.0]),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(
    plans,
    st.integers(1, 150),
    st.sampled_from(["logits", "probabilities"]),
    st.booleans(),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_bit_scorer_equals_exact_scorer(
    drawn: list[tuple[list[tuple[int, int, int]], int, float]],
    samples: int,
    kind: str,
    coarse: bool,
    seed: int,
    trust: float,
) -> None:
    levels = 9  # level 9 is "never", level 0 lets everything leave
    bits, exact = setup(samples, kind, coarse, seed, levels, trust, (*synthetic.MEASURES, *synthetic.LEARNED))
    heads = np.full((len(drawn), 4), -1)
    marks = np.full((len(drawn), 4), levels)
    for row, (exits, _, _) in enumerate(drawn):
        for site, head, level in exits:  # a gap in the row is an exit that is not there
            heads[row, site], marks[row, site] = site * 2 + head, level
    measure = np.array([m for _, m, _ in drawn])
    carry = np.array([c for _, _, c in drawn])
    counts = bits.score(heads, marks, measure, carry)
    costs = {name: bits.mean_cost(name, heads, counts) for name in bits.costs}
    for row, (exits, m, c) in enumerate(drawn):
        exits = sorted(exits)
        candidate = bits.candidate([s * 2 + h for s, h, _ in exits], [level for _, _, level in exits], m, c)
        scored = exact.exact(candidate, "select")
        assert counts.correct[row] == round(scored.accuracy * samples)
        assert counts.credit[row] == pytest.approx(scored.judged * samples)
        if not trust:
            assert scored.judged == scored.accuracy
        there = [*(s for s, _, _ in exits), 4]
        np.testing.assert_array_equal(counts.left[row, there], np.round(np.array(scored.rates) * samples))
        assert counts.left[row].sum() == samples
        for name in bits.costs:
            assert costs[name][row] == pytest.approx(scored.cost[name], rel=1e-12)
            assert bits.vectors(name, heads)[row, there] == pytest.approx(bits.costs[name].path(candidate.pairs))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.sampled_from(["logits", "probabilities"]), st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
def test_exact_scorer_equals_the_leaving_rule(seed: int, kind: str, carry: float, coarse: bool) -> None:
    data = synthetic.scores(WHERE, 97, 5, seed, kind, coarse)
    rng = np.random.default_rng(seed)
    chosen = [("s0", "h1", 0.7), ("s2", "h0", float(rng.random())), ("s3", "h1", math.inf)]
    candidate = Candidate(tuple(PlannedExit(*exit_) for exit_ in chosen), "margin", carry)
    scorer = Scorer({"select": data}, synthetic.costs(WHERE))
    outputs = [data.heads[site, head] for site, head, _ in chosen]
    temperatures = [data.temperatures[site, head] for site, head, _ in chosen]
    final = data.final
    if carry:
        *outputs, final = policy.carry_states(
            [*outputs, final], [*temperatures, data.final_temperature], carry, data.scores
        )
        temperatures = [1.0] * 3
    exits = [
        Exit(site, head, "", "margin", threshold, temperature)
        for (site, head, threshold), temperature in zip(chosen, temperatures, strict=True)
    ]
    expected = policy.decide(outputs, final, exits, data.scores)
    decided = scorer.decide(candidate, "select")
    np.testing.assert_array_equal(decided.exit_index, expected.exit_index)
    np.testing.assert_array_equal(decided.predicted, expected.scores.argmax(axis=1))
    scored = scorer.exact(candidate, "select")
    assert scored.accuracy == pytest.approx((expected.scores.argmax(axis=1) == data.labels).mean())
    assert scored.rates == pytest.approx(expected.rates(3))
    assert scored.rates[2] == 0
    assert scored.exit_accuracy[2] is None


def test_costs_by_hand() -> None:
    data = HeadScores(
        final=np.array([[9, 0], [0, 9], [9, 0], [9, 0]], np.float32),
        labels=np.array([0, 1, 0, 1]),
        heads={("a", "h"): np.array([[9, 0], [9, 0], [0.1, 0], [0, 0.1]], np.float32)},
        temperatures={("a", "h"): 1.0},
    )
    macs = PathCosts(100.0, {"a": 40.0}, {("a", "h"): 5.0}, {"a": 1.0}, {"a": 2.0})
    scored = Scorer({"select": data}, {"macs": macs}).exact(Candidate((PlannedExit("a", "h", 0.9),)), "select")
    assert scored.rates == (0.5, 0.5)
    assert scored.accuracy == 0.5  # right, wrong | right, wrong
    assert scored.exit_accuracy == (0.5, 0.5)
    assert scored.cost["macs"] == (46 + 46 + 108 + 108) / 4
    assert scored.cost_heads_free["macs"] == (40 + 40 + 100 + 100) / 4
    assert scored.worst["macs"] == 108
    assert scored.to_json()["macs_heads_free"] == 70


def test_the_trunks_opinion_softens_right_and_wrong() -> None:
    final = np.log(np.array([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6]], np.float32))
    data = HeadScores(final, np.array([0, 1, 1]), {}, {})
    judge = Judge(data, 0.5)
    # the trunk's own answers: right, wrong, right
    np.testing.assert_allclose(judge.credit(np.array([0, 0, 1])), [0.9, 0.4, 0.8], atol=1e-6)
    # the others: 0.2, 0.2, 0.4, to within half a step
    np.testing.assert_allclose(judge.credit(np.array([1, 1, 0])), [0.1, 0.6, 0.2], atol=0.5 / 30)
    assert Judge(data, 0.0).credit(np.array([1, 1, 1])).tolist() == [0, 1, 1]
    with pytest.raises(OptionError, match="trust 2"):
        Judge(data, 2.0)


def test_sites_on_different_branches_share_only_what_both_need() -> None:
    where = synthetic.places(2, 1)
    data = synthetic.scores(where, 60)
    branched = PathCosts(
        100.0, {"s0": 30.0, "s1": 40.0}, {("s0", "h0"): 1.0, ("s1", "h0"): 2.0},
        {"s0": 0.5, "s1": 0.5}, sites=("s0", "s1"), cells=((0b11, 10.0), (0b01, 20.0), (0b10, 30.0)),
    )  # fmt: skip
    assert not branched.nested
    bits = BitScorer(data, {"macs": branched}, where)
    heads = np.array([[0, 1], [-1, 1], [1, -1], [0, -1]])
    vectors = bits.vectors("macs", heads)
    assert vectors[0].tolist() == [31.5, 64.0, 104.0]  # 10 + 20 + 30 at s1, once s0 was passed
    assert vectors[1, 1:].tolist() == [42.5, 102.5]
    assert vectors[2, [0, 2]].tolist() == [42.5, 102.5]
    assert vectors[3, [0, 2]].tolist() == [31.5, 101.5]


@pytest.mark.parametrize("combine", ["sum", "max"])
def test_vectors_are_the_paths(combine: str) -> None:
    where = synthetic.places(4, 2)
    costs = replace(synthetic.costs(where, routing=3e5)["macs"], combine=combine)
    bits = BitScorer(synthetic.scores(where, 60), {"macs": costs}, where)
    rng = np.random.default_rng(0)
    heads = np.stack([np.where(rng.random(4) < 0.6, 2 * np.arange(4) + rng.integers(0, 2, 4), -1) for _ in range(40)])
    for row, vector in zip(heads, bits.vectors("macs", heads), strict=True):
        chosen = [bits.heads[head] for head in row if head >= 0]
        there = np.append(row >= 0, True)
        np.testing.assert_allclose(vector[there], costs.path(chosen), rtol=1e-12)


def test_thresholds_are_confidences_of_samples() -> None:
    bits, exact = setup(200, "logits", False, 0, 16)
    for measure, name in enumerate(synthetic.MEASURES):
        confidence = exact.confidence("select", "s1", "h0", name)
        assert set(bits.thresholds(2, measure)) <= set(confidence)
        assert bits.thresholds(2, measure)[0] == confidence.min()
    ranks = level_ranks(5000, 128)
    assert ranks[0] == 0
    assert (np.diff(ranks) >= 0).all()
    assert ranks[-1] < 5000
    assert np.diff(ranks).max() < 0.017 * 5000
    assert ranks[-1] > 4990
    assert ranks[1] < 10


def test_fixed_thresholds_are_kept() -> None:
    data = synthetic.scores(WHERE, 150)
    fixed = {"s0": 0.625, "s1": math.inf, "s2": -math.inf}
    bits = BitScorer(data, synthetic.costs(WHERE), WHERE, levels=8, fixed=fixed)
    candidate = bits.candidate([0, 2, 4], [3, 3, 3], 0, 0.0)
    assert [exit_.threshold for exit_ in candidate.exits] == [0.625, math.inf, -math.inf]
    counts = bits.score(np.array([[0, 2, 4]]), np.array([[3, 3, 3]]), np.array([0]))
    scored = Scorer({"select": data}, synthetic.costs(WHERE)).exact(candidate, "select")
    assert counts.left[0].tolist() == [round(rate * 150) for rate in scored.rates]
    assert counts.left[0, 1] == 0
    assert counts.left[0, 3] == 0


def test_errors_name_what_is_wrong() -> None:
    data = synthetic.scores(WHERE, 20)
    scorer = Scorer({"select": data}, synthetic.costs(WHERE))
    with pytest.raises(OptionError, match="no head 'h9' has been trained at 's0'"):
        scorer.exact(Candidate((PlannedExit("s0", "h9", 0.5),)), "select")
    with pytest.raises(OptionError, match=r"split 'tests'.*did you mean 'test'"):
        Scorer({"test": data}, {}).exact(Candidate(), "tests")
    with pytest.raises(DataError, match="19 labels for 20 samples"):
        HeadScores(data.final, data.labels[:-1], data.heads, data.temperatures)
    with pytest.raises(DataError, match="no samples"):
        HeadScores(data.final[:0], data.labels[:0], {}, {})
    broken = HeadScores(data.final, data.labels, {("s0", "h0"): data.final[:10]}, {("s0", "h0"): 1.0})
    with pytest.raises(DataError, match=r"scores of shape \(10, 10\)"):
        BitScorer(broken, {}, [("s0", ["h0"])])
    with pytest.raises(OptionError, match="use fewer levels"):
        BitScorer(data, {}, WHERE, measures=("max_prob",) * 20_000, levels=2**15)
    with pytest.raises(OptionError, match="65536 threshold levels: 1 to 65535 are possible"):
        BitScorer(data, {}, WHERE, levels=2**16)


def test_memory_of_carried_states_is_bounded() -> None:
    data = synthetic.scores(WHERE, 50)
    pairs = [(site, head) for site, heads in WHERE for head in heads]
    columns = PathColumns(data, pairs, Judge(data, 0.0), budget=3 * data.final.nbytes)
    whole = PathColumns(data, pairs, Judge(data, 0.0))
    for heads in ((0, 2, 4, 6), (1, 3, 5, 7), (0, 2, 5)):
        for stop in range(1, len(heads) + 1):
            kept = columns.confidence(0.5, heads[:stop], "margin")
            np.testing.assert_array_equal(kept, whole.confidence(0.5, heads[:stop], "margin"))
        found, expected = (each.answers(0.5, heads, final=True)[0] for each in (columns, whole))
        np.testing.assert_array_equal(found, expected)
    assert columns._held <= 3 * data.final.nbytes
    for each in (columns, whole):
        assert each._held == sum(array.nbytes for arrays in each._kept.values() for array in arrays)
