"""Measuring a machine: kernel times, the cost of a call, routing, and the figures of a device file fitted to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from eexform.backends import ort
from eexform.cost_models._fit import fit, onto_kernels
from eexform.cost_models._grid import Key, Plan, planned
from eexform.cost_models._interpolate import Entry, Lookup
from eexform.cost_models._kernels import Kernel
from eexform.cost_models._measure_kernels import Probe, Timing, measure, per_copy_us, seconds, summarised
from eexform.cost_models._ort_kernels import executions
from eexform.cost_models._prices import Prices, Residual, surcharges
from eexform.cost_models._routing import idle_network, measure_routing
from eexform.cost_models._table_file import FORMAT, Row, read_table
from eexform.cost_models._timing import machine, random_feeds
from eexform.errors import OptionError, RunError, need
from eexform.files import write_json
from eexform.ir.emit import Emitter
from eexform.ir.graph import BATCH, Graph
from eexform.progress import Progress, Silent

REPEATS = 15
_COPIES = (2, 4, 8, 16, 32, 64, 96)
_WARMUP_US = 1000.0
"""Calls of a whole model that do not count go on so long: another model has just filled the caches."""

_EXECUTES = "onnxruntime"


@dataclass(frozen=True)
class Checked:
    """A model as measured, and as the table predicts it.

    Attributes:
        model: its name.
        measured_us: one call, median.
        spread_us: distance between the quartiles.
        predicted_us: by the table that this calibration made.
        kernels: how many are executed.
    """

    model: str
    measured_us: float
    spread_us: float
    predicted_us: float
    kernels: int

    @property
    def error(self) -> float:
        """Relative, with its sign."""
        return self.predicted_us / self.measured_us - 1.0


@dataclass(frozen=True)
class Calibration:
    """What was measured on one machine.

    Attributes:
        device: plain values as in a device file (:class:`eexform.cost_models._device.Device`); empty where the models
            have too few kernels to fit them.
        runtime: machine, threads, and what the runtime takes beside kernels: ``call_us`` per call; ``between_us`` more
            per kernel of each class than when it is measured among its like; ``launch_us`` of the smallest kernel;
            ``weights``: pairs of KiB of parameters in a network, and microseconds that fetching a KiB of them takes;
            ``routing``: what exits cost.
        rows: kernel times.
        checked: the models themselves, measured beside what the table says of them.
        refused: kernels and graphs that could not be measured, and why.
        finished: ``False``: interrupted, figures but ``rows`` are missing.
    """

    device: Mapping[str, Any]
    runtime: Mapping[str, Any]
    rows: tuple[Row, ...]
    checked: tuple[Checked, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    finished: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain values, as in the file."""
        return {
            "format": FORMAT,
            "finished": self.finished,
            **({"device": dict(self.device)} if self.device else {}),
            "runtime": dict(self.runtime),
            "kernels": _EXECUTES,
            "models": [vars(item) for item in self.checked],
            "refused": [{"what": what, "why": why} for what, why in self.refused],
            "table": [row.to_json() for row in self.rows],
        }

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        write_json(path, self.to_json())


