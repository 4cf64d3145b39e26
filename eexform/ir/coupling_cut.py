"""Slots, the axes of values, and what a cut leaves of them: what rules work with after channels were chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from eexform.errors import GraphError
from eexform.ir.inference import split_dim
from eexform.ir.types import Dim

if TYPE_CHECKING:
    from eexform.ir.emit import Emitter
    from eexform.ir.graph import Graph


@dataclass(frozen=True, order=True)
class Slot:
    """One axis of one value.

    Attributes:
        value: name of the constant or computed value.
        axis: counted from 0.
    """

    value: str
    axis: int

    def __str__(self) -> str:
        return f"{self.value}|{self.axis}"


class Cut:
    """Which positions stay, slot by slot; what :meth:`Rule.attributes` and :meth:`Rule.rewrite` work with.

    Positions and contents are those of the graph before this cut.

    Attributes:
        graph: the graph before the cut.
    """

    def __init__(self, graph: Graph, kept: Mapping[Slot, np.ndarray], emitter: Emitter | None = None) -> None:
        """Args: the uncut graph, sorted kept positions of every slot that loses some, the emitter on the draft."""
        self.graph = graph
        self._kept = dict(kept)
        self._values = {slot.value for slot in kept}
        self._emitter = emitter
        self._replaced: dict[tuple[str, bytes, tuple[int, ...]], gs.Constant] = {}

    def is_cut(self, slot: Slot) -> bool:
        """Whether the slot loses positions."""
        return slot in self._kept

    def touches(self, node: gs.Node) -> bool:
        """Whether an operand or a result of the node loses positions."""
        return any(tensor.name in self._values for tensor in (*node.inputs, *node.outputs))

    def kept(self, slot: Slot) -> np.ndarray:
        """Positions that stay, sorted; all of them where nothing is cut.

        Raises:
            GraphError: the axis has no fixed size.
        """
        if slot in self._kept:
            return self._kept[slot]
        dim = self._before(slot.value)[slot.axis]
        size = positions_of(dim)
        if size is None:
            raise GraphError(f"axis {slot.axis} of {slot.value!r} has no fixed size ({dim})")
        return np.arange(size)

    def shape(self, value: str) -> tuple[Dim, ...]:
        """Shape of a value after the cut; axes without a fixed size as they are."""
        return tuple(
            cut_dim(dim, len(self._kept[Slot(value, axis)])) if Slot(value, axis) in self._kept else dim
            for axis, dim in enumerate(self._before(value))
        )

    def size(self, slot: Slot) -> Dim:
        """Positions of a slot after the cut."""
        return self.shape(slot.value)[slot.axis]

    def array(self, tensor: gs.Tensor | None) -> np.ndarray | None:
        """Content of a constant operand before the cut; ``None`` for anything that is no constant."""
        if tensor is None or tensor.name not in self.graph.constants:
            return None
        return np.asarray(self.graph.constants[tensor.name].values)

    def replace(self, node: gs.Node, place: int, array: np.ndarray) -> None:
        """Give a draft node another constant as operand ``place``.

        Other readers of the old constant keep it; equal contents for the same old constant become one new constant. A
        constant that nobody reads any more hands its name on.
        """
        assert self._emitter is not None
        old = node.inputs[place]
        content = np.ascontiguousarray(array).reshape(np.shape(array))
        key = (old.name, content.tobytes(), content.shape)
        if key not in self._replaced:
            name = self._emitter.unique(old.name or f"{node.name}_operand")
            self._replaced[key] = gs.Constant(name, content)
        node.inputs[place] = self._replaced[key]

    def hand_on_names(self, draft: gs.Graph) -> None:
        """Give replaced constants the name of the one they replace, where that is free now."""
        read = {tensor.name for node in draft.nodes for tensor in node.inputs}
        for (old, _, _), made in self._replaced.items():
            if old and old not in read and made.name in read:
                read.add(old)
                made.name = old

    def _before(self, value: str) -> tuple[Dim, ...]:
        constant = self.graph.constants.get(value)
        if constant is not None:
            return tuple(int(dim) for dim in constant.shape)
        known = self.graph.types.get(value)
        if known is None or known.shape is None:
            raise GraphError(f"the shape of value {value!r} is not known")
        return known.shape


def positions_of(dim: Dim) -> int | None:
    """Positions of an axis: its size, 3 for ``"3*N"``, ``None`` for ``"N"`` and for an unknown size."""
    if isinstance(dim, str):
        factor = split_dim(dim)[0]
        return factor if factor > 1 else None
    return dim


def cut_dim(dim: Dim, kept: int) -> Dim:
    """An axis of which ``kept`` positions stay: a number, or ``"2*N"`` for what was ``"3*N"``."""
    if isinstance(dim, str):
        symbol = split_dim(dim)[1]
        return symbol if kept == 1 else f"{kept}*{symbol}"
    return kept
