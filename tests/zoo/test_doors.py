"""Everything that is promised, on every network of the zoo, through both doors."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

import eexform as ee
from eexform.backends import ort
from eexform.backends.export import FORMS, export
from eexform.heads import head_graph, portfolio
from eexform.ir.arithmetic import node_macs
from eexform.ir.graph import Graph
from eexform.ir.sites import Site, SiteReport, find_sites
from eexform.passes import PassContext
from eexform.passes.insert_exits import InsertExits
from eexform.verification.simulate import simulate
from eexform.verification.verify import verify
from tests.lowering import nets
from tests.zoo import doors, modules

ALL = [pytest.param(name, door, id=f"{name}-{door}") for name in modules.NAMES for door in doors.DOORS]
SAMPLES = 15
AT_LEAST = {"cnn": 3, "vgg": 6, "vit_encoder": 6, "mixer": 8, "vit": 8, "bert": 8, "kws_gru": 2, "kws_conv": 7}
"""Sites that every network has, and a dozen or so where there are blocks."""


@cache
def sites(name: str, door: str) -> SiteReport:
    return find_sites(doors.graph(name, door))


def candidates(graph: Graph, site: Site):
    macs = sum(node_macs(node, graph.types) or 0 for node in graph.nodes)
    return portfolio(site, trunk_macs=macs, num_classes=modules.CLASSES, max_share=0.5)


@cache
def with_exits(name: str, door: str) -> Graph:
    """Three untrained exits, spread over the sites, with another kind of head at each; half of a batch leaves."""
    graph, found = doors.graph(name, door), sites(name, door).sites
    places = np.unique(np.linspace(0, len(found) - 1, 5).round().astype(int)[1:-1])
    heads = {}
    for number, place in enumerate(places):
        offered = candidates(graph, found[place])
        heads[found[place].value] = str(offered[number % len(offered)])
    step = InsertExits(tuple(heads), heads, dict.fromkeys(heads, 0.5), untrained=True)
    made = step.run(graph, PassContext(seed=7)).graph
    return nets.set_thresholds(made, nets.spread(simulate(made, feeds(name, door))))


def feeds(name: str, door: str) -> dict[str, np.ndarray]:
    return doors.feeds(doors.graph(name, door), modules.inputs(name, SAMPLES, seed=3))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest number."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("name", "door"), ALL)
def test_the_graph_says_what_the_module_says(name, door):
    graph = doors.graph(name, door)
    session = ort.session(graph)
    for batch in (1, 7):
        args = modules.inputs(name, batch, seed=batch)
        expected = doors.answers(name, args)
        assert expected.std(axis=0).max() > 0.01 or batch == 1  # samples differ, or nothing would be compared
        found = ort.run(session, doors.feeds(graph, args))[graph.final]
        assert relative(found, expected) <= 1e-5


@pytest.mark.parametrize(("name", "door"), ALL)
def test_sites(name, door):
    graph, report = doors.graph(name, door), sites(name, door)
    assert len(report.sites) >= AT_LEAST.get(name, 9)
    assert all(rejected.reason for rejected in report.rejected)
    listed = [item.value for item in (*report.sites, *report.rejected)]
    assert len(listed) == len(set(listed))
    for value, kind in graph.types.items():
        if value in graph.flow.producer and kind.dtype == np.float32 and kind.batch_axis is not None:
            assert value in listed


@pytest.mark.parametrize(("name", "door"), ALL)
def test_default_heads_fit_every_site(name, door):
    graph = doors.graph(name, door)
    alike = {(site.kind, site.channel_axis, site.shape): site for site in sites(name, door).sites}
    for site in alike.values():
        offered = candidates(graph, site)
        assert offered
        for spec in offered:
            head = head_graph(spec, site, num_classes=modules.CLASSES)
            assert head.types[head.final].shape == ("N", modules.CLASSES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "door"), ALL)
def test_lowered_and_verified(name, door, form, tmp_path):
    graph = with_exits(name, door)
    leaving = simulate(graph, feeds(name, door)).decisions().exit_index
    assert len(set(leaving.tolist())) > 1
    path = export(graph, tmp_path / "out", form)
    verify(path, doors.graph(name, door), feeds(name, door)).require()


def wanted(scores: torch.Tensor) -> torch.Tensor:
    """A random linear function of the scores, to take gradients of."""
    return (scores * torch.randn(scores.shape, generator=torch.Generator().manual_seed(11))).sum()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", modules.NAMES)
def test_back_to_torch(name, training):
    """The same numbers, gradients, statistics and names as the module that came in."""
    ours, theirs = ee.to_torch(doors.graph(name, "torch")), modules.module(name)
    assert not ours.training
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    ours.train(training)
    theirs.train(training)
    for part in theirs.modules():
        if isinstance(part, torch.nn.Dropout):
            part.eval()  # the graph has no dropout
    args = modules.inputs(name, 7, seed=5)
    found, expected = ours(*args), modules.logits(theirs(*args))
    assert relative(found.detach().numpy(), expected.detach().numpy()) <= 1e-5
    wanted(found).backward()
    wanted(expected).backward()
    gradients = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    largest = max(float(grad.abs().max()) for grad in gradients.values() if grad is not None)
    for key, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (gradients[key] is None), key
        if parameter.grad is not None:  # what cancels (the bias of keys) is compared with the largest of all
            scale = max(float(gradients[key].abs().max()), 1e-2 * largest)
            assert float((parameter.grad - gradients[key]).abs().max()) <= 1e-5 * scale, key
    for key, value in theirs.state_dict().items():
        if key.endswith("num_batches_tracked"):  # the graph has no place for it: it counts from 0
            assert int(ours.state_dict()[key]) == training
        else:
            torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-5, atol=1e-6, msg=key)
    before = modules.module(name).state_dict()
    moved = any(not before[key].equal(value) for key, value in theirs.state_dict().items())
    assert moved == (training and any("running_mean" in key for key in before))


@pytest.mark.parametrize("name", modules.NAMES)
def test_the_module_with_exits_leaves_like_the_simulator(name):
    graph, args = with_exits(name, "torch"), modules.inputs(name, SAMPLES, seed=3)
    expected = simulate(graph, feeds(name, "torch")).decisions()
    with torch.no_grad():
        found = ee.to_torch(graph)(*args)
    np.testing.assert_array_equal(found.exit_index.numpy(), expected.exit_index)
    assert relative(found.logits.numpy(), expected.scores) <= 1e-5
    np.testing.assert_allclose(found.confidence.numpy(), expected.confidence, rtol=1e-5, atol=1e-6)
