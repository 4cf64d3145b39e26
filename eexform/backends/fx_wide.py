"""Unsigned integers of 16, 32 and 64 bits, for which torch has next to no kernels: computed in signed types.

16 and 32 bits fit into the next larger signed type. 64 bits do not: they are taken as the same bits of ``int64``, where
sums, differences, products and bit operations come out right; comparisons are made with the top bit flipped, which
maps the unsigned order onto the signed one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch

from eexform.ir.graph import Graph

SIGNED = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
_TOP_BIT = -(2**63)
_NAMES = {"uint16", "uint32", "uint64"}
_ORDERED = {"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min"}
_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {}
_SEEN: WeakKeyDictionary[Graph, bool] = WeakKeyDictionary()


def learn(functions: dict[str, Callable[..., torch.Tensor]]) -> None:
    """Say what :func:`widened` calls for each operator."""
    _FUNCTIONS.update(functions)


def has_wide(graph: Graph) -> bool:
    """Whether such types may occur: where they do not, nothing has to be asked while the module runs."""
    if graph not in _SEEN:
        _SEEN[graph] = any(_is_wide(tensor.dtype) for tensor in _tensors(graph.gs)) or any(
            _is_wide(node.attrs.get(key)) for node in graph.nodes for key in ("to", "dtype", "output_dtype")
        )
    return _SEEN[graph]


def mark_wide(graph: Graph) -> None:
    """Say that such types may occur in a graph (of a branch: its values come from outside)."""
    _SEEN[graph] = True


def widened(name: str, *values: torch.Tensor) -> torch.Tensor:
    """An element-wise operator by its name, on any types."""
    kind = next((value.dtype for value in values if value.dtype in SIGNED), None)
    if kind is None:
        return _FUNCTIONS[name](*values)
    if name == "Pow":  # of two types, of which the result has the first
        kind = values[0].dtype
    if kind == torch.uint64 and name in ("Div", "Mod"):
        quotient, rest = unsigned_division(*(to_signed(value) for value in values))
        return from_signed(quotient if name == "Div" else rest, kind)
    if name in _ORDERED:
        found = _FUNCTIONS[name](*(to_ordered(value) for value in values))
        return found if found.dtype == torch.bool else from_ordered(found, kind)
    found = _FUNCTIONS[name](*(to_signed(value) for value in values))
    return found if found.dtype == torch.bool else from_signed(found, kind)


def to_signed(value: torch.Tensor) -> torch.Tensor:
    """The same number in a signed type (64 bits: the same bits)."""
    kind = SIGNED.get(value.dtype)
    return value if kind is None else value.to(kind)


def from_signed(value: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """Back to ``kind``, modulo its range."""
    return value.to(kind)


def to_ordered(value: torch.Tensor) -> torch.Tensor:
    """A signed type in which the order is the same."""
    signed = to_signed(value)
    return signed ^ _TOP_BIT if value.dtype == torch.uint64 else signed


def from_ordered(value: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """The inverse of :func:`to_ordered`."""
    return (value ^ _TOP_BIT).to(kind) if kind == torch.uint64 else value.to(kind)


def on_signed(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Let a function that moves elements about work on these types: on the signed one, and back."""

    @functools.wraps(function)
    def moved(value: torch.Tensor, *others: Any) -> torch.Tensor:
        kind = value.dtype
        if kind not in SIGNED:
            return function(value, *others)
        held = (to_signed(o) if isinstance(o, torch.Tensor) and o.dtype == kind else o for o in others)
        found = function(to_signed(value), *held)
        return from_signed(found, kind) if found.dtype == SIGNED[kind] else found

    return moved


def unsigned_division(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quotient and rest of unsigned 64-bit numbers held as the bits of ``int64``.

    Half of the dividend is divided, which fits into 63 bits, and doubled; what is missing is 0 or 1. A divisor with its
    top bit set goes into anything at most once.
    """
    half = (left >> 1) & (2**63 - 1)
    divisor = torch.where(right < 0, 1, right)
    quotient = torch.div(half, divisor, rounding_mode="trunc") << 1
    quotient = torch.where(right < 0, 0, quotient)
    rest = left - quotient * right
    more = (rest ^ _TOP_BIT) >= (right ^ _TOP_BIT)
    return quotient + more.to(torch.int64), torch.where(more, rest - right, rest)


def _is_wide(kind: Any) -> bool:
    if kind is None or isinstance(kind, bool):
        return False
    if isinstance(kind, int):
        return kind in (onnx.TensorProto.UINT16, onnx.TensorProto.UINT32, onnx.TensorProto.UINT64)
    try:
        return np.dtype(kind).name in _NAMES
    except TypeError:
        return False


def _tensors(graph: gs.Graph) -> list[gs.Tensor]:
    found = list(graph.inputs)
    for node in graph.nodes:
        found += [*node.inputs, *node.outputs]
    return found
