"""Size of what a model stores."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from eexform.cost_models._contract import Cost, CostModel
from eexform.cost_models._counting import stored
from eexform.errors import OptionError, need, suggest
from eexform.ir.elements import dtype_of, file_bytes, is_float
from eexform.ir.graph import Graph
from eexform.tunables import parameter

_KINDS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "float8": 8, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class ModelBytes(CostModel):
    """Bytes of the constants in the file: parameters, integers (shapes, indices, quantised weights), text.

    They are in the file whatever path a sample takes. Elements below 8 bits are packed, each constant for itself. One
    that several nodes read counts once, for the first; the constants of branches count for the node that holds them.
    The graph's structure and names (the rest of the file) do not count.

    ``dtype`` answers what the size would be if every floating-point constant were stored in another type. The scales
    and zero points that a quantised model stores besides, and the parameters that its tool leaves in floating point,
    are not part of this answer: quantise the model and count it for those.
    """

    name: ClassVar[str] = "model_bytes"
    unit: ClassVar[str] = "bytes"
    additive: ClassVar[bool] = True
    per_sample: ClassVar[bool] = False

    dtype: str = parameter(default="", help=f"as if parameters were stored as {', '.join(_KINDS)}; empty: as they are")

    def __post_init__(self) -> None:
        known = not self.dtype or self.dtype in _KINDS
        need(known, f"dtype: there is no {self.dtype!r}: {suggest(self.dtype, _KINDS)}", OptionError)

    def cost(self, graph: Graph) -> Cost:
        nodes: dict[str, float] = dict.fromkeys((node.name for node in graph.nodes), 0)
        by_dtype: Counter[str] = Counter()
        for node, tensor in stored(graph):
            kind, size = self._size(tensor)
            nodes[node] += size
            by_dtype[kind] += size
        return Cost(sum(nodes.values()), nodes, conditions={"bytes": dict(sorted(by_dtype.items()))})

    def _size(self, tensor: gs.Constant) -> tuple[str, int]:
        """Name of the type in which a constant is stored, and its bytes."""
        dtype, elements = dtype_of(tensor.dtype), int(np.prod(tensor.shape, dtype=np.int64))
        if dtype is None or dtype.kind in "OSU":
            return "string", _text(tensor)
        if self.dtype and is_float(dtype):
            return self.dtype, -(-_KINDS[self.dtype] * elements // 8)
        return dtype.name, file_bytes(dtype, elements)


def _text(tensor: gs.Constant) -> int:
    """Bytes of the strings of a constant."""
    held = tensor._values  # an array, or what graphsurgeon has not read: numpy has no strings of onnx's kind
    if isinstance(held, np.ndarray):
        return sum(len(str(text).encode()) for text in held.reshape(-1))
    return sum(len(text) for text in held.tensor.string_data)
