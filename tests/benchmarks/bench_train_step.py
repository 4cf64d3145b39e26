"""Time of a training step of a multi-exit graph, against a hand-written module of the same network.

    python -m tests.benchmarks.bench_train_step [--batch 128] [--steps 30] [--threads 2] [--device cpu]

A ResNet-20 for CIFAR-10 with three exits, written by hand, goes through the torch door; its exits are attached as heads
of the graph, and the graph is raised to torch again. Both modules compute all exits, add up the cross-entropies, go
back and take a step of SGD. Steps of the two alternate, so that what else the machine does hits both alike; what counts
is the median of the ratios of neighbouring steps.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn import functional

from eexform.backends.multi_exit import MultiExitModule, to_torch
from eexform.frontends.torch import from_module
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.passes import PassContext
from eexform.passes.insert_exits import InsertExits

HEAD = "conv:1x32/avg/s2"
AFTER = (3, 5, 7)
"""Blocks behind which there is an exit."""


class Block(nn.Module):
    """Two convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Head(nn.Module):
    """What the head :data:`HEAD` is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 32, 3, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(functional.relu(self.bn(self.conv(x))).mean((2, 3)))


class ResNet20(nn.Module):
    """The trunk, with exits where asked."""

    def __init__(self, exits: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        widths = [16] * 3 + [32] * 3 + [64] * 3
        before = [16, *widths]
        self.blocks = nn.ModuleList(
            Block(before[place], width, 1 if width == before[place] else 2) for place, width in enumerate(widths)
        )
        self.heads = nn.ModuleDict({str(place): Head(widths[place]) for place in exits})
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = []
        x = functional.relu(self.bn(self.conv(x)))
        for place, block in enumerate(self.blocks):
            x = block(x)
            if str(place) in self.heads:
                found.append(self.heads[str(place)](x))
        return (*found, self.fc(x.mean((2, 3))))


class Trunk(ResNet20):
    """Without exits, with its scores alone."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)[-1]


def raised() -> tuple[Graph, MultiExitModule]:
    """The same network through the graph."""
    graph = from_module(Trunk().eval(), (torch.zeros(2, 3, 32, 32),))
    sites = [site for site in find_sites(graph).sites if site.kind == "spatial"]
    ends = [site for site in sites if any(f"blocks.{place}" in site.value for place in AFTER)]
    chosen = {}
    for site in ends:  # the last site of a block is its end
        chosen[next(place for place in AFTER if f"blocks.{place}" in site.value)] = site.value
    if len(chosen) != len(AFTER):
        raise SystemExit(f"sites of the blocks {AFTER} not found among {[site.value for site in sites]}")
    values = tuple(chosen.values())
    step = InsertExits(
        sites=values, heads=dict.fromkeys(values, HEAD), thresholds=dict.fromkeys(values, 0.9), untrained=True
    )
    flat = step.run(graph, PassContext()).graph
    module = to_torch(flat)
    assert isinstance(module, MultiExitModule)
    return flat, module


class Step:
    """One training step, timed."""

    def __init__(self, module: nn.Module, call: object, device: str) -> None:
        self.module, self.call, self.device = module.to(device).train(), call, device
        self.optimiser = torch.optim.SGD(module.parameters(), 0.01, momentum=0.9)

    def __call__(self, x: Tensor, y: Tensor) -> float:
        self._wait()
        start = time.perf_counter()
        self.optimiser.zero_grad(set_to_none=True)
        loss = sum(functional.cross_entropy(scores, y) for scores in self.call(x))
        loss.backward()
        self.optimiser.step()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


def measure(batch: int, steps: int, device: str, layout: torch.memory_format) -> tuple[float, float, list[float]]:
    """Median seconds of either, and the ratios of neighbouring steps (raised / by hand)."""
    by_hand = ResNet20(AFTER)
    _, module = raised()
    ours, theirs = sum(p.numel() for p in module.parameters()), sum(p.numel() for p in by_hand.parameters())
    if ours != theirs:
        raise SystemExit(f"not the same network: {ours} parameters, by hand {theirs}")
    one = Step(module.to(memory_format=layout), module.all_exits, device)
    two = Step(by_hand.to(memory_format=layout), by_hand, device)
    x = torch.randn(batch, 3, 32, 32, device=device).to(memory_format=layout)
    y = torch.randint(0, 10, (batch,), device=device)
    for _ in range(3):
        one(x, y), two(x, y)
    mine, hand = [], []
    for step in range(steps):  # who goes first alternates, too
        if step % 2:
            mine.append(one(x, y))
            hand.append(two(x, y))
        else:
            hand.append(two(x, y))
            mine.append(one(x, y))
    return statistics.median(mine), statistics.median(hand), [a / b for a, b in zip(mine, hand, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="*", default=[16, 128])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {given.device}, {given.threads} thread(s), {given.steps} steps each")
    print("| layout | batch | graph, ms | by hand, ms | ratio, median | quarter | three quarters |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, layout in (("contiguous", torch.contiguous_format), ("channels last", torch.channels_last)):
        for batch in given.batch:
            ours, hand, ratios = measure(batch, given.steps, given.device, layout)
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(
                f"| {name} | {batch} | {ours * 1e3:.1f} | {hand * 1e3:.1f} | {middle:.3f} | {low:.3f} | {high:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
