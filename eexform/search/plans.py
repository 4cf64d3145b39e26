"""A plan: one point of a search, with its figures on every split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from eexform.errors import OptionError, RunError, suggest
from eexform.ir.graph import Graph
from eexform.passes.insert_exits import NAMED
from eexform.search.scorer import Candidate, PlannedExit, Scorer
from eexform.search.terms import Term


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

    def figure(self, term: Term, split: str = "select") -> float:
        """A cost of the plan on a split.

        Raises:
            OptionError: it was not computed.
        """
        figures = self.test if split == "test" else self.select
        try:
            if term.statistic == "mean":
                return float(figures["cost"][term.model])
            if term.statistic == "max":
                return float(self.worst["cost"][term.model])
            return float(figures["percentiles"][term.statistic][term.model])
        except KeyError as error:
            known = figures.get("cost", {})
            raise OptionError(f"{term.label!r} was not computed for this plan: {suggest(term.model, known)}") from error

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
