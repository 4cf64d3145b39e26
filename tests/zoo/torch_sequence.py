"""Tiny keyword spotters as nn.Modules: a recurrent one on frames [N, 20, 10], a convolutional one on [N, 10, 32]."""

from __future__ import annotations

from torch import Tensor, nn

CLASSES = 5


class GRUSpotter(nn.Module):
    """A linear layer per frame, two GRU layers one after the other (the first in both directions), the last frame."""

    def __init__(self, features: int = 10, width: int = 12) -> None:
        super().__init__()
        self.inner = nn.Linear(features, width)
        self.gru1 = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.gru2 = nn.GRU(2 * width, width, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, frames: Tensor) -> Tensor:
        x, _ = self.gru1(self.inner(frames).relu())
        x, _ = self.gru2(x)
        return self.fc(self.norm(x[:, -1]))


class ConvSpotter(nn.Module):
    """1-D convolutions over time, one of them depthwise and dilated, with residual additions."""

    def __init__(self, features: int = 10, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(features, width, 5, 2, 2, bias=False), nn.BatchNorm1d(width), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation, groups=width, bias=False),
                nn.Conv1d(width, width, 1, bias=False),
                nn.BatchNorm1d(width),
                nn.ReLU(),
            )
            for dilation in (1, 2, 4)
        )
        self.pool = nn.AvgPool1d(2)
        self.last = nn.Sequential(nn.Conv1d(width, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU())
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, frames: Tensor) -> Tensor:
        x = self.stem(frames)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(self.last(self.pool(x)).amax(dim=-1))
