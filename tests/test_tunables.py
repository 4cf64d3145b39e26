"""Domains: every sample, mutation and crossover stays inside, and validation says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, make_dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eexform.errors import OptionError
from eexform.tunables import (
    Choice,
    Domain,
    Each,
    Integer,
    Real,
    Subset,
    check_parameters,
    describe_field,
    parameter,
    tunable,
    tunable_fields,
)

DOMAINS = [
    Choice(["a", "b", "c"]),
    Choice([1]),
    Integer(-3, 11, 2),
    Integer(5, 5),
    Real(0.0, 1.0),
    Real(1e-4, 10.0, log=True),
    Real(2.0, 2.0, log=True),
    Subset("abcdef", least=1, most=3),
    Subset([], least=0),
    Each("sites", {"a": Choice([1, 2]), "b": Real(0, 2)}),
]


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda domain: domain.describe())
@given(seed=st.integers(0, 2**32))
def test_operators_stay_inside(domain: Domain, seed: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = domain.sample(rng), domain.sample(rng)
    for value in (left, right, domain.mutate(left, rng), *domain.cross(left, right, rng)):
        assert domain.validate(value, "p") == value


@pytest.mark.parametrize("bounds", [(0.3, 0.9), (0.1, 0.7), (1e-3, 0.3)])
@pytest.mark.parametrize("log", [False, True])
def test_rounding_does_not_lead_out(bounds: tuple[float, float], log: bool) -> None:
    """0.3 + (0.9 - 0.3) is above 0.9: such a value could be searched but not read back."""
    domain, rng = Real(*bounds, log=log), np.random.default_rng(0)
    value = domain.sample(rng)
    for _ in range(500):
        value = domain.mutate(value, rng)
        assert domain.validate(value, "p") == value
        for child in domain.cross(value, bounds[1], rng):
            assert domain.validate(child, "p") == child


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Integer(3, 1), r"Integer\(3, 1, 1\): low <= high"),
        (lambda: Integer(0, 4, 0), "step >= 1"),
        (lambda: Real(1.0, 0.0), "low <= high"),
        (lambda: Real(0.0, float("inf")), "finite"),
        (lambda: Real(0.0, 1.0, log=True), "begins above 0"),
    ],
)
def test_impossible_domains_are_refused(make: Callable[[], Domain], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_kinds_are_checked_however_annotations_are_kept() -> None:
    for kind in ("int", int):
        example = make_dataclass("Example", [("count", kind, parameter(default=1))], frozen=True)
        with pytest.raises(OptionError, match="parameter 'count': expected int, found 'two'"):
            check_parameters(example, "pass 'example'", {"count": "two"})
        assert check_parameters(example, "pass 'example'", {"count": 2}) == {"count": 2}


def test_mutation_moves() -> None:
    rng = np.random.default_rng(0)
    for domain in (DOMAINS[0], DOMAINS[2], DOMAINS[4], DOMAINS[7]):
        value: Any = domain.sample(rng)
        assert any(domain.mutate(value, rng) != value for _ in range(20)), domain


def test_each_changes_an_active_item() -> None:
    domain = Each("sites", {name: Choice([0, 1]) for name in "abcd"})
    start = dict.fromkeys("abcd", 0)
    for seed in range(20):
        changed = domain.mutate(start, np.random.default_rng(seed), active=("b",))
        assert changed == {**start, "b": 1}


@pytest.mark.parametrize(
    ("domain", "value", "message"),
    [
        (Choice(["max_prob", "margin"]), "max_prb", "did you mean 'max_prob'"),
        (Integer(0, 8, 2), 3, "integer 0..8 step 2"),
        (Integer(0, 8), True, "whole number"),
        (Real(0, 1), float("nan"), "real 0..1"),
        (Real(0, 1), "0.5", "expected a number"),
        (Subset("abc"), ["a", "a"], "twice"),
        (Subset("abc", least=1), [], "0 items chosen, expected 1..3"),
        (Subset("abc"), "a", "expected a list"),
        (Each("sites", {"a": Real(0, 1)}), {"b": 0.5}, "'b' is not an item"),
        (Each("sites", {"a": Real(0, 1)}), {"a": 2.0}, r"thresholds\[a\]: 2.0"),
    ],
)
def test_validation_explains(domain: Domain, value: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        domain.validate(value, "thresholds")


def test_fields_carry_domains() -> None:
    @dataclass(frozen=True)
    class Example:
        ratio: float = tunable(Real(0, 1), default=0.5, help="share to cut")
        groups: tuple[str, ...] = tunable(lambda graph: Subset(graph), default=(), domain_help="channel groups")
        folder: str = parameter(default="", help="where")

    assert list(tunable_fields(Example)) == ["ratio", "groups"]
    described = {entry["name"]: entry for entry in map(describe_field, Example.__dataclass_fields__.values())}
    assert described["ratio"]["domain"] == "real 0..1"
    assert described["groups"]["domain"] == "channel groups"
    assert described["folder"]["domain"] is None
    assert not described["folder"]["tunable"]
