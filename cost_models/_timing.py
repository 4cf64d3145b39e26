"""Timing calls side by side: one loop over all, what the times say, and what they depend on besides the call."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from eexform._version import __version__
from eexform.errors import OptionError, RunError
from eexform.files import read_json, write_json
from eexform.ir.arithmetic import size_of
from eexform.ir.graph import BATCH, Graph

Call = Callable[[], object]
State = Literal["hot", "cold"]
Figure = Literal["median", "mean", "p95", "min"]
STATES = ("hot", "cold")
FIGURES = ("median", "mean", "p95", "min")

_REHEARSALS = 2  # calls before a timed one: after one, weights of a megabyte were still 5-10 % from their steady time
_CACHE_SIZES = Path("/sys/devices/system/cpu/cpu0/cache")
_ASSUMED_CACHE = 64 << 20
_LINE = 64  # bytes


def interleaved(calls: Sequence[Call], *, repeats: int, warmup: int, state: State = "hot") -> np.ndarray:
    """Time calls in one loop, each once per round and every round from another one on, so that a slow moment hits all.

    ``hot``: where there is more than one call, each timed one follows two of the same that are not, because the others
    have taken its place in the caches. ``cold``: before each timed one, memory larger than the last-level cache is
    written to, so that parameters and inputs come from main memory (code and what a runtime has allocated stay as they
    are: this is not the first call of a new process).

    Args:
        calls: what to time.
        repeats: rounds.
        warmup: of each call, before the first round.
        state: of the caches.

    Returns:
        Milliseconds, float64 [repeats, calls].
    """
    for call in calls:
        for _ in range(warmup):
            call()
    rehearsals = _REHEARSALS if len(calls) > 1 else 0
    times = np.zeros((repeats, len(calls)))
    for place in range(repeats):
        for turn in range(len(calls)):
            chosen = (place + turn) % len(calls)
            call = calls[chosen]
            if state == "cold":
                evict()
            else:
                for _ in range(rehearsals):
                    call()
            started = time.perf_counter()
            call()
            times[place, chosen] = (time.perf_counter() - started) * 1e3
    return times


def summary(times: np.ndarray) -> dict[str, float]:
    """What the times of one call say, in milliseconds: median, mean, p95, the fastest, and the interquartile range."""
    low, median, high, late = np.percentile(times, [25, 50, 75, 95])
    return {
        "median_ms": float(median),
        "mean_ms": float(np.mean(times)),
        "p95_ms": float(late),
        "fastest_ms": float(np.min(times)),
        "spread_ms": float(high - low),
    }


def levels(times: np.ndarray, figure: Figure = "median") -> np.ndarray:
    """One figure per call, such that differences between calls are as sure as they can be.

    ``median``: the calls are put in the order of their medians; the first has its median, each further one that of the
    call before plus the median of their differences round by round. What slows a whole round drops out of these
    differences. The other figures are each call's own.

    Args:
        times: milliseconds, [repeats, calls], from :func:`interleaved`.
        figure: which.

    Returns:
        Milliseconds, [calls].
    """
    if figure == "mean":
        return np.asarray(np.mean(times, axis=0))
    if figure == "p95":
        return np.asarray(np.percentile(times, 95, axis=0))
    if figure == "min":
        return np.asarray(np.min(times, axis=0))
    medians = np.median(times, axis=0)
    order = np.argsort(medians, kind="stable")
    steps = np.median(np.diff(times[:, order], axis=1), axis=0)
    found = np.empty_like(medians)
    found[order] = np.cumsum([medians[order[0]], *steps])
    return found


def difference(times: np.ndarray, left: int, right: int) -> float:
    """Median, over the rounds, of what call ``left`` took longer than call ``right``, in milliseconds."""
    return float(np.median(times[:, left] - times[:, right]))


# -- caches -----------------------------------------------------------------------------------------------------------


def evict() -> None:
    """Push everything else out of the processor's caches: write to one byte of every line of :func:`evicted_bytes`."""
    lines = _buffer()[::_LINE]
    np.add(lines, 1, out=lines)


