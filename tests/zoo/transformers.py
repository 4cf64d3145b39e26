"""Tiny transformers as exporters write them with a dynamic batch.

The batch size is computed by shape nodes: read once from the input and used everywhere, as exporters with symbolic
sizes leave it (vit, swin), or read again in front of every reshape, as tracing leaves it (bert).
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from tests.zoo.net import Net

CLASSES = 5


def _heads(net: Net, x: str, width: int, heads: int) -> str:
    """[N, T, C] -> [N, heads, T, C / heads]."""
    batch, tokens = net.size(x, 0), net.size(x, 1)
    return net.transpose(net.reshape(x, batch, tokens, heads, width // heads), 0, 2, 1, 3)


def _attend(net: Net, query: str, key: str, value: str, size: int, mask: str | None = None) -> str:
    """Softmax of the scaled products, applied to the values; all [N, heads, T, size]."""
    scores = net.op("MatMul", net.op("Mul", query, net.scalar(size**-0.5)), net.transpose(key, 0, 1, 3, 2))
    if mask is not None:
        scores = net.op("Add", scores, mask)
    return net.op("MatMul", net.op("Softmax", scores, axis=-1), value)


def vit() -> onnx.ModelProto:
    """Patches, a class token expanded to the batch size, position embedding, three pre-norm blocks with fused qkv."""
    net = Net("vit")
    width, heads = 12, 3
    image = net.input("image", 3, 16, 16)
    batch = net.size(image, 0)
    x = net.transpose(net.reshape(net.conv(image, 3, width, 4, 4), batch, width, -1), 0, 2, 1)
    token = net.op("Expand", net.weight(1, 1, width), net.vector([batch, 1, width]))
    x = net.op("Add", net.op("Concat", token, x, axis=1), net.weight(1, 17, width))
    for _ in range(3):
        normed = net.layer_norm(x, width)
        qkv = net.reshape(net.linear(normed, width, 3 * width), batch, 17, 3, heads, width // heads)
        qkv = net.transpose(qkv, 2, 0, 3, 1, 4)
        query, key, value = (net.pick(qkv, i, 0) for i in range(3))
        mixed = net.transpose(_attend(net, query, key, value, width // heads), 0, 2, 1, 3)
        x = net.op("Add", x, net.linear(net.reshape(mixed, batch, 17, width), width, width))
        inner = net.gelu(net.linear(net.layer_norm(x, width), width, 2 * width))
        x = net.op("Add", x, net.linear(inner, 2 * width, width))
    return net.model(net.gemm(net.pick(net.layer_norm(x, width), 0, 1), width, CLASSES), CLASSES)


def swin(depth: int = 2) -> onnx.ModelProto:
    """Windows cut out by reshapes that merge them into the batch, shifted by slices, patch merging in between.

    Args:
        depth: blocks in each of the two stages; every other one is shifted.
    """
    net = Net("swin")
    window, heads = 4, 2

    def roll(x: str, by: int, side: int) -> str:
        for axis in (1, 2):
            x = net.op("Concat", net.slice(x, by % side, side, axis), net.slice(x, 0, by % side, axis), axis=axis)
        return x

    def block(x: str, width: int, side: int, shift: int) -> str:
        inner = net.layer_norm(x, width)
        if shift:
            inner = roll(inner, shift, side)
        parts = side // window
        inner = net.reshape(inner, batch, parts, window, parts, window, width)
        inner = net.reshape(net.transpose(inner, 0, 1, 3, 2, 4, 5), -1, window * window, width)
        windows = net.op("Mul", batch, net.const(parts * parts))
        qkv = net.reshape(net.linear(inner, width, 3 * width), windows, window * window, 3, heads, width // heads)
        qkv = net.transpose(qkv, 2, 0, 3, 1, 4)
        query, key, value = (net.pick(qkv, i, 0) for i in range(3))
        bias = net.weight(1, heads, window * window, window * window)
        mixed = _attend(net, query, key, value, width // heads, bias)
        mixed = net.reshape(net.transpose(mixed, 0, 2, 1, 3), windows, window * window, width)
        mixed = net.reshape(net.linear(mixed, width, width), -1, parts, parts, window, window, width)
        mixed = net.reshape(net.transpose(mixed, 0, 1, 3, 2, 4, 5), batch, side, side, width)
        if shift:
            mixed = roll(mixed, -shift, side)
        x = net.op("Add", x, mixed)
        inner = net.gelu(net.linear(net.layer_norm(x, width), width, 2 * width))
        return net.op("Add", x, net.linear(inner, 2 * width, width))

    width, side = 8, 8
    image = net.input("image", 3, 16, 16)
    batch = net.size(image, 0)
    x = net.conv(image, 3, width, 1, 2)
    x = net.layer_norm(net.transpose(x, 0, 2, 3, 1), width)
    for stage in range(2):
        for i in range(depth):
            x = block(x, width, side, window // 2 if i % 2 and side > window else 0)
        if not stage:
            rows = [net.slice(net.slice(x, i % 2, side, 1, 2), i // 2, side, 2, 2) for i in range(4)]
            merged = net.layer_norm(net.op("Concat", *rows, axis=-1), 4 * width)
            x = net.op("MatMul", merged, net.weight(4 * width, 2 * width, scale=0.2))
            width, side = 2 * width, side // 2
    x = net.op("ReduceMean", net.layer_norm(x, width), axes=[1, 2], keepdims=0)
    return net.model(net.gemm(x, width, CLASSES), CLASSES)


def bert() -> onnx.ModelProto:
    """Token and position embedding, three post-norm blocks that share one extended attention mask, a pooler."""
    net = Net("bert")
    width, heads, words, places = 12, 3, 20, 16
    ids = net.input("input_ids", "seq", dtype=TensorProto.INT64)
    mask = net.input("attention_mask", "seq", dtype=TensorProto.INT64)
    wide = net.op("Cast", net.op("Unsqueeze", mask, net.const([1, 2])), to=TensorProto.FLOAT)
    wide = net.op("Mul", net.op("Sub", net.scalar(1), wide), net.scalar(-1e4))
    places_now = net.op("Range", net.const(0), net.size(ids, 1), net.const(1))
    x = net.op("Gather", net.weight(words, width), ids, axis=0)
    x = net.op("Add", x, net.op("Gather", net.weight(places, width), places_now, axis=0))
    x = net.layer_norm(x, width)
    for _ in range(3):
        query, key, value = (_heads(net, net.linear(x, width, width), width, heads) for _ in range(3))
        mixed = net.transpose(_attend(net, query, key, value, width // heads, wide), 0, 2, 1, 3)
        mixed = net.reshape(mixed, net.size(mixed, 0), net.size(mixed, 1), width)
        x = net.layer_norm(net.op("Add", net.linear(mixed, width, width), x), width)
        inner = net.gelu(net.linear(x, width, 2 * width))
        x = net.layer_norm(net.op("Add", net.linear(inner, 2 * width, width), x), width)
    pooled = net.op("Tanh", net.gemm(net.pick(x, 0, 1), width, width))
    return net.model(net.gemm(pooled, width, CLASSES), CLASSES)


def bert_feeds(batch: int, seed: int) -> dict[str, np.ndarray]:
    """Ids of 7 words per sentence and masks that end sentences early."""
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 8, size=(batch, 1))
    return {
        "input_ids": random.integers(0, 20, size=(batch, 7)),
        "attention_mask": (np.arange(7) < lengths).astype(np.int64),
    }
