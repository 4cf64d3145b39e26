"""Tiny convolutional networks with the wiring of the well-known ones. Input "image" [N, 3, 16, 16], 5 classes."""

from __future__ import annotations

import onnx

from tests.zoo.net import Net

CLASSES = 5


def resnet() -> onnx.ModelProto:
    """Stem and three stages of two basic blocks; 1x1 convolutions on the shortcuts that change size."""
    net = Net("resnet")
    x = net.conv_bn_relu(net.input("image", 3, 16, 16), 3, 4)
    width = 4
    for stage in range(3):
        for block in range(2):
            stride = 2 if stage and not block else 1
            out = 4 * 2**stage
            inner = net.conv_bn(net.conv_bn_relu(x, width, out, 3, stride), out, out)
            shortcut = x if stride == 1 else net.conv_bn(x, width, out, 1, stride)
            x, width = net.op("Relu", net.op("Add", inner, shortcut)), out
    return net.model(net.classifier(x, width, CLASSES), CLASSES)


def preact() -> onnx.ModelProto:
    """Residual blocks with normalisation and activation in front of the convolutions."""
    net = Net("preact")
    x = net.conv(net.input("image", 3, 16, 16), 3, 6)
    for _ in range(3):
        inner = x
        for _ in range(2):
            inner = net.conv(net.op("Relu", net.batch_norm(inner, 6)), 6, 6)
        x = net.op("Add", x, inner)
    x = net.op("Relu", net.batch_norm(x, 6))
    return net.model(net.classifier(x, 6, CLASSES), CLASSES)


def mobilenet() -> onnx.ModelProto:
    """Inverted residuals with squeeze-and-excitation and hard-swish; two layers behind the global pooling."""
    net = Net("mobilenet")
    x = net.op("HardSwish", net.conv_bn(net.input("image", 3, 16, 16), 3, 4, 3, 2))
    width = 4
    for out, stride in ((4, 1), (8, 2), (8, 1)):
        wide = 3 * width
        inner = net.op("HardSwish", net.conv_bn(x, width, wide, 1))
        inner = net.op("HardSwish", net.conv_bn(inner, wide, wide, 3, stride, wide))
        gate = net.op("Relu", net.conv(net.op("GlobalAveragePool", inner), wide, 2, 1))
        inner = net.op("Mul", net.op("HardSigmoid", net.conv(gate, 2, wide, 1)), inner)
        inner = net.conv_bn(inner, wide, out, 1)
        x, width = net.op("Add", x, inner) if (width, 1) == (out, stride) else inner, out
    x = net.op("HardSwish", net.conv_bn(x, width, 16, 1))
    flat = net.op("Flatten", net.op("GlobalAveragePool", x))
    return net.model(net.gemm(net.op("HardSwish", net.gemm(flat, 16, 12)), 12, CLASSES), CLASSES)


