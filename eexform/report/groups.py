"""What of a model can be made narrower: its groups, the work that falls with each, and why others stay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eexform.ir.arithmetic import node_macs
from eexform.ir.cut import Figures, predicted
from eexform.ir.graph import Graph
from eexform.ir.groups import ChannelGroups, Group, Member

_VECTORS = ("bias", "scale", "mean", "variance")


@dataclass(frozen=True)
class Grouping:
    """A model's groups and their shares of its work.

    Attributes:
        graph: the model.
        groups: its groups, frozen ones included, in topological order.
        macs: multiply-accumulates for one sample.
        params: number of parameters.
        work: MACs of the nodes that a group runs through, by name of the group. A node that several groups run through
            (a convolution reads one and makes another) counts for each of them.
        least: what is left where every prunable group is cut to one unit.
        uncounted: ``(node, operator)`` pairs that the MAC count has no rule for.
    """

    graph: Graph
    groups: ChannelGroups
    macs: int
    params: int
    work: dict[str, int]
    least: Figures
    uncounted: tuple[tuple[str, str], ...]

    @property
    def prunable(self) -> float:
        """Share of the MACs, from 0 to 1, that vanishes where every prunable group is cut to one unit."""
        return 1 - self.least.macs / self.macs if self.macs else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values; the keys are stable."""
        family = {name: key for key, names in self.groups.families().items() for name in names}
        return {
            "name": self.graph.gs.name,
            "digest": self.graph.digest,
            "macs": self.macs,
            "params": self.params,
            "uncounted": [{"node": node, "operator": operator} for node, operator in self.uncounted],
            "prunable": {
                "groups": sum(group.prunable for group in self.groups.groups),
                "macs": self.macs - self.least.macs,
                "params": self.params - self.least.params,
                "share": self.prunable,
            },
            "groups": [self._plain(group, family.get(group.name)) for group in self.groups.groups],
        }

    def _plain(self, group: Group, family: str | None) -> dict[str, Any]:
        return {
            "name": group.name,
            "kind": group.kind,
            "family": family,
            "size": group.size,
            "prunable": group.prunable,
            "why_not": why_not(group),
            "exact": group.exact,
            "inexact": list(group.inexact),
            "macs": self.work[group.name],
            "share": self.work[group.name] / self.macs if self.macs else 0.0,
            "members": [
                {
                    "value": member.slot.value,
                    "axis": member.slot.axis,
                    "role": member.role,
                    "node": member.node,
                    "per_unit": int(member.units.shape[1]),
                }
                for member in group.members
            ],
            "summary": summary(group.members),
        }


def groups(graph: Graph) -> Grouping:
    """The groups of a model and the work that falls with them.

    Args:
        graph: as loaded; heads of a graph with exits take part.
    """
    found = graph.groups
    counted = {node.name: node_macs(node, graph.types) for node in graph.nodes}
    whole = predicted(graph, {}, found)
    least = predicted(graph, {g.name: range(1, g.size) for g in found.groups if g.prunable}, found)
    return Grouping(
        graph=graph,
        groups=found,
        macs=whole.macs,
        params=whole.params,
        work=_work(graph, found.groups, counted),
        least=least,
        uncounted=tuple((node.name, node.op) for node in graph.nodes if counted[node.name] is None),
    )


def why_not(group: Group) -> str | None:
    """Why a group cannot be pruned; None where it can."""
    if group.frozen is not None:
        return group.frozen
    return None if group.size > 1 else "it is one unit: nothing would be left"


def summary(members: Sequence[Member]) -> str:
    """What belongs to a group, in words: ``2 filters, 3 readers, 8 vectors``.

    Filters are the constants that make the units, readers those that take them in, vectors go along with them (bias,
    normalisation); the computed values between them are not counted.
    """
    kinds = Counter(_noun(member.role) for member in members if member.constant)
    order = ("filter", "reader", "vector", "table", "other")
    words = [f"{kinds[noun]} {noun}{'' if kinds[noun] == 1 else 's'}" for noun in order if kinds[noun]]
    return ", ".join(words).replace("others", "other")


def _noun(role: str) -> str:
    return "vector" if role in _VECTORS else role if role in ("filter", "reader", "table") else "other"


def _work(graph: Graph, found: Sequence[Group], counted: Mapping[str, int | None]) -> dict[str, int]:
    """MACs of the nodes that have a value of a group among their operands or results, by name of the group."""
    busy: dict[str, list[str]] = {}
    for node in graph.nodes:
        if counted[node.name]:
            for tensor in (*node.inputs, *node.outputs):
                busy.setdefault(tensor.name, []).append(node.name)
    work = {}
    for group in found:
        nodes = {name for member in group.members for name in busy.get(member.slot.value, ())}
        work[group.name] = int(sum(counted[name] or 0 for name in nodes))
    return work
