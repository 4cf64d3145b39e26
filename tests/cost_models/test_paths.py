"""Path costs: exact on nested and on incomparable sites, for the plain and for the lowered network."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eexform.backends import ort
from eexform.backends.lower_if import lower_if
from eexform.cost_models import Cost, Crossing, PathCosts, Routing, exit_costs, make, path_costs
from eexform.cost_models.macs import Macs
from eexform.cost_models.params import Params
from eexform.errors import GraphError
from eexform.frontends.onnx import from_model
from eexform.heads import HeadSpec, head_macs
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.passes import make as make_pass
from tests.graphs import random_classifier
from tests.passes.helpers import CHAIN, feeds_of, graph_of

HEAD = "conv:1x4/avg"

BRANCHES = """
<ir_version: 8, opset_import: ["": 17]>
branches (float[N, 2, 8, 8] image) => (float[N, 4] scores)
<float[3, 2, 3, 3] w0, float[4, 3, 3, 3] wa, float[4, 4, 3, 3] wa2, float[5, 3, 3, 3] wb, float[5, 5, 3, 3] wb2,
 float[6, 9, 3, 3] wc, float[4, 6] w4>
{
    [stem] s = Conv<pads = [1, 1, 1, 1]>(image, w0)
    [relus] rs = Relu(s)
    [left] a = Conv<pads = [1, 1, 1, 1]>(rs, wa)
    [relua] ra = Relu(a)
    [left2] a2 = Conv<pads = [1, 1, 1, 1]>(ra, wa2)
    [right] b = Conv<pads = [1, 1, 1, 1]>(rs, wb)
    [relub] rb = Relu(b)
    [right2] b2 = Conv<pads = [1, 1, 1, 1]>(rb, wb2)
    [cat] c = Concat<axis = 1>(a2, b2)
    [relu] rc = Relu(c)
    [conv] d = Conv<pads = [1, 1, 1, 1]>(rc, wc)
    [relud] rd = Relu(d)
    [pool] p = GlobalAveragePool(rd)
    [flat] f = Flatten(p)
    [fc] scores = Gemm<transB = 1>(f, w4)
}
"""
"""ra and rb lie on different branches: neither needs the other."""


def insert(graph: Graph, sites: list[str], threshold: object = 0.5, carry: float = 0.0) -> Graph:
    return make_pass(
        "insert_exits",
        sites=sites,
        heads=dict.fromkeys(sites, HEAD),
        thresholds=dict.fromkeys(sites, threshold),
        untrained=True,
        carry=carry,
    )(graph).graph  # fmt: skip


def price(graph: Graph, model: str = "macs") -> PathCosts:
    sites = find_sites(graph).sites
    return path_costs(make(model), graph, sites, {site.value: [HeadSpec.parse(HEAD)] for site in sites})


def test_a_chain_by_hand() -> None:
    costs = price(graph_of(CHAIN))
    conv1, conv2, conv3, fc = 64 * 3 * 18, 16 * 6 * 27, 16 * 6 * 54, 24
    head1, head2 = 64 * 4 * 27 + 16, 16 * 4 * 54 + 16
    assert costs.trunk == conv1 + conv2 + conv3 + fc
    assert costs.prefix == {"r1": conv1, "r2": conv1 + conv2}
    assert costs.head == {("r1", HEAD): head1, ("r2", HEAD): head2}
    assert costs.nested
    assert costs.unit == "MACs"
    pairs = [("r1", HEAD), ("r2", HEAD)]
    assert costs.path(pairs) == (conv1 + head1, conv1 + conv2 + head1 + head2, costs.trunk + head1 + head2)
    assert costs.path(pairs[1:]) == (conv1 + conv2 + head2, costs.trunk + head2)
    assert costs.path(pairs, heads_free=True) == (conv1, conv1 + conv2, costs.trunk)
    assert costs.path([]) == (costs.trunk,)


def test_sites_on_different_branches_cost_their_union() -> None:
    graph = graph_of(BRANCHES)
    costs = price(graph)
    stem, left, right = 64 * 3 * 18, 64 * 4 * 27, 64 * 5 * 27
    assert not costs.nested
    assert costs.prefix["ra"] == stem + left
    assert costs.prefix["rb"] == stem + right
    order = [site for site in costs.sites if site in ("ra", "rb")]
    assert costs.reach(order)[1] == stem + left + right
    assert costs.reach(["rb"]) == (stem + right,)


def check_against_the_graph(trunk: Graph, costs: PathCosts, chosen: list[str], carry: float) -> None:
    """The prices of a plan are those of the graph in which the exits really are."""
    model = make("macs")
    graph = insert(trunk, chosen, carry=carry)
    pairs = [(site, HEAD) for site in chosen]
    assert costs.path(pairs) == exit_costs(graph, model)
    assert costs.path(pairs, heads_free=True) == exit_costs(graph, model, heads_free=True)
    flow, nodes = graph.flow, model.cost(graph).nodes
    for place, item in enumerate(graph.exits):
        run = flow.ancestors([each.logits for each in graph.exits[: place + 1]])
        assert costs.path(pairs)[place] == sum(nodes[name] for name in run), item.site
    assert costs.path(pairs)[-1] == model.cost(graph).total


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), mask=st.integers(1, 255), carry=st.sampled_from([0.0, 0.5]))
def test_plans_are_priced_like_their_graphs(seed: int, mask: int, carry: float) -> None:
    trunk = from_model(random_classifier(seed))
    costs = price(trunk)
    chosen = [site for place, site in enumerate(costs.sites) if mask >> place & 1]
    check_against_the_graph(trunk, costs, chosen, carry)


@pytest.mark.parametrize("mask", range(1, 16))
def test_every_subset_of_the_branches(mask: int) -> None:
    trunk = graph_of(BRANCHES)
    costs = price(trunk)
    check_against_the_graph(trunk, costs, [site for i, site in enumerate(costs.sites) if mask >> i & 1], 0.0)


@pytest.mark.parametrize("text", [CHAIN, BRANCHES])
def test_a_population_at_once(text: str) -> None:
    costs = price(graph_of(text))
    chosen = np.random.default_rng(0).random((40, len(costs.sites))) < 0.5
    found = costs.reach_matrix(chosen)
    for row, mask in zip(found, chosen, strict=True):
        sites = [site for site, on in zip(costs.sites, mask, strict=True) if on]
        assert tuple(row[mask]) == costs.reach(sites)


def test_without_cells_the_sites_count_as_nested() -> None:
    costs = PathCosts(
        trunk=10.0,
        prefix={"a": 2.0, "b": 5.0},
        head={("a", "x"): 1.0, ("b", "x"): 0.5},
        decision={"a": 0.25, "b": 0.125},
        onward={"a": 0.5, "b": 2.0},
    )
    # the trunk to a, head, decision; on from a; to b, head, decision; on from b
    assert costs.path([("a", "x"), ("b", "x")]) == (3.25, 7.375, 14.375)
    assert costs.path([("a", "x"), ("b", "x")], heads_free=True) == (2.0, 5.0, 10.0)


def test_a_stretch_between_branches_may_cost_something_else() -> None:
    costs = PathCosts(
        trunk=10.0,
        prefix={"a": 2.0, "b": 5.0},
        head={("a", "x"): 1.0, ("b", "x"): 0.5},
        between={("", "a"): 0.5, ("", "b"): 0.25, ("a", "b"): 1.0, ("a", ""): 4.0, ("b", ""): -0.5},
    )
    assert costs.path([("a", "x"), ("b", "x")]) == (3.5, 8.0, 12.5)
    assert costs.path([("a", "x")]) == (3.5, 15.5)
    assert costs.path([("b", "x")]) == (5.75, 10.25)
    assert costs.path([]) == (10.0,)
    assert costs.path([("a", "x")], heads_free=True) == (2.0, 10.0)


def test_memory_is_free_again() -> None:
    costs = PathCosts(
        trunk=10.0,
        prefix={"a": 6.0, "b": 5.0},
        head={("a", "x"): 1.0, ("b", "x"): 8.0},
        decision={"a": 0.5, "b": 3.0},
        onward={"a": 7.0, "b": 12.0},
        combine="max",
    )
    assert costs.path([("a", "x"), ("b", "x")]) == (6.0, 11.0, 12.0)
    assert costs.path([("b", "x")]) == (11.0, 12.0)
    assert costs.path([("a", "x")], heads_free=True) == (6.0, 10.0)
    assert costs.path([]) == (10.0,)


def test_sizes_are_paid_whatever_the_path() -> None:
    trunk = graph_of(CHAIN)
    graph = insert(trunk, ["r1", "r2"])
    model = make("params")
    total = model.cost(graph).total
    assert exit_costs(graph, model) == (total,) * 3
    assert price(trunk, "params").path([("r1", HEAD), ("r2", HEAD)]) == (total,) * 3
    assert exit_costs(graph, model, heads_free=True) == (model.cost(trunk).total,) * 3


def test_a_size_may_know_what_a_decision_takes() -> None:
    class Padded(Params):
        """Every exit's branch takes 3 more."""

        def routing(self, graph: Graph, crossing: Crossing) -> Routing:
            return Routing(decision=3.0)

    trunk, heads = graph_of(CHAIN), {name: [HeadSpec.parse(HEAD)] for name in ("r1", "r2")}
    sites = [site for site in find_sites(trunk).sites if site.value in heads]
    graph = insert(trunk, ["r1", "r2"])
    expected = (make("params").cost(graph).total + 6.0,) * 3
    assert exit_costs(graph, Padded()) == expected
    assert path_costs(Padded(), trunk, sites, heads).path([("r1", HEAD), ("r2", HEAD)]) == expected


