"""macs and params, and the registry: counted by hand."""

from __future__ import annotations

import json

import pytest

from eexform.cost_models import get, listing, make, parse
from eexform.cost_models.latency_ort import LatencyOrt
from eexform.errors import GraphError, OptionError
from eexform.passes import make as make_pass
from tests.passes.helpers import CHAIN, graph_of

# conv1: 8*8 positions x 3 channels x 2*3*3; conv2: 4*4 x 6 x 3*3*3; conv3: 4*4 x 6 x 6*3*3; fc: 4 x 6
MACS = {"conv1": 64 * 3 * 18, "conv2": 16 * 6 * 27, "conv3": 16 * 6 * 54, "fc": 24}
PARAMS = {"conv1": 54, "conv2": 162, "conv3": 324, "fc": 28}


def test_macs() -> None:
    cost = make("macs").cost(graph_of(CHAIN))
    assert {name: macs for name, macs in cost.nodes.items() if macs} == MACS
    assert cost.total == sum(MACS.values())
    assert cost.unknown == ()


def test_params_counts_shared_ones_once_and_those_in_branches() -> None:
    graph = graph_of(CHAIN)
    cost = make("params").cost(graph)
    assert {name: size for name, size in cost.nodes.items() if size} == PARAMS
    assert cost.total == sum(PARAMS.values()) == sum(values.size for values in graph.parameters().values())
    shared = graph_of(
        CHAIN.replace("(r2, w3)", "(r2, w3)\n [x] x = Conv<pads = [1, 1, 1, 1]>(c3, w3)").replace("Relu(c3)", "Relu(x)")
    )
    assert make("params").cost(shared).total == cost.total
    insert = make_pass("insert_exits", sites=["r1"], heads={"r1": "none/avg"}, thresholds={"r1": 0.5}, untrained=True)
    with_exit = insert(graph).graph
    lowered = make_pass("lower")(with_exit).graph
    # the lowered network holds thresholds and the like besides
    assert 0 <= make("params").cost(lowered).total - make("params").cost(with_exit).total < 20


def test_unknown_operators_are_named() -> None:
    graph = graph_of("""
    <ir_version: 8, opset_import: ["": 17, "somebody": 1]>
    custom (float[N, 4] x) => (float[N, 3] scores)
    <float[4, 3] w>
    {
        [m] m = MatMul(x, w)
        [odd] scores = somebody.Odd(m)
    }
    """)
    cost = make("macs").cost(graph)
    assert cost.unknown == (("odd", "Odd"),)
    assert cost.total == 12


def test_symbolic_sizes_need_a_binding() -> None:
    graph = graph_of("""
    <ir_version: 8, opset_import: ["": 17]>
    tokens (float[N, seq, 4] x) => (float[N, 3] scores)
    <float[4, 3] w>
    {
        [m] m = MatMul(x, w)
        [mean] scores = ReduceMean<axes = [1], keepdims = 0>(m)
    }
    """)
    with pytest.raises(GraphError, match="seq"):
        make("macs").cost(graph)
    assert make("macs", bindings={"seq": 10}).cost(graph).total == 120


def test_listing_and_settings() -> None:
    found = {entry["name"]: entry for entry in listing()}
    assert {"macs", "params", "latency_ort"} <= set(found)
    assert (found["macs"]["unit"], found["macs"]["measured"], found["macs"]["per_sample"]) == ("MACs", False, True)
    assert (found["latency_ort"]["unit"], found["latency_ort"]["measured"]) == ("ms", True)
    assert found["params"]["per_sample"] is False
    assert [item["name"] for item in found["latency_ort"]["settings"]][:2] == ["threads", "batch"]
    assert json.dumps(listing())
    assert parse("latency_ort:threads=2,batch=8,cache=x") == LatencyOrt(threads=2, batch=8, cache="x")
    assert get("latency_ort") is LatencyOrt
    assert parse("macs") == make("macs")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mac", "no cost model is called 'mac': did you mean 'macs'"),
        ("latency_ort:thread=2", "cost model 'latency_ort' has no parameter 'thread': did you mean 'threads'"),
        ("latency_ort:threads=two", "parameter 'threads': expected int, found 'two'"),
        ("latency_ort:threads=0", "cost model 'latency_ort': threads: 0 is less than 1"),
        ("latency_ort:2", "'2' is no setting; write NAME:SETTING=VALUE"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse(text)
    assert message in str(caught.value)
