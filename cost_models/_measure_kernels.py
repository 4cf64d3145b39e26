"""Timing single operators of an optimised graph.

Onnxruntime's own profiler counts whole microseconds, and many operators take less than one. So an operator is put into
a model of its own, once, and ``1 + copies`` times beside one another, each copy with parameters of its own: the
difference of two calls divided by ``copies`` is one operator with all that onnxruntime does around it, and nothing of
what a call costs. Operators are measured in turns, round after round, so that a slow moment hits all of them alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from eexform.backends import ort
from eexform.cost_models._ort_kernels import Execution
from eexform.errors import EexformError
from eexform.progress import Progress, Silent

COPIES = 8
CALLS = 5
"""Timed calls per round; their median counts, after as many that bring code and data back into the caches."""

_CHUNK = 64
"""Operators that are open and take turns at once; what is measured is handed over after each chunk."""

_FENCE = 3.0
_PARAMETER_BYTES = 512 << 10  # of all copies: less than any cache that they could be in
_SLOW_US = 2000.0


@dataclass(frozen=True)
class Timing:
    """What repeats of one measurement say.

    Attributes:
        us: median, after outliers were dropped.
        spread_us: distance between the quartiles.
        repeats: how many are left.
        dropped: how many were outliers.
    """

    us: float
    spread_us: float
    repeats: int
    dropped: int


@dataclass(frozen=True)
class Probe:
    """Something to time: a session with its inputs."""

    session: onnxruntime.InferenceSession
    feeds: Mapping[str, np.ndarray]

    def call_us(self, calls: int = CALLS, warmup_us: float = 0.0) -> float:
        """Median of ``calls`` calls, after as many that do not count (more, until ``warmup_us`` have passed)."""
        outputs = [value.name for value in self.session.get_outputs()]
        feeds = dict(self.feeds)
        taken: list[float] = []
        begun = time.perf_counter()
        done = 0
        while done < calls or time.perf_counter() - begun < warmup_us * 1e-6:
            self.session.run(outputs, feeds)
            done += 1
        for _ in range(calls):
            started = time.perf_counter()
            self.session.run(outputs, feeds)
            taken.append(time.perf_counter() - started)
        return float(np.median(taken)) * 1e6


def summarised(samples: Sequence[float]) -> Timing:
    """Median and spread of repeats without outliers: what lies more than three quartile distances outside the quartiles
    (Tukey's outer fences)."""
    values = np.asarray(samples, dtype=np.float64)
    low, high = np.percentile(values, [25, 75])
    reach = _FENCE * (high - low)
    kept = values[(values >= low - reach) & (values <= high + reach)]
    low, middle, high = np.percentile(kept, [25, 50, 75])
    return Timing(float(middle), float(high - low), len(kept), len(values) - len(kept))


def measure(
    operators: Mapping[Any, Execution],
    *,
    threads: int = 1,
    repeats: int = 15,
    progress: Progress | None = None,
    done: Callable[[Mapping[Any, Timing]], None] = lambda _: None,
) -> tuple[dict[Any, Timing], dict[Any, str]]:
    """Time operators.

    Args:
        operators: by whatever the caller knows them by.
        threads: of onnxruntime, inside an operator.
        repeats: rounds.
        progress: shown per round of a chunk.
        done: called with what a chunk gave, after each chunk: what was handed over survives an interruption.

    Returns:
        Timings, never below zero; and for those that could not be run on their own, why.
    """
    names = list(operators)
    timings: dict[Any, Timing] = {}
    refused: dict[Any, str] = {}
    chunks = [names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK)]
    with (progress or Silent()).task("operators", len(names)) as task:
        for chunk in chunks:
            opened = {}
            for name in chunk:
                try:
                    opened[name] = _pair(operators[name], threads)
                except EexformError as error:
                    refused[name] = str(error)
            samples: dict[Any, list[float]] = {name: [] for name in opened}
            for _ in range(repeats):
                for name, (once, often, copies) in opened.items():
                    samples[name].append(max(0.0, (often.call_us() - once.call_us()) / copies))
            found = {name: summarised(taken) for name, taken in samples.items()}
            timings |= found
            done(found)
            task.advance(len(chunk))
    return timings, refused


