"""Every form decides like the simulator, sample by sample, on every kind of network."""

from __future__ import annotations

import numpy as np
import pytest

from eexform.backends import ort
from eexform.backends.lower_if import lower_if
from eexform.backends.lower_multi import lower_multi
from eexform.backends.lower_stages import save_stages
from eexform.ir.policy import Decisions
from eexform.runtime import StagedSession
from eexform.verification.simulate import Simulated, take
from eexform.verification.verify import compare
from tests import zoo
from tests.lowering import nets

SAMPLES = 32
COUNT = 3


def run_if(model, feeds, **extra):
    found = ort.run(ort.session(model), {**feeds, **extra})
    return Decisions(found["exit_index"], found["logits"], found["confidence"])


def agree(expected: Simulated, run, feeds, graph, size: int) -> None:
    for start in range(0, len(expected.final), size):
        rows = np.arange(start, min(start + size, len(expected.final)))
        ok, detail = compare(expected.take(rows), run(take(graph, feeds, rows)))
        assert ok, detail


@pytest.mark.parametrize("policy", ["spread", "never", "always"])
@pytest.mark.parametrize("name", zoo.NAMES)
def test_if_agrees_with_the_simulator(name, policy):
    graph, expected = nets.with_exits(name, COUNT), nets.scores(name, COUNT, SAMPLES)
    thresholds = {
        "spread": nets.spread(expected),
        "never": [np.inf] * len(graph.exits),
        "always": [-np.inf] * len(graph.exits),
    }[policy]
    expected = expected.with_thresholds(thresholds)
    if policy == "spread":
        assert len(set(expected.decisions().exit_index.tolist())) > 1
    session = ort.session(lower_if(nets.set_thresholds(graph, thresholds)))

    def run(feeds):
        found = ort.run(session, feeds)
        return Decisions(found["exit_index"], found["logits"], found["confidence"])

    for size in (1, 7, 32):
        agree(expected, run, zoo.feeds(name, SAMPLES, seed=3), graph, size)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_stages_agree_with_the_simulator(name, tmp_path):
    graph, expected = nets.with_exits(name, COUNT), nets.scores(name, COUNT, SAMPLES)
    thresholds = nets.spread(expected)
    expected = expected.with_thresholds(thresholds)
    save_stages(nets.set_thresholds(graph, thresholds), tmp_path / "stages")
    session = StagedSession(tmp_path / "stages")

    def run(feeds):
        found = session.run(feeds)
        return Decisions(found.exit_index, found.scores, found.confidence)

    for size in (1, 7, 32):
        agree(expected, run, zoo.feeds(name, SAMPLES, seed=3), graph, size)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_multi_gives_every_score(name):
    graph, expected = nets.with_exits(name, COUNT), nets.scores(name, COUNT, SAMPLES)
    found = ort.run(ort.session(lower_multi(graph)), zoo.feeds(name, SAMPLES, seed=3))
    assert list(found) == ["logits", *(f"exit{place}" for place in range(len(graph.exits)))]
    for ours, theirs in zip(found.values(), (expected.final, *expected.exit_scores), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
@pytest.mark.parametrize("carry", [0.0, 0.5])
def test_measures_and_carry(measure, carry, tmp_path):
    graph = nets.with_exits("resnet", COUNT, carry=carry, measure=measure)
    expected = nets.scores("resnet", COUNT, SAMPLES, carry, measure)
    thresholds = nets.spread(expected)
    expected, graph = expected.with_thresholds(thresholds), nets.set_thresholds(graph, thresholds)
    feeds = zoo.feeds("resnet", SAMPLES, seed=3)
    model = lower_if(graph)
    save_stages(graph, tmp_path / "stages")
    session = StagedSession(tmp_path / "stages")
    agree(expected, lambda part: run_if(model, part), feeds, graph, 7)
    agree(expected, lambda part: Decisions(*order(session.run(part))), feeds, graph, 7)


def order(result):
    return result.exit_index, result.scores, result.confidence


def test_thresholds_as_input():
    graph, expected = nets.with_exits("resnet", COUNT), nets.scores("resnet", COUNT, SAMPLES)
    model = lower_if(graph, thresholds_as_input=True)
    feeds = zoo.feeds("resnet", SAMPLES, seed=3)
    for thresholds in (nets.spread(expected), [np.inf] * 3, [-np.inf] * 3, [np.inf, -np.inf, 0.5]):
        found = run_if(model, feeds, thresholds=np.array(thresholds, np.float32))
        ok, detail = compare(expected.with_thresholds(thresholds), found)
        assert ok, detail


@pytest.mark.parametrize("name", ["vit", "swin", "bert", "unet", "densenet"])
def test_an_exit_at_every_site(name):
    """One exit each at every site: whatever the cut carries, the rest is computed from the rows that stay."""
    feeds = zoo.feeds(name, 9, seed=5)
    from eexform.verification.simulate import simulate

    for site in nets.sites(name):
        graph = nets.attach(nets.trunk(name), [site])
        expected = simulate(graph, feeds)
        thresholds = nets.spread(expected)
        graph, expected = nets.set_thresholds(graph, thresholds), expected.with_thresholds(thresholds)
        ok, detail = compare(expected, run_if(lower_if(graph), feeds))
        assert ok, f"{site.value}: {detail}"
