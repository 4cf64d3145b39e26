"""Measuring what an exit costs beside its head: a real stretch of the network with one small exit, lowered and not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx_graphsurgeon as gs

from eexform.backends import ort
from eexform.backends.lower_if import EXIT_INDEX, THRESHOLDS, lower_if
from eexform.backends.lower_multi import lower_multi
from eexform.cost_models._timing import Call, difference, interleaved
from eexform.errors import GraphError, ModelError
from eexform.heads import HeadSpec, head_graph
from eexform.ir.exits import Exit
from eexform.ir.extract import extract, graft
from eexform.ir.flow import WIDEST
from eexform.ir.graph import BATCH, Graph
from eexform.ir.sites import Site, SiteReport, find_sites

HEADS = {"spatial": "none/avg", "sequence": "none/mean", "flat": "none/avg"}
"""The smallest head of each kind of site."""

_TRUNKS: WeakKeyDictionary[Graph, Graph] = WeakKeyDictionary()
_REPORTS: WeakKeyDictionary[Graph, SiteReport] = WeakKeyDictionary()


@dataclass(frozen=True)
class ExitTimes:
    """Milliseconds per call of a network with one exit.

    Attributes:
        decision: what leaving takes longer in the lowered file than the same nodes without control flow.
        onward: what going on takes longer than the whole network, exit included, without control flow; ``decision``
            not counted again.
        early: the nodes up to the exit's scores.
        whole: all nodes.
    """

    decision: float
    onward: float
    early: float
    whole: float


def time_exit(
    graph: Graph,
    feeds: Mapping[str, np.ndarray],
    *,
    threads: int,
    repeats: int,
    warmup: int,
    providers: tuple[str, ...],
) -> ExitTimes:
    """Time a graph with one exit, every sample leaving there and every sample going on, beside its plain parts.

    Each figure is a median of differences in one loop; caches are hot. None is below 0.

    Raises:
        EexformError: it cannot be lowered, or onnxruntime does not run it.
    """
    (leaving,) = graph.exits
    lowered = ort.session(lower_if(graph, thresholds_as_input=True), threads=threads, providers=providers)
    early = ort.session(extract(graph, graph.inputs, leaving.values), threads=threads, providers=providers)
    whole = ort.session(lower_multi(graph), threads=threads, providers=providers)
    calls = [
        forced_call(lowered, feeds, exits=1, place=0),
        forced_call(lowered, feeds, exits=1, place=1),
        plain_call(early, feeds),
        plain_call(whole, feeds),
    ]
    times = interleaved(calls, repeats=repeats, warmup=warmup)
    decision = max(0.0, difference(times, 0, 2))
    onward = max(0.0, difference(times, 1, 3) - decision)
    return ExitTimes(decision, onward, float(np.median(times[:, 2])), float(np.median(times[:, 3])))


def plain_call(session: ort.onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]) -> Call:
    """A call that computes every output; tried once.

    Raises:
        ModelError: onnxruntime fails.
    """
    ort.run(session, feeds)
    given = dict(feeds)
    return lambda: session.run(None, given)


def forced_call(
    session: ort.onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray], *, exits: int, place: int
) -> Call:
    """A call of a lowered network (thresholds as input) in which every sample leaves at exit ``place``; tried once.

    Args:
        session: of the lowered network.
        feeds: its other inputs.
        exits: how many it has.
        place: 0 for the first; ``exits`` for the final one.

    Raises:
        ModelError: onnxruntime fails, or samples leave elsewhere.
    """
    thresholds = np.full(exits, np.inf, dtype=np.float32)
    thresholds[place:] = -np.inf
    given = {**feeds, THRESHOLDS: thresholds}
    left = ort.run(session, given, [EXIT_INDEX])[EXIT_INDEX]
    if not (left == place).all():
        raise ModelError(
            f"the lowered network was to leave at exit {place} of {exits} and left at {sorted(set(left.tolist()))}: a "
            "confidence on random inputs is not a number, so this path cannot be timed"
        )
    return lambda: session.run(None, given)


# -- the network around a site ----------------------------------------------------------------------------------------


def trunk_of(graph: Graph) -> Graph:
    """The graph without its exits; cut out once per graph."""
    if not graph.exits:
        return graph
    if graph not in _TRUNKS:
        _TRUNKS[graph] = extract(graph, graph.inputs, [graph.final])
    return _TRUNKS[graph]


def sites_of(trunk: Graph) -> SiteReport:
    """Every site of a trunk, however much has to be carried; found once per graph."""
    if trunk not in _REPORTS:
        _REPORTS[trunk] = find_sites(trunk, max_live=WIDEST)
    return _REPORTS[trunk]


def with_exit(trunk: Graph, site: Site, classes: int) -> Graph:
    """A trunk with one exit at ``site``: the smallest head that there is.

    Raises:
        EexformError: no head fits.
    """
    draft, scores = _planted(trunk, site, classes, "exit0.")
    draft.outputs = [draft.outputs[0], scores]
    return trunk.replace(draft, exits=[Exit(site.value, HEADS[site.kind], scores.name)])


def probe(trunk: Graph, value: str, classes: int) -> tuple[Graph, str]:
    """The part of a trunk around a site with an exit there, for :func:`time_exit`, and in words which part it is.

    From the nearest cut point before the site to the nearest behind it, because the less is timed, the surer are the
    differences. What enters passes a convolution first where it has channels in front: an activation that comes out of
    a convolution lies in blocks of channels, an input of a network does not, and routing costs what changes that.

    Raises:
        EexformError: there is no such site, or no exit can be attached there.
    """
    report, flow = sites_of(trunk), trunk.flow
    site = report.site(value)
    needs = flow.ancestors([value])
    cuts = [(cut, flow.ancestors([cut.value])) for cut in report.sites if cut.cuts and cut.value != value]
    start = max((pair for pair in cuts if pair[1] < needs), key=lambda pair: len(pair[1]), default=None)
    end = min((pair for pair in cuts if pair[1] > needs), key=lambda pair: len(pair[1]), default=None)
    inputs = trunk.inputs if start is None else (start[0].value,)
    part = extract(trunk, inputs, [trunk.final if end is None else end[0].value])
    if end is not None:
        draft, scores = _planted(part, end[0], classes, "tail.")
        draft.outputs = [scores]
        part = part.replace(draft)
    if start is not None and start[0].kind == "spatial" and start[0].channel_axis == 1:
        part = _behind_a_convolution(part, start[0])
    where = [
        f"from {start[0].value!r}" if start else "from the inputs",
        f"to {end[0].value!r}" if end else "to the end",
    ]
    return with_exit(part, site, classes), f"the network {' '.join(where)} with an exit at {value!r}"


def _planted(trunk: Graph, site: Site, classes: int, prefix: str) -> tuple[gs.Graph, gs.Variable]:
    """A draft of the trunk with the smallest head at a site, and the head's scores; not yet an output."""
    spec = HeadSpec.parse(HEADS[site.kind])
    head = head_graph(spec, site, num_classes=classes, scores=trunk.scores, opset=trunk.opset)
    copied = trunk.copy()
    planted = graft(copied.gs, head, feeds={head.inputs[0]: copied.tensor(site.value)}, prefix=prefix)
    return copied.gs, planted[head.final]


