"""What a search gives: plans with their figures on every split, and ways to pick one."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from eexform.errors import OptionError, RunError
from eexform.ir.graph import Graph
from eexform.passes.insert_exits import NAMED
from eexform.search.archive import non_dominated
from eexform.search.scorer import Candidate, PlannedExit, Scorer

USEFUL = 5.0
"""Points below the trunk down to which a plan counts when the knee is looked for."""


class PlanSource(Protocol):
    """Turns plans into graphs and files; a run is one."""

    def materialise(self, plan: Plan, *, lean: bool = True) -> Graph: ...

    def export(self, plan: Plan, path: str | Path, *, form: str = "if") -> Any: ...


@dataclass(frozen=True)
class PlanExit:
    """One exit of a plan."""

    site: str
    head: str
    measure: str
    threshold: float
    temperature: float

    def to_json(self) -> dict[str, Any]:
        """Plain values; infinite thresholds become ``"never"`` / ``"always"``."""
        threshold: Any = self.threshold
        if math.isinf(self.threshold):
            threshold = "never" if self.threshold > 0 else "always"
        return {
            "site": self.site,
            "head": self.head,
            "measure": self.measure,
            "threshold": threshold,
            "temperature": self.temperature,
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> PlanExit:
        """Inverse of :meth:`to_json`."""
        threshold = plain["threshold"]
        number = NAMED[threshold] if isinstance(threshold, str) else float(threshold)
        return cls(str(plain["site"]), str(plain["head"]), str(plain["measure"]), number, float(plain["temperature"]))


@dataclass(frozen=True)
class Plan:
    """One point of a search: a recipe with every tunable bound, and its predicted scores.

    Attributes:
        index: place on the front.
        recipe: pass names with all parameters.
        exits: in the order in which a sample meets them; none is the trunk alone.
        carry: weight with which an exit's scores are added to the next one's.
        select: figures on the selection split: accuracy, cost by model, macs, macs_heads_free, rates, exit_accuracy.
        test: the same on the test split; empty where there is none.
        worst: cost of the dearest path: macs, and cost by model.
        source: where :meth:`materialise` and :meth:`export` come from; not part of the plan's value.
    """

    index: int
    recipe: tuple[tuple[str, Mapping[str, Any]], ...]
    exits: tuple[PlanExit, ...]
    carry: float
    select: Mapping[str, Any]
    test: Mapping[str, Any] = field(default_factory=dict)
    worst: Mapping[str, Any] = field(default_factory=dict)
    source: PlanSource | None = field(default=None, compare=False, repr=False)

    @property
    def candidate(self) -> Candidate:
        """What a :class:`eexform.search.scorer.Scorer` takes."""
        exits = tuple(PlannedExit(exit_.site, exit_.head, exit_.threshold) for exit_ in self.exits)
        return Candidate(exits, self.exits[0].measure if self.exits else "max_prob", self.carry)

    def materialise(self, *, lean: bool = True) -> Graph:
        """The graph with this plan's exits.

        Args:
            lean: with the passes that only make the network faster (see :meth:`eexform.search.run.Run.materialise`).

        Raises:
            OptionError: the plan does not belong to a run.
        """
        return self._source().materialise(self, lean=lean)

    def export(self, path: str | Path, form: str = "if") -> Any:
        """Write the plan as an ONNX file (or a folder, for ``stages``)."""
        return self._source().export(self, path, form=form)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "index": self.index,
            "exits": [exit_.to_json() for exit_ in self.exits],
            "carry": self.carry,
            "select": dict(self.select),
            "test": dict(self.test),
            "worst": dict(self.worst),
            "recipe": [[name, _plain_parameters(parameters)] for name, parameters in self.recipe],
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any], source: PlanSource | None = None) -> Plan:
        """Inverse of :meth:`to_json`.

        Raises:
            RunError: fields are missing or of the wrong kind.
        """
        try:
            return cls(
                index=int(plain["index"]),
                recipe=tuple((str(name), _infinite(parameters)) for name, parameters in plain["recipe"]),
                exits=tuple(PlanExit.from_json(exit_) for exit_ in plain["exits"]),
                carry=float(plain["carry"]),
                select=dict(plain["select"]),
                test=dict(plain["test"]),
                worst=dict(plain["worst"]),
                source=source,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"a stored plan is damaged ({error!r}); the run cannot be read") from error

    def _source(self) -> PlanSource:
        if self.source is None:
            raise OptionError(f"plan {self.index} was read without its run; open the run directory to export it")
        return self.source


def describe_plan(
    candidate: Candidate,
    scorer: Scorer,
    *,
    index: int = 0,
    recipe: Sequence[tuple[str, Mapping[str, Any]]] = (),
    temperatures: Mapping[tuple[str, str], float] | None = None,
    source: PlanSource | None = None,
) -> Plan:
    """Score a candidate exactly on every split and write it down as a plan.

    Args:
        candidate: what to score.
        scorer: needs the split ``select``; ``test`` is scored where it is there.
        index: place on the front.
        recipe: bound recipe.
        temperatures: by (site, head); default those of the select split.
        source: where graphs and files come from.
    """
    known = scorer.splits["select"].temperatures if temperatures is None else temperatures
    select = scorer.exact(candidate, "select")
    worst: dict[str, Any] = {"cost": dict(select.worst)}
    if "macs" in select.worst:
        worst["macs"] = select.worst["macs"]
    return Plan(
        index=index,
        recipe=tuple((name, dict(parameters)) for name, parameters in recipe),
        exits=tuple(
            PlanExit(exit_.site, exit_.head, candidate.measure, exit_.threshold, known[exit_.site, exit_.head])
            for exit_ in candidate.exits
        ),
        carry=candidate.carry,
        select=select.to_json(),
        test=scorer.exact(candidate, "test").to_json() if "test" in scorer.splits else {},
        worst=worst,
        source=source,
    )


@dataclass(frozen=True)
class Front:
    """The plans of a run, by rising cost on select; index = place.

    Attributes:
        plans: no two alike.
        trunk: the trunk alone, which every plan is compared with.
        objective: the cost model the plans were chosen by.
    """

    plans: tuple[Plan, ...]
    trunk: Plan
    objective: str = "macs"

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[Plan]:
        return iter(self.plans)

    def __getitem__(self, index: int) -> Plan:
        return self.plans[index]

    def cost(self, plan: Plan) -> float:
        """Mean cost on select in the objective's unit."""
        return float(plan.select["cost"][self.objective])

    def knee(self) -> Plan:
        """The plan farthest from the line between the cheapest and the most accurate one, both axes scaled to 0..1.

        Only plans within :data:`USEFUL` points of the trunk count (all, where there is none): the cheap end of a front
        holds plans that nobody would deploy, and they would bend the axis on which the others are compared. The trunk
        alone is a plan of the front where nothing beats it, but no knee while there is a plan with exits.
        """
        if not self.plans:
            raise OptionError("the front is empty: no plan kept the constraints; loosen them and search again")
        floor = _judged(self.trunk) - USEFUL / 100
        plans = [plan for plan in self.plans if plan.exits] or list(self.plans)
        plans = [plan for plan in plans if _judged(plan) >= floor] or plans
        points = np.array([(self.cost(plan), _judged(plan)) for plan in plans], np.float64)
        span = np.ptp(points, axis=0)
        scaled = (points - points.min(axis=0)) / np.where(span > 0, span, 1.0)
        # from (0, 0), the cheapest, to (1, 1), the most accurate: above the line is accuracy minus cost
        distance = scaled[:, 1] - scaled[:, 0]
        return plans[int(np.flatnonzero(distance == distance.max())[-1])]

    def pick(self, text: str) -> Plan:
        """A plan by description.

        Args:
            text: ``knee``; an index; ``max-cost=0.6x`` (of the trunk) or ``max-cost=24.4e6`` (in the objective's
                unit): the plan judged best within; ``min-accuracy=-0.5`` (points below the trunk, on select, judged as
                the search did) or ``min-accuracy=0.91``: the cheapest plan that has it.

        Raises:
            OptionError: not understood, or no plan fits; the message gives the front's range.
        """
        text = text.strip()
        if text == "knee" or not self.plans:
            return self.knee()
        if re.fullmatch(r"\d+", text):
            if int(text) >= len(self.plans):
                raise OptionError(f"there is no plan {text}: the front has plans 0 to {len(self.plans) - 1}")
            return self.plans[int(text)]
        name, _, value = text.partition("=")
        if name == "max-cost":
            return self._cheap_enough(value)
        if name == "min-accuracy":
            return self._good_enough(value)
        raise OptionError(
            f"{text!r} picks no plan; write knee, an index, max-cost=0.6x, max-cost=24.4e6, min-accuracy=-0.5 or "
            "min-accuracy=0.91"
        )

    def to_json(self) -> dict[str, Any]:
        """Trunk, objective and plans as plain values."""
        return {"objective": self.objective, "trunk": self.trunk.to_json(), "plans": [p.to_json() for p in self.plans]}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any], source: PlanSource | None = None) -> Front:
        """Inverse of :meth:`to_json`.

        Raises:
            RunError: fields are missing.
        """
        try:
            plans = tuple(Plan.from_json(entry, source) for entry in plain["plans"])
            return cls(plans, Plan.from_json(plain["trunk"], source), str(plain["objective"]))
        except (KeyError, TypeError) as error:
            raise RunError(f"the stored front is damaged ({error!r}); the run cannot be read") from error

    def _cheap_enough(self, value: str) -> Plan:
        trunk = self.cost(self.trunk)
        relative = value.endswith("x")
        limit = _number(value.removesuffix("x"), f"max-cost={value}") * (trunk if relative else 1.0)
        fitting = [plan for plan in self.plans if self.cost(plan) <= limit]
        if not fitting:
            least = self.cost(self.plans[0])
            raise OptionError(
                f"no plan costs at most {limit:.6g} {self.objective}: the cheapest one costs {least:.6g} "
                f"({least / trunk:.3f}x)"
            )
        return max(fitting, key=lambda plan: (_judged(plan), -self.cost(plan)))

    def _good_enough(self, value: str) -> Plan:
        number = _number(value, f"min-accuracy={value}")
        relative = value.strip()[:1] in ("-", "+")
        if not relative and not 0.0 < number <= 1.0:
            raise OptionError(
                f"min-accuracy={value}: write points against the trunk with a sign (-0.5), or an accuracy in 0..1"
            )
        # A difference to the trunk is judged as the search judged: the plain one flatters plans that won on select.
        figure = _judged if relative else _accuracy
        base = figure(self.trunk)
        # half a millionth: an accuracy is a fraction of samples, the limit a rounded decimal
        limit = (base + number / 100.0 if relative else number) - 5e-7
        fitting = [plan for plan in self.plans if figure(plan) >= limit]
        if not fitting:
            best = max(map(figure, self.plans))
            raise OptionError(
                f"no plan has an accuracy of {limit:.4f} on select: the best one has {best:.4f} "
                f"({100 * (best - base):+.2f} points against the trunk)"
            )
        return min(fitting, key=lambda plan: (self.cost(plan), -figure(plan)))