def seconds(operators: Iterable[Execution], repeats: int) -> float:
    """About how long :func:`measure` takes, from work and bytes; within a factor of two or three."""
    total = 0.0
    for execution in operators:
        copies = _copies(execution)
        total += 2e-3 + repeats * 2 * CALLS * (2 * 6e-6 + (2 + copies) * _guess_us(execution) * 1e-6)
    return total


def parallel(weight_bytes: int) -> int:
    """Copies of an operator with so many bytes of parameters that are timed together."""
    return 1 + int(min(COPIES, max(2, _PARAMETER_BYTES // max(1, weight_bytes))))


def per_copy_us(execution: Execution, counts: Sequence[int], *, threads: int, repeats: int) -> list[float]:
    """Microseconds of one operator when so many copies of it, each with parameters of its own, run one after the other.

    Args:
        execution: the operator.
        counts: of copies, each at least 2.
        threads: of onnxruntime.
        repeats: rounds, in which the counts take turns.
    """
    once = _probe(execution, 1, threads)
    several = [_probe(execution, count, threads) for count in counts]
    samples: list[list[float]] = [[] for _ in counts]
    for _ in range(repeats):
        alone = once.call_us()
        for place, (probe, count) in enumerate(zip(several, counts, strict=True)):
            samples[place].append(max(0.0, (probe.call_us() - alone) / (count - 1)))
    return [summarised(taken).us for taken in samples]


def _guess_us(execution: Execution) -> float:
    kernel = execution.kernel
    moved = kernel.read_bytes + kernel.write_bytes + kernel.weight_bytes
    return 0.3 + kernel.macs / 3e4 + moved / 1e4


def _copies(execution: Execution) -> int:
    if _guess_us(execution) > _SLOW_US:
        return 2
    return parallel(execution.kernel.weight_bytes) - 1


def _pair(execution: Execution, threads: int) -> tuple[Probe, Probe, int]:
    if execution.control_flow:
        raise EexformError("control flow is not one operator")
    copies = _copies(execution)
    try:
        once, often = (_probe(execution, count, threads) for count in (1, 1 + copies))
        once.call_us(1), often.call_us(1)
    except EexformError:
        raise
    except Exception as error:  # onnxruntime's and onnx' errors share only the base class of all
        raise EexformError(f"it does not run on its own: {error}") from error
    return once, often, copies


def _probe(execution: Execution, count: int, threads: int) -> Probe:
    return Probe(ort.session(_beside(execution, count), optimize=False, threads=threads), _fed(execution))


def _fed(execution: Execution) -> dict[str, np.ndarray]:
    return {name: array for name, array in execution.feeds.items() if name not in execution.constants}


def _beside(execution: Execution, count: int) -> onnx.ModelProto:
    """A model with ``count`` copies of an operator that read the same inputs and parameters of their own.

    Inputs are copied first, so that operators that only pass memory on find a value that is the model's own, as they do
    inside a network. Only the last copy's results are outputs; the others' memory is free again at once.
    """
    feeds = _fed(execution)
    nodes = [helper.make_node("Identity", [name], [f"own.{name}"]) for name in feeds]
    parameters: list[onnx.TensorProto] = []
    made: list[str] = []
    for copy in range(count):
        node = onnx.NodeProto()
        node.CopyFrom(execution.node)
        node.name = f"copy{copy}"
        for place, name in enumerate(execution.node.input):
            if name in execution.constants:
                node.input[place] = f"copy{copy}.in{place}"
                parameters.append(numpy_helper.from_array(np.asarray(execution.feeds[name]), node.input[place]))
            elif name:
                node.input[place] = f"own.{name}"
        made = [f"copy{copy}.out{place}" if name else "" for place, name in enumerate(execution.node.output)]
        del node.output[:]
        node.output.extend(made)
        nodes.append(node)
    body = helper.make_graph(
        nodes,
        "operator",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in feeds.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in made if name],
        parameters,
    )
    return helper.make_model(body, opset_imports=execution.opsets, ir_version=10)