def _behind_a_convolution(part: Graph, start: Site) -> Graph:
    """``part`` with its only input computed by a convolution 1x1 (and an activation) from a new one of its shape."""
    copied = part.copy()
    draft = copied.gs
    (value,) = draft.inputs
    channels, space = start.channels, len(start.shape) - 1
    weight = np.random.default_rng(0).standard_normal((channels, channels, *(1,) * space)) / np.sqrt(channels)
    names = [f"{value.name}.{kind}" for kind in ("given", "weight", "mixed")]
    taken = [name for name in names if name in part.tensors]
    if taken:
        raise GraphError(f"the graph has a value called {taken[0]!r} already; rename it in the model")
    given = gs.Variable(names[0], dtype=value.dtype, shape=[BATCH, *start.shape])
    mixed = gs.Variable(names[2])
    constant = gs.Constant(names[1], weight.astype(np.float32))
    draft.nodes.insert(0, gs.Node("Relu", names[2] + ".relu", inputs=[mixed], outputs=[value]))
    draft.nodes.insert(0, gs.Node("Conv", names[2] + ".conv", inputs=[given, constant], outputs=[mixed]))
    draft.inputs = [given]
    return part.replace(draft)


def branch_share(
    trunk: Graph,
    feeds: Callable[[Graph], Mapping[str, np.ndarray]],
    *,
    threads: int,
    repeats: int,
    warmup: int,
    providers: tuple[str, ...],
) -> tuple[float, str]:
    """By which share the trunk runs slower inside a branch, beyond what routing costs right behind an exit.

    The rest of a network that stands inside a branch is optimised apart from what precedes it: a chain of residual
    sums, say, whose first summand came in from outside, is kept out of the layout that convolutions work in. Measured
    with one exit at the first cut point: what going on costs more in the whole network than in the stretch around that
    point, over the time of the nodes behind it.

    Args:
        trunk: a graph without exits.
        feeds: gives inputs for a graph.
        threads: of onnxruntime.
        repeats: timed rounds.
        warmup: calls before them.
        providers: of onnxruntime.

    Returns:
        The share, at least 0, and in words where it was measured. 0 where the trunk has no cut point.
    """
    cut = next((site for site in sites_of(trunk).sites if site.cuts), None)
    if cut is None:
        return 0.0, "the network has no cut point"
    settings: dict[str, Any] = {"threads": threads, "repeats": repeats, "warmup": warmup, "providers": providers}
    near, _ = probe(trunk, cut.value, trunk.num_classes)
    whole = with_exit(trunk, cut, trunk.num_classes)
    local, full = (time_exit(network, feeds(network), **settings) for network in (near, whole))
    rest = full.whole - full.early
    return max(0.0, full.onward - local.onward) / rest if rest > 0 else 0.0, f"with an exit at {cut.value!r}"
