"""What a criterion is: how much each unit of a channel group matters, and how criteria are found by name.

A criterion gives every unit of a group a number; the units with the smallest are cut first. Each is a small frozen
dataclass registered in the entry-point group ``eexform.criteria``, and written as text like a cost model:
``l2``, ``taylor:samples=256``.

Numbers of one group can be compared with each other. Whether those of different groups can is up to
:mod:`eexform.pruning.allocate`, which puts them on one scale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from eexform.errors import EexformError, OptionError, need
from eexform.ir.graph import Graph
from eexform.ir.groups import Group, Member
from eexform.registry import Registry

if TYPE_CHECKING:
    from eexform.pruning.samples import CalibrationData

WEIGHTS = ("filter", "table", "reader", "scale")
"""Roles of the constants whose size tells something of a unit: what computes it, what scales it and what reads it."""

NEEDS = {
    "samples": "needs samples to run the network on, and there are none: name a data set",
    "labels": "needs labels, and the samples have none",
}
"""What a criterion may need beyond the graph, and what is said where it is missing."""


@dataclass(frozen=True)
class Criterion(ABC):
    """How much each unit of a group matters; registered in the entry-point group ``eexform.criteria``.

    Fields (``parameter(...)``) are its settings. The same graph, groups and samples always give the same scores.
    """

    name: ClassVar[str]

    needs: ClassVar[tuple[str, ...]] = ()
    """What must be there besides the graph, as keys of :data:`NEEDS`."""

    def obstacle(self, graph: Graph, group: Group) -> str | None:
        """Why the criterion says nothing about ``group``; ``None`` where it does."""
        return None

    @abstractmethod
    def scores(self, graph: Graph, groups: Sequence[Group], samples: CalibrationData | None) -> dict[str, np.ndarray]:
        """Score of every unit: per group name float64 [size], finite, larger where the unit matters more.

        Args:
            graph: the graph that the groups belong to.
            groups: those to score; the criterion has no :meth:`obstacle` to any of them.
            samples: data to run the graph on; given where the criterion needs it.
        """

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""


REGISTRY = Registry(
    "eexform.criteria",
    "criterion",
    Criterion,  # type: ignore[type-abstract]
    home="eexform.pruning.criteria",
    facts={"needs": ()},
)

GROUP = REGISTRY.group
names, get, make, parse, listing = REGISTRY.names, REGISTRY.get, REGISTRY.make, REGISTRY.parse, REGISTRY.listing


def score(
    criterion: Criterion, graph: Graph, groups: Sequence[Group], samples: CalibrationData | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Scores of the groups that ``criterion`` can judge, and why it cannot judge the others.

    Returns:
        Scores (float64 [size]) by group name, in the order of ``groups``; and reasons by group name.

    Raises:
        OptionError: something that the criterion needs is missing.
        EexformError: it gave something else than one finite number per unit.
    """
    if criterion.needs and samples is None:
        raise OptionError(f"criterion {criterion.name!r} {NEEDS[criterion.needs[0]]}")
    reasons = {group.name: why for group in groups if (why := criterion.obstacle(graph, group)) is not None}
    judged = [group for group in groups if group.name not in reasons]
    found = criterion.scores(graph, judged, samples) if judged else {}
    for group in judged:
        given = np.asarray(found.get(group.name, ()))
        need(
            given.shape == (group.size,) and bool(np.isfinite(given).all()),
            f"criterion {criterion.name!r}, group {group.name!r}: expected {group.size} finite numbers, "
            f"found shape {list(given.shape)}" + ("" if np.isfinite(given).all() else " with numbers that are not"),
            EexformError,
        )
    return {group.name: np.asarray(found[group.name], np.float64) for group in judged}, reasons


# -- what criteria work with ---------------------------------------------------------------------------------------


def constants(group: Group, roles: Collection[str] = WEIGHTS) -> Iterator[Member]:
    """The group's constants that play one of ``roles``, each slot once whoever reads it."""
    seen = set()
    for member in group.members:
        if member.constant and member.role in roles and member.slot not in seen:
            seen.add(member.slot)
            yield member


def rows(array: np.ndarray, member: Member) -> np.ndarray:
    """What belongs to each unit of ``array``, the member's constant: float64 [size, numbers per unit]."""
    moved = np.moveaxis(array, member.slot.axis, 0)
    return moved[member.units].reshape(len(member.units), -1).astype(np.float64)


def balanced(parts: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Mean over ``parts`` ([size] each, not negative), each divided by its own mean first; all-zero parts count zero.

    So no constant outweighs the others because its numbers happen to be larger: the weights in front of a batch
    normalisation, for one, can be scaled at will.
    """
    total = np.zeros(size)
    for part in parts:
        mean = float(part.mean())
        if mean > 0:
            total += part / mean
    return total / max(len(parts), 1)


def missing(group: Group, roles: Collection[str], what: str) -> str | None:
    """``what`` as a reason where the group has no constant that plays one of ``roles``."""
    return None if any(constants(group, roles)) else what


def values_of(graph: Graph, member: Member) -> np.ndarray:
    """The array of a member that is a constant."""
    array: np.ndarray = graph.constants[member.slot.value].values
    return array


def by_unit(per_position: np.ndarray, member: Member) -> np.ndarray:
    """Sum over the positions of each unit: [axis size] -> [size]."""
    total: np.ndarray = per_position[member.units].sum(axis=1)
    return total
