"""What the benchmarks of cost models share: timing in turns, how far predictions are off, tables."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from scipy.stats import kendalltau

import eexform as ee
from eexform.backends import ort
from eexform.cost_models import CostModel, parse
from eexform.errors import EexformError
from eexform.ir.graph import BATCH, Graph
from eexform.progress import Silent

BURST_SECONDS = 0.003
"""How long a network runs before the next one's turn: long enough that its weights are in the cache again."""

SEQUENCE = 8
"""Size of an input's dimension that the model leaves open."""

CLIP = 2.0
"""A call counts at most so many times its own median over the repeats: the rest is the machine's other work."""

Feeds = Mapping[str, np.ndarray]


# -- timing ------------------------------------------------------------------------------------------------------------


def symbols(graph: Graph) -> dict[str, int]:
    """A size for every dimension of the inputs that has none, apart from the batch."""
    dims = (dim for name in graph.inputs for dim in graph.types[name].shape or ())
    return {dim: SEQUENCE for dim in dims if isinstance(dim, str) and dim != BATCH}


def random_feeds(graph: Graph, seed: int = 0) -> dict[str, np.ndarray]:
    """One sample: normal floats, and whole numbers 0 and 1, which every vocabulary and mask has."""
    sizes = {BATCH: 1, **symbols(graph)}
    rng, feeds = np.random.default_rng(seed), {}
    for name in graph.inputs:
        found = graph.types[name]
        assert found.shape is not None, name
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in found.shape if dim is not None]
        floating = np.issubdtype(found.dtype, np.floating)
        feeds[name] = (rng.standard_normal(shape) if floating else rng.integers(0, 2, shape)).astype(found.dtype)
    return feeds


