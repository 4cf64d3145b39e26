"""Ill-formed graphs are named for what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from eexform.errors import GraphError
from eexform.frontends.onnx import from_model
from eexform.ir.checks import check, check_finite
from eexform.ir.exits import Exit
from eexform.ir.graph import Graph
from tests.graphs import random_classifier

pytestmark = pytest.mark.malformed


@pytest.fixture
def graph() -> Graph:
    return from_model(random_classifier(5)).copy()


def _twice_named_node(draft: gs.Graph) -> None:
    draft.nodes[1].name = draft.nodes[0].name


def _unnamed_node(draft: gs.Graph) -> None:
    draft.nodes[1].name = ""


def _twice_named_value(draft: gs.Graph) -> None:
    draft.nodes[1].outputs[0].name = draft.nodes[0].outputs[0].name


def _wrong_order(draft: gs.Graph) -> None:
    draft.nodes.reverse()


def _not_produced(draft: gs.Graph) -> None:
    draft.nodes[0].inputs[0] = gs.Variable("nowhere", np.float32)


def _twice_produced(draft: gs.Graph) -> None:
    draft.nodes.append(gs.Node("Relu", "again", {}, [draft.inputs[0]], [draft.nodes[0].outputs[0]]))


def _no_output(draft: gs.Graph) -> None:
    draft.outputs = []


def _lost_output(draft: gs.Graph) -> None:
    draft.outputs = [gs.Variable("lost", np.float32)]


def _extra_output(draft: gs.Graph) -> None:
    draft.outputs = [*draft.outputs, draft.nodes[0].outputs[0]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_twice_named_node, "several nodes are called"),
        (_unnamed_node, "no name"),
        (_twice_named_value, "two different values are called"),
        (_wrong_order, "not in order"),
        (_not_produced, "'nowhere', which nothing produces"),
        (_twice_produced, "produced more than once"),
        (_no_output, "no output"),
        (_lost_output, "'lost': nothing produces it"),
        (_extra_output, "expected the final scores, those of every exit"),
    ],
)
def test_structure(graph: Graph, damage: Callable[[gs.Graph], None], message: str) -> None:
    check(graph)
    damage(graph.gs)
    with pytest.raises(GraphError, match=message):
        check(graph.replace())


def test_exits(graph: Graph) -> None:
    value = graph.nodes[0].outputs[0].name
    with pytest.raises(GraphError, match="site 'absent' is not in the graph"):
        check(graph.replace(exits=[Exit("absent", "none/avg", value)]))
    with pytest.raises(GraphError, match="expected the final scores, those of every exit"):
        check(graph.replace(exits=[Exit(value, "none/avg", value)]))
    with pytest.raises(GraphError, match=r"parameters \['w'\] are not in the graph"):
        check(graph.replace(exits=[Exit(value, "none/avg", value, parameters=("w",))]))


def test_finite(graph: Graph) -> None:
    check_finite(graph)
    name, constant = next((n, c) for n, c in graph.constants.items() if c.values.ndim == 4)
    constant.values = np.where(np.arange(constant.values.size).reshape(constant.shape) < 2, np.nan, constant.values)
    with pytest.raises(GraphError, match=rf"parameter '{name}' of node 'conv0' \(Conv\) has 2 NaN"):
        check_finite(graph)
