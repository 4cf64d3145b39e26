"""Where the nodes of a graph come from in the PyTorch module that it was made of.

Kept as metadata (:data:`PROVENANCE`), so it is no part of the digest and travels through passes and files. A node that
a pass makes has no origin; the entry of a node that a pass removed matches nothing and is dropped when a graph is
saved.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, NamedTuple

from eexform.errors import GraphError

if TYPE_CHECKING:
    from eexform.ir.graph import Graph

PROVENANCE = "eexform.provenance"
"""Key of ``Graph.metadata``: JSON ``{node: [module path, name of the torch.fx node]}``."""


class Origin(NamedTuple):
    """Where a node comes from.

    Attributes:
        module: path of the sub-module whose ``forward`` made the call, such as ``layer1.0``; empty: the module itself.
        fx_node: name of the node in the ``torch.export`` graph.
    """

    module: str
    fx_node: str


def origins(graph: Graph) -> dict[str, Origin]:
    """Origin of each node of ``graph`` that has one, by node name.

    Raises:
        GraphError: the metadata are damaged.
    """
    there = {node.name for node in graph.nodes}
    return {name: origin for name, origin in _read(graph.metadata).items() if name in there}


def module_of(graph: Graph) -> dict[str, str]:
    """Path of the sub-module that computes each value, where it is known.

    Raises:
        GraphError: the metadata are damaged.
    """
    known = origins(graph)
    return {
        tensor.name: known[node.name].module
        for node in graph.nodes
        if node.name in known
        for tensor in node.outputs
        if tensor.name
    }


def with_origins(metadata: Mapping[str, str], found: Mapping[str, Origin]) -> dict[str, str]:
    """Metadata that say where nodes come from; without the entry where ``found`` is empty."""
    rest = {key: value for key, value in metadata.items() if key != PROVENANCE}
    if not found:
        return rest
    return rest | {PROVENANCE: json.dumps({name: list(origin) for name, origin in found.items()}, sort_keys=True)}


def pruned(metadata: Mapping[str, str], nodes: Container[str]) -> dict[str, str]:
    """Metadata without the origins of nodes that are not among ``nodes``.

    Raises:
        GraphError: the metadata are damaged.
    """
    if PROVENANCE not in metadata:
        return dict(metadata)
    return with_origins(metadata, {name: origin for name, origin in _read(metadata).items() if name in nodes})


def _read(metadata: Mapping[str, str]) -> dict[str, Origin]:
    text = metadata.get(PROVENANCE)
    if text is None:
        return {}
    try:
        plain = json.loads(text)
        pairs = {name: (module, fx_node) for name, (module, fx_node) in plain.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise GraphError(f"the metadata {PROVENANCE!r} is damaged: {error}") from error
    if not all(isinstance(part, str) for pair in pairs.values() for part in pair):
        raise GraphError(f"the metadata {PROVENANCE!r} is damaged: expected pairs of texts")
    return {name: Origin(*pair) for name, pair in pairs.items()}
