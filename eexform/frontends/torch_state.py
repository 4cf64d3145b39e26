"""What the user's module is besides its ``forward``: put into eval mode without caches, and left as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_OF_TORCH = frozenset(vars(nn.Module()))


@contextmanager
def as_found(module: nn.Module) -> Iterator[None]:
    """Eval mode meanwhile; afterwards the module is as it was.

    That is: training flags, buffers, gradients, random state and the plain attributes of sub-modules, such as caches.
    Parameters are put back where ``train`` is the sub-module's own, which may merge weights in eval mode; a ``forward``
    that writes into them has written.
    """
    parts = list(module.modules())
    flags = [(part, part.training) for part in parts]
    attributes = [(part, _attributes(part), _contents(part)) for part in parts]
    merging = [(part, dict(part._parameters)) for part in parts if _trains_itself(part)]
    parameters = [(held, held.detach().clone()) for _, own in merging for held in own.values() if held is not None]
    buffers = [
        (part, name, buffer, buffer.detach().clone())
        for part in parts
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices=[]):
        try:
            module.eval()
            torch.backends.mha.set_fastpath_enabled(False)  # its one fused operator has no ONNX counterpart
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for part, training in flags:
                part.training = training
            for part, own, contents in attributes:
                _put_back(part, own, contents)
            for part, held in merging:
                part._parameters.update(held)
            for parameter, before in parameters:
                if not torch.equal(parameter, before):
                    _write(parameter, before)
            for part, name, buffer, before in buffers:
                _write(buffer, before)
                part._buffers[name] = buffer
            for parameter, gradient in gradients:
                parameter.grad = gradient


def drop_caches(module: nn.Module) -> None:
    """Have sub-modules forget what they computed from parameters once in eval mode: it would become a constant.

    Vision transformers keep the attention biases that they looked up in a dictionary, which ``train()`` empties.
    """
    for part in list(module.modules()):
        if _trains_itself(part) and any(_holds_result(value) for value in _attributes(part).values()):
            part.train()
            part.eval()


def _trains_itself(part: nn.Module) -> bool:
    return type(part).train is not nn.Module.train


def _holds_result(value: object) -> bool:
    """Whether an attribute is a tensor, or holds some, that is neither parameter nor buffer."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(item, Tensor) and not isinstance(item, nn.Parameter) for item in items)


def _attributes(part: nn.Module) -> dict[str, Any]:
    """What its author's code has put on a module: no parameters, buffers, children or hooks."""
    return {name: value for name, value in vars(part).items() if name not in _OF_TORCH}


def _contents(part: nn.Module) -> list[tuple[Any, Any]]:
    """The dictionaries and lists among these, and copies of them."""
    return [
        (value, dict(value) if isinstance(value, dict) else list(value))
        for value in _attributes(part).values()
        if isinstance(value, (dict, list))
    ]


def _put_back(part: nn.Module, own: dict[str, Any], contents: list[tuple[Any, Any]]) -> None:
    for name in _attributes(part).keys() - own.keys():
        del vars(part)[name]
    vars(part).update(own)
    for value, before in contents:
        if _same(value, before):
            continue
        value.clear()
        (value.update if isinstance(value, dict) else value.extend)(before)


def _same(one: Any, other: Any) -> bool:
    """Whether two dictionaries or two lists hold the same objects; whether those are equal does not count."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(value is other[key] for key, value in one.items())
    return len(one) == len(other) and all(value is before for value, before in zip(one, other, strict=True))


def _write(tensor: Tensor, numbers: Tensor) -> None:
    with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
        tensor.copy_(numbers)
