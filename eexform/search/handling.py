"""Constraint handling: how selection compares plans that violate a limit with those that keep all.

``feasible-first`` is Deb's rule: what keeps the limits comes first, of two that do not the smaller violation.

``adaptive`` follows NACHOS, where with phi = share of the population that keeps the limits the second objective becomes
``phi * cost + (1 - phi) * violation * 1e10``: few feasible plans, and violations decide; many, and a plan just beyond a
limit may stay and hand on what it has. The published form is tied to costs of about 1e7 multiply-accumulates (in
milliseconds any violation is a wall, in bytes of a big model it is nothing), its 1e10 stretches the axis on which
crowding distances are measured until feasible plans look alike, and it leaves the error as it is, so that a plan over
its budget with the lowest error of all is never beaten, whatever it violates. Here every objective is scaled to 0..1
over the pool first, the violation is relative, and it is added to all objectives (as Woldesenbet et al., 2009,
do): ``phi * objective + (1 - phi) * violation``.

``penalty`` is the static form of CNAS: every objective times ``1 + weight * violation``, the violation being the sum of
the relative excesses. It needs no scale, either.

Only selection sees such values. Individuals keep their own, and nothing that violates a limit is in the archive, among
the elites or on the front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eexform.errors import OptionError, need, suggest
from eexform.search.genome import Fitness, Individual

HANDLINGS = ("feasible-first", "adaptive", "penalty")

WEIGHT = 10.0
"""Of ``penalty``: a tenth over a limit doubles every objective."""


@dataclass(frozen=True)
class Handling:
    """A way of handling constraints.

    Attributes:
        kind: one of :data:`HANDLINGS`.
        weight: of ``penalty``.
    """

    kind: str = "feasible-first"
    weight: float = WEIGHT

    def __post_init__(self) -> None:
        known = self.kind in HANDLINGS
        need(known, f"constraints: {self.kind!r} does not exist: {suggest(self.kind, HANDLINGS)}", OptionError)
        need(0 < self.weight < np.inf, f"penalty weight {self.weight} is not positive", OptionError)
        belongs = self.kind == "penalty" or self.weight == WEIGHT
        need(belongs, f"a penalty weight belongs to constraints penalty, not to {self.kind}", OptionError)


@dataclass
class Seen:
    """An individual as selection sees it."""

    individual: Individual
    fitness: Fitness


def seen(pool: Sequence[Individual], handling: Handling) -> list[Seen]:
    """The individuals, in the order of the pool, with what violations add to their objectives; as they are with
    ``feasible-first``, and where nobody violates a limit."""
    violation = np.array([one.fitness.violation for one in pool], np.float64)
    values = np.array([one.fitness.values for one in pool], np.float64)
    if handling.kind == "feasible-first" or not violation.any():
        return [Seen(one, Fitness(one.fitness.values, one.fitness.violation)) for one in pool]
    if handling.kind == "adaptive":
        low, span = values.min(axis=0), np.ptp(values, axis=0)
        share = float((violation == 0).mean())
        values = share * (values - low) / np.where(span > 0, span, 1.0) + (1.0 - share) * violation[:, None]
    else:
        values = values * (1.0 + handling.weight * violation)[:, None]
    return [Seen(one, Fitness(tuple(row))) for one, row in zip(pool, values.tolist(), strict=True)]
