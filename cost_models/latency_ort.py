"""Time in onnxruntime on this machine."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from scipy.optimize import nnls

from eexform.backends import ort
from eexform.backends.lower_if import lower_if
from eexform.cost_models import _probe
from eexform.cost_models._contract import Cost, CostModel, Crossing, Routing
from eexform.cost_models._routing import idle_network, stand_in
from eexform.cost_models._timing import (
    FIGURES,
    STATES,
    Call,
    Figure,
    State,
    evicted_bytes,
    interleaved,
    levels,
    machine,
    measurement_key,
    random_feeds,
    remembered,
    stored,
    summary,
)
from eexform.errors import EexformError, OptionError, need, suggest
from eexform.ir.extract import extract
from eexform.ir.graph import Graph
from eexform.ir.serialize import weight_bytes
from eexform.tunables import parameter

_WHATS = ("segments", "file", "both")
_HELD_BYTES = 1 << 30
"""Parameters of the sessions that are open at once, of which onnxruntime holds about two copies."""


@dataclass(frozen=True)
class MeasuredRouting(Routing):
    """Routing, and how it was obtained: ``measured_on`` says on what; where that is a stand-in, ``reason`` says why."""

    conditions: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class PathTimes:
    """What a sample takes that leaves at exit i, the final exit last, in milliseconds.

    Attributes:
        file: the lowered file, every sample sent to that exit.
        segments: the same nodes without control flow, timed in the same loop.
        scale: by which ``segments`` is multiplied in :attr:`corrected`.
        routing: per exit that is reached, added there.
        conditions: how it was measured.
    """

    file: tuple[float, ...]
    segments: tuple[float, ...]
    scale: float
    routing: float
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def corrected(self) -> tuple[float, ...]:
        """``segments`` with the level and the routing of the file, which two numbers say for all exits."""
        last = len(self.segments) - 1
        return tuple(self.scale * t + self.routing * min(i + 1, last) for i, t in enumerate(self.segments))


@dataclass(frozen=True)
class LatencyOrt(CostModel):
    """Measured time per sample in onnxruntime on this machine.

    A graph is timed as a session of its own, on random inputs. Segments are differences of such times, so graphs whose
    costs are asked for together are timed in one loop, in turns, and the differences are medians of what one took
    longer than the other in the same round. With ``what=file`` a graph with exits is lowered to the form ``if`` and
    timed as it will run, all samples sent to each exit in turn; with ``what=both`` the segments are timed as well, and
    scale and routing are fitted to the file. A search needs the costs of segments and takes those in any case.

    ``state=cold``: caches are emptied before each timed call; routing is measured with hot caches nevertheless.
    """

    name: ClassVar[str] = "latency_ort"
    unit: ClassVar[str] = "ms"
    additive: ClassVar[bool] = False
    measured: ClassVar[bool] = True

    threads: int = parameter(default=1, help="intra-op threads")
    batch: int = parameter(default=1, help="samples per call; figures are per sample")
    repeats: int = parameter(default=30, help="timed calls")
    warmup: int = parameter(default=5, help="calls before the first timed one")
    cache: str = parameter(default="", help="folder that keeps measurements by graph, machine and settings")
    bindings: Mapping[str, int] = parameter(default={}, help="sizes of symbolic dimensions other than the batch")
    providers: str | tuple[str, ...] = parameter(
        default="CPUExecutionProvider",
        help="execution providers in order of preference: a list, or text with commas (on the command line: +) between",
    )
    figure: str = parameter(default="median", help="of the timed calls: median, mean, p95 or min")
    state: str = parameter(default="hot", help="of the caches before each timed call: hot or cold")
    what: str = parameter(default="segments", help="what is timed of a graph with exits: segments, file or both")

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("batch", 1), ("repeats", 1), ("warmup", 0)):
            value = getattr(self, name)
            need(value >= least, f"{name}: {value} is less than {least}", OptionError)
        for name, choices in (("figure", FIGURES), ("state", STATES), ("what", _WHATS)):
            value = getattr(self, name)
            need(value in choices, f"{name}: {value!r} is not a choice: {suggest(str(value), choices)}", OptionError)
        object.__setattr__(self, "providers", "+".join(_available(self.providers)))

    def cost(self, graph: Graph) -> Cost:
        return self.costs([graph])[0]

    def costs(self, graphs: Sequence[Graph]) -> list[Cost]:
        """Time of each graph, all measured in one loop; graphs that are the same are timed once."""
        digests = list(dict.fromkeys(graph.digest for graph in graphs))
        different = {graph.digest: graph for graph in graphs}
        found = self._stored(
            "costs", digests, lambda: self._measure([different[digest] for digest in digests]), ["figures", "calls"]
        )
        by_digest = {
            digest: Cost(figure / self.batch, conditions={**found["conditions"], **call})
            for digest, figure, call in zip(digests, found["figures"], found["calls"], strict=True)
        }
        return [by_digest[graph.digest] for graph in graphs]

    def overhead(self) -> float:
        """The time of one call of a network that does nothing, per sample."""
        idle = idle_network()
        found = self._remembered("overhead", [idle.digest], lambda: self._measure([idle]), ["figures"])
        return float(found["figures"][0]) / self.batch

    def paths(self, graph: Graph) -> tuple[float, ...] | None:
        """What a sample takes that leaves at exit i, the final exit last: of the lowered file, or (``what=both``)
        segments corrected by it; ``None`` where segments alone are wanted.

        Raises:
            EexformError: the graph cannot be lowered to the form ``if``, or onnxruntime does not run it.
        """
        if self.what == "segments" or not graph.exits:
            return None
        times = self.path_times(graph)
        return times.file if self.what == "file" else times.corrected

    def path_times(self, graph: Graph) -> PathTimes:
        """The lowered file and its segments, timed in one loop, whatever ``what`` says.

        Raises:
            EexformError: as for :meth:`paths`.
        """
        found = self._stored("paths", [graph.digest], lambda: self._measure_paths(graph), ["file", "segments"])
        file, segments = (tuple(time / self.batch for time in found[name]) for name in ("file", "segments"))
        return PathTimes(file, segments, *_corrected(file, segments), conditions=found["conditions"])

    def routing(self, graph: Graph, crossing: Crossing) -> MeasuredRouting:
        """What an exit at the crossing costs beside its head: the stretch of the network around it, with the smallest
        head, is lowered and timed beside the same nodes without control flow. A stand-in that carries a value of the
        site's shape takes its place where that is not possible; ``conditions`` say so, and why."""
        trunk = _probe.trunk_of(graph)
        found = self._remembered(
            "routing",
            [trunk.digest],
            lambda: self._measure_routing(trunk, crossing),
            ["decision_ms", "onward_ms"],
            crossing=[crossing.site, list(crossing.value.shape), crossing.classes],
        )
        return MeasuredRouting(
            found["decision_ms"] / self.batch, found["onward_ms"] / self.batch, conditions=found["conditions"]
        )

    def branch_share(self, graph: Graph) -> float:
        """By which share the trunk behind the first exit takes longer for standing inside a branch, beyond what
        :meth:`routing` says of each exit (see :func:`eexform.cost_models._probe.branch_share`)."""

        def measure() -> dict[str, Any]:
            share, where = _probe.branch_share(trunk, self._feeds, **self._timing())
            return {"share": share, "conditions": {**self._conditions(), "state": "hot", "measured_on": where}}

        trunk = _probe.trunk_of(graph)
        return float(self._remembered("branch share", [trunk.digest], measure, ["share"])["share"])

    def channel_block(self) -> int | None:
        """Channels in one block of the layout in which onnxruntime computes convolutions on this processor."""
        return _channel_block() if self.providers == "CPUExecutionProvider" else None

    # -- measuring ----------------------------------------------------------------------------------------------------

    def _measure(self, graphs: Sequence[Graph]) -> dict[str, Any]:
        """Milliseconds per call. Where the sessions would hold too much, the graphs are timed in several loops; the
        last graph of each is timed in the next one again, and the latter's figures are scaled so that both agree."""
        groups, held = [[graphs[0]]], weight_bytes(graphs[0])
        for graph in graphs[1:]:
            size = weight_bytes(graph)
            if held + size > _HELD_BYTES:
                groups.append([groups[-1][-1]])
                held = weight_bytes(groups[-1][0])
            groups[-1].append(graph)
            held += size
        figures: list[float] = []
        calls: list[dict[str, float]] = []
        for place, group in enumerate(groups):
            found = self._interleaved([self._call(graph) for graph in group])
            now = levels(found, cast(Figure, self.figure))
            scale = figures[-1] / now[0] if place else 1.0
            figures += [float(value) * scale for value in now[min(place, 1) :]]
            calls += [summary(column) for column in found.T[min(place, 1) :]]
        side_by_side = {"side_by_side": max(map(len, groups))}
        return {"figures": figures, "calls": calls, "conditions": {**self._conditions(), **side_by_side}}

    def _measure_paths(self, graph: Graph) -> dict[str, Any]:
        feeds = self._feeds(graph)
        lowered = self._session(lower_if(graph, thresholds_as_input=True))
        exits = len(graph.exits)
        calls = [_probe.forced_call(lowered, feeds, exits=exits, place=place) for place in range(exits + 1)]
        needed = [value for item in graph.exits for value in item.values]
        ends = [sum(len(item.values) for item in graph.exits[: place + 1]) for place in range(exits)]
        parts = [extract(graph, graph.inputs, needed[:end]) for end in ends]
        calls += [_probe.plain_call(self._session(part), feeds) for part in (*parts, graph)]
        times = self._interleaved(calls)
        figures = [float(value) for value in levels(times, cast(Figure, self.figure))]
        return {
            "file": figures[: exits + 1],
            "segments": figures[exits + 1 :],
            "conditions": {**self._conditions(), "calls": [summary(column) for column in times.T[: exits + 1]]},
        }

    def _measure_routing(self, trunk: Graph, crossing: Crossing) -> dict[str, Any]:
        reason = {}
        try:
            network, words = _probe.probe(trunk, crossing.site, crossing.classes)
            times = _probe.time_exit(network, self._feeds(network), **self._timing())
        except EexformError as error:
            reason = {"reason": str(error)}
            shape = crossing.value.shape or (1,)
            network, words = stand_in(crossing.classes, shape), f"a stand-in with an exit at a value {list(shape)}"
            times = _probe.time_exit(network, self._feeds(network), **self._timing())
        conditions = {**self._conditions(), "state": "hot", "figure": "median", "measured_on": words, **reason}
        return {"decision_ms": times.decision, "onward_ms": times.onward, "conditions": conditions}

    def _session(self, model: Graph | onnx.ModelProto) -> Any:
        return ort.session(model, threads=self.threads, providers=self._providers)

    def _feeds(self, graph: Graph) -> dict[str, np.ndarray]:
        return random_feeds(graph, self.batch, self.bindings)

    def _call(self, graph: Graph) -> Call:
        return _probe.plain_call(self._session(graph), self._feeds(graph))

    def _interleaved(self, calls: Sequence[Call]) -> np.ndarray:
        return interleaved(calls, repeats=self.repeats, warmup=self.warmup, state=cast(State, self.state))

    @property
    def _providers(self) -> tuple[str, ...]:
        return tuple(str(self.providers).split("+"))

    def _timing(self) -> dict[str, Any]:
        settings = {name: getattr(self, name) for name in ("threads", "repeats", "warmup")}
        return {**settings, "providers": self._providers}

    def _conditions(self) -> dict[str, Any]:
        cold = {"evicted_mib": evicted_bytes() >> 20} if self.state == "cold" else {}
        settings = {name: getattr(self, name) for name in ("threads", "batch", "repeats", "warmup", "figure", "state")}
        return {**settings, "providers": list(self._providers), **cold, **machine()}

    def _key(self, what: str, digests: Sequence[str], **more: Any) -> str:
        settings = {**self._conditions(), "bindings": sorted(self.bindings.items()), **more}
        return measurement_key(what, digests, settings)

    def _stored(
        self, what: str, digests: Sequence[str], measure: Callable[[], dict[str, Any]], needs: Sequence[str]
    ) -> dict[str, Any]:
        return stored(self.cache, self._key(what, digests), measure, needs)

    def _remembered(
        self,
        what: str,
        digests: Sequence[str],
        measure: Callable[[], dict[str, Any]],
        needs: Sequence[str],
        **more: Any,
    ) -> dict[str, Any]:
        return remembered(self.cache, self._key(what, digests, **more), measure, needs)


