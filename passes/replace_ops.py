"""Replace operators that a device, or encrypted arithmetic, does not have by others that it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from eexform.errors import OptionError, need, suggest
from eexform.ir.emit import Emitter
from eexform.ir.graph import Graph
from eexform.ir.order import ordered
from eexform.passes._contract import Pass, PassContext, PassResult, Skip
from eexform.pruning.activations import FUNCTIONS, Activation, find_activations, operator
from eexform.pruning.pools import average_instead, is_max_pool
from eexform.pruning.substitutions import CLOSEST, SUBSTITUTES, Fit
from eexform.tunables import parameter

MAX_POOL, AVERAGE_POOL = "max_pool", "average_pool"


@dataclass(frozen=True)
class ReplaceOps(Pass):
    """Replace activations and pools by others, by name or to fit a white-list of operators.

    ``replace`` says what becomes what: ``{hard_swish = "relu", max_pool = "average_pool"}``. Activations are found as
    single operators and as the several nodes that exporters write for one. ``allowed`` lists the ONNX operators that
    may be there: what is not on it is replaced by the closest function whose operators are, and what stays outside is
    reported. Both together: ``replace`` goes first.

    ``polynomial`` is the least-squares fit of ``degree`` on ``interval`` to the function that it replaces; what lies
    outside the interval is extrapolated, so choose it to hold what the layers give. ``square`` is x * x. Scores change:
    fine-tune, or distil, afterwards.
    """

    name: ClassVar[str] = "replace_ops"

    replace: Mapping[str, str] = parameter(default={}, help='what becomes what, e.g. {hard_swish = "relu"}')
    allowed: tuple[str, ...] = parameter(default=(), help="ONNX operators that may stay; none listed: all may")
    degree: int = parameter(default=2, help="of polynomials")
    interval: tuple[float, ...] = parameter(default=(-4.0, 4.0), help="on which polynomials are fitted")

    def __post_init__(self) -> None:
        need(isinstance(self.replace, Mapping), f"replace: expected a table, found {self.replace!r}", OptionError)
        need(not isinstance(self.allowed, str), f"allowed: expected a list, found {self.allowed!r}", OptionError)
        chosen = {str(old): str(new) for old, new in self.replace.items()}
        for old, new in chosen.items():
            _check_pair(old, new, chosen)
        for name in self.allowed:
            known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
            need(
                "::" in name or name in known,
                f"allowed: {name!r} is no ONNX operator: {suggest(name, known)}",
                OptionError,
            )
        need(1 <= self.degree <= 15, f"degree: {self.degree} is not 1..15; 2 or 3 is usual", OptionError)
        ends = tuple(map(float, self.interval))
        valid = len(ends) == 2 and np.isfinite(ends).all() and ends[0] < ends[1]
        need(valid, f"interval: {list(self.interval)} is not [low, high] with low < high", OptionError)
        object.__setattr__(self, "replace", chosen)
        object.__setattr__(self, "allowed", tuple(dict.fromkeys(map(str, self.allowed))))
        object.__setattr__(self, "interval", ends)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        if not self.replace and not self.allowed:
            return PassResult(
                graph, changed=False, skipped=(Skip("graph", "neither replace nor allowed says anything"),)
            )
        work = _Work(graph, self)
        work.activations()
        work.pools()
        work.absent()
        if not work.notes:
            return PassResult(graph, changed=False, skipped=(*work.skipped, *self._outside(graph, work)))
        need(
            not graph.exits,
            f"the graph has {len(graph.exits)} exits; put replace_ops before insert_exits: heads would see other "
            "values than they were trained on",
        )
        work.draft.nodes = ordered(work.draft.nodes)
        work.draft.cleanup(remove_unused_graph_inputs=False, remove_unused_node_outputs=False)
        replaced = graph.replace(work.draft)
        skipped = (*work.skipped, *self._outside(replaced, work))
        return PassResult(replaced, True, skipped, tuple(work.notes))

    def _outside(self, graph: Graph, work: _Work) -> list[Skip]:
        """The nodes that are not on the white-list, those with a reason of their own left out."""
        if not self.allowed:
            return []
        said = {skip.where for skip in work.skipped}
        return [
            Skip(node.name, f"{operator(node)} is not on the white-list, and nothing here can stand in for it")
            for node in graph.nodes
            if operator(node) not in self.allowed and node.name not in said
        ]


class _Work:
    """One run of the pass: the draft that changes, and what is to be said."""

    def __init__(self, graph: Graph, step: ReplaceOps) -> None:
        self.graph, self.step = graph, step
        self.draft = graph.copy().gs
        self.emitter = Emitter(self.draft)
        self.nodes = {node.name: node for node in self.draft.nodes}
        self.values = {tensor.name: tensor for tensor in self.draft.inputs}
        self.values.update((tensor.name, tensor) for node in self.draft.nodes for tensor in node.outputs)
        self.seen: set[str] = set()
        self.skipped: list[Skip] = []
        self.notes: list[str] = []

    # -- activations ---------------------------------------------------------------------------------------------------

    def activations(self) -> None:
        sources = frozenset(FUNCTIONS if self.step.allowed else self.step.replace)
        for found in find_activations(self.graph, sources):
            self.seen.add(found.function)
            target, reason = self._target(found)
            if reason is not None:
                places = [name for name in found.nodes if self._outside(self.nodes[name])] or [found.nodes[-1]]
                self.skipped += [Skip(name, reason) for name in places]
            if target is not None:
                self._put(found, target)

    def _target(self, found: Activation) -> tuple[str | None, str | None]:
        """What takes its place, if anything; or why nothing does although it may not stay."""
        chosen = self.step.replace.get(found.function)
        if chosen is not None:
            return (chosen, None) if SUBSTITUTES[chosen].since <= self.graph.opset else (None, self._too_old(chosen))
        if not self.step.allowed or found.ops <= set(self.step.allowed):
            return None, None
        for name in CLOSEST[found.function]:
            if SUBSTITUTES[name].ops <= set(self.step.allowed) and SUBSTITUTES[name].since <= self.graph.opset:
                return name, None
        needs = "; ".join(f"{name}: {', '.join(sorted(SUBSTITUTES[name].ops))}" for name in CLOSEST[found.function])
        return (
            None,
            f"{found.function} is not on the white-list, nor are the operators of what could replace it ({needs})",
        )

    def _too_old(self, target: str) -> str:
        return f"{target} needs opset {SUBSTITUTES[target].since}, this model has {self.graph.opset}"

    def _put(self, found: Activation, target: str) -> None:
        source, result = self.values[found.source], self.values[found.result]
        source.dtype = self.graph.types[found.source].dtype
        emitter = self.emitter.scoped(f"{found.nodes[-1]}.{target}.")
        low, high = self.step.interval
        made = SUBSTITUTES[target].emit(emitter, source, found.apply, Fit(low, high, self.step.degree))
        (last,) = made.inputs
        old = self.nodes[found.nodes[-1]]
        old.outputs.clear()
        last.outputs.clear()
        last.outputs.append(result)
        for name in found.nodes:
            self.nodes[name].inputs.clear()
            self.nodes[name].outputs.clear()
        gone = set(found.nodes)
        self.draft.nodes = [node for node in self.draft.nodes if node.name not in gone]
        self.notes.append(f"{found.function} became {target} at {found.result}")

    # -- pools ---------------------------------------------------------------------------------------------------------

    def pools(self) -> None:
        wanted = MAX_POOL in self.step.replace
        for node in list(self.draft.nodes):
            if not is_max_pool(node):
                continue
            self.seen.add(MAX_POOL)
            if not wanted and not self._outside(node):
                continue
            found = average_instead(node, self.graph)
            if isinstance(found, str):
                self.skipped.append(Skip(node.name, found))
            elif not wanted and found.op not in self.step.allowed:
                self.skipped.append(Skip(node.name, f"neither {node.op} nor {found.op} is on the white-list"))
            else:
                node.op, node.attrs = found.op, dict(found.attrs)
                node.outputs = node.outputs[:1]
                self.notes.append(f"{MAX_POOL} became {AVERAGE_POOL} at {node.outputs[0].name}")

    def absent(self) -> None:
        """Say what ``replace`` names and the graph does not have."""
        for old in self.step.replace:
            if old not in self.seen:
                self.skipped.append(Skip("graph", f"it has no {old}"))

    def _outside(self, node: gs.Node) -> bool:
        """Whether a node may not stay."""
        return bool(self.step.allowed) and operator(node) not in self.step.allowed


def _check_pair(old: str, new: str, chosen: Mapping[str, Any]) -> None:
    sources: Sequence[str] = (*FUNCTIONS, MAX_POOL)
    need(old in sources, f"replace: there is no operation {old!r}: {suggest(old, sources)}", OptionError)
    targets: Sequence[str] = (AVERAGE_POOL,) if old == MAX_POOL else tuple(name for name in SUBSTITUTES if name != old)
    need(new in targets, f"replace: {old!r} cannot become {new!r}: {suggest(new, targets)}", OptionError)
    need(
        new not in chosen,
        f"replace: {old!r} becomes {new!r}, which is itself replaced by {chosen.get(new)!r}; name what it is to become",
        OptionError,
    )
