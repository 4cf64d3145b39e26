"""Genomes: sampled, varied, named, stored and bound."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eexform.errors import OptionError, RunError
from eexform.passes import Step
from eexform.search.genome import Constraints, Fitness, Limit
from eexform.search.space import EXITS, Gene, Space
from eexform.search.terms import Amount, Figure, Term
from eexform.tunables import Choice, Each, Integer, Real, Subset
from tests.search import synthetic

WHERE = synthetic.places(4, 3)
SPACE = synthetic.space(WHERE, extra=Integer(1, 8))


def rich_space() -> Space:
    """A third party's pass with every kind of domain, conditional ones among them, behind a trunk pass."""
    domains = {
        "blocks": Subset([3, 5, 9], least=1, most=2),
        "width": Each("blocks", {3: Real(0.25, 1.0), 5: Real(0.25, 1.0), 9: Real(0.001, 1.0, log=True)}),
        "shape": Choice([(3, 3), (5, 5), None]),
    }
    genes = {(0, name): Gene((0, name), "narrow", domain) for name, domain in domains.items()}
    inner = synthetic.space(WHERE)
    genes.update({(1, key[1]): Gene((1, key[1]), EXITS, gene.domain) for key, gene in inner.genes.items()})
    return Space((("narrow", {}), (EXITS, {})), genes, 32)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_variation_stays_in_the_space(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for space in (SPACE, rich_space()):
        left, right = space.sample(rng).genome, space.sample(rng).genome
        before = json.dumps([space.encode(left), space.encode(right)])
        first, second = space.cross(left, right, rng)
        for genome in (left, first, second, space.mutate(first, rng)):
            for key, gene in space.genes.items():
                gene.domain.validate(genome[key], gene.label)
            stored = json.loads(json.dumps(space.encode(genome), allow_nan=False))
            again = space.decode(stored)
            assert again.genome == genome
            assert again.key == space.key(genome)
        assert json.dumps([space.encode(left), space.encode(right)]) == before  # parents are not touched


def test_a_site_travels_with_its_head_and_threshold() -> None:
    rng = np.random.default_rng(0)
    left, right = SPACE.sample(rng).genome, SPACE.sample(rng).genome
    for _ in range(20):
        for child in SPACE.cross(left, right, rng):
            for site, _ in WHERE:
                views = [
                    (site in genome[1, "sites"], genome[1, "heads"][site], genome[1, "thresholds"][site])
                    for genome in (child, left, right)
                ]
                assert views[0] in views[1:]


def test_inactive_genes_do_not_count() -> None:
    rng = np.random.default_rng(1)
    genome = SPACE.sample(rng).genome
    genome[1, "sites"] = ("s1",)
    other = {**genome, (1, "thresholds"): {**genome[1, "thresholds"], "s2": 3}, (1, "heads"): {**genome[1, "heads"]}}
    other[1, "thresholds"]["s2"] = (genome[1, "thresholds"]["s2"] + 1) % 32
    assert SPACE.key(genome) == SPACE.key(other)
    other[1, "thresholds"] = {**genome[1, "thresholds"], "s1": (genome[1, "thresholds"]["s1"] + 1) % 32}
    assert SPACE.key(genome) != SPACE.key(other)


def test_bound_recipe_holds_what_counts() -> None:
    genome = SPACE.sample(np.random.default_rng(2)).genome
    genome[0, "width"], genome[1, "sites"] = 5, ("s0", "s3")
    bound = SPACE.bind(genome, {"s0": 0.5, "s3": 0.75})
    assert bound[0] == ("narrow", {"width": 5})
    assert bound[1][1]["thresholds"] == {"s0": 0.5, "s3": 0.75}
    assert set(bound[1][1]["heads"]) == {"s0", "s3"}


def test_stored_genomes_of_another_space_are_refused() -> None:
    stored = SPACE.encode(SPACE.sample(np.random.default_rng(0)).genome)
    with pytest.raises(RunError, match="another space"):
        SPACE.decode(stored[:-1])
    with pytest.raises(RunError, match="does not fit the search space"):
        SPACE.decode([99, *stored[1:]])
    with pytest.raises(RunError, match="does not fit the search space"):
        synthetic.space(synthetic.places(5, 3), extra=Integer(1, 8)).decode(stored)


def test_given_values_are_checked_before_anything_is_trained() -> None:
    with pytest.raises(OptionError, match=r"thresholds\[a\]: 'sometimes' is neither a number 0..1 nor 'never'"):
        Step(EXITS, {"thresholds": {"a": "sometimes"}})
    with pytest.raises(OptionError, match="parameter 'thresholds': expected a table, found 3"):
        Step(EXITS, {"thresholds": 3})
    with pytest.raises(OptionError, match="parameter 'sites': expected a list, found 'a'"):
        Step(EXITS, {"sites": "a"})
    with pytest.raises(OptionError, match="'big' is not a head"):
        Step(EXITS, {"heads": {"a": "big"}})
    given = {"thresholds": {"a": "never"}, "heads": {"a": "none/avg/s1"}}
    assert Step(EXITS, given).given == {"thresholds": {"a": "never"}, "heads": {"a": "none/avg"}}


def test_fixed_thresholds_and_missing_exits() -> None:
    space = Space(((EXITS, {"thresholds": {"a": 0.5, "b": "never", "c": "always"}}),), {}, 8)
    assert space.fixed_thresholds() == {"a": 0.5, "b": math.inf, "c": -math.inf}
    with pytest.raises(OptionError, match="'insert_exits' exactly once, found 0"):
        _ = Space((("narrow", {}),), {}, 8).exits_place


def test_feasibility_comes_first() -> None:
    good, better, bad, worse = (
        Fitness((0.5, 9.0)),
        Fitness((0.4, 9.0)),
        Fitness((0.1, 1.0), 0.2),
        Fitness((0.0, 0.5), 0.3),
    )
    assert better.dominates(good)
    assert not good.dominates(better)
    assert good.dominates(bad)
    assert not bad.dominates(good)
    assert bad.dominates(worse)
    assert not worse.dominates(bad)


def test_constraints() -> None:
    limits = Constraints(
        (
            Limit("mean macs", Amount.of("macs"), 10.0),
            Limit("worst macs", Amount.of("macs", "max"), 20.0),
            Limit("params", Amount.of("params"), 100.0),
        ),
        min_accuracy=0.8,
    )

    def figures(mean: float, worst: float, params: float) -> Figure:
        return {Term("macs"): mean, Term("macs", "max"): worst, Term("params"): params}.__getitem__

    assert limits.models == {"macs", "params"}
    assert limits.before(figures(5, 20, 100)) == 0
    assert limits.before(figures(11, 30, 50)) == pytest.approx(0.1 + 0.5)
    assert limits.after(figures(9, 9, 9), 0.4) == pytest.approx(0.5)
    assert limits.after(figures(9, 9, 9), 0.8) == 0
    assert Constraints().after(figures(9e9, 9e9, 9e9), 0.0) == 0
    with pytest.raises(OptionError, match="mean macs: -1 must be a positive number"):
        Limit("mean macs", Amount.of("macs"), -1)
    with pytest.raises(OptionError, match="min_accuracy"):
        Constraints(min_accuracy=91)
