"""Sites to hang heads on, and onnxruntime for a graph, without the rest of the tool."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort

from eexform.ir.graph import Graph
from eexform.ir.sites import Site


def site(kind: str, channels: int, channel_axis: int, shape: tuple, stride: int | None = None) -> Site:
    return Site(f"{kind}_value", kind, channels, channel_axis, shape, stride, (f"{kind}_value",))


SITES = {
    "early": site("spatial", 6, 1, (6, 16, 16), 1),
    "late": site("spatial", 24, 1, (24, 3, 3), 8),
    "pixel": site("spatial", 24, 1, (24, 1, 1), 16),
    "uneven": site("spatial", 8, 1, (8, 25, 5), 2),
    "last": site("spatial", 5, 3, (7, 9, 5), 4),
    "line": site("spatial", 12, 1, (12, 20), 4),
    "dynamic": site("spatial", 6, 1, (6, "H", "W"), 1),
    "tokens": site("sequence", 16, 2, (17, 16)),
    "dynamic_tokens": site("sequence", 16, 2, ("T", 16)),
    "flat": site("flat", 20, 1, (20,)),
}


def samples(where: Site, count: int, seed: int = 0) -> np.ndarray:
    """[count, ...site.shape], symbols read as 13."""
    shape = [size if isinstance(size, int) else 13 for size in where.shape]
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def run(graph: Graph, inputs: np.ndarray) -> np.ndarray:
    """First output, computed by onnxruntime, after a full check of the model."""
    model = gs.export_onnx(graph.gs)
    model.ir_version = 10
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs})[0]
