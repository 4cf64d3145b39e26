"""Exact scoring of one plan from cached head scores: the leaving rule sample by sample, and what each sample pays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eexform.cost_models.paths import PathCosts
from eexform.errors import OptionError, suggest
from eexform.ir import measures, policy
from eexform.search.judge import Judge
from eexform.search.scores import HeadScores
from eexform.search.terms import PERCENTILES, Term, statistic

__all__ = ["Candidate", "Decided", "HeadScores", "PlannedExit", "Scored", "Scorer", "exit_outputs"]


@dataclass(frozen=True)
class PlannedExit:
    """A head at a site and the confidence from which a sample leaves there (``inf``: never, ``-inf``: always)."""

    site: str
    head: str
    threshold: float


@dataclass(frozen=True)
class Candidate:
    """A plan reduced to what its score depends on.

    Attributes:
        exits: in the order in which a sample meets them; empty is the trunk alone.
        measure: name of the confidence measure.
        carry: weight with which an exit's scores are added to the next one's; 0 is plain.
    """

    exits: tuple[PlannedExit, ...] = ()
    measure: str = "max_prob"
    carry: float = 0.0

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        return tuple((exit_.site, exit_.head) for exit_ in self.exits)


@dataclass(frozen=True)
class Decided:
    """What happens to each sample: exit taken (the number of exits means the final one), answer, right or wrong."""

    exit_index: np.ndarray
    predicted: np.ndarray
    correct: np.ndarray


@dataclass(frozen=True)
class Scored:
    """A plan's predicted figures on one split.

    Attributes:
        accuracy: share of right answers.
        cost: mean cost per sample by cost model, every head passed and every decision charged.
        cost_heads_free: the same with the trunk alone charged.
        rates: share of samples that leave at each exit; the final one last.
        exit_accuracy: accuracy on the samples that leave there; ``None`` where none does.
        worst: cost of the dearest path by cost model.
        percentiles: ``p50``, ``p90``, ``p95``, ``p99`` -> what that share of the samples pays at most, by cost model.
        judged: mean credit (see :class:`eexform.search.judge.Judge`), what a search compares.
    """

    accuracy: float
    cost: Mapping[str, float]
    cost_heads_free: Mapping[str, float]
    rates: tuple[float, ...]
    exit_accuracy: tuple[float | None, ...]
    worst: Mapping[str, float]
    percentiles: Mapping[str, Mapping[str, float]]
    judged: float

    def figure(self, term: Term) -> float:
        """A cost of the plan."""
        if term.statistic == "mean":
            return self.cost[term.model]
        table = self.worst if term.statistic == "max" else self.percentiles[term.statistic]
        return table[term.model]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with ``macs`` and ``macs_heads_free`` beside the tables where MACs were computed."""
        plain: dict[str, Any] = {"accuracy": self.accuracy, "judged": self.judged, "cost": dict(self.cost)}
        plain["cost_heads_free"] = dict(self.cost_heads_free)
        if "macs" in self.cost:
            plain["macs"] = self.cost["macs"]
            plain["macs_heads_free"] = self.cost_heads_free["macs"]
        plain["percentiles"] = {name: dict(table) for name, table in self.percentiles.items()}
        plain["rates"] = list(self.rates)
        plain["exit_accuracy"] = list(self.exit_accuracy)
        return plain


