"""Limits as a person writes them: absolute, or against the trunk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from eexform.errors import OptionError
from eexform.search.genome import Constraints


@dataclass(frozen=True)
class Limits:
    """Limits that every plan must keep; ``None`` is no limit.

    Attributes:
        max_cost: mean cost on select: ``"0.7x"`` of the trunk's, or a number in the objective's unit.
        max_worst: cost of the dearest path, written alike.
        max_params: parameters of trunk and heads: ``"1.2x"`` of the trunk's, or a number.
        min_accuracy: on select: ``"-0.5"`` points against the trunk, or an accuracy in 0..1.
    """

    max_cost: str | None = None
    max_worst: str | None = None
    max_params: str | None = None
    min_accuracy: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    def bind(self, *, cost: float, params: float, accuracy: float) -> Constraints:
        """The limits in numbers, given the trunk's own figures.

        Raises:
            OptionError: a text is not of that form, or a limit is not positive.
        """
        return Constraints(
            max_cost=_amount(self.max_cost, cost, "max-cost"),
            max_worst=_amount(self.max_worst, cost, "max-worst"),
            max_params=_amount(self.max_params, params, "max-params"),
            min_accuracy=_accuracy(self.min_accuracy, accuracy),
        )


def _amount(text: str | None, trunk: float, name: str) -> float:
    if text is None:
        return math.inf
    factor = trunk if text.strip().endswith("x") else 1.0
    return _number(text.strip().removesuffix("x"), name, text) * factor


def _accuracy(text: str | None, trunk: float) -> float:
    if text is None:
        return 0.0
    value = _number(text, "min-accuracy", text)
    relative = text.strip()[:1] in ("-", "+")
    if not relative and not 0 <= value <= 1:
        raise OptionError(
            f"min-accuracy: {text!r} is neither an accuracy in 0..1 nor points against the trunk with a sign (-0.5)"
        )
    return min(1.0, max(0.0, trunk + value / 100)) if relative else value


def _number(text: str, name: str, whole: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise OptionError(f"{name}: {whole!r} is not a number (write 0.7x for a share of the trunk)")
    return number
