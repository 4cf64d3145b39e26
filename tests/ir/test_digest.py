"""Digests see what a graph computes with, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from eexform.frontends.onnx import from_model
from eexform.ir.digest import digest_arrays
from eexform.ir.exits import Exit
from eexform.ir.graph import Graph
from tests.graphs import random_classifier
from tests.text import model, normal


def _graph() -> Graph:
    return from_model(random_classifier(2))


def test_order_of_nodes_and_metadata_do_not_count() -> None:
    graph = _graph()
    other = graph.copy()
    other.gs.nodes.reverse()
    other = other.replace(metadata={"note": "x"})
    assert other.digest == graph.digest
    assert len(graph.digest) == 64


def _weight(draft: gs.Graph) -> None:
    constant = next(t for node in draft.nodes for t in node.inputs if isinstance(t, gs.Constant))
    constant.values = constant.values + np.float32(1e-6)


def _wire(draft: gs.Graph) -> None:
    adds = next(node for node in draft.nodes if node.op == "Relu")
    adds.op = "Sigmoid"


def _attribute(draft: gs.Graph) -> None:
    next(node for node in draft.nodes if node.op == "Conv").attrs["strides"] = [1, 2]


def _opset(draft: gs.Graph) -> None:
    draft.opset = 18


def _input(draft: gs.Graph) -> None:
    draft.inputs[0].shape = ["N", 3, 9, 9]


def _name(draft: gs.Graph) -> None:
    draft.nodes[0].outputs[0].name += "x"


@pytest.mark.parametrize("change", [_weight, _wire, _attribute, _opset, _input, _name])
def test_every_change_counts(change: Callable[[gs.Graph], None]) -> None:
    graph = _graph()
    other = graph.copy()
    change(other.gs)
    assert other.digest != graph.digest
    assert _graph().digest == graph.digest, "the copy shares its weights with the original, which must not change"


def test_exits_and_scores_count() -> None:
    graph = _graph()
    exits = [Exit("a", "none/avg", "b", threshold=t) for t in (0.5, 0.25, float("inf"))]
    found = {graph.replace(exits=[e]).digest for e in exits} | {graph.digest}
    found.add(graph.replace(scores="probabilities" if graph.scores == "logits" else "logits").digest)
    assert len(found) == 5


def test_attributes_read_as_they_do_after_a_trip_through_a_file() -> None:
    graph = from_model(model("c = Elu<alpha=0.1>(x)\n y = Gemm(c, w)", {"w": normal(4, 3)}))
    other = graph.copy()
    other.nodes[0].attrs["alpha"] = 0.1  # in double precision, as a pass would set it
    assert other.digest == graph.digest


def test_arrays() -> None:
    a, b = normal(3, 4), np.arange(5)
    first = digest_arrays({"a": a, "b": b})
    assert first == digest_arrays({"b": b, "a": a.copy(order="F")})
    others = [
        digest_arrays({"a": a, "c": b}),
        digest_arrays({"a": a.reshape(4, 3), "b": b}),
        digest_arrays({"a": a.astype(np.float64), "b": b}),
        digest_arrays({"a": a}),
        digest_arrays({"ab": a}),
        digest_arrays({"a": a.view(np.int32), "b": b}),
    ]
    assert len({first, *others}) == 7
    assert digest_arrays({"a": np.zeros((0, 3))}) != digest_arrays({"a": np.zeros((3, 0))})
