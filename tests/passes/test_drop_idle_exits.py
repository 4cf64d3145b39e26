"""drop_idle_exits: the sum that decides, worked by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from eexform.cost_models import exit_costs
from eexform.cost_models import make as make_cost
from eexform.errors import PassError
from eexform.ir.exit_nodes import head_nodes
from eexform.ir.graph import Graph
from eexform.passes import PassContext, make
from tests.passes.helpers import CHAIN, graph_of, run

SITES = {"r1": "none/avg", "r2": "none/avg"}


def with_exits(carry: float = 0.0) -> Graph:
    insert = make(
        "insert_exits", sites=[*SITES], heads=SITES, thresholds=dict.fromkeys(SITES, 0.5), untrained=True, carry=carry
    )
    return insert(graph_of(CHAIN)).graph


def costs(trunk: Mapping[str, float], head0: float, head1: float):  # type: ignore[no-untyped-def]
    """Node costs: given per trunk node, and for the heads as wholes."""

    def of(graph: Graph) -> dict[str, float]:
        found = dict(trunk)
        for nodes, cost in zip(head_nodes(graph), (head0, head1), strict=False):
            found[sorted(nodes)[0]] = cost
        return found

    return of


# conv1 lies before exit 0, conv2 between the exits, conv3 behind exit 1
TRUNK = {"conv1": 10.0, "conv2": 20.0, "conv3": 30.0}

CASES = {
    # exit 1: 0.2 * 30 = 6 against 0.5 * 4 = 2; exit 0: 0.5 * (20 + 4 + 30) = 27 against 1 * 10
    "both pay": ((0.5, 0.2, 0.3), 10.0, 4.0, ["r1", "r2"]),
    # exit 1: 0.05 * 30 = 1.5 against 0.5 * 4 = 2
    "the second does not": ((0.5, 0.05, 0.45), 10.0, 4.0, ["r1"]),
    # exit 1: 0.1 * 30 = 3 against 0.5 * 4 = 2, though not against 4: the other half never gets there
    "the second is reached by half": ((0.5, 0.1, 0.4), 10.0, 4.0, ["r1", "r2"]),
    # exit 0: 0.1 * 54 = 5.4 against 10
    "the first does not": ((0.1, 0.6, 0.3), 10.0, 4.0, ["r2"]),
    # exit 1 goes (0.01 * 30 < 0.8 * 40), so exit 0 saves only 50: 0.2 * 50 = 10 < 11, with exit 1 it would be 18
    "the second takes the first along": ((0.2, 0.01, 0.79), 11.0, 40.0, []),
    "nobody leaves at the second": ((0.5, 0.0, 0.5), 10.0, 0.0, ["r1"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_sum_decides(case: str) -> None:
    rates, head0, head1, kept = CASES[case]
    graph = with_exits()
    context = PassContext(exit_rates=rates, node_costs=costs(TRUNK, head0, head1))
    result = make("drop_idle_exits")(graph, context)
    assert [item.site for item in result.graph.exits] == kept
    assert result.changed == (len(kept) < 2)
    assert len(result.skipped) + len(result.notes) == 2, "every exit has a reason"
    feeds_kept = [graph.final, *(item.logits for item in result.graph.exits)]
    assert list(run(result.graph)) == feeds_kept
    if not kept:
        assert result.graph.digest == graph_of(CHAIN).digest, "the trunk again"


def test_mean_cost_never_rises_when_the_rest_runs_to_the_end() -> None:
    graph = with_exits()
    model = make_cost("macs")
    for rates in ((0.02, 0.9, 0.08), (0.9, 0.01, 0.09), (0.01, 0.01, 0.98)):
        after = make("drop_idle_exits")(graph, PassContext(exit_rates=rates)).graph
        kept = {item.site for item in after.exits}
        moved = [rate for rate, item in zip(rates, graph.exits, strict=False) if item.site in kept]
        moved.append(1.0 - sum(moved))
        before = sum(rate * cost for rate, cost in zip(rates, exit_costs(graph, model), strict=True))
        assert sum(rate * cost for rate, cost in zip(moved, exit_costs(after, model), strict=True)) <= before + 1e-9


def test_exits_that_later_ones_build_on_stay() -> None:
    graph = with_exits(carry=0.5)
    result = make("drop_idle_exits")(graph, PassContext(exit_rates=(0.0, 0.0, 1.0)))
    assert not result.changed
    assert {skip.why for skip in result.skipped} == {"later exits build on what it says (carry, stick)"}


def test_what_is_not_known_is_said() -> None:
    with pytest.raises(PassError, match="is not known"):
        make("drop_idle_exits")(with_exits())
    with pytest.raises(PassError, match="2 exit rates for 2 exits"):
        make("drop_idle_exits")(with_exits(), PassContext(exit_rates=(0.5, 0.5)))
    trunk = graph_of(CHAIN)
    result = make("drop_idle_exits")(trunk)
    assert result.graph is trunk
    assert result.skipped[0].why == "it has no exits"


def test_the_rest_gives_the_same_scores() -> None:
    graph = with_exits()
    after = make("drop_idle_exits")(graph, PassContext(exit_rates=(0.0, 0.5, 0.5))).graph
    before = run(graph)
    for name, values in run(after).items():
        assert (values == before[name]).all()
