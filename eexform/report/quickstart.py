"""The whole job on embedded data: a small network trained on the digits, exits searched, exported, verified, timed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eexform.data import open_dataset
from eexform.ir.serialize import save
from eexform.progress import Progress, Silent
from eexform.report.pareto import pareto
from eexform.search.driver import search
from eexform.search.options import SearchOptions
from eexform.search.run import Run
from eexform.training.options import TrainOptions
from eexform.verification.bench import Timings, bench
from eexform.verification.verify import Report, verify

FRACTIONS = (0.4, 0.1, 0.25, 0.25)
"""More for select and test than by default: the digits are few, and thresholds are chosen on select."""


PICK = "min-accuracy=-0.5"
"""The plan exported: the cheapest that is at most half a point below the model on select."""


@dataclass(frozen=True)
class Quickstart:
    """What the quickstart made.

    Attributes:
        run: the search.
        model: the trunk's file.
        exported: the early-exit file.
        plan: index of the exported plan.
        report: its verification.
        timings: both files, side by side.
    """

    run: Run
    model: Path
    exported: Path
    plan: int
    report: Report
    timings: Timings

    def to_json(self) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "exported": str(self.exported),
            "run": str(self.run.folder.path),
            "plan": self.plan,
            "pareto": pareto(self.run),
            "verify": self.report.to_json(),
            "bench": self.timings.to_json(),
        }


def free_folder(wanted: str | Path) -> Path:
    """``wanted``, or the first of ``wanted-2``, ``wanted-3``, ... that does not exist: nothing is overwritten."""
    path, number = Path(wanted), 1
    while path.exists():
        number += 1
        path = Path(f"{wanted}-{number}")
    return path


def quickstart(out: str | Path, *, seed: int = 0, threads: int = 0, progress: Progress | None = None) -> Quickstart:
    """Go through the main job on scikit-learn's digits.

    Args:
        out: a new folder; gets ``model.onnx``, ``run/`` and ``model.ee.onnx``.
        seed: of everything.
        threads: 0: one per core.
        progress: who is told.
    """
    from eexform.report.digits_net import train_digits  # imports torch, which takes a second or two

    show = progress or Silent()
    folder = Path(out)
    data = open_dataset("digits", fractions=FRACTIONS, seed=seed)
    show.say(f"1/5 a small residual network, trained on {len(data.splits.head_train)} digits of 8x8 pixels")
    trunk = train_digits(data, seed=seed, progress=show)
    model, exported = folder / "model.onnx", folder / "model.ee.onnx"
    save(trunk, model)
    show.say(f"2/5 heads at candidate sites of {model}, then a search over exits and thresholds")
    run = search(
        trunk,
        data,
        out=folder / "run",
        options=SearchOptions(max_sites=5, generations=30, seed=seed, threads=threads),
        train=TrainOptions(epochs=12, batch_size=64, seed=seed),
        progress=show,
    )
    plan = run.front.pick(PICK)
    show.say(f"3/5 exporting plan {plan.index} ({PICK}) to {exported}")
    plan.export(exported)
    show.say("4/5 verifying it against the simulator, sample by sample")
    report = verify(exported, trunk, data.bind(trunk), samples=128)
    show.say("5/5 timing it beside the model, one thread")
    feeds = data.bind(trunk).sample_feeds("test", 256)
    timings = bench([exported, model], feeds, batches=(1, 32))
    report.require()
    return Quickstart(run, model, exported, plan.index, report, timings)
