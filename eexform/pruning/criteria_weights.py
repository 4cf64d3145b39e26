"""Criteria that look at the weights alone, and a control that looks at nothing."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from eexform.errors import OptionError, need
from eexform.ir.graph import Graph
from eexform.ir.groups import Group
from eexform.pruning.criteria import WEIGHTS, Criterion, balanced, constants, missing, rows, values_of
from eexform.tunables import parameter

if TYPE_CHECKING:
    from eexform.pruning.samples import CalibrationData

_BLOCK = 1 << 24
"""Numbers held at a time while distances are computed."""

PARTS = {"both": WEIGHTS, "filters": ("filter", "table"), "readers": ("reader",)}
"""Names that the settings use for roles."""


@dataclass(frozen=True)
class _Magnitude(Criterion):
    """Norms of what belongs to a unit, over the constants that take part."""

    parts: str = parameter(default="both", help="constants that count: both, filters, or readers")
    balance: bool = parameter(
        default=True, help="divide the norms of each constant by their mean before they are added up"
    )

    order: ClassVar[int]

    def __post_init__(self) -> None:
        need(self.parts in PARTS, f"parts: {self.parts!r} is none of {', '.join(PARTS)}", OptionError)

    def obstacle(self, graph: Graph, group: Group) -> str | None:
        return missing(group, PARTS[self.parts], "it has no weights of the kind that the criterion looks at")

    def scores(self, graph: Graph, groups: Sequence[Group], samples: CalibrationData | None) -> dict[str, np.ndarray]:
        found = {}
        for group in groups:
            norms = [
                np.linalg.norm(rows(values_of(graph, member), member), ord=self.order, axis=1)
                for member in constants(group, PARTS[self.parts])
            ]
            found[group.name] = balanced(norms, group.size) if self.balance else np.sum(norms, axis=0)
        return found


@dataclass(frozen=True)
class L1(_Magnitude):
    """Sum of the absolute weights of a unit.

    Over the constants θ of the group (what computes the unit: filters, embedding tables; what scales it; what reads
    it): ``s_u = mean_θ( |θ_u|_1 / mean_v |θ_v|_1 )``. The norm of filters is of Li et al. 2017 ("Pruning Filters for
    Efficient ConvNets"); that all coupled constants count is as in DepGraph (Fang et al. 2023). Without ``balance`` the
    norms are added as they are.
    """

    name: ClassVar[str] = "l1"
    order: ClassVar[int] = 1


@dataclass(frozen=True)
class L2(_Magnitude):
    """Euclidean norm of the weights of a unit.

    ``s_u = mean_θ( |θ_u|_2 / mean_v |θ_v|_2 )`` over the constants θ of the group, as in ``l1``: group magnitude of
    DepGraph (Fang et al. 2023), each constant on its own scale. Without ``balance`` the norms are added as they are.
    """

    name: ClassVar[str] = "l2"
    order: ClassVar[int] = 2


@dataclass(frozen=True)
class GeometricMedian(Criterion):
    """How far a unit's filters are from those of the other units: what others can stand in for goes first.

    ``s_u = mean_θ( d_u / mean_v d_v )`` with ``d_u = Σ_v |θ_u - θ_v|_2`` over the filters and embedding tables θ of the
    group: units near the geometric median of all have the smallest sum of distances (FPGM, He et al. 2019).
    """

    name: ClassVar[str] = "geometric_median"

    def obstacle(self, graph: Graph, group: Group) -> str | None:
        return missing(group, PARTS["filters"], "it has no filters to compare")

    def scores(self, graph: Graph, groups: Sequence[Group], samples: CalibrationData | None) -> dict[str, np.ndarray]:
        return {
            group.name: balanced(
                [_distances(rows(values_of(graph, member), member)) for member in constants(group, PARTS["filters"])],
                group.size,
            )
            for group in groups
        }


@dataclass(frozen=True)
class BnScale(Criterion):
    """Size of the factor that a normalisation gives a unit.

    ``s_u = mean_g( |g_u| / mean_v |g_v| )`` over the scales g of the group's normalisations (Network Slimming, Liu et
    al. 2017, which also trains with a penalty on g). Groups without any are left alone, unless ``fallback`` names
    another criterion for them.
    """

    name: ClassVar[str] = "bn_scale"

    fallback: str = parameter(
        default="", help="criterion for groups without a normalisation: l1 or l2; none by default"
    )

    def __post_init__(self) -> None:
        known = ("", L1.name, L2.name)
        need(self.fallback in known, f"fallback: {self.fallback!r} is none of l1, l2", OptionError)

    def obstacle(self, graph: Graph, group: Group) -> str | None:
        reason = missing(group, ("scale",), "no normalisation with a scale per channel is in it")
        return self._other().obstacle(graph, group) if reason and self.fallback else reason

    def scores(self, graph: Graph, groups: Sequence[Group], samples: CalibrationData | None) -> dict[str, np.ndarray]:
        scaled = [group for group in groups if any(constants(group, ("scale",)))]
        found = {
            group.name: balanced(
                [np.abs(rows(values_of(graph, member), member)).sum(axis=1) for member in constants(group, ("scale",))],
                group.size,
            )
            for group in scaled
        }
        others = [group for group in groups if group.name not in found]
        return {**found, **(self._other().scores(graph, others, samples) if others else {})}

    def _other(self) -> _Magnitude:
        return L1() if self.fallback == L1.name else L2()


@dataclass(frozen=True)
class Random(Criterion):
    """Numbers drawn at random: the control that every other criterion should beat.

    Uniform in [0, 1), from the seed and the group's name alone, so that they do not depend on which groups are asked
    for.
    """

    name: ClassVar[str] = "random"

    seed: int = parameter(default=0, help="of the random numbers")

    def __post_init__(self) -> None:
        need(self.seed >= 0, f"seed: {self.seed} is negative", OptionError)

    def scores(self, graph: Graph, groups: Sequence[Group], samples: CalibrationData | None) -> dict[str, np.ndarray]:
        return {
            group.name: np.random.default_rng([self.seed, zlib.crc32(group.name.encode())]).random(group.size)
            for group in groups
        }


def _distances(points: np.ndarray) -> np.ndarray:
    """Sum of the Euclidean distances of each row of [n, d] to all rows, [n]."""
    squares = np.einsum("nd,nd->n", points, points)
    total = np.empty(len(points))
    step = max(1, _BLOCK // max(len(points), 1))
    for start in range(0, len(points), step):
        block = points[start : start + step]
        # |a - b|² = |a|² - 2 ab + |b|²; rounding may leave it a little below zero
        square = squares[start : start + step, None] - 2 * block @ points.T + squares[None, :]
        square[np.arange(len(block)), np.arange(start, start + len(block))] = 0.0
        total[start : start + step] = np.sqrt(np.maximum(square, 0.0)).sum(axis=1)
    return total
