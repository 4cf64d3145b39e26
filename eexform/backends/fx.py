"""Raising a graph to a trainable ``torch.fx.GraphModule``: one torch module or call per node, parameters by IR name.

What is trained is what is exported: :func:`fx_parameters` hands the module's arrays back under the names they have in
the graph, ready for ``eexform.heads.with_parameters``.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections import ChainMap
from collections.abc import Callable, MutableMapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import fx, nn

from eexform.backends.fx_errors import key_of, refused, unknown
from eexform.backends.fx_numbers import follows_sizes, listed, numbers
from eexform.backends.fx_tree import Tree, borrowed, common_path, is_path, size_of
from eexform.backends.torch_types import to_tensor
from eexform.errors import GraphError, ModelError
from eexform.ir import kinds
from eexform.ir.graph import Graph
from eexform.ir.inference import split_dim

PARAMETERS = "eexform.parameters"
"""Key of a raised module's ``meta``: target of every floating-point constant, by its name in the graph."""
OWNED = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set")
"""What modules on the same tensors have in common."""

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

    Takes the graph's inputs in order and returns its output, or a tuple where there are several. State-dict keys are
    the constants' names: a node whose constants are ``<path>.weight``, ``<path>.bias`` ... becomes the torch module at
    that path, other constants lie on plain modules at theirs; names that are no path (``onnx::Conv_12``) are made into
    one. A constant that several nodes use is one tensor, batch-normalisation statistics included, and a module that is
    called twice is one module.

    Floating-point constants of more than one element (and weights of modules) become trainable parameters, others
    buffers; where the graph knows what its constants were in the module it came from (:mod:`eexform.ir.kinds`), they
    are that again.

    Raises:
        ModelError: an operator or a form of it cannot be raised; the message names the node.
    """
    raiser = Raiser(graph)
    raiser.run()
    return raiser.build()


def fx_parameters(module: fx.GraphModule) -> dict[str, np.ndarray]:
    """Copies of the floating-point arrays of a raised module, running statistics included, by IR name.

    Raises:
        ModelError: the module was not made by :func:`raise_to_fx`.
    """
    names = module.meta.get(PARAMETERS)
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
        tree: the modules, parameters and buffers.
        graph: the fx graph that grows.
        names: target in the module of every floating-point constant used, by IR name.
        targets: the same for every constant used.
    """

    def __init__(self, source: Graph, whole: Raiser | None = None) -> None:
        """Start on ``source``.

        Args:
            source: the graph.
            whole: the conversion of the graph that ``source`` is a part of: modules and tensors are taken from it, and
                what the part has beyond it is in no state dict.
        """
        self.source = source
        self.whole = whole
        self.tree: Tree = Tree(source.constants) if whole is None else whole.tree
        self.graph = fx.Graph()
        self.names: dict[str, str] = {}
        self.targets: MutableMapping[str, str] = {} if whole is None else ChainMap({}, whole.targets)
        self._kinds = kinds.kinds(source.metadata)
        self._values: dict[str, fx.Node] = {}
        self._tensors: MutableMapping[str, torch.Tensor] = {} if whole is None else ChainMap({}, whole._tensors)
        self._arguments: set[str] = set()
        self._sizes: dict[str, fx.Node] = {}
        self.contents: dict[str, np.ndarray | None] = {}  # of shape arithmetic: see eexform.backends.fx_numbers

    def inside(self, body: Graph) -> Raiser:
        """A conversion of a body inside this graph: a module of its own, the same tensors for the same constants."""
        inner = Raiser(body)
        inner._kinds, inner._tensors = self._kinds, self._tensors
        return inner

    def run(self) -> None:
        """Raise every node.

        Raises:
            ModelError: an operator or a form of it cannot be raised.
        """
        _register_builtin()
        for tensor in self.source.gs.inputs:
            self.bind(tensor, self.graph.placeholder(self.argument(tensor.name)))
        for node in self.source.nodes:
            builder = _OPS.get(key_of(node))
            if builder is None:
                raise unknown(self.source.gs, node, _OPS)
            try:
                found = builder(self, node)
            except (ModelError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
                said = refused(self.source.gs, node, error)
                raise said from (error if said is not error else error.__cause__)
            results = [found] if isinstance(found, fx.Node) else list(found)
            for tensor, result in zip(node.outputs, results, strict=False):
                self.bind(tensor, result)
        outputs = [self.operand(tensor) for tensor in self.source.gs.outputs]
        self.graph.output(outputs[0] if len(outputs) == 1 and self.whole is None else tuple(outputs))
        for alias, kept in kinds.tied(self.source.metadata).items():
            if kept in self.targets:
                self.tree.alias(alias, self.targets[kept])

    def build(self) -> fx.GraphModule:
        """The module of what was raised; it owns the very modules and tensors of :attr:`tree`."""
        for node in reversed(self.graph.nodes):  # arithmetic on sizes that turned out not to be needed
            if node.op in ("call_function", "get_attr") and not node.users:
                self.graph.erase_node(node)
        module = fx.GraphModule(self.root, self.graph, class_name="RaisedGraph")
        for kept in OWNED:
            module.__dict__[kept] = self.root.__dict__[kept]
        module.graph.lint()
        module.meta[PARAMETERS] = self.names
        return module

    @property
    def root(self) -> nn.Module:
        """Owner of the modules, parameters and buffers."""
        return self.tree.root

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
        """The content of a constant input, else ``None``; what the original module trains or keeps is no constant."""
        tensor = node.inputs[place] if self.has(node, place) else None
        if not isinstance(tensor, gs.Constant):
            return None
        lives = self._kinds.get(tensor.name) in ("parameter", "buffer") and np.issubdtype(tensor.dtype, np.floating)
        return None if lives else np.asarray(tensor.values)

    def number(self, node: gs.Node, place: int, default: float | None = None) -> Any:
        """An optional scalar input: a Python number where constant, an fx node where computed."""
        if not self.has(node, place):
            return default
        array = self.array(node, place)
        return self.value(node, place) if array is None else array.reshape(-1)[0].item()

    def ints(self, node: gs.Node, place: int, attribute: str | None = None, default: Any = None) -> Any:
        """A list of integers: from ``attribute`` (older opsets) or an input that is constant, or follows from fixed
        sizes; else an fx node, of a list where the input follows from sizes, of a tensor where it does not."""
        if attribute is not None and node.attrs.get(attribute) is not None:
            return [int(number) for number in node.attrs[attribute]]
        if not self.has(node, place):
            return default
        found = numbers(self, node.inputs[place])
        if found is None:
            array = self.array(node, place)
            return self.value(node, place) if array is None else [int(number) for number in array.reshape(-1)]
        return found if all(isinstance(number, int) for number in found) else self.call(listed, *found)

    def shape(self, node: gs.Node, place: int) -> tuple[Any, ...] | None:
        """Shape of an input as far as the graph knows it."""
        return self.shape_of(node.inputs[place])

    def shape_of(self, tensor: gs.Tensor) -> tuple[Any, ...] | None:
        """Shape of a value as far as the graph knows it."""
        if tensor.shape is None and tensor.name in self.source.types:
            return self.source.types[tensor.name].shape
        return None if tensor.shape is None else tuple(tensor.shape)

    def sizes(self, node: gs.Node, place: int) -> list[Any] | None:
        """The sizes of the output, where input ``place`` computes them from sizes of other values.

        Numbers where the graph knows them, fx nodes of integers where they follow an input's size: no tensor of sizes
        has to be computed and read, which is slow and which ``torch.export`` cannot follow.
        """
        if not follows_sizes(node.inputs[place]):
            return None
        try:
            shape = self.shape_of(node.outputs[0])
        except GraphError:  # made by hand, not loaded: then sizes are computed as the nodes say
            return None
        if shape is None:
            return None
        found = [dim if isinstance(dim, int) else self.size(dim) for dim in shape]
        return None if any(size is None for size in found) else found

    def size(self, dim: str | None) -> fx.Node | None:
        """The integer that a symbolic size stands for, read off an input; ``None`` where no input has it."""
        if dim is None or dim in self._sizes:
            return self._sizes.get(dim or "")
        factor, symbol = split_dim(dim)
        if factor != 1:
            one = self.size(symbol)
            found = None if one is None else self.call(operator.mul, one, factor)
        else:
            places = ((tensor, axis) for tensor in self.source.gs.inputs for axis, size in enumerate(tensor.shape or ())
                      if size == symbol)  # fmt: skip
            tensor, axis = next(places, (None, 0))
            found = None if tensor is None else self.call(size_of, self.operand(tensor), axis)
        if found is not None:
            self._sizes[dim] = found
        return found

    def operand(self, tensor: gs.Tensor) -> fx.Node:
        """The fx node of a value."""
        if isinstance(tensor, gs.Constant):
            if tensor.name not in self._values:
                if tensor.name not in self.targets:  # else a module owns it already, under its name there
                    persistent = self.whole is None and self._kinds.get(tensor.name) != "constant"
                    self._record(tensor, self.tree.hold(tensor.name, self.tensor(tensor), persistent=persistent))
                self._values[tensor.name] = self.graph.get_attr(self.targets[tensor.name])
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
        """The one torch tensor of a constant, with memory of its own: training must not write into the graph."""
        if constant.name not in self._tensors:
            try:
                held = to_tensor(constant.values)
            except ModelError as error:
                raise ModelError(f"constant {constant.name!r}: {error}") from error
            kind = self._kinds.get(constant.name)
            learnable = kind == "parameter" if kind is not None else held.numel() > 1
            learnable = trainable and learnable and held.is_floating_point()
            self._tensors[constant.name] = nn.Parameter(held) if learnable else held
        return self._tensors[constant.name]

    def module(self, node: gs.Node, module: nn.Module, inputs: Sequence[Any], **constants: gs.Tensor | None) -> fx.Node:
        """Call a sub-module whose parameters and buffers are the given constants.

        It lies where the names of the constants say, or below the node's name where they say nothing. The same module
        called before is called again; where the constants belong elsewhere, what it does is called on them there.

        Args:
            node: gives the name.
            module: made on the ``meta`` device; what is named in ``constants`` is replaced.
            inputs: fx nodes to call it with.
            constants: attribute of the module to graph constant; ``None`` is left out.
        """
        given = {attribute: constant for attribute, constant in constants.items() if constant is not None}
        name = node.name or node.op
        if not given:
            target = self.tree.unique(name)
            self.root.add_module(target, module)
            return self.graph.call_module(target, tuple(inputs))
        form = (type(module), module.extra_repr(), tuple(given))
        held = common_path({key: self.targets.get(constant.name, "") for key, constant in given.items()})
        if held is not None and self.tree.form(held) == form:
            return self.graph.call_module(held, tuple(inputs))
        path = common_path({key: constant.name for key, constant in given.items()})
        free = self.whole is None and not any(constant.name in self.targets for constant in given.values())
        if path is None and free and not all(is_path(constant.name) for constant in given.values()):
            path = self.tree.unique(name)
        if path is None or not free or not self.tree.fits(path, module):
            for attribute, constant in given.items():
                self.tensor(constant, trainable=attribute not in module._buffers)
            operands = {attribute: self.operand(constant) for attribute, constant in given.items()}
            return borrowed(self.graph, self.tree, name, module, inputs, operands)
        for attribute, constant in given.items():
            is_buffer = attribute in module._buffers
            tensor = self.tensor(constant, trainable=not is_buffer)
            if is_buffer:
                module._buffers[attribute] = tensor
            else:
                if not isinstance(tensor, nn.Parameter):
                    trained = tensor.is_floating_point() and self._kinds.get(constant.name, "parameter") == "parameter"
                    tensor = self._tensors[constant.name] = nn.Parameter(tensor, requires_grad=trained)
                setattr(module, attribute, tensor)
            self._record(constant, f"{path}.{attribute}")
        self.tree.put(path, module, form)
        return self.graph.call_module(path, tuple(inputs))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Call a torch function."""
        return self.graph.call_function(function, args, kwargs)

    def pick(self, value: fx.Node, outputs: int) -> list[fx.Node]:
        """One fx node per item of a call that returns a tuple."""
        return [self.call(operator.getitem, value, place) for place in range(outputs)]

    def unique(self, name: str) -> str:
        """``name`` as an identifier that nothing else on the module has."""
        return self.tree.unique(name)

    def argument(self, name: str) -> str:
        """``name`` as that of an argument of ``forward``."""
        wanted = re.sub(r"\W+", "_", name).strip("_") or "value"
        wanted = f"_{wanted}" if wanted[0].isdigit() or keyword.iskeyword(wanted) or wanted == "self" else wanted
        found, count = wanted, 1
        while found in self._arguments:
            found, count = f"{wanted}_{count}", count + 1
        self._arguments.add(found)
        return found

    def _record(self, constant: gs.Constant, target: str) -> None:
        self.targets.setdefault(constant.name, target)
        if np.issubdtype(constant.dtype, np.floating):
            self.names.setdefault(constant.name, target)


@cache
def _register_builtin() -> None:
    from eexform.backends import fx_rules  # noqa: F401  (importing it registers them)
