"""Searches over the tiny network, and whether their plans are realised."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eexform.backends import ort
from eexform.backends.lower_multi import lower_multi
from eexform.cost_models import exit_costs, make
from eexform.data import Dataset
from eexform.ir import policy
from eexform.ir.graph import Graph
from eexform.passes import Recipe
from eexform.search.driver import search
from eexform.search.front import Plan
from eexform.search.options import SearchOptions
from eexform.search.run import Run
from eexform.training import TrainOptions
from tests import tiny

HEADS = ("none/avg", "conv:1x8/avg")
OPTIONS: dict[str, Any] = {"heads": HEADS, "population": 16, "generations": 3, "threads": 1}
TRAIN = TrainOptions(epochs=2, batch_size=64, learning_rate=0.02)


def options(**changed: Any) -> SearchOptions:
    return SearchOptions(**{**OPTIONS, **changed})


def start(out: Path, **given: Any) -> Run:
    """A search over the tiny network and all digits, or what is ``given`` instead."""
    graph, data = given.pop("graph", None) or tiny.trained(), given.pop("data", None) or tiny.digits(1797)
    return search(graph, data, out=out, **{"options": options(), "train": TRAIN, **given})


def recipe(*steps: tuple[str, Mapping[str, Any]]) -> Recipe:
    return Recipe.parse({"pass": [{"name": name, **given} for name, given in steps]})


def front_of(out: Path) -> Any:
    return json.loads((out / "front.json").read_text())


def facts_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


def busiest(run: Run) -> Plan:
    """The plan with most exits."""
    return max(run.front, key=lambda plan: len(plan.exits))


def chosen(run: Run, count: int = 3) -> list[Plan]:
    """Some plans that carry and some that do not, with as many exits as there are."""
    by_exits = sorted(run.front, key=lambda plan: -len(plan.exits))
    return [plan for plan in by_exits if plan.carry][:count] + [plan for plan in by_exits if not plan.carry][:count]


def check_realised(plan: Plan, graph: Graph, data: Dataset, split: str, index: np.ndarray, scores: np.ndarray) -> None:
    """Accuracy, rates and costs of a run are those that the plan states for the split."""
    stated = getattr(plan, split)
    labels = np.concatenate([_labels(batch.labels) for batch in data.batches(split, 500)])
    assert (scores.argmax(axis=1) == labels).mean() == stated["accuracy"]
    counts = np.bincount(index, minlength=len(plan.exits) + 1)
    assert (counts / len(index)).tolist() == stated["rates"]
    for free, name in ((False, "macs"), (True, "macs_heads_free")):
        paid = np.array(exit_costs(graph, make("macs"), heads_free=free))
        assert paid[index].mean() == pytest.approx(stated[name], rel=1e-12)
    assert max(exit_costs(graph, make("macs"))) == plan.worst["macs"]


def run_and_check(plan: Plan, data: Dataset, split: str) -> Graph:
    """Run all scores of a plan's graph on a split, apply the leaving rule and check; returns the graph."""
    graph = plan.materialise()
    session = ort.session(lower_multi(graph))
    parts = [list(ort.run(session, batch.feeds).values()) for batch in data.batches(split, 100)]
    final, *exits = (np.concatenate(rows) for rows in zip(*parts, strict=True))
    exits, learned = exits[: len(graph.exits)], exits[len(graph.exits) :]
    decided = policy.decide(exits, final, graph.exits, graph.scores, learned)
    check_realised(plan, graph, data, split, decided.exit_index, decided.scores)
    return graph


def _labels(labels: np.ndarray | None) -> np.ndarray:
    assert labels is not None
    return labels
