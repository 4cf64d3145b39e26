"""Allocation: what is cut meets the target, respects the limits, and takes the weakest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eexform.errors import OptionError
from eexform.ir.coupling import Slot
from eexform.ir.groups import Group, Member
from eexform.pruning.allocate import (
    NORMALISATIONS,
    SCOPES,
    Limits,
    Order,
    kept_counts,
    multiple,
    nearest_share,
    to_cost,
    to_share,
    weakest_first,
)


def group(name: str, size: int, width: int = 1) -> Group:
    """A group with a filter and a reader; each unit is ``width`` channels."""
    units = np.arange(size * width).reshape(size, width)
    members = (
        Member(Slot(f"{name}.weight", 0), "filter", f"{name}_node", True, units),
        Member(Slot(f"{name}_out", 1), "activation", f"{name}_node", False, units),
        Member(Slot(f"{name}_next.weight", 1), "reader", f"{name}_next", True, units),
    )
    return Group(name, size, members, None, (), "channels")


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Group], dict[str, np.ndarray], list[tuple[str, ...]], Limits]:
    sizes = draw(st.lists(st.integers(2, 40), min_size=1, max_size=6))
    groups = [group(f"g{place}", size, draw(st.sampled_from([1, 1, 2, 3]))) for place, size in enumerate(sizes)]
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    scores = {g.name: rng.integers(0, 5, g.size) * draw(st.sampled_from([0.1, 1.0, 50.0])) for g in groups}
    split = draw(st.integers(0, len(groups)))
    names = [g.name for g in groups]
    families = [tuple(part) for part in (names[:split], names[split:]) if part]
    limits = Limits(
        scope=draw(st.sampled_from(SCOPES)),
        normalise=draw(st.sampled_from(NORMALISATIONS)),
        round_to=draw(st.sampled_from([1, 1, 2, 4, 8])),
        least=draw(st.integers(1, 8)),
        most=draw(st.sampled_from([0.3, 0.5, 0.9, 1.0])),
    )
    return groups, scores, families, limits


def cost_of(groups: Sequence[Group]):  # type: ignore[no-untyped-def]
    """Work of a chain: products of neighbours' widths, and some that cannot be cut."""
    sizes = {g.name: g.size for g in groups}

    def cost(cuts: Mapping[str, Sequence[int]]) -> float:
        kept = [3, *(sizes[name] - len(cuts.get(name, ())) for name in sizes), 10]
        return 100.0 + sum(a * b for a, b in pairwise(kept))

    return cost


def check(groups: Sequence[Group], scores: Mapping[str, np.ndarray], limits: Limits, cuts: Mapping) -> None:  # type: ignore[type-arg]
    for g in groups:
        units = cuts.get(g.name, ())
        assert list(units) == sorted(set(units))
        kept = g.size - len(units)
        assert kept >= min(limits.least, g.size)
        assert len(units) <= limits.most * g.size + 1e-9
        if units:
            assert kept * g.members[0].units.shape[1] % limits.round_to == 0
            stay = np.setdiff1d(np.arange(g.size), units)
            assert scores[g.name][list(units)].max() <= scores[g.name][stay].min()
    assert all(cuts.values()), "groups that lose nothing are left out"


@given(problems(), st.floats(0, 0.95))
@settings(max_examples=150, deadline=None)
def test_cost_is_saved_within_the_limits(problem, ratio: float) -> None:  # type: ignore[no-untyped-def]
    groups, scores, families, limits = problem
    order, cost = Order(groups, scores, families, limits), cost_of(groups)
    cuts, met = to_cost(order, cost, ratio)
    check(groups, scores, limits, cuts)
    target = cost({}) * (1 - ratio)
    if met:
        assert cost(cuts) <= target * (1 + 1e-9)
        shortest = next(n for n in range(len(order.steps) + 1) if cost(order.cuts(n)) <= target * (1 + 1e-12))
        prefix = order.cuts(shortest)
        assert all(set(units) <= set(prefix[name]) for name, units in cuts.items()), "more than the shortest prefix"
        assert shortest == 0 or cost(order.cuts(shortest - 1)) > target
    else:
        assert cuts == order.cuts(len(order.steps))
        assert cost(cuts) > target


@given(problems(), st.floats(0, 0.95))
@settings(max_examples=150, deadline=None)
def test_shares_are_met_within_the_limits(problem, ratio: float) -> None:  # type: ignore[no-untyped-def]
    groups, scores, families, limits = problem
    order = Order(groups, scores, families, limits)
    cuts, met = to_share(order, ratio)
    check(groups, scores, limits, cuts)
    gone = sum(map(len, cuts.values()))
    assert (gone >= ratio * order.units - 1e-9) == met
    near = nearest_share(order, ratio)
    check(groups, scores, limits, near)
    distance = abs(sum(map(len, near.values())) - ratio * order.units)
    assert distance <= np.abs(order.removed() - ratio * order.units).min() + 1e-6


@given(problems())
@settings(max_examples=60, deadline=None)
def test_every_prefix_is_a_valid_cut_and_larger_than_the_one_before(problem) -> None:  # type: ignore[no-untyped-def]
    groups, scores, families, limits = problem
    order = Order(groups, scores, families, limits)
    removed = order.removed()
    for length in range(len(order.steps) + 1):
        cuts = order.cuts(length)
        check(groups, scores, limits, cuts)
        assert sum(map(len, cuts.values())) == removed[length]
    assert (np.diff(removed) > 0).all()


