"""The quickstart's trunk: a small residual network for 8x8 digits, written as a graph and trained on the spot."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch.nn import functional

from eexform.backends.fx import fx_parameters, raise_to_fx
from eexform.data import Dataset
from eexform.heads import with_parameters
from eexform.heads.blocks import HeadEmitter, conv_bn_relu
from eexform.ir.graph import BATCH, Graph
from eexform.progress import Progress, Silent
from eexform.training.threads import torch_threads

WIDTHS = (16, 32, 64)
BLOCKS = 3


def digits_graph(seed: int = 0) -> Graph:
    """An untrained network [N, 1, 8, 8] → logits [N, 10]: a stem and three stages of three residual blocks."""
    image = gs.Variable("image", dtype=np.dtype(np.float32), shape=[BATCH, 1, 8, 8])
    draft = gs.Graph(inputs=[image], outputs=[], name="digits_cnn", opset=17)
    emitter = HeadEmitter(draft, np.random.default_rng(seed))
    value = conv_bn_relu(emitter.scoped("stem."), image, 1, WIDTHS[0], kernel=3)
    channels = WIDTHS[0]
    for stage, width in enumerate(WIDTHS):
        for block in range(BLOCKS):
            scope = emitter.scoped(f"stage{stage}.block{block}.")
            stride = 2 if stage and not block else 1
            inner = conv_bn_relu(scope, value, channels, width, kernel=3, stride=stride, name="conv1")
            inner = conv_bn_relu(scope, inner, width, width, kernel=3, name="conv2")
            if stride > 1 or channels != width:
                value = conv_bn_relu(scope, value, channels, width, kernel=1, stride=stride, name="shortcut")
            total = scope.node("Add", inner, value, name="add", shape=inner.shape)
            value = scope.node("Relu", total, name="relu", shape=inner.shape)
            channels = width
    pooled = emitter.node("GlobalAveragePool", value, name="pool", shape=[BATCH, channels, 1, 1])
    flat = emitter.node("Flatten", pooled, name="flatten", shape=[BATCH, channels], axis=1)
    weight = emitter.normal("classifier.weight", (10, channels), channels**-0.5)
    bias = emitter.filled("classifier.bias", 10, 0.0)
    logits = emitter.node("Gemm", flat, weight, bias, name="classifier", shape=[BATCH, 10], transB=1)
    draft.outputs = [emitter.rename(logits, "logits")]
    return Graph(draft)


def train_digits(
    dataset: Dataset, *, epochs: int = 12, batch_size: int = 32, seed: int = 0, progress: Progress | None = None
) -> Graph:
    """Train the network on head-train alone, so that the other splits are unseen by the trunk.

    Args:
        dataset: the digits; need not be bound.
        epochs: passes over head-train.
        batch_size: samples per step.
        seed: of the initial weights and the order.
        progress: who is told.
    """
    graph = digits_graph(seed)
    bound = dataset.bind(graph)
    module = raise_to_fx(graph)
    steps = -(-bound.size("head_train") // batch_size)
    optimiser = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=3e-3, total_steps=epochs * steps)
    module.train()
    # One thread: with images this small a second one mostly waits, and costs many times its worth on a busy machine.
    with torch_threads(1), (progress or Silent()).task("training the trunk", epochs * steps) as task:
        for epoch in range(epochs):
            for batch in bound.batches("head_train", batch_size, seed=seed, augment=True, epoch=epoch):
                assert batch.labels is not None
                loss = functional.cross_entropy(
                    module(torch.from_numpy(batch.feeds["image"])), torch.from_numpy(batch.labels)
                )
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
                task.advance(1, f"epoch {epoch + 1}, loss {loss.item():.3f}")
    return with_parameters(graph, fx_parameters(module))
