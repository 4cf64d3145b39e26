"""Small models written in ONNX's text syntax, weights given as arrays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx


def model(
    body: str,
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    inputs: str = "float[N,4] x",
    outputs: str = "float[N,3] y",
    opset: int = 17,
    domains: str = "",
) -> onnx.ModelProto:
    """A model whose nodes are ``body``, e.g. ``"y = Gemm<transB=1>(x, w)"``.

    Args:
        body: nodes in ONNX text, one per line.
        weights: initialisers by name.
        inputs: typed inputs in ONNX text.
        outputs: typed outputs in ONNX text.
        opset: of the standard domain.
        domains: more opset imports in ONNX text, e.g. ``, "acme" : 1``.
    """
    text = f'<ir_version: 8, opset_import: ["" : {opset}{domains}]> net ({inputs}) => ({outputs}) {{ {body} }}'
    parsed = onnx.parser.parse_model(text)
    for name, array in (weights or {}).items():
        parsed.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return parsed


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Random float32 numbers."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def linear(before: int = 4, after: int = 3) -> onnx.ModelProto:
    """The smallest classifier."""
    return model("y = Gemm(x, w)", {"w": normal(before, after)}, inputs=f"float[N,{before}] x",
                 outputs=f"float[N,{after}] y")  # fmt: skip
