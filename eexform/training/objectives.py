"""What a loss term is, what it may look at, and how it is found by name.

A training step of a multi-exit network minimises the sum of some terms; each is a small frozen dataclass registered in
the entry-point group ``eexform.losses``, and written as text like a cost model: ``distill:weight=0.5,temperature=2``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from eexform.errors import OptionError
from eexform.registry import Registry
from eexform.tunables import parameter

NEEDS = {
    "labels": "needs labels, and the data set has none: without labels, learn from the trunk's answers (distill)",
    "answers": "needs labels or the original trunk's scores, and neither was given",
    "exits": "needs early exits, which learn from the final one, and the network has none: teacher=trunk",
    "gates": "needs a learned confidence at every exit: use heads with a gate (.../gate)",
    "teacher": "needs the original trunk's scores, and none were given",
    "support": "needs the accuracy of every exit on every class, and it was not measured",
    "measured": "needs the confidence and the threshold of every exit, and they were not given",
}
"""What a term may need beyond the exits' scores, and what is said where it is missing."""


@dataclass(frozen=True)
class ExitBatch:
    """What the terms look at: the outputs of all exits on one batch.

    ``B`` samples, ``K`` classes, ``E`` early exits; exit ``E``, the last, is the final one.

    Attributes:
        logits: scores of each exit, ``E + 1`` tensors [B, K] in the order in which a sample meets them, final last.
        path_costs: [E + 1]: what a sample pays that leaves at exit i, every head passed included, relative to the
            trunk alone (1.0).
        weights: [E + 1]: how much each exit counts in terms that are sums over the exits.
        labels: int64 [B]; ``None`` in label-free mode.
        mix: where samples were blended, the other samples' labels (int64 [B]) and the weight of their own ([B], 0..1).
        smoothing: label smoothing of the cross-entropies.
        teacher: logits of the original trunk on the same inputs, [B, K], without gradient.
        confidences: per early exit its own learned confidence c_i in (0, 1), [B], or ``None`` where it has no gate.
        measured: per early exit the confidence its policy compares with the threshold, [B], without gradient.
        thresholds: per early exit; infinite where a sample never (always) leaves.
        support: [E, K]: accuracy of each early exit on each class, measured on held-out samples (calibrate) with the
            parameters as they were when the epoch began.
    """

    logits: tuple[torch.Tensor, ...]
    path_costs: torch.Tensor
    weights: torch.Tensor
    labels: torch.Tensor | None = None
    mix: tuple[torch.Tensor, torch.Tensor] | None = None
    smoothing: float = 0.0
    teacher: torch.Tensor | None = None
    confidences: tuple[torch.Tensor | None, ...] = ()
    measured: tuple[torch.Tensor, ...] = ()
    thresholds: tuple[float, ...] = ()
    support: torch.Tensor | None = None

    def __post_init__(self) -> None:
        exits = len(self.logits)
        for name in ("path_costs", "weights"):
            found = tuple(getattr(self, name).shape)
            if found != (exits,):
                raise OptionError(f"{name}: expected one number for each of {exits} exits, found shape {list(found)}")

    @property
    def gates(self) -> tuple[torch.Tensor, ...]:
        """The learned confidences of all early exits, [B] each; for terms that need ``gates``."""
        found = tuple(confidence for confidence in self.confidences if confidence is not None)
        if len(found) != len(self.logits) - 1:
            raise OptionError(NEEDS["gates"])
        return found

    def has(self, need: str) -> bool:
        """Whether what a term needs, a key of :data:`NEEDS`, is there."""
        early = len(self.logits) - 1
        if need == "answers":
            return self.labels is not None or self.teacher is not None
        if need == "exits":
            return early > 0
        if need == "gates":
            return 0 < early == len(self.confidences) and all(each is not None for each in self.confidences)
        if need == "measured":
            return len(self.measured) == early == len(self.thresholds)
        return getattr(self, need) is not None


@dataclass(frozen=True)
class Loss(ABC):
    """One term; registered in the entry-point group ``eexform.losses``.

    Fields (``parameter(...)``) are its settings. :meth:`value` is differentiable in the exits' scores and learned
    confidences, a mean over the batch, and finite wherever those are.
    """

    name: ClassVar[str]

    weight: float = parameter(default=1.0, help="factor of the term in the sum")

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise OptionError(f"weight: {self.weight} must be a positive number")

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be there, as keys of :data:`NEEDS`."""
        return ()

    @abstractmethod
    def value(self, batch: ExitBatch) -> torch.Tensor:
        """The term without its weight, a scalar."""

    def __call__(self, batch: ExitBatch) -> torch.Tensor:
        """The term times its weight.

        Raises:
            OptionError: something that it needs is missing.
        """
        for need in self.needs:
            if not batch.has(need):
                raise OptionError(f"loss {self.name!r} {NEEDS[need]}")
        return self.weight * self.value(batch)

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""


REGISTRY = Registry("eexform.losses", "loss", Loss, home="eexform.training.objectives")  # type: ignore[type-abstract]

GROUP = REGISTRY.group
names, get, make, parse, listing = REGISTRY.names, REGISTRY.get, REGISTRY.make, REGISTRY.parse, REGISTRY.listing


def exit_weights(given: str | Sequence[float], costs: Sequence[float]) -> tuple[float, ...]:
    """How much each exit counts, final last.

    Args:
        given: ``uniform``; ``linear`` (exit i counts i + 1, so later exits more); ``cost`` (in proportion to what the
            path to it costs); or the numbers themselves, as a sequence or as text with ``/`` between them. The named
            ones are scaled to mean 1, so that a head learns at the same pace however many others there are.
        costs: path cost of each exit.

    Raises:
        OptionError: an unknown name, or not one non-negative number per exit.
    """
    exits = len(costs)
    named = {"uniform": [1.0] * exits, "linear": [place + 1.0 for place in range(exits)], "cost": list(costs)}
    if isinstance(given, str) and given in named:
        total = sum(named[given])
        return tuple(exits * weight / total for weight in named[given])
    numbers = parse_weights(given)
    if len(numbers) != exits:
        raise OptionError(f"exit weights: expected {exits} numbers, the final exit's last, found {len(numbers)}")
    return numbers


def parse_weights(given: str | float | Sequence[float]) -> tuple[float, ...]:
    """The numbers of an explicit list of exit weights.

    Raises:
        OptionError: they are none, negative, not finite or all zero.
    """
    if isinstance(given, str):
        parts: Sequence[Any] = given.split("/")
    else:
        parts = given if isinstance(given, Sequence) else (given,)
    try:
        numbers = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        raise OptionError(
            f"exit weights: {given!r} is neither uniform, linear or cost, nor numbers such as 0.5/0.5/1"
        ) from None
    if not all(0 <= number < float("inf") for number in numbers) or not any(numbers):
        raise OptionError(f"exit weights: {given!r} must be finite, not negative and not all zero")
    return numbers