class Routed(Macs):
    """A decision costs its classes, going on a hundred per number carried, and every call seven."""

    def cost(self, graph: Graph) -> Cost:
        plain = super().cost(graph)
        return replace(plain, total=plain.total + self.overhead())

    def overhead(self) -> float:
        return 7.0

    def routing(self, graph: Graph, crossing: Crossing) -> Routing:
        assert crossing.value.elements > 0
        assert len(crossing.names) == len(crossing.live)
        return Routing(crossing.classes, 100.0 * sum(value.elements for value in crossing.live))

    def between(self, graph: Graph, before: Crossing | None, after: Crossing | None) -> Cost:
        assert before or after
        return Cost(0.5 if before is None else 0.125 if after is None else 0.25, unknown=(("b", "Branched"),))


@pytest.mark.parametrize("text", [CHAIN, BRANCHES])
@pytest.mark.parametrize("mask", range(1, 16))
def test_routing_is_that_of_the_site(text: str, mask: int) -> None:
    trunk = graph_of(text)
    sites = find_sites(trunk).sites
    heads = {site.value: [HeadSpec.parse(HEAD)] for site in sites}
    costs = path_costs(Routed(), trunk, sites, heads)
    chosen = [site for place, site in enumerate(sites) if mask >> place & 1]
    if not chosen:
        return
    assert costs.unknown == (("b", "Branched"),), "what a branch holds and the model does not know is named, once"
    paths = costs.path([(site.value, HEAD) for site in chosen])
    plain = price(trunk).path([(site.value, HEAD) for site in chosen])
    carried = [sum(math.prod(trunk.types[name].sample_shape) for name in site.live) for site in chosen]
    decided, gone = 0, 0
    for place, cost in enumerate(paths):
        decided += 4 if place < len(chosen) else 0
        apart = 0.5 + 0.25 * min(place, len(chosen) - 1) + (0.125 if place == len(chosen) else 0)
        if text == BRANCHES and {"ra", "rb"} <= {site.value for site in chosen}:
            apart = pytest.approx(apart, abs=0.25)  # no stretch leads from one branch to the other
            assert cost - (plain[place] + 7 + decided + 100 * gone) == apart
        else:
            assert cost == pytest.approx(plain[place] + 7 + decided + 100 * gone + apart)
        gone += carried[place] if place < len(chosen) else 0
    if text == CHAIN:  # on one line what is carried behind a site does not depend on the other exits
        assert exit_costs(insert(trunk, [site.value for site in chosen]), Routed()) == pytest.approx(paths)


