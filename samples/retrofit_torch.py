"""Give a PyTorch module early exits: an ``nn.Module`` in, an ONNX file that skips work out.

    python samples/retrofit_torch.py

The module here is a small convolutional network that is trained on half of the 8x8 digits for a few seconds. Put your
own in its place: it needs example inputs of the right shapes, and data of which a part was not used to train it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import eexform as ee
from eexform.data import ArraySource


class Net(nn.Module):
    """[N, 1, 8, 8] -> scores [N, 10]."""

    def __init__(self, widths: tuple[int, ...] = (16, 24, 32, 32)) -> None:
        super().__init__()
        layers = zip((1, *widths), widths, (1, 1, 2, 1), strict=False)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for a, b, stride in layers
            )
        )
        self.classifier = nn.Linear(widths[-1], 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.blocks(image).mean((2, 3)))


def train(module: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimiser = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(32):
            optimiser.zero_grad()
            nn.functional.cross_entropy(module(x[rows]), y[rows]).backward()
            optimiser.step()


def main() -> None:
    parser = argparse.ArgumentParser(description="Give a PyTorch module early exits.")
    parser.add_argument("--out", default="retrofit_torch", help="folder for everything that is written")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--generations", type=int, default=20)
    given = parser.parse_args()
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    x, y = (pixels / 16).reshape(-1, 1, 8, 8).astype(np.float32), labels.astype(np.int64)
    module = Net()
    train(module, torch.from_numpy(x[:900]), torch.from_numpy(y[:900]), given.epochs)

    graph = ee.load(module, example_inputs=(torch.zeros(1, 1, 8, 8),))
    print(f"{graph!r}: exits can be attached at {', '.join(site.value for site in ee.find_sites(graph).sites)}")
    parts = {"seen": ({None: x[:900]}, y[:900]), "unseen": ({None: x[900:]}, y[900:])}
    data = ee.open_dataset(ArraySource("digits", parts, layout="nchw"), train_from="seen", select_from="unseen")
    effort, training = ee.SearchOptions(generations=given.generations), ee.TrainOptions(epochs=given.epochs)
    run = ee.search(graph, data, out=Path(given.out) / "run", options=effort, train=training)
    plan, trunk = run.front.knee(), run.front.trunk
    exported = Path(given.out) / "ee.onnx"
    plan.export(exported)
    for name, of in (("the module alone", trunk), (f"with {len(plan.exits)} exits", plan)):
        print(f"{name}: {of.test['accuracy']:.2%} right on test, {of.test['macs']:,.0f} MACs on average")
    report = ee.verify(exported, graph, data.bind(graph))
    report.require()
    print(f"{exported}: {len(report.checks)} checks passed on {report.samples} samples")


if __name__ == "__main__":
    main()