def _available(given: str | Sequence[str]) -> tuple[str, ...]:
    """Providers as onnxruntime calls them; ``CPU`` stands for ``CPUExecutionProvider``.

    Raises:
        OptionError: one that this onnxruntime does not have.
    """
    known = ort.onnxruntime.get_available_providers()
    names = given.replace("+", ",").split(",") if isinstance(given, str) else list(given)
    found = []
    for name in (str(name).strip() for name in names):
        full = name if name in known else f"{name}ExecutionProvider"
        if full not in known:
            raise OptionError(
                f"providers: this onnxruntime ({ort.onnxruntime.__version__}) has no {name!r}; it has "
                + ", ".join(known)
                + "; another build of onnxruntime may have it"
            )
        found.append(full)
    return tuple(dict.fromkeys(found))


def _corrected(file: Sequence[float], segments: Sequence[float]) -> tuple[float, float]:
    """Scale and routing per exit, both not negative, that bring ``segments`` closest to ``file``, relatively."""
    last = len(segments) - 1
    reached = [min(place + 1, last) for place in range(len(segments))]
    matrix = np.array([segments, reached], dtype=np.float64).T / np.asarray(file)[:, None]
    (scale, routing), _ = nnls(matrix, np.ones(len(segments)))
    return float(scale), float(routing)


@functools.cache
def _channel_block() -> int | None:
    """Read off what onnxruntime makes of a convolution with one output channel: it fills up the first block."""
    weight = numpy_helper.from_array(np.ones((1, 64, 1, 1), np.float32), "weight")
    shape = [1, 64, 8, 8]
    body = helper.make_graph(
        [helper.make_node("Conv", ["value", "weight"], ["found"])],
        "block",
        [helper.make_tensor_value_info("value", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("found", TensorProto.FLOAT, [1, 1, *shape[2:]])],
        [weight],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: it warns that the file is for this machine alone, which is the point
    with tempfile.TemporaryDirectory(prefix="eexform-") as folder:
        path = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(path)
        ort.onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(path)
    blocked = [node for node in optimized.graph.node if node.op_type == "Conv" and "nchwc" in node.domain]
    sizes = {found.name: list(found.dims) for found in optimized.graph.initializer}
    return next((sizes[node.input[1]][0] for node in blocked if node.input[1] in sizes), None)
