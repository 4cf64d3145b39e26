"""What is made small beside the error: read from text, put into numbers, scored exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eexform.cost_models import make
from eexform.errors import OptionError
from eexform.search.bits import BitScorer
from eexform.search.goals import Goal, Goals
from eexform.search.limits import Limits
from eexform.search.objectives import RELATIVE, Objectives, Pricing, Target
from eexform.search.quantities import amount_of
from eexform.search.scorer import Scorer
from eexform.search.terms import STATISTICS, Amount, Term, least, statistic
from eexform.search.thresholds import Draft, descend, total
from tests.search import synthetic

WHERE = synthetic.places(4, 2)
WHOLE = {"macs": 40e6, "params": 270e3, "latency_ort": 2.0}


def goal(text: str, target: Target | None = None) -> Goal:
    asked = Objectives.parse(text or None, target)
    return asked.goals({**WHOLE, **dict.fromkeys(asked.models.keys() - WHOLE.keys(), 8.0)}).listed[0]


def figures(**values: float) -> Any:
    return lambda term: values[term.label.replace("@", "_")]


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "label", "terms"),
    [
        ("macs", "macs", [Term("macs")]),
        (" macs@p95 ", "macs@p95", [Term("macs", "p95")]),
        ("params@mean", "params", [Term("params")]),
        ("latency_ort:threads=2@max", "latency_ort@max", [Term("latency_ort", "max")]),
        ("0.7*macs+0.3*params", "0.7*macs+0.3*params", [Term("macs"), Term("params")]),
        ("1e-1 * macs@p50 + .5 * params", "0.1*macs@p50+0.5*params", [Term("macs", "p50"), Term("params")]),
        ("2*macs", "2*macs", [Term("macs")]),
        ("peak_ram_bytes", "peak_ram_bytes@max", [Term("peak_ram_bytes", "max")]),
        ("peak_ram_bytes@mean", "peak_ram_bytes", [Term("peak_ram_bytes")]),
    ],
)
def test_texts(text: str, label: str, terms: list[Term]) -> None:
    asked = Objectives.parse(text)
    assert asked.label == label
    assert [term for _, term in asked.listed[0].parts] == terms
    assert set(asked.models) == {"macs", "params", *(term.model for term in terms)}


@pytest.mark.parametrize(
    ("cost", "message"),
    [
        ("mac", "no cost model is called 'mac': did you mean 'macs'"),
        ("macs@p96", r"'macs@p96': 'p96' is no statistic: did you mean"),
        ("macs+params", r"'macs\+params': every term of a sum needs a weight, such as 0.7\*macs\+0.3\*params"),
        ("0*macs+1*params", r"the weight 0 is not positive"),
        (["macs", "params", "macs@p95"], r"3 objectives beside the error \(macs, params, macs@p95\): 2 are possible"),
        (["macs", "macs"], "the objective 'macs' is given twice"),
    ],
)
def test_texts_that_are_none(cost: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Objectives.parse(cost)


def test_a_model_with_several_settings_has_several_keys() -> None:
    asked = Objectives.parse(["latency_ort:threads=1@p95", "0.5*latency_ort:threads=2+0.5*latency_ort:threads=1"])
    assert asked.label == "latency_ort@p95; 0.5*latency_ort:threads=2+0.5*latency_ort"
    assert asked.models["latency_ort"] == make("latency_ort", threads=1)
    assert asked.models["latency_ort:threads=2"] == make("latency_ort", threads=2)
    pricing = Pricing()
    assert pricing.term("macs:bindings={}") == pricing.term("macs") == pricing.term(make("macs")) == Term("macs")
    bound = make("macs", bindings={"seq": 128})
    fresh = Pricing()
    assert fresh.term(bound) == Term("macs")  # what is asked for takes the place of the default
    assert fresh.models["macs"] == bound


@pytest.mark.parametrize("cost", ["macs", "latency_ort:threads=2,batch=4"])
def test_one_model_is_written_down_as_ever(cost: str) -> None:
    asked = Objectives.parse(cost)
    plain = json.loads(json.dumps(asked.to_json()))
    assert set(plain) == {"objective", "cost"}
    assert plain["objective"] == cost.partition(":")[0]
    assert Objectives.from_json(plain) == asked


@pytest.mark.parametrize(
    ("cost", "target", "limits"),
    [
        (["macs", "params"], None, ()),
        ("0.7*latency_ort:threads=2@p95+0.3*params", None, ()),
        ("macs@max", None, ()),
        ("params", Target("macs@p95=0.5x", "one", 0.1), ()),
        ("macs", None, ("peak_ram_bytes:inputs=false=256KiB",)),
    ],
)
def test_all_the_rest_survives_json(cost: Any, target: Target | None, limits: tuple[str, ...]) -> None:
    given = Limits(max_terms=limits)
    asked, named = given.priced(Objectives.parse(cost, target))
    plain = json.loads(json.dumps(asked.to_json()))
    assert given.priced(Objectives.from_json(plain)) == (asked, named)
    assert named <= set(asked.models)
    whole = dict.fromkeys(asked.models, 7.0)
    goals = asked.goals(whole)
    assert Goals.from_json(json.loads(json.dumps(goals.to_json()))) == goals


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_sums_are_shares_of_the_original() -> None:
    found = goal("0.75*macs@p95+0.25*params")
    assert found.unit == RELATIVE
    assert found.value(figures(macs_p95=40e6, params=270e3)) == pytest.approx(1.0)
    assert found.value(figures(macs_p95=20e6, params=540e3)) == pytest.approx(0.75 / 2 + 0.25 * 2)
    one = goal("macs@p95")
    assert (one.unit, one.value(figures(macs_p95=12.0))) == ("MACs", 12.0)


@pytest.mark.parametrize(
    ("target", "cost", "distance"),
    [
        (Target("macs=10M"), 12e6, 0.2),
        (Target("macs=10M"), 8e6, 0.2),
        (Target("macs=10M", "one"), 12e6, 0.2),
        (Target("macs=10M", "one"), 8e6, 0.0),
        (Target("macs=0.25x"), 15e6, 0.5),
    ],
)
def test_distances_to_a_target(target: Target, cost: float, distance: float) -> None:
    found = goal("", target)
    assert found.value(figures(macs=cost)) == pytest.approx(distance)
    assert found.amount(figures(macs=cost)) == cost
    assert found.cost_label == "macs"


def test_a_target_replaces_its_objective_and_blends_into_the_error() -> None:
    assert Objectives.parse(["macs", "params"], Target("macs=0.5x", "one")).label == "macs to at most 0.5x; params"
    assert Objectives.parse("params", Target("macs=0.5x")).label == "params; macs to 0.5x"
    asked = Objectives.parse(None, Target("macs=10M", blend=0.1))
    assert asked.label == "macs to 10M (x 0.1 added to the error)"
    goals = asked.goals(WHOLE)
    assert goals.values(0.25, figures(macs=15e6)) == pytest.approx((0.25 + 0.05, 0.5))
    error, distance = goals.values(np.array([0.1, 0.2]), lambda term: np.array([10e6, 5e6]))
    np.testing.assert_allclose([error, distance], [[0.1, 0.25], [0.0, 0.5]])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda: Target("macs=1", "both"), "'both' is neither one- nor two-sided"),  # type: ignore[arg-type]
        (lambda: Target("macs=1", blend=-1), "blend -1 must not be negative"),
        (lambda: goal("", Target("0.5*macs+0.5*params=0.5x")), r"is a weighted sum, and one cost model is meant here"),
        (lambda: goal("", Target("macs")), "target: 'macs' is not of the form TERM=VALUE"),
        (lambda: goal("", Target("macs=few")), "target: 'few' is not a number MACs"),
        (lambda: goal("", Target("macs=0")), "target: 0 must be positive"),
    ],
)
def test_targets_that_are_none(target: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        target()


def test_what_costs_nothing_cannot_be_made_small() -> None:
    asked = Objectives.parse("0.5*macs+0.5*params")
    with pytest.raises(OptionError, match=r"the trunk costs 0\.0 under 'params', so there is nothing to save"):
        asked.goals({"macs": 1.0, "params": 0.0})


@pytest.mark.parametrize(
    ("text", "unit", "number"),
    [
        ("0.7x", "", 28.0),
        ("24.4e6", "MACs", 24.4e6),
        ("20M", "MACs", 20e6),
        ("20 MMACs", "MACs", 20e6),
        ("256KiB", "bytes", 2**18),
        ("1 MiB", "bytes", 2**20),
        ("1Mi", "bytes", 2**20),
        ("64kB", "bytes", 64e3),
        ("3ms", "ms", 3.0),
        ("3", "ms", 3.0),
        (".5G", "", 5e8),
        ("0.7x", RELATIVE, 28.0),
    ],
)
def test_amounts(text: str, unit: str, number: float) -> None:
    assert amount_of(text, 40.0, "max", unit) == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize("text", ["", "x", "3s", "KiB", "1 K", "nan", "inf", "1e999", "3msx", "0.7xM", "--3"])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(OptionError, match=r"max latency: .* is not a number ms .write 0.7x for a share"):
        amount_of(text, 40.0, "max latency", "ms")


# -- statistics --------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda width: st.tuples(
            st.lists(st.integers(0, 9), min_size=width, max_size=width),
            st.lists(st.integers(0, 40), min_size=width, max_size=width).filter(any),
        )
    )
)
def test_statistics_are_those_of_the_samples(drawn: tuple[list[int], list[int]]) -> None:
    """Paths need not rise, may cost the same, and nobody may take some of them."""
    vector, left = np.array([drawn[0]], np.float64), np.array([drawn[1]])
    samples = np.sort(np.repeat(vector[0], left[0]))
    for name in STATISTICS:
        found = statistic(name, vector, left)[0]
        if name == "mean":
            assert found == pytest.approx(samples.mean())
        elif name == "max":
            assert found == vector.max()
        else:
            share = int(name[1:])
            assert found == min(c for c in samples if 100 * (samples <= c).sum() >= share * len(samples))
        assert least(name, vector)[0] <= found + 1e-12


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("combine", ["sum", "max"])
def test_percentiles_of_populations_plans_and_samples_agree(seed: int, combine: Any) -> None:
    data = synthetic.scores(WHERE, 173, seed=seed)
    costs = synthetic.costs(WHERE, routing=2e6)
    # a head that is dearer than the rest of the trunk: its path is not below the next one's
    costs["macs"] = replace(costs["macs"], head={**costs["macs"].head, ("s1", "h1"): 30e6}, combine=combine)
    bits = BitScorer(data, costs, WHERE, levels=9)
    exact = Scorer({"select": data}, costs)
    rng = np.random.default_rng(seed)
    heads = np.stack([np.where(rng.random(4) < 0.7, 2 * np.arange(4) + rng.integers(0, 2, 4), -1) for _ in range(30)])
    levels = rng.integers(0, 10, heads.shape)
    measure = np.zeros(len(heads), np.int64)
    counts = bits.score(heads, levels, measure)
    found = {
        (model, name): statistic(name, bits.vectors(model, heads), counts.left)
        for model in costs
        for name in STATISTICS
    }
    for row in range(len(heads)):
        chosen = heads[row] >= 0
        candidate = bits.candidate(heads[row][chosen].tolist(), levels[row][chosen].tolist(), 0, 0.0)
        scored = exact.exact(candidate, "select")
        taken = exact.decide(candidate, "select").exit_index
        for model in costs:
            paid = np.sort(np.array(costs[model].path(candidate.pairs))[taken])
            by_hand = {"mean": paid.mean(), "max": max(costs[model].path(candidate.pairs))}
            for share in (50, 90, 95, 99):
                by_hand[f"p{share}"] = paid[-(-share * len(paid) // 100) - 1]
            for name in STATISTICS:
                assert scored.figure(Term(model, name)) == pytest.approx(by_hand[name])
                assert found[model, name][row] == pytest.approx(by_hand[name])
    assert (found["macs", "p50"] < found["macs", "p95"]).any()
    assert (found["macs", "p95"] < found["macs", "max"]).any()


# -- local search over several terms -----------------------------------------------------------------------------------


def test_local_search_counts_every_term() -> None:
    data = synthetic.scores(WHERE, 200)
    bits = BitScorer(data, synthetic.costs(WHERE, routing=1e5), WHERE, measures=("margin",), levels=12)
    weights = {Term("macs"): 0.2 / 40e6, Term("params"): 0.3 / 270e3, Term("macs", "max"): 0.1 / 40e6}
    amount = Amount(tuple((weight, term) for term, weight in weights.items()))
    rng = np.random.default_rng(1)
    for _ in range(10):
        draft = Draft((0, 3, 4, 7), tuple(rng.integers(0, bits.levels, 4).tolist()), 0)
        heads = np.array([draft.heads])
        counts = bits.score(heads, np.array([draft.levels]), np.array([0]))
        cost = amount(lambda term, h=heads, c=counts: statistic(term.statistic, bits.vectors(term.model, h), c.left)[0])
        assert total(bits, draft, weights) == pytest.approx(bits.samples * (1 + cost) - counts.credit[0])
        better = descend(bits, draft, weights)
        assert total(bits, better, weights) <= total(bits, draft, weights) + 1e-9
    # a term that weighs heads, whoever passes them, leaves fewer of them
    only = {Term("macs"): 0.2 / 40e6}
    full = Draft((0, 3, 4, 7), (6, 6, 6, 6), 0)
    assert len(descend(bits, full, {**only, Term("params"): 30 / 270e3}).heads) < len(descend(bits, full, only).heads)
