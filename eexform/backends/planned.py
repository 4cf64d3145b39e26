"""What torch modules are made from: graphs, and plans of a run."""

from __future__ import annotations

from typing import Protocol

from eexform.errors import ModelError
from eexform.ir.graph import Graph


class Planned(Protocol):
    """A plan of a run: what can be made into a graph."""

    def materialise(self, *, lean: bool = True) -> Graph: ...


def trainable(source: Graph | Planned, asking: str) -> Graph:
    """The graph itself, or a plan's without the passes that only make it faster.

    So normalisation can be trained, and parameters have the original's names.

    Args:
        source: a graph or a plan.
        asking: the function that was called, for the message.

    Raises:
        ModelError: it is neither.
    """
    if isinstance(source, Graph):
        return source
    if not hasattr(source, "materialise") or hasattr(source, "front"):
        raise ModelError(
            f"{asking} takes a graph (ee.load) or a plan of a run (run.front.pick), not {type(source).__name__}"
        )
    return source.materialise(lean=False)
