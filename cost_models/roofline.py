"""Time from the figures of a device file, kernel by kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from eexform.cost_models._added import added
from eexform.cost_models._contract import Cost, CostModel, Crossing, Routing
from eexform.cost_models._device import DTYPES, Device, load_device
from eexform.cost_models._kernels import Kernel, kernels
from eexform.errors import OptionError, need, suggest
from eexform.ir.arithmetic import has_rule
from eexform.ir.graph import Graph
from eexform.tunables import parameter


@dataclass(frozen=True)
class KernelTime:
    """Microseconds of one kernel for a batch: what it takes to call it, to compute, and to move its bytes."""

    launch: float
    compute: float
    bandwidth: float

    @property
    def total(self) -> float:
        return self.launch + max(self.compute, self.bandwidth)

    @property
    def bound(self) -> str:
        """What takes longest: ``compute``, ``bandwidth`` or ``overhead``."""
        if self.launch >= max(self.compute, self.bandwidth):
            return "overhead"
        return "compute" if self.compute >= self.bandwidth else "bandwidth"


def padded_macs(kernel: Kernel, block: int | None) -> int:
    """Multiply-accumulates with channels rounded up to whole blocks.

    Input channels that do not even fill one block stay as they are: that is the first convolution of an image network,
    for which runtimes have a kernel of its own, and a depthwise one, whose single input channel is no vector.
    """
    if not block or kernel.channels is None or kernel.macs == 0:
        return kernel.macs
    read, made = kernel.channels
    factor = -(-made // block) * block / made
    if read >= block:
        factor *= -(-read // block) * block / read
    return round(kernel.macs * factor)


def kernel_time(kernel: Kernel, device: Device, dtype: str = "", batch: int = 1) -> KernelTime:
    """The roofline of one kernel: launch + max(operations / reachable peak, bytes / reachable bandwidth).

    S. Williams, A. Waterman, D. Patterson, Roofline: an insightful visual performance model for multicore
    architectures, CACM 52(4), 2009; with a launch and with efficiencies per class of kernels.

    Args:
        kernel: for one sample.
        device: its figures.
        dtype: element type that floating-point kernels are computed in; empty for their own.
        batch: samples per call; parameters are read once for all.
    """
    calls, memory = device.kernel, device.memory
    shrink = shrunk(kernel, dtype)
    efficiency: float = getattr(device.efficiency, kernel.kind)
    operations = batch * (2 * padded_macs(kernel, calls.channel_block) + kernel.flops)
    moved = shrink * (batch * (kernel.read_bytes + kernel.write_bytes) + kernel.weight_bytes)
    bandwidth = memory.bandwidth_gb_per_s
    if memory.cache_bandwidth_gb_per_s is not None and in_cache(device, moved):
        bandwidth = memory.cache_bandwidth_gb_per_s
    peak = device.peak(computed_in(kernel, dtype)) or device.compute.peak_gflops_float32
    if kernel.kind == "elementwise":  # its efficiency is one of moving bytes
        return KernelTime(calls.launch_us, operations / peak / 1e3, moved / (bandwidth * efficiency) / 1e3)
    return KernelTime(calls.launch_us, operations / (peak * efficiency) / 1e3, moved / bandwidth / 1e3)


def in_cache(device: Device, moved: float) -> bool:
    """Whether all that a kernel touches fits into the device's cache."""
    return device.memory.cache_kib is not None and moved <= device.memory.cache_kib * 1024


def computed_in(kernel: Kernel, dtype: str) -> str:
    """Element type of a kernel's arithmetic, as device files call it."""
    own = kernel.arithmetic or kernel.dtype
    own = "int8" if own in ("int8", "uint8") else own
    return dtype if dtype and own.startswith(("float", "bfloat")) else own


def shrunk(kernel: Kernel, dtype: str) -> float:
    """Factor on a kernel's bytes when it is computed in ``dtype`` instead of its own element type."""
    kept, wanted = kernel.arithmetic or kernel.dtype, computed_in(kernel, dtype)
    if wanted == kept or not dtype:
        return 1.0
    own = 2 if kept == "bfloat16" else np.dtype(kept).itemsize
    return np.dtype(wanted).itemsize / own


