"""Raising a graph to a trainable ``torch.fx.GraphModule``: one torch module or call per node, parameters by IR name.

What is trained is what is exported: :func:`fx_parameters` hands the module's arrays back under the names they have in
the graph, ready for ``eexform.heads.with_parameters``.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import fx, nn

from eexform.errors import ModelError, suggest
from eexform.ir.graph import Graph

_META = "eexform.parameters"
_STANDARD = (None, "", "ai.onnx")

Builder = Callable[["Raiser", gs.Node], "fx.Node | Sequence[fx.Node]"]
_OPS: dict[str, Builder] = {}


def op(*names: str) -> Callable[[Builder], Builder]:
    """Register how operators are raised; a later registration replaces an earlier one.

    The decorated function gets the :class:`Raiser` and the graph's node, and returns the fx node of the output, or one
    per output::

        @op("Relu")
        def relu(raiser, node):
            return raiser.call(torch.relu, raiser.value(node, 0))

    Args:
        names: operators of the ONNX domain; ``domain::operator`` for others.
    """

    def register(builder: Builder) -> Builder:
        _OPS.update(dict.fromkeys(names, builder))
        return builder

    return register


def supported() -> tuple[str, ...]:
    """Operators that can be raised."""
    _register_builtin()
    return tuple(sorted(_OPS))


def raise_to_fx(graph: Graph) -> fx.GraphModule:
    """The graph as a torch module in training mode.

    Takes the graph's inputs in order and returns its output, or a tuple where there are several. Floating-point
    constants of more than one element (and weights of modules) become trainable parameters, others buffers; a constant
    that two nodes use is one tensor, batch-normalisation statistics included.

    Raises:
        ModelError: an operator or a form of it cannot be raised; the message names the node.
    """
    _register_builtin()
    raiser = Raiser(graph)
    for tensor in graph.gs.inputs:
        raiser.bind(tensor, raiser.graph.placeholder(raiser.unique(tensor.name)))
    for node in graph.nodes:
        key = node.op if node.domain in _STANDARD else f"{node.domain}::{node.op}"
        builder = _OPS.get(key)
        if builder is None:
            raise ModelError(
                f"node {node.name!r}: operator {key!r} cannot be raised to torch ({suggest(key, _OPS)}); "
                "register a rule with eexform.backends.fx.op"
            )
        found = builder(raiser, node)
        results = [found] if isinstance(found, fx.Node) else list(found)
        for tensor, result in zip(node.outputs, results, strict=False):
            raiser.bind(tensor, result)
    outputs = [raiser.operand(tensor) for tensor in graph.gs.outputs]
    raiser.graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
    raiser.graph.lint()
    module = fx.GraphModule(raiser.root, raiser.graph, class_name="RaisedGraph")
    module.meta[_META] = raiser.names
    return module


def fx_parameters(module: fx.GraphModule) -> dict[str, np.ndarray]:
    """Copies of the floating-point arrays of a raised module, running statistics included, by IR name.

    Raises:
        ModelError: the module was not made by :func:`raise_to_fx`.
    """
    names = module.meta.get(_META)
    if names is None:
        raise ModelError(
            "this module was not made by raise_to_fx: the names of its parameters in the graph are not known"
        )
    state = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    return {name: state[target].detach().cpu().numpy().copy() for name, target in names.items()}


class Raiser:
    """State of one conversion; what an operator's rule works with.

    Attributes:
        source: the graph that is raised.
        root: owner of the modules, parameters and buffers.
        graph: the fx graph that grows.
        names: target in the module of every floating-point constant used, by IR name.
    """

    def __init__(self, source: Graph) -> None:
        self.source = source
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.names: dict[str, str] = {}
        self._values: dict[str, fx.Node] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._taken: set[str] = set(dir(nn.Module()))

    # -- operands ---------------------------------------------------------------------------------------------------

    def has(self, node: gs.Node, place: int) -> bool:
        """Whether the (optional) input is given."""
        return place < len(node.inputs) and not node.inputs[place].is_empty()

    def value(self, node: gs.Node, place: int) -> fx.Node:
        """The fx node of an input; constants become parameters or buffers of the module."""
        if not self.has(node, place):
            raise ModelError(f"node {node.name!r} ({node.op}): input {place} is missing")
        return self.operand(node.inputs[place])

    def array(self, node: gs.Node, place: int) -> np.ndarray | None:
        """The content of an input that is a constant, else ``None``."""
        tensor = node.inputs[place] if self.has(node, place) else None
        return np.asarray(tensor.values) if isinstance(tensor, gs.Constant) else None

    def number(self, node: gs.Node, place: int, default: float | None = None) -> Any:
        """An optional scalar input: a Python number where constant, an fx node where computed."""
        if not self.has(node, place):
            return default
        array = self.array(node, place)
        return self.value(node, place) if array is None else array.reshape(-1)[0].item()

    def ints(self, node: gs.Node, place: int, attribute: str | None = None, default: Any = None) -> Any:
        """A list of integers: from ``attribute`` (older opsets), a constant input, or an fx node where computed."""
        if attribute is not None and node.attrs.get(attribute) is not None:
            return [int(number) for number in node.attrs[attribute]]
        if not self.has(node, place):
            return default
        array = self.array(node, place)
        return self.value(node, place) if array is None else [int(number) for number in array.reshape(-1)]

    def shape(self, node: gs.Node, place: int) -> tuple[Any, ...] | None:
        """Shape of an input as far as the graph knows it."""
        tensor = node.inputs[place]
        if tensor.shape is None and tensor.name in self.source.types:
            return self.source.types[tensor.name].shape
        return None if tensor.shape is None else tuple(tensor.shape)

    def operand(self, tensor: gs.Tensor) -> fx.Node:
        """The fx node of a value."""
        if isinstance(tensor, gs.Constant):
            if tensor.name not in self._values:
                held = self.tensor(tensor)
                if tensor.name in self.names:  # a module owns it already: the same tensor, under its name there
                    self._values[tensor.name] = self.graph.get_attr(self.names[tensor.name])
                else:
                    target = self.unique(tensor.name)
                    self._hold(target, held)
                    self._record(tensor, target)
                    self._values[tensor.name] = self.graph.get_attr(target)
            return self._values[tensor.name]
        if tensor.name not in self._values:
            raise ModelError(f"value {tensor.name!r} is used before it is produced; sort the graph topologically")
        return self._values[tensor.name]

    def bind(self, tensor: gs.Tensor, node: fx.Node) -> None:
        """Say which fx node computes a value."""
        if not tensor.is_empty():
            self._values[tensor.name] = node

    # -- parts of the module ----------------------------------------------------------------------------------------

    def tensor(self, constant: gs.Constant, *, trainable: bool = True) -> torch.Tensor:
        """The one torch tensor of a constant: a parameter where it is floating-point with more than one element."""
        if constant.name not in self._tensors:
            array = np.array(constant.values)  # a copy: training must not write into the graph
            held = torch.from_numpy(array) if array.ndim else torch.tensor(array[()])
            learnable = trainable and held.is_floating_point() and held.numel() > 1
            self._tensors[constant.name] = nn.Parameter(held) if learnable else held
        return self._tensors[constant.name]

    def module(self, node: gs.Node, module: nn.Module, inputs: Sequence[Any], **constants: gs.Tensor | None) -> fx.Node:
        """Call a new sub-module whose parameters and buffers are the given constants.

        Args:
            node: gives the name.
            module: made on the ``meta`` device; what is named in ``constants`` is replaced.
            inputs: fx nodes to call it with.
            constants: attribute of the module to graph constant; ``None`` is left out.
        """
        target = self.unique(node.name or node.op)
        for attribute, constant in constants.items():
            if constant is None:
                continue
            is_buffer = attribute in module._buffers
            held = self.tensor(constant, trainable=not is_buffer)
            if is_buffer:
                module._buffers[attribute] = held.data if isinstance(held, nn.Parameter) else held
            else:
                if not isinstance(held, nn.Parameter):
                    held = self._tensors[constant.name] = nn.Parameter(held)
                setattr(module, attribute, held)
            self._record(constant, f"{target}.{attribute}")
        self.root.add_module(target, module)
        return self.graph.call_module(target, tuple(inputs))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Call a torch function."""
        return self.graph.call_function(function, args, kwargs)

    def pick(self, value: fx.Node, outputs: int) -> list[fx.Node]:
        """One fx node per item of a call that returns a tuple."""
        return [self.call(operator.getitem, value, place) for place in range(outputs)]

    def unique(self, name: str) -> str:
        """``name`` as an identifier that nothing else on the module has."""
        wanted = re.sub(r"\W+", "_", name).strip("_") or "value"
        if wanted[0].isdigit():
            wanted = f"_{wanted}"
        found, count = wanted, 1
        while found in self._taken:
            found, count = f"{wanted}_{count}", count + 1
        self._taken.add(found)
        return found

    def _hold(self, target: str, held: torch.Tensor) -> None:
        if isinstance(held, nn.Parameter):
            self.root.register_parameter(target, held)
        else:
            self.root.register_buffer(target, held)

    def _record(self, constant: gs.Constant, target: str) -> None:
        if np.issubdtype(constant.dtype, np.floating):
            self.names.setdefault(constant.name, target)


def _register_builtin() -> None:
    from eexform.backends import fx_nn, fx_ops, fx_shapes  # noqa: F401  (importing them registers their rules)
