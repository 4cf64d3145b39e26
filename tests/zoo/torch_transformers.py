"""Tiny transformers and mixers as nn.Modules, wired like the well-known ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 5


def mlp(width: int, hidden: int) -> nn.Sequential:
    """Two linear layers with GELU between them."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class Attention(nn.Module):
    """Fused queries, keys and values, ``scaled_dot_product_attention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = mlp(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches of a 16x16 image, a class token expanded to the batch, position embedding, two blocks."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 4, 4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 17, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(2)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed(image).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class ViTEncoder(nn.Module):
    """The same idea with torch's own ``nn.TransformerEncoder`` (``nn.MultiheadAttention`` inside)."""

    def __init__(self, width: int = 12, heads: int = 2) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(3, width, 4, 4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embedding = nn.Parameter(torch.zeros(1, 17, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        batch = image.shape[0]
        x = self.conv_proj(image).reshape(batch, -1, 16).permute(0, 2, 1)
        x = torch.cat([self.class_token.repeat(batch, 1, 1), x], dim=1)
        return self.head(self.encoder(x + self.pos_embedding)[:, 0])


class WindowAttention(nn.Module):
    """Attention within windows [windows * N, T, C] with relative position bias, and a mask where they are shifted."""

    def __init__(self, width: int, window: int, heads: int) -> None:
        super().__init__()
        self.heads, self.tokens = heads, window * window
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        grid = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0) + window - 1
        self.register_buffer("relative_position_index", apart[..., 0] * (2 * window - 1) + apart[..., 1])
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        windows, tokens, width = x.shape
        qkv = self.qkv(x).reshape(windows, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0] * (width // self.heads) ** -0.5, qkv[1], qkv[2]
        scores = query @ key.transpose(-2, -1)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        scores = scores + bias.view(tokens, tokens, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            kinds = mask.shape[0]
            scores = scores.view(windows // kinds, kinds, self.heads, tokens, tokens) + mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, self.heads, tokens, tokens)
        mixed = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(windows, tokens, width)
        return self.proj(mixed)


class SwinBlock(nn.Module):
    """Window attention on [N, T, C]; the windows of a shifted block are rolled and masked."""

    def __init__(self, width: int, side: int, window: int, shift: int, heads: int = 2) -> None:
        super().__init__()
        self.side, self.window, self.shift = side, window, shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, window, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp(width, 2 * width)
        self.register_buffer("attn_mask", self._mask() if shift else None)

    def _mask(self) -> Tensor:
        regions = torch.zeros(1, self.side, self.side, 1)
        cuts = (slice(0, -self.window), slice(-self.window, -self.shift), slice(-self.shift, None))
        for number, (rows, columns) in enumerate((a, b) for a in cuts for b in cuts):
            regions[:, rows, columns, :] = number
        windows = self._split(regions).squeeze(-1)
        return (windows.unsqueeze(1) - windows.unsqueeze(2) != 0).float() * -100.0

    def _split(self, x: Tensor) -> Tensor:
        batch, height, side, width = x.shape
        size = self.window
        x = x.view(batch, height // size, size, side // size, size, width)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size * size, width)

    def _join(self, windows: Tensor) -> Tensor:
        parts, size = self.side // self.window, self.window
        x = windows.view(-1, parts, parts, size, size, windows.shape[-1])
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, self.side, self.side, windows.shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        inner = self.norm1(x).view(batch, self.side, self.side, width)
        if self.shift:
            inner = torch.roll(inner, shifts=(-self.shift, -self.shift), dims=(1, 2))
        inner = self._join(self.attn(self._split(inner), self.attn_mask))
        if self.shift:
            inner = torch.roll(inner, shifts=(self.shift, self.shift), dims=(1, 2))
        x = x + inner.view(batch, tokens, width)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the width."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, width = x.shape
        x = x.view(batch, self.side, self.side, width)
        parts = [x[:, row::2, column::2, :] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1).view(batch, -1, 4 * width)))


class Swin(nn.Module):
    """Two blocks, the second one shifted, patch merging, and a block whose window is the whole map."""

    def __init__(self, width: int = 8, window: int = 4) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 2, 2)
        self.patch_norm = nn.LayerNorm(width)
        first = [SwinBlock(width, 8, window, shift) for shift in (0, window // 2)]
        self.layers = nn.Sequential(*first, PatchMerging(width, 8), SwinBlock(2 * width, 4, window, 0))
        self.norm = nn.LayerNorm(2 * width)
        self.avgpool = nn.AdaptiveAvgPool1d(1)
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_norm(self.patch_embed(image).flatten(2).transpose(1, 2))
        x = self.norm(self.layers(x))
        return self.head(torch.flatten(self.avgpool(x.transpose(1, 2)), 1))


class MixerBlock(nn.Module):
    """One MLP across the patches and one across the channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.tokens = mlp(tokens, 24)
        self.norm2 = nn.LayerNorm(width)
        self.channels = mlp(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """Patches, two mixer blocks, the mean of all tokens."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(*(MixerBlock(16, width) for _ in range(2)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


@dataclass
class ClassifierOutput:
    """What a text classifier returns."""

    logits: Tensor
    pooled: Tensor


class BertLayer(nn.Module):
    """Post-norm attention with separate projections, and two linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.intermediate = nn.Linear(width, 2 * width)
        self.dense = nn.Linear(2 * width, width)
        self.output_norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(0.1)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, x.shape[-1] // self.heads).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self._heads(self.query(x)), self._heads(self.key(x)), self._heads(self.value(x))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + mask
        mixed = (self.dropout(functional.softmax(scores, dim=-1)) @ value).transpose(1, 2).contiguous()
        x = self.attention_norm(self.dropout(self.output(mixed.view(x.shape))) + x)
        return self.output_norm(self.dropout(self.dense(functional.gelu(self.intermediate(x)))) + x)


class Bert(nn.Module):
    """Word, position and type embedding, two layers that share one attention mask, a pooler; returns a dataclass."""

    def __init__(self, width: int = 12, heads: int = 3, words: int = 20, places: int = 16) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(words, width, padding_idx=0)
        self.position_embeddings = nn.Embedding(places, width)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.embeddings_norm = nn.LayerNorm(width, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(places).expand((1, -1)))
        self.layer = nn.ModuleList(BertLayer(width, heads) for _ in range(2))
        self.pooler = nn.Linear(width, width)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> ClassifierOutput:
        places = self.position_ids[:, : input_ids.shape[1]]
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(torch.zeros_like(input_ids))
        x = self.embeddings_norm(x + self.position_embeddings(places))
        mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.layer:
            x = layer(x, mask)
        pooled = torch.tanh(self.pooler(x[:, 0]))
        return ClassifierOutput(self.classifier(pooled), pooled)
