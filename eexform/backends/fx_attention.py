"""Rules for attention and rotary position embedding (see :mod:`eexform.backends.fx`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import fx

from eexform.backends.fx import Raiser, op
from eexform.backends.torch_types import torch_type


@op("Attention")
def _attention(raiser: Raiser, node: gs.Node) -> Sequence[fx.Node]:
    given = [raiser.value(node, place) if raiser.has(node, place) else None for place in range(7)]
    scale, precision = node.attrs.get("scale"), node.attrs.get("softmax_precision")
    outputs = [place < len(node.outputs) and not node.outputs[place].is_empty() for place in range(4)]
    found = raiser.call(
        attention,
        *given,
        heads=(int(node.attrs.get("q_num_heads", 0)), int(node.attrs.get("kv_num_heads", 0))),
        scale=None if scale is None else float(scale),
        causal=bool(node.attrs.get("is_causal", 0)),
        softcap=float(node.attrs.get("softcap", 0.0)),
        precision=torch_type(precision) if precision else None,
        window=(int(node.attrs.get("left_window_size", -1)), int(node.attrs.get("right_window_size", -1))),
        scores_after=int(node.attrs.get("qk_matmul_output_mode", 0)) if outputs[3] else None,
    )
    return raiser.pick(found, len(node.outputs))


@op("RotaryEmbedding")
def _rotary(raiser: Raiser, node: gs.Node) -> fx.Node:
    given = [raiser.value(node, place) if raiser.has(node, place) else None for place in range(4)]
    return raiser.call(
        rotary_embedding,
        *given,
        heads=int(node.attrs.get("num_heads", 0)),
        size=int(node.attrs.get("rotary_embedding_dim", 0)),
        interleaved=bool(node.attrs.get("interleaved", 0)),
    )


# -- torch functions -----------------------------------------------------------------------------------------------


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    past_key: torch.Tensor | None,
    past_value: torch.Tensor | None,
    lengths: torch.Tensor | None,
    *,
    heads: tuple[int, int],
    scale: float | None,
    causal: bool,
    softcap: float,
    precision: torch.dtype | None,
    window: tuple[int, int],
    scores_after: int | None,
) -> tuple[torch.Tensor | None, ...]:
    """ONNX ``Attention``; the formula is the operator's own.

    Args:
        query, key, value: ``[N, heads, T, size]``, or ``[N, T, heads*size]`` with ``heads`` given.
        mask: what is added to the scores, or where they count (bool); broadcasts to ``[N, heads, T, S]``, and may be
            shorter than S.
        past_key, past_value: put in front of key and value.
        lengths: number of valid keys of each sample ``[N]``.
        heads: of the query, and of key and value.
        scale: of the scores; one over the root of the head's size by default.
        causal: no query sees keys behind its own position.
        softcap: scores are bent into this bound; 0 for none.
        precision: type in which the softmax is computed.
        window: keys before and after a query's position that it sees; -1 for all.
        scores_after: what the fourth output holds: 0 products, 1 after the cap, 2 after the mask, 3 the probabilities.

    Returns:
        the output in the query's form, all keys, all values, and the fourth output (``None`` where not asked for).
    """
    packed = query.dim() == 3
    if packed:
        query, key, value = (_unpacked(part, heads[place]) for part, place in ((query, 0), (key, 1), (value, 1)))
    past = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    present = key, value
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    plain = mask is None and lengths is None and window == (-1, -1) and not softcap and not past
    plain = plain and (query.is_cuda or query.dtype in (torch.float32, torch.float64))
    if plain and precision is None and scores_after is None and query.shape[3] and key.shape[2]:
        result, shown = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale), None
    else:
        root = math.sqrt(1.0 / math.sqrt(query.shape[3]) if scale is None else scale)
        scores = torch.matmul(query * root, (key * root).mT)
        stages = [scores]
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        stages.append(scores)
        scores = _masked(scores, mask, lengths, past, causal, window)
        stages.append(scores)
        chances = _softmax(scores, precision)
        stages.append(chances)
        shown = None if scores_after is None else stages[scores_after]
        result = torch.matmul(chances.to(value.dtype), value)
    return result.transpose(1, 2).flatten(2) if packed else result, *present, shown


def rotary_embedding(
    value: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    positions: torch.Tensor | None,
    *,
    heads: int,
    size: int,
    interleaved: bool,
) -> torch.Tensor:
    """ONNX ``RotaryEmbedding``: pairs of elements turn by an angle that grows with the position.

    Args:
        value: ``[N, heads, T, S]``, or ``[N, T, heads*S]`` with ``heads`` given.
        cosines, sines: ``[N, T, size/2]``, or ``[P, size/2]`` with ``positions``.
        positions: row of the tables for each token ``[N, T]``.
        heads: number of heads of a packed value.
        size: how many leading elements of a head turn; 0 for all.
        interleaved: a pair is two neighbours, not an element of each half.
    """
    packed = value.dim() == 3
    tokens = value.unflatten(-1, (heads, -1)) if packed else value.transpose(1, 2)  # [N, T, heads, S]
    size = size or tokens.shape[-1]
    if positions is not None:
        cosines, sines = cosines[positions.to(torch.int64)], sines[positions.to(torch.int64)]
    cosines, sines = cosines.unsqueeze(2), sines.unsqueeze(2)
    turning, rest = tokens[..., :size], tokens[..., size:]
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning.chunk(2, -1)
    pair = cosines * first - sines * second, sines * first + cosines * second
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    tokens = torch.cat([turned, rest], -1)
    return tokens.flatten(2) if packed else tokens.transpose(1, 2)


def _unpacked(part: torch.Tensor, heads: int) -> torch.Tensor:
    return part.unflatten(-1, (heads, -1)).transpose(1, 2)


def _masked(
    scores: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    past: int,
    causal: bool,
    window: tuple[int, int],
) -> torch.Tensor:
    queries, keys = scores.shape[-2:]
    never = float("-inf")
    if mask is not None:
        missing = keys - mask.shape[-1]
        if mask.dtype == torch.bool:
            mask = F.pad(mask, (0, missing), value=False) if missing else mask
            scores = scores.masked_fill(~mask, never)
        else:
            scores = scores + (F.pad(mask, (0, missing), value=never) if missing else mask)
    key_at = torch.arange(keys, device=scores.device)
    query_at = torch.arange(queries, device=scores.device).unsqueeze(1) + past
    if lengths is not None:
        ends = lengths.to(scores.device).reshape(-1, 1, 1, 1)
        scores = scores.masked_fill(key_at >= ends, never)
        if not past:
            query_at = query_at + ends - queries
    before, after = window
    if causal:
        after = 0 if after < 0 else min(after, 0)
    if after >= 0:
        scores = scores.masked_fill(key_at > query_at + after, never)
    if before >= 0:
        scores = scores.masked_fill(key_at < query_at - before, never)
    return scores


def _softmax(scores: torch.Tensor, precision: torch.dtype | None) -> torch.Tensor:
    """Softmax over the keys; a query that sees none gets zeros (and no gradient), not NaN."""
    kind = scores.dtype
    scores = scores if precision is None else scores.to(precision)
    blind = torch.isneginf(scores).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0).to(kind)
