"""Objectives in numbers: what the search computes for every plan, beside the error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from eexform.errors import OptionError
from eexform.search.terms import Amount, Figure, Term

Sided = Literal["one", "two"]


@dataclass(frozen=True)
class Goal:
    """An objective in numbers.

    Attributes:
        label: what it is called.
        amount: what it costs.
        unit: of the amount.
        target: cost that it is to come near to; ``None``: the smaller the better.
        sided: of the target.
        cost: what the amount is called, where that is not the label.
    """

    label: str
    amount: Amount
    unit: str = ""
    target: float | None = None
    sided: Sided = "two"
    cost: str = ""

    @classmethod
    def of(cls, model: str, statistic: str = "mean", unit: str = "") -> Goal:
        """One term, as it is."""
        return cls(Term(model, statistic).label, Amount.of(model, statistic), unit)

    @property
    def cost_label(self) -> str:
        """What the amount is called."""
        return self.cost or self.label

    def value(self, figure: Figure) -> Any:
        """What is to be made small: the amount, or its relative distance to the target."""
        cost = self.amount(figure)
        return cost if self.target is None else self.distance(cost)

    def distance(self, cost: Any) -> Any:
        """How far a cost is from the target, as a share of it."""
        assert self.target is not None
        off = (cost - self.target) / self.target
        return np.abs(off) if self.sided == "two" else np.maximum(0.0, off)

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``factor``: of the term's figure in the amount."""
        return {
            "label": self.label,
            "cost": self.cost_label,
            "unit": self.unit,
            "terms": [{"factor": factor, **term.to_json()} for factor, term in self.amount.parts],
            "target": self.target,
            "sided": self.sided if self.target is not None else None,
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Goal:
        """Inverse of :meth:`to_json`."""
        amount = Amount(tuple((float(term["factor"]), Term.from_json(term)) for term in plain["terms"]))
        target = None if plain["target"] is None else float(plain["target"])
        cost = "" if plain["cost"] == plain["label"] else str(plain["cost"])
        return cls(str(plain["label"]), amount, str(plain["unit"]), target, plain["sided"] or "two", cost)


@dataclass(frozen=True)
class Goals:
    """All that is made small beside the error.

    Attributes:
        listed: one or two.
        blend: of each distance to a target, what is added to the error.
    """

    listed: tuple[Goal, ...]
    blend: float = 0.0

    @classmethod
    def of(cls, *models: str) -> Goals:
        """The mean under each of these cost models."""
        return cls(tuple(Goal.of(model) for model in models))

    @property
    def models(self) -> tuple[str, ...]:
        """Keys of the cost models that are looked at, each once."""
        return tuple(dict.fromkeys(term.model for goal in self.listed for term in goal.amount.terms))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"objectives": [goal.to_json() for goal in self.listed], "target_blend": self.blend}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Goals:
        """Inverse of :meth:`to_json`."""
        return cls(tuple(Goal.from_json(goal) for goal in plain["objectives"]), float(plain["target_blend"]))

    def values(self, error: Any, figure: Figure) -> tuple[Any, ...]:
        """What is to be made small: the error, then every goal."""
        costs = [goal.value(figure) for goal in self.listed]
        if self.blend:
            off = [cost for goal, cost in zip(self.listed, costs, strict=True) if goal.target is not None]
            error = error + self.blend * sum(off)
        return (error, *costs)


def check_price(model: str, price: float) -> None:
    """Refuse a cost model under which the trunk costs nothing, or no number."""
    if not 0 < price < math.inf:
        raise OptionError(
            f"the trunk costs {price} under {model!r}, so there is nothing to save: choose another cost model"
        )
