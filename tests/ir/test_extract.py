"""Parts of graphs: prefix and tail together are the whole, and a grafted part computes what it did alone."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eexform.backends import ort
from eexform.errors import GraphError
from eexform.frontends.onnx import from_model
from eexform.ir.checks import check, check_structure
from eexform.ir.extract import extract, graft
from eexform.ir.graph import Graph
from tests import zoo
from tests.graphs import random_classifier
from tests.text import model, normal


def _run(graph: Graph, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return ort.run(ort.session(graph), feeds)


def _check_cut(graph: Graph, value: str, feeds: dict[str, np.ndarray]) -> None:
    """inputs -> live values at ``value`` -> final gives what the whole gives."""
    live = graph.flow.live(graph.flow.ancestors([value]))
    live = tuple(dict.fromkeys((*live, value))) if value != graph.final else live
    computed = [name for name in live if name not in graph.inputs]
    prefix, tail = extract(graph, graph.inputs, computed), extract(graph, live, [graph.final])
    for part in (prefix, tail):
        check_structure(part)
        assert not part.exits
    between = _run(prefix, feeds) | {name: feeds[name] for name in live if name in feeds}
    whole = _run(graph, feeds)[graph.final]
    np.testing.assert_allclose(_run(tail, between)[graph.final], whole, rtol=1e-4, atol=1e-5)
    shared = graph.constants
    for name, constant in (*prefix.constants.items(), *tail.constants.items()):
        assert name not in shared or constant.values is shared[name].values


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), data=st.data())
def test_random_graphs(seed: int, data: st.DataObject) -> None:
    graph = from_model(random_classifier(seed))
    carriers = [t.name for node in graph.nodes for t in node.outputs if graph.types[t.name].batch_axis == 0]
    value = data.draw(st.sampled_from(carriers[:-1]))
    _check_cut(graph, value, {"image": normal(3, 3, 8, 8)})


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_architecture_at_its_sites(name: str) -> None:
    graph = from_model(zoo.build(name))
    from eexform.ir.sites import find_sites

    sites = find_sites(graph).sites
    assert sites
    for site in sites[:: max(len(sites) // 3, 1)]:
        _check_cut(graph, site.value, zoo.feeds(name, 3))


def test_sizes_from_outside_are_computed_from_the_parts_inputs() -> None:
    graph = from_model(
        model(
            """a = Relu(x)
               s = Shape(a)
               n = Gather<axis=0>(s, zero)
               h = Reshape(a, heads)
               b = Tanh(h)
               u = Unsqueeze(n, zero1)
               t = Concat<axis=0>(u, minus)
               f = Reshape(b, t)
               k = Size(a)
               kf = Cast<to=1>(k)
               d = Div(f, kf)
               y = Gemm(d, w)""",
            {
                "zero": np.array(0), "zero1": np.array([0]), "minus": np.array([-1]), "heads": np.array([-1, 2]),
                "w": normal(8, 3),
            },
            inputs="float[N,8] x",
        )
    )  # fmt: skip
    whole = _run(graph, {"x": normal(5, 8)})["y"]
    merged = extract(graph, ["x"], ["b"])
    assert merged.types["b"].shape == ("4*N", 2)
    between = _run(merged, {"x": normal(5, 8)})
    for inputs in (["b"], ["b", "x"]):  # [4*N, 2] alone, or with a value that has the batch itself
        tail = extract(graph, inputs, ["y"])
        assert not any(node.op == "Relu" for node in tail.nodes)
        check(tail)
        feeds = {"x": np.zeros((5, 8), np.float32)} | between
        found = _run(tail, {name: feeds[name] for name in inputs})["y"]
        np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-6)


def test_one_of_several_outputs_of_a_node_may_be_given() -> None:
    graph = from_model(
        model("a, b = Split<axis=1>(x)\n r = Relu(a)\n s = Add(r, b)\n y = Gemm(s, w)", {"w": normal(2, 3)})
    )
    part = extract(graph, ["x", "a"], ["y"])
    check(part)
    x = normal(5, 4)
    whole = _run(graph, {"x": x})["y"]
    np.testing.assert_allclose(_run(part, {"x": x, "a": x[:, :2].copy()})["y"], whole, rtol=1e-6, atol=1e-6)


def test_mistakes_are_named() -> None:
    graph = from_model(random_classifier(0))
    with pytest.raises(GraphError, match="needs the value 'image'"):
        extract(graph, [], [graph.final])
    with pytest.raises(GraphError, match="no value 'v9999'"):
        extract(graph, ["v9999"], [graph.final])
    with pytest.raises(GraphError, match="both inputs and outputs"):
        extract(graph, ["v0"], ["v0"])
    with pytest.raises(GraphError, match="is a constant"):
        extract(graph, ["image"], ["fc.bias"])
    with pytest.raises(GraphError, match="at least one output"):
        extract(graph, ["image"], [])


def test_graft_computes_what_the_part_did_alone() -> None:
    trunk, head = from_model(random_classifier(1)), from_model(random_classifier(2, channels=4, blocks=2))
    draft = trunk.copy()
    before = trunk.digest
    planted = graft(draft.gs, head, feeds={"image": draft.gs.inputs[0]}, prefix="exit0.")
    made = planted["scores"]
    assert made.name == "exit0.scores"
    made.dtype = np.float32
    draft.gs.outputs.append(made)
    both = trunk.replace(draft.gs)
    feeds = {"image": normal(3, 3, 8, 8)}
    found = _run(both, feeds)
    np.testing.assert_allclose(found["exit0.scores"], _run(head, feeds)["scores"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[trunk.final], _run(trunk, feeds)[trunk.final], rtol=1e-5, atol=1e-6)
    assert trunk.digest == trunk.replace().digest == before
    for name, constant in head.constants.items():
        assert both.constants["exit0." + name].values is constant.values
    with pytest.raises(GraphError, match="already"):
        graft(draft.gs, head, feeds={"image": draft.gs.inputs[0]}, prefix="exit0.")
    with pytest.raises(GraphError, match=r"no feed for the inputs \['image'\]"):
        graft(draft.gs, head, feeds={}, prefix="exit1.")


def test_a_failed_graft_changes_nothing() -> None:
    trunk, head = from_model(random_classifier(1)), from_model(random_classifier(2))
    draft = trunk.copy()
    draft.gs.nodes[-1].name = f"exit0.{head.nodes[-1].name}"
    count = len(draft.gs.nodes)
    with pytest.raises(GraphError, match="already"):
        graft(draft.gs, head, feeds={"image": draft.gs.inputs[0]}, prefix="exit0.")
    assert len(draft.gs.nodes) == count
    assert len(gs.Graph.tensors(draft.gs)) == len(trunk.tensors)
