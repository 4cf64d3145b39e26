"""The reference: run the flat graph on every sample, every exit, and decide afterwards in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from eexform.backends import ort
from eexform.errors import DataError
from eexform.ir import measures
from eexform.ir.exits import Exit, Scores
from eexform.ir.graph import Graph
from eexform.ir.policy import TIE, Decisions, confidences, decide, near_ties

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Simulated:
    """Scores that every exit gave to every sample.

    Attributes:
        exits: the exits with the thresholds that count.
        kind: what the scores hold.
        exit_scores: per exit, [n, classes].
        final: [n, classes].
        learned: per exit, its learned confidence, [n]; ``None`` where it is read off the scores.
        tie: how far from a threshold rounding may change the exit.
    """

    exits: tuple[Exit, ...]
    kind: Scores
    exit_scores: tuple[np.ndarray, ...]
    final: np.ndarray
    learned: tuple[np.ndarray | None, ...] = ()
    tie: float = TIE

    def decisions(self) -> Decisions:
        """Who leaves where, and with what."""
        return decide(self.exit_scores, self.final, self.exits, self.kind, self.learned)

    def near_ties(self) -> np.ndarray:
        """[n] bool: samples whose exit rounding may change."""
        if not self.exits:
            return np.zeros(len(self.final), bool)
        return near_ties(self.exit_scores, self.exits, self.kind, self.learned, tolerance=self.tie)

    def confidences(self) -> np.ndarray:
        """[exits, n]."""
        return confidences(self.exit_scores, self.exits, self.kind, self.learned)

    def with_thresholds(self, thresholds: Sequence[float]) -> Simulated:
        """The same scores under another policy."""
        exits = tuple(replace(item, threshold=float(t)) for item, t in zip(self.exits, thresholds, strict=True))
        return replace(self, exits=exits)

    def take(self, rows: np.ndarray) -> Simulated:
        """The samples ``rows``, in that order."""
        return replace(
            self,
            exit_scores=tuple(scores[rows] for scores in self.exit_scores),
            final=self.final[rows],
            learned=tuple(row if row is None else row[rows] for row in self.learned),
        )


def simulate(graph: Graph, feeds: Feeds, *, gates: Sequence[str] = (), batch: int = 32, threads: int = 1) -> Simulated:
    """Run ``graph`` (flat, with exits as outputs) on all samples.

    Args:
        graph: a graph with exits.
        feeds: arrays by input, [n, ...].
        gates: per exit, the value that holds what its gate says (empty: none). Given, learned confidences are computed
            from them in numpy; else they are those that the graph itself computes.
        batch: samples per run.
        threads: of onnxruntime.
    """
    tapped = ort.tap(graph, [name for name in gates if name])
    session = ort.session(tapped, threads=threads)
    parts = []
    for rows in chunks(samples_in(graph, feeds), batch):
        found = ort.run(session, take(graph, feeds, rows))
        parts.append([found[name] for name in tapped.outputs])
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    whole = dict(zip(tapped.outputs, columns, strict=True))
    scores = tuple(whole[item.logits] for item in graph.exits)
    return Simulated(graph.exits, graph.scores, scores, whole[graph.final], _learned(graph.exits, whole, gates))


def _learned(
    exits: Sequence[Exit], values: Mapping[str, np.ndarray], gates: Sequence[str]
) -> tuple[np.ndarray | None, ...]:
    """Per exit its learned confidence: what the gates say, by the exits' measures, or the value in the graph."""
    if not gates:
        return tuple(values[item.confidence] if item.confidence else None for item in exits)
    found: list[np.ndarray | None] = []
    for item, gate in zip(exits, gates, strict=True):
        before = found[-1] if found else None
        found.append(measures.get_gate(item.measure).step(before, values[gate]) if gate else None)
    return tuple(found)


def samples_in(graph: Graph, feeds: Feeds) -> int:
    """Number of samples in ``feeds``.

    Raises:
        DataError: inputs are missing, empty, or differ in their number of samples.
    """
    missing = [name for name in graph.inputs if name not in feeds]
    if missing:
        raise DataError(f"the network's inputs are {list(graph.inputs)}, found {list(feeds)}")
    axes = batch_axes(graph)
    flat = [name for name, axis in axes.items() if np.ndim(feeds[name]) <= axis]
    if flat:
        raise DataError(f"the samples of {flat[0]!r} have shape {np.shape(feeds[flat[0]])}, without a batch axis")
    sizes = {name: np.shape(feeds[name])[axis] for name, axis in axes.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise DataError(f"samples per input: {sizes}; expected the same number, at least one, everywhere")
    return next(iter(sizes.values()))


def batch_axes(graph: Graph) -> dict[str, int]:
    """Batch axis of each input that has one."""
    axes = {name: graph.types[name].batch_axis for name in graph.inputs}
    return {name: axis for name, axis in axes.items() if axis is not None}


def take(graph: Graph, feeds: Feeds, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The feeds of the samples ``rows``, in that order."""
    axes = batch_axes(graph)
    return {
        name: np.take(feeds[name], rows, axis=axes[name]) if name in axes else np.asarray(feeds[name])
        for name in graph.inputs
    }


def chunks(count: int, size: int) -> list[np.ndarray]:
    """0..count-1 in pieces of ``size``, the last one smaller."""
    return [np.arange(start, min(start + size, count)) for start in range(0, count, size)]
