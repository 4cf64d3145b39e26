"""Which kernels control flow adds to a network, read off a lowered one."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from eexform.cost_models._contract import Crossing
from eexform.cost_models._fusion import VIEWS
from eexform.cost_models._routing import routing_pair

_SITE = "before_out"  # of the stand-in
_SCORE_BYTES = 4


@dataclass(frozen=True)
class Added:
    """Kernels that lowering to ``if`` adds for one exit.

    Attributes:
        decision: executed by a sample that leaves: confidence, comparison, branch, what is handed out.
        onward: executed besides by a sample that goes on, whatever it takes along: results are put back.
        per_value: executed besides for each live value: its rows are picked.
    """

    decision: int
    onward: int
    per_value: int

    def launches(self, crossing: Crossing) -> tuple[int, int]:
        """Kernels of the decision and of going on."""
        return self.decision, self.onward + self.per_value * len(crossing.live)

    def bytes(self, crossing: Crossing) -> tuple[int, int]:
        """Bytes that these kernels move: scores read and written by each, live values once by those that pick rows."""
        scores = 2 * _SCORE_BYTES * crossing.classes
        carried = 2 * self.per_value * sum(held.bytes for held in crossing.live)
        return self.decision * scores, self.onward * scores + carried


@functools.cache
def added() -> Added:
    """Counted on the stand-in of :mod:`eexform.cost_models._routing`: the same network with and without routing."""
    plain, lowered = routing_pair(2, (1,))
    known = {node.name for node in plain.graph.node}
    outside = [node for node in lowered.graph.node if node.name not in known and node.op_type not in VIEWS]
    branches = [branch for node in outside for branch in _graphs(node)]
    going = [branch for branch in branches if any(node.name in known for node in branch.node)]
    leaving = [branch for branch in branches if branch not in going]
    on = [node for branch in going for node in branch.node if node.name not in known and node.op_type not in VIEWS]
    off = [node for branch in leaving for node in branch.node if node.op_type not in VIEWS]
    picking = [node for node in on if _SITE in node.input]
    return Added(len(outside) + len(off), max(0, len(on) - len(picking) - len(off)), len(picking))


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    return (attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH)
