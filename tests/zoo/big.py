"""Networks of any number of nodes, to see how analyses grow."""

from __future__ import annotations

import onnx
from onnx import TensorProto

from tests.zoo.net import Net

CLASSES = 5


def residual(nodes: int) -> onnx.ModelProto:
    """A deep residual network: narrow cuts everywhere."""
    net = Net("residual")
    x = net.conv_bn_relu(net.input("image", 3, 8, 8), 3, 4)
    while len(net.nodes) < nodes:
        x = net.op("Relu", net.op("Add", x, net.conv_bn(net.conv_bn_relu(x, 4, 4), 4, 4)))
    return net.model(net.classifier(x, 4, CLASSES), CLASSES)


def masked(nodes: int) -> onnx.ModelProto:
    """Attention blocks that all read one mask and whose reshapes all read the batch size: edges from start to end."""
    net = Net("masked")
    x = net.input("tokens", 6, 8)
    mask = net.op("Unsqueeze", net.input("mask", 6, dtype=TensorProto.FLOAT), net.const([1, 2]))
    batch = net.size(x, 0)
    while len(net.nodes) < nodes:
        query, key, value = (
            net.transpose(net.reshape(net.linear(x, 8, 8), batch, 6, 2, 4), 0, 2, 1, 3) for _ in range(3)
        )
        scores = net.op("Softmax", net.op("Add", net.op("MatMul", query, net.transpose(key, 0, 1, 3, 2)), mask))
        mixed = net.transpose(net.op("MatMul", scores, value), 0, 2, 1, 3)
        x = net.layer_norm(net.op("Add", x, net.linear(net.reshape(mixed, batch, 6, 8), 8, 8)), 8)
    return net.model(net.gemm(net.pick(x, 0, 1), 8, CLASSES), CLASSES)


def dense(nodes: int) -> onnx.ModelProto:
    """Dense blocks of 40 layers: wide cuts inside, one value between blocks; about as many edges as 20 per node."""
    net = Net("dense")
    x = net.conv_bn_relu(net.input("image", 3, 4, 4), 3, 4)
    while len(net.nodes) < nodes:
        features = [x]
        for _ in range(40):
            features.append(net.conv_bn_relu(net.op("Sum", *features), 4, 4, 1))
        x = net.conv_bn_relu(net.op("Concat", *features, axis=1), 4 * 41, 4, 1)
    return net.model(net.classifier(x, 4, CLASSES), CLASSES)


def ladder(nodes: int) -> onnx.ModelProto:
    """Every block's output is kept until the end (a U without a bottom): cuts as wide as the network is deep."""
    net = Net("ladder")
    x = net.conv_bn_relu(net.input("image", 3, 4, 4), 3, 4)
    kept = []
    while len(net.nodes) < nodes * 3 // 4:
        x = net.conv_bn_relu(x, 4, 4, 1)
        kept.append(x)
    for skip in reversed(kept):
        x = net.op("Add", x, skip)
    return net.model(net.classifier(x, 4, CLASSES), CLASSES)


KINDS = {"residual": residual, "masked": masked, "dense": dense, "ladder": ladder}
