"""Terms: a cost model and the statistic of what samples pay under it; all that objectives and limits are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eexform.errors import OptionError, suggest

PERCENTILES: Mapping[str, int] = {"p50": 50, "p90": 90, "p95": 95, "p99": 99}

STATISTICS: tuple[str, ...] = ("mean", *PERCENTILES, "max")
"""``mean`` over the samples; percentiles by nearest rank: what that share of the samples pays at most; ``max``: what
the dearest path costs, whether or not a sample takes it."""


@dataclass(frozen=True)
class Term:
    """A figure of a plan.

    Attributes:
        model: key of the cost model among those that are priced.
        statistic: one of :data:`STATISTICS`.
    """

    model: str
    statistic: str = "mean"

    def __post_init__(self) -> None:
        if self.statistic not in STATISTICS:
            raise OptionError(
                f"{self.model}@{self.statistic}: {self.statistic!r} is no statistic: "
                f"{suggest(self.statistic, STATISTICS)}"
            )

    @property
    def label(self) -> str:
        """``macs``, ``latency_ort@p95``."""
        return self.model if self.statistic == "mean" else f"{self.model}@{self.statistic}"

    def to_json(self) -> dict[str, Any]:
        return {"model": self.model, "statistic": self.statistic}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Term:
        """Inverse of :meth:`to_json`."""
        return cls(str(plain["model"]), str(plain["statistic"]))


Figure = Callable[[Term], Any]
"""What a term comes to: a number for one plan, an array for several."""


@dataclass(frozen=True)
class Amount:
    """A sum of terms, each with a factor."""

    parts: tuple[tuple[float, Term], ...]

    @classmethod
    def of(cls, model: str, statistic: str = "mean") -> Amount:
        """One term, as it is."""
        return cls(((1.0, Term(model, statistic)),))

    @property
    def terms(self) -> tuple[Term, ...]:
        return tuple(term for _, term in self.parts)

    def __call__(self, figure: Figure) -> Any:
        """The sum, where ``figure`` gives the terms."""
        factor, term = self.parts[0]
        total = factor * figure(term)
        for factor, term in self.parts[1:]:
            total = total + factor * figure(term)
        return total

    def dearest(self) -> Amount:
        """The same of the dearest path."""
        return Amount(tuple((factor, Term(term.model, "max")) for factor, term in self.parts))


def statistic(name: str, vectors: np.ndarray, left: np.ndarray) -> np.ndarray:
    """A statistic of what samples pay, for many plans.

    Args:
        name: one of :data:`STATISTICS`.
        vectors: what leaving at each exit costs, the final one last: float64 [plans, exits + 1].
        left: samples that leave there, int64 of the same shape; every row has the same sum, above 0.

    Returns:
        float64 [plans].
    """
    if name == "mean":
        return np.asarray((left * vectors).sum(axis=1) / left[:1].sum())
    if name == "max":
        return np.asarray(vectors.max(axis=1))
    rank = -(-PERCENTILES[name] * left[:1].sum() // 100)  # of the sample that counts, from 1
    # paths mostly rise along the exits, but need not: sites on other branches, a head dearer than the rest of the trunk
    order = vectors.argsort(axis=1, kind="stable")
    paid = np.take_along_axis(vectors, order, axis=1)
    reached = np.take_along_axis(left, order, axis=1).cumsum(axis=1) >= rank
    return np.asarray(np.take_along_axis(paid, reached.argmax(axis=1)[:, None], axis=1)[:, 0])


def least(name: str, vectors: np.ndarray) -> np.ndarray:
    """What a statistic cannot be below, whoever leaves where: float64 [plans]; all of ``vectors`` are exits."""
    return np.asarray(vectors.max(axis=1) if name == "max" else vectors.min(axis=1))
