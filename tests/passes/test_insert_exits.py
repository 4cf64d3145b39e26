"""insert_exits: what it adds, where, with which parameters; carry; refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from eexform.errors import EexformError, OptionError, PassError
from eexform.heads import HeadSpec, head_graph
from eexform.ir.exit_nodes import head_digest
from eexform.ir.graph import Graph
from eexform.ir.policy import carry_states
from eexform.ir.sites import find_sites
from eexform.passes import Pass, PassContext, PlanStore, TrainedHead, make
from eexform.tunables import Choice, Subset
from tests.passes.helpers import CHAIN, feeds_of, graph_of, run

HEADS = {"r1": "conv:1x4/avg/s2", "r2": "none/avg"}


def store_of(graph: Graph, seed: int = 5) -> PlanStore:
    """Heads with drawn parameters, as if trained, at both sites of CHAIN."""
    rng = np.random.default_rng(seed)
    heads = {}
    for place, (site, text) in enumerate({**HEADS, "r2": "none/avg"}.items()):
        head = head_graph(HeadSpec.parse(text), find_sites(graph).site(site), num_classes=4, scores=graph.scores)
        arrays = {
            name: (rng.uniform(0.5, 1.5, values.shape) if "var" in name else rng.standard_normal(values.shape)).astype(
                np.float32
            )
            for name, values in head.parameters().items()
        }
        heads[site, text] = TrainedHead(arrays, 1.5 + place, head_digest(arrays))
    return PlanStore(graph.digest, heads)


def insert(**changes: Any) -> Pass:
    given: dict[str, Any] = {"sites": ["r2", "r1"], "heads": HEADS, "thresholds": {"r1": 0.9, "r2": 0.4}}
    return make("insert_exits", **{**given, **changes})


def test_exits_in_order_with_trained_parameters() -> None:
    graph = graph_of(CHAIN)
    store = store_of(graph)
    result = insert(measure="margin")(graph, PassContext(heads=store))
    after = result.graph
    assert [item.site for item in after.exits] == ["r1", "r2"], "the order in which a sample meets them"
    assert after.outputs == ("scores", "exit0.scores", "exit1.scores")
    assert [(item.threshold, item.measure, item.temperature) for item in after.exits] == [
        (0.9, "margin", 1.5), (0.4, "margin", 2.5),
    ]  # fmt: skip
    for item in after.exits:
        trained = store.trained(graph.digest, item.site, item.head)
        assert item.digest == trained.digest
        found = {name: after.constants[name].values for name in item.parameters}
        assert head_digest(found) == trained.digest
    feeds = feeds_of(graph)
    np.testing.assert_array_equal(run(after, feeds)["scores"], run(graph, feeds)["scores"])
    assert after.metadata["eexform.trunk_digest"] == graph.digest


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_carry_is_what_the_simulator_says(kind: str) -> None:
    text = (
        CHAIN
        if kind == "logits"
        else CHAIN.replace("scores = Gemm", "logits = Gemm").replace(
            "}\n", "    [soft] scores = Softmax<axis = 1>(logits)\n}\n"
        )
    )
    graph = graph_of(text)
    assert graph.scores == kind
    store = store_of(graph)
    plain = insert()(graph, PassContext(heads=store)).graph
    carried = insert(carry=0.5, final_temperature=1.25)(graph, PassContext(heads=store)).graph
    assert carried.final == "scores"
    assert [item.temperature for item in carried.exits] == [1.0, 1.0]
    if kind == "probabilities":
        assert [item.temperature for item in plain.exits] == [1.0, 1.0]
    feeds = feeds_of(graph, batch=5)
    alone, together = run(plain, feeds), run(carried, feeds)
    raw = [alone["exit0.scores"], alone["exit1.scores"], alone["scores"]]
    expected = carry_states(raw, [1.5, 2.5, 1.25], 0.5, graph.scores)
    found = [together[item.logits] for item in carried.exits] + [together["scores"]]
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


def test_untrained_heads_are_the_same_for_the_same_seed() -> None:
    graph = graph_of(CHAIN)
    one, two = (insert(untrained=True)(graph, PassContext(seed=3)).graph for _ in range(2))
    other = insert(untrained=True)(graph, PassContext(seed=4)).graph
    assert one.digest == two.digest != other.digest


def test_no_sites_is_the_trunk() -> None:
    graph = graph_of(CHAIN)
    result = insert(sites=[])(graph)
    assert result.graph is graph
    assert not result.changed
    assert result.skipped[0].why == "no sites were chosen"


def test_never_and_always() -> None:
    graph = graph_of(CHAIN)
    step = insert(thresholds={"r1": "never", "r2": "always"}, untrained=True)
    assert [item.threshold for item in step(graph).graph.exits] == [math.inf, -math.inf]
    assert step.to_plain()["thresholds"] == {"r2": "always", "r1": "never"}


def test_space_follows_the_store() -> None:
    graph = graph_of(CHAIN)
    cls = type(insert())
    everything = cls.space(graph, PassContext())
    assert isinstance(everything["sites"], Subset)
    assert everything["sites"].items == ("r1", "r2")
    store = store_of(graph)
    trained = cls.space(graph, PassContext(heads=store))
    assert trained["heads"].domains == {site: Choice([text]) for site, text in HEADS.items()}  # type: ignore[attr-defined]
    nothing = cls.space(graph, PassContext(heads=PlanStore("another trunk", {})))
    assert nothing["sites"].items == ()  # type: ignore[attr-defined]
    value = {name: domain.sample(np.random.default_rng(0)) for name, domain in trained.items()}
    make("insert_exits", **value)(graph, PassContext(heads=store))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no head": ({"heads": {"r1": "none/avg"}}, "heads: site 'r2' has none"),
    "no threshold": ({"thresholds": {"r1": 0.5}}, "thresholds: site 'r2' has none"),
    "threshold above 1": ({"thresholds": {"r1": 0.5, "r2": 1.5}}, "thresholds[r2]: 1.5 is neither a number 0..1"),
    "threshold word": ({"thresholds": {"r1": 0.5, "r2": "often"}}, "'never' or 'always'"),
    "bad head": ({"heads": {"r1": "konv:1x4/avg", "r2": "none/avg"}}, "head layer 'konv' does not exist"),
    "measure": ({"measure": "max_probe"}, "did you mean 'max_prob'?"),
    "carry": ({"carry": 0.3}, "pass 'insert_exits', parameter 'carry': 0.3 is not a choice"),
    "twice": ({"sites": ["r1", "r1"]}, "listed twice"),
    "text": ({"sites": "r1"}, "expected a list, found 'r1'"),
    "temperature": ({"final_temperature": -1.0}, "not a positive number"),
    "kind": ({"untrained": "yes"}, "expected bool, found 'yes'"),
    "unknown": ({"threshold": 0.5}, "has no parameter 'threshold': did you mean 'thresholds'?"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_parameters_are_named(case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(OptionError) as caught:
        insert(**changes)
    assert message in str(caught.value)
    assert "insert_exits" in str(caught.value)


def test_refused_graphs_and_sites() -> None:
    graph = graph_of(CHAIN)
    once = insert(untrained=True)(graph).graph
    with pytest.raises(PassError, match="2 exits already"):
        insert(untrained=True)(once)
    for value, reason in {"c1": "is no site", "r9": "there is no site 'r9'"}.items():
        step = insert(sites=[value], heads={value: "none/avg"}, thresholds={value: 0.5}, untrained=True)
        with pytest.raises(EexformError, match=reason):
            step(graph)
    with pytest.raises(PassError, match=r"no trained heads .* untrained = true"):
        insert()(graph)


def test_a_store_of_another_trunk_is_refused() -> None:
    graph, other = graph_of(CHAIN), graph_of(CHAIN, seed=9)
    with pytest.raises(OptionError, match="were trained on trunk"):
        insert()(graph, PassContext(heads=store_of(other)))


# -- gates ------------------------------------------------------------------------------------------------------------

GATED = {site: f"{text}/gate" for site, text in HEADS.items()}


@pytest.mark.parametrize("carry", [0.0, 0.5])
def test_gates_say_how_sure_an_exit_is(carry: float) -> None:
    graph = graph_of(CHAIN)
    plain = insert(untrained=True, carry=carry)(graph, PassContext(seed=3)).graph
    own = insert(untrained=True, carry=carry, heads=GATED, measure="gate")(graph, PassContext(seed=3)).graph
    stick = insert(untrained=True, carry=carry, heads=GATED, measure="stick")(graph, PassContext(seed=3)).graph
    assert [item.confidence for item in own.exits] == ["exit0.gate", "exit1.gate"]
    assert own.outputs == (*plain.outputs, "exit0.gate", "exit1.gate")
    assert stick.outputs == (*plain.outputs, *(item.confidence for item in stick.exits))
    assert all({f"exit{i}.gate.weight", f"exit{i}.gate.bias"} < set(own.exits[i].parameters) for i in (0, 1))
    feeds = feeds_of(graph)
    scores, gates, sticks = ([*run(each, feeds).values()] for each in (plain, own, stick))
    for ours, theirs in zip(gates[:3], scores, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    first, second = gates[3:]
    np.testing.assert_array_equal(sticks[3], first)
    np.testing.assert_allclose(sticks[4], 1 - (1 - first) * (1 - second), atol=1e-6)


def test_a_plan_without_gates_is_written_as_before() -> None:
    after = insert(untrained=True)(graph_of(CHAIN), PassContext()).graph
    assert all("confidence" not in item.to_json() for item in after.exits)
    gated = insert(untrained=True, heads=GATED, measure="gate")(graph_of(CHAIN), PassContext()).graph
    for item in gated.exits:
        assert type(item).from_json(item.to_json()) == item


@pytest.mark.parametrize(
    ("heads", "measure", "message"),
    [
        (
            GATED,
            "max_prob",
            r"'max_prob' reads scores, and the head 'conv:1x4/avg/s2/gate' at 'r1' has a gate: take it",
        ),
        (HEADS, "stick", r"'stick' reads gates, and the head 'conv:1x4/avg/s2' at 'r1' has none: take '.*/s2/gate'"),
        ({**GATED, "r1": HEADS["r1"]}, "gate", r"'gate' reads gates, and the head 'conv:1x4/avg/s2' at 'r1' has none"),
    ],
)
def test_heads_and_measure_go_together(heads: dict[str, str], measure: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        insert(heads=heads, measure=measure)
