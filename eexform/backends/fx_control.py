"""Rules for ``If``, ``Loop``, ``Scan`` and ``SequenceMap``: their bodies become sub-modules that run eagerly.

A body is a ``torch.fx.GraphModule`` of its own, below the node's name. What it takes from outside is handed in as
further arguments; its constants are parameters and buffers like those outside, the same tensor where it is the same
constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs
import torch
from torch import fx, nn

from eexform.backends.fx import Raiser, op
from eexform.backends.fx_wide import has_wide, mark_wide
from eexform.backends.torch_types import torch_type
from eexform.errors import ModelError
from eexform.ir.graph import Graph


@op("If")
def _if(raiser: Raiser, node: gs.Node) -> Sequence[fx.Node]:
    yes, no = (raise_body(raiser, node.attrs[f"{branch}_branch"]) for branch in ("then", "else"))
    module = Branches(yes.module, no.module)
    call = raiser.module(node, module, [raiser.value(node, 0), yes.values, no.values])
    adopt(raiser, call, {"then_branch": yes, "else_branch": no})
    return raiser.pick(call, len(node.outputs))


@op("Loop")
def _loop(raiser: Raiser, node: gs.Node) -> Sequence[fx.Node]:
    source = node.attrs["body"]
    body = raise_body(raiser, source)
    times, going = (raiser.value(node, place) if raiser.has(node, place) else None for place in (0, 1))
    carried = [raiser.operand(tensor) for tensor in node.inputs[2:]]
    collected = [_nothing_collected(tensor) for tensor in source.outputs[1 + len(carried) :]]
    call = raiser.module(node, Loop(body.module, collected), [times, going, body.values, carried])
    adopt(raiser, call, {"body": body})
    return raiser.pick(call, len(node.outputs))


@op("Scan")
def _scan(raiser: Raiser, node: gs.Node) -> Sequence[fx.Node]:
    batched = len(node.inputs) > len(node.attrs["body"].inputs)  # the form of opset 8, with sequence_lens in front
    if batched and raiser.has(node, 0):
        raise ModelError(f"node {node.name!r} (Scan): sequence_lens of opset 8 cannot be raised to torch")
    operands = [raiser.operand(tensor) for tensor in node.inputs[1 if batched else 0 :]]
    scanned = int(node.attrs["num_scan_inputs"])
    states, body_outputs = len(operands) - scanned, node.attrs["body"].outputs
    body = raise_body(raiser, node.attrs["body"])
    results = len(body_outputs) - states

    def listed(name: str, length: int) -> list[int]:
        return [int(number) for number in node.attrs.get(name) or [0] * length]

    module = Scan(
        body.module,
        axes=(listed("scan_input_axes", scanned), listed("scan_output_axes", results)),
        backwards=(
            listed("directions" if batched else "scan_input_directions", scanned),
            listed("scan_output_directions", results),
        ),
        batched=batched,
    )
    call = raiser.module(node, module, [body.values, operands[:states], operands[states:]])
    adopt(raiser, call, {"body": body})
    return raiser.pick(call, len(node.outputs))


@op("SequenceMap")
def _sequence_map(raiser: Raiser, node: gs.Node) -> Sequence[fx.Node]:
    body = raise_body(raiser, node.attrs["body"])
    operands = [raiser.operand(tensor) for tensor in node.inputs]
    call = raiser.module(node, SequenceMap(body.module, len(node.outputs)), [body.values, operands])
    adopt(raiser, call, {"body": body})
    return raiser.pick(call, len(node.outputs))


# -- bodies --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Body:
    """A raised body: a module of (values from outside, then its own inputs).

    Attributes:
        module: what runs.
        values: the fx nodes of the values from outside.
        names: target in the module of every floating-point constant, by its name in the graph.
    """

    module: fx.GraphModule
    values: list[fx.Node]
    names: dict[str, str]


def raise_body(raiser: Raiser, source: gs.Graph) -> Body:
    """Raise a body that lies in the graph of ``raiser``; once the node is called, :func:`adopt` it.

    Raises:
        ModelError: an operator in it, or a form of one, cannot be raised.
    """
    graph = Graph(source)
    if has_wide(raiser.source):
        mark_wide(graph)
    inner = raiser.inside(graph)
    outside = _taken_from_outside(source)
    values = [raiser.operand(tensor) for tensor in outside.values()]
    for tensor in outside.values():
        inner.bind(tensor, inner.graph.placeholder(inner.argument(tensor.name)))
    inner.run()
    return Body(inner.build(), values, inner.names)


def adopt(raiser: Raiser, call: fx.Node, bodies: dict[str, Body]) -> None:
    """Make the parameters of bodies known by their names in the graph."""
    for place, body in bodies.items():
        for name, target in body.names.items():
            raiser.names.setdefault(name, f"{call.target}.{place}.{target}")


def _results(found: Any) -> tuple[Any, ...]:
    """What a body returns, as a tuple also where it is one value."""
    return found if isinstance(found, tuple) else (found,)


def _taken_from_outside(body: gs.Graph) -> dict[str, gs.Variable]:
    """Variables that a body (or a body inside it) uses and does not make itself, by name."""
    own = {tensor.name for tensor in body.inputs}
    used: dict[str, gs.Variable] = {}
    for node in body.nodes:
        own.update(tensor.name for tensor in node.outputs)
        used.update({t.name: t for t in node.inputs if isinstance(t, gs.Variable) and not t.is_empty()})
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                used.update(_taken_from_outside(value))
    used.update({tensor.name: tensor for tensor in body.outputs if isinstance(tensor, gs.Variable)})
    return {name: tensor for name, tensor in used.items() if name not in own}


def _nothing_collected(tensor: gs.Tensor) -> tuple[list[int], torch.dtype]:
    """Shape and type of what a loop collects when it does not run; unknown sizes are 0."""
    sizes = [size if isinstance(size, int) else 0 for size in tensor.shape or []]
    return [0, *sizes], torch.float32 if tensor.dtype is None else torch_type(tensor.dtype)


# -- modules -------------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """``If``: runs one of two bodies."""

    def __init__(self, then_branch: fx.GraphModule, else_branch: fx.GraphModule) -> None:
        super().__init__()
        self.then_branch = then_branch
        self.else_branch = else_branch

    def forward(self, condition: torch.Tensor, then_values: Sequence[Any], else_values: Sequence[Any]) -> Any:
        return _results(self.then_branch(*then_values) if bool(condition) else self.else_branch(*else_values))


class Loop(nn.Module):
    """``Loop``: runs its body until a number of rounds is reached or it says stop.

    Args:
        body: of values from outside, number of the round, condition and carried values; returns the condition, the
            carried values and what each round adds to the collected ones.
        collected: shape and type of each collected value when there is no round.
    """

    def __init__(self, body: fx.GraphModule, collected: Sequence[tuple[list[int], torch.dtype]]) -> None:
        super().__init__()
        self.body = body
        self.collected = list(collected)

    def forward(
        self, times: torch.Tensor | None, going: torch.Tensor | None, values: Sequence[Any], carried: Sequence[Any]
    ) -> tuple[Any, ...]:
        state = list(carried)
        rounds: list[Sequence[Any]] = []
        condition = torch.tensor(True) if going is None else going
        limit = None if times is None else int(times)
        while (limit is None or len(rounds) < limit) and bool(condition):
            number = torch.tensor(len(rounds), device=condition.device)
            condition, *found = _results(self.body(*values, number, condition, *state))
            state = found[: len(state)]
            rounds.append(found[len(state) :])
        if rounds:
            collected = [torch.stack([made[place] for made in rounds]) for place in range(len(self.collected))]
        else:
            collected = [torch.zeros(shape, dtype=dtype, device=condition.device) for shape, dtype in self.collected]
        return (*state, *collected)


class SequenceMap(nn.Module):
    """``SequenceMap``: runs its body on each item of a sequence, and of the other sequences; tensors go to each."""

    def __init__(self, body: fx.GraphModule, results: int) -> None:
        super().__init__()
        self.body = body
        self.results = results

    def forward(self, values: Sequence[Any], operands: Sequence[Any]) -> tuple[list[Any], ...]:
        found = [
            _results(self.body(*values, *(part[place] if isinstance(part, list) else part for part in operands)))
            for place in range(len(operands[0]))
        ]
        return tuple([item[result] for item in found] for result in range(self.results))


class Scan(nn.Module):
    """``Scan``: runs its body on each slice of the scanned values.

    Args:
        body: of values from outside, states and slices; returns states and slices of the results.
        axes: scanned axis of each input, and axis of each result along which its slices are stacked.
        backwards: 1 where an input is walked, or a result is filled, from its end.
        batched: the form of opset 8, where the first axis of everything holds samples that are scanned on their own.
    """

    def __init__(
        self,
        body: fx.GraphModule,
        *,
        axes: tuple[list[int], list[int]],
        backwards: tuple[list[int], list[int]],
        batched: bool,
    ) -> None:
        super().__init__()
        self.body = body
        self.axes = axes
        self.backwards = backwards
        self.batched = batched

    def forward(self, values: Sequence[Any], states: Sequence[Any], scanned: Sequence[Any]) -> tuple[Any, ...]:
        if not self.batched:
            return self._scan(values, list(states), scanned)
        found = [
            self._scan(values, [state[sample] for state in states], [value[sample] for value in scanned])
            for sample in range(len(scanned[0]))
        ]
        return tuple(torch.stack(parts) for parts in zip(*found, strict=True))

    def _scan(self, values: Sequence[Any], states: list[Any], scanned: Sequence[Any]) -> tuple[Any, ...]:
        slices = [value.unbind(axis) for value, axis in zip(scanned, self.axes[0], strict=True)]
        slices = [part[::-1] if back else part for part, back in zip(slices, self.backwards[0], strict=True)]
        rounds: list[Sequence[Any]] = []
        for given in zip(*slices, strict=True):
            found = _results(self.body(*values, *states, *given))
            states = list(found[: len(states)])
            rounds.append(found[len(states) :])
        results = []
        for place, (axis, back) in enumerate(zip(self.axes[1], self.backwards[1], strict=True)):
            made = [part[place] for part in rounds]
            results.append(torch.stack(made[::-1] if back else made, axis))
        return (*states, *results)
