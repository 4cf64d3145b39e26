"""Timing networks side by side: interleaved repeats in one run, so that a slow moment hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from eexform.backends import ort
from eexform.backends.lower_if import THRESHOLDS
from eexform.backends.metadata import PLAN, parse
from eexform.errors import DataError, EexformError, ModelError, OptionError
from eexform.runtime import StagedSession


@dataclass(frozen=True)
class Timing:
    """How long one network takes for a batch of one size.

    Attributes:
        file: as given.
        batch: samples per batch.
        threads: of onnxruntime.
        median_ms: per batch, over all batches timed.
        mean_ms: per batch; for networks with exits this is what a stream of samples costs on average.
        p95_ms: per batch.
        count: batches timed.
    """

    file: str
    batch: int
    threads: int
    median_ms: float
    mean_ms: float
    p95_ms: float
    count: int

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Timings:
    """All results of one run.

    Attributes:
        results: one per file and batch size.
        device: what it ran on, in words.
    """

    results: tuple[Timing, ...]
    device: str

    def to_json(self) -> dict[str, Any]:
        """``{device, results: [{file, batch, threads, median_ms, mean_ms, p95_ms, count}]}``."""
        return {"device": self.device, "results": [result.to_json() for result in self.results]}

    def ratio(self, file: str, to: str, batch: int, figure: str = "mean_ms") -> float:
        """``figure`` of ``file`` divided by that of ``to``."""
        found = {result.file: getattr(result, figure) for result in self.results if result.batch == batch}
        return float(found[file] / found[to])


def bench(
    files: Iterable[str | Path],
    feeds: Mapping[str, np.ndarray],
    *,
    batches: Sequence[int] = (1, 32),
    threads: int = 1,
    repeats: int = 3,
    warmup: int = 5,
    min_batches: int = 30,
    max_batches: int = 2000,
    progress: Callable[[str, int, int], None] | None = None,
) -> Timings:
    """Time files (or folders of stages) on the same samples, in the order in which they come.

    Every repeat walks through the samples batch by batch; each batch is given to all networks one after the other, in
    an order that rotates. A last batch that is not full is left out.

    Args:
        files: ``.onnx`` files or folders of stages; all take the same inputs.
        feeds: arrays by input name, batch on axis 0.
        batches: batch sizes.
        threads: of onnxruntime.
        repeats: walks through the samples (more where there are few, fewer where there are many; see the next two).
        warmup: runs of each network before the first that counts.
        min_batches: batches timed at least; the samples are walked through again until there are as many.
        max_batches: batches timed at most.
        progress: told the batch size, batches done and batches in all.

    Raises:
        ModelError: a file cannot be loaded or run.
        DataError: there are no samples, or inputs are missing.
        OptionError: a batch size is below 1.
    """
    names = [str(file) for file in files]
    if not names:
        raise OptionError("nothing to time: give at least one file")
    if any(size < 1 for size in batches):
        raise OptionError(f"batch sizes {list(batches)}: expected at least 1")
    runners = [runner(name, threads=threads) for name in names]
    sizes = {name: np.shape(value)[0] for name, value in feeds.items() if np.ndim(value)}
    total = min(sizes.values(), default=0)
    if total < 1 or len(set(sizes.values())) != 1:
        raise DataError(f"samples per input: {sizes}; expected the same number, at least one, everywhere")
    results = []
    for size in batches:
        times = _times(runners, _batches(feeds, total, size), repeats, warmup, min_batches, max_batches, size, progress)
        for name, column in zip(names, times.T, strict=True):
            figures = (float(np.median(column)), float(column.mean()), float(np.percentile(column, 95)))
            results.append(Timing(name, size, threads, *figures, len(column)))
    return Timings(tuple(results), f"onnxruntime {onnxruntime.__version__} CPU, {threads} thread(s)")


Runner = Callable[[Mapping[str, np.ndarray]], Any]


def runner(file: str | Path, *, threads: int = 1) -> Runner:
    """A function that runs a batch through a file or a folder of stages; inputs that it does not have are left out."""
    path = Path(file)
    if path.is_dir():
        staged = StagedSession(path, threads=threads)
        return _checked(lambda feeds: staged.run({name: feeds[name] for name in staged.inputs}), path)
    session = ort.session(path, threads=threads)
    wanted = [value.name for value in session.get_inputs()]
    fixed: dict[str, np.ndarray] = {}
    if THRESHOLDS in wanted:
        plan = session.get_modelmeta().custom_metadata_map
        if PLAN in plan:
            exits = parse(plan).exits
            fixed[THRESHOLDS] = np.array([item.threshold for item in exits], np.float32)
    outputs = [value.name for value in session.get_outputs()]

    def run(feeds: Mapping[str, np.ndarray]) -> Any:
        return session.run(outputs, {name: fixed[name] if name in fixed else feeds[name] for name in wanted})

    return _checked(run, path)


def _checked(run: Runner, path: Path) -> Runner:
    """``run`` with errors that name the file."""

    def named(feeds: Mapping[str, np.ndarray]) -> Any:
        try:
            return run(feeds)
        except KeyError as error:
            raise DataError(f"{path}: the samples have no input {error}") from error
        except EexformError:
            raise
        except Exception as error:  # onnxruntime's errors share no base class
            raise ModelError(f"{path}: onnxruntime cannot run it: {error}") from error

    return named


def _batches(feeds: Mapping[str, np.ndarray], total: int, size: int) -> list[dict[str, np.ndarray]]:
    rows = np.arange(total) if total >= size else np.arange(size) % total
    starts = range(0, len(rows) - size + 1, size)
    return [
        {
            name: np.ascontiguousarray(np.take(value, rows[start : start + size], axis=0)) if np.ndim(value) else value
            for name, value in feeds.items()
        }
        for start in starts
    ]


def _times(
    runners: Sequence[Runner],
    batches: Sequence[Mapping[str, np.ndarray]],
    repeats: int,
    warmup: int,
    min_batches: int,
    max_batches: int,
    size: int,
    progress: Callable[[str, int, int], None] | None,
) -> np.ndarray:
    """Milliseconds, [batches timed, runners]."""
    for run in runners:
        for place in range(max(1, warmup)):
            run(batches[place % len(batches)])
    count = min(max(repeats * len(batches), min_batches), max_batches)
    times = np.zeros((count, len(runners)))
    for place in range(count):
        feeds = batches[place % len(batches)]
        for turn in range(len(runners)):
            chosen = (place + turn) % len(runners)
            start = time.perf_counter()
            runners[chosen](feeds)
            times[place, chosen] = (time.perf_counter() - start) * 1e3
        if progress is not None and place % 10 == 9:
            progress(f"batch {size}", place + 1, count)
    return times