def test_a_model_that_knows_whole_paths_is_believed() -> None:
    class Whole(Macs):
        """Two exits, measured as a whole."""

        def paths(self, graph: Graph) -> tuple[float, ...] | None:
            return (1.0, 2.0, 3.0)

    graph = insert(graph_of(CHAIN), ["r1", "r2"])
    assert exit_costs(graph, Whole()) == (1.0, 2.0, 3.0)
    assert exit_costs(graph, Whole(), heads_free=True) == exit_costs(graph, Macs(), heads_free=True)


def test_a_graph_with_exits_is_no_trunk() -> None:
    with pytest.raises(GraphError, match="built from the trunk"):
        path_costs(make("macs"), insert(graph_of(CHAIN), ["r1"]), [], {})


# -- what really runs -------------------------------------------------------------------------------------------------


def macs_that_ran(model: onnx.ModelProto, feeds: dict[str, np.ndarray], folder: Path) -> int:
    """Multiply-accumulates of the kernels in a trace of onnxruntime, from the shapes that the trace itself gives."""
    session = ort.session(model, optimize=False, profile=folder / "trace")
    session.run(None, feeds)
    total, seen = 0, Counter[str]()
    for event in json.loads(Path(session.end_profiling()).read_text()):
        args = event.get("args", {})
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        seen[args["op_name"]] += 1
        inputs = [next(iter(shape.values())) for shape in args["input_type_shape"]]
        outputs = [next(iter(shape.values())) for shape in args["output_type_shape"]]
        if args["op_name"] == "Conv":
            total += math.prod(outputs[0]) * math.prod(inputs[1][1:])
        elif args["op_name"] in ("Gemm", "MatMul"):
            total += math.prod(outputs[0]) * inputs[0][-1]
    assert seen["Conv"], "the trace shows kernels"
    return total


