"""What a graph costs in parts, for people: the trunk from one place to the next, and what each exit adds to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from eexform.cost_models._contract import Cost, CostModel
from eexform.cost_models.paths import along, between, boundary, exit_costs, path_costs, routing_of
from eexform.ir.exit_nodes import head_nodes
from eexform.ir.extract import extract
from eexform.ir.graph import Graph
from eexform.ir.sites import Site


@dataclass(frozen=True)
class Stretch:
    """The part of a graph between one place and the next: names of nodes.

    Attributes:
        end: the site behind it; empty where it ends in the graph's own classifier.
        trunk: nodes of the trunk that no stretch before it needed.
        head: nodes of the head there; none where there is no exit.
    """

    end: str
    trunk: frozenset[str]
    head: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Part:
    """What a stretch costs, in the model's unit.

    Attributes:
        trunk: of its trunk; the first one's contains what a call costs. Of a model that combines by ``max``, the most
            that was held from the inputs to here.
        head: of its head.
        decision: paid beside the head by every sample that gets there.
        onward: paid by every sample that goes on.
        path: what a sample pays that leaves there, from the inputs on; for the last part, one that never leaves.
            Measured models time a path as a whole, so their parts add up to it within the noise only.
    """

    trunk: float
    head: float = 0.0
    decision: float = 0.0
    onward: float = 0.0
    path: float = 0.0


def stretches(graph: Graph, sites: Sequence[str]) -> tuple[Stretch, ...]:
    """A graph in stretches.

    Args:
        graph: one with exits is divided at its own, heads apart; what follows is for one without.
        sites: where to divide it, in the order in which a sample meets them.
    """
    flow = graph.flow
    heads = head_nodes(graph)
    every = frozenset().union(*heads)
    known: frozenset[str] = every
    found = []
    for place, site in enumerate([item.site for item in graph.exits] or sites):
        own = flow.ancestors([site]) - known
        known |= own
        found.append(Stretch(site, own, heads[place] if heads else frozenset()))
    return (*found, Stretch("", flow.ancestors([graph.final]) - known))


def divide(model: CostModel, graph: Graph, sites: Sequence[Site]) -> tuple[Cost, tuple[Part, ...]]:
    """A graph's cost, and that of each of its :func:`stretches`.

    Args:
        model: the cost model.
        graph: with exits (not lowered), or without.
        sites: as for :func:`stretches`.

    Returns:
        The cost of the whole, every head included and routing not; one part per stretch.
    """
    if model.additive:
        return _added(model, graph, [site.value for site in sites])
    if graph.exits:
        return _with_exits(model, graph)
    costs = path_costs(model, graph, sites, {})
    whole = Cost(costs.trunk, {}, costs.unknown, costs.estimated, {}, costs.conditions)
    reached = [*costs.reach([site.value for site in sites]), costs.trunk]
    return whole, tuple(
        Part(trunk, path=path) for trunk, path in zip(_steps(model, reached), accumulate(reached, max), strict=True)
    )


def _added(model: CostModel, graph: Graph, sites: Sequence[str]) -> tuple[Cost, tuple[Part, ...]]:
    """Every figure is a sum of nodes; the graph is costed once."""
    whole, call = model.cost(graph), model.overhead()
    pieces = stretches(graph, sites)
    own = [sum(whole.nodes.get(name, 0.0) for name in piece.trunk) for piece in pieces]
    heads = [sum(whole.nodes.get(name, 0.0) for name in piece.head) for piece in pieces]
    routing = routing_of(model, graph)
    decided = [*(one.decision for one in routing), *([0.0] * (len(pieces) - len(routing)))]
    onward = [*(one.onward for one in routing), *([0.0] * (len(pieces) - len(routing)))]
    own[0] += call
    if graph.exits:
        branches = between(model, graph)
        own = [cost + branch.total for cost, branch in zip(own, branches, strict=True)]
        whole = replace(
            whole,
            unknown=tuple(dict.fromkeys(pair for one in (whole, *branches) for pair in one.unknown)),
            estimated=tuple(dict.fromkeys(pair for one in (whole, *branches) for pair in one.estimated)),
        )
    if model.per_sample:
        here = [head + decision for head, decision in zip(heads[:-1], decided[:-1], strict=True)]
        paths = along([*accumulate(own)], here, onward[:-1], model.combine)
    else:
        paths = (whole.total + sum(decided),) * len(pieces)
    return whole, tuple(map(Part, own, heads, decided, onward, paths))


def _with_exits(model: CostModel, graph: Graph) -> tuple[Cost, tuple[Part, ...]]:
    """Sub-graphs costed apart: paths as :func:`exit_costs` has them; trunk and heads on their own, all in one go."""
    paths, places = exit_costs(graph, model), [item.site for item in graph.exits]
    alone = [
        extract(graph, boundary(graph, nodes), item.values)
        for item, nodes in zip(graph.exits, head_nodes(graph), strict=True)
    ]
    ends = [*(places[: place + 1] for place in range(len(places))), [graph.final]]
    trunks = [] if model.combine == "max" else [extract(graph, graph.inputs, values) for values in ends]
    whole, *found = model.costs([graph, *alone, *trunks])
    call = 0.0 if model.combine == "max" else model.overhead()
    heads = [max(0.0, one.total - call) for one in found[: len(alone)]]
    reached = [one.total for one in found[len(alone) :]] or list(exit_costs(graph, model, heads_free=True))
    if model.combine == "sum" and frozenset().union(*head_nodes(graph)) & graph.flow.ancestors([graph.final]):
        reached[-1] = max(reached[-2], reached[-1] - sum(heads))  # carried scores: the last classifier needs every head
    own = _steps(model, reached)
    routing = routing_of(model, graph)
    parts = [
        Part(trunk, head, one.decision, one.onward, path)
        for trunk, head, one, path in zip(own[:-1], heads, routing, paths[:-1], strict=True)
    ]
    return whole, (*parts, Part(own[-1], path=paths[-1]))


def _steps(model: CostModel, reached: Sequence[float]) -> list[float]:
    """What each stretch adds to what was reached before it; of what is held, the figure itself."""
    if model.combine == "max":
        return [*accumulate(reached, max)]
    return [reached[0], *(max(0.0, after - before) for before, after in pairwise(reached))]
