"""Rules for attention with a recurrent state and for attention with given sub-graphs (see ``eexform.backends.fx``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_graphsurgeon as gs
import torch
from torch import fx, nn

from eexform.backends.fx import Raiser, op
from eexform.backends.fx_control import adopt, raise_body
from eexform.backends.torch_types import torch_type
from eexform.errors import ModelError

_RULES = ("linear", "gated", "delta", "gated_delta")


@op("LinearAttention")
def _linear_attention(raiser: Raiser, node: gs.Node) -> Sequence[fx.Node]:
    rule = str(node.attrs.get("update_rule", "gated_delta"))
    if rule not in _RULES:
        raise ModelError(f"node {node.name!r} (LinearAttention): update_rule {rule!r} cannot be raised to torch")
    given = [raiser.value(node, place) if raiser.has(node, place) else None for place in range(6)]
    heads = int(node.attrs["q_num_heads"]), int(node.attrs["kv_num_heads"])
    found = raiser.call(linear_attention, *given, heads=heads, rule=rule, scale=float(node.attrs.get("scale", 0.0)))
    return raiser.pick(found, 2)


@op("ai.onnx.preview::FlexAttention")
def _flex_attention(raiser: Raiser, node: gs.Node) -> fx.Node:
    bodies = {
        name: raise_body(raiser, node.attrs[name])
        for name in ("score_mod", "prob_mod")
        if isinstance(node.attrs.get(name), gs.Graph)
    }
    scale, precision = node.attrs.get("scale"), node.attrs.get("softmax_precision")
    module = FlexAttention(
        **{name: body.module for name, body in bodies.items()},
        scale=None if scale is None else float(scale),
        precision=torch_type(int(precision)) if precision else None,
    )
    outside = [bodies[name].values if name in bodies else [] for name in ("score_mod", "prob_mod")]
    call = raiser.module(node, module, [*(raiser.value(node, place) for place in range(3)), *outside])
    adopt(raiser, call, bodies)
    return call


class FlexAttention(nn.Module):
    """Attention whose scores and probabilities go through given modules.

    Args:
        score_mod, prob_mod: of values from outside and the scores (probabilities) ``[N, heads, T, S]``.
        scale: of the scores; one over the root of the head's size by default.
        precision: type of scores and probabilities; ``float32``, or ``float64`` where the query is, by default.
    """

    def __init__(
        self,
        score_mod: fx.GraphModule | None = None,
        prob_mod: fx.GraphModule | None = None,
        *,
        scale: float | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.score_mod = score_mod
        self.prob_mod = prob_mod
        self.scale = scale
        self.precision = precision

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        score_values: Sequence[Any],
        prob_values: Sequence[Any],
    ) -> torch.Tensor:
        kind = self.precision or (torch.float64 if query.dtype == torch.float64 else torch.float32)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scale = 1.0 / math.sqrt(query.shape[3]) if self.scale is None else self.scale
        scores = torch.matmul(query.to(kind), key.to(kind).mT) * scale
        if self.score_mod is not None:
            scores = self.score_mod(*score_values, scores)
        chances = torch.softmax(scores, -1)
        if self.prob_mod is not None:
            chances = self.prob_mod(*prob_values, chances)
        return torch.matmul(chances, value.to(kind)).to(value.dtype)


# -- torch functions -----------------------------------------------------------------------------------------------


def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor | None,
    decay: torch.Tensor | None,
    beta: torch.Tensor | None,
    *,
    heads: tuple[int, int],
    rule: str,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ONNX ``LinearAttention``, token after token.

    Args:
        query, key, value: ``[N, T, heads*size]``.
        state: of each head ``[N, heads, key size, value size]``; zeros by default.
        decay: logarithm of what stays of the state ``[N, T, heads]`` or ``[N, T, heads*key size]``.
        beta: how much of the error is written ``[N, T, heads]`` or ``[N, T, 1]``.
        heads: of the query, and of key, value and state.
        rule: ``linear`` and ``gated`` add the new product, ``delta`` and ``gated_delta`` write the error.
        scale: of the output; one over the root of the query's size by default.

    Returns:
        outputs ``[N, T, heads*value size]`` and the last state.
    """
    kind = query.dtype
    queries, own = heads
    q, k, v = (
        part.to(torch.float32) if kind in (torch.float16, torch.bfloat16) else part for part in (query, key, value)
    )
    q, k, v = q.unflatten(-1, (queries, -1)), k.unflatten(-1, (own, -1)), v.unflatten(-1, (own, -1))
    held = q.new_zeros(q.shape[0], own, k.shape[-1], v.shape[-1]) if state is None else state.to(q.dtype)
    kept = None if decay is None or "gated" not in rule else decay.to(q.dtype).unflatten(-1, (own, -1)).exp()
    written = None if beta is None or "delta" not in rule else beta.to(q.dtype).unsqueeze(-1)
    factor = scale or 1.0 / math.sqrt(q.shape[-1])
    outputs = []
    for step in range(q.shape[1]):
        if kept is not None:
            held = held * kept[:, step].unsqueeze(-1)
        new = v[:, step]
        if written is not None:
            new = written[:, step] * (new - torch.einsum("nhkv,nhk->nhv", held, k[:, step]))
        held = held + k[:, step].unsqueeze(-1) * new.unsqueeze(-2)
        shared = held.repeat_interleave(queries // own, 1)
        outputs.append(factor * torch.einsum("nhkv,nhk->nhv", shared, q[:, step]))
    result = torch.stack(outputs, 1).flatten(2)
    return result.to(kind), held.to(kind if state is None else state.dtype)
