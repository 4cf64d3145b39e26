"""Multiply-accumulates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from eexform.cost_models._contract import Cost, CostModel
from eexform.cost_models._counting import counted
from eexform.ir.arithmetic import node_macs
from eexform.ir.graph import Graph
from eexform.tunables import parameter


@dataclass(frozen=True)
class Macs(CostModel):
    """Multiply-accumulates of one sample: convolutions, matrix products, recurrent layers, attention.

    Element-wise work, normalisation and pooling count zero (see :mod:`eexform.ir.arithmetic`).
    """

    name: ClassVar[str] = "macs"
    unit: ClassVar[str] = "MACs"
    additive: ClassVar[bool] = True

    bindings: Mapping[str, int] = parameter(default={}, help="sizes of symbolic dimensions other than the batch")

    def cost(self, graph: Graph) -> Cost:
        return counted(graph, node_macs, self.bindings)
