"""Loss terms by name: their settings, what they need, and the weights of exits."""

from __future__ import annotations

import pytest

from eexform.errors import OptionError
from eexform.training import objectives
from eexform.training.objectives import exit_weights, parse
from tests.training.exit_batches import TERMS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "no loss is called 'nothing'"),
        ("distill:heat=2", "has no parameter 'heat'"),
        ("distill:2", "is no setting"),
        ("distill:temperature=0", "temperature: 0 must be a positive number"),
        ("distill:teacher=me", "'me' is not a choice"),
        ("distill:weight=-1", "weight: -1 must be a positive number"),
        ("distill:weight=much", "expected float"),
        ("cross_entropy:exits=many", "neither uniform, linear or cost"),
        ("cross_entropy:exits=0/0", "not all zero"),
        ("cross_entropy:smoothing=1", "must be below 1"),
        ("expected_cost:limit=0", "limit: 0 must be a positive number"),
        ("survivors:floor=2", "floor: 2 must be between 0 and 1"),
        ("survivors:softness=-1", "softness"),
    ],
)
def test_settings_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse(text)


def test_listing() -> None:
    found = {entry["name"]: entry for entry in objectives.listing()}
    assert {text.partition(":")[0] for text in TERMS} <= set(found)
    for entry in found.values():
        assert entry["error"] is None
        assert entry["summary"]
        assert "weight" in {setting["name"] for setting in entry["settings"]}


def test_exit_weights() -> None:
    costs = (0.2, 0.6, 1.0)
    assert exit_weights("uniform", costs) == (1, 1, 1)
    assert exit_weights("linear", costs) == pytest.approx((0.5, 1, 1.5))
    assert exit_weights("cost", costs) == pytest.approx((1 / 3, 1, 5 / 3))
    assert exit_weights("1/0/2", costs) == (1, 0, 2)
    assert exit_weights((1, 0, 2), costs) == (1, 0, 2)
    with pytest.raises(OptionError, match="expected 3 numbers, the final exit's last, found 2"):
        exit_weights("1/2", costs)
