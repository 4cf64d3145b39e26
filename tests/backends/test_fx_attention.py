"""Attention and its relatives against torch's own, with gradients; what onnx's suite checks is not repeated here."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from eexform.backends.fx_attention import attention, rotary_embedding
from eexform.backends.fx_linear_attention import linear_attention

DEFAULTS = {
    "heads": (0, 0), "scale": None, "causal": False, "softcap": 0.0, "precision": None, "window": (-1, -1),
    "scores_after": None,
}  # fmt: skip


def tensors(*shapes, dtype=torch.float32):
    torch.manual_seed(3)
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def ours(query, key, value, mask=None, lengths=None, **settings):
    return attention(query, key, value, mask, None, None, lengths, **(DEFAULTS | settings))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", ["none", "bool", "float"])
def test_attention_and_gradients_are_torchs(causal, masked):
    shapes = [(2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 6)]
    mine, theirs = tensors(*shapes), tensors(*shapes)
    mask = {"none": None, "bool": torch.rand(2, 1, 5, 5) > 0.3, "float": torch.randn(5, 5)}[masked]
    both = mask
    if causal and mask is not None:
        seen = torch.ones(5, 5, dtype=torch.bool).tril()
        both = mask & seen if masked == "bool" else mask.masked_fill(~seen, float("-inf"))
    expected = F.scaled_dot_product_attention(*theirs, attn_mask=both, is_causal=causal and mask is None)
    found = ours(*mine, mask=mask, causal=causal, softcap=0.0)[0]
    blind = torch.zeros(2, 1, 5, dtype=torch.bool) if masked != "bool" else ~both.any(-1)
    torch.testing.assert_close(found, expected.masked_fill(blind.unsqueeze(-1), 0.0), atol=1e-5, rtol=1e-4)
    found.square().sum().backward()
    expected.masked_fill(blind.unsqueeze(-1), 0.0).square().sum().backward()
    for one, other in zip(mine, theirs, strict=True):
        assert one.grad.isfinite().all()
        if not blind.any():
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4)


def test_a_query_that_sees_nothing_gives_zeros_and_no_nan():
    query, key, value = tensors((1, 1, 2, 4), (1, 1, 3, 4), (1, 1, 3, 4))
    mask = torch.tensor([[False, False, False], [True, True, False]])
    found, *_, chances = ours(query, key, value, mask=mask, scores_after=3)
    assert (found[0, 0, 0] == 0).all()
    assert (chances[0, 0, 0] == 0).all()
    assert torch.allclose(chances[0, 0, 1].sum(), torch.tensor(1.0))
    found.sum().backward()
    assert query.grad.isfinite().all()
    assert (query.grad[0, 0, 0] == 0).all()


def test_gradients_with_everything_on():
    query, key, value = tensors((1, 4, 3, 2), (1, 2, 4, 2), (1, 2, 4, 3), dtype=torch.float64)

    def run(q, k, v):
        return ours(q, k, v, lengths=torch.tensor([4]), softcap=1.5, causal=True, window=(2, -1), scores_after=1)[::3]

    assert torch.autograd.gradcheck(run, (query, key, value))


def test_packed_heads_are_the_same():
    query, key, value = tensors((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4))
    packed = [part.transpose(1, 2).flatten(2) for part in (query, key, value)]
    found = ours(*packed, heads=(3, 3))[0]
    torch.testing.assert_close(found, ours(query, key, value)[0].transpose(1, 2).flatten(2))


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    """What rotary embedding is for: scores of rotated tokens depend on how far apart they are."""
    angles = torch.arange(8.0).unsqueeze(1) * torch.tensor([1.0, 0.3])
    token = torch.randn(1, 1, 1, 4).expand(1, 1, 8, 4)
    for interleaved in (False, True):
        turned = rotary_embedding(
            token, angles.cos(), angles.sin(), torch.arange(8).unsqueeze(0), heads=0, size=0, interleaved=interleaved
        )
        torch.testing.assert_close(turned.norm(dim=-1), token.norm(dim=-1))
        scores = turned[0, 0] @ turned[0, 0].mT
        torch.testing.assert_close(scores.diagonal(1), scores[0, 1].expand(7))
        torch.testing.assert_close(scores.diagonal(3), scores[0, 3].expand(5))


@pytest.mark.parametrize("rule", ["linear", "gated", "delta", "gated_delta"])
def test_linear_attention_is_the_plain_recurrence(rule):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    decay, beta = -torch.rand(2, 4, 1, dtype=torch.float64), torch.rand(2, 4, 1, dtype=torch.float64)

    def run(q, k, v):
        return linear_attention(q, k, v, None, decay, beta, heads=(1, 1), rule=rule, scale=1.0)

    found, last = run(query, key, value)
    state = torch.zeros(2, 3, 3, dtype=torch.float64)
    for step in range(4):
        state = state * decay[:, step].exp().unsqueeze(-1) if "gated" in rule else state
        new = value[:, step]
        if "delta" in rule:
            new = beta[:, step] * (new - (state.mT @ key[:, step].unsqueeze(-1)).squeeze(-1))
        state = state + key[:, step].unsqueeze(-1) * new.unsqueeze(1)
        torch.testing.assert_close(found[:, step], (query[:, step].unsqueeze(1) @ state).squeeze(1))
    torch.testing.assert_close(last[:, 0], state)
    assert torch.autograd.gradcheck(run, (query, key, value))
