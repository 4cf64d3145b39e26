"""Rules for sequences (Python lists of tensors) and optional values (``None``; see :mod:`eexform.backends.fx`)."""

from __future__ import annotations

from typing import Any

import onnx_graphsurgeon as gs
import torch
from torch import fx

from eexform.backends.fx import Raiser, op

Tensors = list[torch.Tensor]


@op("SequenceConstruct")
def _construct(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(construct, *(raiser.operand(tensor) for tensor in node.inputs))


@op("SequenceEmpty")
def _empty(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(construct)


@op("SequenceAt")
def _at(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(item_at, raiser.value(node, 0), raiser.number(node, 1))


@op("SequenceLength")
def _length(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(length, raiser.value(node, 0))


@op("SequenceInsert")
def _insert(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(insert, raiser.value(node, 0), raiser.value(node, 1), raiser.number(node, 2))


@op("SequenceErase")
def _erase(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(erase, raiser.value(node, 0), raiser.number(node, 1, -1))


@op("SplitToSequence")
def _split(raiser: Raiser, node: gs.Node) -> fx.Node:
    pieces = raiser.value(node, 1) if raiser.has(node, 1) else None
    keep = bool(node.attrs.get("keepdims", 1))
    return raiser.call(split_to_sequence, raiser.value(node, 0), pieces, int(node.attrs.get("axis", 0)), keep)


@op("ConcatFromSequence")
def _concat(raiser: Raiser, node: gs.Node) -> fx.Node:
    function = torch.stack if node.attrs.get("new_axis", 0) else torch.cat
    return raiser.call(function, raiser.value(node, 0), int(node.attrs["axis"]))


@op("Optional")
def _optional(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(nothing) if not raiser.has(node, 0) else raiser.value(node, 0)


@op("OptionalHasElement")
def _has_element(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(has_element, raiser.value(node, 0) if raiser.has(node, 0) else None)


@op("OptionalGetElement")
def _get_element(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(get_element, raiser.value(node, 0))


# -- functions -----------------------------------------------------------------------------------------------------


def construct(*values: Any) -> list[Any]:
    return list(values)


def item_at(values: Tensors, place: torch.Tensor | int) -> torch.Tensor:
    return values[int(place)]


def length(values: Tensors) -> torch.Tensor:
    return torch.tensor(len(values))


def insert(values: Tensors, value: torch.Tensor, place: torch.Tensor | int | None) -> Tensors:
    """A new list; at the end where no place is given."""
    at = len(values) if place is None else int(place)
    at = at + len(values) if at < 0 else at
    return [*values[:at], value, *values[at:]]


def erase(values: Tensors, place: torch.Tensor | int) -> Tensors:
    """A new list without the item at ``place``."""
    at = int(place) % len(values)
    return [*values[:at], *values[at + 1 :]]


def split_to_sequence(value: torch.Tensor, pieces: torch.Tensor | None, axis: int, keep: bool) -> Tensors:
    """Pieces of one size (a single number), of given sizes, or (``None``) of size 1, then without the axis if told."""
    if pieces is None:
        return list(torch.split(value, 1, axis)) if keep else list(value.unbind(axis))
    sizes = pieces.tolist()
    return list(torch.split(value, sizes, axis))


def nothing() -> None:
    return None


def has_element(value: Any) -> torch.Tensor:
    return torch.tensor(value is not None)


def get_element(value: Any) -> Any:
    if value is None:
        raise ValueError("the optional value is empty: there is no element to get")
    return value
