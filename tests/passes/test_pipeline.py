"""Pipelines, requires and ensures, instruments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from eexform.errors import PassError, need
from eexform.frontends.onnx import load
from eexform.ir.graph import Graph
from eexform.passes import (
    DumpGraphs,
    Pass,
    PassContext,
    PassResult,
    Pipeline,
    Skip,
    Timing,
    WellFormed,
    instruments,
    make,
)
from tests.passes.helpers import CHAIN, graph_of


@dataclass(frozen=True)
class Rename(Pass):
    """Rename the last node."""

    name: ClassVar[str] = "rename"

    to: str = "renamed"
    broken: str = ""

    def requires(self, graph: Graph) -> None:
        need(self.to, "a node needs a name")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        after = graph.copy()
        if self.broken == "input":
            graph.nodes[-1].name = self.to
            return PassResult(graph, changed=False)
        if self.broken == "order":
            after.gs.nodes.reverse()
        after.nodes[-1].name = self.to
        if self.broken == "silent":
            return PassResult(after, changed=False)
        if self.broken == "boastful":
            return PassResult(graph.copy(), changed=True)
        return PassResult(after, changed=True, skipped=(Skip("others", "only the last"),), notes=("renamed",))

    def ensures(self, graph: Graph) -> None:
        need(self.broken != "promise", "the promise is broken")


def test_a_pipeline_is_a_pass_and_its_parts_are_watched() -> None:
    graph, timing = graph_of(CHAIN), Timing()
    with instruments(timing):
        result = Pipeline([Rename("one"), Pipeline([make("remove_dead"), Rename("two")])])(graph)
    assert result.changed
    assert result.graph.nodes[-1].name == "two"
    assert [(record.name, record.changed) for record in timing.records] == [
        ("rename", True), ("remove_dead", False), ("rename", True),
    ]  # fmt: skip
    assert result.skipped[0] == Skip("rename: others", "only the last")
    assert result.notes == ("rename: renamed", "pipeline: rename: renamed")
    assert graph.nodes[-1].name == "fc"


def test_requires_and_ensures_are_checked_and_the_place_is_named() -> None:
    with pytest.raises(PassError, match=r"pass 'rename' \(after remove_dead, rename\): a node needs a name"):
        Pipeline([make("remove_dead"), Rename(), Rename("")])(graph_of(CHAIN))
    with pytest.raises(PassError, match=r"pass 'rename' \(the first pass\): the promise is broken"):
        Pipeline([Rename(broken="promise")])(graph_of(CHAIN))


@pytest.mark.malformed
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("input", "changed its input graph in place"),
        ("order", "not well formed: .* not in order"),
        ("silent", "says changed=False, but the digest differs"),
        ("boastful", "says changed=True, but the digest is the same"),
    ],
)
def test_the_well_formedness_check_finds(broken: str, message: str) -> None:
    with instruments(WellFormed()), pytest.raises(PassError, match=message):
        Rename(broken=broken)(graph_of(CHAIN))
    Rename(broken=broken)(graph_of(CHAIN))  # nobody looks


def test_the_fixture_watches_every_test() -> None:
    with pytest.raises(PassError, match="not well formed"):
        Rename(broken="order")(graph_of(CHAIN))


def test_dumped_graphs_can_be_read(tmp_path: Path) -> None:
    with instruments(DumpGraphs(tmp_path / "dump")):
        result = Pipeline([make("remove_dead"), Rename("one"), Rename("two")])(graph_of(CHAIN))
    names = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert names == ["00-input.onnx", "02-rename.onnx", "03-rename.onnx"]
    assert load(tmp_path / "dump" / "03-rename.onnx").digest == result.graph.digest


def test_exit_rates_are_forgotten_when_the_exits_change() -> None:
    sites = {"r1": "none/avg", "r2": "none/avg"}
    insert = make("insert_exits", sites=[*sites], heads=sites, thresholds=dict.fromkeys(sites, 0.5), untrained=True)
    drop = make("drop_idle_exits")
    context = PassContext(exit_rates=(0.5, 0.0, 0.5))
    result = Pipeline([insert, drop])(graph_of(CHAIN), context)
    assert [item.site for item in result.graph.exits] == ["r1"]
    with pytest.raises(PassError, match="is not known"):
        Pipeline([insert, drop, drop])(graph_of(CHAIN), context)
