"""The kernels to calibrate: those of given models, of the same with channels cut out, and of heads at their sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from eexform.cost_models._kernels import Kernel
from eexform.cost_models._ort_kernels import Execution, executions
from eexform.errors import EexformError
from eexform.heads import head_graph
from eexform.heads.portfolio import portfolio
from eexform.ir.arithmetic import node_macs
from eexform.ir.cut import cut
from eexform.ir.extract import extract
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.progress import Progress, Silent

Key = tuple[str, str, tuple[int, ...]]
"""Operator, variant and sizes: what a table looks kernels up by."""

_SHARES = (0.25, 0.5, 0.75)
_MIXTURES = 2
"""Cut graphs in which every group keeps a share of its own, so that inputs and outputs do not only grow together."""


@dataclass
class Plan:
    """What is to be measured.

    Attributes:
        operators: every distinct kernel, those of the models first.
        models: the kernels of each model as given, in order of execution: table key and kernel.
        refused: graphs of the grid that could not be made or opened, and why.
    """

    operators: dict[Key, Execution] = field(default_factory=dict)
    models: dict[str, list[tuple[Key, Kernel]]] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)

    def add(self, graph: Graph, bindings: Mapping[str, int] | None) -> list[tuple[Key, Kernel]]:
        found = []
        for execution in executions(graph, bindings):
            kernel = execution.kernel
            key = (kernel.op, kernel.variant, kernel.sizes)
            self.operators.setdefault(key, execution)
            found.append((key, kernel))
        return found


def planned(
    graphs: Mapping[str, Graph],
    *,
    grid: bool = True,
    bindings: Mapping[str, int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """Everything to measure for some models.

    Args:
        graphs: the models by name.
        grid: also what pruning, heads and branches would make of them; without, the models' own kernels alone.
        bindings: sizes of symbolic dimensions other than the batch.
        seed: of the shares that mixtures keep.
        progress: told about every model.

    Raises:
        EexformError: onnxruntime does not take a model.
    """
    plan = Plan()
    with (progress or Silent()).task("models", len(graphs)) as task:
        for name, graph in graphs.items():
            plan.models[name] = plan.add(graph, bindings)
            if grid:
                for label, made in (*_cut(graph, seed), *_heads(graph, bindings), *_branches(graph)):
                    try:
                        plan.add(made(), bindings)
                    except EexformError as error:
                        plan.refused.append((f"{name}: {label}", str(error)))
            task.advance(1, name)
    return plan


def _cut(graph: Graph, seed: int) -> Iterator[tuple[str, Callable[[], Graph]]]:
    """The graph with channels cut out: a quarter, half and three quarters left, odd counts, and mixtures."""
    groups = [group for group in graph.groups.groups if group.prunable]
    if not groups:
        return
    random = np.random.default_rng(seed)
    kept: list[tuple[str, list[int]]] = [
        (f"{share:.0%} of the channels", [max(1, round(share * group.size)) for group in groups]) for share in _SHARES
    ]
    odd = [max(1, int(random.uniform(0.3, 1.0) * group.size) - 1 | 1) for group in groups]
    kept.append(("odd numbers of channels", odd))
    for _ in range(_MIXTURES):
        shares = random.choice([*_SHARES, 1.0], size=len(groups))
        mixed = [max(1, round(float(share) * group.size)) for share, group in zip(shares, groups, strict=True)]
        kept.append(("a mixture of channels", mixed))
    for label, counts in kept:
        cuts = {
            group.name: range(min(count, group.size), group.size)
            for group, count in zip(groups, counts, strict=True)
            if count < group.size
        }
        yield label, partial(cut, graph, cuts)


def _heads(graph: Graph, bindings: Mapping[str, int] | None) -> Iterator[tuple[str, Callable[[], Graph]]]:
    """The default heads at every site, each kind of head and site once."""
    if graph.exits:
        return
    work = float(sum(node_macs(node, graph.types, bindings) or 0 for node in graph.nodes))
    seen = set()
    for site in find_sites(graph).sites:
        for spec in portfolio(site, trunk_macs=work, num_classes=graph.num_classes):
            same = (str(spec), site.kind, site.channel_axis, site.shape)
            if same in seen:
                continue
            seen.add(same)
            yield (
                f"head {spec} at {site.value}",
                partial(head_graph, spec, site, num_classes=graph.num_classes),
            )


def _branches(graph: Graph) -> Iterator[tuple[str, Callable[[], Graph]]]:
    """What runs in front of every site and behind it, where an exit there cuts the network in two."""
    if graph.exits:
        return
    made = {tensor.name for node in graph.nodes for tensor in node.outputs}
    for site in find_sites(graph).sites:
        ends = [value for value in dict.fromkeys([site.value, *site.live]) if value in made]
        yield f"in front of {site.value}", partial(extract, graph, graph.inputs, ends)
        yield f"behind {site.value}", partial(extract, graph, site.live, graph.outputs)
