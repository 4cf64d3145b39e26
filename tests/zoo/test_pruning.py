"""Cutting channels on every network of the zoo: what is left equals the whole network with the rest unread."""

from __future__ import annotations

import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import eexform as ee
from eexform.backends import ort
from eexform.backends.fx import raise_to_fx
from eexform.ir import coupling_reshape, coupling_slice
from eexform.ir.arithmetic import node_macs
from eexform.ir.cut import cut
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from tests import zoo
from tests.ir.masking import assert_cut
from tests.zoo import doors, modules

BY_HAND = "by-hand"
ALL = [pytest.param(name, door, id=f"{name}-{door}") for name in modules.NAMES for door in doors.DOORS]
ALL += [pytest.param(name, BY_HAND, id=f"{name}-{BY_HAND}") for name in zoo.NAMES]
HEADS = {"vit": 2, "vit_encoder": 1, "swin": 3, "bert": 2}
"""Groups of attention heads; torch's exporter makes one parameter of equal ones, as in the copied encoder layers."""
WORDS = {"seq": 7}


@cache
def graph(name: str, door: str) -> Graph:
    """The network through one of the doors, or written by hand."""
    if door != BY_HAND:
        return doors.graph(name, door)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(zoo.build(name), path)
        return ee.load(path)


def feeds(name: str, door: str, batch: int) -> dict[str, np.ndarray]:
    if door == BY_HAND:
        return zoo.feeds(name, batch, seed=batch)
    return doors.feeds(graph(name, door), modules.inputs(name, batch, seed=batch))


def chosen(found: Graph, seed: int, share: float, groups: float) -> dict[str, list[int]]:
    """Random units of a random choice of groups."""
    random = np.random.default_rng(seed)
    prunable = found.groups.prunable
    count = max(1, round(groups * len(prunable)))
    cuts = {}
    for place in sorted(random.choice(len(prunable), count, replace=False).tolist()):
        group = prunable[place]
        gone = min(group.size - 1, max(1, round(group.size * share)))
        cuts[group.name] = sorted(random.choice(group.size, gone, replace=False).tolist())
    return cuts


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("name", "door"), ALL)
def test_most_work_can_be_pruned(name, door):
    whole = graph(name, door)
    macs = {node.name: node_macs(node, whole.types, WORDS) or 0 for node in whole.nodes}
    prunable = {member.node for group in whole.groups.prunable for member in group.members}
    assert sum(macs[node] for node in prunable if node in macs) >= 0.99 * sum(macs.values())
    for group in whole.groups.groups:
        assert group.prunable or group.frozen or group.size == 1
    rules = [group.name for group in whole.groups.groups if group.frozen and "has no rule" in group.frozen]
    assert not rules
    kinds = Counter(group.kind for group in whole.groups.prunable)
    assert kinds["heads"] >= HEADS.get(name, 0)


@pytest.mark.parametrize(("name", "door"), ALL)
def test_everything_cut(name, door):
    """Half of every group at once: values, names, figures, batches, sites and the module raised from it."""
    whole = graph(name, door)
    small = assert_cut(whole, chosen(whole, 0, 0.5, 1.0), feeds(name, door, 7))
    fed = feeds(name, door, 7)
    together = ort.run(ort.session(small), fed)[small.final]
    assert together.shape[0] == 7
    one = {key: value[2:3] for key, value in fed.items()}
    assert relative(ort.run(ort.session(small), one)[small.final], together[2:3]) <= 1e-4
    assert len(find_sites(small).sites) >= 1
    raised = raise_to_fx(small).eval()
    assert set(raised.state_dict()) == set(raise_to_fx(whole).state_dict())
    with torch.no_grad():
        found = raised(*(torch.from_numpy(fed[value]) for value in small.inputs))
    first = found if isinstance(found, torch.Tensor) else next(iter(found))
    assert relative(first.numpy(), together) <= 1e-4


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("name", "door"), ALL)
def test_some_groups_cut(name, door, seed):
    whole = graph(name, door)
    cuts = chosen(whole, seed, 0.3, 0.4)
    small = assert_cut(whole, cuts, feeds(name, door, 2))
    if seed == 1 and small.groups.prunable:  # and again, as a second pass would
        assert_cut(small, chosen(small, 10, 0.3, 0.5), feeds(name, door, 2))


def wrong_map(monkeypatch, owner, name, change):
    """Put ``change`` around a static method that says which positions go together."""
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, staticmethod(lambda *args: change(right(*args))))


def broken(whole: Graph, fed: dict[str, np.ndarray]) -> bool:
    """Whether the property does not hold for some cut of a graph whose groups were found by a wrong rule."""
    anew = whole.replace()
    try:
        for seed in range(3):
            assert_cut(anew, chosen(anew, seed, 0.5, 1.0), fed)
    except (AssertionError, ee.EexformError, onnx.checker.ValidationError):
        return True
    return False


def test_a_wrong_map_in_pad_is_caught(monkeypatch):
    wrong_map(
        monkeypatch,
        coupling_slice.Pad,
        "_amounts",
        lambda found: {axis: (behind + before, 0) for axis, (before, behind) in found.items()},
    )
    assert broken(graph("resnet_a", "onnx"), feeds("resnet_a", "onnx", 2))


def test_a_wrong_map_in_concat_is_caught(monkeypatch):
    tie = coupling_slice.Coupler.tie

    def backwards(self, a, ia, b, ib):
        if self._node is not None and self._node.op == "Concat":
            ib = np.asarray(ib)[::-1]
        tie(self, a, ia, b, ib)

    monkeypatch.setattr(coupling_slice.Coupler, "tie", backwards)
    assert broken(graph("densenet", "onnx"), feeds("densenet", "onnx", 2))


def test_a_wrong_map_in_reshape_is_caught(monkeypatch):
    monkeypatch.setattr(
        coupling_reshape.Block,
        "positions",
        lambda self, axis, factor: (
            np.arange(int(np.prod([max(self.sizes[f], 1) for f in axis.factors]))) % self.sizes[factor]
        ),
    )
    assert broken(graph("vgg", "onnx"), feeds("vgg", "onnx", 2))


def test_the_right_maps_hold():
    for name in ("resnet_a", "densenet", "vgg"):
        assert not broken(graph(name, "onnx"), feeds(name, "onnx", 2))


def test_cutting_nothing_gives_the_graph_back():
    whole = graph("cnn", "onnx")
    assert cut(whole, {}) is whole


REAL = ("cifar10_resnet20_opset17", "ic_resnet8_cifar10", "ic_resnet_large_cifar10", "kws_dscnn")


@pytest.mark.shared_data
@pytest.mark.parametrize("name", REAL)
def test_real_models(name, shared):
    """Networks that others trained and exported, two of them by other tools than PyTorch."""
    whole = ee.load(shared / "models" / f"{name}.onnx")
    (tensor,) = whole.gs.inputs
    shape = [2 if isinstance(size, str) else size for size in tensor.shape]
    fed = {tensor.name: np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    macs = {node.name: node_macs(node, whole.types) or 0 for node in whole.nodes}
    prunable = {member.node for group in whole.groups.prunable for member in group.members}
    assert sum(macs[node] for node in prunable if node in macs) >= 0.99 * sum(macs.values())
    assert_cut(whole, chosen(whole, 0, 0.5, 1.0), fed)
    assert_cut(whole, chosen(whole, 1, 0.3, 0.5), fed)
