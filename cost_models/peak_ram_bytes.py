"""Activation memory: the most bytes that inference holds at a time, and what an allocator needs for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import ClassVar

from eexform.cost_models._contract import Cost, CostModel, Crossing, Held, Routing
from eexform.cost_models._lifetimes import Memory, timeline
from eexform.cost_models._program import OVERWRITING, Storage, read_program
from eexform.cost_models._schedule import best_order
from eexform.cost_models.model_bytes import ModelBytes
from eexform.errors import OptionError, need, suggest
from eexform.ir.graph import Graph
from eexform.tunables import parameter

FLOAT_BYTES = {"": None, "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8": 1, "int8": 1}
"""Bytes of a number by the setting ``dtype``."""

ORDERS = ("file", "best")
PLACES = ("flash", "ram")


@dataclass(frozen=True)
class PeakRam(CostModel):
    """Peak bytes of activations: lifetimes of values along the execution order, placed in one arena.

    The total is what an allocator needs that knows all lifetimes beforehand (greedy by size, as TensorFlow Lite plans);
    ``conditions["lower_bound"]`` is the most that is live at a time, which no allocator can go below for this order.
    Constants, shape arithmetic and views take nothing; the work space of kernels (im2col and the like), the stack and
    the runtime itself are not counted. With exits, each head runs as soon as its site is there, and the scores of all
    exits are held to the end. The lowered form ``if`` needs more where exits are nested: onnxruntime keeps the values
    outside a branch until the branch is done, so what was live at every exit passed adds up there.

    The defaults describe a careful runtime on a microcontroller that fuses activations into convolutions. LiteRT is
    ``inplace=elementwise``, TensorFlow Lite Micro ``inplace=none,alignment=16``, onnxruntime on the CPU
    ``inputs=false,residual=true,alignment=256``; the latter takes more where it rounds channels up (NCHWc), and where
    values of equal shape share one buffer that is kept from the first of them to the last.
    """

    name: ClassVar[str] = "peak_ram_bytes"
    unit: ClassVar[str] = "bytes"
    additive: ClassVar[bool] = False
    combine: ClassVar = "max"

    bindings: Mapping[str, int] = parameter(default={}, help="sizes of symbolic dimensions other than the batch")
    batch: int = parameter(default=1, help="samples per call; the figure is for all of them")
    order: str = parameter(default="file", help="'file': as the nodes stand; 'best': the best order that is found")
    fused: bool = parameter(
        default=True, help="nothing is stored inside a fused kernel (Conv, BatchNormalization, Relu)"
    )
    residual: bool = parameter(default=False, help="a convolution takes the residual sum along, over its other operand")
    inplace: str = parameter(
        default="activations",
        help="what may write over its operand: 'none', 'activations', 'elementwise' (sums and products, too)",
    )
    inputs: bool = parameter(default=True, help="count the inputs; false: their owner keeps them")
    alignment: int = parameter(default=64, help="sizes are rounded up to multiples of so many bytes")
    dtype: str = parameter(default="", help="count floating-point numbers as this type, e.g. int8; '': as in the graph")
    weights: str = parameter(default="flash", help="'ram': the constants lie in RAM, too, and are added")

    def __post_init__(self) -> None:
        for name, choices in (
            ("order", ORDERS),
            ("inplace", tuple(OVERWRITING)),
            ("dtype", tuple(FLOAT_BYTES)),
            ("weights", PLACES),
        ):
            value = getattr(self, name)
            need(value in choices, f"{name}: {value!r} is not a choice: {suggest(value, choices)}", OptionError)
        for name in ("batch", "alignment"):
            need(getattr(self, name) >= 1, f"{name}: {getattr(self, name)} is less than 1", OptionError)

    def cost(self, graph: Graph) -> Cost:
        found = self.memory(graph)
        return Cost(
            float(found.total),
            unknown=found.program.unknown,
            conditions={
                "arena": found.arena,
                "lower_bound": found.timeline.peak,
                "constants": found.constants,
                "order": found.found_by,
                "node": found.node,
                "alive": found.alive(),
            },
        )

    def memory(self, graph: Graph) -> Memory:
        """Lifetimes, addresses and the peak; with ``order="best"`` the file's order where that needs less."""
        program = read_program(graph, self._storage)
        constants = ModelBytes(self.dtype).cost(graph).total if self.weights == "ram" else 0
        filed = timeline(program)
        if self.order == "file":
            return Memory(program, filed, "file", round(constants))
        schedule = best_order(program)
        ordered = timeline(program, schedule.order)
        source = "exact" if schedule.exact else "heuristic"
        kept = source if ordered.peak == filed.peak else "file"
        found = Memory(program, filed, kept, round(constants)), Memory(program, ordered, source, round(constants))
        return min(found, key=lambda memory: (memory.arena, memory.timeline.peak))

    def routing(self, graph: Graph, crossing: Crossing) -> Routing:
        """Beside a head, the values that the rest needs (its own site is counted with the head); then those values
        twice, the copies of the undecided rows among them."""
        if self.weights == "ram":
            raise OptionError(
                "peak_ram_bytes: with weights=ram the parameters of all parts lie in memory at once, whichever path a "
                "sample takes, so paths cannot be told: use weights=flash, and a limit on model_bytes beside it"
            )
        live = sum(map(self._held, crossing.live))
        own = self._held(crossing.value)
        # by name where names are known: another value may have the site's shape
        carried = crossing.site in crossing.names if crossing.names else crossing.value in crossing.live
        if self.inputs:  # the head's input is the site, counted there
            return Routing(live - own if carried else live, 2 * live)
        return Routing(live if carried else live + own, 2 * live)

    def _held(self, value: Held) -> int:
        width = FLOAT_BYTES[self.dtype]
        narrowed = width is not None and value.itemsize in (2, 4)  # floats; indices have 8 bytes
        return self._storage.aligned(value.elements * (width if narrowed and width else value.itemsize) * self.batch)

    @cached_property
    def _storage(self) -> Storage:
        return Storage(
            bindings=self.bindings,
            batch=self.batch,
            inputs=self.inputs,
            fused=self.fused,
            residual=self.residual,
            inplace=self.inplace,
            alignment=self.alignment,
            float_bytes=FLOAT_BYTES[self.dtype],
        )


