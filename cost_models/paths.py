"""What a path costs: the trunk up to the exit, every head passed on the way, and the routing, for any cost model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from eexform.backends.blocks import split
from eexform.cost_models._contract import Cost, CostModel, Crossing, Held, Routing
from eexform.errors import GraphError, need
from eexform.heads import HeadSpec, head_graph
from eexform.ir.arithmetic import node_macs, size_of
from eexform.ir.exit_nodes import head_nodes
from eexform.ir.extract import extract
from eexform.ir.graph import Graph

if TYPE_CHECKING:
    from eexform.ir.sites import Site


def along(
    reached: Sequence[float],
    here: Sequence[float],
    going: Sequence[float],
    combine: Literal["sum", "max"],
    between: Sequence[float] = (),
) -> tuple[float, ...]:
    """What a path costs that ends at exit i; the last entry is the final exit.

    Args:
        reached: the trunk up to exit i, the whole trunk last.
        here: head and decision of exit i.
        going: what a sample pays that goes on behind exit i.
        combine: how the parts make the whole.
        between: what the trunk costs more between exit i - 1 and exit i, because branches begin and end there.
    """
    if combine == "sum":
        reached = [r + b for r, b in zip(reached, accumulate(between or [0.0] * len(reached)), strict=True)]
        passed = [0.0, *accumulate(h + g for h, g in zip(here, going, strict=True))]
        return tuple(r + p + h for r, p, h in zip(reached, passed, (*here, 0.0), strict=True))
    passed = [0.0, *accumulate((max(h, g) for h, g in zip(here, going, strict=True)), max)]
    return tuple(max(parts) for parts in zip(accumulate(reached, max), passed, (*here, 0.0), strict=True))


@dataclass(frozen=True)
class PathCosts:
    """Costs from which every plan over these sites and heads is priced, without looking at a graph again.

    Attributes:
        trunk: cost of the whole trunk, without heads.
        prefix: site -> cost of the trunk from the inputs to that site alone.
        head: (site, head text) -> cost of the head.
        decision: site -> paid beside the head by every sample that reaches the exit; absent is 0.
        onward: site -> paid by every sample that goes on behind the exit; absent is 0.
        between: (site of the exit before or "", site of the next or "") -> what the trunk costs more from one to the
            other because branches begin and end there; absent is 0.
        unit: of all of them.
        per_sample: ``False`` for sizes: trunk and every head are paid whatever the path.
        combine: ``sum``, or ``max`` for memory: of all parts on a path the largest counts, a head with its decision.
        sites: the sites in the order in which a sample meets them.
        cells: the trunk in parts, ``(mask, cost)``; bit i of the mask says that site i needs the part. Without them,
            every site is taken to need all that the sites before it need.
        unknown: ``(node, operator)`` pairs that the model could not count.
        estimated: ``(node, why)`` pairs that the model has no data for.
        conditions: of the measurement, for measured models.
    """

    trunk: float
    prefix: Mapping[str, float]
    head: Mapping[tuple[str, str], float]
    decision: Mapping[str, float] = field(default_factory=dict)
    onward: Mapping[str, float] = field(default_factory=dict)
    between: Mapping[tuple[str, str], float] = field(default_factory=dict)
    unit: str = ""
    per_sample: bool = True
    combine: Literal["sum", "max"] = "sum"
    sites: tuple[str, ...] = ()
    cells: tuple[tuple[int, float], ...] = ()
    unknown: tuple[tuple[str, str], ...] = ()
    estimated: tuple[tuple[str, str], ...] = ()
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
        if heads_free:
            return (self.trunk,) * len(reached) if not self.per_sample else reached
        here = [self.head[pair] + self.decision.get(pair[0], 0.0) for pair in exits]
        if not self.per_sample:
            return (self.trunk + sum(here),) * len(reached)
        going = [self.onward.get(site, 0.0) for site, _ in exits]
        between = [self.between.get(pair, 0.0) for pair in pairwise(["", *(site for site, _ in exits), ""])]
        return along(reached, here, going, self.combine, between if exits else ())

    def with_fee(self, fee: float) -> PathCosts:
        """The same where every exit that is passed counts ``fee`` of the trunk more; memory does not add up so."""
        if self.combine == "max" or not fee:
            return self
        sites = dict.fromkeys(site for site, _ in self.head)
        return replace(self, decision={site: self.decision.get(site, 0.0) + fee * self.trunk for site in sites})

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
    classes = trunk.num_classes if num_classes is None else num_classes
    parts = {
        (site.value, str(spec)): head_graph(
            spec, site, num_classes=classes, scores=trunk.scores, seed=0, opset=trunk.opset
        )
        for site in sites
        for spec in heads.get(site.value, ())
    }
    if model.combine == "max":
        live = {site.value: site.live for site in sites}
        parts = {pair: _holding(part) if pair[0] in live[pair[0]] else part for pair, part in parts.items()}
    stretches = [] if model.additive else _up_to(model, trunk, sites)
    whole, *rest = model.costs([trunk, *stretches, *parts.values()])
    ends, costed = rest[: len(stretches)], rest[len(stretches) :]
    alone = model.overhead()
    if model.additive:
        needed = trunk.flow.ancestors(trunk.outputs)
        nodes = {name: cost for name, cost in whole.nodes.items() if name in needed}
        total, cells = sum(nodes.values()) + alone, _cells(trunk, names, nodes)
        if alone:
            cells.append(((1 << len(names)) - 1, alone))
    elif model.combine == "max":
        total, cells = whole.total, []
    else:
        total, cells = _measured_cells(trunk, names, [end.total for end in ends], whole.total)
    if model.combine == "max":
        prefix = dict(zip(names, accumulate((end.total for end in ends), max), strict=True))
    else:
        prefix = {name: sum(c for mask, c in cells if mask >> place & 1) for place, name in enumerate(names)}
    crossings = crossings_of(
        model, trunk, [(site.value, site.live) for site in sites if heads.get(site.value)], classes
    )
    routing = [model.routing(trunk, crossing) for crossing in crossings]
    branches = _all_between(model, trunk, crossings)
    found: list[Cost] = [whole, *costed, *branches.values()]
    return PathCosts(
        trunk=total,
        prefix=prefix,
        head={pair: max(0.0, cost.total - alone) for pair, cost in zip(parts, costed, strict=True)},
        decision={crossing.site: one.decision for crossing, one in zip(crossings, routing, strict=True)},
        onward={crossing.site: one.onward for crossing, one in zip(crossings, routing, strict=True)},
        between={pair: cost.total for pair, cost in branches.items()},
        unit=model.unit,
        per_sample=model.per_sample,
        combine=model.combine,
        sites=names,
        cells=tuple(sorted(cells)),
        unknown=tuple(dict.fromkeys(pair for cost in found for pair in cost.unknown)),
        estimated=tuple(dict.fromkeys(pair for cost in found for pair in cost.estimated)),
        conditions=whole.conditions,
    )


def exit_costs(graph: Graph, model: CostModel, *, heads_free: bool = False) -> tuple[float, ...]:
    """What a sample pays that leaves at exit i of a graph with exits; last the final exit, the worst case.

    Args:
        graph: with exits, not lowered.
        model: the cost model.
        heads_free: trunk only, no heads and no routing.
    """
    as_a_whole = None if heads_free else model.paths(graph)
    if as_a_whole is not None:
        return as_a_whole
    heads = head_nodes(graph)
    every = frozenset().union(*heads)
    if not model.per_sample:
        whole = model.cost(graph)
        total = whole.total - sum(whole.nodes[name] for name in every) if heads_free else whole.total
        if not heads_free:
            total += sum(one.decision for one in routing_of(model, graph))
        return (total,) * (len(graph.exits) + 1)
    if model.combine == "max":
        return _peaks(graph, model, heads_free)
    ends = [(item.site,) if heads_free else item.values for item in graph.exits]
    paid = []
    if model.additive:
        skipped = every if heads_free else frozenset()
        whole = model.cost(graph)
        for place in range(len(ends) + 1):
            values = [*chain(*ends[: place + 1]), *([graph.final] if place == len(ends) else [])]
            needed = graph.flow.ancestors(values) - skipped
            paid.append(sum(cost for name, cost in whole.nodes.items() if name in needed) + model.overhead())
    else:
        parts = [extract(graph, graph.inputs, [*chain(*ends[: place + 1])]) for place in range(len(ends))]
        *first, last = model.costs([*parts, extract(graph, graph.inputs, [graph.final]) if heads_free else graph])
        paid = list(accumulate([*(one.total for one in first), last.total], max))
    if heads_free:
        return tuple(paid)
    routing = routing_of(model, graph)
    apart = [one.total for one in between(model, graph)]
    return along(paid, [one.decision for one in routing], [one.onward for one in routing], "sum", apart)


def routing_of(model: CostModel, graph: Graph) -> list[Routing]:
    """What every exit of a graph costs beside its head."""
    found = crossings_of(model, graph, _exits_of(graph, model), graph.num_classes)
    return [model.routing(graph, crossing) for crossing in found] or [Routing() for _ in graph.exits]


def between(model: CostModel, graph: Graph) -> list[Cost]:
    """What the trunk costs more from exit to exit, the final classifier last (see :meth:`CostModel.between`)."""
    found = crossings_of(model, graph, _exits_of(graph, model), graph.num_classes)
    if not found or type(model).between is CostModel.between:
        return [Cost(0.0)] * (len(graph.exits) + 1)
    return [model.between(graph, before, after) for before, after in pairwise([None, *found, None])]


def _peaks(graph: Graph, model: CostModel, heads_free: bool) -> tuple[float, ...]:
    """:func:`exit_costs` of a model that combines by ``max``: each stretch with what is held for later."""
    trunk = extract(graph, graph.inputs, [graph.final])
    crossings = _exits_of(graph, model)
    held = [_outputs(trunk, [site, *live]) for site, live in crossings]
    reached = [model.cost(extract(trunk, trunk.inputs, values)).total for values in held]
    reached = [*accumulate([*reached, model.cost(trunk).total], max)]
    if heads_free:
        return tuple(reached)
    routing = routing_of(model, graph)
    here = []
    for item, nodes, one, (_, live) in zip(graph.exits, head_nodes(graph), routing, crossings, strict=True):
        head = extract(graph, boundary(graph, nodes), item.values)
        head = _holding(head) if item.site in live else head
        here.append(model.cost(head).total + one.decision)
    return along(reached, here, [one.onward for one in routing], "max")


def _holding(head: Graph) -> Graph:
    """A head whose input is needed behind it, so that its memory is not free before the end."""
    draft = head.gs.copy()
    draft.outputs = [*draft.outputs, *(value for value in draft.inputs if value not in draft.outputs)]
    return head.replace(draft)


def boundary(graph: Graph, nodes: Collection[str]) -> list[str]:
    """Values that the nodes of a head read and do not make."""
    flow, constants = graph.flow, graph.constants
    inside = {tensor.name for name in nodes for tensor in flow.nodes[name].outputs}
    read = (value for name in flow.topological if name in nodes for value in flow.reads(name))
    return list(dict.fromkeys(value for value in read if value not in inside and value not in constants))


def _exits_of(graph: Graph, model: CostModel) -> list[tuple[str, tuple[str, ...]]]:
    """Site and live set of each exit; not asked for where the model has no routing (a graph need not be lowered)."""
    if not graph.exits or not _routes(model):
        return [(item.site, ()) for item in graph.exits]
    return [(item.site, block.live) for item, block in zip(graph.exits, split(graph), strict=False)]


def _routes(model: CostModel) -> bool:
    return type(model).routing is not CostModel.routing


def crossings_of(
    model: CostModel, graph: Graph, places: Sequence[tuple[str, tuple[str, ...]]], classes: int
) -> list[Crossing]:
    """Sites with what is carried behind them; none for models without routing, which need no sizes."""
    if not _routes(model):
        return []
    bindings = getattr(model, "bindings", {})

    def held(value: str) -> Held:
        found = graph.types[value]
        dims = found.shape if found.batch_axis is None else found.sample_shape
        if dims is None or found.dtype is None:
            raise GraphError(f"value {value!r}: its shape or element type is not known, so routing has no cost")
        return Held(tuple(size_of(dim, value, bindings) for dim in dims), found.dtype.itemsize)

    return [Crossing(site, held(site), tuple(map(held, live)), classes, tuple(live)) for site, live in places]


def _all_between(model: CostModel, trunk: Graph, crossings: Sequence[Crossing]) -> dict[tuple[str, str], Cost]:
    """Extra cost of the trunk between any two exits of a plan, where each needs all that the ones before it need."""
    if type(model).between is CostModel.between:
        return {}
    needs = {crossing.site: trunk.flow.ancestor_bits([crossing.site]) for crossing in crossings}
    places: list[Crossing | None] = [None, *crossings]
    found = {}
    for place, before in enumerate(places):
        for after in [*places[place + 1 :], None]:
            if before is after:  # nothing but the trunk
                continue
            if before is not None and after is not None and needs[before.site] & ~needs[after.site]:
                continue  # on different branches: there is no stretch from one to the other
            pair = ("" if before is None else before.site, "" if after is None else after.site)
            found[pair] = model.between(trunk, before, after)
    return found


def _outputs(trunk: Graph, values: Sequence[str]) -> list[str]:
    """Those of ``values`` that a node computes, each once: a part of a graph cannot end in what is given to it."""
    made = {t.name for node in trunk.nodes for t in node.outputs}
    return [value for value in dict.fromkeys(values) if value in made]


def _up_to(model: CostModel, trunk: Graph, sites: Sequence[Site]) -> list[Graph]:
    """Per site the sub-graph that has run when a sample gets there, for models that are not additive."""
    if model.combine == "max":  # what is carried behind the site is held, so it must not be given up on the way
        return [extract(trunk, trunk.inputs, _outputs(trunk, [site.value, *site.live])) for site in sites]
    needs = [trunk.flow.ancestor_bits([site.value]) for site in sites]
    parts = []
    for place in range(len(sites)):
        # the sites whose sub-graphs no other one contains: together they need just the union
        tips = [
            site.value
            for other, site in enumerate(sites[: place + 1])
            if not any(
                needs[other] | needs[wider] == needs[wider] and (needs[other] != needs[wider] or wider > other)
                for wider in range(place + 1)
                if wider != other
            )
        ]
        parts.append(extract(trunk, trunk.inputs, tips))
    return parts


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
    trunk: Graph, sites: Sequence[str], ends: Sequence[float], total: float
) -> tuple[float, list[tuple[int, float]]]:
    """Cells of a model that is not additive: the stretch from site to site is a difference of sub-graphs.

    Where sites lie on different branches a stretch belongs to several cells; its cost is divided between them by
    multiply-accumulates. Costs never fall along the way, so noise cannot make an earlier exit dearer than a later one.

    Args:
        trunk: the whole.
        sites: in the order in which a sample meets them.
        ends: cost of all that has run when a sample gets to each site.
        total: cost of the whole.
    """
    flow = trunk.flow
    before, reached = 0, 0.0
    macs = {node.name: float(node_macs(node, trunk.types) or 0) + 1.0 for node in trunk.nodes}
    cells: dict[int, float] = {}
    needs = [flow.ancestor_bits([site]) for site in sites]
    for place, end in enumerate(ends):
        union = before | needs[place]
        now = max(reached, end)
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
