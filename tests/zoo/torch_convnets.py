"""Tiny convolutional networks as nn.Modules, wired like the well-known ones. Images [N, 3, 16, 16], 5 classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 5


def conv_bn(cin: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias that keeps the size (divided by ``stride``), and batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(cin, out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out)
    )


def conv_bn_relu(cin: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """The same with a ReLU behind it."""
    return nn.Sequential(*conv_bn(cin, out, kernel, stride, groups), nn.ReLU(inplace=True))


class PlainCNN(nn.Module):
    """Convolutions with bias, pooling between them, two linear layers; no normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 12, 3, padding=1)
        self.conv3 = nn.Conv2d(12, 12, 3, padding=1)
        self.fc1 = nn.Linear(12 * 2 * 2, 16)
        self.fc2 = nn.Linear(16, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.conv1(image)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        x = functional.avg_pool2d(torch.tanh(self.conv3(x)), 2)
        return self.fc2(functional.relu(self.fc1(x.view(x.size(0), -1))))


class VGG(nn.Module):
    """Stacks of convolutions with batch normalisation, adaptive pooling, a classifier with dropout."""

    def __init__(self, widths: Sequence[Sequence[int]] = ((6, 6), (8, 8), (12, 12))) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for stage in widths:
            for width in stage:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                before = width
            layers.append(nn.MaxPool2d(2, 2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(before * 4, 16), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(16, CLASSES)
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(image)), 1))


class Padded(nn.Module):
    """Option A: every other pixel, zeros for the channels that are missing."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))


class Basic(nn.Module):
    """Two convolutions and a shortcut of kind ``A`` (padding) or ``B`` (convolution) where the size changes."""

    def __init__(self, cin: int, out: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or cin != out:
            self.shortcut = Padded(out - cin) if option == "A" else conv_bn(cin, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        inner += self.shortcut(x)
        return functional.relu(inner)


class ResNet(nn.Module):
    """Stem and three stages of two basic blocks."""

    def __init__(self, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(Basic(4, 4, 1, option), Basic(4, 4, 1, option))
        self.layer2 = nn.Sequential(Basic(4, 8, 2, option), Basic(8, 8, 1, option))
        self.layer3 = nn.Sequential(Basic(8, 16, 2, option), Basic(16, 16, 1, option))
        self.linear = nn.Linear(16, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(image)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = functional.avg_pool2d(x, x.size()[3])
        return self.linear(x.view(x.size(0), -1))


class PreActBlock(nn.Module):
    """Normalisation and activation in front of the convolutions; the shortcut reads behind the first activation."""

    def __init__(self, cin: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(cin)
        self.conv1 = nn.Conv2d(cin, out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        if stride != 1 or cin != out:
            self.shortcut = nn.Conv2d(cin, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.bn1(x))
        shortcut = self.shortcut(inner) if hasattr(self, "shortcut") else x
        return self.conv2(functional.relu(self.bn2(self.conv1(inner)))) + shortcut


class PreActResNet(nn.Module):
    """Stem, five pre-activation blocks, a last normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        sizes = ((4, 4, 1), (4, 8, 2), (8, 8, 1), (8, 12, 2), (12, 12, 1))
        self.blocks = nn.ModuleList(PreActBlock(*size) for size in sizes)
        self.norm = nn.BatchNorm2d(12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for block in self.blocks:
            x = block(x)
        return self.head(functional.relu(self.norm(x)).mean(dim=(2, 3)))


class DenseLayer(nn.Module):
    """Reads the concatenation of all before it; a bottleneck and a 3x3 convolution."""

    def __init__(self, cin: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(cin)
        self.conv1 = nn.Conv2d(cin, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        inner = self.conv1(functional.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(functional.relu(self.norm2(inner)))


class DenseNet(nn.Module):
    """Two dense blocks of three layers and a pooling transition."""

    def __init__(self, growth: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn_relu(3, 8), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.ModuleList()
        self.transitions = nn.ModuleList()
        width = 8
        for block in range(2):
            self.blocks.append(nn.ModuleList(DenseLayer(width + i * growth, growth) for i in range(3)))
            width += 3 * growth
            if not block:
                parts = [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
                self.transitions.append(nn.Sequential(*parts))
                width //= 2
        self.norm = nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        for number, block in enumerate(self.blocks):
            features = [x]
            for layer in block:
                features.append(layer(features))
            x = torch.cat(features, 1)
            if number < len(self.transitions):
                x = self.transitions[number](x)
        x = functional.adaptive_avg_pool2d(functional.relu(self.norm(x)), (1, 1))
        return self.classifier(torch.flatten(x, 1))


class InceptionBlock(nn.Module):
    """Four parallel branches, one of them behind a pooling, joined by a concatenation."""

    def __init__(self, cin: int) -> None:
        super().__init__()
        self.one = conv_bn_relu(cin, 4, 1)
        self.three = nn.Sequential(conv_bn_relu(cin, 4, 1), conv_bn_relu(4, 6))
        self.five = nn.Sequential(conv_bn_relu(cin, 2, 1), conv_bn_relu(2, 4, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn_relu(cin, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)


class Inception(nn.Module):
    """A stem and three modules, the last behind a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 8)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.mixed1 = InceptionBlock(8)
        self.mixed2 = InceptionBlock(16)
        self.pool2 = nn.MaxPool2d(3, 2, 1)
        self.mixed3 = InceptionBlock(16)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.mixed2(self.mixed1(self.pool1(self.stem(image))))
        x = self.mixed3(self.pool2(x))
        return self.fc(self.dropout(functional.adaptive_avg_pool2d(x, 1).flatten(1)))
