"""drop_tail: what is left, what every sample gets, and that an exported file verifies against the original model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest

import eexform as ee
from eexform.backends.export import export
from eexform.backends.metadata import PLAN
from eexform.errors import OptionError, PassError
from eexform.frontends.onnx import from_model
from eexform.heads import HeadSpec, head_graph
from eexform.ir.exit_nodes import head_digest
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.passes import TrainedHead, make
from eexform.passes._contract import PassContext
from eexform.verification.simulate import simulate
from eexform.verification.verify import verify
from tests import zoo
from tests.lowering import nets
from tests.passes.helpers import CHAIN, graph_of, ops, run

SAMPLES = 40
SITES = {"r1": "none/avg", "r2": "conv:1x4/avg"}


@dataclass(frozen=True)
class Heads:
    """Random heads, each with a temperature of its own."""

    trunk: Graph

    def sites(self, trunk_digest: str) -> tuple[str, ...]:
        return tuple(site.value for site in find_sites(self.trunk).sites)

    def heads(self, trunk_digest: str, site: str) -> tuple[str, ...]:
        return ("none/avg",)

    def trained(self, trunk_digest: str, site: str, head: str) -> TrainedHead:
        found = find_sites(self.trunk).site(site)
        seed = self.sites("").index(site)
        spec = HeadSpec.parse(head)
        built = head_graph(
            spec, found, num_classes=self.trunk.num_classes, scores=self.trunk.scores, seed=seed, opset=self.trunk.opset
        )
        parameters = built.parameters()
        return TrainedHead(parameters, 1.5 + 0.25 * seed, head_digest(parameters))


def with_exits(trunk: Graph, sites: dict[str, str], measure: str = "max_prob", carry: float = 0.0) -> Graph:
    gate = "/gate" if measure in ("gate", "stick") else ""
    insert = make(
        "insert_exits",
        sites=[*sites],
        heads={site: head + gate for site, head in sites.items()},
        thresholds=dict.fromkeys(sites, 0.35 if not gate else 0.6),
        measure=measure,
        carry=carry,
        final_temperature=1.25,
    )
    return insert(trunk, PassContext(heads=Heads(trunk))).graph


def splitting(graph: Graph, feeds: dict[str, np.ndarray]) -> Graph:
    """The graph with thresholds at which about half of those who arrive leave."""
    return nets.set_thresholds(graph, nets.spread(simulate(graph, feeds)))


BEFORE = CHAIN
AFTER = """
<ir_version: 8, opset_import: ["": 17]>
chain (float[N, 2, 8, 8] image) => (float[N, 4] scores)
<float[3, 2, 3, 3] w1, float[4, 3] tail_weight, float[4] tail_bias>
{
    [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(image, w1)
    [relu1] r1 = Relu(c1)
    [avg] p = GlobalAveragePool(r1)
    [flat] f = Flatten(p)
    [classifier] scores = Gemm<transB = 1>(f, tail_weight, tail_bias)
}
"""


def test_before_and_after() -> None:
    before = with_exits(graph_of(BEFORE), SITES)
    result = make("drop_tail", exit=0)(before)
    found = result.graph
    assert ops(found) == ops(graph_of(AFTER))
    assert (found.inputs, found.outputs, found.exits) == (("image",), ("scores",), ())
    assert found.num_classes == 4
    assert sorted(found.constants)[:2] == ["tail.classifier.bias", "tail.classifier.weight"]
    assert all(name.startswith("tail.") or name in ("conv1", "relu1") for name in (node.name for node in found.nodes))
    assert result.notes[0].startswith("exit 0 at r1 with none/avg is final; ")
    np.testing.assert_array_equal(run(found)["scores"], run(before)[before.exits[0].logits])


@pytest.mark.parametrize("carry", [0.0, 0.5])
@pytest.mark.parametrize("measure", ["max_prob", "entropy", "gate", "stick"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_sample_gets_what_it_got_with_the_exit_always_taken(measure: str, place: int, carry: float) -> None:
    trunk = from_model(zoo.build("resnet"))
    chosen = [site.value for site in find_sites(trunk).sites][1::3][:3]
    feeds = zoo.feeds("resnet", SAMPLES, seed=3)
    before = splitting(with_exits(trunk, dict.fromkeys(chosen, "none/avg"), measure, carry), feeds)
    after = make("drop_tail", exit=place)(before).graph
    always = [item.threshold if i < place else -math.inf for i, item in enumerate(before.exits)]
    expected = simulate(before, feeds).with_thresholds(always).decisions()
    found = simulate(after, feeds).decisions()
    assert len(set(expected.exit_index)) > 1 or place == 0
    np.testing.assert_array_equal(found.exit_index, expected.exit_index)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
    early = found.exit_index < place
    np.testing.assert_allclose(found.confidence[early], expected.confidence[early], rtol=1e-5, atol=1e-6)
    assert after.exits == before.exits[:place]


@pytest.mark.parametrize("form", ["if", "stages", "multi"])
@pytest.mark.parametrize(("measure", "carry"), [("max_prob", 0.0), ("max_prob", 0.5), ("stick", 0.0)])
def test_what_is_exported_verifies(form: str, measure: str, carry: float, tmp_path: Path) -> None:
    trunk = from_model(zoo.build("resnet"))
    chosen = [site.value for site in find_sites(trunk).sites][1::2][:3]
    feeds = zoo.feeds("resnet", SAMPLES, seed=3)
    before = splitting(with_exits(trunk, dict.fromkeys(chosen, "conv:1x4/avg"), measure, carry), feeds)
    after = make("drop_tail", exit=2)(before).graph
    export(after, tmp_path / "out", form)
    report = verify(tmp_path / "out", trunk, feeds)
    assert report.ok, report.to_json()
    assert "forced to the final classifier" in {item.name for item in report.checks}


def test_another_tail_is_noticed(tmp_path: Path) -> None:
    trunk = from_model(zoo.build("resnet"))
    chosen = [site.value for site in find_sites(trunk).sites][1::2][:3]
    after = make("drop_tail", exit=2)(with_exits(trunk, dict.fromkeys(chosen, "none/avg"))).graph.copy()
    plan = json.loads(after.metadata[PLAN])
    plan["tail"]["site"] = chosen[1]
    export(after.replace(metadata={**after.metadata, PLAN: json.dumps(plan)}), tmp_path / "ee.onnx", "multi")
    assert not verify(tmp_path / "ee.onnx", trunk, zoo.feeds("resnet", SAMPLES, seed=3)).ok


def test_probabilities_and_a_new_exit_where_the_old_one_was(tmp_path: Path) -> None:
    trunk = graph_of(
        CHAIN.replace("scores = Gemm<transB = 1>(f, w4, b4)", "l = Gemm<transB = 1>(f, w4, b4)\n scores = Softmax(l)")
    )
    assert trunk.scores == "probabilities"
    shorter = make("drop_tail", exit=1)(with_exits(trunk, SITES)).graph
    np.testing.assert_allclose(run(shorter)["scores"].sum(axis=1), 1.0, rtol=1e-5)
    alone = make("drop_tail", exit=1)(with_exits(trunk, SITES)).graph
    none = make("drop_tail", exit=0)(alone).graph
    assert none.exits == ()
    ee.save(none, tmp_path / "small.onnx")
    loaded = ee.load(tmp_path / "small.onnx")
    onnx.checker.check_model(str(tmp_path / "small.onnx"), full_check=True)
    assert loaded.digest == none.digest


def test_the_names_of_the_exit_are_free_again() -> None:
    first = make("drop_tail", exit=1)(with_exits(graph_of(CHAIN), {"r2": "none/avg", "r1": "none/avg"})).graph
    alone = make("remove_dead")(first.replace(exits=(), graph=_only_final(first))).graph
    again = with_exits(alone, {"r1": "none/avg"})
    assert len(again.exits) == 1
    shortest = make("drop_tail", exit=0)(again).graph
    np.testing.assert_array_equal(run(shortest)["scores"], run(again)[again.exits[0].logits])


def _only_final(graph: Graph):  # type: ignore[no-untyped-def]
    draft = graph.copy().gs
    draft.outputs = draft.outputs[:1]
    return draft


def test_what_cannot_be_is_refused() -> None:
    trunk = graph_of(CHAIN)
    with pytest.raises(PassError, match="put drop_tail behind insert_exits"):
        make("drop_tail", exit=0)(trunk)
    graph = with_exits(trunk, SITES)
    with pytest.raises(PassError, match=r"there is no exit 3: give 0\.\.1, or 2 to keep them all"):
        make("drop_tail", exit=3)(graph)
    with pytest.raises(OptionError, match="the first one is 0"):
        make("drop_tail", exit=-1)
    with pytest.raises(PassError, match="before lower"):
        make("drop_tail", exit=0)(make("lower")(graph).graph)
    kept = make("drop_tail", exit=2)(graph)
    assert kept.graph is graph
    assert kept.skipped[0].why == "all 2 exits are kept, and so is the final classifier"
    domain = make("drop_tail", exit=0).space(graph, PassContext())["exit"]
    assert domain.describe() == "integer 0..2"
    wrong = replace(graph.exits[0], logits="r1")
    with pytest.raises(PassError, match="only an exit with the same classes can become final"):
        make("drop_tail", exit=0)(graph.replace(exits=(wrong, graph.exits[1])))
