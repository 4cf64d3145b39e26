"""Random small classifiers with weights, for property tests: convolutions, residuals, concatenations, gates."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def random_classifier(
    seed: int,
    *,
    blocks: int | None = None,
    channels: int = 4,
    size: int = 8,
    classes: int = 5,
    batch: str | int = "N",
    opset: int = 17,
    softmax: bool | None = None,
) -> onnx.ModelProto:
    """A random image classifier: input ``image`` [batch, 3, size, size], output ``scores`` [batch, classes].

    Args:
        seed: fixes structure and weights.
        blocks: number of blocks (2-6 at random by default), each conv-relu, residual, dense concatenation,
            squeeze-and-excite, strided convolution or pooling.
        channels: channels of the first block.
        size: height and width of the input.
        classes: number of classes.
        batch: first dimension of the input, a symbol or a number.
        opset: 13 or newer.
        softmax: end in Softmax; at random by default.
    """
    rng = np.random.default_rng(seed)
    net = _Net(rng, opset)
    value, width, side = net.conv("image", 3, channels), channels, size
    for _ in range(int(rng.integers(2, 7)) if blocks is None else blocks):
        kind = str(rng.choice(["plain", "residual", "dense", "gate", "down", "norm"]))
        if kind == "plain":
            value = net.conv(value, width, width)
        elif kind == "residual":
            inner = net.conv(net.conv(value, width, width), width, width, relu=False)
            value = net.add("Relu", [net.add("Add", [inner, value])])
        elif kind == "dense" and width <= 16:
            value = net.add("Concat", [value, net.conv(value, width, 4)], axis=1)
            width += 4
        elif kind == "gate":
            pooled = net.add("GlobalAveragePool", [value])
            gate = net.add("Sigmoid", [net.conv(pooled, width, width, kernel=1, relu=False)])
            value = net.add("Mul", [value, gate])
        elif kind == "down" and side > 2:
            value, width, side = net.conv(value, width, width + 2, stride=2), width + 2, (side + 1) // 2
        else:
            value = net.norm(value, width)
    if rng.random() < 0.5:
        value = net.add("Flatten", [net.add("GlobalAveragePool", [value])])
    else:  # a shape chain of the kind that exporters write for a dynamic batch
        pooled = net.add("GlobalAveragePool", [value])
        size_ = net.add("Shape", [value])
        first = net.add("Gather", [size_, net.constant("index", np.array([0]))], axis=0)
        target = net.add("Concat", [first, net.constant("rest", np.array([-1]))], axis=0)
        value = net.add("Reshape", [pooled, target])
    end_in_softmax = bool(rng.random() < 0.3) if softmax is None else softmax
    weight = net.constant("fc.weight", rng.normal(size=(classes, width)).astype(np.float32))
    bias = net.constant("fc.bias", rng.normal(size=classes).astype(np.float32))
    logits = net.add("Gemm", [value, weight, bias], "logits" if end_in_softmax else "scores", transB=1)
    if end_in_softmax:
        net.add("Softmax", [logits], "scores", axis=1)
    return net.model([("image", [batch, 3, size, size])], [("scores", [batch, classes])])


class _Net:
    def __init__(self, rng: np.random.Generator, opset: int) -> None:
        self.rng = rng
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, name: str, array: np.ndarray) -> str:
        name = name if all(w.name != name for w in self.weights) else f"{name}{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def add(self, op: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        number = len(self.nodes)
        output = output or f"v{number}"
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{op.lower()}{number}", **attributes))
        return output

    def conv(self, value: str, before: int, after: int, *, kernel: int = 3, stride: int = 1, relu: bool = True) -> str:
        scale = (2 / (before * kernel * kernel)) ** 0.5
        array = self.rng.normal(size=(after, before, kernel, kernel)) * scale
        weight = self.constant(f"conv{len(self.nodes)}.weight", array.astype(np.float32))
        bias = self.constant(f"conv{len(self.nodes)}.bias", (self.rng.normal(size=after) * 0.1).astype(np.float32))
        made = self.add(
            "Conv", [value, weight, bias], kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[kernel // 2] * 4
        )
        return self.add("Relu", [made]) if relu else made

    def norm(self, value: str, width: int) -> str:
        number = len(self.nodes)
        arrays = {
            "scale": self.rng.uniform(0.5, 1.5, width),
            "bias": self.rng.normal(size=width) * 0.1,
            "mean": self.rng.normal(size=width) * 0.1,
            "var": self.rng.uniform(0.5, 1.5, width),
        }
        names = [self.constant(f"bn{number}.{key}", array.astype(np.float32)) for key, array in arrays.items()]
        return self.add("BatchNormalization", [value, *names], epsilon=1e-5)

    def model(
        self, inputs: list[tuple[str, list[int | str]]], outputs: list[tuple[str, list[int | str]]]
    ) -> onnx.ModelProto:
        def declared(values: list[tuple[str, list[int | str]]]) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values]

        graph = helper.make_graph(self.nodes, "random", declared(inputs), declared(outputs), self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
