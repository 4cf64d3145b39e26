"""What a path costs: the trunk up to the exit, every head passed on the way, and the routing, for any cost model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import numpy as np

from eexform.cost_models._contract import CostModel
from eexform.errors import GraphError, need
from eexform.heads import HeadSpec, head_graph
from eexform.ir.arithmetic import node_macs
from eexform.ir.exit_nodes import head_nodes
from eexform.ir.extract import extract
from eexform.ir.graph import Graph

if TYPE_CHECKING:
    from eexform.ir.sites import Site


@dataclass(frozen=True)
class PathCosts:
    """Costs from which every plan over these sites and heads is priced, without looking at a graph again.

    Attributes:
        trunk: cost of the whole trunk, without heads.
        prefix: site -> cost of the trunk from the inputs to that site alone.
        head: (site, head text) -> cost of the head.
        routing: cost of one exit's decision and branch.
        unit: of all of them.
        per_sample: ``False`` for sizes: trunk and every head are paid whatever the path.
        sites: the sites in the order in which a sample meets them.
        cells: the trunk in parts, ``(mask, cost)``; bit i of the mask says that site i needs the part. Without them,
            every site is taken to need all that the sites before it need.
        unknown: ``(node, operator)`` pairs that the model could not count.
        conditions: of the measurement, for measured models.
    """

    trunk: float
    prefix: Mapping[str, float]
    head: Mapping[tuple[str, str], float]
    routing: float = 0.0
    unit: str = ""
    per_sample: bool = True
    sites: tuple[str, ...] = ()
    cells: tuple[tuple[int, float], ...] = ()
    unknown: tuple[tuple[str, str], ...] = ()
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def nested(self) -> bool:
        """Whether every site needs all that the sites before it need, so that ``prefix`` alone is exact."""
        everything = (1 << len(self.sites)) - 1
        return all(mask == everything & ~((mask & -mask) - 1) for mask, _ in self.cells)

    def reach(self, sites: Sequence[str]) -> tuple[float, ...]:
        """What a sample has paid for the trunk when it reaches each of ``sites``, given in the order it meets them.

        Sites on different branches share only what both need: the cost is that of the union.
        """
        if not self.cells:
            return tuple(accumulate((self.prefix[site] for site in sites), max))
        paid, passed = [], 0
        for site in sites:
            passed |= 1 << self._place[site]
            paid.append(sum(cost for mask, cost in self.cells if mask & passed))
        return tuple(paid)

    def reach_matrix(self, chosen: np.ndarray) -> np.ndarray:
        """:meth:`reach` for a population: bool [plans, sites] in, float64 [plans, sites] out.

        Entry [p, s] is what a sample of plan p has paid for the trunk at site s, if it passes there; where s is not
        chosen the entry means nothing.
        """
        chosen = np.asarray(chosen, dtype=bool)
        if not self.cells or self.nested:
            prefix = np.array([self.prefix[site] for site in self.sites], dtype=np.float64)
            return np.broadcast_to(np.maximum.accumulate(prefix), chosen.shape).copy()
        masks = np.array([[mask >> s & 1 for mask, _ in self.cells] for s in range(len(self.sites))], dtype=bool)
        weights = np.array([cost for _, cost in self.cells], dtype=np.float64)
        covered = np.zeros((len(chosen), len(weights)), dtype=bool)
        paid = np.zeros(chosen.shape, dtype=np.float64)
        for place in range(len(self.sites)):
            covered |= chosen[:, place, None] & masks[place]  # [plans, cells]
            paid[:, place] = covered @ weights
        return paid

    def path(self, exits: Sequence[tuple[str, str]], *, heads_free: bool = False) -> tuple[float, ...]:
        """What a sample pays that leaves at exit i; the last entry is for the final exit, the worst case.

        Args:
            exits: (site, head text) pairs in the order in which a sample meets them.
            heads_free: the other convention found in the literature: trunk only, no heads and no routing.
        """
        reached = (*self.reach([site for site, _ in exits]), self.trunk)
        extra = [0.0 if heads_free else self.head[pair] + self.routing for pair in exits]
        if not self.per_sample:
            return (self.trunk + sum(extra),) * (len(exits) + 1)
        charged = [*accumulate(extra), sum(extra)]
        return tuple(trunk + heads for trunk, heads in zip(reached, charged, strict=True))

    @cached_property
    def _place(self) -> dict[str, int]:
        return {site: place for place, site in enumerate(self.sites)}


def path_costs(
    model: CostModel,
    trunk: Graph,
    sites: Sequence[Site],
    heads: Mapping[str, Sequence[HeadSpec]],
    *,
    num_classes: int | None = None,
) -> PathCosts:
    """Price a trunk, its sites and the heads that may be attached there.

    Args:
        model: the cost model.
        trunk: a graph without exits.
        sites: in the order in which a sample meets them.
        heads: site value -> heads.
        num_classes: of the trunk; read from it by default.

    Raises:
        GraphError: the graph has exits, or a shape that the model needs is not known.
    """
    need(not trunk.exits, "path costs are built from the trunk; this graph has exits", GraphError)
    names = tuple(site.value for site in sites)
    whole = model.cost(trunk)
    unknown = dict.fromkeys(whole.unknown)
    if model.additive:
        needed = trunk.flow.ancestors(trunk.outputs)
        nodes = {name: cost for name, cost in whole.nodes.items() if name in needed}
        total, cells = sum(nodes.values()), _cells(trunk, names, nodes)
    else:
        total, cells = _measured_cells(model, trunk, names, whole.total)
    head: dict[tuple[str, str], float] = {}
    classes = trunk.num_classes if num_classes is None else num_classes
    alone = model.overhead()
    for site in sites:
        for spec in heads.get(site.value, ()):
            part = head_graph(spec, site, num_classes=classes, scores=trunk.scores, seed=0, opset=trunk.opset)
            cost = model.cost(part)
            unknown.update(dict.fromkeys(cost.unknown))
            head[site.value, str(spec)] = max(0.0, cost.total - alone)
    prefix = {name: sum(c for mask, c in cells if mask >> place & 1) for place, name in enumerate(names)}
    return PathCosts(
        trunk=total,
        prefix=prefix,
        head=head,
        routing=model.routing(trunk),
        unit=model.unit,
        per_sample=model.per_sample,
        sites=names,
        cells=tuple(sorted(cells)),
        unknown=tuple(unknown),
        conditions=whole.conditions,
    )


def exit_costs(graph: Graph, model: CostModel, *, heads_free: bool = False) -> tuple[float, ...]:
    """What a sample pays that leaves at exit i of a graph with exits; last the final exit, the worst case.

    Args:
        graph: with exits, not lowered.
        model: the cost model.
        heads_free: trunk only, no heads and no routing.
    """
    whole = model.cost(graph)
    routing = 0.0 if heads_free else model.routing(graph)
    if not model.per_sample:
        heads = frozenset().union(*head_nodes(graph)) if heads_free else frozenset()
        total = sum(cost for name, cost in whole.nodes.items() if name not in heads) if heads else whole.total
        return (total + routing * len(graph.exits),) * (len(graph.exits) + 1)
    ends = [(item.site,) if heads_free else item.values for item in graph.exits]
    paid = []
    if model.additive:
        skipped = frozenset().union(*head_nodes(graph)) if heads_free else frozenset()
        for place in range(len(ends) + 1):
            values = [*chain(*ends[: place + 1]), *([graph.final] if place == len(ends) else [])]
            needed = graph.flow.ancestors(values) - skipped
            paid.append(sum(cost for name, cost in whole.nodes.items() if name in needed))
    else:
        for place in range(len(ends)):
            paid.append(model.cost(extract(graph, graph.inputs, [*chain(*ends[: place + 1])])).total)
        last = model.cost(extract(graph, graph.inputs, [graph.final])).total if heads_free else whole.total
        paid = list(accumulate([*paid, last], max))
    return tuple(cost + routing * min(place + 1, len(ends)) for place, cost in enumerate(paid))


def _cells(trunk: Graph, sites: Sequence[str], nodes: Mapping[str, float]) -> list[tuple[int, float]]:
    """Nodes grouped by the sites that need them: ``(mask, cost)`` with bit i for site i; nodes of no site left out."""
    flow = trunk.flow
    weighted = flow.bits(name for name, cost in nodes.items() if cost)
    masks: dict[str, int] = {}
    for place, site in enumerate(sites):
        for name in flow.names(flow.ancestor_bits([site]) & weighted):
            masks[name] = masks.get(name, 0) | 1 << place
    cells: dict[int, float] = {}
    for name, mask in masks.items():
        cells[mask] = cells.get(mask, 0) + nodes[name]
    return list(cells.items())


def _measured_cells(
    model: CostModel, trunk: Graph, sites: Sequence[str], total: float
) -> tuple[float, list[tuple[int, float]]]:
    """Cells of a model that is not additive: the stretch from site to site is measured as a difference of sub-graphs.

    Where sites lie on different branches a stretch belongs to several cells; its cost is divided between them by
    multiply-accumulates. Costs never fall along the way, so noise cannot make an earlier exit dearer than a later one.
    """
    flow = trunk.flow
    before, reached = 0, 0.0
    macs = {node.name: float(node_macs(node, trunk.types) or 0) + 1.0 for node in trunk.nodes}
    cells: dict[int, float] = {}
    needs = [flow.ancestor_bits([site]) for site in sites]
    for place in range(len(sites)):
        union = before | needs[place]
        # the sites whose sub-graphs no other one contains: together they need just the union
        tips = [
            site
            for other, site in enumerate(sites[: place + 1])
            if not any(
                needs[other] | needs[wider] == needs[wider] and (needs[other] != needs[wider] or wider > other)
                for wider in range(place + 1)
                if wider != other
            )
        ]
        now = max(reached, model.cost(extract(trunk, trunk.inputs, tips)).total)
        stretch: dict[int, float] = {}
        for name in flow.names(union & ~before):
            bit = flow.bits([name])
            mask = sum(1 << other for other, needed in enumerate(needs) if needed & bit)
            stretch[mask] = stretch.get(mask, 0.0) + macs[name]
        work = sum(stretch.values())
        for mask, share in stretch.items():
            cells[mask] = cells.get(mask, 0.0) + (now - reached) * share / work
        before, reached = union, now if stretch else reached
    return max(total, reached), list(cells.items())
