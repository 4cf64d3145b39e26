"""The form ``torch``: an exported PyTorch program (``.pt2``) that computes only what each sample needs.

Nested ``torch.cond``, one per exit: the branch is taken while any sample is undecided, and inside it the undecided rows
of every live value are picked out, as in the form ``if``. The program takes the network's inputs in order, with any
batch size, and returns class scores [N, classes], exit index (int64 [N]) and confidence (float32 [N]).
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from eexform.backends import metadata
from eexform.backends.fx import OWNED
from eexform.backends.multi_exit import MultiExitModule, Segment, to_torch
from eexform.backends.torch_types import torch_type
from eexform.errors import GraphError
from eexform.files import writing
from eexform.ir.graph import BATCH, Graph

DESCRIPTION = "eexform.json"
"""Extra file inside the ``.pt2``: what :mod:`eexform.backends.metadata` says of exported files."""

_ROWS = 3
_OTHER = 6
"""Sizes of the example that the program is traced with; any others may be used later."""


class Conditional(nn.Module):
    """The network as nested conditionals, in the terms that ``torch.export`` understands."""

    def __init__(self, module: MultiExitModule) -> None:
        super().__init__()
        self.inputs = module.inputs
        self.thresholds = tuple(float(np.float32(value)) for value in module.thresholds)
        self.segments: list[Segment] = list(module._segments)
        for kept in OWNED:
            self.__dict__[kept] = module.__dict__[kept]

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self._level(0, dict(zip(self.inputs, inputs, strict=True)))

    def _level(self, place: int, pool: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        segment = self.segments[place]
        scores, confidence, *made = segment.module(*(pool[name] for name in segment.inputs))
        if place == len(self.thresholds):
            return scores, torch.zeros_like(confidence, dtype=torch.int64), confidence
        pool = {**pool, **dict(zip(segment.hands_on, made, strict=True))}
        names = [name for name in pool if name in segment.kept]
        live = dict(segment.live)
        stays = torch.logical_not(confidence >= self.thresholds[place])  # NaN never leaves

        def go_on(
            scores: torch.Tensor, confidence: torch.Tensor, stays: torch.Tensor, *values: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            where = stays.nonzero().squeeze(1)
            torch._check(where.shape[0] >= 1)
            torch._check(where.shape[0] <= scores.shape[0])
            inner = {
                name: value.index_select(live[name], where) if name in live else value
                for name, value in zip(names, values, strict=True)
            }
            found, index, sure = self._level(place + 1, inner)
            return (
                scores.index_copy(0, where, found),
                stays.to(torch.int64).index_copy(0, where, index + 1),
                confidence.index_copy(0, where, sure),
            )

        def leave(
            scores: torch.Tensor, confidence: torch.Tensor, stays: torch.Tensor, *values: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return scores.clone(), stays.to(torch.int64), confidence.clone()

        operands = (scores, confidence, stays, *(pool[name] for name in names))
        result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.cond(stays.any(), go_on, leave, operands)
        return result


def lower_torch(graph: Graph) -> torch.export.ExportedProgram:
    """The exported program of a graph with exits.

    Raises:
        GraphError: no exits, or ``torch.export`` cannot trace the network; the message holds its reason.
        ModelError: an operator cannot be raised to torch.
    """
    if not graph.exits:
        raise GraphError("the graph has no exits, so there is nothing to lower; run the pass insert_exits first")
    module = to_torch(graph)
    assert isinstance(module, MultiExitModule)
    example, sizes = _example(graph)
    with torch.no_grad(), _quiet():
        try:
            found = torch.export.export(Conditional(module).eval(), example, dynamic_shapes=(sizes,), strict=False)
        except Exception as error:  # it raises whatever the traced code and its own parts raise
            raise GraphError(f"torch.export cannot trace this network: {_reason(error)}; use the form 'if'") from error
    for part in found.graph_module.modules():  # the branches, too
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # holds paths of this machine
    return found


def save_torch(graph: Graph, path: str | Path) -> None:
    """Lower to an exported program and write it, whole or not at all.

    Raises:
        GraphError: see :func:`lower_torch`.
        StorageError: it cannot be written.
    """
    write(packed(lower_torch(graph), graph), path)


def packed(program: torch.export.ExportedProgram, graph: Graph) -> bytes:
    """The content of a ``.pt2`` file: the program of ``graph`` and its description."""
    described = json.dumps(metadata.build(graph, "torch"), indent=2, sort_keys=True)
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={DESCRIPTION: described})
    return stream.getvalue()


def unpacked(content: bytes) -> torch.export.ExportedProgram:
    """What :func:`packed` gave, in this very process, read back: never for a file, whose content could do anything."""
    with _quiet():  # sizes that the deserialiser has no use for
        return torch.export.load(io.BytesIO(content))


def write(content: bytes, path: str | Path) -> None:
    """Write a ``.pt2``, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    with writing(path) as temporary:
        temporary.write_bytes(content)


def _example(graph: Graph) -> tuple[tuple[torch.Tensor, ...], tuple[dict[int, Any], ...]]:
    """Inputs to trace with, and which of their axes may have other sizes."""
    symbols: dict[str, Any] = {}
    tensors, sizes = [], []
    for name in graph.inputs:
        kind = graph.types[name]
        if kind.shape is None or kind.dtype is None:
            raise GraphError(f"input {name!r}: its type is not known; give its shape when loading the model")
        free = {axis: str(dim) for axis, dim in enumerate(kind.shape) if not isinstance(dim, int)}
        for symbol in free.values():
            symbols.setdefault(symbol, torch.export.Dim.DYNAMIC)
        shape = [dim if isinstance(dim, int) else _ROWS if dim == BATCH else _OTHER for dim in kind.shape]
        tensors.append(torch.zeros(shape, dtype=torch_type(kind.dtype)))
        sizes.append({axis: symbols[symbol] for axis, symbol in free.items()})
    return tuple(tensors), tuple(sizes)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracing logs what it tries and leaves; only the outcome matters."""
    logger = logging.getLogger("torch")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
