"""Mend what a cut has moved, from samples and without labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from eexform.errors import OptionError, PassError, need, suggest
from eexform.ir.graph import Graph
from eexform.passes._contract import Pass, PassContext, PassResult, Skip
from eexform.passes.set_parameters import SetParameters, put
from eexform.pruning.repair import METHODS, repair
from eexform.tunables import Choice, parameter, tunable


@dataclass(frozen=True)
class Repair(Pass):
    """Mend what a cut has moved: new statistics, biases or weights in closed form, from samples without labels.

    Layer by layer, in the order of the computation, the graph is brought back to what the graph before the cut says in
    the channels that are left (see :mod:`eexform.pruning.repair` for the formulas). It needs samples and the reference,
    which a pipeline provides: put it behind the passes that cut. Layers that see what they saw before stay as they
    are.
    """

    name: ClassVar[str] = "repair"
    keeps_structure: ClassVar[bool] = True

    method: str = tunable(
        Choice(METHODS),
        default="all",
        help="batch_norm: statistics; bias: means; least_squares: weights; all: each where it helps most",
    )
    samples: int = parameter(default=1024, help="samples to look at, at most")
    ridge: float = parameter(
        default=0.0, help="how firmly fitted weights hold on to what they were; 0: chosen on held-out samples"
    )
    memory: int = parameter(
        default=1024, help="MiB that the samples' values may take; fewer samples where they do not fit"
    )

    def __post_init__(self) -> None:
        need(
            self.method in METHODS,
            f"method: {self.method!r} is not a choice: {suggest(self.method, METHODS)}",
            OptionError,
        )
        need(self.samples >= 1, f"samples: expected at least 1, found {self.samples}", OptionError)
        need(self.memory >= 1, f"memory: expected at least 1 MiB, found {self.memory}", OptionError)
        valid = math.isfinite(self.ridge) and self.ridge >= 0
        need(valid, f"ridge: expected a number from 0, found {self.ridge}", OptionError)

    def requires(self, graph: Graph) -> None:
        need(not graph.exits, "put repair before insert_exits: the heads were trained on the trunk as it is")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        if context.samples is None:
            raise PassError(
                "repair has to look at samples, and there are none: give --data (in Python: data=...), or apply the "
                "settled plan, which holds the numbers"
            )
        if context.reference is None:
            raise PassError("repair compares with the graph before the cut: run it in a pipeline, or set the reference")
        found = repair(
            graph,
            context.reference,
            context.samples,
            method=self.method,
            most=self.samples,
            ridge=self.ridge,
            memory=self.memory,
            seed=context.seed,
        )
        skipped = tuple(Skip(where, why) for where, why in found.skipped)
        if not found.arrays:
            nothing = Skip("graph", "no layer that this method can mend sees anything new")
            return PassResult(graph, False, (*skipped, nothing), found.notes, replay=())
        mended, changed, _ = put(graph, found.arrays, found.biases)
        if not changed:
            return PassResult(graph, False, skipped, found.notes, replay=())
        setting, arrays = SetParameters.of(found.arrays, found.biases)
        return PassResult(mended, True, skipped, found.notes, replay=(setting,), arrays=arrays)
