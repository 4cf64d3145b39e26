"""Individuals of the genetic search, their fitness, and the constraints that come before it.

Ordinary module-level classes, not DEAP's ``creator``: two searches in one process do not disturb each other and workers
can receive individuals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from deap import base

from eexform.errors import OptionError, need
from eexform.search.terms import Amount, Figure

Key = tuple[int, str]
"""A gene's key: place of its pass in the recipe, name of the parameter."""

Genome = dict[Key, Any]


class Fitness(base.Fitness):
    """Error and costs, all to be made small; a violated constraint outweighs them.

    Attributes:
        violation: 0 where all constraints hold, else by how much they fail (relative, summed).
    """

    weights: tuple[float, ...] = (-1.0, -1.0)

    def __init__(self, values: tuple[float, ...] = (), violation: float = 0.0) -> None:
        super().__init__(values)
        self.violation = violation

    def _set(self, values: tuple[float, ...]) -> None:
        self.weights = (-1.0,) * len(values)  # as many as there are objectives in this search
        self.setValues(values)

    values = property(base.Fitness.getValues, _set, base.Fitness.delValues, "Error, then every cost.")

    def dominates(self, other: Fitness, obj: slice = slice(None)) -> bool:
        """Feasibility first: what holds dominates what does not; between two that fail, the smaller violation."""
        if self.violation or other.violation:
            return self.violation < other.violation
        return bool(super().dominates(other, obj))


class Individual:
    """A genome with its fitness.

    Attributes:
        genome: value of every gene, the inactive ones included.
        fitness: set by the evaluation.
        key: canonical form; equal for genomes that differ in inactive genes only.
    """

    __slots__ = ("fitness", "genome", "key")

    def __init__(self, genome: Genome, key: str) -> None:
        self.genome = genome
        self.key = key
        self.fitness = Fitness()

    def __repr__(self) -> str:
        return f"<Individual {self.fitness.values if self.fitness.valid else 'not scored'}: {self.key}>"


@dataclass(frozen=True)
class Limit:
    """A figure that must not be exceeded.

    Attributes:
        label: what it is called in messages.
        amount: of which terms.
        most: in the amount's unit.
    """

    label: str
    amount: Amount
    most: float

    def __post_init__(self) -> None:
        need(0 < self.most < math.inf, f"{self.label}: {self.most} must be a positive number", OptionError)

    def over(self, figure: Figure) -> Any:
        """By how much the limit is exceeded, as a share of it; 0 where it holds."""
        return np.maximum(0.0, self.amount(figure) - self.most) / self.most


@dataclass(frozen=True)
class Constraints:
    """Limits that a plan must keep.

    Attributes:
        limits: on costs.
        min_accuracy: accuracy on select, 0-1.
    """

    limits: tuple[Limit, ...] = ()
    min_accuracy: float = 0.0

    def __post_init__(self) -> None:
        need(0.0 <= self.min_accuracy <= 1.0, f"min_accuracy: {self.min_accuracy} is not in 0..1", OptionError)

    @property
    def models(self) -> frozenset[str]:
        """Keys of the cost models that the limits name."""
        return frozenset(term.model for limit in self.limits for term in limit.amount.terms)

    def before(self, least: Figure) -> Any:
        """Violation that is certain before a plan is scored.

        Args:
            least: what each term cannot be below (no mean is below the cheapest path).
        """
        return sum((limit.over(least) for limit in self.limits), 0.0)

    def after(self, figure: Figure, accuracy: Any) -> Any:
        """Violation of a scored plan, or of several."""
        short = np.maximum(0.0, self.min_accuracy - accuracy) / self.min_accuracy if self.min_accuracy else 0.0
        return self.before(figure) + short
