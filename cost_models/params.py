"""Parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from eexform.cost_models._contract import Cost, CostModel
from eexform.cost_models._counting import stored
from eexform.ir.elements import dtype_of, is_float
from eexform.ir.graph import Graph


@dataclass(frozen=True)
class Params(CostModel):
    """Parameters: the floating-point numbers stored in the model.

    They are in the file whatever path a sample takes. A parameter that several nodes read counts once, for the first.
    """

    name: ClassVar[str] = "params"
    unit: ClassVar[str] = "parameters"
    additive: ClassVar[bool] = True
    per_sample: ClassVar[bool] = False

    def cost(self, graph: Graph) -> Cost:
        nodes: dict[str, float] = dict.fromkeys((node.name for node in graph.nodes), 0)
        for node, tensor in stored(graph):
            dtype = dtype_of(tensor.dtype)
            if dtype is not None and is_float(dtype):
                nodes[node] += int(np.prod(tensor.shape, dtype=np.int64))
        return Cost(sum(nodes.values()), nodes)