def test_what_a_costly_last_move_saves_in_excess_comes_back() -> None:
    groups = [group("small", 10), group("large", 4)]
    scores = {"small": np.arange(10.0), "large": np.array([8.5, 20, 20, 20])}

    def cost(cuts: Mapping[str, Sequence[int]]) -> float:
        return 110.0 - len(cuts.get("small", ())) - 25.0 * len(cuts.get("large", ()))

    order = Order(groups, scores, [], Limits(normalise="none"))
    cuts, met = to_cost(order, cost, 30 / 110)  # nine of the small ones are not enough, and one large one is more
    assert met
    assert cuts == {"small": (0, 1, 2, 3, 4), "large": (0,)}


def test_uniform_cuts_the_same_share_everywhere() -> None:
    groups = [group("a", 10), group("b", 40), group("c", 20)]
    scores = {"a": np.arange(10.0), "b": 1000 + np.arange(40.0), "c": np.arange(20.0) / 1e6}
    cuts, _ = to_share(Order(groups, scores, [], Limits(scope="uniform")), 0.5)
    assert {name: len(units) for name, units in cuts.items()} == {"a": 5, "b": 20, "c": 10}
    assert cuts["b"] == tuple(range(20))


def test_families_compete_inside_and_are_on_a_par_with_each_other() -> None:
    groups = [group(name, 4) for name in "abc"]
    scores = {"a": np.array([1.0, 1, 1, 1]), "b": np.array([9.0, 9, 9, 9]), "c": np.array([400.0, 600, 500, 500])}

    def order(normalise: str) -> list[int]:
        return [step.group for step in Order(groups, scores, [("a", "b"), ("c",)], Limits(normalise=normalise)).steps]

    # a is weak in its family, b is strong; c has a family to itself, so its scale does not matter
    assert order("family") == [0] * 3 + [2] * 3 + [1] * 3
    assert order("none") == [0] * 3 + [1] * 3 + [2] * 3
    assert order("group")[0] == 2  # 0.8 of the group's mean; all others are 1 (and go group by group)
    assert order("rank").index(1) > order("rank").index(2)


def test_scores_may_count_per_what_a_unit_saves() -> None:
    groups = [group(name, 3) for name in "abc"]
    scores = {"a": np.full(3, 4.0), "b": np.full(3, 1.0), "c": np.zeros(3)}
    order = Order(groups, scores, [], Limits(normalise="cost"), {"a": 100.0, "b": 10.0, "c": 0.0})
    assert [step.group for step in order.steps] == [0, 0, 1, 1, 2, 2]


def test_ties_keep_the_first_units() -> None:
    assert weakest_first(np.array([1.0, 0.0, 1.0, 0.0])).tolist() == [3, 1, 2, 0]
    cuts, _ = to_share(Order([group("a", 6)], {"a": np.ones(6)}, [("a",)], Limits()), 0.5)
    assert cuts == {"a": (3, 4, 5)}


@pytest.mark.parametrize(
    ("size", "width", "limits", "counts"),
    [
        (6, 1, Limits(), (6, 5, 4, 3, 2, 1)),
        (6, 1, Limits(most=0.5), (6, 5, 4, 3)),
        (6, 1, Limits(least=4), (6, 5, 4)),
        (6, 1, Limits(least=9), (6,)),
        (20, 1, Limits(round_to=8), (20, 16, 8)),
        (20, 1, Limits(round_to=8, least=9), (20, 16)),
        (16, 1, Limits(round_to=8), (16, 8)),
        (7, 1, Limits(round_to=8), (7,)),  # no smaller multiple: it stays as it is
        (20, 4, Limits(round_to=8), (20, 18, 16, 14, 12, 10, 8, 6, 4, 2)),  # 2 units are 8 channels
        (9, 3, Limits(round_to=2, most=1.0), (9, 8, 6, 4, 2)),
    ],
)
def test_counts_that_a_group_may_be_left_with(size: int, width: int, limits: Limits, counts: tuple[int, ...]) -> None:
    assert kept_counts(group("a", size, width), limits) == counts


def test_multiple_fits_every_weight_that_makes_the_channels() -> None:
    two = group("a", 6, 2)
    mixed = Group("m", 6, (*two.members, *group("b", 6, 3).members), None, (), "channels")
    assert multiple(two, 8) == 4
    assert multiple(mixed, 12) == 12  # lcm of 12 / 2 and 12 / 3
    readers = Group("r", 6, two.members[1:], None, (), "width")
    assert multiple(readers, 8) == 4


@pytest.mark.parametrize(
    "wrong", [{"scope": "globl"}, {"normalise": "max"}, {"round_to": 0}, {"least": 0}, {"most": 0.0}, {"most": 1.1}]
)
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Limits(**wrong)  # type: ignore[arg-type]


def test_a_thousand_groups_are_bisected_with_few_questions() -> None:
    rng = np.random.default_rng(0)
    groups = [group(f"g{place}", 64) for place in range(1000)]
    scores = {g.name: rng.random(64) for g in groups}
    order = Order(groups, scores, [tuple(scores)], Limits())
    asked = 0
    inner = cost_of(groups)

    def cost(cuts):  # type: ignore[no-untyped-def]
        nonlocal asked
        asked += 1
        return inner(cuts)

    assert to_cost(order, cost, 0.5)[1]
    assert asked <= 40