@pytest.mark.parametrize("text", [CHAIN, BRANCHES])
def test_the_lowered_network_runs_what_was_priced(text: str, tmp_path: Path) -> None:
    trunk = graph_of(text)
    costs = price(trunk)
    sites = list(costs.sites)
    feeds = feeds_of(trunk, batch=1)
    for leaving in range(len(sites) + 1):
        graph = insert(trunk, sites, "never")
        exits = list(graph.exits)
        if leaving < len(exits):
            exits[leaving] = type(exits[leaving])(**{**vars(exits[leaving]), "threshold": -math.inf})
        ran = macs_that_ran(lower_if(graph.replace(exits=exits)), feeds, tmp_path)
        assert ran == costs.path([(site, HEAD) for site in sites])[leaving], f"leaving at {leaving}"


def test_head_prices_are_those_of_the_portfolio() -> None:
    trunk = graph_of(CHAIN)
    for site in find_sites(trunk).sites:
        assert price(trunk).head[site.value, HEAD] == head_macs(HeadSpec.parse(HEAD), site, num_classes=4)


def test_a_model_that_is_not_additive_is_asked_once_for_each_path() -> None:
    asked = []

    class Clock(Macs):
        additive = False

        def cost(self, graph: Graph) -> Cost:
            asked.append(len(graph.nodes))
            return super().cost(graph)

    graph = insert(graph_of(CHAIN), ["r1", "r2"])
    assert exit_costs(graph, Clock()) == exit_costs(graph, Macs())
    assert len(asked) == 3
