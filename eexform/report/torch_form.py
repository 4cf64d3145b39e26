"""Writing a plan as a PyTorch program, checked against the simulator before anything is written.

A ``.pt2`` file is never opened by eexform, because torch's loader runs what a file tells it to. So the check is made
here, in the process that lowers the plan: on the very bytes that go into the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eexform.errors import DataError, EexformError, VerificationError
from eexform.ir.graph import Graph
from eexform.search.plans import Plan
from eexform.search.run import Run
from eexform.verification.behaviour import Report

SAMPLES = 32
"""How many samples of the run the program is checked on."""


@dataclass(frozen=True)
class Written:
    """A program that was written.

    Attributes:
        report: what checking it said; ``None`` where there were no samples.
        why_not: why there were none.
    """

    report: Report | None
    why_not: str = ""

    def to_json(self) -> dict[str, Any]:
        """The report's values, or ``{"ok": null, "why_not": ...}``."""
        return {"ok": None, "why_not": self.why_not} if self.report is None else self.report.to_json()


def export_program(run: Run, plan: Plan, path: str | Path, *, samples: int = SAMPLES) -> Written:
    """Lower a plan of a run, check the program on samples of the run's data, and write it.

    Raises:
        GraphError: ``torch.export`` cannot trace the network.
        VerificationError: the program does not do what the plan says; nothing is written.
        StorageError: it cannot be written.
    """
    from eexform.backends.torch_export import lower_torch, packed, unpacked, write
    from eexform.verification.programs import verify_torch

    graph = run.materialise(plan)
    content = packed(lower_torch(graph), graph)
    try:
        feeds = _samples(run, graph, samples)
    except EexformError as error:  # the data may be elsewhere by now, which is no reason to write nothing
        write(content, path)
        return Written(None, str(error))
    report = verify_torch(unpacked(content), graph, feeds)
    failed = [f"{check.name}: {check.detail}" for check in report.checks if not check.ok]
    if failed:
        raise VerificationError(
            f"{path}: the program does not do what plan {plan.index} says, so it was not written: {'; '.join(failed)}. "
            "This is a bug in eexform, please report it; use the form 'if'"
        )
    write(content, path)
    return Written(report)


def _samples(run: Run, graph: Graph, samples: int) -> dict[str, np.ndarray]:
    dataset = run.dataset().bind(graph)
    split = next((name for name in ("test", "select") if dataset.size(name)), None)
    if split is None:
        raise DataError("the run has no samples left to check with")
    return dataset.batch(split, np.arange(min(samples, dataset.size(split)))).feeds
