"""Origins of nodes: read, pruned on save, no part of the digest, refused where damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eexform.errors import GraphError
from eexform.frontends.onnx import load
from eexform.ir.graph import Graph
from eexform.ir.provenance import PROVENANCE, Origin, module_of, origins, pruned, with_origins
from eexform.ir.serialize import save, to_model
from tests.tiny import network


@pytest.fixture
def graph() -> Graph:
    plain = network()
    found = {plain.nodes[0].name: Origin("block0.conv", "conv2d"), "gone": Origin("", "relu")}
    return plain.replace(metadata=with_origins({"task": "digits"}, found))


def test_only_nodes_that_are_there_have_an_origin(graph: Graph) -> None:
    node = graph.nodes[0]
    assert origins(graph) == {node.name: Origin("block0.conv", "conv2d")}
    assert module_of(graph) == {node.outputs[0].name: "block0.conv"}
    assert origins(network()) == {}
    assert module_of(network()) == {}


def test_they_are_no_part_of_the_digest(graph: Graph) -> None:
    assert graph.digest == network().digest


def test_saving_keeps_those_of_nodes_that_are_there(graph: Graph, tmp_path: Path) -> None:
    save(graph, tmp_path / "net.onnx")
    again = load(tmp_path / "net.onnx")
    assert origins(again) == origins(graph)
    assert json.loads(again.metadata[PROVENANCE]) == {graph.nodes[0].name: ["block0.conv", "conv2d"]}
    assert again.metadata["task"] == "digits"
    assert PROVENANCE in graph.metadata, "the graph itself is not changed"
    assert "gone" in graph.metadata[PROVENANCE]


def test_without_origins_there_is_no_entry(graph: Graph) -> None:
    assert PROVENANCE not in pruned(graph.metadata, ())
    assert pruned({"task": "digits"}, ()) == {"task": "digits"}
    assert PROVENANCE not in with_origins(graph.metadata, {})
    written = {entry.key for entry in to_model(network()).metadata_props}
    assert PROVENANCE not in written


@pytest.mark.parametrize("damaged", ["{", "[1, 2]", '{"a": ["b"]}', '{"a": [1, 2]}', '{"a": 3}'])
def test_damaged_metadata_are_named(damaged: str) -> None:
    graph = network().replace(metadata={PROVENANCE: damaged})
    with pytest.raises(GraphError, match=r"metadata 'eexform.provenance' is damaged"):
        origins(graph)
    with pytest.raises(GraphError, match=r"metadata 'eexform.provenance' is damaged"):
        to_model(graph)
