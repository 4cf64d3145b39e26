"""Instruments: what watches passes at work without the passes knowing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from eexform.errors import EexformError, PassError, need
from eexform.ir.graph import Graph

if TYPE_CHECKING:
    from eexform.passes._contract import Pass, PassResult


class Instrument:
    """Watches every pass that runs inside :func:`instruments`; sub-classes override what they need."""

    def before(self, step: Pass, graph: Graph) -> None:
        """Called with the input, before ``requires``."""

    def after(self, step: Pass, graph: Graph, result: PassResult) -> None:
        """Called with input and result, after ``ensures``; not called when the pass failed."""


_active: ContextVar[tuple[Instrument, ...]] = ContextVar("eexform.passes.instruments", default=())


@contextmanager
def instruments(*watchers: Instrument) -> Iterator[None]:
    """Let ``watchers`` see every pass that runs in this block, outer blocks' instruments first."""
    token = _active.set((*_active.get(), *watchers))
    try:
        yield
    finally:
        _active.reset(token)


@contextmanager
def _watching(step: Pass, graph: Graph) -> Iterator[Callable[[PassResult], None]]:
    watchers = () if step.composite else _active.get()
    for watcher in watchers:
        watcher.before(step, graph)

    def report(result: PassResult) -> None:
        for watcher in reversed(watchers):
            watcher.after(step, graph, result)

    yield report


def watching(step: Pass, graph: Graph) -> AbstractContextManager[Callable[[PassResult], None]]:
    """Announce ``step`` to the active instruments; yields the function that hands them its result."""
    return _watching(step, graph)


@dataclass(frozen=True)
class Timed:
    """One pass that ran."""

    name: str
    seconds: float
    changed: bool


class Timing(Instrument):
    """Records how long every pass took.

    Attributes:
        records: one entry per pass, in the order in which they ended.
    """

    def __init__(self) -> None:
        self.records: list[Timed] = []
        self._started: list[float] = []

    def before(self, step: Pass, graph: Graph) -> None:
        self._started.append(time.perf_counter())

    def after(self, step: Pass, graph: Graph, result: PassResult) -> None:
        self.records.append(Timed(step.name, time.perf_counter() - self._started.pop(), result.changed))


class DumpGraphs(Instrument):
    """Saves the graph before the first pass and after every pass, numbered, for reading what each one did.

    Files are ``00-input.onnx``, ``01-fold_batch_norm.onnx``, ...; a pass that changed nothing leaves a number out.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.number = 0

    def before(self, step: Pass, graph: Graph) -> None:
        if self.number == 0:
            self._save(graph, "00-input.onnx")

    def after(self, step: Pass, graph: Graph, result: PassResult) -> None:
        self.number += 1
        if result.changed:
            self._save(result.graph, f"{self.number:02d}-{step.name}.onnx")

    def _save(self, graph: Graph, name: str) -> None:
        from eexform.frontends.onnx import save

        save(graph, self.folder / name)


class WellFormed(Instrument):
    """Checks that every pass returns a well-formed graph, leaves its input as it was, and says truly what changed."""

    def __init__(self) -> None:
        self._digests: list[str] = []

    def before(self, step: Pass, graph: Graph) -> None:
        from eexform.ir.digest import digest

        # Not the cached one: an input that was edited in place keeps its cached digest.
        self._digests.append(digest(graph))

    def after(self, step: Pass, graph: Graph, result: PassResult) -> None:
        from eexform.ir.checks import check
        from eexform.ir.digest import digest

        was = self._digests.pop()
        need(digest(graph) == was, f"pass {step.name!r} changed its input graph in place; work on graph.copy()")
        if result.graph is graph:
            need(not result.changed, f"pass {step.name!r} says that it changed the graph but returned its input")
            return
        if not result.graph.metadata.get("eexform.form"):  # a lowered graph is no longer a plain classifier with exits
            try:
                check(result.graph)
            except EexformError as error:
                raise PassError(f"pass {step.name!r} returned a graph that is not well formed: {error}") from error
        differs = digest(result.graph) != was
        need(
            differs == result.changed,
            f"pass {step.name!r} says changed={result.changed}, but the digest "
            + ("differs" if differs else "is the same as before"),
        )
