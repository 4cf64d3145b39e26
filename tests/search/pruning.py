"""Short searches for trunks of the tiny network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eexform.search.front import Plan
from eexform.search.run import Run
from eexform.search.trunk_options import TrunkOptions
from tests.search.running import options, recipe, start

STEPS = recipe(("prune_channels", {"criterion": "l2"}), ("repair", {}), ("fold_batch_norm", {}), ("insert_exits", {}))
TRUNKS: dict[str, Any] = {
    "survivors": 2,
    "epochs": 8,
    "population": 8,
    "generations": 1,
    "samples": 128,
    "learning_rate": 0.002,
    "batch_size": 64,
}


def trunks(**changed: Any) -> TrunkOptions:
    return TrunkOptions(**{**TRUNKS, **changed})


def prune(out: Path, **given: Any) -> Run:
    """A search for trunks and exits, or what is ``given`` instead."""
    usual = {"recipe": STEPS, "trunks": trunks(), "options": options(generations=1), "device": "cpu"}
    return start(out, **{**usual, **given})


def pruned(run: Run) -> list[Plan]:
    """The plans on a smaller trunk, those with most exits first."""
    return sorted((plan for plan in run.front if not run.is_original(plan)), key=lambda plan: -len(plan.exits))
