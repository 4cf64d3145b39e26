"""Which nodes and parameters belong to which exit's head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from eexform.ir.graph import Graph

_PREFIX = re.compile(r"exit\d+\.")


def head_nodes(graph: Graph) -> tuple[frozenset[str], ...]:
    """Names of the nodes that only exist for exit i: its head, and the nodes that carry earlier scores
    (or confidences) into it.

    A node counts for the first exit that needs it; what the trunk runs anyway to reach the exit's site (or an earlier
    one) is no part of it.
    """
    flow = graph.flow
    known: set[str] = set()
    found = []
    for item in graph.exits:
        known |= flow.ancestors([item.site])
        own = frozenset(flow.ancestors(item.values) - known)
        known |= own
        found.append(own)
    return tuple(found)


def trunk_nodes(graph: Graph) -> frozenset[str]:
    """Names of the nodes that the final exit needs and that belong to no head."""
    heads = frozenset().union(*head_nodes(graph))
    return graph.flow.ancestors([graph.final]) - heads


def head_digest(parameters: Mapping[str, np.ndarray]) -> str:
    """sha-256 of a head's parameters, whether named as in the stand-alone head or as grafted (``exit3.`` in front)."""
    from eexform.ir.digest import digest_arrays

    prefixes = {match[0] if (match := _PREFIX.match(name)) else "" for name in parameters}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    return digest_arrays({name.removeprefix(prefix): values for name, values in parameters.items()})
