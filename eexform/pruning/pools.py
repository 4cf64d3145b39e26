"""Average pooling in place of maximum pooling, where the attributes of the one can be said by the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs

from eexform.ir.graph import Graph


@dataclass(frozen=True)
class AveragePool:
    """Operator and attributes."""

    op: str
    attrs: Mapping[str, Any]


def is_max_pool(node: gs.Node) -> bool:
    """Whether ``node`` takes maxima over windows, or over all positions."""
    return node.op in ("MaxPool", "GlobalMaxPool") and not node.domain


def average_instead(node: gs.Node, graph: Graph) -> AveragePool | str:
    """What averages over the same windows as ``node`` takes maxima of; or why nothing does.

    Padding takes no part in a maximum, so it takes no part in the mean either: ``count_include_pad`` is 0, and a window
    at the border is divided by the number of its positions inside.
    """
    if node.op == "GlobalMaxPool":
        return AveragePool("GlobalAveragePool", {})
    if len(node.outputs) > 1 and node.outputs[1].name and (node.outputs[1].outputs or _is_output(node, graph)):
        return f"the places of its maxima ({node.outputs[1].name!r}) are used"
    kind = graph.types[node.inputs[0].name].dtype
    if kind is None or kind.kind != "f":
        return f"AveragePool takes floating-point numbers, its input holds {kind}"
    attrs = {key: value for key, value in node.attrs.items() if key in _KEPT}
    dilations = [int(step) for step in node.attrs.get("dilations", [])]
    if any(step != 1 for step in dilations):
        if graph.opset < 19:
            return f"its dilations {dilations} are known to AveragePool from opset 19 on, this model has {graph.opset}"
        attrs["dilations"] = dilations
    if int(node.attrs.get("ceil_mode", 0)):
        over = _beyond(node, graph)
        if over is not None:
            return over
    return AveragePool("AveragePool", {**attrs, "count_include_pad": 0})


_KEPT = ("kernel_shape", "strides", "pads", "auto_pad")


def _is_output(node: gs.Node, graph: Graph) -> bool:
    return node.outputs[1].name in graph.outputs


def _beyond(node: gs.Node, graph: Graph) -> str | None:
    """With ``ceil_mode``: why it cannot be left out, ``None`` where every window ends inside the padded input."""
    shape = graph.types[node.inputs[0].name].shape
    kernel = [int(size) for size in node.attrs["kernel_shape"]]
    rank = len(kernel)
    strides = [int(step) for step in node.attrs.get("strides", [1] * rank)]
    pads = [int(pad) for pad in node.attrs.get("pads", [0] * 2 * rank)]
    dilations = [int(step) for step in node.attrs.get("dilations", [1] * rank)]
    for axis, size in enumerate((shape or [None] * (2 + rank))[2:]):
        reach = dilations[axis] * (kernel[axis] - 1) + 1
        whole = isinstance(size, int) and (size + pads[axis] + pads[rank + axis] - reach) % strides[axis] == 0
        if not whole:
            return "with ceil_mode a window reaches over the edge, and runtimes differ in what they divide its sum by"
    return None
