"""A small writer of ONNX graphs, in the style that exporters leave behind: shape chains included, random weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Net:
    """Nodes are written one after the other; every method returns the name of the value it makes.

    Args:
        name: name of the graph.
        seed: seed of the random weights.
    """

    def __init__(self, name: str, seed: int = 0) -> None:
        self.name = name
        self.random = np.random.default_rng(seed)
        self.inputs: list[onnx.ValueInfoProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.counts: Counter[str] = Counter()

    def input(self, name: str, *shape: int | str, dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, ["N", *shape]))
        return name

    def model(self, scores: str, classes: int, opset: int = 17) -> onnx.ModelProto:
        """The finished model; ``scores`` becomes the output "logits", [N, classes]."""
        self.nodes.append(helper.make_node("Identity", [scores], ["logits"], "logits"))
        output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])
        graph = helper.make_graph(self.nodes, self.name, self.inputs, [output], self.weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model

    # -- values --------------------------------------------------------------------------------------------------------

    def op(self, kind: str, *operands: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; the name of its output, or a list of names for several."""
        self.counts[kind] += 1
        label = f"{kind.lower()}_{self.counts[kind]}"
        names = [label] if outputs == 1 else [f"{label}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, operands, names, f"node_{label}", **attributes))
        return names[0] if outputs == 1 else names

    def const(self, array: Any, dtype: Any = np.int64) -> str:
        """A constant with the given content."""
        self.counts["const"] += 1
        name = f"const_{self.counts['const']}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, dtype=dtype), name))
        return name

    def weight(self, *shape: int, scale: float | None = None) -> str:
        """A random parameter; by default scaled by the root of what one output element sums over."""
        self.counts["weight"] += 1
        name = f"weight_{self.counts['weight']}"
        scale = 1 / math.sqrt(max(1, math.prod(shape[1:]))) if scale is None else scale
        self.weights.append(numpy_helper.from_array(self.random.normal(0, scale, shape).astype(np.float32), name))
        return name

    def scalar(self, number: float) -> str:
        return self.const(number, np.float32)

    # -- layers --------------------------------------------------------------------------------------------------------

    def conv(self, x: str, cin: int, cout: int, kernel: int = 3, stride: int = 1, group: int = 1) -> str:
        side = kernel // 2 if kernel % 2 else 0
        return self.op(
            "Conv", x, self.weight(cout, cin // group, kernel, kernel), self.weight(cout, scale=0.1),
            kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[side] * 4, group=group,
        )  # fmt: skip

    def batch_norm(self, x: str, channels: int) -> str:
        positive = [self.const(self.random.uniform(0.5, 1.5, channels), np.float32) for _ in range(2)]
        shift = [self.weight(channels, scale=0.1) for _ in range(2)]
        return self.op("BatchNormalization", x, positive[0], *shift, positive[1])

    def conv_bn(self, x: str, cin: int, cout: int, kernel: int = 3, stride: int = 1, group: int = 1) -> str:
        return self.batch_norm(self.conv(x, cin, cout, kernel, stride, group), cout)

    def conv_bn_relu(self, x: str, cin: int, cout: int, kernel: int = 3, stride: int = 1, group: int = 1) -> str:
        return self.op("Relu", self.conv_bn(x, cin, cout, kernel, stride, group))

    def linear(self, x: str, cin: int, cout: int) -> str:
        """As exporters write a linear layer on tokens: MatMul and Add."""
        return self.op(
            "Add", self.op("MatMul", x, self.weight(cin, cout, scale=cin**-0.5)), self.weight(cout, scale=0.1)
        )

    def gemm(self, x: str, cin: int, cout: int) -> str:
        return self.op("Gemm", x, self.weight(cout, cin), self.weight(cout, scale=0.1), transB=1)

    def layer_norm(self, x: str, channels: int) -> str:
        scale = self.const(self.random.uniform(0.5, 1.5, channels), np.float32)
        return self.op("LayerNormalization", x, scale, self.weight(channels, scale=0.1), axis=-1)

    def gelu(self, x: str) -> str:
        """The five nodes of an opset without Gelu."""
        error = self.op("Erf", self.op("Div", x, self.scalar(math.sqrt(2))))
        return self.op("Mul", self.op("Mul", x, self.op("Add", error, self.scalar(1))), self.scalar(0.5))

    def classifier(self, x: str, channels: int, classes: int) -> str:
        return self.gemm(self.op("Flatten", self.op("GlobalAveragePool", x)), channels, classes)

    # -- shapes --------------------------------------------------------------------------------------------------------

    def size(self, x: str, axis: int) -> str:
        """One dimension as a scalar: Shape and Gather."""
        return self.op("Gather", self.op("Shape", x), self.const(axis), axis=0)

    def vector(self, sizes: Sequence[int | str]) -> str:
        """Sizes, computed ones among them, as a vector: Unsqueeze each and Concat."""
        parts = [
            self.op("Unsqueeze", size, self.const([0])) if isinstance(size, str) else self.const([size])
            for size in sizes
        ]
        return self.op("Concat", *parts, axis=0)

    def reshape(self, x: str, *sizes: int | str) -> str:
        return self.op("Reshape", x, self.vector(sizes))

    def slice(self, x: str, start: int, end: int, axis: int, step: int = 1) -> str:
        return self.op("Slice", x, self.const([start]), self.const([end]), self.const([axis]), self.const([step]))

    def transpose(self, x: str, *order: int) -> str:
        return self.op("Transpose", x, perm=list(order))

    def pick(self, x: str, index: int, axis: int) -> str:
        return self.op("Gather", x, self.const(index), axis=axis)
