"""The one intermediate representation: an onnx-graphsurgeon graph plus exits, types and a digest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from eexform.errors import GraphError, suggest
from eexform.ir.exits import Exit, Scores
from eexform.ir.types import TensorType

if TYPE_CHECKING:
    from eexform.ir.flow import DataFlow
    from eexform.ir.groups import ChannelGroups

BATCH = "N"
"""Symbol of the batch dimension of every graph that the front doors return."""


class Graph:
    """A classifier as a flat ONNX graph, with its exits as data.

    A ``Graph`` is a value: nobody changes one that was handed out. To edit, take :meth:`copy` (weights are shared,
    nodes are not), change the copy's :attr:`gs` and build a new ``Graph`` with :meth:`replace`.

    The first output of :attr:`gs` is the final classifier; the outputs after it are the exits' scores, in the order of
    :attr:`exits` (so no clean-up can mistake a head for dead code).

    Attributes:
        gs: the onnx-graphsurgeon graph: node and value names are unique, ``Constant`` nodes are initialisers.
        exits: the exits, in the order in which a sample meets them.
        scores: whether the classifier's output holds logits or probabilities.
        metadata: key-value pairs that travel into the exported file.
    """

    def __init__(
        self,
        graph: gs.Graph,
        *,
        exits: Sequence[Exit] = (),
        scores: Scores = "logits",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.gs = graph
        self.exits = tuple(exits)
        self.scores: Scores = scores
        self.metadata: dict[str, str] = dict(metadata or {})

    # -- names and structure ------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[gs.Node]:
        return self.gs.nodes

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.gs.inputs)

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.gs.outputs)

    @property
    def final(self) -> str:
        """Name of the value that holds the final classifier's scores."""
        return self.gs.outputs[0].name

    @property
    def opset(self) -> int:
        return int(self.gs.opset)

    @property
    def num_classes(self) -> int:
        """Number of classes: the last dimension of the final scores.

        Raises:
            GraphError: that dimension is not known.
        """
        shape = self.types[self.final].shape
        if not shape or not isinstance(shape[-1], int):
            raise GraphError(f"output {self.final!r}: the number of classes is not known (shape {shape})")
        return shape[-1]

    @cached_property
    def tensors(self) -> dict[str, gs.Tensor]:
        """Every value by name: variables and constants."""
        found: dict[str, gs.Tensor] = {}
        for tensor in self.gs.inputs:
            found[tensor.name] = tensor
        for node in self.gs.nodes:
            for tensor in (*node.inputs, *node.outputs):
                if tensor.name:
                    found[tensor.name] = tensor
        for tensor in self.gs.outputs:
            found.setdefault(tensor.name, tensor)
        return found

    @cached_property
    def constants(self) -> dict[str, gs.Constant]:
        """Every constant by name; floating-point ones are the parameters."""
        return {name: tensor for name, tensor in self.tensors.items() if isinstance(tensor, gs.Constant)}

    def parameters(self) -> dict[str, np.ndarray]:
        """The floating-point constants by name (weights are loaded from disk here if they were not yet)."""
        return {name: c.values for name, c in self.constants.items() if np.issubdtype(c.dtype, np.floating)}

    def tensor(self, name: str) -> gs.Tensor:
        """The value called ``name``.

        Raises:
            GraphError: there is none; the message lists similar names.
        """
        if name not in self.tensors:
            raise GraphError(f"the graph has no value {name!r}: {suggest(name, self.tensors)}")
        return self.tensors[name]

    # -- analyses, computed once ---------------------------------------------------------------------------------------

    @cached_property
    def types(self) -> Mapping[str, TensorType]:
        """Type of every value (see :func:`eexform.ir.inference.infer_types`)."""
        from eexform.ir.inference import infer_types

        return infer_types(self)

    @cached_property
    def flow(self) -> DataFlow:
        """Who feeds whom (see :class:`eexform.ir.flow.DataFlow`)."""
        from eexform.ir.flow import DataFlow

        return DataFlow(self)

    @cached_property
    def groups(self) -> ChannelGroups:
        """Channels that must be cut together (see :func:`eexform.ir.groups.find_groups`)."""
        from eexform.ir.groups import find_groups

        return find_groups(self)

    @cached_property
    def digest(self) -> str:
        """Full sha-256 of structure, parameters and exits; independent of node order and of file layout."""
        from eexform.ir.digest import digest

        return digest(self)

    # -- new graphs from this one --------------------------------------------------------------------------------------

    def copy(self) -> Graph:
        """A graph that can be edited without touching this one; weights are shared."""
        return Graph(self.gs.copy(), exits=self.exits, scores=self.scores, metadata=self.metadata)

    def replace(
        self,
        graph: gs.Graph | None = None,
        *,
        exits: Iterable[Exit] | None = None,
        scores: Scores | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Graph:
        """A new graph that differs in the given parts; caches start empty."""
        return Graph(
            self.gs if graph is None else graph,
            exits=self.exits if exits is None else tuple(exits),
            scores=self.scores if scores is None else scores,
            metadata=self.metadata if metadata is None else metadata,
        )

    def __repr__(self) -> str:
        return f"<Graph {self.gs.name!r}: {len(self.nodes)} nodes, {len(self.exits)} exits, opset {self.opset}>"
