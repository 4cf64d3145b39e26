"""Heads that start anew, and the trunk of a graph with exits as a graph of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from eexform.errors import GraphError
from eexform.heads import HeadSpec, head_graph, with_parameters
from eexform.ir.exit_nodes import head_digest
from eexform.ir.exits import Exit
from eexform.ir.extract import extract
from eexform.ir.flow import WIDEST
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.training.student import head_seed


def trunk_of(graph: Graph) -> Graph:
    """The trunk alone: what the final exit needs, without heads.

    Where exits carry scores on, the final exit's scores hold those of the heads, too; what is taken is what the trunk
    itself says.
    """
    final = graph.final
    alone = sorted((name for name in graph.tensors if name.rstrip("_") == f"{final}.alone"), key=len)
    return extract(graph, graph.inputs, [alone[-1] if alone else final])


def head_prefix(item: Exit) -> str:
    """What the names of a head's values begin with; its place among the exits changes where others are dropped."""
    return f"{item.parameters[0].partition('.')[0]}." if item.parameters else ""


def with_new_heads(graph: Graph, seed: int) -> Graph:
    """``graph`` with every head's parameters as the bank's training would begin with them.

    Raises:
        GraphError: a head's parameters are not those that its description says.
    """
    sites = find_sites(trunk_of(graph), max_live=WIDEST)
    arrays = {}
    for place, item in enumerate(graph.exits):
        site, spec = sites.site(item.site), HeadSpec.parse(item.head)
        new = head_graph(
            spec,
            site,
            num_classes=graph.num_classes,
            scores=graph.scores,
            seed=head_seed(seed, site.value, spec),
            opset=graph.opset,
        ).parameters()
        named = {head_prefix(item) + name: values for name, values in new.items()}
        if set(named) != set(item.parameters):
            raise GraphError(
                f"exit {place} at {item.site!r}: the parameters of its head are not those of {item.head!r}, so it "
                "cannot start anew; leave out passes that rewrite heads (such as fold_batch_norm), or take another "
                "strategy"
            )
        arrays.update(named)
    return with_head_digests(with_parameters(graph, arrays))


def with_head_digests(graph: Graph) -> Graph:
    """``graph`` with the digest of every exit renewed: that of its head's parameters as they are now."""
    exits = []
    for item in graph.exits:
        arrays = {name: np.asarray(graph.constants[name].values) for name in item.parameters}
        exits.append(replace(item, digest=head_digest(arrays)))
    return graph.replace(exits=exits)
