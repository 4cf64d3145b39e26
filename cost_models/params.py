"""Parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from eexform.cost_models._contract import Cost, CostModel
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
        counted: set[int] = set()
        nodes = {}
        for node in graph.nodes:
            size = 0
            for tensor in _read(node):
                if id(tensor) not in counted and np.issubdtype(tensor.dtype, np.floating):
                    counted.add(id(tensor))
                    size += int(np.prod(tensor.shape, dtype=np.int64))
            nodes[node.name] = size
        return Cost(sum(nodes.values()), nodes)


def _read(node: gs.Node) -> Iterator[gs.Constant]:
    """Constants that a node reads, those of the sub-graphs in it included."""
    yield from (tensor for tensor in node.inputs if isinstance(tensor, gs.Constant))
    for graph in node.subgraphs(recursive=True):
        yield from (tensor for inner in graph.nodes for tensor in inner.inputs if isinstance(tensor, gs.Constant))
