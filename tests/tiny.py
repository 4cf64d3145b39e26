"""A classifier of the digits that trains in a second, some of the digits, and a progress that can press Ctrl-C."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from sklearn.datasets import load_digits
from torch.nn import functional

from eexform.backends.fx import fx_parameters, raise_to_fx
from eexform.data import ArraySource, Dataset, Preprocess, open_dataset
from eexform.heads import with_parameters
from eexform.heads.blocks import HeadEmitter, conv_bn_relu
from eexform.ir.graph import BATCH, Graph
from eexform.training.threads import torch_threads

FRACTIONS = (0.4, 0.1, 0.25, 0.25)


def digits(count: int = 400, *, first: int = 0, **options: Any) -> Dataset:
    """``count`` of the digits, scaled to 0..1, as a data set that is not bound yet."""
    pixels, labels = load_digits(return_X_y=True)
    images = np.asarray(pixels, np.float32).reshape(-1, 1, 8, 8)[first : first + count]
    source = ArraySource("some digits", {"all": ({None: images}, labels[first : first + count])}, layout="nchw")
    return open_dataset(source, **{"fractions": FRACTIONS, "preprocess": Preprocess(scale=1 / 16), **options})


def network(seed: int = 0, widths: Sequence[int] = (4, 8, 8, 8), *, probabilities: bool = False) -> Graph:
    """An untrained network [N, 1, 8, 8] -> scores [N, 10]: convolutions with normalisation, the second strided."""
    image = gs.Variable("image", dtype=np.dtype(np.float32), shape=[BATCH, 1, 8, 8])
    draft = gs.Graph(inputs=[image], outputs=[], name="tiny", opset=17)
    emitter = HeadEmitter(draft, np.random.default_rng(seed))
    value, channels = image, 1
    for place, width in enumerate(widths):
        scope = emitter.scoped(f"block{place}.")
        value = conv_bn_relu(scope, value, channels, width, kernel=3, stride=2 if place == 1 else 1)
        channels = width
    pooled = emitter.node("GlobalAveragePool", value, name="pool", shape=[BATCH, channels, 1, 1])
    flat = emitter.node("Flatten", pooled, name="flatten", shape=[BATCH, channels], axis=1)
    weight = emitter.normal("classifier.weight", (10, channels), channels**-0.5)
    bias = emitter.filled("classifier.bias", 10, 0.0)
    scores = emitter.node("Gemm", flat, weight, bias, name="classifier", shape=[BATCH, 10], transB=1)
    if probabilities:
        scores = emitter.node("Softmax", scores, name="softmax", shape=[BATCH, 10], axis=1)
    draft.outputs = [emitter.rename(scores, "scores")]
    return Graph(draft, scores="probabilities" if probabilities else "logits")


@cache
def trained(*, probabilities: bool = False, epochs: int = 12) -> Graph:
    """The network after a short training on head-train of all digits; right about four times out of five."""
    graph = network()
    module = raise_to_fx(graph)
    data = digits(1797).bind(graph)
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2)
    module.train()
    with torch_threads(1):  # for work this small a second thread only waits, above all where others use the cores
        for epoch in range(epochs):
            for batch in data.batches("head_train", 32, seed=0, epoch=epoch, prefetch=False):
                assert batch.labels is not None
                scores = module(torch.from_numpy(batch.feeds["image"]))
                loss = functional.cross_entropy(scores, torch.from_numpy(batch.labels))
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    return with_parameters(network(probabilities=probabilities), fx_parameters(module))


class Watch:
    """A progress that counts, and presses Ctrl-C (or fails) after so many steps of a task.

    Args:
        label: of the task to stop in.
        after: steps done there before ``error`` is raised; ``None``: never.
        error: what is raised.
    """

    def __init__(
        self, label: str = "", after: int | None = None, error: type[BaseException] = KeyboardInterrupt
    ) -> None:
        self.label, self.after, self.error = label, after, error
        self.steps: dict[str, int] = {}
        self.said: list[str] = []

    @contextmanager
    def task(self, label: str, total: int) -> Any:
        self.steps[label] = 0
        yield _Step(self, label)

    def say(self, message: str) -> None:
        self.said.append(message)

    def reached(self, label: str, steps: int) -> None:
        """Called at every step."""
        if label == self.label and self.after is not None and steps >= self.after:
            raise self.error


class _Step:
    def __init__(self, watch: Watch, label: str) -> None:
        self._watch, self._label = watch, label

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._watch.steps[self._label] += steps
        self._watch.reached(self._label, self._watch.steps[self._label])
