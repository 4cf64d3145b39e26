"""A pipeline: passes one after the other, as one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from eexform.errors import EexformError, PassError
from eexform.ir.graph import Graph
from eexform.passes._contract import Pass, PassContext, PassResult, Skip


@dataclass(frozen=True)
class Pipeline(Pass):
    """Applies passes in order; a pass itself."""

    name: ClassVar[str] = "pipeline"
    composite: ClassVar[bool] = True

    steps: tuple[Pass, ...] = ()

    def __init__(self, steps: Sequence[Pass]) -> None:
        object.__setattr__(self, "steps", tuple(steps))

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Apply every step to the result of the one before it.

        The graph that comes in is the reference of every step, unless the context has one. The result's ``replay`` is
        always given, flat: a step that needs none stands for itself.

        Raises:
            PassError: a step failed; the message names it and the steps that ran before it.
        """
        if context.reference is None:
            context = replace(context, reference=graph)
        changed = False
        skipped: list[Skip] = []
        notes: list[str] = []
        settled: list[Pass] = []
        arrays: dict[str, Mapping[str, np.ndarray]] = {}
        for place, step in enumerate(self.steps):
            try:
                result = step(graph, context)
            except EexformError as error:
                before = ", ".join(done.name for done in self.steps[:place])
                place_text = f"after {before}" if before else "the first pass"
                raise PassError(f"pass {step.name!r} ({place_text}): {error}") from error
            context = _carried(context, graph, result.graph)
            graph = result.graph
            changed = changed or result.changed
            skipped += [Skip(f"{step.name}: {skip.where}", skip.why) for skip in result.skipped]
            notes += [f"{step.name}: {note}" for note in result.notes]
            settled += (step,) if result.replay is None else result.replay
            arrays.update(result.arrays)
        return PassResult(graph, changed, tuple(skipped), tuple(notes), tuple(settled), arrays)


def _carried(context: PassContext, before: Graph, after: Graph) -> PassContext:
    """The context for the next step: exit rates that fitted the graph before but not after are out of date."""
    rates = context.exit_rates
    if rates is not None and len(rates) == len(before.exits) + 1 != len(after.exits) + 1:
        return replace(context, exit_rates=None)
    return context