def calibrate(
    graphs: Mapping[str, Graph] | Sequence[Graph] | Graph,
    *,
    threads: int = 1,
    repeats: int = REPEATS,
    grid: bool = True,
    bindings: Mapping[str, int] | None = None,
    resume: str | Path | None = None,
    keep: Callable[[Calibration], None] = lambda _: None,
    progress: Progress | None = None,
    seed: int = 0,
) -> Calibration:
    """Measure onnxruntime on this machine's CPU, at batch 1.

    Args:
        graphs: models whose kernels are measured, by name.
        threads: of onnxruntime, inside an operator.
        repeats: rounds in which every kernel is timed.
        grid: also kernels that pruning these models and attaching heads to them would give.
        bindings: sizes of symbolic dimensions other than the batch.
        resume: a calibration, finished or not: what is in its table is not measured again, and stays in it.
        keep: called with what there is after every few kernels, so that it can be saved; ``finished`` is false.
        progress: shown.
        seed: of the grid.

    Raises:
        OptionError: no graphs, or a number that is too small.
        RunError: ``resume`` is of another machine, runtime or number of threads.
        EexformError: onnxruntime does not take a model.
    """
    listed = graphs if isinstance(graphs, Mapping) else [graphs] if isinstance(graphs, Graph) else list(graphs)
    for graph in listed.values() if isinstance(listed, Mapping) else listed:
        need(isinstance(graph, Graph), f"{graph!r} is no graph: load it with ee.load", OptionError)
    named = dict(listed) if isinstance(listed, Mapping) else {_name(g, place): g for place, g in enumerate(listed)}
    need(named, "nothing to calibrate with: give at least one model", OptionError)
    for name, value in (("threads", threads), ("repeats", repeats)):
        need(value >= 1, f"{name}: {value} is less than 1", OptionError)
    progress = progress or Silent()
    runtime: dict[str, Any] = {"name": _EXECUTES, "threads": threads, "machine": machine()}
    rows = {row.key: row for row in (_resumed(resume, runtime) if resume is not None else ())}
    plan = planned(named, grid=grid, bindings=bindings, seed=seed, progress=progress)
    missing = {key: execution for key, execution in plan.operators.items() if key not in rows}
    progress.say(_announced(plan, len(missing), seconds(missing.values(), repeats)))

    def done(timings: Mapping[Key, Timing]) -> None:
        rows.update({key: _row(key, timing) for key, timing in timings.items()})
        keep(Calibration({}, runtime, tuple(rows.values()), finished=False))

    _, refused = measure(missing, threads=threads, repeats=repeats, progress=progress, done=done)
    reasons = [*plan.refused, *((f"{key[0]} {list(key[2])}", why) for key, why in refused.items())]
    table = tuple(rows.values())
    need(table, f"none of the kernels could be measured: {reasons[0] if reasons else 'there are none'}", RunError)
    launch = min(row.us for row in table)
    lookup = Lookup([Entry(row.op, row.variant, row.sizes, row.us) for row in table], launch)
    runtime |= {
        "call_us": _call_us(threads, repeats),
        "launch_us": launch,
        "weights": _weights_curve(threads, repeats),
    }
    called = {name: [kernel for _, kernel in found] for name, found in plan.models.items()}
    whole = _whole(named, bindings, threads, repeats, progress)
    alone = Prices.of(lookup, runtime)
    runtime["between_us"] = surcharges(
        Residual(
            whole[name].us - runtime["call_us"] - alone.total_us(found),
            Counter(kernel.kind for kernel in found),
            whole[name].us,
        )
        for name, found in called.items()
    )
    prices = Prices.of(lookup, runtime)
    checked = tuple(
        Checked(name, whole[name].us, whole[name].spread_us, runtime["call_us"] + prices.total_us(found), len(found))
        for name, found in called.items()
    )
    routing = measure_routing(threads=threads, repeats=repeats, progress=progress)
    # the table prices changes of layout by the operators that make them, the roofline does not know them
    bare = measure_routing(threads=threads, repeats=repeats, layouts=False, progress=progress)
    runtime["routing"] = bare.to_json()
    device: dict[str, Any] = {}
    try:
        pairs = _pairs(named, called, prices, bindings)
        device = fit(pairs, routing=routing, call_us=runtime["call_us"], threads=threads)
    except OptionError as error:  # too few kernels: the table is of use without
        reasons.append(("the figures of a device", str(error)))
    return Calibration(device, runtime, table, checked, tuple(reasons))


def _name(graph: Graph, place: int) -> str:
    return f"{graph.gs.name or 'model'}#{place}"


def _row(key: Key, timing: Timing) -> Row:
    return Row(*key, us=timing.us, spread_us=timing.spread_us, repeats=timing.repeats)


def _announced(plan: Plan, missing: int, duration: float) -> str:
    known = len(plan.operators) - missing
    kept = f", {known} of them measured already" if known else ""
    return (
        f"{len(plan.operators)} kernels of {len(plan.models)} models{kept}: about {max(1, round(duration))} s, then "
        "routing and whole models"
    )