@dataclass
class Scorer:
    """Scores plans one by one, exactly as the exported network will behave.

    Attributes:
        splits: cached scores by split name (``select``, ``test``).
        costs: path costs by cost model name.
        trust: weight of the trunk's opinion in ``judged``; accuracies are never blended.
    """

    splits: Mapping[str, HeadScores]
    costs: Mapping[str, PathCosts]
    trust: float = 0.0
    _confidences: dict[tuple[str, str, str, str], np.ndarray] = field(default_factory=dict, repr=False)

    def confidences(self, candidate: Candidate, split: str) -> list[np.ndarray]:
        """Confidence at each exit of a plan, passed or not, float32 [samples] each."""
        data, name = self._split(split), candidate.measure
        if measures.is_learned(name):  # what gates say does not change with the scores carried
            return measures.get_gate(name).accumulate([data.gate(*pair) for pair in candidate.pairs])
        if not candidate.carry:
            return [self.confidence(split, *pair, name) for pair in candidate.pairs]
        states = exit_outputs(data, candidate)[:-1]
        return [measures.get(name).confidence(measures.to_probabilities(state, data.scores, 1.0)) for state in states]

    def confidence(self, split: str, site: str, head: str, measure: str) -> np.ndarray:
        """Confidence of a plain (not carried) exit on a split by its scores, float32 [samples]; kept."""
        key = (split, site, head, measure)
        if key not in self._confidences:
            data = self._split(split)
            probabilities = measures.to_probabilities(data.of(site, head), data.scores, data.temperatures[site, head])
            self._confidences[key] = measures.get(measure).confidence(probabilities)
        return self._confidences[key]

    def decide(self, candidate: Candidate, split: str) -> Decided:
        """Apply the leaving rule to every sample of a split."""
        data = self._split(split)
        outputs, sure = exit_outputs(data, candidate), self.confidences(candidate, split)
        exit_index = np.full(len(data), len(candidate.exits), np.int64)
        predicted = outputs[-1].argmax(axis=1)
        # from the last exit to the first: the earliest exit that a sample may take has the last word
        for index in reversed(range(len(candidate.exits))):
            leaves = sure[index] >= np.float32(candidate.exits[index].threshold)
            exit_index[leaves] = index
            predicted[leaves] = outputs[index].argmax(axis=1)[leaves]
        return Decided(exit_index, predicted, predicted == data.labels)

    def exact(self, candidate: Candidate, split: str) -> Scored:
        """Accuracy, rates and costs of a plan on a split."""
        decided = self.decide(candidate, split)
        size = len(candidate.exits) + 1
        left = np.bincount(decided.exit_index, minlength=size)
        right = np.bincount(decided.exit_index[decided.correct], minlength=size)
        total = len(decided.correct)
        vectors = {name: np.array(model.path(candidate.pairs)) for name, model in self.costs.items()}
        free = {name: np.array(model.path(candidate.pairs, heads_free=True)) for name, model in self.costs.items()}
        return Scored(
            accuracy=float(right.sum() / total),
            cost={name: float((left * vector).sum() / total) for name, vector in vectors.items()},
            cost_heads_free={name: float((left * vector).sum() / total) for name, vector in free.items()},
            rates=tuple((left / total).tolist()),
            exit_accuracy=tuple(float(r / n) if n else None for r, n in zip(right, left, strict=True)),
            worst={name: float(vector.max()) for name, vector in vectors.items()},
            percentiles={
                share: {name: float(statistic(share, v[None], left[None])[0]) for name, v in vectors.items()}
                for share in PERCENTILES
            },
            judged=float(Judge(self.splits[split], self.trust).credit(decided.predicted).sum() / total),
        )

    def _split(self, split: str) -> HeadScores:
        if split not in self.splits:
            raise OptionError(f"there are no cached scores for split {split!r}: {suggest(split, self.splits)}")
        return self.splits[split]


def exit_outputs(data: HeadScores, candidate: Candidate) -> list[np.ndarray]:
    """What each exit, the final one last, puts out: float32 [samples, classes] each; carried: states."""
    plain = [data.of(exit_.site, exit_.head) for exit_ in candidate.exits]
    if not candidate.carry or not plain:
        return [*plain, data.final]
    temperatures = [data.temperatures[pair] for pair in candidate.pairs]
    return list(
        policy.carry_states([*plain, data.final], [*temperatures, data.final_temperature], candidate.carry, data.scores)
    )