def build_front(plans: Sequence[Plan], trunk: Plan, objective: str = "macs") -> Front:
    """Order plans by cost, drop those that others beat on select (judged as the search did), number them."""
    if not plans:
        return Front((), trunk, objective)
    points = np.array([(1.0 - _judged(plan), plan.select["cost"][objective]) for plan in plans], np.float64)
    kept = [plans[index] for index in non_dominated(points).tolist()]
    return Front(tuple(replace(plan, index=index) for index, plan in enumerate(kept)), trunk, objective)


def _accuracy(plan: Plan) -> float:
    return float(plan.select["accuracy"])


def _judged(plan: Plan) -> float:
    """What a search compares: the accuracy, or the credit where answers are judged with the trunk's opinion."""
    return float(plan.select.get("judged", plan.select["accuracy"]))


def _number(text: str, whole: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise OptionError(f"{whole}: {text!r} is not a number")
    return number


def _plain_parameters(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain_parameters(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain_parameters(entry) for entry in value]
    if isinstance(value, float) and math.isinf(value):
        return "never" if value > 0 else "always"
    return value if isinstance(value, (bool, int, float, str)) or value is None else str(value)


def _infinite(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with the infinite thresholds put back."""
    restored = dict(parameters)
    thresholds = restored.get("thresholds")
    if isinstance(thresholds, Mapping):
        restored["thresholds"] = {s: NAMED[t] if isinstance(t, str) else t for s, t in thresholds.items()}
    return restored
