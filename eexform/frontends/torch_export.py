"""From a module and example inputs to the exporter's graph: ``torch.export``, then ``torch.onnx``, unoptimised.

The module is left as it was found; what the exporters say on the way is silenced, and what they refuse is told in two
lines, with the path of the sub-module where it happened.
"""

from __future__ import annotations

import inspect
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from functools import wraps
from typing import Any

import onnx_ir
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode

from eexform.errors import EexformError, ModelError
from eexform.frontends import torch_program, torch_state
from eexform.ir.graph import BATCH

_CHATTY = {
    "torch.onnx._internal.exporter._registration": "torchvision is not installed",
    "torch.fx.experimental.symbolic_shapes": "Unable to find user code",
    "onnx_ir._convenience": "Attribute type is ambiguous",
}
"""Loggers, and how their messages begin that say nothing about the user's module."""

_LEAF_SPEC = r"`isinstance\(treespec, LeafSpec\)` is deprecated"
_ASSIGNED = r"The tensor attributes? "  # was assigned: torch_state puts it back, _compare sees to the rest
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_REASON = re.compile(r"^<class '(?:[\w.]*\.)?(\w+)'>: (.+)$", re.MULTILINE)
_FAILED_NODE = re.compile(r"translating node %(\w+)")
_GUARD = re.compile(r"Not all values of .* satisfy the generated guard ([^\n]+)")

_TOLERANCE = 1e-3
"""Largest difference between module and exported program, relative to the largest score."""

_MANY = (61, 64)
"""Batch sizes that nothing should depend on."""


class Whereabouts:
    """Which sub-module is running, and in which one the batch size stopped being free.

    Attributes:
        running: paths of the sub-modules that are running, outermost first; after an error, those that it left.
        fixed_in: path of the sub-module whose code tied the batch size to a number; ``None``: none did.
        bound_in: path of the first sub-module whose code asked something of the batch size that large ones do not meet.
    """

    def __init__(self, module: nn.Module) -> None:
        # by the dictionary of their attributes, which torch.export's stand-ins for modules share with them
        self._paths = {id(vars(part)): path for path, part in module.named_modules()}
        self._batch: Any = None
        self.running: list[str] = []
        self._guards = 0
        self.fixed_in: str | None = None
        self.bound_in: str | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow every call of a sub-module."""
        self.running.clear()
        self._batch = None
        self._guards = 0
        handles = [
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def deepest(self) -> str:
        """Path of the innermost sub-module that is running; empty: the module itself."""
        return self.running[-1] if self.running else ""

    def _enter(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self._batch is None and arguments and isinstance(arguments[0], Tensor) and arguments[0].ndim:
            self._batch = arguments[0].shape[0]
        self._look()
        self.running.append(self._paths.get(id(vars(module)), self.deepest))

    def _leave(self, module: nn.Module, arguments: Any, result: Any) -> None:
        self._look()
        self.running.pop()

    def _look(self) -> None:
        if not isinstance(self._batch, torch.SymInt):
            return
        size = self._batch.node.expr
        if self.fixed_in is None and size.is_number:
            self.fixed_in = self.deepest
        guards = self._batch.node.shape_env.guards[self._guards :]
        self._guards += len(guards)
        if self.bound_in is None and any(guard.expr.subs(size, many) == False for guard in guards for many in _MANY):  # noqa: E712
            self.bound_in = self.deepest


class _DataDetached(TorchFunctionMode):
    """``tensor.data`` read as ``tensor.detach()``, which has the same numbers and can be traced."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()
        return func(*args, **(kwargs or {}))


@contextmanager
def giving(module: nn.Module, choose: Callable[[Any], Tensor]) -> Iterator[None]:
    """``module`` returns ``choose(result)`` meanwhile; its parameters keep their names, unlike inside a wrapper."""
    original, own = module.forward, vars(module).get("forward")

    @wraps(original)
    def forward(*arguments: Any, **named: Any) -> Tensor:
        return choose(original(*arguments, **named))

    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own


def run(module: nn.Module, arguments: Sequence[Any], named: Mapping[str, Any]) -> Any:
    """What ``module`` returns for the examples, without gradients.

    Raises:
        ModelError: it fails; names the sub-module.
    """
    where = Whereabouts(module)
    arguments, named = _copies(arguments, named)
    try:
        with where.watching(), torch.no_grad():
            torch.manual_seed(0)  # as in _compare
            return module(*arguments, **named)
    except EexformError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ModelError(
            f"the module fails on the example inputs{at(module, where.deepest)}: {type(error).__name__}: "
            f"{_first(str(error))}\ngive example_inputs (--input) that its forward takes: {_parameters(module)}"
            f"{_whole_numbers(str(error), (*arguments, *named.values()))}"
        ) from error


