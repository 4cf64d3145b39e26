"""Short fine-tunings of a search's plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eexform.search.retrain import train
from eexform.search.run import Run, open_run
from eexform.training.finetune_options import FinetuneOptions
from tests import tiny
from tests.search.running import busiest

TUNING = FinetuneOptions(epochs=2, batch_size=64, learning_rate=0.02, trunk_learning_rate=0.02, amp="off")


def tune(source: Run | Path, out: Path, **given: Any) -> Run:
    """A short fine-tuning of the plan with most exits."""
    source = source if isinstance(source, Run) else open_run(source)
    usual = {"pick": str(busiest(source).index), "options": TUNING, "generations": 2, "threads": 1, "device": "cpu"}
    data = given.pop("data", tiny.digits(1797).source)
    return train(source, out=out, data=data, **{**usual, **given})


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
