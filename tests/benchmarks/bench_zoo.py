"""What every network of the zoo gives, through both doors. Run by hand:

    python -m tests.benchmarks.bench_zoo [--names vit swin ...] [--markdown]

One row per network and door: nodes of the graph, CPU seconds from module to graph (for the ONNX door: torch's exporter
and loading its file), sites, whether each exported form verifies at batch 1, 7 and 32; and for the PyTorch door the
largest error of ``to_torch`` against the module (outputs, and gradients of all parameters in training mode), relative
to the largest number. "!" marks a failed verification, with the failed checks below the table.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path

import torch

import eexform as ee
from eexform.backends.export import FORMS, export
from eexform.ir.sites import find_sites
from eexform.verification.verify import verify
from tests.zoo import doors, modules
from tests.zoo.test_doors import feeds, with_exits

COLUMNS = ("network", "door", "nodes", "to IR s", "sites", *FORMS, "outputs", "gradients")
WIDTHS = (14, 6, 6, 8, 6, 4, 7, 6, 9, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", choices=modules.NAMES, nargs="+", default=modules.NAMES)
    parser.add_argument("--markdown", action="store_true", help="a table for a document")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    doors.exported(modules.NAMES[0])  # torch's exporter takes seconds to start
    doors.exported.cache_clear()
    show(COLUMNS, asked.markdown)
    if asked.markdown:
        show(tuple("---" for _ in COLUMNS), True)
    faults: list[str] = []
    for name in asked.names:
        for door in doors.DOORS:
            show(measure(name, door, faults), asked.markdown)
    print("\n".join(faults))


def show(row: tuple[object, ...], markdown: bool) -> None:
    if markdown:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    else:
        print("".join(f"{cell!s:>{width}}" for cell, width in zip(row, WIDTHS, strict=True)), flush=True)


def measure(name: str, door: str, faults: list[str]) -> tuple[object, ...]:
    """One row; failed checks are added to ``faults``."""
    start = time.process_time()
    graph = doors.graph(name, door)
    seconds = time.process_time() - start
    verdicts = []
    for form in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            path = export(with_exits(name, door), Path(folder) / "out", form)
            report = verify(path, graph, feeds(name, door))
        verdicts.append("ok" if report.ok else "!")
        faults += [f"{name} {door} {form}: {check.name}: {check.detail}" for check in report.checks if not check.ok]
    errors = tuple(f"{error:.0e}" for error in back(name)) if door == "torch" else ("", "")
    return (name, door, len(graph.nodes), f"{seconds:.2f}", len(find_sites(graph).sites), *verdicts, *errors)


def back(name: str) -> tuple[float, float]:
    """Largest relative error of the outputs (eval mode) and of a parameter's gradient (train mode, no dropout)."""
    args = modules.inputs(name, 7, seed=5)
    ours, theirs = ee.to_torch(doors.graph(name, "torch")), modules.module(name)
    with torch.no_grad():
        outputs = relative(ours(*args), modules.logits(theirs(*args)), 0.0)
    ours.train()
    for part in theirs.modules():
        part.training = not isinstance(part, torch.nn.Dropout)
    found, expected = ours(*args), modules.logits(theirs(*args))
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(11))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = {key: parameter.grad for key, parameter in theirs.named_parameters() if parameter.grad is not None}
    floor = 1e-2 * max(float(grad.abs().max()) for grad in gradients.values())  # what cancels is all rounding
    parameters = dict(ours.named_parameters())
    errors = [relative(parameters[key].grad, grad, floor) for key, grad in gradients.items()]
    return outputs, max(errors)


def relative(found: torch.Tensor, expected: torch.Tensor, floor: float) -> float:
    return float((found - expected).abs().max()) / max(float(expected.abs().max()), floor)


if __name__ == "__main__":
    main()