def _parameters(module: nn.Module) -> str:
    """Names of what ``forward`` takes, as far as a line holds them."""
    taken = inspect.signature(module.forward).parameters.values()
    names = [parameter.name for parameter in taken if parameter.kind is not parameter.VAR_KEYWORD]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _whole_numbers(reason: str, examples: Sequence[Any]) -> str:
    """What to do where a look-up, as of words, was given numbers with a fraction."""
    floats = any(isinstance(value, Tensor) and value.is_floating_point() for value in examples)
    return "; whole numbers are --input NAME=1,24:int64" if floats and "Long, Int" in reason else ""


def _copies(arguments: Sequence[Any], named: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments for one call, which may write into them."""

    def copied(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else value

    return tuple(map(copied, arguments)), {name: copied(value) for name, value in named.items()}


def export(
    module: nn.Module, arguments: Sequence[Any], named: Mapping[str, Any], *, opset: int, expected: Tensor
) -> onnx_ir.Model:
    """The exporter's graph, with a free batch on axis 0 of every tensor that is as long there as the first one.

    Args:
        module: returns one tensor.
        arguments, named: examples.
        opset: of ONNX.
        expected: what the module returned for the examples, by :func:`run`.

    Raises:
        ModelError: the module cannot be exported; the exporter's reason and the sub-module. Or what was exported
            computes something else.
    """
    tensors = [value for value in (*arguments, *named.values()) if isinstance(value, Tensor) and value.ndim]
    batch = torch.export.Dim(BATCH)
    free = {
        id(value): {0: batch} if isinstance(value, Tensor) and value.ndim and len(value) == len(tensors[0]) else None
        for value in (*arguments, *named.values())
    }
    shapes: Any = (
        {name: free[id(value)] for name, value in named.items()}
        if named
        else tuple(free[id(value)] for value in arguments)
    )
    where = Whereabouts(module)
    torch_state.drop_caches(module)
    with _quiet():
        try:
            with where.watching(), _DataDetached(), torch.no_grad():  # else what forward does without is a graph apart
                program = torch.export.export(
                    module,
                    tuple(arguments),
                    dict(named),
                    dynamic_shapes=_by_parameter(module, arguments, named, shapes),
                    strict=False,
                )
        except Exception as error:  # torch's errors here share no base class
            raise _refusal(module, where, error) from error
        torch_program.prepare(program)
        try:
            with torch.no_grad():  # as export traced: with gradients attention may lie differently in memory
                _compare(program, arguments, named, expected)
                made = torch.onnx.export(program, dynamo=True, optimize=False, opset_version=opset, verbose=False)
        except EexformError:
            raise
        except Exception as error:
            raise _untranslated(module, program, error) from error
    assert made is not None
    return made.model


def _compare(
    program: torch.export.ExportedProgram, arguments: Sequence[Any], named: Mapping[str, Any], expected: Tensor
) -> None:
    """What ``torch.export`` cannot see it leaves out without a word, such as assignments to ``.data``."""
    arguments, named = _copies(arguments, named)
    torch.manual_seed(0)  # as in run: a module that draws numbers is refused later, with the node named
    found = program.module()(*arguments, **named)
    within = _TOLERANCE * float(expected.abs().nan_to_num(0, 0).max())
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=within, equal_nan=True):
        raise ModelError(
            "what was exported does not compute what the module computes on the example inputs: forward changes "
            "something that the exporter cannot see, or answers otherwise every time (an assignment to tensor.data, "
            "a counter, random numbers of numpy)\n"
            "let forward be a function of its inputs and of the state dict, made of torch's own functions"
        )


def _by_parameter(module: nn.Module, arguments: Sequence[Any], named: Mapping[str, Any], shapes: Any) -> Any:
    """Dynamic shapes as ``torch.export`` wants them: examples for ``*inputs`` are one entry."""
    signature = inspect.signature(module.forward)
    bound = signature.bind(*arguments, **named)
    by_value = dict(shapes) if named else {}
    found: dict[str, Any] = {}
    position = 0
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found[name] = tuple(shapes[position : position + len(value)])
            position += len(value)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            found |= {key: by_value[key] for key in value}  # torch.export lists these beside the others
        elif named:
            found[name] = by_value[name]
        else:
            found[name] = shapes[position]
            position += 1
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say about themselves; other messages on standard error come out at the end."""
    said = io.StringIO()
    filters = [(logging.getLogger(name), _starts_otherwise(start)) for name, start in _CHATTY.items()]
    with ExitStack() as stack:
        for logger, keep in filters:
            logger.addFilter(keep)
            stack.callback(logger.removeFilter, keep)
        with redirect_stderr(said), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_LEAF_SPEC, category=FutureWarning)
            warnings.filterwarnings("ignore", message=_ASSIGNED, category=UserWarning)
            yield  # an error leaves here: what torch printed then is the half-made graph, which helps nobody
    if said.getvalue():
        sys.stderr.write(said.getvalue())


