"""Individuals of the genetic search, their fitness, and the constraints that come before it.

Ordinary module-level classes, not DEAP's ``creator``: two searches in one process do not disturb each other and workers
can receive individuals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deap import base

from eexform.errors import OptionError, need

Key = tuple[int, str]
"""A gene's key: place of its pass in the recipe, name of the parameter."""

Genome = dict[Key, Any]


class Fitness(base.Fitness):
    """Error and cost, both to be made small; a violated constraint outweighs them.

    Attributes:
        violation: 0 where all constraints hold, else by how much they fail (relative, summed).
    """

    weights = (-1.0, -1.0)

    def __init__(self, values: tuple[float, float] | tuple[()] = (), violation: float = 0.0) -> None:
        super().__init__(values)
        self.violation = violation

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
class Constraints:
    """Limits that a plan must keep.

    Attributes:
        max_cost: mean cost per sample, in the objective's unit.
        max_worst: cost of the dearest path, in the objective's unit.
        max_params: parameters of trunk and heads together.
        min_accuracy: accuracy on select, 0-1.
    """

    max_cost: float = math.inf
    max_worst: float = math.inf
    max_params: float = math.inf
    min_accuracy: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_cost", "max_worst", "max_params"):
            value = getattr(self, name)
            need(value > 0, f"{name}: {value} must be a positive number", OptionError)
        need(0.0 <= self.min_accuracy <= 1.0, f"min_accuracy: {self.min_accuracy} is not in 0..1", OptionError)

    def before(self, *, least: float, worst: float, params: float) -> float:
        """Violation that is certain before a plan is scored.

        Args:
            least: cost of the cheapest path (no mean can be below it).
            worst: cost of the dearest path.
            params: parameters of trunk and heads.
        """
        return _over(least, self.max_cost) + _over(worst, self.max_worst) + _over(params, self.max_params)

    def after(self, *, cost: float, worst: float, params: float, accuracy: float) -> float:
        """Violation of a scored plan."""
        short = max(0.0, self.min_accuracy - accuracy) / self.min_accuracy if self.min_accuracy else 0.0
        return self.before(least=cost, worst=worst, params=params) + short

    def to_json(self) -> dict[str, float | None]:
        """Plain values; ``None`` is no limit."""
        return {name: None if math.isinf(value) else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, plain: Mapping[str, float | None]) -> Constraints:
        """Inverse of :meth:`to_json`."""
        return cls(**{name: math.inf if value is None else value for name, value in plain.items()})


def _over(value: float, limit: float) -> float:
    return max(0.0, value - limit) / limit if math.isfinite(limit) else 0.0
