"""Small modules for the PyTorch door: each with one habit of real models, good or bad."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Residual block; where it strides, the shortcut is every other pixel, padded with channels of zeros."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.more = (out - channels) // 2 if stride != 1 else 0

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.more:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more, self.more))
        return functional.relu(y + x)


class ResNet(nn.Module):
    """ResNet for CIFAR-10 (He et al. 2016, section 4.2), 6 x ``blocks`` + 2 layers, shortcuts without parameters."""

    def __init__(self, blocks: int = 1, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages = []
        for stage in range(3):
            out = width << stage
            first = Block(out if stage == 0 else out // 2, out, 1 if stage == 0 else 2)
            stages.append(nn.Sequential(first, *(Block(out, out, 1) for _ in range(blocks - 1))))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(functional.avg_pool2d(x, x.size(3)).flatten(1))


def resnet() -> nn.Module:
    return ResNet(width=4)


class Head(nn.Module):
    """The simplest classifier: [N, 4] -> [N, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Text(nn.Module):
    """Token numbers and a mask by keyword; the embedding is tied to a projection; ``dropout`` is gone in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.project = nn.Linear(8, 11, bias=False)
        self.project.weight = self.embedding.weight
        self.register_buffer("positions", torch.linspace(0, 1, 5).reshape(1, 5, 1))
        self.dropout = nn.Dropout(0.5)
        self.classifier = nn.Linear(11, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *, labels: None = None) -> OrderedDict[str, Tensor]:
        hidden = self.dropout(self.project(self.embedding(input_ids) + self.positions))
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return OrderedDict(hidden=hidden, logits=self.classifier(torch.tanh(pooled)), features=pooled)


@dataclass
class Answer:
    """What no pytree knows."""

    aux: Tensor
    logits: Tensor


class Several(Head):
    """Returns its scores in ``form``."""

    class Named(NamedTuple):
        first: Tensor
        second: Tensor

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.other = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> object:
        scores, other = self.linear(x), self.other(x)
        forms: dict[str, object] = {
            "tuple": (other.unsqueeze(1), scores),
            "two": [other, scores],
            "named": self.Named(scores, other),
            "dict": {"a": other, "b": scores},
            "dataclass": Answer(other, scores),
            "vector": scores.sum(1),
            "volume": scores.reshape(-1, 3, 1),
            "label": scores.argmax(1, keepdim=True),
            "text": "three",
            "one": scores[:, :1],
            "nested": {"logits": (scores,)},
        }
        return forms[self.form]


class Inner(nn.Module):
    """Fails to be exported, in a way that ``habit`` names."""

    def __init__(self, habit: str) -> None:
        super().__init__()
        self.habit = habit
        self.register_buffer("state", torch.zeros(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.habit == "branch" and x.sum() > 0:
            return x * 2
        if self.habit == "item":
            return x[:, : max(4, int(x.abs().max().item()))]
        if self.habit == "batch":
            return x + self.state
        if self.habit == "size" and x.shape[0] == 2:
            return x + 1
        if self.habit == "operator":
            return torch.special.bessel_j0(x)
        if self.habit == "error":
            return x.reshape(-1, 5)
        if self.habit == "mixing":
            return x - x.mean(0, keepdim=True)
        return x


class Outer(Head):
    """``Inner`` at the path ``stage.1``."""

    def __init__(self, habit: str) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Linear(4, 4), Inner(habit))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.stage(x))
