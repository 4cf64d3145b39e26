"""A module that is named by text, for the command line: ``package.module:factory``, its weights and example inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eexform.errors import EexformError, ModelError, OptionError, suggest
from eexform.frontends.torch_weights import load_weights
from eexform.ir.exits import Scores
from eexform.ir.graph import Graph
from eexform.references import resolve

_TYPES = {
    "float32": torch.float32,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
    "uint8": torch.uint8,
    "float64": torch.float64,
}


def from_reference(
    text: str,
    *,
    weights: str | Path | None = None,
    inputs: Sequence[str] = (),
    scores: Scores | None = None,
    output: str | int | None = None,
) -> Graph:
    """The graph of a module that ``text`` names.

    Args:
        text: ``package.module:factory``: a module, a module class, or a function without arguments that returns a
            module. The current folder is searched, too. Weights that it draws at random are the same at every call.
        weights: a state dict (see :func:`eexform.frontends.torch_weights.load_weights`).
        inputs: ``[NAME=]SHAPE[:DTYPE]`` for each example input, batch first: ``1,3,32,32``,
            ``input_ids=1,128:int64``. With names they are keyword arguments of ``forward``. Random numbers, ones where
            the type is no floating-point type.
        scores, output: see :func:`eexform.frontends.torch.from_module`.

    Raises:
        ModelError: no such module, the user's code failed, or the module cannot be loaded.
        OptionError: ``inputs`` cannot be understood.
    """
    from eexform.frontends.torch import from_module

    if not inputs:
        raise OptionError(
            f"{text}: a module does not say what it takes: give --input 1,3,32,32 for each input, batch first"
        )
    examples = _examples(inputs)
    module = _made(text)
    if weights is not None:
        load_weights(module, weights)
    try:
        return from_module(module, examples, scores=scores, output=output)
    except EexformError as error:
        error.args = (f"{text}: {error}",)
        raise


def _made(text: str) -> nn.Module:
    found = resolve(text, ModelError)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise ModelError(f"{text}: is a {type(found).__name__}: expected a torch module, its class, or a function")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            made: Any = found()
        except EexformError:
            raise
        except Exception as error:  # the user's code may raise anything
            hint = ""
            if not _takes_nothing(found):
                hint = "; it must take no arguments (write a function of your own that passes them)"
            raise ModelError(f"{text}: calling it failed: {type(error).__name__}: {error}{hint}") from error
    if not isinstance(made, nn.Module):
        raise ModelError(f"{text}: returned a {type(made).__name__}: expected a torch.nn.Module")
    return made


def _takes_nothing(found: Callable[..., Any]) -> bool:
    """Whether it can be called without arguments; yes where that cannot be seen."""
    try:
        inspect.signature(found).bind()
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def _examples(inputs: Sequence[str]) -> tuple[Tensor, ...] | dict[str, Tensor]:
    parsed = [_parse(text) for text in inputs]
    names = [name for name, _ in parsed]
    if not any(names):
        return tuple(value for _, value in parsed)
    if not all(names):
        raise OptionError("--input: give a name to every input, or to none")
    if len(set(names)) < len(names):
        raise OptionError(f"--input: a name is given twice: {', '.join(map(str, names))}")
    return {str(name): value for name, value in parsed}


def _parse(text: str) -> tuple[str | None, Tensor]:
    name, equals, rest = text.rpartition("=")
    shape, colon, dtype = rest.partition(":")
    if colon and dtype not in _TYPES:
        raise OptionError(f"--input: {text!r}: there is no type {dtype!r}: {suggest(dtype, _TYPES)}")
    sizes = [size.strip() for size in shape.split(",")]
    if (equals and not name.isidentifier()) or not all(size.isdecimal() and int(size) for size in sizes):
        raise OptionError(f"--input: {text!r} is not of the form [NAME=]1,3,32,32[:TYPE], batch first")
    kind = _TYPES[dtype] if colon else torch.float32
    dims = [int(size) for size in sizes]
    if not kind.is_floating_point:
        return name or None, torch.ones(dims, dtype=kind)  # in any vocabulary, and of a mask what lets all through
    return name or None, torch.randn(dims, generator=torch.Generator().manual_seed(0), dtype=kind)
