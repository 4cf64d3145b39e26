"""What is made small beside the error: cost models, weighted sums of them, distances to a target.

As text (``--cost``), an objective is a term or a weighted sum of terms; a term is a cost model with its settings and,
where the mean is not meant, the statistic::

    macs        latency_ort:threads=1@p95        0.7*latency_ort+0.3*peak_ram_bytes

A single term is in the unit of its model. In a sum (CNAS, Gambella and Roveri, 2023, weighs its figures so) every term
counts as a share of what the original costs, because milliseconds and bytes cannot be added.

A target (AEBNAS: ``f1 = error + 0.1 * MAPE, f2 = MAPE``) makes the objective the relative distance to a wanted cost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eexform import cost_models
from eexform.cost_models import CostModel
from eexform.errors import OptionError, need, suggest
from eexform.search.goals import Goal, Goals, Sided, check_price
from eexform.search.quantities import amount_of
from eexform.search.stored_costs import model_settings
from eexform.search.terms import STATISTICS, Amount, Term

MOST = 2
"""Objectives beside the error: domination says ever less the more there are, and NSGA-II was made for two or three."""

RELATIVE = "x of the original"
"""Unit of a weighted sum."""

_WEIGHT = re.compile(r"(?:^|\+)\s*(\d*\.?\d+(?:[eE][+-]?\d+)?)\s*\*")


class Pricing:
    """The cost models that a search computes, each under a key by which its figures are kept.

    The key is the model's name. Where a model is there with several settings, the first one named has it, and the
    others are called by their text. MACs and parameters are always computed.
    """

    def __init__(self) -> None:
        self.models: dict[str, CostModel] = {name: cost_models.make(name) for name in ("macs", "params")}
        self._default = set(self.models)

    @classmethod
    def of(cls, models: Mapping[str, CostModel]) -> Pricing:
        """These models under these keys."""
        pricing = cls()
        pricing.models, pricing._default = dict(models), set()
        return pricing

    def key(self, model: str | CostModel) -> str:
        """The key of a model, which is priced from now on."""
        text = model if isinstance(model, str) else ""
        chosen = cost_models.parse(model) if isinstance(model, str) else model
        for key, known in self.models.items():
            if known == chosen:
                self._default.discard(key)
                return key
        key = chosen.name
        if key in self.models and key not in self._default:
            key = text.replace(" ", "") or repr(chosen)
        self._default.discard(key)
        self.models[key] = chosen
        return key

    def term(self, model: str | CostModel) -> Term:
        """The term that a text means; ``@`` and a statistic may stand behind a model.

        Raises:
            OptionError: there is no such cost model or statistic.
        """
        if isinstance(model, str) and _WEIGHT.match(model):
            raise OptionError(
                f"{model!r} is a weighted sum, and one cost model is meant here; a sum can be an objective (--cost), "
                "the first of which --max-cost limits"
            )
        text, marked, name = model.rpartition("@") if isinstance(model, str) else (model, "", "")
        if marked and re.fullmatch(r"\w+", name):
            need(name in STATISTICS, f"{model!r}: {name!r} is no statistic: {suggest(name, STATISTICS)}", OptionError)
        else:
            text, name = model, ""
        if isinstance(text, str) and "+" in text.partition(":")[0]:
            raise OptionError(f"{text!r}: every term of a sum needs a weight, such as 0.7*macs+0.3*params")
        key = self.key(text)
        return Term(key, name or usual(self.models[key]))


def usual(model: CostModel | type[CostModel]) -> str:
    """The statistic that is meant where none is named: the mean, but of memory what the dearest path takes."""
    return "max" if model.combine == "max" else "mean"


@dataclass(frozen=True)
class Target:
    """A cost to come near to.

    Attributes:
        text: ``TERM=VALUE``, such as ``macs=2.5M`` or ``latency_ort@p95=0.6x`` (of the original's).
        sided: ``two``: the distance counts on both sides, ``|cost - target| / target``; ``one``: what is cheaper is as
            good as what is there, ``max(0, cost - target) / target``.
        blend: the distance times this is added to the error.
    """

    text: str
    sided: Sided = "two"
    blend: float = 0.0

    def __post_init__(self) -> None:
        need(self.sided in ("one", "two"), f"target: {self.sided!r} is neither one- nor two-sided", OptionError)
        need(0 <= self.blend < math.inf, f"target blend {self.blend} must not be negative", OptionError)


@dataclass(frozen=True)
class Objective:
    """An objective as it was asked for.

    Attributes:
        parts: weights with their terms.
        weighted: whether it is a weighted sum, of shares of the original's figures.
        target: as written; ``None``: the smaller the better.
        sided: of the target.
    """

    parts: tuple[tuple[float, Term], ...]
    weighted: bool = False
    target: str | None = None
    sided: Sided = "two"

    @classmethod
    def parse(cls, given: str | CostModel, pricing: Pricing) -> Objective:
        """An objective from its text.

        Raises:
            OptionError: the text is none.
        """
        marks = list(_WEIGHT.finditer(given)) if isinstance(given, str) else []
        if not isinstance(given, str) or not marks or given[: marks[0].start()].strip():
            return cls(((1.0, pricing.term(given.strip() if isinstance(given, str) else given)),))
        ends = [*(mark.start() for mark in marks[1:]), len(given)]
        parts = []
        for mark, end in zip(marks, ends, strict=True):
            weight = float(mark[1])
            need(0 < weight < math.inf, f"{given!r}: the weight {mark[1]} is not positive", OptionError)
            parts.append((weight, pricing.term(given[mark.end() : end].strip())))
        return cls(tuple(parts), weighted=True)

    @property
    def cost(self) -> str:
        """What is added up, in words."""
        if not self.weighted:
            return self.parts[0][1].label
        return "+".join(f"{weight:g}*{term.label}" for weight, term in self.parts)

    @property
    def label(self) -> str:
        """What it is called."""
        if self.target is None:
            return self.cost
        return f"{self.cost} to {'' if self.sided == 'two' else 'at most '}{self.target}"

    def goal(self, originals: Mapping[str, float], units: Mapping[str, str]) -> Goal:
        """The objective in numbers.

        Args:
            originals: cost of the original by cost model.
            units: by cost model.

        Raises:
            OptionError: the original costs nothing, so that there is nothing to save, or the target is no amount.
        """
        for _, term in self.parts:
            check_price(term.model, originals[term.model])
        scaled = [(weight / originals[term.model] if self.weighted else weight, term) for weight, term in self.parts]
        amount = Amount(tuple(scaled))
        unit = RELATIVE if self.weighted else units[self.parts[0][1].model]
        whole = float(amount(lambda term: originals[term.model]))
        target = None if self.target is None else amount_of(self.target, whole, "target", unit)
        need(target is None or target > 0, f"target: {self.target} must be positive", OptionError)
        return Goal(self.label, amount, unit, target, self.sided, "" if target is None else self.cost)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "terms": [{"weight": weight, **term.to_json()} for weight, term in self.parts],
            "weighted": self.weighted,
            "target": self.target,
            "sided": self.sided,
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Objective:
        """Inverse of :meth:`to_json`."""
        parts = tuple((float(term["weight"]), Term.from_json(term)) for term in plain["terms"])
        return cls(parts, bool(plain["weighted"]), plain["target"], plain["sided"])


@dataclass(frozen=True)
class Objectives:
    """What a search is asked for, with every cost model that it computes.

    Attributes:
        models: by key.
        listed: one objective or two.
        blend: of the distance to the target, what is added to the error.
    """

    models: Mapping[str, CostModel]
    listed: tuple[Objective, ...]
    blend: float = 0.0

    @classmethod
    def parse(
        cls,
        cost: str | CostModel | Sequence[str | CostModel] | None = None,
        target: Target | None = None,
        pricing: Pricing | None = None,
    ) -> Objectives:
        """Objectives as they are given to a search.

        Args:
            cost: one or two of them; none is MACs, unless there is a target.
            target: an objective of its own, or, of an objective that is asked for, its target.
            pricing: takes in the models.

        Raises:
            OptionError: a text is none, or there are too many.
        """
        pricing = pricing or Pricing()
        alone = cost is None or isinstance(cost, (str, CostModel))
        given: list[str | CostModel] = [cost] if alone and cost is not None else list(cost or ())  # type: ignore[list-item, arg-type]
        if not given and target is None:
            given = ["macs"]
        listed = [Objective.parse(one, pricing) for one in given]
        if target is not None:
            text, equals, value = target.text.rpartition("=")
            need(equals and text.strip(), f"target: {target.text!r} is not of the form TERM=VALUE", OptionError)
            aimed = Objective(((1.0, pricing.term(text.strip())),), target=value.strip(), sided=target.sided)
            same = [place for place, one in enumerate(listed) if one == replace(aimed, target=None, sided="two")]
            listed = [aimed if place in same else one for place, one in enumerate(listed)] + ([] if same else [aimed])
        labels = [one.label for one in listed]
        need(
            len(listed) <= MOST,
            f"{len(listed)} objectives beside the error ({', '.join(labels)}): {MOST} are possible; add some up "
            "(0.7*macs+0.3*params), or make them limits (--max)",
            OptionError,
        )
        need(len(set(labels)) == len(labels), f"the objective {labels[0]!r} is given twice", OptionError)
        return cls(pricing.models, tuple(listed), 0.0 if target is None else target.blend)

    @property
    def label(self) -> str:
        """All of them in one line."""
        blend = f" (x {self.blend:g} added to the error)" if self.blend else ""
        return "; ".join(one.label for one in self.listed) + blend

    @property
    def first(self) -> str:
        """Key of the cost model that the first objective begins with."""
        return self.listed[0].parts[0][1].model

    def pricing(self) -> Pricing:
        """Takes in further models."""
        return Pricing.of(self.models)

    def goals(self, originals: Mapping[str, float]) -> Goals:
        """The objectives in numbers, given what the original costs under each model."""
        units = {key: model.unit for key, model in self.models.items()}
        return Goals(tuple(one.goal(originals, units) for one in self.listed), self.blend)

    def to_json(self) -> dict[str, Any]:
        """What ``run.json`` keeps: as always for the mean under one model, and more where there is more. Models of
        limits are named there."""
        first = self.listed[0]
        plain: dict[str, Any] = {"objective": self.label, "cost": model_settings(self.models[self.first])}
        if len(self.listed) > 1 or self.blend or first != Objective(((1.0, Term(self.first)),)):
            named = dict.fromkeys(term.model for one in self.listed for _, term in one.parts)
            plain["models"] = {key: model_settings(self.models[key]) for key in named}
            plain["objectives"] = [one.to_json() for one in self.listed]
            plain["target_blend"] = self.blend
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Objectives:
        """Inverse of :meth:`to_json`, from all of ``run.json``."""
        if "objectives" not in plain:
            return cls.parse(_made(plain["cost"]))
        models = {**Pricing().models, **{str(key): _made(settings) for key, settings in plain["models"].items()}}
        listed = tuple(Objective.from_json(one) for one in plain["objectives"])
        return cls(models, listed, float(plain["target_blend"]))


def _made(settings: Mapping[str, Any]) -> CostModel:
    given = dict(settings)
    return cost_models.make(given.pop("name"), **given)
