"""Stands in for a vendor's compiler, so that the sample can be tried: the device it knows is invented.

Reads {"format": 1, "model": PATH, "batch": 1} and answers with milliseconds per node: the bytes of a node's parameters
and results over a bandwidth. Operators that this "compiler" does not support are named, not guessed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys

import onnx

SUPPORTED = {"Add", "Conv", "Flatten", "Gemm", "GlobalAveragePool", "MatMul", "MaxPool", "Relu", "Reshape"}


def estimate(path: str, batch: int, bytes_per_ms: float) -> dict[str, object]:
    """The answer for the model at ``path``."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    sizes = {weight.name: math.prod(weight.dims) for weight in model.graph.initializer}
    for value in (*model.graph.value_info, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        sizes[value.name] = math.prod(dim.dim_value or batch for dim in dims)
    weights = {weight.name for weight in model.graph.initializer}
    nodes: dict[str, float] = {}
    unknown = []
    for node in model.graph.node:
        if node.op_type not in SUPPORTED:
            unknown.append([node.name, node.op_type])
            continue
        touched = [name for name in node.input if name in weights] + list(node.output)
        nodes[node.name] = 4 * sum(sizes.get(name, 0) for name in touched) / bytes_per_ms
    return {"format": 1, "unit": "ms", "nodes": nodes, "total": sum(nodes.values()), "unknown": unknown}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--bytes-per-ms", type=float, default=2e6, help="bandwidth of the invented device")
    given = options.parse_args()
    request = json.load(sys.stdin)
    if request.get("format") != 1:
        sys.exit(f"cannot read requests of format {request.get('format')}")
    json.dump(estimate(request["model"], request["batch"], given.bytes_per_ms), sys.stdout)


if __name__ == "__main__":
    main()
