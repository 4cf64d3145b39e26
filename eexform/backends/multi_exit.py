"""A graph with exits as a torch module: trained through all exits at once, run so that samples leave early."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import fx, nn

from eexform.backends.fx import OWNED, Raiser
from eexform.backends.planned import Planned, trainable
from eexform.backends.settled import settled
from eexform.backends.staging import Part, divide
from eexform.errors import DataError, ModelError, OptionError
from eexform.ir.graph import Graph
from eexform.ir.types import TensorType


class ExitOutputs(NamedTuple):
    """What every sample of a batch gets.

    Attributes:
        logits: [N, classes]: scores of the exit at which it left, not divided by a temperature.
        exit_index: [N] int64: 0..E-1 that exit, E the final one.
        confidence: [N] float32: the confidence there.
    """

    logits: torch.Tensor
    exit_index: torch.Tensor
    confidence: torch.Tensor


@dataclass(frozen=True)
class Segment:
    """The work up to an exit, or behind the last one to the final scores.

    Attributes:
        module: takes :attr:`inputs`; returns scores, confidence and what :attr:`hands_on` names.
        inputs: values that it takes, from the network's inputs and earlier segments.
        hands_on: values that it makes for later ones.
        live: values that later segments need and that hold samples on an axis, with that axis.
        kept: every value that later segments need.
    """

    module: fx.GraphModule
    inputs: tuple[str, ...]
    hands_on: tuple[str, ...]
    live: tuple[tuple[str, int], ...]
    kept: frozenset[str]


class MultiExitModule(nn.Module):
    """A network that samples leave early.

    ``forward`` runs segment by segment and drops the rows that have left: they are not computed further.
    :meth:`all_exits` computes every exit for every sample, which is what training needs. Both are differentiable and
    work on the same tensors; state-dict keys are the trunk's own and ``exit0.`` ... for the heads.

    In training mode batch normalisation uses the statistics of the rows at hand, in ``forward`` those that are left.

    Attributes:
        graph_module: the flat ``torch.fx`` module; returns the final scores, those of every exit, and then the
            confidences that heads have learned.
        inputs: names of the inputs in the graph.
        thresholds: one per exit; a sample leaves where ``confidence >= threshold`` in float32. May be set.
    """

    graph_module: fx.GraphModule
    _segments: tuple[Segment, ...]
    _thresholds: tuple[float, ...]
    _kinds: tuple[TensorType, ...]

    def __init__(
        self,
        whole: fx.GraphModule,
        segments: Sequence[Segment],
        inputs: Mapping[str, TensorType],
        thresholds: Sequence[float],
    ) -> None:
        """Put together what :func:`to_torch` has raised; all modules hold the same tensors."""
        super().__init__()
        self.inputs, self._kinds = tuple(inputs), tuple(inputs.values())
        # plain attributes: as children, every parameter would have several names
        self.__dict__["graph_module"], self.__dict__["_segments"] = whole, tuple(segments)
        self.thresholds = thresholds
        for kept in OWNED:
            for module in (self, *(segment.module for segment in segments)):
                module.__dict__[kept] = whole.__dict__[kept]

    @property
    def thresholds(self) -> tuple[float, ...]:
        return self._thresholds

    @thresholds.setter
    def thresholds(self, values: Sequence[float]) -> None:
        try:
            found = tuple(map(float, values))
        except (TypeError, ValueError) as error:
            raise OptionError(f"thresholds: expected numbers, one per exit, found {values!r}") from error
        if any(map(math.isnan, found)):
            raise OptionError(
                f"thresholds: {list(found)} holds NaN, which no confidence reaches; inf is never, -inf is always"
            )
        if len(found) != len(self._segments) - 1:
            raise OptionError(f"thresholds: expected {len(self._segments) - 1}, one per exit, found {len(found)}")
        self._thresholds = found

    def train(self, mode: bool = True) -> MultiExitModule:
        """Training or evaluation mode, of the flat module too."""
        super().train(mode)
        for module in (self.graph_module, *(segment.module for segment in self._segments)):
            module.training = mode
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> MultiExitModule:
        whole = copy.deepcopy(self.graph_module, memo)
        for kept in OWNED:  # copying an fx module makes these anew; the memo has those of all the modules here
            whole.__dict__[kept] = copy.deepcopy(self.graph_module.__dict__[kept], memo)
        segments = [
            Segment(copy.deepcopy(each.module, memo), each.inputs, each.hands_on, each.live, each.kept)
            for each in self._segments
        ]
        inputs = dict(zip(self.inputs, self._kinds, strict=True))
        copied = MultiExitModule(whole, segments, inputs, self.thresholds)
        memo[id(self)] = copied
        return copied.train(self.training)

    def __reduce__(self) -> Any:
        # torch.save would write a file that nobody can read: fx traces its modules anew when it unpickles them
        raise ModelError("this module cannot be pickled: save module.state_dict(), and make it again with to_torch")

    def forward(self, *inputs: torch.Tensor, **named: torch.Tensor) -> ExitOutputs:
        """Leave early, sample by sample.

        Args:
            inputs: the network's inputs in order, [N, ...].
            named: or by name.
        """
        pool = dict(zip(self.inputs, self._ordered(inputs, named), strict=True))
        rows: torch.Tensor | None = None  # places in the batch of the samples still inside; None: all
        parts: list[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, int]] = []
        for place, segment in enumerate(self._segments):
            scores, confidence, *made = segment.module(*(pool[name] for name in segment.inputs))
            if place == len(self.thresholds):
                parts.append((rows, scores, confidence, place))
                break
            pool.update(zip(segment.hands_on, made, strict=True))
            leaves = confidence >= float(np.float32(self.thresholds[place]))  # NaN never leaves
            stay = torch.logical_not(leaves).nonzero().squeeze(1)
            count = stay.numel()
            if count < leaves.numel() or (not parts and not count):
                gone = leaves.nonzero().squeeze(1)
                where = gone if rows is None else rows.index_select(0, gone)
                parts.append((where, scores.index_select(0, gone), confidence.index_select(0, gone), place))
                rows = stay if rows is None else rows.index_select(0, stay)
            if not count:
                break
            for name in [name for name in pool if name not in segment.kept]:
                del pool[name]
            if count < leaves.numel():
                for name, axis in segment.live:
                    if name in pool:
                        pool[name] = pool[name].index_select(axis, stay)
        return _joined(parts)

    def all_exits(self, *inputs: torch.Tensor, **named: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Scores of every exit for every sample, in the order in which a sample meets them, the final ones last."""
        final, *rest = self.graph_module(*self._ordered(inputs, named))
        return (*rest[: len(self.thresholds)], final)

    def extra_repr(self) -> str:
        return f"exits={len(self.thresholds)}, inputs={list(self.inputs)}"

    def _ordered(self, inputs: Sequence[torch.Tensor], named: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        rest = self.inputs[len(inputs) :]
        if len(inputs) > len(self.inputs) or set(named) != set(rest):
            raise DataError(
                f"the network takes the inputs {list(self.inputs)}, found {len(inputs)} by place and {sorted(named)} "
                "by name"
            )
        found = [*inputs, *(named[name] for name in rest)]
        for name, kind, value in zip(self.inputs, self._kinds, found, strict=True):
            _check(name, kind, value)
        return found


def to_torch(graph: Graph | Planned) -> nn.Module:
    """A graph, or a plan of a run, as a torch module in evaluation mode.

    Args:
        graph: what to raise; weights are copied. A plan is raised without the passes that only make it faster:
            normalisation can be trained, and the state dict has the original's keys.

    Returns:
        Without exits the :class:`torch.fx.GraphModule`, with exits a :class:`MultiExitModule`.

    Raises:
        ModelError: an operator cannot be raised to torch.
        GraphError: an exit at a place where samples cannot be picked apart.
    """
    graph = trainable(graph, "to_torch")
    whole = Raiser(graph)
    whole.run()
    if not graph.exits:
        return whole.build().eval()
    fixed = settled(graph)  # the whole keeps its arithmetic: constants made of it would be keys of the state dict
    parts = divide(fixed, [graph.final])
    raised = [_raised(fixed, part, whole) for part in parts]
    segments, needed = [], frozenset[str]()
    for part, raiser in reversed(list(zip(parts, raised, strict=True))):
        live = tuple((name, int(graph.types[name].batch_axis or 0)) for name in part.block.live)
        segments.append(Segment(raiser.build(), tuple(part.inputs()), tuple(part.hands_on), live, needed))
        needed |= set(part.inputs())
    thresholds = [item.threshold for item in graph.exits]
    inputs = {name: graph.types[name] for name in graph.inputs}
    return MultiExitModule(whole.build(), segments[::-1], inputs, thresholds).eval()


def _raised(graph: Graph, part: Part, whole: Raiser) -> Raiser:
    """The conversion of one part, on the tensors of the whole."""
    scope = part.scope
    for value, tensor in scope.values.items():
        kind = graph.types.get(value)
        if isinstance(tensor, gs.Variable) and kind is not None:
            tensor.dtype, tensor.shape = kind.dtype, None if kind.shape is None else list(kind.shape)
    made = {tensor.name: tensor for node in scope.draft.nodes for tensor in node.outputs}
    handed = [made.get(name) or scope.resolve(name) for name in part.hands_on]
    plain = gs.Graph(
        nodes=scope.draft.nodes,
        inputs=[_typed(name, kind) for name, kind in part.inputs().items()],
        outputs=[part.scores, part.confidence, *handed],
        opset=graph.opset,
        import_domains=graph.gs.import_domains,
    )
    raiser = Raiser(graph.replace(plain, exits=()), whole)
    raiser.run()
    return raiser


def _check(name: str, kind: TensorType, value: object) -> None:
    """Whether ``value`` can be what the network takes as its input ``name``; any width of number will do."""
    if not isinstance(value, torch.Tensor):
        raise DataError(f"input {name!r}: expected a tensor, found {type(value).__name__}")
    wanted = kind.shape
    sizes = list(value.shape)
    if wanted is not None and (
        len(wanted) != len(sizes)
        or any(isinstance(dim, int) and dim != size for dim, size in zip(wanted, sizes, strict=True))
    ):
        raise DataError(
            f"input {name!r}: expected the shape {[dim if dim is not None else '?' for dim in wanted]}, found {sizes}; "
            "all sizes but the batch are those that the graph was loaded with"
        )
    if kind.dtype is not None and (kind.dtype.kind == "f") != value.is_floating_point():
        raise DataError(f"input {name!r}: expected {kind.dtype} numbers, found {value.dtype}")


def _typed(name: str, kind: TensorType) -> gs.Variable:
    return gs.Variable(name, kind.dtype, None if kind.shape is None else list(kind.shape))


def _joined(parts: Sequence[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, int]]) -> ExitOutputs:
    """Results of those who left at each exit, put back in the order of the batch."""
    indices = [torch.full_like(confidence, place, dtype=torch.int64) for _, _, confidence, place in parts]
    if len(parts) == 1:
        (rows, scores, confidence, _), index = parts[0], indices[0]
        if rows is None:
            return ExitOutputs(scores, index, confidence)
    rows = torch.cat([part[0] for part in parts if part[0] is not None])
    order = torch.argsort(rows)
    joined = (torch.cat([part[1] for part in parts]), torch.cat(indices), torch.cat([part[2] for part in parts]))
    return ExitOutputs(*(values.index_select(0, order) for values in joined))
