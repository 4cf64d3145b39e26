"""Tiny networks with the wiring of real ones, for every test that needs a variety of graphs.

``build("swin")`` gives an ``onnx.ModelProto`` with a dynamic batch "N", random weights and the output "logits" [N, 5];
``feeds("swin", batch=2)`` gives inputs for it. Models are built once per process: treat them as constants.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import onnx

from tests.zoo import convnets, transformers

_BUILDERS: dict[str, Callable[[], onnx.ModelProto]] = {
    "resnet": convnets.resnet,
    "preact": convnets.preact,
    "mobilenet": convnets.mobilenet,
    "densenet": convnets.densenet,
    "shufflenet": convnets.shufflenet,
    "inception": convnets.inception,
    "unet": convnets.unet,
    "convnext": convnets.convnext,
    "vit": transformers.vit,
    "swin": transformers.swin,
    "bert": transformers.bert,
}

NAMES = tuple(_BUILDERS)
CLASSES = 5


@cache
def build(name: str) -> onnx.ModelProto:
    """The network called ``name``."""
    return _BUILDERS[name]()


def feeds(name: str, batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs for the network called ``name``."""
    if name == "bert":
        return transformers.bert_feeds(batch, seed)
    return {"image": np.random.default_rng(seed).normal(size=(batch, 3, 16, 16)).astype(np.float32)}