def _starts_otherwise(start: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not str(record.msg).startswith(start)


def _refusal(module: nn.Module, where: Whereabouts, error: Exception) -> ModelError:
    """What ``torch.export`` did not like."""
    text = _COLOUR.sub("", str(error))
    if where.fixed_in is not None:
        return ModelError(
            f"the module cannot be exported{at(module, where.fixed_in)}: its code works for the batch size of the "
            "examples only (the exporter: the batch was specialised to a constant)\n"
            "let the size come from the input: x.shape[0] or -1 in view and reshape (len(x) is a number), no branch on "
            "the batch size and no tensor with a batch of its own"
        )
    reason = _first(text)
    bound = _GUARD.search(text)
    if bound is not None:
        return ModelError(
            f"the module cannot be exported{at(module, where.bound_in or '')}: its code works for some batch sizes "
            f"only (the exporter: not all satisfy {bound.group(1)})\n"
            "leave out of eval mode what looks at the batch size"
        )
    if "Constraints violated" in text:
        return ModelError(
            f"the module cannot be exported{at(module, where.deepest)}: an input that is as long as the batch cannot "
            f"grow with it (the exporter: {reason})\n"
            "every tensor whose axis 0 is as long as that of the first one is taken for samples: give examples with "
            "a number of samples that no other input has as its first size"
        )
    if "data-dependent" in text or "DataDependent" in type(error).__name__:
        advice = "control flow that looks at values (if x.sum() > 0, .item()) cannot be exported: use torch.where"
    else:
        advice = "the module must be exportable by torch.export.export(module.eval(), examples); try that on its own"
    return ModelError(f"the module cannot be exported{at(module, where.deepest)}: {reason}\n{advice}")


def _untranslated(module: nn.Module, program: torch.export.ExportedProgram, error: Exception) -> ModelError:
    """What ``torch.onnx`` did not like."""
    text = _COLOUR.sub("", str(error))
    reasons = [f"{kind}: {said}" for kind, said in _REASON.findall(text)]
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if not reasons and (cause is not error or isinstance(error, SyntaxError)):  # a child's name that is no identifier
        reasons = [f"{type(cause).__name__}: {_first(str(cause))}"]
    failed, path = _FAILED_NODE.search(text), ""
    if failed is not None:
        path = _path_of(program, failed.group(1))
    return ModelError(
        f"the module cannot be written as ONNX{at(module, path)}: {reasons[0] if reasons else _first(text)}\n"
        "replace that operator by others, or export the part of the module in front of it"
    )


def _path_of(program: torch.export.ExportedProgram, name: str) -> str:
    """Path of the sub-module that made the call; empty where the exporter's own decomposition renamed it."""
    for node in program.graph.nodes:
        if node.name == name or node.name.endswith(f"_{name}"):
            stack = node.meta.get("nn_module_stack") or {}
            return str(list(stack.values())[-1][0]) if stack else ""
    return ""


def at(module: nn.Module, path: str) -> str:
    """`` in 'layer1.0' (Block)``."""
    part = module.get_submodule(path) if path else module
    return f" in {path!r} ({type(part).__name__})" if path else f" in {type(part).__name__}.forward"


def _first(text: str) -> str:
    """The first line that says something, cut to one or two sentences."""
    lines = [line.strip(" -\t") for line in _COLOUR.sub("", text).splitlines()]
    found = next((line for line in lines if line), "no reason given")
    return re.sub(r"\s+\(unhinted:.*", "", found)[:300].rstrip(". ")