def evicted_bytes() -> int:
    """How much memory :func:`evict` walks through: five quarters of the last-level cache; of 64 MiB where the system
    does not say how large that is."""
    return (last_level_cache() or _ASSUMED_CACHE) * 5 // 4


@functools.cache
def last_level_cache() -> int | None:
    """Bytes of the largest cache that the first core sees, or ``None`` where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    found = []
    for path in _CACHE_SIZES.glob("index*/size"):
        try:
            text = path.read_text(encoding="ascii").strip()
            found.append(int(text.rstrip("KMG")) * units.get(text[-1:], 1))
        except (OSError, ValueError):
            continue
    return max(found, default=None)


@functools.cache
def _buffer() -> np.ndarray:
    return np.ones(evicted_bytes(), dtype=np.uint8)  # ones: memory of zeros would not be there until it is written


# -- inputs -----------------------------------------------------------------------------------------------------------


def random_feeds(graph: Graph, batch: int, bindings: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Random inputs of a graph: normal floats, and whole numbers 0 and 1 (valid in any vocabulary or mask).

    Args:
        graph: whose inputs.
        batch: samples.
        bindings: sizes of the other symbolic dimensions.

    Raises:
        OptionError: an input has no type, or a symbol no size.
    """
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


# -- machine and store ------------------------------------------------------------------------------------------------


@functools.cache
def machine() -> dict[str, Any]:
    """What a time depends on besides graph and settings: processor, cores, caches, system, onnxruntime."""
    import onnxruntime

    described = _processor()
    return {
        "device": described.get("model name") or platform.processor() or platform.machine(),
        "stepping": "/".join(described.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "cores": os.cpu_count(),
        "cache_kib": (last_level_cache() or 0) // 1024,
        "system": f"{platform.system()} {platform.machine()}",
        "onnxruntime": onnxruntime.__version__,
    }


def _processor() -> dict[str, str]:
    """The first core's entry in ``/proc/cpuinfo``; nothing on systems without."""
    try:
        entry = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in entry.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def measurement_key(what: str, digests: Sequence[str], settings: Mapping[str, Any]) -> str:
    """sha-256 of all that a measurement depends on: kind, graphs, settings, this machine, eexform's version."""
    identity = {
        "what": what,
        "graphs": list(digests),
        "settings": dict(settings),
        "machine": machine(),
        "version": __version__,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


_REMEMBERED: dict[str, dict[str, Any]] = {}


def remembered(folder: str, key: str, measure: Callable[[], dict[str, Any]], needs: Sequence[str]) -> dict[str, Any]:
    """:func:`stored`, and without a folder as long as the process lives: for what many graphs ask for again."""
    place = f"{folder}/{key}"
    if place not in _REMEMBERED:
        _REMEMBERED[place] = stored(folder, key, measure, needs)
    return _REMEMBERED[place]


def stored(folder: str, key: str, measure: Callable[[], dict[str, Any]], needs: Sequence[str]) -> dict[str, Any]:
    """The measurement kept in ``folder`` under ``key``; where there is none, take it and keep it.

    Several processes may share a folder: files appear whole, and of two that measured the same at once both go on with
    what was written first. An entry that is damaged or lacks one of the keys ``needs`` is measured again.

    Args:
        folder: where entries are kept; empty: nowhere.
        key: from :func:`measurement_key`.
        measure: takes the measurement: plain values by name.
        needs: names without which an entry is not usable.
    """
    if not folder:
        return measure()
    path = Path(folder) / f"{key}.json"
    found = _usable(path, needs)
    if found is None:
        taken = measure()
        found = _usable(path, needs)
        if found is None:
            write_json(path, taken)
            found = taken
    return found


def _usable(path: Path, needs: Sequence[str]) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found = read_json(path)
    except RunError:  # damaged
        return None
    return found if isinstance(found, dict) and all(name in found for name in needs) else None
