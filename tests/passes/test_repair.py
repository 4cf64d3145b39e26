"""The pass repair: in a pipeline, replayed without data, and what it asks for."""

from __future__ import annotations

import numpy as np
import pytest

from eexform.errors import OptionError, PassError
from eexform.passes import Pass, PassContext, Pipeline, make
from eexform.passes.set_parameters import SetParameters
from tests.passes.helpers import CHAIN, graph_of, run
from tests.passes.test_insert_exits import insert, store_of
from tests.pruning.samples import normal

CUT = {"w1": (1,), "w2": (0, 5)}


def steps(method: str = "all") -> list[Pass]:
    return [make("prune_channels", cut=CUT), make("repair", method=method)]


@pytest.mark.parametrize("method", ["bias", "least_squares", "all"])
def test_repaired_and_replayed(method: str) -> None:
    graph = graph_of(CHAIN)
    samples = normal(graph, 120)
    whole, bare = run(graph, samples.feeds), run(make("prune_channels", cut=CUT)(graph).graph, samples.feeds)
    result = Pipeline(steps(method))(graph, PassContext(samples=samples))
    mended = run(result.graph, samples.feeds)
    errors = [float(((found["scores"] - whole["scores"]) ** 2).mean()) for found in (bare, mended)]
    assert errors[1] < errors[0]
    assert result.replay is not None
    assert [step.name for step in result.replay] == ["prune_channels", "set_parameters"]
    again = Pipeline(result.replay)(graph, PassContext(arrays=result.arrays))
    assert again.graph.digest == result.graph.digest
    assert any(note.startswith("repair: ") for note in result.notes)


def test_alone_it_needs_the_reference() -> None:
    graph = graph_of(CHAIN)
    small = make("prune_channels", cut=CUT)(graph).graph
    samples = normal(graph, 20)
    step = make("repair")
    with pytest.raises(PassError, match="compares with the graph before the cut: run it in a pipeline"):
        step(small, PassContext(samples=samples))
    result = step(small, PassContext(samples=samples, reference=graph))
    (replay,) = result.replay or ()
    assert isinstance(replay, SetParameters)
    assert replay.digest in result.arrays


def test_without_samples() -> None:
    graph = graph_of(CHAIN)
    with pytest.raises(PassError, match=r"has to look at samples, and there are none: give --data"):
        Pipeline(steps())(graph)


def test_before_exits_only() -> None:
    graph = graph_of(CHAIN)
    result = insert()(graph, PassContext(heads=store_of(graph)))
    with pytest.raises(PassError, match="put repair before insert_exits"):
        make("repair")(result.graph, PassContext(samples=normal(graph, 4), reference=graph))


def test_nothing_to_mend() -> None:
    graph = graph_of(CHAIN)
    result = Pipeline([make("remove_dead"), make("repair")])(graph, PassContext(samples=normal(graph, 8)))
    assert not result.changed
    assert result.graph is graph
    assert [step.name for step in result.replay or ()] == ["remove_dead"]
    assert result.skipped[-1].why == "no layer that this method can mend sees anything new"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "retrain"}, "'retrain' is not a choice"),
        ({"samples": 0}, "samples: expected at least 1, found 0"),
        ({"memory": 0}, "memory: expected at least 1 MiB"),
        ({"ridge": -1.0}, "ridge: expected a number from 0"),
        ({"ridge": float("nan")}, "ridge: expected a number from 0"),
    ],
)
def test_mistakes(given: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make("repair", **given)


def test_the_seed_chooses_the_positions_only() -> None:
    graph = graph_of(CHAIN.replace("8, 8]", "96, 96]"))
    samples = normal(graph, 12)
    found = [Pipeline(steps())(graph, PassContext(samples=samples, seed=seed)).graph for seed in (0, 0, 1)]
    assert found[0].digest == found[1].digest != found[2].digest
    one, other = (run(which, samples.feeds)["scores"] for which in found[1:])
    np.testing.assert_allclose(one, other, rtol=0.1, atol=0.05 * float(np.abs(one).max()))
