"""Drop exits that cost more than they save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from eexform.errors import PassError
from eexform.ir.arithmetic import node_macs
from eexform.ir.exit_nodes import head_nodes
from eexform.ir.exits import outputs_of
from eexform.ir.graph import Graph
from eexform.passes._contract import Pass, PassContext, PassResult, Skip


@dataclass(frozen=True)
class DropIdleExits(Pass):
    """Drop every exit whose share of samples, times what leaving there saves, is below its own cost.

    Of all samples let ``r`` leave at the exit and ``p`` reach it; let its head cost ``h``, and what still lies behind
    it (trunk and later heads) ``w``. Without the exit, p samples no longer pay h, and r samples pay at most w more. The
    exit goes where ``r * w < p * h``, or where nobody leaves: its samples then continue, and the mean cost can only
    fall. Exits are judged from the last to the first, so that a later head that goes no longer counts as saved work.
    """

    name: ClassVar[str] = "drop_idle_exits"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        if not graph.exits:
            return PassResult(graph, changed=False, skipped=(Skip("graph", "it has no exits"),))
        rates = context.exit_rates
        if rates is None:
            raise PassError("the share of samples that leaves at each exit is not known; a search measures it")
        if len(rates) != len(graph.exits) + 1:
            raise PassError(f"{len(rates)} exit rates for {len(graph.exits)} exits and the final one: out of date")
        costs = _node_costs(graph, context)
        flow, own = graph.flow, head_nodes(graph)
        kept = list(range(len(graph.exits)))
        skipped, notes = [], []
        for place in reversed(range(len(graph.exits))):
            item, rate, reach = graph.exits[place], rates[place], sum(rates[place:])
            later = [value for other in kept if other > place for value in graph.exits[other].values] + [graph.final]
            if own[place] & flow.ancestors(later):
                skipped.append(Skip(item.site, "later exits build on what it says (carry, stick)"))
                continue
            before = flow.ancestors([value for exit_ in graph.exits[: place + 1] for value in exit_.values])
            saved = sum(costs.get(node, 0.0) for node in flow.ancestors(later) - before)
            head = sum(costs.get(node, 0.0) for node in own[place])
            sums = f"{rate:.4g} leave and save {saved:.4g} each, {reach:.4g} pay {head:.4g} for its head"
            if rate > 0 and rate * saved >= reach * head:
                skipped.append(Skip(item.site, f"it pays: {sums}"))
                continue
            kept.remove(place)
            notes.append(f"dropped exit {place} at {item.site}: {sums}")
        if len(kept) == len(graph.exits):
            return PassResult(graph, changed=False, skipped=tuple(skipped))
        draft = graph.copy().gs
        exits = [graph.exits[place] for place in kept]
        known = {tensor.name: tensor for tensor in draft.outputs}
        draft.outputs = [known[name] for name in outputs_of(graph.final, exits)]
        draft.cleanup(remove_unused_graph_inputs=False, remove_unused_node_outputs=False)
        return PassResult(graph.replace(draft, exits=exits), True, tuple(skipped), tuple(notes))


def _node_costs(graph: Graph, context: PassContext) -> Mapping[str, float]:
    if context.node_costs is not None:
        return context.node_costs(graph)
    return {node.name: float(node_macs(node, graph.types) or 0) for node in graph.nodes}
