"""What shape arithmetic is read as, and how its numbers are mended."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from eexform.frontends.onnx import from_model
from eexform.ir.coupling import Cut, Slot
from eexform.ir.coupling_sizes import mend, size_chains
from eexform.ir.emit import Emitter
from eexform.ir.graph import Graph
from tests.zoo.net import Net


def chain(kind: str) -> tuple[Graph, str]:
    """A network with a vector of sizes, and the name of the vector."""
    net = Net("sizes")
    image = net.input("image", 3, 4, 4)
    x = net.conv(image, 3, 6)
    if kind == "gathered":
        sizes = net.vector([net.size(x, 0), 6, -1])
    elif kind == "sliced":
        sizes = net.op("Concat", net.slice(net.op("Shape", x), 0, 2, 0), net.const([16]), axis=0)
    elif kind == "computed":
        sizes = net.vector([net.size(x, 0), net.size(x, 1), net.op("Mul", net.size(x, 2), net.size(x, 3))])
    elif kind == "window":
        sizes = net.op("Concat", net.op("Shape", x, start=0, end=2), net.const([16]), axis=0)
    else:
        sizes = net.op(
            "Mul", net.op("Concat", net.op("Shape", x, start=0, end=2), net.const([8]), axis=0), net.const([1, 1, 2])
        )
    y = net.op("Flatten", net.op("ReduceMean", net.op("Reshape", x, sizes), axes=[1, 2], keepdims=1))
    return from_model(net.model(net.gemm(y, 1, 5), 5)), sizes


def slots(*axes: int) -> list[Slot]:
    return [Slot("conv_1", axis) for axis in axes]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gathered", [*slots(0), 6, -1]),
        ("sliced", [*slots(0, 1), 16]),
        ("window", [*slots(0, 1), 16]),
        ("computed", [*slots(0, 1), frozenset(slots(2, 3))]),
        ("product", [frozenset(slots(0, 1))] * 3),
    ],
)
def test_elements(kind, expected):
    graph, sizes = chain(kind)
    assert size_chains(graph).elements(graph.tensor(sizes)) == expected


def test_what_is_not_followed():
    graph, _ = chain("gathered")
    assert size_chains(graph).elements(graph.tensor("conv_1")) is None
    assert size_chains(graph).elements(graph.tensor("weight_1")) is None
    assert size_chains(graph).leaves("conv_1") == frozenset()


@pytest.mark.parametrize(("kind", "added"), [("gathered", []), ("sliced", []), ("product", ["Where"])])
@pytest.mark.parametrize("shared", [False, True])
def test_numbers_are_mended(kind, added, shared):
    """In the pieces of the Concat where it can be, in a copy where others read it, else by choosing elements."""
    graph, sizes = chain(kind)
    draft = graph.copy().gs
    node = next(node for node in draft.nodes if node.op == "Reshape")
    if shared:
        place = draft.nodes.index(node)
        other = gs.Node("Reshape", "other", {}, list(node.inputs), [gs.Variable("other_out")])
        draft.nodes.insert(place, other)
    emitter = Emitter(draft)
    changed = {"gathered": [None, 12, None], "sliced": [None, None, -1]}.get(kind, [None, 12, 8])
    mend(node, 1, changed, Cut(graph, {}, emitter), emitter)
    made = graph.replace(draft)
    found = size_chains(made).elements(node.inputs[1])
    before = size_chains(graph).elements(graph.tensor(sizes))
    assert before is not None
    if added:
        assert [node.op for node in made.nodes if node.name not in graph.flow.nodes and node.name != "other"] == added
    else:
        assert found == [old if new is None else new for old, new in zip(before, changed, strict=True)]
        new = [node for node in made.nodes if node.name not in graph.flow.nodes and node.name != "other"]
        assert len(new) == shared
    if shared:
        other_sizes = next(node for node in made.nodes if node.name == "other").inputs[1]
        assert size_chains(made).elements(other_sizes) == before
    assert made.flow.topological  # in order, no cycle


def test_constants_are_mended():
    net = Net("constant")
    x = net.op("Reshape", net.conv(net.input("image", 3, 4, 4), 3, 6), net.const([0, 6, 16]))
    graph = from_model(net.model(net.gemm(net.op("ReduceMean", x, axes=[2], keepdims=0), 6, 5), 5))
    draft = graph.copy().gs
    node = next(node for node in draft.nodes if node.op == "Reshape")
    emitter = Emitter(draft)
    mend(node, 1, [None, 5, None], Cut(graph, {}, emitter), emitter)
    np.testing.assert_array_equal(node.inputs[1].values, [0, 5, 16])
