"""Energy from operations and bytes, or from power and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from eexform.cost_models._added import added
from eexform.cost_models._contract import Cost, CostModel, Crossing, Routing
from eexform.cost_models._device import Device, load_device
from eexform.cost_models._kernels import Kernel, kernels
from eexform.cost_models._registry import make, parse
from eexform.cost_models.roofline import check_dtype, computed_in, in_cache, shrunk
from eexform.errors import OptionError, need, suggest
from eexform.ir.arithmetic import has_rule
from eexform.ir.graph import Graph
from eexform.tunables import parameter

_WAYS = ("operations", "power")


@dataclass(frozen=True)
class Energy(CostModel):
    """Energy per sample: of operations and bytes moved, or watts x time.

    ``by=operations``: multiply-accumulates x pJ of the element type (any other operation counts as half of one), and
    bytes x pJ of the memory they come from: the cache where all that a kernel touches fits into it, else RAM. What
    instructions, clocks and idle parts take is not in it. ``by=power``: ``power_w`` x the time that ``time`` says,
    which is what a measured power figure is for.
    """

    name: ClassVar[str] = "energy"
    unit: ClassVar[str] = "mJ"
    additive: ClassVar[bool] = True

    device: str = parameter(default="", help="bundled device (eexform costs --device), or a .toml or .json file")
    by: str = parameter(default="operations", help="operations: pJ per operation and byte; power: watts x time")
    dtype: str = parameter(default="", help="float32, float16 or int8: computed in that type; empty: as in the graph")
    power_w: float = parameter(default=0.0, help="watts while the network runs; 0: the device's own figure")
    time: str = parameter(
        default="",
        help="latency model for by=power, NAME:SETTING=VALUE (one setting on the command line); empty: roofline",
    )
    bindings: Mapping[str, int] = parameter(default={}, help="sizes of symbolic dimensions other than the batch")

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        need(self.by in _WAYS, f"by: {self.by!r} is no way to count energy: {suggest(self.by, _WAYS)}", OptionError)
        need(self.power_w >= 0, f"power_w: {self.power_w} is less than 0", OptionError)
        if self.by == "operations":
            need(
                not self.power_w and not self.time,
                "power_w and time belong to by=power; leave them out, or say by=power",
                OptionError,
            )
            self._per_mac(self.dtype or "float32")
            self._per_byte(0.0)
            return
        need(self._watts > 0, "by=power: no power is known; give power_w=WATTS", OptionError)
        need(
            self._latency.unit == "ms",
            f"time: {self._latency.name!r} gives {self._latency.unit}, not ms; name a latency model",
            OptionError,
        )
        # as the latency model is: one that is measured, or not additive, makes an energy that is the same
        object.__setattr__(self, "additive", self._latency.additive)
        object.__setattr__(self, "measured", self._latency.measured)

    def cost(self, graph: Graph) -> Cost:
        return self.costs([graph])[0]

    def costs(self, graphs: Sequence[Graph]) -> list[Cost]:
        if self.by == "operations":
            return [self._counted(graph) for graph in graphs]
        return [self._times_power(cost) for cost in self._latency.costs(graphs)]

    def overhead(self) -> float:
        return self._watts * self._latency.overhead() if self.by == "power" else 0.0

    def paths(self, graph: Graph) -> tuple[float, ...] | None:
        times = self._latency.paths(graph) if self.by == "power" else None
        return None if times is None else tuple(self._watts * time for time in times)

    def routing(self, graph: Graph, crossing: Crossing) -> Routing:
        """``by=power``: power x the latency model's; else the bytes that what lowering adds moves."""
        if self.by == "power":
            found = self._latency.routing(graph, crossing)
            return Routing(self._watts * found.decision, self._watts * found.onward)
        decision, onward = (moved * self._per_byte(moved) * 1e-9 for moved in added().bytes(crossing))
        return Routing(decision, onward)

    def between(self, graph: Graph, before: Crossing | None, after: Crossing | None) -> Cost:
        """``by=power``: power x the latency model's."""
        if self.by != "power":
            return Cost(0.0)
        found = self._latency.between(graph, before, after)
        return replace(found, total=self._watts * found.total)

    def channel_block(self) -> int | None:
        return self._latency.channel_block() if self.by == "power" else None

    # -- operations and bytes ------------------------------------------------------------------------------------------

    def _counted(self, graph: Graph) -> Cost:
        nodes = dict.fromkeys((node.name for node in graph.nodes), 0.0)
        unknown: list[tuple[str, str]] = []
        for kernel in kernels(graph, self.bindings):
            without = [graph.flow.nodes[name] for name in kernel.nodes if not has_rule(graph.flow.nodes[name])]
            unknown += [(node.name, node.op) for node in without]
            if not without:
                nodes[kernel.name] = self._of(kernel) * 1e-9
        conditions = {"device": self._device.title, "by": self.by, **({"dtype": self.dtype} if self.dtype else {})}
        return Cost(sum(nodes.values()), nodes, tuple(unknown), conditions=conditions)

    def _of(self, kernel: Kernel) -> float:
        """Picojoules."""
        moved = shrunk(kernel, self.dtype) * (kernel.read_bytes + kernel.write_bytes + kernel.weight_bytes)
        work = kernel.macs + kernel.flops / 2
        per_mac = self._per_mac(computed_in(kernel, self.dtype)) if work else 0.0
        return work * per_mac + moved * self._per_byte(moved)

    def _per_mac(self, dtype: str) -> float:
        figures = {"float32": self._device.energy.pj_per_mac_float32, "int8": self._device.energy.pj_per_mac_int8}
        found = figures.get(dtype)
        if found is None:
            have = [name for name, value in figures.items() if value is not None]
            # a dtype takes the place of floating-point types only: a quantised graph stays what it is
            chosen = dtype == self.dtype or dtype.startswith(("float", "bfloat"))
            advice = f"say dtype={' or dtype='.join(have)}" if have and chosen else "use by=power, or put "
            if not (have and chosen):
                advice += f"'energy.pj_per_mac_{dtype}' into its file" if dtype in figures else "[energy] into its file"
            raise OptionError(f"device {self._device.name!r} has no energy per operation in {dtype}: {advice}")
        return found

    def _per_byte(self, moved: float) -> float:
        """Picojoules per byte for a kernel that touches so many."""
        energy = self._device.energy
        if energy.pj_per_byte_cache is not None and in_cache(self._device, moved):
            return energy.pj_per_byte_cache
        if energy.pj_per_byte_ram is None:
            raise OptionError(f"device {self._device.name!r} has no 'energy.pj_per_byte_ram': put it into its file")
        return energy.pj_per_byte_ram

    # -- power and time ------------------------------------------------------------------------------------------------

    def _times_power(self, cost: Cost) -> Cost:
        nodes = {name: self._watts * time for name, time in cost.nodes.items()}
        conditions: dict[str, Any] = {**cost.conditions, "by": self.by, "power_w": self._watts}
        conditions["time"] = self._latency.name
        return replace(cost, total=self._watts * cost.total, nodes=nodes, conditions=conditions)

    @cached_property
    def _watts(self) -> float:
        return self.power_w or self._device.energy.power_w or 0.0

    @cached_property
    def _latency(self) -> CostModel:
        if self.time:
            return parse(self.time)
        return make("roofline", device=self.device, dtype=self.dtype, bindings=dict(self.bindings))

    @cached_property
    def _device(self) -> Device:
        return load_device(self.device)
