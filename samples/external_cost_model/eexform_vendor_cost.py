"""A cost model in a distribution of its own, which asks an external program: the estimate of a vendor's compiler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eexform.cost_models import Cost, CostModel, ask_cost, words
from eexform.errors import OptionError, need
from eexform.ir.graph import Graph
from eexform.tunables import parameter


@dataclass(frozen=True)
class Vendor(CostModel):
    """Time per sample as an external program estimates it.

    The program gets the model as a file and answers with a time per node (docs/writing-a-cost-model.md). It is started
    when a cost is computed and never before: not when this model is made, and not when a run that names it is opened.
    """

    name: ClassVar[str] = "vendor"
    unit: ClassVar[str] = "ms"
    additive: ClassVar[bool] = True

    command: str = parameter(help="program and arguments, split as a shell would; no shell is involved")
    timeout_s: float = parameter(default=60.0, help="seconds after which it is stopped, with all it has started")

    def __post_init__(self) -> None:
        words(self.command)
        need(self.timeout_s > 0, f"timeout_s: {self.timeout_s:g} is not above 0", OptionError)

    def cost(self, graph: Graph) -> Cost:
        return ask_cost(self.command, graph, unit=self.unit, timeout_s=self.timeout_s)