def densenet() -> onnx.ModelProto:
    """Two dense blocks of five layers, each reading the concatenation of all before it; a pooling transition."""
    net = Net("densenet")
    x = net.op("MaxPool", net.conv_bn_relu(net.input("image", 3, 16, 16), 3, 8), kernel_shape=[2, 2], strides=[2, 2])
    width = 8
    for block in range(2):
        features = [x]
        for _ in range(5):
            joined = net.op("Concat", *features, axis=1) if len(features) > 1 else x
            inner = net.conv(net.op("Relu", net.batch_norm(joined, width)), width, 8, 1)
            features.append(net.conv(net.op("Relu", net.batch_norm(inner, 8)), 8, 4))
            width += 4
        x = net.op("Relu", net.batch_norm(net.op("Concat", *features, axis=1), width))
        if not block:
            x = net.op("AveragePool", net.conv(x, width, width // 2, 1), kernel_shape=[2, 2], strides=[2, 2])
            width //= 2
    return net.model(net.classifier(x, width, CLASSES), CLASSES)


def shufflenet() -> onnx.ModelProto:
    """Units that split the channels, work on one half, and shuffle; the shuffle reads the batch size from the data."""
    net = Net("shufflenet")

    def shuffle(x: str, width: int) -> str:
        batch, height, side = (net.size(x, axis) for axis in (0, 2, 3))
        x = net.transpose(net.reshape(x, batch, 2, width // 2, height, side), 0, 2, 1, 3, 4)
        return net.reshape(x, batch, -1, height, side)

    def branch(x: str, cin: int, out: int, stride: int) -> str:
        x = net.conv_bn(net.conv_bn_relu(x, cin, out, 1), out, out, 3, stride, out)
        return net.conv_bn_relu(x, out, out, 1)

    x = net.conv_bn_relu(net.input("image", 3, 16, 16), 3, 8)
    width = 8
    for _ in range(2):
        left = net.conv_bn_relu(net.conv_bn(x, width, width, 3, 2, width), width, width, 1)
        x = shuffle(net.op("Concat", left, branch(x, width, width, 2), axis=1), 2 * width)
        width *= 2
        for _ in range(2):
            first, second = net.op("Split", x, net.const([width // 2] * 2), outputs=2, axis=1)
            x = shuffle(net.op("Concat", first, branch(second, width // 2, width // 2, 1), axis=1), width)
    x = net.conv_bn_relu(x, width, 16, 1)
    mean = net.op("ReduceMean", x, axes=[2, 3], keepdims=0)
    return net.model(net.gemm(mean, 16, CLASSES), CLASSES)


def inception() -> onnx.ModelProto:
    """Modules of four parallel branches, one of them behind a pooling, joined by a concatenation."""
    net = Net("inception")
    x = net.op("MaxPool", net.conv_bn_relu(net.input("image", 3, 16, 16), 3, 8), kernel_shape=[2, 2], strides=[2, 2])
    width = 8
    for _ in range(3):
        pooled = net.op("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        branches = [
            net.conv_bn_relu(x, width, 4, 1),
            net.conv_bn_relu(net.conv_bn_relu(x, width, 4, 1), 4, 6),
            net.conv_bn_relu(net.conv_bn_relu(net.conv_bn_relu(x, width, 2, 1), 2, 4), 4, 4),
            net.conv_bn_relu(pooled, width, 2, 1),
        ]
        x, width = net.op("Concat", *branches, axis=1), 16
    return net.model(net.classifier(x, width, CLASSES), CLASSES)


def unet() -> onnx.ModelProto:
    """Down, up with skips at every level (resized to the size of the skip), and a classifier at the end."""
    net = Net("unet")
    x = net.conv_bn_relu(net.input("image", 3, 16, 16), 3, 4)
    width = 4
    skips = []
    for _ in range(2):
        skips.append((x, width))
        x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
        x, width = net.conv_bn_relu(x, width, 2 * width), 2 * width
    for skip, narrow in reversed(skips):
        sizes = net.op(
            "Concat", net.slice(net.op("Shape", x), 0, 2, 0), net.slice(net.op("Shape", skip), 2, 4, 0), axis=0
        )
        up = net.op("Resize", x, "", "", sizes, mode="nearest")
        x = net.conv_bn_relu(net.op("Concat", skip, up, axis=1), width + narrow, narrow)
        width = narrow
    x = net.conv_bn_relu(x, width, 8, 3, 2)
    return net.model(net.classifier(x, 8, CLASSES), CLASSES)


def convnext(depth: int = 2) -> onnx.ModelProto:
    """Depthwise convolution, channels-last normalisation and two linear layers, layer scale, permuted back.

    Args:
        depth: blocks in each of the three stages.
    """
    net = Net("convnext")

    def norm_first(x: str, width: int) -> str:
        return net.transpose(net.layer_norm(net.transpose(x, 0, 2, 3, 1), width), 0, 3, 1, 2)

    x = norm_first(net.conv(net.input("image", 3, 16, 16), 3, 6, 1, 2), 6)
    width = 6
    for stage in range(3):
        if stage:
            x = net.conv(norm_first(x, width), width, 2 * width, 3, 2)
            width *= 2
        for _ in range(depth):
            inner = net.transpose(net.conv(x, width, width, 7, 1, width), 0, 2, 3, 1)
            inner = net.gelu(net.linear(net.layer_norm(inner, width), width, 4 * width))
            inner = net.op("Mul", net.weight(width, scale=0.5), net.linear(inner, 4 * width, width))
            x = net.op("Add", x, net.transpose(inner, 0, 3, 1, 2))
    flat = net.layer_norm(net.op("Flatten", net.op("GlobalAveragePool", x)), width)
    return net.model(net.gemm(flat, width, CLASSES), CLASSES)
