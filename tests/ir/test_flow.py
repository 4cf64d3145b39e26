"""Data flow: what is shape arithmetic, ancestors, live sets, cut points."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper

from eexform.errors import GraphError
from eexform.frontends.onnx import from_model
from eexform.ir import flow as flow_module
from eexform.ir.flow import DataFlow
from eexform.ir.graph import Graph
from tests import zoo
from tests.graphs import random_classifier
from tests.zoo.net import Net


@pytest.fixture(scope="module", params=[*zoo.NAMES, 1, 2, 3])
def graph(request: pytest.FixtureRequest) -> Graph:
    """Every network of the zoo and some random ones."""
    name = request.param
    return from_model(zoo.build(name) if isinstance(name, str) else random_classifier(name))


def ops(flow: DataFlow, nodes: set[str] | frozenset[str]) -> set[str]:
    return {flow.nodes[name].op for name in nodes}


# -- shape arithmetic --------------------------------------------------------------------------------------------------


def test_a_class_token_expanded_to_the_batch_size_is_no_data() -> None:
    flow = from_model(zoo.build("vit")).flow
    expand = next(name for name, node in flow.nodes.items() if node.op == "Expand")
    assert expand in flow.shape_nodes
    concat = next(name for name in flow.consumers[flow.nodes[expand].outputs[0].name])
    assert concat not in flow.shape_nodes
    assert flow.data_inputs(concat) == (flow.nodes[concat].inputs[1].name,)


def test_positions_looked_up_by_range_are_no_data() -> None:
    flow = from_model(zoo.build("bert")).flow
    assert {"Shape", "Range", "Gather"} <= ops(flow, flow.shape_nodes)
    embeddings = [n for n, node in flow.nodes.items() if node.op == "Gather" and "weight" in node.inputs[0].name]
    assert [name in flow.shape_nodes for name in embeddings] == [False, True]  # words come from data, places do not


def test_a_node_that_mixes_sizes_and_data_is_data() -> None:
    net = Net("mix")
    x = net.conv(net.input("image", 3, 4, 4), 3, 2)
    area = net.op("Cast", net.op("Size", x), to=TensorProto.FLOAT)
    flow = from_model(net.model(net.classifier(net.op("Div", x, area), 2, 5), 5)).flow
    assert ops(flow, flow.shape_nodes) == {"Size", "Cast"}
    assert flow.data_inputs("node_div_1") == (x,)


def test_the_size_of_a_selection_depends_on_the_data() -> None:
    net = Net("selection")
    x = net.op("Relu", net.conv(net.input("image", 3, 4, 4), 3, 2))
    found = net.op("Shape", net.op("NonZero", x))
    count = net.op("Cast", net.op("Gather", found, net.const(1), axis=0), to=TensorProto.FLOAT)
    flow = from_model(net.model(net.classifier(net.op("Div", x, count), 2, 5), 5)).flow
    assert flow.shape_nodes == frozenset()


def test_random_numbers_cannot_be_computed_again() -> None:
    net = Net("noise")
    x = net.conv(net.input("image", 3, 4, 4), 3, 2)
    noisy = net.op("Add", x, net.op("RandomNormal", shape=[1, 2, 4, 4]))
    flow = from_model(net.model(net.classifier(noisy, 2, 5), 5)).flow
    assert flow.shape_nodes == frozenset()


# -- ancestors ---------------------------------------------------------------------------------------------------------


def closure(graph: Graph, values: list[str]) -> set[str]:
    """Ancestors by plain walking."""
    made = {tensor.name: node for node in graph.nodes for tensor in node.outputs}
    found: set[str] = set()
    left = list(values)
    while left:
        node = made.get(left.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            left += [tensor.name for tensor in node.inputs]
    return found


def test_ancestors_are_all_that_has_to_run(graph: Graph) -> None:
    values = list(graph.flow.producer)
    for value in values[:: max(1, len(values) // 12)]:
        assert graph.flow.ancestors([value]) == closure(graph, [value])
    assert graph.flow.ancestors(values[:2]) == closure(graph, values[:2])
    assert graph.flow.ancestors(graph.inputs) == frozenset()


def test_weights_are_added_once_per_ancestor(graph: Graph) -> None:
    random = np.random.default_rng(0)
    weights = {name: int(random.integers(0, 5)) for name in graph.flow.nodes}
    sums = graph.flow.accumulate(weights)
    assert sums.keys() == {*graph.inputs, *graph.flow.producer}
    for value, total in sums.items():
        assert total == sum(weights[name] for name in closure(graph, [value]))
        assert isinstance(total, int)


def test_the_order_respects_every_edge_and_keeps_the_graphs_own_order(graph: Graph) -> None:
    place = {name: i for i, name in enumerate(graph.flow.topological)}
    assert all(place[a] < place[b] for a, b in graph.flow.digraph.edges)
    assert list(graph.flow.topological) == [node.name for node in graph.nodes]


# -- live sets ---------------------------------------------------------------------------------------------------------


def live_by_definition(flow: DataFlow, done: frozenset[str]) -> set[str]:
    alive = flow.ancestors(flow.outputs) - flow.shape_nodes - done
    there = {v for v, node in flow.producer.items() if node in done - flow.shape_nodes} | set(flow.inputs)
    return {value for value in there if any(value in flow.reads(name) for name in alive)}


def test_live_sets_equal_their_definition(graph: Graph) -> None:
    flow = graph.flow
    for name in flow.topological:
        done = flow.ancestors([flow.nodes[name].outputs[0].name])
        expected = live_by_definition(flow, done)
        assert set(flow.live(done)) == expected
        assert flow.cut(name) == flow.live(done)


def test_what_is_too_wide_to_follow_is_found_again_behind_it(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_module, "WIDEST", 1)
    fresh = DataFlow(graph)
    for name in fresh.topological:
        expected = graph.flow.cut(name)
        assert expected is not None
        assert fresh.cut(name) == (expected if len(expected) <= 1 else None)


def test_cut_points_are_the_nodes_behind_which_only_they_are_live(graph: Graph) -> None:
    flow = graph.flow
    alone = [
        name
        for name in flow.topological
        if name not in flow.shape_nodes
        and flow.cut(name)
        and set(flow.cut(name) or ()) <= {tensor.name for tensor in flow.nodes[name].outputs}
    ]
    points = [name for name in flow.cut_points if flow.cut(name)]  # behind the last one nothing is left
    assert points == alone


def test_inputs_that_come_in_late_are_live_until_then() -> None:
    flow = from_model(zoo.build("bert")).flow
    assert set(flow.live(frozenset())) == {"input_ids", "attention_mask"}
    embedded = next(n for n, node in flow.nodes.items() if node.op == "LayerNormalization")
    live = flow.cut(embedded)
    assert live is not None
    assert live[0] == "attention_mask"
    assert len(live) == 2


def test_dead_nodes_need_nothing() -> None:
    net = Net("dead")
    first = net.conv(net.input("image", 3, 4, 4), 3, 2)
    net.conv(first, 2, 2)
    second = net.conv(first, 2, 2)
    graph = Graph(_imported(net.model(net.classifier(second, 2, 5), 5)))
    flow = DataFlow(graph)
    assert flow.live(flow.ancestors([second])) == (second,)
    assert flow.data_consumers(first) == ("node_conv_3",)


def test_only_the_asked_outputs_count() -> None:
    graph = from_model(zoo.build("inception"))
    middle = next(t.name for node in graph.nodes if node.op == "Concat" for t in node.outputs)
    assert DataFlow(graph, [middle]).cut(graph.flow.producer[middle]) == ()


# -- sub-graphs and errors ---------------------------------------------------------------------------------------------


def test_values_taken_by_a_subgraph_are_inputs_of_its_node() -> None:
    branches = {}
    for name, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
        output = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
        node = helper.make_node(op, ["hidden"], [output.name], f"in_{name}")
        branches[name] = helper.make_graph([node], name, [], [output])
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["hidden"], "first"),
        helper.make_node("ReduceMax", ["x"], ["largest"], "largest_node", keepdims=0),
        helper.make_node("Cast", ["largest"], ["flag"], "cast", to=TensorProto.BOOL),
        helper.make_node("If", ["flag"], ["y"], "choose", **branches),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3]) for n in ("x", "y")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", values[:1], values[1:]), opset_imports=[helper.make_opsetid("", 17)]
    )
    flow = DataFlow(Graph(gs.import_onnx(model)))
    assert set(flow.reads("choose")) == {"flag", "hidden"}
    assert "first" in flow.ancestors(["y"])


def _imported(model: onnx.ModelProto) -> gs.Graph:
    return gs.import_onnx(model)


def test_node_names_must_be_unique() -> None:
    raw = _imported(random_classifier(1))
    raw.nodes[1].name = raw.nodes[0].name
    with pytest.raises(GraphError, match="two nodes are called 'conv"):
        DataFlow(Graph(raw))


def test_a_cycle_is_named() -> None:
    a, b, out = (gs.Variable(name, np.float32, [1]) for name in "abo")
    nodes = [gs.Node("Add", "one", inputs=[a, b], outputs=[out]), gs.Node("Neg", "two", inputs=[out], outputs=[b])]
    with pytest.raises(GraphError, match=r"cycle: '(one|two)' -> '(one|two)'"):
        DataFlow(Graph(gs.Graph(nodes, inputs=[a], outputs=[out])))


def test_an_unknown_value_is_named_with_similar_ones() -> None:
    flow = from_model(zoo.build("resnet")).flow
    with pytest.raises(GraphError, match=r"no node computes value 'relu_33'.*did you mean 'relu_"):
        flow.ancestors(["relu_33"])
