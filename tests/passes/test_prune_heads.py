"""prune_heads: whole heads go, wherever they are; everything else stays."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from eexform import cost_models
from eexform.errors import PassError
from eexform.frontends.onnx import from_model
from eexform.ir.cut import predicted
from eexform.ir.graph import Graph
from eexform.passes import PassContext, PassResult, make
from tests import zoo
from tests.passes.helpers import CHAIN, graph_of, run
from tests.pruning.helpers import samples_for

BINDINGS = {"seq": 7}
NETS = ("vit", "swin", "bert")


@cache
def net(name: str) -> Graph:
    return from_model(zoo.build(name))


def prune(graph: Graph, *, samples: object = None, **given: object) -> PassResult:
    return make("prune_heads", **given)(graph, PassContext(samples=samples))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("criterion", ["l2", "activation"])
def test_a_share_of_the_heads_goes(name: str, criterion: str) -> None:
    graph = net(name)
    heads = [group for group in graph.groups.prunable if group.kind == "heads"]
    total = sum(group.size for group in heads)
    found = prune(graph, ratio=0.25, criterion=criterion, samples=samples_for(graph, 4))
    (step,) = found.replay or ()
    cut = step.cut  # type: ignore[attr-defined]
    assert sum(map(len, cut.values())) == int(np.ceil(total * 0.25))
    assert set(cut) <= {group.name for group in heads}
    after = predicted(graph, cut, bindings=BINDINGS)
    assert cost_models.make("macs", bindings=BINDINGS).cost(found.graph).total == after.macs
    assert cost_models.make("params").cost(found.graph).total == after.params
    assert after.macs < cost_models.make("macs", bindings=BINDINGS).cost(graph).total
    (scores,) = run(found.graph, zoo.feeds(name, batch=2)).values()
    assert scores.shape == (2, zoo.CLASSES)
    assert step(graph).graph.digest == found.graph.digest


def test_every_attention_keeps_a_head() -> None:
    graph = net("vit")
    found = prune(graph, ratio=0.9, most=1.0)
    (step,) = found.replay or ()
    assert all(len(units) < graph.groups[name].size for name, units in step.cut.items())  # type: ignore[attr-defined]
    assert any("leave less than 90.0% of heads" in note for note in found.notes)


def test_channels_and_heads_one_after_the_other() -> None:
    graph = net("vit")
    first = prune(graph, ratio=0.3)
    second = make("prune_channels", ratio=0.3)(first.graph)
    assert second.changed
    (scores,) = run(second.graph, zoo.feeds("vit", batch=2)).values()
    assert np.isfinite(scores).all()


def test_a_network_without_attention_is_left_alone() -> None:
    graph = graph_of(CHAIN)
    found = prune(graph)
    assert not found.changed
    assert found.replay == ()
    assert [skip.why for skip in found.skipped] == ["it has no groups of heads"]


def test_channels_are_for_another_pass() -> None:
    graph = net("vit")
    width = next(group.name for group in graph.groups.prunable if group.kind == "width")
    with pytest.raises(PassError, match="its units are width, and prune_heads cuts heads"):
        prune(graph, cut={width: [0]})
