"""A pass as a third party might write it: it changes the trunk, and how is for a search to choose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest

from eexform import plugins
from eexform.ir.graph import Graph
from eexform.passes import Pass, PassContext, PassResult, Skip
from eexform.tunables import Choice, tunable


@dataclass(frozen=True)
class DropBlock(Pass):
    """Take the last block out of the tiny network: fewer multiply-accumulates, other answers."""

    name: ClassVar[str] = "drop_block"

    count: int = tunable(Choice((0, 1)), default=0, help="blocks that go")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        if not self.count:
            return PassResult(graph, changed=False, skipped=(Skip("graph", "no block is to go"),))
        draft = graph.copy().gs
        last = [node for node in draft.nodes if node.op == "Relu"][-2:]
        pool = next(node for node in draft.nodes if node.op == "GlobalAveragePool")
        pool.inputs = [last[0].outputs[0]]
        draft.cleanup()
        return PassResult(graph.replace(draft), changed=True, notes=("dropped the last block",))


@dataclass(frozen=True)
class Undecided(Pass):
    """Drops blocks too, but has no default, and draws from the context's seed what it calls its nodes."""

    name: ClassVar[str] = "undecided"

    count: int = tunable(Choice((1,)), help="blocks that go")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        result = DropBlock(self.count).run(graph, context)
        draft = result.graph.copy().gs
        draft.nodes[0].name = f"first.{context.seed}"
        return PassResult(result.graph.replace(draft), changed=True)


@contextmanager
def registered(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The passes among the registered ones, as if a distribution had brought them."""
    found = plugins._points
    group = "eexform.passes"
    extra = {cls.name: EntryPoint(cls.name, f"{__name__}:{cls.__name__}", group) for cls in (DropBlock, Undecided)}
    with patch.context() as inside:
        inside.setattr(plugins, "_points", lambda asked: {**found(asked), **(extra if asked == group else {})})
        yield