def in_turns(calls: Sequence[Callable[[], object]], rounds: int) -> np.ndarray:
    """Milliseconds per call, [rounds, calls]: the median over a burst of calls, after some that do not count.

    Every round gives each network its turn, beginning with another one each time: a slow moment hits all alike.
    """
    bursts = []
    for call in calls:
        for _ in range(3):
            call()
        started = time.perf_counter()
        call()
        bursts.append(int(np.clip(BURST_SECONDS / (time.perf_counter() - started), 5, 200)))
    times = np.zeros((rounds, len(calls)))
    for turn in range(rounds):
        for step in range(len(calls)):
            place = (step + turn) % len(calls)
            call, burst = calls[place], np.zeros(bursts[place])
            for _ in range(2 + len(burst) // 8):
                call()
            for index in range(len(burst)):
                started = time.perf_counter()
                call()
                burst[index] = time.perf_counter() - started
            times[turn, place] = np.median(burst) * 1e3
    return times


@dataclass(frozen=True)
class Stream:
    """Networks timed on the same samples, one at a time, in the order of the samples.

    Attributes:
        times: milliseconds, [repeats, networks, samples].
        outputs: per network what it says of each sample, by output name.
    """

    times: np.ndarray
    outputs: tuple[Mapping[str, np.ndarray], ...]

    @property
    def typical(self) -> np.ndarray:
        """Per network and sample the first quartile over the repeats, [networks, samples].

        Not the median: on a machine that others use too, a tenth of a second in which everything takes a tenth longer
        is common, and a network's turn is no longer than that.
        """
        return np.asarray(np.percentile(self.times, 25, axis=0))

    @property
    def mean(self) -> np.ndarray:
        """Mean over the samples of :attr:`typical`, [networks]."""
        return np.asarray(self.typical.mean(axis=1))

    @property
    def each(self) -> np.ndarray:
        """Mean of every repeat, [repeats, networks]; single calls count at most :data:`CLIP` times their median."""
        return np.asarray(np.minimum(self.times, CLIP * self.typical).mean(axis=2))


def stream(
    files: Sequence[Path], samples: Sequence[Feeds], *, repeats: int, threads: int = 1, chunk: int = 50
) -> Stream:
    """Time networks on a stream of samples, one sample per call.

    Networks take turns after every ``chunk`` of samples, not after every sample: in use a network's weights are in the
    cache, and its branches follow from sample to sample.
    """
    sessions = [ort.session(file, threads=threads) for file in files]
    names = [[value.name for value in session.get_outputs()] for session in sessions]
    outputs: list[dict[str, np.ndarray]] = []
    for session, wanted in zip(sessions, names, strict=True):
        rows = [session.run(wanted, dict(feeds)) for feeds in samples]
        outputs.append({name: np.concatenate([row[at] for row in rows]) for at, name in enumerate(wanted)})
    times = np.zeros((repeats, len(files), len(samples)))
    starts = range(0, len(samples), chunk)
    for repeat in range(repeats):
        for turn, start in enumerate(starts):
            for step in range(len(files)):
                place = (step + turn + repeat) % len(files)
                session, wanted = sessions[place], names[place]
                for _ in range(3):
                    session.run(wanted, dict(samples[start]))
                for index in range(start, min(start + chunk, len(samples))):
                    feeds = dict(samples[index])
                    started = time.perf_counter()
                    session.run(wanted, feeds)
                    times[repeat, place, index] = (time.perf_counter() - started) * 1e3
    return Stream(times, tuple(outputs))


# -- predictions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    """A cost model as it was asked for."""

    text: str
    model: CostModel

    @property
    def scaled(self) -> bool:
        """Whether its figures are no milliseconds, so that one constant turns them into some."""
        return self.model.unit != "ms"

    @property
    def label(self) -> str:
        return f"{self.model.name} x constant" if self.scaled else self.model.name


def models_of(texts: Sequence[str], device: str | None, threads: int) -> tuple[list[Named], list[str]]:
    """Cost models by text, or all that predict time for a device; and a line for each that is not there."""
    if not texts:
        texts = ["macs", "flops"]
        if device is not None:
            texts += [f"roofline:device={device}"] + ([f"table:device={device}"] if device.endswith(".json") else [])
        texts += [f"latency_ort:threads={threads}"]
    found, absent = [], []
    for text in texts:
        try:
            found.append(Named(text, parse(text)))
        except (EexformError, ImportError) as error:
            absent.append(f"{text}: left out, {error}")
    return found, absent


def fitted(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """``predicted`` times the one constant with the least squares of logarithms."""
    known = np.isfinite(predicted) & (predicted > 0)
    return np.asarray(predicted * np.exp(np.mean(np.log(measured[known]) - np.log(predicted[known]))))


@dataclass(frozen=True)
class Errors:
    """How far predictions are from measurements.

    Attributes:
        count: of networks that have a prediction.
        median: absolute percentage error.
        p90: 90th percentile of it.
        tau: Kendall's tau-b: whether the order is right.
        worst: name and signed percentage of the one farthest off.
    """

    count: int
    median: float
    p90: float
    tau: float
    worst: str
    mean: float = 0.0

    @classmethod
    def of(cls, names: Sequence[str], predicted: np.ndarray, measured: np.ndarray) -> Errors:
        known = np.flatnonzero(np.isfinite(predicted))
        if len(known) < 2:
            return cls(len(known), np.nan, np.nan, np.nan, "-", np.nan)
        off = 100 * (predicted[known] / measured[known] - 1)
        far = known[np.argmax(abs(off))]
        worst = f"{names[far]} {100 * (predicted[far] / measured[far] - 1):+.0f} %"
        tau = float(kendalltau(predicted[known], measured[known]).statistic)
        return cls(
            len(known),
            float(np.median(abs(off))),
            float(np.percentile(abs(off), 90)),
            tau,
            worst,
            float(np.mean(abs(off))),
        )

    @property
    def cells(self) -> tuple[str, ...]:
        return (
            str(self.count),
            f"{self.median:.1f} %",
            f"{self.mean:.1f} %",
            f"{self.p90:.1f} %",
            f"{self.tau:.3f}",
            self.worst,
        )


COLUMNS = ("n", "median error", "mean error", "p90", "tau", "worst")


# -- tables ------------------------------------------------------------------------------------------------------------


def processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def heading(title: str, threads: int, repeats: str) -> str:
    """Device, threads, versions, repeats, and how busy the machine was when this was called."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return (
        f"\n## {title}\n\n{processor()}, {os.cpu_count()} cores, {threads} thread(s), load {load}; onnxruntime "
        f"{onnxruntime.__version__}, eexform {ee.__version__}, Python {platform.python_version()}; {repeats}\n"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


class Report:
    """Prints as it goes, and adds to a file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def add(self, text: str) -> None:
        print(text, flush=True)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def notes(self, lines: Sequence[str]) -> None:
        """A list, with a blank line behind it."""
        if lines:
            self.add("".join(f"- {line}\n" for line in lines))


class Said(Silent):
    """A progress that prints what is said."""

    def say(self, message: str) -> None:
        print(message, flush=True)


def shared() -> Path:
    """The folder of real models and data.

    Raises:
        SystemExit: ``EEXFORM_SHARED`` names none.
    """
    folder = Path(os.environ.get("EEXFORM_SHARED", ""))
    if not os.environ.get("EEXFORM_SHARED") or not folder.is_dir():
        raise SystemExit("EEXFORM_SHARED must name the folder of real models and data")
    return folder
