"""What holds for every pass that preserves outputs, on random networks; the passes are found through the registry."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eexform.frontends.onnx import from_model
from eexform.ir.digest import digest
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.passes import Pass, get, make, names
from tests.graphs import random_classifier
from tests.passes.helpers import assert_same_outputs

PRESERVING = [name for name in names() if get(name).preserves_outputs]
IDEMPOTENT = ["fold_batch_norm", "remove_dead", "simplify"]


def some_graph(seed: int, exits: bool) -> Graph:
    graph = from_model(random_classifier(seed))
    sites = [site.value for site in find_sites(graph).sites][:: 1 + seed % 2] if exits else []
    if not sites:
        return graph
    step = make(
        "insert_exits",
        sites=sites,
        heads=dict.fromkeys(sites, "conv:1x4/avg" if seed % 3 else "none/avg"),
        thresholds=dict.fromkeys(sites, 0.5),
        carry=(0.0, 0.5)[seed % 2],
        untrained=True,
    )
    return step(graph).graph


def test_the_preserving_passes_are_there() -> None:
    assert set(IDEMPOTENT) <= set(PRESERVING)


@pytest.mark.parametrize("name", PRESERVING)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), exits=st.booleans())
def test_outputs_stay_and_the_input_is_untouched(name: str, seed: int, exits: bool) -> None:
    graph = some_graph(seed, exits)
    before = digest(graph)
    result = make(name)(graph)
    assert digest(graph) == before
    assert result.changed == (digest(result.graph) != before)
    assert_same_outputs(graph, result.graph, rtol=1e-3, atol=1e-4)
    assert len(result.graph.exits) == len(graph.exits)
    for item in result.graph.exits:
        assert set(item.parameters) <= set(result.graph.constants)


@pytest.mark.parametrize("name", IDEMPOTENT)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), exits=st.booleans())
def test_twice_is_once(name: str, seed: int, exits: bool) -> None:
    step: Pass = make(name)
    once = step(some_graph(seed, exits)).graph
    twice = step(once)
    assert not twice.changed
    assert twice.graph is once


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 5_000).map(lambda half: 2 * half))  # even ones do not carry scores into the final ones
def test_inserted_exits_leave_the_final_scores_alone(seed: int) -> None:
    assert_same_outputs(from_model(random_classifier(seed)), _only_final(some_graph(seed, exits=True)), rtol=0, atol=0)


def _only_final(graph: Graph) -> Graph:
    draft = graph.copy().gs
    draft.outputs = draft.outputs[:1]
    return Graph(draft, scores=graph.scores)
