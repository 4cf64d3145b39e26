"""A network that its author froze in part: what stood still goes on standing still, and everything fits together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import eexform as ee
from tests.training.multi_exit import flat, patterns, tune

FROZEN = ("stem.weight", "norm.bias", "table")


class PartFrozen(nn.Module):
    """Frozen: the weight of a layer, half of a normalisation, and a parameter of no layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.table = nn.Parameter(torch.randn(1, 4, 1, 1) * 0.1)
        self.middle, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 3)
        for name in FROZEN:
            self.get_parameter(name).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        found = torch.relu(self.norm(self.stem(x)) + self.table)
        scores: Tensor = self.last(torch.relu(self.middle(found)).mean((2, 3)))
        return scores


def test_joint_training_leaves_frozen_parameters_alone(tmp_path: Path) -> None:
    module = PartFrozen().eval()
    trunk = ee.load(module, (torch.zeros(1, 1, 8, 8),))
    graph = flat(trunk, heads=("none/avg",))
    report = tune(tmp_path, graph, data=patterns(graph, 3), strategy="joint", epochs=2)
    before, after = graph.parameters(), report.graph.parameters()
    changed = {name for name in module.state_dict() if name in after and not np.array_equal(after[name], before[name])}
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert changed == trained | {"norm.running_mean", "norm.running_var"}  # statistics move, as in torch

    raised = ee.to_torch(report.graph)
    state = {name: value for name, value in raised.state_dict().items() if not name.startswith("exit0.")}
    module.load_state_dict(state)  # strict: the original takes it back
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(raised.all_exits(x)[-1], module(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        raised.get_parameter("middle.bias").add_(1.0)
    written = ee.write_back(report.graph, raised).parameters()
    np.testing.assert_allclose(written["middle.bias"], after["middle.bias"] + 1.0, rtol=1e-6)
    assert all(np.array_equal(written[name], after[name]) for name in FROZEN)
