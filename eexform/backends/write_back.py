"""Trained parameters of a torch module return to the graph, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import fx, nn

from eexform.backends.fx import PARAMETERS, Raiser
from eexform.backends.metadata import TRUNK
from eexform.backends.planned import Planned, trainable
from eexform.backends.torch_types import to_array
from eexform.errors import ModelError
from eexform.ir import kinds
from eexform.ir.exit_nodes import head_digest
from eexform.ir.graph import Graph

_LISTED = 5
_COUNTERS = "num_batches_tracked"


def write_back(graph: Graph | Planned, source: nn.Module | Mapping[str, torch.Tensor], *, strict: bool = True) -> Graph:
    """The graph with the numbers of a trained module: parameters and running statistics.

    Args:
        graph: what the module was made from: a graph, or a plan of a run, which is taken as ``to_torch`` takes it
            (without the passes that only make it faster). It is not changed.
        source: a module, or its state dict (keys behind ``module.`` are understood).
        strict: refuse tensors that the graph does not have. Without it they are left out.

    Returns:
        A new graph. The digests of heads that changed are new; where the trunk changed, the digest of the trunk that
        its heads were trained on is forgotten.

    Raises:
        ModelError: no graph and no plan, or no module and no state dict; or tensors are missing, too many, of another
            shape, or not finite: all of them are named.
    """
    if not isinstance(source, nn.Module | Mapping):
        raise ModelError(f"write_back takes a module or a state dict, found {type(source).__name__}")
    graph = trainable(graph, "write_back")
    arrays = _by_name(graph, source, strict)
    draft = graph.copy()
    changed: set[str] = set()
    for name, array in arrays.items():
        constant = draft.constants[name]
        old = np.asarray(constant.values)
        if tuple(array.shape) != tuple(old.shape):
            raise ModelError(
                f"parameter {name!r}: the graph has shape {list(old.shape)}, the module {list(array.shape)}; "
                "give the module that was made from this graph"
            )
        with np.errstate(over="ignore"):  # what is too large is infinite then, and named below
            values = np.ascontiguousarray(array, dtype=old.dtype).reshape(old.shape)
        if np.array_equal(values, old, equal_nan=True):  # a mask of minus infinity stays as it is
            continue
        if not np.isfinite(values).all():
            raise ModelError(f"parameter {name!r} holds NaN or infinite values; the training diverged")
        constant.values = values
        changed.add(name)
    if not changed:
        return draft
    new = draft.constants
    exits = [
        replace(item, digest=head_digest({name: np.asarray(new[name].values) for name in item.parameters}))
        if changed.intersection(item.parameters)
        else item
        for item in graph.exits
    ]
    trunk = changed.difference(*(item.parameters for item in graph.exits))
    metadata = {key: value for key, value in graph.metadata.items() if not (trunk and key == TRUNK)}
    return draft.replace(exits=exits, metadata=metadata)


def _by_name(graph: Graph, source: nn.Module | Mapping[str, torch.Tensor], strict: bool) -> dict[str, np.ndarray]:
    flat: Any = getattr(source, "graph_module", source)
    if isinstance(flat, fx.GraphModule) and PARAMETERS in flat.meta:
        held = {
            **dict(flat.named_parameters(remove_duplicate=False)),
            **dict(flat.named_buffers(remove_duplicate=False)),
        }
        lost = sorted(set(flat.meta[PARAMETERS].values()) - set(held))
        if lost:
            raise ModelError(
                f"the module has no {lost[0]!r} any more: remove parametrisations (weight norm, pruning) and put "
                "replaced sub-modules back, or give a state dict with the original's keys"
            )
        found = {name: _array(target, held[target]) for name, target in flat.meta[PARAMETERS].items()}
        needed = {name for name, constant in graph.constants.items() if _counts(constant)}
        _refuse(needed & set(_targets(graph)) - set(found), set(found) - set(graph.constants), strict)
        return {name: array for name, array in found.items() if name in graph.constants}
    state = source.state_dict() if isinstance(source, nn.Module) else dict(source)
    odd = [key for key in state if not isinstance(key, str)]
    if odd:
        raise ModelError(f"the keys of a state dict are names, found {odd[0]!r}")
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return _from_state(graph, state, strict)


def _from_state(graph: Graph, state: Mapping[str, torch.Tensor], strict: bool) -> dict[str, np.ndarray]:
    targets, known = _targets(graph), kinds.kinds(graph.metadata)
    aliases = {alias: targets[kept] for alias, kept in kinds.tied(graph.metadata).items() if kept in targets}
    arrays, missing = {}, set()
    for name, target in targets.items():
        if not _counts(graph.constants[name]) or known.get(name) == "constant":
            continue
        if target not in state:
            others = (name, *(alias for alias, path in aliases.items() if path == target))
            other = next((key for key in others if key in state), None)
            if other is None:
                missing.add(target)
                continue
            target = other
        arrays[name] = _array(target, state[target])
    for alias, path in aliases.items():
        if alias in state and path in state and not torch.equal(state[alias], state[path]):
            raise ModelError(f"{alias!r} and {path!r} are one tensor in the graph, but differ in the state dict")
    expected = {*targets, *targets.values(), *aliases}
    _refuse(missing, {key for key in state if key not in expected and not key.endswith(_COUNTERS)}, strict)
    return arrays


def _refuse(missing: set[str], unexpected: set[str], strict: bool) -> None:
    wrong = [f"missing are {_names(missing)}"] if missing else []
    if unexpected and strict:
        wrong.append(f"the graph does not have {_names(unexpected)} (strict=False leaves such tensors out)")
    if wrong:
        raise ModelError(
            f"the tensors do not fit the graph: {'; '.join(wrong)}; give the module that was made from this graph, or "
            "the one that it was loaded from"
        )


def _names(names: set[str]) -> str:
    listed = ", ".join(sorted(names)[:_LISTED])
    return listed + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _targets(graph: Graph) -> dict[str, str]:
    """State-dict key of every constant that a module made from the graph holds."""
    raiser = Raiser(graph)
    raiser.run()
    return dict(raiser.targets)


def _array(key: str, tensor: object) -> np.ndarray:
    """The numbers of a tensor of a module; narrow ones (bfloat16) as they are, for the graph's own type to hold."""
    if not isinstance(tensor, torch.Tensor):
        raise ModelError(f"{key!r}: expected a tensor, found {type(tensor).__name__}")
    if tensor.is_meta:
        raise ModelError(f"{key!r} lies on the meta device, which holds no numbers: load the trained state dict first")
    if not tensor.is_floating_point():
        raise ModelError(f"{key!r}: expected floating-point numbers, found {tensor.dtype}")
    plain = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor
    return np.asarray(to_array(plain))


def _counts(constant: gs.Constant) -> bool:
    return bool(np.issubdtype(constant.dtype, np.floating))