def _resumed(path: str | Path, runtime: Mapping[str, Any]) -> tuple[Row, ...]:
    """The rows of an earlier calibration with the same runtime.

    Raises:
        RunError: it is of another machine, runtime or number of threads.
    """
    before = read_table(path)
    if before.kernels != _EXECUTES:
        raise RunError(f"{path}: its kernels are not those of {_EXECUTES}; write to another file")
    was, now = ({**about, **(about.get("machine") or {})} for about in (before.runtime, runtime))
    for key in ("threads", "device", "onnxruntime"):
        if was.get(key) != now[key]:
            raise RunError(
                f"{path}: measured with {key} {was.get(key)!r}, now it is {now[key]!r}: times do not go together; "
                "write to another file"
            )
    return before.rows


# -- beside kernels --------------------------------------------------------------------------------------------------


def _call_us(threads: int, repeats: int) -> float:
    """One call of a network that does nothing, without the one operator in it."""
    idle = idle_network()
    timings, _ = measure(dict(enumerate(executions(idle))), threads=threads, repeats=repeats)
    probe = Probe(ort.session(idle, threads=threads), random_feeds(idle, 1, {}))
    call = summarised([probe.call_us() for _ in range(repeats)])
    return max(0.0, call.us - sum(timing.us for timing in timings.values()))


def _weights_curve(threads: int, repeats: int) -> list[list[float]]:
    """KiB of parameters in a network, and microseconds that a KiB takes longer than in the smallest network.

    On a convolution 3x3 that does little with each parameter, so that fetching shows; once parameters exceed a cache,
    each call reads them from the next one, in full: they are used in turn.
    """
    shape: list[int | str | None] = [BATCH, 64, 8, 8]
    value = gs.Variable("input", dtype=np.dtype(np.float32), shape=shape)
    emitter = Emitter(gs.Graph(inputs=[value], outputs=[], name="weights", opset=17))
    weight = np.random.default_rng(0).standard_normal((64, 64, 3, 3)).astype(np.float32) / 24
    made = emitter.node(
        "Conv", value, emitter.constant("weight", weight), name="conv", shape=shape, kernel_shape=[3, 3], pads=[1] * 4
    )
    emitter.draft.outputs = [made]
    widest = max(executions(Graph(emitter.draft)), key=lambda execution: execution.kernel.weight_bytes)
    own = widest.kernel.weight_bytes / 1024
    times = per_copy_us(widest, _COPIES, threads=threads, repeats=max(2, repeats // 3))
    slower = np.maximum.accumulate(np.array(times) - min(times[:2])).clip(0) / own
    return [[own * count, float(extra)] for count, extra in zip(_COPIES, slower, strict=True)]


def _whole(
    graphs: Mapping[str, Graph], bindings: Mapping[str, int] | None, threads: int, repeats: int, progress: Progress
) -> dict[str, Timing]:
    """The models themselves, in turns."""
    probes = {
        name: Probe(ort.session(graph, threads=threads), random_feeds(graph, 1, bindings or {}))
        for name, graph in graphs.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in probes}
    with progress.task("whole models", repeats) as task:
        for _ in range(repeats):
            for name, probe in probes.items():
                samples[name].append(probe.call_us(warmup_us=_WARMUP_US))
            task.advance()
    return {name: summarised(taken) for name, taken in samples.items()}


# -- the device's figures --------------------------------------------------------------------------------------------


def _pairs(
    graphs: Mapping[str, Graph],
    called: Mapping[str, Sequence[Kernel]],
    prices: Prices,
    bindings: Mapping[str, int] | None,
) -> list[tuple[Kernel, float]]:
    """Kernels of the graphs themselves, fused as any runtime would, and the time of what is executed for them."""
    found: list[tuple[Kernel, float]] = []
    for name, graph in graphs.items():
        times = dict.fromkeys((node.name for node in graph.nodes), 0.0)
        for kernel, estimate in zip(called[name], prices.estimates(called[name]), strict=True):
            times[kernel.name] += 0.0 if estimate is None else estimate.us
        found += onto_kernels(graph, times, bindings)[0]
    return found
