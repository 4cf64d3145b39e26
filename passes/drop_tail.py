"""Make an exit the final one and delete the trunk behind it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import onnx_graphsurgeon as gs

from eexform.backends.metadata import FORM, with_plan
from eexform.errors import OptionError, need
from eexform.heads import HeadSpec
from eexform.ir.exit_nodes import head_nodes
from eexform.ir.exits import Exit, outputs_of
from eexform.ir.graph import Graph
from eexform.passes._contract import Pass, PassContext, PassResult, Skip
from eexform.tunables import Integer, tunable

PREFIX = "tail."
"""Goes in front of the names of what was the exit's head, so that a new exit with its number finds them free."""


@dataclass(frozen=True)
class DropTail(Pass):
    """Make an exit the final one; delete the trunk behind it, and the exits there.

    Useful when an exit agrees with the final classifier on almost every sample: the worst case becomes cheaper and the
    file smaller. Every sample that used to go on gets the scores that it would have got with this exit's threshold at
    ``always``, and the exits before it decide as they did.

    The scores are the exit's own, as they were: with ``carry`` those that remember what the exits before said, and
    without it *not* divided by the exit's temperature, which only ever scaled its confidence. Nothing is decided by the
    final classifier's confidence, which is read off the scores at temperature 1; a gate that the head had is dropped.
    The final output keeps its name.
    """

    name: ClassVar[str] = "drop_tail"

    exit: int = tunable(
        lambda graph: Integer(0, len(graph.exits)),
        help="index of the exit that becomes final; the number of exits keeps them all",
        domain_help="integer 0..number of exits",
    )

    def __post_init__(self) -> None:
        need(self.exit >= 0, f"exit: {self.exit} is no index of an exit; the first one is 0", OptionError)

    def requires(self, graph: Graph) -> None:
        need(FORM not in graph.metadata, "the graph is lowered already; put drop_tail before lower")
        count = len(graph.exits)
        need(count > 0, "the graph has no exits, so none can become final; put drop_tail behind insert_exits")
        need(self.exit <= count, f"there is no exit {self.exit}: give 0..{count - 1}, or {count} to keep them all")
        if self.exit < count:
            item = graph.exits[self.exit]
            shape, wanted = graph.types[item.logits].shape, graph.types[graph.final].shape
            need(
                shape is not None and wanted is not None and shape[-1] == wanted[-1],
                f"exit {self.exit} at {item.site!r} gives scores {graph.types[item.logits]}, the final classifier "
                f"{graph.types[graph.final]}: only an exit with the same classes can become final",
            )

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        if self.exit == len(graph.exits):
            why = f"all {self.exit} exits are kept, and so is the final classifier"
            return PassResult(graph, changed=False, skipped=(Skip("graph", why),))
        item, kept = graph.exits[self.exit], graph.exits[: self.exit]
        own = head_nodes(graph)[self.exit]
        draft = graph.copy().gs
        made = {tensor.name: tensor for node in draft.nodes for tensor in node.outputs}
        final = made[item.logits]
        final.dtype, final.shape = graph.types[item.logits].dtype, list(graph.types[item.logits].shape or ())
        draft.outputs = [final, *(made[name] for name in outputs_of(item.logits, kept)[1:])]
        draft.cleanup(remove_unused_graph_inputs=False, remove_unused_node_outputs=False)
        prefix = _rename(draft, own, self.exit)
        final.name = graph.final  # free: what had it lay behind the exit
        metadata = with_plan(graph.metadata, tail=_described(item, prefix))
        shorter = graph.replace(draft, exits=kept, metadata=metadata)
        gone = len(graph.nodes) - len(shorter.nodes)
        note = f"exit {self.exit} at {item.site} with {item.head} is final; {gone} of {len(graph.nodes)} nodes went"
        return PassResult(shorter, changed=True, notes=(note,))

    def ensures(self, graph: Graph) -> None:
        need(len(graph.exits) <= self.exit, f"{len(graph.exits)} exits are left in front of exit {self.exit}")
        need(
            graph.outputs == outputs_of(graph.final, graph.exits),
            f"the outputs {list(graph.outputs)} are not the final scores, those of every exit and the confidences",
        )
        needed = graph.flow.ancestors(graph.outputs)
        dead = [node.name for node in graph.nodes if node.name not in needed]
        need(not dead, f"nodes that no output needs are still there: {dead[:5]}")


def _described(item: Exit, prefix: str) -> dict[str, object]:
    """What a verification needs to build the new final classifier from the original model."""
    spec = replace(HeadSpec.parse(item.head), gate=False)
    return {"site": item.site, "head": str(spec), "prefix": prefix, "temperature": item.temperature}


def _rename(draft: gs.Graph, own: frozenset[str], place: int) -> str:
    """Give the head's nodes, values and constants names of the trunk's; the prefix that they have now."""
    prefix = PREFIX
    names = {tensor.name for node in draft.nodes for tensor in (*node.inputs, *node.outputs)}
    while any(name.startswith(prefix) for name in names | {node.name for node in draft.nodes}):
        prefix = f"_{prefix}"
    old = f"exit{place}."
    results = {tensor.name for tensor in draft.outputs[1:]}  # an earlier exit's scores, which may pass through here
    for node in draft.nodes:
        if node.name not in own:
            continue
        node.name = prefix + node.name.removeprefix(old)
        for tensor in node.outputs:
            if tensor.name and tensor.name not in results:
                tensor.name = prefix + tensor.name.removeprefix(old)
        for tensor in node.inputs:
            alone = all(reader.name in own or reader.name.startswith(prefix) for reader in tensor.outputs)
            if isinstance(tensor, gs.Constant) and alone and not tensor.name.startswith(prefix):
                tensor.name = prefix + tensor.name.removeprefix(old)
    return prefix
