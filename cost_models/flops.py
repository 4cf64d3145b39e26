"""Floating-point operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from eexform.cost_models._contract import Cost, CostModel
from eexform.cost_models._counting import counted
from eexform.ir.flops import node_flops
from eexform.ir.graph import Graph
from eexform.tunables import parameter


@dataclass(frozen=True)
class Flops(CostModel):
    """Floating-point operations of one sample: 2 per multiply-accumulate, and all element-wise work, norms and pooling.

    The conventions are those of :mod:`eexform.ir.flops`.
    """

    name: ClassVar[str] = "flops"
    unit: ClassVar[str] = "FLOPs"
    additive: ClassVar[bool] = True

    bindings: Mapping[str, int] = parameter(default={}, help="sizes of symbolic dimensions other than the batch")

    def cost(self, graph: Graph) -> Cost:
        return counted(graph, node_flops, self.bindings)
