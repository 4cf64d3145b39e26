"""Time per kernel, looked up in a table."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from eexform.cost_models import _kernels, _ort_kernels
from eexform.cost_models._contract import Cost, CostModel, Crossing, Routing
from eexform.cost_models._device import Device, RoutingTimes
from eexform.cost_models._interpolate import Entry, Estimate, Lookup
from eexform.cost_models._kernels import Kernel
from eexform.cost_models._prices import Prices
from eexform.cost_models._routing import RoutingFit
from eexform.cost_models._table_file import TableFile, read_table
from eexform.cost_models._timing import machine
from eexform.errors import OptionError, need
from eexform.ir.exit_nodes import head_nodes
from eexform.ir.extract import extract
from eexform.ir.graph import Graph
from eexform.tunables import parameter

_DECIDES = ("device", "onnxruntime")
"""What times depend on most, of what :func:`eexform.cost_models._timing.machine` says."""

_OPENED: WeakKeyDictionary[Graph, dict[tuple[Any, ...], tuple[Kernel, ...]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Table(CostModel):
    """Time per sample from a table of kernel times, measured by ``eexform calibrate`` or put in by hand.

    A kernel that the table holds has its time; one between those that it holds is interpolated; one outside is scaled
    from the nearest and named in ``Cost.estimated``; one of an operator that the table does not know is named in
    ``Cost.unknown`` and not counted. The total holds one call of the runtime, too.
    """

    name: ClassVar[str] = "table"
    unit: ClassVar[str] = "ms"
    additive: ClassVar[bool] = True

    device: str = parameter(help="the .json that `eexform calibrate` wrote, or a table of your own (.json or .csv)")
    bindings: Mapping[str, int] = parameter(default={}, help="sizes of symbolic dimensions other than the batch")

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not self.device:
            raise OptionError("no table is given: device=FILE, the .json that `eexform calibrate` wrote or your own")

    def cost(self, graph: Graph) -> Cost:
        opened = self._opened
        nodes = dict.fromkeys((node.name for node in graph.nodes), 0.0)
        unknown: list[tuple[str, str]] = []
        estimated: list[tuple[str, str]] = []
        called = self._kernels(graph)
        for kernel, found in zip(called, opened.prices.estimates(called), strict=True):
            if found is None:
                unknown.append((kernel.name, kernel.op))
                continue
            if found.why is not None:
                estimated.append((kernel.name, found.why))
            nodes[kernel.name] += found.us / 1e3
        return Cost(
            sum(nodes.values()) + self.overhead(),
            nodes,
            tuple(dict.fromkeys(unknown)),
            tuple(dict.fromkeys(estimated)),
            conditions=opened.conditions,
        )

    def overhead(self) -> float:
        """One call of the runtime."""
        return self._opened.call_us / 1e3

    def routing(self, graph: Graph, crossing: Crossing) -> Routing:
        """As the file says; nothing where it says nothing (``conditions`` then say so)."""
        if self._opened.routing is None:
            return Routing()
        found = self._opened.routing.routing(crossing)
        return Routing(found.decision / 1e3, found.onward / 1e3)

    def between(self, graph: Graph, before: Crossing | None, after: Crossing | None) -> Cost:
        """The stretch of trunk as a branch of its own, looked up as onnxruntime executes it there, less what the same
        nodes take inside the whole graph. 0 for tables that do not know how a runtime lays out values."""
        if not self._opened.layouts:
            return Cost(0.0)
        heads = head_nodes(graph)
        every = frozenset().union(*heads)
        given = list(graph.inputs if before is None else before.names)
        # scores carried from exit to exit are made by heads and used by the last classifier
        made = {tensor.name for name in every for tensor in graph.flow.nodes[name].outputs}
        carried = [value for name in graph.flow.topological if name not in every for value in graph.flow.reads(name)]
        given += [value for value in dict.fromkeys(carried) if value in made]
        wanted = [graph.final] if after is None else [after.site, *after.names]
        wanted = [value for value in dict.fromkeys(wanted) if value not in given]
        if not wanted:
            return Cost(0.0)
        branch = extract(graph.replace(exits=()), given, wanted)
        inside, whole = {node.name for node in branch.nodes}, self._kernels(graph)
        prices = self._opened.prices
        called = self._kernels(branch)
        apart = prices.estimates(called, whole)
        together = prices.estimates([kernel for kernel in whole if kernel.name in inside], whole)
        pairs = list(zip(called, apart, strict=True))
        return Cost(
            (_us(apart) - _us(together)) / 1e3,
            unknown=tuple(dict.fromkeys((kernel.name, kernel.op) for kernel, one in pairs if one is None)),
            estimated=tuple(dict.fromkeys((kernel.name, one.why) for kernel, one in pairs if one and one.why)),
        )

    def channel_block(self) -> int | None:
        device = self._opened.device
        return None if device is None else device.kernel.channel_block

    @property
    def _opened(self) -> _Opened:
        path = Path(self.device)
        try:
            stamp = path.stat().st_mtime_ns
        except OSError:
            stamp = -1
        return _open(self.device, stamp)

    def _kernels(self, graph: Graph) -> tuple[Kernel, ...]:
        """Kept per graph: a run prices the same graphs again and again, and opening one takes milliseconds."""
        way = self._opened.file.kernels
        key = (way, tuple(sorted(self.bindings.items())))
        kept = _OPENED.setdefault(graph, {})
        if key not in kept:
            made = _ort_kernels.kernels if way == "onnxruntime" else _kernels.kernels
            kept[key] = tuple(made(graph, self.bindings))
        return kept[key]


def _us(found: Iterable[Estimate | None]) -> float:
    return sum(estimate.us for estimate in found if estimate is not None)


@dataclass(frozen=True)
class _Opened:
    """A table that was read, with what is derived from it."""

    file: TableFile
    prices: Prices
    device: Device | None
    routing: RoutingFit | None
    layouts: bool
    call_us: float
    conditions: Mapping[str, Any]


@functools.lru_cache(maxsize=16)
def _open(name: str, stamp: int) -> _Opened:
    file = read_table(name)
    if not file.finished:
        raise OptionError(f"{name}: its calibration was interrupted; finish it with the same command and --resume")
    if not file.rows:
        raise OptionError(f"{name}: the table is empty")
    device = None if file.device is None else Device.from_json(file.device, name)
    launch = float(file.runtime.get("launch_us", 0.0 if device is None else device.kernel.launch_us))
    call = float(file.runtime.get("call_us", 0.0 if device is None else device.kernel.call_us))
    # measured without changes of layout, which are then priced by the operators that make them
    routing = _routing(file.runtime.get("routing"), name)
    layouts = routing is not None and file.kernels == "onnxruntime"
    if routing is None and device is not None and device.routing is not None:
        routing = RoutingFit(**vars(device.routing))
    return _Opened(
        file=file,
        prices=Prices.of(
            Lookup([Entry(row.op, row.variant, row.sizes, row.us) for row in file.rows], launch), file.runtime
        ),
        device=device,
        routing=routing,
        layouts=layouts,
        call_us=call,
        conditions=_conditions(name, file, device, routing),
    )


def _routing(figures: Any, name: str) -> RoutingFit | None:
    if figures is None:
        return None
    try:
        found = vars(RoutingTimes(**{key: float(value) for key, value in figures.items()}))
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise OptionError(f"{name}: runtime.routing is damaged: {error}") from error
    for key, value in found.items():
        need(0 <= value < math.inf, f"{name}: runtime.routing.{key}: {value!r} is no time in microseconds", OptionError)
    return RoutingFit(**found)


def _conditions(name: str, file: TableFile, device: Device | None, routing: RoutingFit | None) -> Mapping[str, Any]:
    warnings: list[str] = [*_changed(file.runtime.get("machine"))]
    if routing is None:
        warnings.append("the file has no routing figures: exits cost their heads and nothing else")
    found: dict[str, Any] = {"table": name, "kernels": file.kernels, "entries": len(file.rows)}
    if device is not None:
        found["device"] = device.title
    if "threads" in file.runtime:
        found["threads"] = file.runtime["threads"]
    return {**found, "warnings": warnings} if warnings else found


def _changed(measured_on: Any) -> Sequence[str]:
    """What differs between the machine that was measured and this one, where onnxruntime is what makes the kernels."""
    if not isinstance(measured_on, dict):
        return ()
    here = machine()
    return [
        f"measured with {key} {measured_on[key]!r}; here it is {here[key]!r}"
        for key in _DECIDES
        if key in measured_on and measured_on[key] != here[key]
    ]
