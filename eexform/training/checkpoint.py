"""Training state between epochs, so that an interrupted training goes on as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors

from eexform import files
from eexform.training.bank import head_key
from eexform.training.student import Student

FILE = "training.safetensors"
_PARTS = ("module", "average", "best")


def save(folder: Path, students: Sequence[Student], optimiser: torch.optim.Optimizer, epoch: int) -> None:
    """Write everything the next epoch depends on; order and augmentation follow from seed and epoch alone."""
    tensors: dict[str, torch.Tensor] = {}
    for place, student in enumerate(students):
        for part in _PARTS:
            state = student.module.state_dict() if part == "module" else getattr(student, part)
            tensors.update({f"{place}|{part}|{name}": value.contiguous().clone() for name, value in state.items()})
    for place, slots in optimiser.state_dict()["state"].items():
        tensors.update({f"optimiser|{place}|{name}": value.clone() for name, value in slots.items()})
    facts = {
        "epoch": epoch,
        "heads": _identity(students),
        "best": [student.best_loss if student.best_loss < float("inf") else None for student in students],
        "stale": [student.stale for student in students],
    }
    files.write_bytes(folder / FILE, save_tensors(tensors, metadata={"eexform.training": json.dumps(facts)}))


def restore(folder: Path, students: Sequence[Student], optimiser: torch.optim.Optimizer) -> int:
    """Load the state saved for exactly these heads; returns the number of finished epochs, 0 where there is none.

    A file of other heads is left unused: it belongs to a different request and the training starts afresh.
    """
    path = folder / FILE
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as stored:
            facts = json.loads((stored.metadata() or {})["eexform.training"])
            if facts["heads"] != _identity(students):
                return 0
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError):
        return 0  # written by an older version or cut off outside our control: training from the start is always right
    for place, student in enumerate(students):
        states = {part: _under(tensors, f"{place}|{part}|") for part in _PARTS}
        student.module.load_state_dict(states["module"])
        student.average, student.best = states["average"], states["best"]
        best = facts["best"][place]
        student.best_loss = float("inf") if best is None else best
        student.stale = facts["stale"][place]
    state = optimiser.state_dict()
    count = sum(len(group["params"]) for group in state["param_groups"])
    state["state"] = {place: _under(tensors, f"optimiser|{place}|") for place in range(count)}
    optimiser.load_state_dict(state)
    return int(facts["epoch"])


def discard(folder: Path) -> None:
    """Remove the state; the heads are in the bank."""
    (folder / FILE).unlink(missing_ok=True)


def _identity(students: Sequence[Student]) -> list[str]:
    return [head_key(student.site.value, str(student.spec)) for student in students]


def _under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
