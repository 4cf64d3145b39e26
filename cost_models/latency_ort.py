"""Time in onnxruntime on this machine."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from eexform._version import __version__
from eexform.backends import ort
from eexform.cost_models._contract import Cost, CostModel
from eexform.cost_models._routing import idle_network, routing_pair
from eexform.errors import OptionError, RunError, need
from eexform.files import read_json, write_json
from eexform.ir.arithmetic import size_of
from eexform.ir.graph import BATCH, Graph
from eexform.tunables import parameter


@dataclass(frozen=True)
class LatencyOrt(CostModel):
    """Measured time per sample in onnxruntime on this machine's CPU.

    A graph is timed as a session of its own, on random inputs; the figure is the median over the repeats. Segments are
    differences of such times (see :mod:`eexform.cost_models.paths`), so they carry the noise of both.
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

    def __post_init__(self) -> None:
        for name, least in (("threads", 1), ("batch", 1), ("repeats", 1), ("warmup", 0)):
            value = getattr(self, name)
            need(value >= least, f"{name}: {value} is less than {least}", OptionError)

    def cost(self, graph: Graph) -> Cost:
        key = self._key(graph)
        stored = self._stored(key)
        if stored is None:
            stored = self._measure(graph)
            if self.cache:
                write_json(Path(self.cache) / f"{key}.json", stored)
        return Cost(stored["median_ms"] / self.batch, conditions=stored)

    def overhead(self) -> float:
        """The time of one call of a network that does nothing, per sample."""
        session = ort.session(idle_network(), threads=self.threads)
        feeds = {"input": np.zeros((self.batch, 1), dtype=np.float32)}
        return float(self._timed(session, feeds)["median_ms"]) / self.batch

    def routing(self, graph: Graph) -> float:
        """One exit's confidence, comparison, branch and gather, on the stand-in of :mod:`eexform.cost_models._routing`.

        What an exit that nobody takes adds to the same network without control flow; never below 0.
        """
        return _routing(self, *_stand_in(graph))

    def _measure(self, graph: Graph) -> dict[str, Any]:
        session = ort.session(graph, threads=self.threads)
        return self._timed(session, _feeds(graph, self.batch, self.bindings))

    def _timed(self, session: Any, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
        for _ in range(self.warmup):
            session.run(None, dict(feeds))
        taken = []
        for _ in range(self.repeats):
            started = time.perf_counter()
            session.run(None, dict(feeds))
            taken.append((time.perf_counter() - started) * 1e3)
        low, median, high = np.percentile(taken, [25, 50, 75])
        return {
            "median_ms": float(median),
            "spread_ms": float(high - low),
            "fastest_ms": float(min(taken)),
            "repeats": self.repeats,
            "warmup": self.warmup,
            "threads": self.threads,
            "batch": self.batch,
            **machine(),
        }

    def _key(self, graph: Graph) -> str:
        identity = {
            "graph": graph.digest,
            "settings": [self.threads, self.batch, self.repeats, self.warmup, sorted(self.bindings.items())],
            "machine": machine(),
            "version": __version__,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def _stored(self, key: str) -> dict[str, Any] | None:
        path = Path(self.cache) / f"{key}.json"
        if not self.cache or not path.exists():
            return None
        try:
            found = read_json(path)
        except RunError:  # damaged: measured again and replaced
            return None
        usable = isinstance(found, dict) and isinstance(found.get("median_ms"), float)
        return found if usable else None


@functools.cache
def machine() -> dict[str, Any]:
    """What a time depends on besides graph and settings: processor, cores, system, onnxruntime."""
    import onnxruntime

    return {
        "device": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "onnxruntime": onnxruntime.__version__,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _feeds(graph: Graph, batch: int, bindings: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Random inputs of a graph: normal floats, and whole numbers 0 and 1 (valid in any vocabulary or mask)."""
    rng = np.random.default_rng(0)
    feeds = {}
    for name in graph.inputs:
        found = graph.types[name]
        if found.shape is None or found.dtype is None:
            raise OptionError(f"input {name!r} has no type, so nothing can be fed to it")
        shape = [batch if dim == BATCH else size_of(dim, name, bindings) for dim in found.shape]
        if np.issubdtype(found.dtype, np.floating):
            feeds[name] = rng.standard_normal(shape).astype(found.dtype)
        else:
            feeds[name] = rng.integers(0, 2, shape).astype(found.dtype)
    return feeds


def _stand_in(graph: Graph) -> tuple[int, tuple[int, ...]]:
    """Classes, and the sample shape of the widest value that would have to be gathered at a middle site."""
    from eexform.ir.sites import find_sites

    values = [item.site for item in graph.exits] or [site.value for site in find_sites(graph).sites]
    shapes = []
    for value in values:
        found = graph.types[value]
        if found.batch_axis is not None and all(isinstance(dim, int) for dim in found.sample_shape):
            shapes.append(tuple(int(dim) for dim in found.sample_shape))  # type: ignore[arg-type]
    return graph.num_classes, shapes[len(shapes) // 2] if shapes else (16,)


@functools.lru_cache(maxsize=64)
def _pair(classes: int, shape: tuple[int, ...]) -> tuple[Any, Any]:
    return routing_pair(classes, shape)


def _routing(model: LatencyOrt, classes: int, shape: tuple[int, ...]) -> float:
    plain, routed = _pair(classes, shape)
    feeds = {"input": np.random.default_rng(0).standard_normal((model.batch, *shape)).astype(np.float32)}
    times = []
    for network in (plain, routed):
        session = ort.session(network, threads=model.threads)
        times.append(model._timed(session, feeds)["median_ms"])
    return max(0.0, times[1] - times[0]) / model.batch
