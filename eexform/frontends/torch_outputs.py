"""Which part of what a module returns are the class scores: a tensor, or one of a tuple, dict or dataclass."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from eexform.errors import ModelError, suggest

NAME = "scores"
"""Of the graph's output where the module does not name it."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The chosen part; called with what the module returns, it gives that part.

    Attributes:
        key: name or index; ``None``: the module returns a tensor, which is it.
    """

    key: str | int | None

    @property
    def name(self) -> str:
        """Of the graph's output."""
        return self.key if isinstance(self.key, str) and self.key.isidentifier() else NAME

    def __call__(self, result: Any) -> Tensor:
        return result if self.key is None else parts(result)[self.key]


def choose(result: Any, output: str | int | None, batch: int) -> Choice:
    """Find the class scores ``[batch, classes]`` in what a module returned.

    A dict or dataclass has them in ``logits``, or in its only floating-point matrix; ``output`` names others.

    Raises:
        ModelError: nothing fits, several do, or what ``output`` names is no matrix of scores.
    """
    if isinstance(result, Tensor):
        if output is not None:
            raise ModelError(f"the module returns one tensor: leave out --output (output={output!r})")
        _check(result, "the module returns", batch)
        return Choice(None)
    found = parts(result)
    if output is not None:
        key: str | int = int(output) if isinstance(output, str) and output.lstrip("-").isdigit() else output
        if isinstance(key, int) and isinstance(result, (tuple, list)) and -len(found) <= key < len(found):
            key = list(found)[key]
        if key not in found:
            raise ModelError(
                f"the module returns {_listing(found)}; there is no {output!r}: {suggest(str(output), map(str, found))}"
            )
    elif "logits" in found:
        key = "logits"
    else:
        fitting = [key for key, value in found.items() if _is_scores(value, batch)]
        if len(fitting) != 1:
            raise ModelError(
                f"the module returns {_listing(found)} and {'none' if not fitting else 'several'} of them could be the "
                "class scores [batch, classes]; name it with --output (in Python output=), a name or an index"
            )
        key = fitting[0]
    _check(found[key], f"the module's output {key!r} is", batch)
    return Choice(key)


def parts(result: Any) -> dict[str | int, Any]:
    """The parts of a dict, dataclass, named tuple, tuple or list, by name or index.

    Raises:
        ModelError: it is none of these.
    """
    if isinstance(result, Mapping):
        return dict(result)
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    if isinstance(result, tuple) and hasattr(result, "_fields"):
        return dict(zip(result._fields, result, strict=True))
    if isinstance(result, (tuple, list)):
        return dict(enumerate(result))
    raise ModelError(
        f"the module returns a {type(result).__name__}: expected class scores [batch, classes] as a tensor, or in a "
        "tuple, dict or dataclass"
    )


def _is_scores(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and len(value) == batch and value.is_floating_point()


def _check(value: Any, what: str, batch: int) -> None:
    if not isinstance(value, Tensor):
        raise ModelError(f"{what} a {type(value).__name__}: expected class scores, a tensor [batch, classes]")
    if not _is_scores(value, batch):
        raise ModelError(
            f"{what} {_described(value)} for a batch of {batch}: expected class scores, floating point, "
            f"[{batch}, classes]"
        )


def _listing(found: Mapping[str | int, Any]) -> str:
    return ", ".join(f"{key!r} {_described(value)}" for key, value in found.items())


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__
