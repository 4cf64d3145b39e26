"""remove_dead: before/after."""

from __future__ import annotations

from eexform.passes import make
from tests.passes.helpers import CHAIN, assert_same_outputs, graph_of, ops


def test_before_and_after() -> None:
    graph = graph_of(CHAIN)
    dirty = graph.copy().gs
    r1 = next(tensor for node in dirty.nodes for tensor in node.outputs if tensor.name == "r1")
    place = next(place for place, node in enumerate(dirty.nodes) if node.name == "conv2")
    one = dirty.layer(op="Sigmoid", name="dead1", inputs=[r1], outputs=["d1"])
    dirty.layer(op="Relu", name="dead2", inputs=one, outputs=["d2"])
    dirty.nodes[place:place] = [dirty.nodes.pop(), dirty.nodes.pop()][::-1]
    before = graph.replace(dirty)
    assert len(before.nodes) == len(graph.nodes) + 2
    result = make("remove_dead")(before)
    assert result.changed
    assert result.notes == ("removed dead1", "removed dead2")
    assert result.graph.digest == graph.digest
    assert_same_outputs(before, result.graph)
    again = make("remove_dead")(result.graph)
    assert again.graph is result.graph


def test_heads_are_not_dead() -> None:
    insert = make("insert_exits", sites=["r1"], heads={"r1": "none/avg"}, thresholds={"r1": 0.5}, untrained=True)
    graph = insert(graph_of(CHAIN)).graph
    assert not make("remove_dead")(graph).changed


def test_a_multi_output_node_stays_while_one_output_is_needed() -> None:
    graph = graph_of("""
    <ir_version: 8, opset_import: ["": 17]>
    split (float[N, 8] x) => (float[N, 4] scores)
    {
        [split] a, b = Split<axis = 1>(x)
        [abs] dead = Abs(b)
        [relu] scores = Relu(a)
    }
    """)
    assert ops(graph) == ["Split", "Relu"], "the front door tidies already"
    assert not make("remove_dead")(graph).changed
