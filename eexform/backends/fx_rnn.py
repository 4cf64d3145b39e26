"""Rules for recurrent layers: RNN, GRU and LSTM (see :mod:`eexform.backends.fx`).

Weights keep the names and the layout that they have in the graph. Where the layer is one that torch has, its kernel is
used on rearranged views of the weights; any other form (peepholes, other activations, sequences of several lengths,
clipping) is a loop over the time steps. Both are differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import fx

from eexform.backends.fx import Raiser, op
from eexform.errors import ModelError

Function = tuple[str, float, float]
"""Name of an activation, its alpha and its beta."""

Parts = tuple[torch.Tensor, ...]

_ACTIVATIONS: dict[str, Callable[[torch.Tensor, float, float], torch.Tensor]] = {
    "relu": lambda x, a, b: torch.relu(x),
    "tanh": lambda x, a, b: torch.tanh(x),
    "sigmoid": lambda x, a, b: torch.sigmoid(x),
    "affine": lambda x, a, b: a * x + b,
    "leakyrelu": lambda x, a, b: F.leaky_relu(x, a),
    "thresholdedrelu": lambda x, a, b: torch.where(x >= a, x, torch.zeros_like(x)),
    "scaledtanh": lambda x, a, b: a * torch.tanh(b * x),
    "hardsigmoid": lambda x, a, b: torch.clamp(a * x + b, 0.0, 1.0),
    "elu": lambda x, a, b: F.elu(x, a),
    "softsign": lambda x, a, b: F.softsign(x),
    "softplus": lambda x, a, b: F.softplus(x),
}
_ALPHA = {"leakyrelu": 0.01, "thresholdedrelu": 1.0, "hardsigmoid": 0.2, "elu": 1.0, "affine": 1.0, "scaledtanh": 1.0}
_BETA = {"hardsigmoid": 0.5, "affine": 0.0, "scaledtanh": 1.0}
_DEFAULTS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
_GATE_FUNCTIONS = 2  # the third activation, LSTM's, is that of the cell

# torch stacks the gates in another order than ONNX: GRU has [update, reset, hidden] there and [reset, update, hidden]
# in torch, LSTM [input, output, forget, cell] there and [input, forget, cell, output] in torch
_TORCH_ORDER = {"RNN": [0], "GRU": [1, 0, 2], "LSTM": [0, 2, 3, 1]}


@op("RNN", "GRU", "LSTM")
def _recurrent(raiser: Raiser, node: gs.Node) -> Sequence[fx.Node]:
    direction = str(node.attrs.get("direction", "forward"))
    given = [raiser.value(node, place) if raiser.has(node, place) else None for place in range(8)]
    found = raiser.call(
        recurrent,
        *given,
        kind=node.op,
        direction=direction,
        functions=_functions(node, 2 if direction == "bidirectional" else 1),
        clip=float(node.attrs.get("clip", 0.0)),
        batch_first=bool(node.attrs.get("layout", 0)),
        coupled=bool(node.attrs.get("input_forget", 0)),
        reset_after=bool(node.attrs.get("linear_before_reset", 0)),
    )
    return raiser.pick(found, len(node.outputs))


def _functions(node: gs.Node, directions: int) -> list[Function]:
    names = [str(name).lower() for name in node.attrs.get("activations") or _DEFAULTS[node.op] * directions]
    alphas, betas = list(node.attrs.get("activation_alpha") or []), list(node.attrs.get("activation_beta") or [])
    functions: list[Function] = []
    for name in names:
        if name not in _ACTIVATIONS:
            raise ModelError(f"node {node.name!r} ({node.op}): activation {name!r} cannot be raised to torch")
        alpha = float(alphas.pop(0)) if name in _ALPHA and alphas else _ALPHA.get(name, 0.0)
        beta = float(betas.pop(0)) if name in _BETA and betas else _BETA.get(name, 0.0)
        functions.append((name, alpha, beta))
    return functions


# -- torch functions -----------------------------------------------------------------------------------------------


def recurrent(
    x: torch.Tensor,
    w: torch.Tensor,
    r: torch.Tensor,
    b: torch.Tensor | None,
    lengths: torch.Tensor | None,
    hidden: torch.Tensor | None,
    cell: torch.Tensor | None,
    peepholes: torch.Tensor | None,
    *,
    kind: str,
    direction: str,
    functions: list[Function],
    clip: float,
    batch_first: bool,
    coupled: bool,
    reset_after: bool,
) -> Parts:
    """One recurrent layer; the formulas are those of ONNX's operators of the same names.

    Args:
        x: inputs ``[T, N, I]`` (``[N, T, I]`` with ``batch_first``).
        w, r: weights ``[D, G*H, I]`` and ``[D, G*H, H]``; D directions, G gates.
        b: biases of both ``[D, 2*G*H]``.
        lengths: steps of each sample ``[N]``; outputs behind them are zero.
        hidden, cell: initial states ``[D, N, H]`` (``[N, D, H]`` with ``batch_first``).
        peepholes: ``[D, 3*H]`` (LSTM).
        kind: ``RNN``, ``GRU`` or ``LSTM``.
        direction: ``forward``, ``reverse`` or ``bidirectional``.
        functions: activations of all directions.
        clip: bound of what goes into an activation; 0 for none.
        batch_first: the batch comes first in all inputs and outputs.
        coupled: the input gate is one minus the forget gate (LSTM).
        reset_after: the reset gate acts behind the recurrent product (GRU; torch's form).

    Returns:
        all outputs ``[T, D, N, H]``, the last ones ``[D, N, H]`` and, for LSTM, the last cells ``[D, N, H]``; the
        batch in front with ``batch_first``.
    """
    if batch_first:
        x = x.transpose(0, 1)
        hidden = None if hidden is None else hidden.transpose(0, 1)
        cell = None if cell is None else cell.transpose(0, 1)
    directions, size = int(w.shape[0]), int(r.shape[-1])
    zeros = x.new_zeros(directions, x.shape[1], size)
    hidden, cell = zeros if hidden is None else hidden, zeros if cell is None else cell
    backwards = [direction == "reverse"] if directions == 1 else [False, True]
    per = len(functions) // directions
    plain = (
        all(functions[place][0] == name.lower() for place, name in enumerate(_DEFAULTS[kind] * directions))
        or functions == [("relu", 0.0, 0.0)] * directions
    )
    known = lengths is None and peepholes is None and not clip and not coupled and (kind != "GRU" or reset_after)
    results: list[Parts] = []
    for place in range(directions):
        weights = (w[place], r[place], None if b is None else b[place])
        order = _reversed_places(x, lengths) if backwards[place] else None
        steps = x if order is None else _reorder(x, order)
        start = (hidden[place], cell[place])
        if plain and known:
            found = _torch_kernel(kind, functions[place * per][0], steps, weights, start)
        else:
            form = (functions[place * per : (place + 1) * per], clip, coupled, reset_after)
            holes = None if peepholes is None else peepholes[place]
            found = _loop(kind, steps, weights, start, lengths, holes, form)
        results.append((found[0] if order is None else _reorder(found[0], order), *found[1:]))
    stacked = [torch.stack(parts, 1 if number == 0 else 0) for number, parts in enumerate(zip(*results, strict=True))]
    if batch_first:
        return (stacked[0].permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in stacked[1:]))
    return tuple(stacked)


def _torch_kernel(
    kind: str,
    function: str,
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    start: tuple[torch.Tensor, torch.Tensor],
) -> Parts:
    w, r, b = weights
    size = r.shape[-1]

    def gates(stacked: torch.Tensor) -> torch.Tensor:
        parts = stacked.split(size)
        return torch.cat([parts[place] for place in _TORCH_ORDER[kind]])

    count = len(_TORCH_ORDER[kind]) * size
    held = [gates(w), gates(r)] + ([] if b is None else [gates(b[:count]), gates(b[count:])])
    hidden, cell = (state.unsqueeze(0).contiguous() for state in start)
    settings = (
        b is not None,
        1,
        0.0,
        False,
        False,
        False,
    )  # biases, layers, dropout, train, bidirectional, batch first
    if kind == "LSTM":
        y, last, memory = torch.lstm(x, (hidden, cell), held, *settings)
        return y, last[0], memory[0]
    if kind == "GRU":
        y, last = torch.gru(x, hidden, held, *settings)
    else:
        y, last = (torch.rnn_relu if function == "relu" else torch.rnn_tanh)(x, hidden, held, *settings)
    return y, last[0]


def _loop(
    kind: str,
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    start: tuple[torch.Tensor, torch.Tensor],
    lengths: torch.Tensor | None,
    peepholes: torch.Tensor | None,
    form: tuple[list[Function], float, bool, bool],
) -> Parts:
    w, r, b = weights
    functions, clip, coupled, reset_after = form

    def act(place: int, value: torch.Tensor) -> torch.Tensor:
        name, alpha, beta = functions[place]
        # Gates are clipped, as onnxruntime does. The standard's words could also mean the cell on its way out; onnx's
        # suite has no case.
        clipped = torch.clamp(value, -clip, clip) if clip and place < _GATE_FUNCTIONS else value
        return _ACTIVATIONS[name](clipped, alpha, beta)

    before, inner = (None, None) if b is None else b.chunk(2)
    projected = F.linear(x, w, before)  # every step at once
    state, memory = start
    outputs = []
    for step in range(x.shape[0]):
        held = state, memory
        match kind:
            case "RNN":
                state = act(0, projected[step] + F.linear(state, r, inner))
            case "GRU":
                state = _gru_step(projected[step], state, r, inner, reset_after, act)
            case "LSTM":
                gates = projected[step] + F.linear(state, r, inner)
                state, memory = _lstm_step(gates, memory, peepholes, coupled, act)
        output = state
        if lengths is not None:  # a sample that has ended keeps its state
            alive = (lengths.to(x.device) > step).unsqueeze(1)
            output = torch.where(alive, state, torch.zeros_like(state))
            state, memory = torch.where(alive, state, held[0]), torch.where(alive, memory, held[1])
        outputs.append(output)
    y = torch.stack(outputs) if outputs else x.new_zeros(0, x.shape[1], r.shape[-1])
    return (y, state, memory) if kind == "LSTM" else (y, state)


def _gru_step(
    projected: torch.Tensor,
    state: torch.Tensor,
    r: torch.Tensor,
    bias: torch.Tensor | None,
    reset_after: bool,
    act: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    size = state.shape[-1]
    gate_bias, hidden_bias = (None, None) if bias is None else (bias[: 2 * size], bias[2 * size :])
    update, reset = act(0, projected[:, : 2 * size] + F.linear(state, r[: 2 * size], gate_bias)).chunk(2, 1)
    if reset_after:
        recurrent_part = reset * F.linear(state, r[2 * size :], hidden_bias)
    else:
        recurrent_part = F.linear(reset * state, r[2 * size :], hidden_bias)
    return (1.0 - update) * act(1, projected[:, 2 * size :] + recurrent_part) + update * state


def _lstm_step(
    gates: torch.Tensor,
    memory: torch.Tensor,
    peepholes: torch.Tensor | None,
    coupled: bool,
    act: Callable[[int, torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    enter, leave, forget, new = gates.chunk(4, 1)
    see_enter, see_leave, see_forget = (None, None, None) if peepholes is None else peepholes.chunk(3)
    enter = act(0, enter if see_enter is None else enter + see_enter * memory)
    forget = 1.0 - enter if coupled else act(0, forget if see_forget is None else forget + see_forget * memory)
    memory = forget * memory + enter * act(1, new)
    leave = act(0, leave if see_leave is None else leave + see_leave * memory)
    return leave * act(2, memory), memory


def _reversed_places(x: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """Step to take at each step ``[T, N]`` so that every sample runs backwards within its own length."""
    steps = torch.arange(x.shape[0], device=x.device).unsqueeze(1).expand(x.shape[0], x.shape[1])
    if lengths is None:
        return steps.flip(0)
    ends = lengths.to(device=x.device, dtype=torch.int64).unsqueeze(0)
    return torch.where(steps < ends, ends - 1 - steps, steps)


def _reorder(value: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return torch.gather(value, 0, places.unsqueeze(-1).expand(-1, -1, value.shape[-1]))
