"""The space of real recipes: what is open, what is given, and that bound recipes can be applied."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import pytest

from eexform.errors import OptionError
from eexform.frontends.onnx import from_model
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.passes import PassContext, TrainedHead, make
from eexform.search.bits import BitScorer
from eexform.search.evaluation import Evaluation
from eexform.search.nsga2 import Settings, evolve
from eexform.search.space import build_space
from eexform.tunables import Each, Integer, Subset
from tests.graphs import random_classifier
from tests.search import synthetic

HEADS = ("none/avg", "conv:1x4/avg")


@pytest.fixture(scope="module")
def trunk() -> Graph:
    return from_model(random_classifier(1, blocks=4, softmax=False))


class Store:
    """Heads "trained" at two sites."""

    def __init__(self, graph: Graph) -> None:
        self._sites = tuple(site.value for site in find_sites(graph).sites if site.kind == "spatial")[:2]

    def sites(self, trunk_digest: str) -> tuple[str, ...]:
        return self._sites

    def heads(self, trunk_digest: str, site: str) -> tuple[str, ...]:
        return HEADS if site in self._sites else ()

    def trained(self, trunk_digest: str, site: str, head: str) -> TrainedHead:
        raise OptionError("no weights here")


def test_open_tunables_become_genes(trunk: Graph) -> None:
    store = Store(trunk)
    recipe: list[tuple[str, Mapping[str, object]]] = [("fold_batch_norm", {}), ("insert_exits", {"measure": "margin"})]
    space = build_space([*recipe, ("drop_idle_exits", {})], trunk, PassContext(heads=store), levels=16)
    assert [key for key, _ in space.genes.items()] == [(1, name) for name in ("sites", "heads", "thresholds", "carry")]
    sites = space.genes[1, "sites"].domain
    assert isinstance(sites, Subset)
    assert sites.items == store.sites("")
    levels = space.genes[1, "thresholds"].domain
    assert isinstance(levels, Each)
    assert set(levels.domains.values()) == {Integer(0, 15)}
    json.dumps(space.describe(), allow_nan=False)
    with pytest.raises(OptionError, match="exactly once, found 2"):
        build_space([*recipe, recipe[1]], trunk, PassContext(heads=store))


def test_found_recipes_can_be_applied(trunk: Graph) -> None:
    store = Store(trunk)
    sites = store.sites("")
    where = [(site, list(HEADS)) for site in sites]
    space = build_space([("insert_exits", {"untrained": True})], trunk, PassContext(heads=store), levels=16)
    scorer = BitScorer(
        synthetic.scores(where, 120, 5), synthetic.costs(where), where, measures=synthetic.MEASURES, levels=16
    )
    evaluation = Evaluation(space, scorer)
    state = evolve(space, evaluation, Settings(population=8, generations=3, refine_every=1), seed=0)
    best = list(state.archive)[len(state.archive) // 2]
    ((name, parameters),) = evaluation.recipe(best)
    candidate = evaluation.candidate(best)
    graph = make(name, **parameters)(trunk, PassContext(seed=0)).graph
    assert [(exit_.site, exit_.head) for exit_ in graph.exits] == list(candidate.pairs)
    assert [np.float32(exit_.threshold) for exit_ in graph.exits] == [
        np.float32(exit_.threshold) for exit_ in candidate.exits
    ]


@pytest.mark.parametrize("text", [HEADS[1], HEADS[1] + "/s1"])
def test_given_sites_are_kept(trunk: Graph, text: str) -> None:
    store = Store(trunk)
    sites = store.sites("")
    where = [(site, list(HEADS)) for site in sites]
    given = {"sites": sites, "heads": dict.fromkeys(sites, text), "carry": 0.0, "measure": "entropy"}
    space = build_space([("insert_exits", given)], trunk, PassContext(heads=store), levels=16)
    assert list(space.genes) == [(0, "thresholds")]
    scorer = BitScorer(synthetic.scores(where, 120, 5), synthetic.costs(where), where, measures=["entropy"], levels=16)
    evaluation = Evaluation(space, scorer)
    state = evolve(space, evaluation, Settings(population=8, generations=4, refine_every=2), seed=0)
    for one in state.archive:
        assert evaluation.candidate(one).pairs == tuple((site, HEADS[1]) for site in sites)
