"""Habits of modules that torch's exporters cannot write, or write as something else, turned into equal ones.

What is done is exact: the same numbers by other calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

_aten: Any = torch.ops.aten


def prepare(program: torch.export.ExportedProgram) -> None:
    """Rewrite the program's graph in place; what needs no rewriting stays untouched."""
    graph = program.graph
    found = [node for node in graph.nodes if node.op == "call_function" and node.target in _RULES]
    for node in found:
        _RULES[node.target](graph, node)
    if found:
        graph.lint()
        program.graph_module.recompile()


def _promoted(graph: fx.Graph, node: fx.Node) -> None:
    """``1.0 - mask``, with a mask of integers: the exporter's own conversion wants an overload that does not exist."""
    operand = node.args[0]
    if not isinstance(operand, fx.Node) or _dtype(operand) is _dtype(node):
        return
    with _before(graph, node) as call:
        node.replace_input_with(operand, call(_aten.to.dtype, operand, _dtype(node)))


def _masked(graph: fx.Graph, node: fx.Node) -> None:
    """``x[mask] = value`` is a choice per element; the exporter lists the places that the mask names, across samples.

    Only with a mask on the leading axes, and a value that does not depend on how many places there are.
    """
    data, indices, value, *accumulate = node.args
    if any(accumulate) or node.kwargs.get("accumulate"):
        return
    mask = indices[0] if isinstance(indices, (list, tuple)) and len(indices) == 1 else None
    if not isinstance(mask, fx.Node) or not isinstance(data, fx.Node) or not isinstance(value, fx.Node):
        return
    shape, given = data.meta["val"].shape, value.meta["val"].shape
    behind = len(shape) - mask.meta["val"].ndim
    if _dtype(mask) is not torch.bool or len(given) > behind + 1:
        return
    if len(given) > behind and not (isinstance(given[0], int) and given[0] == 1):
        return  # one value per place
    with _before(graph, node) as call:
        for _ in range(behind):
            mask = call(_aten.unsqueeze.default, mask, -1)
        chosen = call(_aten.where.self, mask, value, data)
        if node.target is _aten.index_put_.default:
            chosen = call(_aten.copy_.default, data, chosen)
    node.replace_all_uses_with(chosen)
    graph.erase_node(node)


def _emptied(graph: fx.Graph, node: fx.Node) -> None:
    """``y.set_()`` frees the memory of a value that nothing reads any more: there is nothing to compute."""
    value = node.args[0]
    order = {item: place for place, item in enumerate(graph.nodes)}
    if isinstance(value, fx.Node) and not node.users and all(order[user] <= order[node] for user in value.users):
        graph.erase_node(node)


def _attention(graph: fx.Graph, node: fx.Node) -> None:
    """Attention over three or five axes, as inside windows, as attention over four: the exporter knows no other."""
    query, key, value, *rest = node.args
    shapes = [operand.meta["val"].shape for operand in (query, key, value) if isinstance(operand, fx.Node)]
    rank = len(shapes[0])
    masked = (rest and rest[0] is not None) or node.kwargs.get("attn_mask") is not None
    first = 1 if rank == 3 else 0  # flattened, axes that broadcast would not
    alike = len(shapes) == 3 and all(len(shape) == rank and shape[first:-2] == shapes[0][first:-2] for shape in shapes)
    if rank not in (3, 5) or masked or not alike or (rank == 5 and not isinstance(shapes[0][1], int)):
        return
    with _before(graph, node) as call:
        into, back = (
            ((_aten.unsqueeze.default, 1), (_aten.squeeze.dim, 1))
            if rank == 3
            else ((_aten.flatten.using_ints, 0, 1), (_aten.unflatten.int, 0, [-1, shapes[0][1]]))
        )
        four = [call(into[0], operand, *into[1:]) for operand in (query, key, value)]
        made = call(back[0], call(node.target, *four, *rest, **node.kwargs), *back[1:])
    node.replace_all_uses_with(made)
    graph.erase_node(node)


@contextmanager
def _before(graph: fx.Graph, node: fx.Node) -> Iterator[Callable[..., fx.Node]]:
    """A function that adds a call in front of ``node``, as if written in the same place of the same sub-module."""

    def call(target: Any, *arguments: Any, **named: Any) -> fx.Node:
        made = graph.call_function(target, arguments, named)
        values = [argument.meta["val"] if isinstance(argument, fx.Node) else argument for argument in arguments]
        with node.meta["val"].fake_mode:
            made.meta = {**node.meta, "val": target(*values, **named)}
        return made

    with graph.inserting_before(node):
        yield call


def _dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


_RULES: dict[Any, Callable[[fx.Graph, fx.Node], None]] = {
    _aten.rsub.Scalar: _promoted,
    _aten.index_put.default: _masked,
    _aten.index_put_.default: _masked,
    _aten.scaled_dot_product_attention.default: _attention,
    _aten.set_.default: _emptied,
}
