"""State dicts: reading them without unpickling anything, and putting them into a module."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from eexform.errors import ModelError, suggest
from eexform.frontends.opset import first_line

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
_SHOWN = 5


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load a state dict into ``module``, in place; every name and shape must fit.

    Args:
        module: takes the weights.
        path: ``.safetensors``, or what ``torch.save`` wrote: a state dict, alone or as the entry ``state_dict``,
            ``model_state_dict`` or ``model`` of a checkpoint. Nothing is unpickled but tensors (``weights_only``). The
            prefixes that ``DataParallel`` and ``torch.compile`` put in front of names are dropped.

    Raises:
        ModelError: the file cannot be read, holds something else, or does not fit the module.
    """
    path = Path(path)
    weights = _without_prefixes(_state_dict(_read(path), path), module)
    wanted = module.state_dict()
    # kept by newer versions of torch only, and of no use to a trained network
    optional = {name for name in wanted if name.endswith(".num_batches_tracked") or name == "num_batches_tracked"}
    missing = [name for name in wanted if name not in weights and name not in optional]
    unexpected = [name for name in weights if name not in wanted]
    shapes = [
        f"{name} {list(weights[name].shape)} for {list(wanted[name].shape)}"
        for name in wanted
        if name in weights and weights[name].shape != wanted[name].shape
    ]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''})"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    if problems:
        hint = f"; {missing[0]!r}: {suggest(missing[0], unexpected)}" if missing and unexpected else ""
        raise ModelError(
            f"{path}: the weights do not fit {type(module).__name__}: {'; '.join(problems)}{hint}; give the weights of "
            "this very architecture"
        )
    module.load_state_dict(weights, strict=False)


def _read(path: Path) -> Any:
    if not path.exists():
        raise ModelError(f"{path}: no such file")
    if not path.is_file():
        raise ModelError(f"{path}: not a file; give the file with the state dict")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        if "weights_only" in text.lower() or "weights only" in text.lower():
            raise ModelError(
                f"{path}: it holds Python objects besides tensors, and loading those could run anybody's code: save "
                "the weights alone, torch.save(module.state_dict(), file), or as .safetensors"
            ) from error
        raise ModelError(f"{path}: cannot be read as a state dict: it is damaged or another kind of file") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise ModelError(
            f"{path}: cannot be read as a state dict ({type(error).__name__}: {first_line(error)}); it is damaged "
            "or another kind of file"
        ) from error


def _state_dict(found: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
            break
    if not isinstance(found, Mapping):
        raise ModelError(f"{path}: holds a {type(found).__name__}: expected a state dict, names and tensors")
    others = [f"{name!r} ({type(value).__name__})" for name, value in found.items() if not isinstance(value, Tensor)]
    if others or not found:
        what = f"{', '.join(others[:_SHOWN])} beside or instead of tensors" if others else "nothing"
        raise ModelError(
            f"{path}: holds {what}: expected a state dict, alone or as the entry {' or '.join(map(repr, _WRAPPERS))}"
        )
    return {str(name): value for name, value in found.items()}


def _without_prefixes(weights: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Names as the module has them; a prefix that all names share is dropped unless the module's have it, too."""
    wanted = module.state_dict()
    while True:
        for prefix in _PREFIXES:
            if all(name.startswith(prefix) for name in weights) and not any(name.startswith(prefix) for name in wanted):
                weights = {name.removeprefix(prefix): value for name, value in weights.items()}
                break
        else:
            return weights
