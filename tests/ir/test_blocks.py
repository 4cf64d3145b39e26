"""Blocks: what is found in small graphs and in the zoo, what is refused and why, and what leaving one out gives."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eexform.backends import ort
from eexform.errors import GraphError
from eexform.frontends.onnx import from_model
from eexform.ir.blocks import Block, find_blocks, leave_out
from eexform.ir.checks import check
from eexform.ir.graph import Graph
from tests import zoo
from tests.counting import function_calls
from tests.graphs import random_classifier
from tests.passes.helpers import graph_of
from tests.zoo import doors
from tests.zoo.big import residual

RESIDUAL = """
<ir_version: 8, opset_import: ["": 17]>
small (float[N, 3, 6, 6] image) => (float[N, 3] scores)
<float[3, 3, 3, 3] w1, float[3, 3, 3, 3] w2, float[3, 3, 3, 3] w3, float[4, 3, 1, 1] w4, float[4, 3, 3, 3] w5,
 float[3, 4] w>
{
    [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(image, w1)
    [relu1] r1 = Relu(c1)
    [conv2] c2 = Conv<pads = [1, 1, 1, 1]>(r1, w2)
    [relu2] r2 = Relu(c2)
    [conv3] c3 = Conv<pads = [1, 1, 1, 1]>(r2, w3)
    [add1] a1 = Add(c3, r1)
    [relu3] r3 = Relu(a1)
    [conv4] c4 = Conv(r3, w4)
    [conv5] c5 = Conv<pads = [1, 1, 1, 1]>(r3, w5)
    [add2] a2 = Add(c4, c5)
    [pool] p = GlobalAveragePool(a2)
    [flat] f = Flatten(p)
    [fc] scores = Gemm<transB = 1>(f, w)
}
"""


def block(graph: Graph, name: str) -> Block:
    return find_blocks(graph).block(name)


def test_a_residual_branch() -> None:
    graph = graph_of(RESIDUAL)
    (found,) = find_blocks(graph).blocks
    assert found == Block("a1", "branch", "r1", "a1", ("conv2", "relu2", "conv3", "add1"), 2 * 3 * 3 * 9 * 36)
    (rejected,) = find_blocks(graph).rejected
    assert rejected.value == "a2"
    assert "a layer on its shortcut changes the shape: 'r3' is float32[Nx3x6x6]" in rejected.reason
    with pytest.raises(GraphError, match=r"ends at 'a2': a layer on its shortcut"):
        find_blocks(graph).block("a2")
    with pytest.raises(GraphError, match="no block 'a3'"):
        find_blocks(graph).block("a3")


def test_leaving_it_out_takes_the_idle_relu_along() -> None:
    graph = graph_of(RESIDUAL)
    before = graph.digest
    after = leave_out(graph, find_blocks(graph).blocks)
    assert graph.digest == before
    check(after)
    assert [node.name for node in after.nodes] == ["conv1", "relu1", "conv4", "conv5", "add2", "pool", "flat", "fc"]
    assert [node.inputs[0].name for node in after.nodes if node.name in ("conv4", "conv5")] == ["r1", "r1"]


def test_a_projection_of_the_same_shape_is_a_stretch() -> None:
    graph = graph_of(RESIDUAL.replace("float[4, 3", "float[3, 3").replace("float[3, 4] w>", "float[3, 3] w>"))
    assert block(graph, "a2").kind == "stretch"
    assert block(graph, "a2").nodes == ("conv4", "conv5", "add2")
    assert [node.name for node in leave_out(graph, [block(graph, "a2")]).nodes][-4:] == ["relu3", "pool", "flat", "fc"]


REFUSED = {
    "is needed elsewhere": (
        "[fc] scores", "[flat2] f2 = Flatten(r2)\n [more] z = MatMul(f2, wide)\n [fc0] s0", "Add(s0, z)",
    ),
    "it adds 3 values": ("[add1] a1 = Add(c3, r1)", "[add1] a1 = Sum(c3, r1, c2)", ""),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_say_why(reason: str) -> None:
    old, new, last = REFUSED[reason]
    text = RESIDUAL.replace(old, new).replace("float[3, 4] w>", "float[3, 4] w, float[108, 3] wide>")
    if last:
        text = text.replace("Gemm<transB = 1>(f, w)", f"Gemm<transB = 1>(f, w)\n scores = {last}")
    graph = graph_of(text)
    assert reason in next(item.reason for item in find_blocks(graph).rejected if item.value == "a1")


def test_the_end_of_the_network_stays() -> None:
    graph = graph_of("""
    <ir_version: 8, opset_import: ["": 17]>
    flat (float[N, 5] x) => (float[N, 5] scores)
    <float[5, 5] w1, float[5, 5] w2, float[5, 5] w3>
    {
        a = MatMul(x, w1)
        b = Relu(a)
        c = MatMul(b, w2)
        scores = Add(b, c)
    }
    """)
    report = find_blocks(graph)
    assert report.names == ()
    assert report.rejected[0].reason == "'scores' is an output of the graph"


def test_stretches_of_a_plain_network() -> None:
    graph = graph_of("""
    <ir_version: 8, opset_import: ["": 17]>
    plain (float[N, 2, 8, 8] image) => (float[N, 4] scores)
    <float[3, 2, 3, 3] w1, float[3, 3, 3, 3] w2, float[6, 3, 3, 3] w3, float[3, 6, 1, 1] w5, float[4, 3] w4>
    {
        [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(image, w1)
        [relu1] r1 = Relu(c1)
        [conv2] c2 = Conv<pads = [1, 1, 1, 1]>(r1, w2)
        [relu2] r2 = Relu(c2)
        [conv3] c3 = Conv<pads = [1, 1, 1, 1]>(r2, w3)
        [relu3] r3 = Relu(c3)
        [conv4] c4 = Conv(r3, w5)
        [relu4] r4 = Relu(c4)
        [pool] p = GlobalAveragePool(r4)
        [flat] f = Flatten(p)
        [fc] scores = Gemm<transB = 1>(f, w4)
    }
    """)
    found = {item.name: item for item in find_blocks(graph).blocks}
    assert {name: (item.kind, item.entry) for name, item in found.items()} == {
        "r2": ("stretch", "r1"),
        "r4": ("stretch", "r2"),  # wide inside, and as before at its end
    }
    assert found["r4"].nodes == ("conv3", "relu3", "conv4", "relu4")
    both = leave_out(graph, found.values())
    assert [node.name for node in both.nodes] == ["conv1", "relu1", "pool", "flat", "fc"]


BRANCHES = {"resnet": 4, "preact": 3, "mobilenet": 2, "densenet": 0, "convnext": 6, "vit": 6, "swin": 8, "bert": 6}


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_zoo(name: str) -> None:
    """Every block can be left out, alone and all together; what goes is what the block says."""
    graph = from_model(zoo.build(name))
    report = find_blocks(graph)
    assert sum(item.kind == "branch" for item in report.blocks) == BRANCHES.get(name, 0)
    feeds = zoo.feeds(name)
    for chosen in [[item] for item in report.blocks] + [list(report.blocks)]:
        after = leave_out(graph, chosen)
        check(after)
        gone = {node.name for node in graph.nodes} - {node.name for node in after.nodes}
        inside = {node for item in chosen for node in item.nodes}
        assert inside <= gone
        if len(chosen) == 1:  # with all blocks goes what they shared, such as a mask
            assert {graph.flow.nodes[node].op for node in gone - inside} <= {"Relu"}
        assert ort.run(ort.session(after), feeds)["logits"].shape == (2, zoo.CLASSES)


@pytest.mark.parametrize("door", doors.DOORS)
@pytest.mark.parametrize(("name", "count"), [("resnet_a", 4), ("mobilenet_v2", 2), ("vit", 4), ("bert", 4)])
def test_torch_models(name: str, count: int, door: str) -> None:
    report = find_blocks(doors.graph(name, door))
    assert sum(item.kind == "branch" for item in report.blocks) == count


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_branch_that_gives_zeros_can_go(seed: int) -> None:
    """With the last layer of a branch zeroed, leaving the branch out changes nothing."""
    graph = from_model(random_classifier(seed))
    feeds = {"image": np.random.default_rng(seed).normal(size=(3, 3, 8, 8)).astype(np.float32)}
    for item in find_blocks(graph).blocks:
        if item.kind != "branch":
            continue
        zeroed = graph.copy()
        add = next(node for node in zeroed.nodes if node.outputs[0].name == item.exit)
        last = next(tensor for tensor in add.inputs if tensor.name != item.entry).inputs[0]
        for tensor in last.inputs[1:]:
            tensor.values = np.zeros_like(tensor.values)
        expected = ort.run(ort.session(zeroed), feeds)["scores"]
        found = ort.run(ort.session(leave_out(graph, [item])), feeds)["scores"]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        assert np.abs(found - ort.run(ort.session(graph), feeds)["scores"]).max() > 0 or not expected.any()


def test_work_grows_with_the_network() -> None:
    graphs = [from_model(residual(size)) for size in (400, 1600)]
    calls = [function_calls(partial(find_blocks, graph)) for graph in graphs]
    assert calls[1] < 6 * calls[0]
