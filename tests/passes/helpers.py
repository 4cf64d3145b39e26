"""Small graphs written as text, and comparisons by running both sides."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx.parser

from eexform.backends import ort
from eexform.frontends.onnx import from_model
from eexform.ir.graph import Graph

CHAIN = """
<ir_version: 8, opset_import: ["": 17]>
chain (float[N, 2, 8, 8] image) => (float[N, 4] scores)
<float[3, 2, 3, 3] w1, float[6, 3, 3, 3] w2, float[6, 6, 3, 3] w3, float[4, 6] w4, float[4] b4>
{
    [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(image, w1)
    [relu1] r1 = Relu(c1)
    [conv2] c2 = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(r1, w2)
    [relu2] r2 = Relu(c2)
    [conv3] c3 = Conv<pads = [1, 1, 1, 1]>(r2, w3)
    [relu3] r3 = Relu(c3)
    [pool] p = GlobalAveragePool(r3)
    [flat] f = Flatten(p)
    [fc] scores = Gemm<transB = 1>(f, w4, b4)
}
"""
"""Three convolutions; sites r1 [3, 8, 8] and r2 [6, 4, 4]; 4 classes."""


def graph_of(text: str, seed: int = 0, arrays: Mapping[str, np.ndarray] | None = None) -> Graph:
    """The graph of an ONNX text; weights declared without values are drawn, variances and scales positive."""
    rng = np.random.default_rng(seed)
    model = onnx.parser.parse_model(text)
    made = {name for node in model.graph.node for name in node.output}
    for weight in model.graph.value_info:
        if weight.name in made:
            continue
        shape = [dim.dim_value for dim in weight.type.tensor_type.shape.dim]
        if arrays and weight.name in arrays:
            values = arrays[weight.name]
        elif weight.name.startswith(("var", "scale")):
            values = rng.uniform(0.5, 1.5, shape)
        else:
            values = rng.standard_normal(shape) * 0.5
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values, np.float32), weight.name))
    del model.graph.value_info[:]
    return from_model(model)


def feeds_of(graph: Graph, batch: int = 3, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    feeds = {}
    for name in graph.inputs:
        shape = [dim if isinstance(dim, int) else batch for dim in graph.types[name].shape or ()]
        feeds[name] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def run(graph: Graph, feeds: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    return ort.run(ort.session(graph), feeds_of(graph) if feeds is None else feeds)


def assert_same_outputs(before: Graph, after: Graph, *, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Both give the same numbers for the outputs of ``before``, at batch 3 and batch 1."""
    for batch in (3, 1):
        feeds = feeds_of(before, batch)
        expected, found = run(before, feeds), run(after, feeds)
        assert list(found) == list(expected)
        for name, values in expected.items():
            scale = float(np.abs(values).max(initial=0.0))
            np.testing.assert_allclose(found[name], values, rtol=rtol, atol=atol * max(1.0, scale), err_msg=name)


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]
