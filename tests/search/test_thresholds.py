"""The memetic step against brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from eexform.search.bits import BitScorer
from eexform.search.terms import Term
from eexform.search.thresholds import Draft, descend, improve, total
from tests.search import synthetic

WEIGHTS = [0.02, 0.1, 0.4, 2.0]


def scorer(
    sites: int, heads: int, samples: int = 300, levels: int = 12, seed: int = 0, trust: float = 0.0
) -> BitScorer:
    where = synthetic.places(sites, heads)
    data = synthetic.scores(where, samples, seed=seed)
    return BitScorer(data, synthetic.costs(where, routing=1e5), where, measures=("margin",), levels=levels, trust=trust)


@pytest.mark.parametrize("model", ["macs", "params"])
@pytest.mark.parametrize("carry", [0.0, 0.5])
@pytest.mark.parametrize("trust", [0.0, 0.3])
def test_total_is_what_the_scorer_counts(model: str, carry: float, trust: float) -> None:
    bits = scorer(3, 2, trust=trust)
    draft = Draft((1, 2, 5), (6, 4, 2), 0, carry)
    heads = np.array([draft.heads])
    counts = bits.score(heads, np.array([draft.levels]), np.array([0]), np.array([carry]))
    cost = bits.mean_cost(model, heads, counts)[0] * bits.samples
    loss = bits.samples - counts.credit[0]
    weight = 0.4 / bits.costs[model].trunk
    assert total(bits, draft, {Term(model): weight}) == pytest.approx(loss + weight * cost)


def test_sites_on_other_branches_need_not_cost_more() -> None:
    bits = scorer(3, 1)
    bits.costs["macs"] = replace(bits.costs["macs"], prefix={"s0": 20e6, "s1": 8e6, "s2": 30e6})
    heads, levels = np.array([[0, 1, 2]]), np.array([[9, 6, 3]])
    counts = bits.score(heads, levels, np.array([0]))
    expected = bits.samples - counts.credit[0] + 1e-7 * bits.mean_cost("macs", heads, counts)[0] * bits.samples
    assert total(bits, Draft((0, 1, 2), (9, 6, 3), 0), {Term("macs"): 1e-7}) == pytest.approx(expected)


@pytest.mark.parametrize("model", ["macs", "params"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("exchange", [*WEIGHTS, 20.0])
def test_one_exit_is_set_optimally(model: str, seed: int, exchange: float) -> None:
    bits = scorer(1, 1, seed=seed)
    weight = exchange / bits.costs[model].trunk
    found = descend(bits, Draft((0,), (5,), 0), {Term(model): weight})
    options = [Draft((), (), 0), *(Draft((0,), (level,), 0) for level in range(bits.levels))]
    best = min(total(bits, option, {Term(model): weight}) for option in options)
    assert total(bits, found, {Term(model): weight}) == pytest.approx(best)


@pytest.mark.parametrize("carry", [0.0, 0.5])
@pytest.mark.parametrize("exchange", WEIGHTS)
def test_descent_never_loses(exchange: float, carry: float) -> None:
    bits = scorer(4, 2)
    weight = exchange / 40e6
    rng = np.random.default_rng(3)
    for _ in range(10):
        draft = Draft((0, 3, 4, 7), tuple(rng.integers(0, bits.levels, 4).tolist()), 0, carry)
        better = descend(bits, draft, {Term("macs"): weight}, drop=not carry)
        assert total(bits, better, {Term("macs"): weight}) <= total(bits, draft, {Term("macs"): weight}) + 1e-9
        if not carry:  # a fixed point: once more changes nothing
            assert descend(bits, better, {Term("macs"): weight}) == better


@pytest.mark.parametrize("exchange", WEIGHTS)
def test_local_search_is_near_the_optimum(exchange: float) -> None:
    bits = scorer(3, 2, samples=200, levels=6)
    weight = exchange / 40e6
    best = np.inf
    for size in range(4):
        for heads in itertools.combinations(range(6), size):
            if len({head // 2 for head in heads}) == size:
                for levels in itertools.product(range(6), repeat=size):
                    best = min(best, total(bits, Draft(heads, levels, 0), {Term("macs"): weight}))
    found = improve(bits, Draft((), (), 0), {Term("macs"): weight})
    assert total(bits, found, {Term("macs"): weight}) <= best * 1.02
    assert list(found.heads) == sorted(found.heads)


def test_useless_exits_are_dropped() -> None:
    bits = scorer(4, 2)
    # accuracy is everything: exits that take nobody only cost
    kept = descend(bits, Draft((0, 2, 4), (11, 11, 11), 0), {Term("macs"): 1e-12})
    assert all(level < bits.levels for level in kept.levels)
    assert descend(bits, Draft((0, 2), (0, 0), 0), {Term("macs"): 1.0}).heads == (
        0,
    )  # cost is everything: leave at once
    allowed = improve(bits, Draft((), (), 0), {Term("macs"): 0.3 / 40e6}, allowed=[3, 5])
    assert set(allowed.heads) <= {3, 5}


@pytest.mark.parametrize("start", [Draft((0,), (5,), 0), Draft((), (), 0)])
def test_a_head_is_worth_its_size_or_goes(start: Draft) -> None:
    """A head that is better than the trunk, under a size that it adds to for all samples, whoever passes it."""
    where = synthetic.places(1, 1)
    data = synthetic.scores(where, 300)
    data = replace(data, final=data.of("s0", "h0"), heads={("s0", "h0"): data.final})
    bits = BitScorer(data, synthetic.costs(where), where, measures=("margin",), levels=12)
    assert improve(bits, start, {Term("params"): 0.02 / 270e3}).heads == (0,)
    assert improve(bits, start, {Term("params"): 200.0 / 270e3}).heads == ()