@dataclass(frozen=True)
class Roofline(CostModel):
    """Predicted time per sample: for each kernel its launch, and its operations or bytes, whatever takes longer.

    Kernels are fused as in :mod:`eexform.cost_models._fusion`; a kernel's time stands at its last node. Good for
    devices that nobody has at hand; where onnxruntime runs on the device, calibrate and use ``table``.
    """

    name: ClassVar[str] = "roofline"
    unit: ClassVar[str] = "ms"
    additive: ClassVar[bool] = True

    device: str = parameter(default="", help="bundled device (eexform costs --device), or a .toml or .json file")
    dtype: str = parameter(default="", help="float32, float16 or int8: computed in that type; empty: as in the graph")
    bindings: Mapping[str, int] = parameter(default={}, help="sizes of symbolic dimensions other than the batch")
    batch: int = parameter(default=1, help="samples per call; figures are per sample")

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        need(self.batch >= 1, f"batch: {self.batch} is less than 1", OptionError)
        device = self._device  # a wrong one is refused here and not when the first graph comes
        need(
            not self.dtype or device.peak(self.dtype) is not None,
            f"device {device.name!r} has no peak for {self.dtype}; put one into its file",
            OptionError,
        )

    def cost(self, graph: Graph) -> Cost:
        nodes = dict.fromkeys((node.name for node in graph.nodes), 0.0)
        bounds: dict[str, str] = {}
        unknown: list[tuple[str, str]] = []
        missing: set[str] = set()
        for kernel in kernels(graph, self.bindings):
            without = [graph.flow.nodes[name] for name in kernel.nodes if not has_rule(graph.flow.nodes[name])]
            if without:
                unknown += [(node.name, node.op) for node in without]
                continue
            time = kernel_time(kernel, self._device, self.dtype, self.batch)
            nodes[kernel.name] = time.total / self.batch / 1e3
            bounds[kernel.name] = time.bound
            dtype = computed_in(kernel, self.dtype)
            if kernel.macs and self._device.peak(dtype) is None:
                missing.add(f"the peak of float32 for kernels in {dtype}")
        conditions = self._conditions(sorted(missing))
        return Cost(sum(nodes.values()) + self.overhead(), nodes, tuple(unknown), (), bounds, conditions)

    def overhead(self) -> float:
        """What one run of a network costs beside its kernels, per sample."""
        return self._device.kernel.call_us / self.batch / 1e3

    def routing(self, graph: Graph, crossing: Crossing) -> Routing:
        """As the device's ``[routing]`` says; without one, the launches and bytes of what lowering adds."""
        figures = self._device.routing
        if figures is not None:
            live = sum(held.bytes for held in crossing.live) / 1024
            # measured at batch 1; a call decides once for all samples, scores and values are per sample
            decision = figures.decision_us / self.batch + figures.decision_us_per_class * crossing.classes
            decision += figures.decision_us_per_kib * crossing.value.bytes / 1024
            onward = figures.onward_us / self.batch + figures.onward_us_per_kib * live
            return Routing(decision / 1e3, onward / 1e3)
        launch, per_byte = self._device.kernel.launch_us, 1e-3 / self._device.memory.bandwidth_gb_per_s
        decision, onward = (
            launch * count / self.batch + moved * per_byte
            for count, moved in zip(added().launches(crossing), added().bytes(crossing), strict=True)
        )
        return Routing(decision / 1e3, onward / 1e3)

    def channel_block(self) -> int | None:
        return self._device.kernel.channel_block

    @cached_property
    def _device(self) -> Device:
        return load_device(self.device)

    def _conditions(self, missing: list[str]) -> dict[str, Any]:
        device = self._device
        found: dict[str, Any] = {"device": device.title, "threads": device.compute.threads, "batch": self.batch}
        if self.dtype:
            found["dtype"] = self.dtype
        assumed = [f"{key} = {0 if key.endswith('_us') else 1}" for key in device.assumed()] + missing
        if device.memory.cache_kib is not None and device.memory.cache_bandwidth_gb_per_s is None:
            assumed.append("every byte comes from RAM: the cache has no bandwidth")
        if device.routing is None:
            assumed.append("routing: launches and bytes of what lowering adds")
        return {**found, "assumed": assumed} if assumed else found


def check_dtype(dtype: str) -> None:
    """Raise ``OptionError`` unless ``dtype`` is empty or one that device files know."""
    need(not dtype or dtype in DTYPES, f"dtype: {dtype!r} is not known: {suggest(dtype, DTYPES)}", OptionError)
