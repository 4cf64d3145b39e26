"""State of fine-tuning between epochs, so that an interrupted training goes on as if it had never stopped."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors

from eexform import files
from eexform.errors import RunError
from eexform.training.network import Network

FILE = "finetune.safetensors"
HISTORY = "history.jsonl"
FORMAT = 1
_HEADER = "eexform.finetune"


@dataclass
class Standing:
    """Where training stands after some whole epochs.

    Attributes:
        epoch: finished epochs.
        best: lowest loss on calibrate so far.
        best_epoch: after how many epochs that was; 0 before the first.
        history: what was measured before training (entry 0) and after every epoch.
        support: accuracy of each early exit on each class of calibrate, after the last epoch.
        scaler: state of the loss scaling, where there is one.
        best_state: parameters and buffers of the best epoch by state-dict key.
    """

    epoch: int = 0
    best: float = float("inf")
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    support: list[list[float]] = field(default_factory=list)
    scaler: dict[str, Any] = field(default_factory=dict)
    best_state: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)


def save(
    folder: Path, identity: str, standing: Standing, network: Network, optimiser: torch.optim.Optimizer | None
) -> None:
    """Write everything the next epoch depends on; order and augmentation follow from seed and epoch alone.

    Args:
        folder: of the checkpoint and the history.
        identity: digest of what is trained, on what and how.
        standing: after a whole epoch.
        network: with its present parameters.
        optimiser: that of the phase under way; ``None`` where the next epoch begins with a new one.
    """
    tensors = {f"module|{name}": value for name, value in network.state().items()}
    if network.average is not None:
        tensors.update({f"average|{name}": value for name, value in network.state(averaged=True).items()})
    tensors.update({f"best|{name}": value for name, value in standing.best_state.items()})
    if optimiser is not None:
        slots = optimiser.state_dict()["state"]
        for place, owner in enumerate(network.names(optimiser)):
            for name, value in slots.get(place, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"slot|{owner}|{name}"] = value
    facts = {key: value for key, value in asdict(_plain(standing)).items() if key != "best_state"}
    facts["best"] = standing.best if standing.best < float("inf") else None
    header = {"format": FORMAT, "identity": identity, "updates": network.updates, "standing": facts}
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    files.write_bytes(folder / FILE, save_tensors(plain, metadata={_HEADER: json.dumps(header)}))
    write_history(folder, standing)


def write_history(folder: Path, standing: Standing) -> None:
    """One line of JSON for the time before training and for every whole epoch."""
    lines = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in standing.history)
    files.write_bytes(folder / HISTORY, lines.encode())


@dataclass
class Stored:
    """A checkpoint that was read.

    Attributes:
        standing: where training stands.
        slots: the optimiser's tensors: state-dict key of the parameter -> name -> tensor; empty at the end of a phase.
    """

    standing: Standing
    slots: dict[str, dict[str, torch.Tensor]]


def restore(folder: Path, identity: str, network: Network) -> Stored | None:
    """Load the state of the same training into ``network``; ``None`` where there is none.

    Raises:
        RunError: the folder holds the state of another training, or a damaged one.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as opened:
            header = json.loads((opened.metadata() or {})[_HEADER])
            same = header["format"] == FORMAT and header["identity"] == identity
            tensors = {name: opened.get_tensor(name) for name in opened.keys()} if same else {}  # noqa: SIM118
        if not same:
            raise RunError(
                f"{path}: is of a training with other options, another graph or other data; give the options it was "
                "begun with, choose another folder, or delete the file to start afresh"
            )
        facts = header["standing"]
        best = float("inf") if facts["best"] is None else facts["best"]
        standing = Standing(**{**facts, "best": best, "best_state": _under(tensors, "best|")})
        network.load(_under(tensors, "module|"), _under(tensors, "average|"))
        network.updates = int(header["updates"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise RunError(f"{path}: is damaged ({error}); delete it to start afresh") from error
    slots: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in _under(tensors, "slot|").items():
        owner, _, slot = name.rpartition("|")
        slots.setdefault(owner, {})[slot] = value
    return Stored(standing, slots)


def fill(optimiser: torch.optim.Optimizer, network: Network, slots: dict[str, dict[str, torch.Tensor]]) -> None:
    """Put saved tensors back into a new optimiser of the same parameters."""
    state = optimiser.state_dict()
    for place, owner in enumerate(network.names(optimiser)):
        if owner in slots:
            state["state"][place] = {name: _laid_out(value, network) for name, value in slots[owner].items()}
    optimiser.load_state_dict(state)


def _laid_out(value: torch.Tensor, network: Network) -> torch.Tensor:
    images = network.arithmetic.channels_last and value.ndim == 4
    return value.contiguous(memory_format=torch.channels_last) if images else value


def _plain(standing: Standing) -> Standing:
    return Standing(**{**vars(standing), "best_state": {}})


def _under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
