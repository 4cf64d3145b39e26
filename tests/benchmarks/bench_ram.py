"""Peak activation memory as counted, beside what onnxruntime really takes for it. Run by hand:

    python -m tests.benchmarks.bench_ram [--names vit swin ...] [--no-zoo] [--markdown]

One row per network at batch 1: the nets of MLPerf Tiny and the classifiers among the real models (``EEXFORM_SHARED``
names their folder), and the zoo. onnxruntime runs in a process of its own. ``plan`` is its memory pattern: one block
for all values between nodes, allocated from the second call on, read from its log as the first request after the arena
was emptied. It holds neither inputs nor results nor work space; sizes are rounded to 256 bytes. In bytes:

- *By lifetimes*: graph optimisation ``extended`` (no layout NCHWc, no residual sums inside convolutions) and
  ``enable_mem_reuse`` off, so that a value's memory is free when its last reader has run. ``live`` is the lower bound,
  ``arena`` the total of ``peak_ram_bytes:inputs=false,alignment=256``, ``ratio`` is arena / plan.
- *As shipped*: all optimisations. ``arena`` is with ``residual=true`` besides. Two things are not in it: NCHWc rounds
  channels up to the width of the vector unit and adds copies in the other layout; and onnxruntime lets a value take
  the buffer of an earlier one of the same shape and keeps that buffer from the first of them to the last.
- ``grown``: by how much the arena, told to take just what is asked for, has grown after one call with a plan: results
  and the work space of kernels (im2col) are in it. ``first``: the same after the first call, which has no plan, so that
  every value is asked for by itself; fragmentation is in it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

import eexform as ee
from eexform.cost_models.peak_ram_bytes import PeakRam
from eexform.ir.graph import Graph
from eexform.ir.serialize import save
from tests.zoo import doors, modules

REAL = ("ic_resnet8_cifar10", "ic_resnet_large_cifar10", "kws_dscnn", "cifar10_resnet20", "cifar10_resnet56")
BY_LIFETIMES = PeakRam(inputs=False, alignment=256)
AS_SHIPPED = PeakRam(inputs=False, alignment=256, residual=True)
COLUMNS = ("network", "live", "arena", "plan", "ratio", "arena", "plan", "ratio", "grown", "first")
WIDTHS = (26, 10, 10, 10, 7, 12, 10, 7, 10, 10)
MARK = "==== "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", choices=modules.NAMES, nargs="+", default=modules.NAMES)
    parser.add_argument("--no-zoo", action="store_true")
    parser.add_argument("--markdown", action="store_true", help="a table for a document")
    parser.add_argument("--child", nargs=2, metavar=("FILE", "HOW"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        call_twice(*asked.child)
        return
    warnings.simplefilter("ignore")
    show(COLUMNS, asked.markdown)
    if asked.markdown:
        show(tuple("---" for _ in COLUMNS), True)
    shared = os.environ.get("EEXFORM_SHARED")
    if not shared:
        print("EEXFORM_SHARED is not set: the real models are left out", file=sys.stderr)
    for name in REAL if shared else ():
        show(measure(name, ee.load(Path(str(shared)) / "models" / f"{name}.onnx")), asked.markdown)
    for name in () if asked.no_zoo else asked.names:
        show(measure(name, doors.graph(name, "torch")), asked.markdown)


def show(row: tuple[object, ...], markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    else:
        print("".join(f"{cell!s:>{width}}" for cell, width in zip(row, WIDTHS, strict=True)), flush=True)


def measure(name: str, graph: Graph) -> tuple[object, ...]:
    """One row."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save(graph, path)
        bare, shipped = in_a_process(path, "bare"), in_a_process(path, "shipped")
    lifetimes, counted = BY_LIFETIMES.cost(graph), AS_SHIPPED.cost(graph)
    row = [name, lifetimes.conditions["lower_bound"]]
    for cost, taken in ((lifetimes, bare), (counted, shipped)):
        row += [round(cost.total), taken["plan"], f"{cost.total / taken['plan']:.3f}"]
    return (*row, shipped["grown"], shipped["first"])


def in_a_process(path: Path, how: str) -> dict[str, int]:
    """Bytes by onnxruntime's log: ``first`` and ``grown`` of the first and the second call, ``plan`` of the latter.

    Raises:
        RuntimeError: the process fails, or the log does not say what it did.
    """
    command = [sys.executable, "-m", "tests.benchmarks.bench_ram", "--child", str(path), how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    parts = done.stderr.split(MARK)
    if done.returncode or len(parts) != 4:
        raise RuntimeError(f"{path}, {how}: no log of two calls:\n{done.stderr[-2000:]}")
    first, second = parts[1], parts[2]
    requests = [int(size) for size in re.findall(r"Extending BFCArena.*\(requested\) num_bytes: (\d+)", second)]
    if not requests:
        raise RuntimeError(f"{path}, {how}: the second call asked for nothing, so there is no plan to read")
    return {"first": grown(first), "grown": grown(second), "plan": requests[0]}


def grown(log: str) -> int:
    return sum(int(size) for size in re.findall(r"Extended allocation by (\d+) bytes", log))


def call_twice(path: str, how: str) -> None:
    """Two calls of a model with an arena that grows by just what is asked for and is emptied after the first.

    Args:
        path: the model.
        how: ``shipped``, or ``bare``: no layouts of the processor's own, memory by lifetimes.
    """
    import onnxruntime as ort

    ort.set_default_logger_severity(1)  # the arena logs at level INFO
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if how == "bare":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.enable_mem_reuse = False
    options.add_free_dimension_override_by_name("N", 1)
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")  # not from the arena
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    as_requested = {"arena_extend_strategy": 1, "max_mem": 0}
    as_requested |= dict.fromkeys(
        ("initial_chunk_size_bytes", "max_dead_bytes_per_chunk", "initial_growth_chunk_size_bytes"), -1
    )
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(as_requested))
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {value.name: feed(value) for value in session.get_inputs()}
    emptied = ort.RunOptions()
    emptied.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    for _ in range(2):
        os.write(2, MARK.encode())
        session.run(None, feeds, emptied)
    os.write(2, MARK.encode())


def feed(value: Any) -> np.ndarray:
    """Ones of an input's shape and type: indices that are valid in any vocabulary or mask."""
    shape = [dim if isinstance(dim, int) else 1 for dim in value.shape]
    return np.ones(
        shape, {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}[value.type]
    )


if __name__ == "__main__":
    main()
