"""Limits as a person writes them: absolute, or against the original."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from eexform.cost_models._device import load_device
from eexform.errors import OptionError, need
from eexform.search.genome import Constraints, Limit
from eexform.search.goals import Goals
from eexform.search.objectives import Objectives, Pricing
from eexform.search.quantities import amount_of
from eexform.search.terms import Amount, Term


@dataclass(frozen=True)
class Limits:
    """Limits that every plan must keep; ``None`` is no limit.

    Attributes:
        max_cost: what the first objective costs on select: ``"0.7x"`` of the original's, or a number in its unit.
        max_worst: the same of the dearest path, written alike.
        max_params: parameters of trunk and heads, written alike.
        min_accuracy: on select: ``"-0.5"`` points against the original, or an accuracy in 0..1.
        max_terms: further ones, ``TERM=VALUE``: ``"peak_ram_bytes=256KiB"``, ``"latency_ort@p95=1.2x"``.
    """

    max_cost: str | None = None
    max_worst: str | None = None
    max_params: str | None = None
    min_accuracy: str | None = None
    max_terms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_terms", tuple(self.max_terms))

    def to_json(self) -> dict[str, Any]:
        plain = dict(vars(self))
        if not self.max_terms:  # as before there were any, so that older runs can be resumed
            del plain["max_terms"]
        else:
            plain["max_terms"] = list(self.max_terms)
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Limits:
        """Inverse of :meth:`to_json`."""
        return cls(**plain)

    def priced(self, objectives: Objectives) -> tuple[Objectives, frozenset[str]]:
        """The objectives with the cost models of these limits as well, and the keys of those that the limits name."""
        pricing = objectives.pricing()
        named = {term.model for _, term, _ in self.terms(pricing)}
        return replace(objectives, models=pricing.models), frozenset(named)

    def terms(self, pricing: Pricing) -> list[tuple[str, Term, str]]:
        """The terms of ``max_terms``, whose cost models are priced from now on: text, term and value each.

        Raises:
            OptionError: a text is not of that form, or names no cost model.
        """
        found = []
        for text in self.max_terms:
            model, equals, value = text.rpartition("=")
            if not equals or not model.strip() or not value.strip():
                raise OptionError(f"max: {text!r} is not of the form TERM=VALUE, such as peak_ram_bytes=256KiB")
            found.append((text, pricing.term(model.strip()), value.strip()))
        return found

    def bind(
        self, objectives: Objectives, goals: Goals, originals: Mapping[str, float], accuracy: float
    ) -> Constraints:
        """The limits in numbers.

        Args:
            objectives: with every cost model that the limits name.
            goals: the objectives in numbers.
            originals: cost of the original by cost model.
            accuracy: of the original on select.

        Raises:
            OptionError: a text is not of that form, or a limit is not positive.
        """
        first = goals.listed[0]
        one = objectives.listed[0]
        limits: list[Limit] = []

        def add(label: str, amount: Amount, text: str | None, option: str, unit: str) -> None:
            if text is None:
                return
            most = amount_of(text, float(amount(lambda term: originals[term.model])), option, unit)
            need(0 < most < math.inf, f"{option}: {text!r} must be a positive amount", OptionError)
            limits.append(Limit(label, amount, most))

        model = one.cost if one.weighted else one.parts[0][1].model
        add(f"mean {model}" if one.cost == model else one.cost, first.amount, self.max_cost, "max-cost", first.unit)
        add(f"worst {model}", first.amount.dearest(), self.max_worst, "max-worst", first.unit)
        add("params", Amount.of("params"), self.max_params, "max-params", objectives.models["params"].unit)
        for text, term, value in self.terms(objectives.pricing()):
            amount = Amount(((1.0, term),))
            add(term.label, amount, value, f"max {text}", objectives.models[term.model].unit)
        return Constraints(tuple(limits), _accuracy(self.min_accuracy, accuracy))


def fitting(text: str) -> tuple[str, ...]:
    """Limits that keep every plan within a device's memory, for ``max_terms``.

    Args:
        text: the device, or its file; settings behind a colon are those of both cost models (``cortex-m7:dtype=int8``).

    Raises:
        OptionError: there is no such device, or its file does not say how much it has.
    """
    name, colon, settings = text.partition(":")
    device = load_device(name.strip())
    found = []
    for model, key in (("peak_ram_bytes", "ram_bytes"), ("model_bytes", "flash_bytes")):
        size = getattr(device.memory, key)
        if size is None:
            raise OptionError(
                f"fits: device {device.name!r} does not say its memory.{key}, so nothing can be held to it; add it to "
                f"a device file of your own, or give limits one by one (--max {model}=1MiB)"
            )
        found.append(f"{model}{colon}{settings}={size}")
    return tuple(found)


def _accuracy(text: str | None, trunk: float) -> float:
    if text is None:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    relative = text.strip()[:1] in ("-", "+")
    if not math.isfinite(value) or (not relative and not 0 <= value <= 1):
        raise OptionError(
            f"min-accuracy: {text!r} is neither an accuracy in 0..1 nor points against the original with a sign (-0.5)"
        )
    return min(1.0, max(0.0, trunk + value / 100)) if relative else value
