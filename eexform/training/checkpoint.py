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
    for student in students:
        key = _key(student)
        for part in _PARTS:
            state = student.module.state_dict() if part == "module" else getattr(student, part)
            tensors.update({f"{key}|{part}|{name}": value.contiguous().clone() for name, value in state.items()})
    slots = optimiser.state_dict()["state"]
    for place, owner in enumerate(_owners(students)):
        tensors.update({f"{owner}|{name}": value.clone() for name, value in slots.get(place, {}).items()})
    facts = {
        "epoch": epoch,
        "heads": {
            _key(student): {
                "best": student.best_loss if student.best_loss < float("inf") else None,
                "stale": student.stale,
            }
            for student in students
        },
    }
    files.write_bytes(folder / FILE, save_tensors(tensors, metadata={"eexform.training": json.dumps(facts)}))


def restore(folder: Path, students: Sequence[Student], optimiser: torch.optim.Optimizer) -> int:
    """Load the state saved for these heads; returns the number of finished epochs, 0 where there is none.

    Heads do not influence each other, so the state of more heads than are asked for serves as well: that is what lies
    there when a process was killed while it stored them. A state that lacks one of the heads belongs to a different
    request; it is left unused and the training starts afresh.
    """
    path = folder / FILE
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as stored:
            facts = json.loads((stored.metadata() or {})["eexform.training"])
            saved = {_key(student): facts["heads"][_key(student)] for student in students}
            wanted = tuple(f"{key}|" for key in saved)
            tensors = {name: stored.get_tensor(name) for name in stored.keys() if name.startswith(wanted)}  # noqa: SIM118
            epoch = int(facts["epoch"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return 0  # of other heads, of an older version or cut off outside our control: starting afresh is always right
    for student in students:
        key = _key(student)
        states = {part: _under(tensors, f"{key}|{part}|") for part in _PARTS}
        student.module.load_state_dict(states["module"])
        student.average, student.best = states["average"], states["best"]
        best = saved[key]["best"]
        student.best_loss = float("inf") if best is None else best
        student.stale = saved[key]["stale"]
    state = optimiser.state_dict()
    state["state"] = {place: _under(tensors, f"{owner}|") for place, owner in enumerate(_owners(students))}
    optimiser.load_state_dict(state)
    return epoch


def discard(folder: Path) -> None:
    """Remove the state; the heads are in the bank."""
    (folder / FILE).unlink(missing_ok=True)


def _key(student: Student) -> str:
    return head_key(student.site.value, str(student.spec))


def _owners(students: Sequence[Student]) -> list[str]:
    """Prefix of the optimiser's slots for each of its parameters, in its order."""
    named = ((_key(student), name) for student in students for name, _ in student.module.named_parameters())
    return [f"{key}|optimiser|{name}" for key, name in named]


def _under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