# -- where the memory goes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """A stretch of a graph with exits.

    Attributes:
        name: ``trunk 0``, ``head 0``, ``trunk 1``, ...; the last one leads to the final classifier.
        live: the most bytes held at a time during it, what is carried to later segments included.
        arena: how far the arena of the whole graph is in use meanwhile.
        node: where the most is held; empty where nothing runs.
    """

    name: str
    live: int
    arena: int
    node: str


@dataclass(frozen=True)
class Segments:
    """A graph's memory by segments.

    Attributes:
        parts: trunk and head in turns, in the order in which they run.
        paths: per exit, the arena that a sample needs which leaves there; the last is the worst path: the final exit.
    """

    parts: tuple[Segment, ...]
    paths: tuple[int, ...]


def segments(graph: Graph, model: PeakRam | None = None) -> Segments:
    """Where a graph with exits needs how much, constants left out.

    Args:
        graph: with exits or without.
        model: settings.
    """
    memory = (PeakRam() if model is None else model).memory(graph)
    stages = [memory.program.steps[number].stage for number in memory.timeline.order]
    parts = []
    for stage in range(2 * len(graph.exits) + 1):
        at = [place for place, found in enumerate(stages) if found == stage]
        name = f"{'head' if stage % 2 else 'trunk'} {stage // 2}"
        if not at:
            parts.append(Segment(name, 0, 0, ""))
            continue
        worst = max(at, key=lambda place: memory.timeline.live[place])
        arena = memory.high_water(at[0], at[-1] + 1)
        parts.append(Segment(name, memory.timeline.live[worst], arena, memory.order[worst]))
    reached = [*accumulate((part.arena for part in parts), max)]
    return Segments(tuple(parts), (*reached[1::2], reached[-1]))


@dataclass(frozen=True)
class Budget:
    """Bytes needed and available; ``available`` is ``None`` where there is no such memory."""

    needed: int
    available: int | None

    @property
    def over(self) -> int:
        """Bytes too many."""
        return 0 if self.available is None else max(0, self.needed - self.available)


@dataclass(frozen=True)
class Fit:
    """Whether a graph fits a device.

    Attributes:
        ram: arena, constants where they lie in RAM, and what else was said to be there.
        flash: the model's file.
        node: where the most activations are held.
        alive: the values held there and their bytes, the largest first.
    """

    ram: Budget
    flash: Budget
    node: str
    alive: Mapping[str, int]

    @property
    def ok(self) -> bool:
        return not (self.ram.over or self.flash.over)

    def __str__(self) -> str:
        lines = []
        for name, budget in (("RAM", self.ram), ("flash", self.flash)):
            if budget.available is None:
                continue
            verdict = f"{budget.over:,} too many" if budget.over else f"{budget.available - budget.needed:,} left"
            lines.append(f"{name}: {budget.needed:,} of {budget.available:,} bytes: {verdict}")
        held = ", ".join(f"{value} {size:,}" for value, size in list(self.alive.items())[:4])
        lines.append(f"the most is held at {self.node!r}: {held}" + (", ..." if len(self.alive) > 4 else ""))
        return "\n".join(lines)


def fits(
    graph: Graph,
    device_ram_bytes: int,
    device_flash_bytes: int | None = None,
    *,
    model: PeakRam | None = None,
    size: CostModel | None = None,
    reserved_ram_bytes: int = 0,
) -> Fit:
    """Hold a graph to a device's memory.

    Args:
        graph: with exits or without.
        device_ram_bytes: RAM for everything.
        device_flash_bytes: memory for the model's file; ``None``: there is none, so the constants lie in RAM.
        model: settings of the activations' memory.
        size: model of the file's size; default: ``model_bytes``, floating-point numbers stored as ``model`` has them.
        reserved_ram_bytes: what else is in RAM: stack, runtime, work space of kernels, the application.
    """
    model = PeakRam() if model is None else model
    if device_flash_bytes is None:
        model = replace(model, weights="ram")
    memory = model.memory(graph)
    size = ModelBytes(model.dtype) if size is None else size
    return Fit(
        Budget(memory.total + reserved_ram_bytes, device_ram_bytes),
        Budget(round(size.cost(graph).total), device_flash_bytes),
        memory.node,
        memory.alive(),
    )
