"""Tiny networks of depthwise convolutions as nn.Modules, wired like the well-known ones. Images [N, 3, 16, 16]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.zoo.torch_convnets import CLASSES, conv_bn, conv_bn_relu


class InvertedV2(nn.Module):
    """Widen, depthwise with ReLU6, narrow without an activation; added where the size stays."""

    def __init__(self, cin: int, out: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = cin * expand
        layers: list[nn.Module] = [] if expand == 1 else [*conv_bn(cin, wide, 1), nn.ReLU6(inplace=True)]
        layers += [*conv_bn(wide, wide, 3, stride, wide), nn.ReLU6(inplace=True), *conv_bn(wide, out, 1)]
        self.conv = nn.Sequential(*layers)
        self.shortcut = stride == 1 and cin == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """A stem, four inverted residuals, a wide last convolution, dropout."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((4, 4, 1, 1), (4, 6, 2, 3), (6, 6, 1, 3), (6, 12, 1, 3))
        blocks = [InvertedV2(*size) for size in sizes]
        stem = nn.Sequential(*conv_bn(3, 4, 3, 2), nn.ReLU6(inplace=True))
        last = nn.Sequential(*conv_bn(12, 24, 1), nn.ReLU6(inplace=True))
        self.features = nn.Sequential(stem, *blocks, last)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, CLASSES))

    def forward(self, image: Tensor) -> Tensor:
        x = functional.adaptive_avg_pool2d(self.features(image), (1, 1))
        return self.classifier(torch.flatten(x, 1))


class SqueezeExcite(nn.Module):
    """A gate per channel, from the means of all channels."""

    def __init__(self, width: int, squeezed: int, activation: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)
        self.activation = activation()
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x


class InvertedV3(nn.Module):
    """Inverted residual with squeeze-and-excitation; ``activation`` is ReLU or hard-swish."""

    def __init__(self, cin: int, wide: int, out: int, kernel: int, stride: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.block = nn.Sequential(
            *conv_bn(cin, wide, 1), activation(),
            *conv_bn(wide, wide, kernel, stride, wide), activation(),
            SqueezeExcite(wide, 4, nn.ReLU, nn.Hardsigmoid),
            *conv_bn(wide, out, 1),
        )  # fmt: skip
        self.shortcut = stride == 1 and cin == out

    def forward(self, x: Tensor) -> Tensor:
        found = self.block(x)
        if self.shortcut:
            found += x
        return found


class MobileNetV3(nn.Module):
    """Squeeze-and-excitation and hard-swish; two layers behind the global pooling."""

    def __init__(self) -> None:
        super().__init__()
        swish = nn.Hardswish
        self.stem = nn.Sequential(*conv_bn(3, 4, 3, 2), swish())
        self.blocks = nn.Sequential(
            InvertedV3(4, 8, 4, 3, 1, nn.ReLU),
            InvertedV3(4, 12, 8, 5, 2, swish),
            InvertedV3(8, 16, 8, 3, 1, swish),
        )
        self.last = nn.Sequential(*conv_bn(8, 16, 1), swish())
        self.classifier = nn.Sequential(nn.Linear(16, 12), swish(), nn.Dropout(0.2), nn.Linear(12, CLASSES))

    def forward(self, image: Tensor) -> Tensor:
        x = self.last(self.blocks(self.stem(image)))
        return self.classifier(x.mean([2, 3]))


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel shuffle, sizes read from the tensor."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, -1, height, width)


class ShuffleUnit(nn.Module):
    """Splits the channels and works on one half; with a stride both branches work on everything."""

    def __init__(self, cin: int, out: int, stride: int) -> None:
        super().__init__()
        half, source = out // 2, cin if stride > 1 else cin // 2
        self.stride = stride
        if stride > 1:
            self.branch1 = nn.Sequential(*conv_bn(cin, cin, 3, stride, cin), *conv_bn_relu(cin, half, 1))
        self.branch2 = nn.Sequential(
            *conv_bn_relu(source, half, 1), *conv_bn(half, half, 3, stride, half), *conv_bn_relu(half, half, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            first, second = x.chunk(2, dim=1)
            return shuffle(torch.cat((first, self.branch2(second)), dim=1), 2)
        return shuffle(torch.cat((self.branch1(x), self.branch2(x)), dim=1), 2)


class ShuffleNetV2(nn.Module):
    """Two stages of units with channel split and shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv_bn_relu(3, 8)
        self.stage2 = nn.Sequential(ShuffleUnit(8, 12, 2), ShuffleUnit(12, 12, 1))
        self.stage3 = nn.Sequential(ShuffleUnit(12, 24, 2), ShuffleUnit(24, 24, 1))
        self.conv5 = conv_bn_relu(24, 24, 1)
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv5(self.stage3(self.stage2(self.conv1(image))))
        return self.fc(x.mean([2, 3]))


class MBConv(nn.Module):
    """Widen, depthwise, squeeze-and-excitation (SiLU, sigmoid), narrow."""

    def __init__(self, cin: int, out: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = cin * expand
        layers: list[nn.Module] = [] if expand == 1 else [*conv_bn(cin, wide, 1), nn.SiLU(inplace=True)]
        layers += [*conv_bn(wide, wide, kernel, stride, wide), nn.SiLU(inplace=True)]
        layers += [SqueezeExcite(wide, max(1, cin // 4), nn.SiLU, nn.Sigmoid), *conv_bn(wide, out, 1)]
        self.block = nn.Sequential(*layers)
        self.shortcut = stride == 1 and cin == out

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + x if self.shortcut else self.block(x)


class EfficientNet(nn.Module):
    """A stem, four MBConv blocks, a last convolution."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((4, 4, 3, 1, 1), (4, 8, 3, 2, 3), (8, 8, 3, 1, 3), (8, 12, 5, 1, 2))
        stem = nn.Sequential(*conv_bn(3, 4, 3, 2), nn.SiLU(inplace=True))
        last = nn.Sequential(*conv_bn(12, 24, 1), nn.SiLU(inplace=True))
        self.features = nn.Sequential(stem, *(MBConv(*size) for size in sizes), last)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, CLASSES))

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(image)), 1))


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, channels-last normalisation and two linear layers, layer scale, permuted back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(0.5 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        inner = self.gamma * self.pwconv2(functional.gelu(self.pwconv1(inner)))
        return x + inner.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Patches of 2x2, two stages of two blocks with a strided convolution between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 2, 2), LayerNorm2d(6, eps=1e-6))
        self.stage1 = nn.Sequential(ConvNeXtBlock(6), ConvNeXtBlock(6))
        self.downsample = nn.Sequential(LayerNorm2d(6, eps=1e-6), nn.Conv2d(6, 12, 2, 2))
        self.stage2 = nn.Sequential(ConvNeXtBlock(12), ConvNeXtBlock(12))
        self.norm = nn.LayerNorm(12, eps=1e-6)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stage2(self.downsample(self.stage1(self.stem(image))))
        return self.head(self.norm(x.mean([-2, -1])))
