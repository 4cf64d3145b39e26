"""Where tensors and modules live in a raised module: state-dict keys are the names of the graph's constants."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import fx, nn

_PART = re.compile(r"[^\s\"'\\/:.{}]+")
_CONVOLUTIONS: dict[type[nn.Module], Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class Tree:
    """The modules of a raised graph.

    Attributes:
        root: owner of everything.
    """

    def __init__(self, names: Iterable[str]) -> None:
        """Keep the paths of ``names``, the constants of the graph, free of anything else."""
        self.root = nn.Module()
        self._taken = set(_reserved())
        self._taken.update(name.split(".")[0] for name in names if is_path(name))
        self._forms: dict[str, tuple[Any, ...]] = {}
        self._unsaved = ""

    def unique(self, name: str) -> str:
        """``name`` as an identifier that nothing else on the root has."""
        wanted = re.sub(r"\W+", "_", name).strip("_") or "value"
        if wanted[0].isdigit():
            wanted = f"_{wanted}"
        found, count = wanted, 1
        while found in self._taken:
            found, count = f"{wanted}_{count}", count + 1
        self._taken.add(found)
        return found

    def hold(self, name: str, tensor: torch.Tensor, *, persistent: bool = True) -> str:
        """Register a tensor under its own name, or under one made from it; returns the path.

        What is not persistent lies in a module of its own: copies of fx modules forget it of buffers on the root.
        """
        if not persistent:
            self._unsaved = self._unsaved or self.unique("constants")
            name = f"{self._unsaved}.{self.unique(name)}"
        place = self._container(name) if is_path(name) else None
        attribute = name.rpartition(".")[2]
        if place is None or hasattr(place, attribute):  # a convolution without bias has the attribute, too
            place, attribute = self.root, self.unique(name)
            name = attribute
        if isinstance(tensor, nn.Parameter):
            place.register_parameter(attribute, tensor)
        else:
            place.register_buffer(attribute, tensor, persistent=persistent)
        return name

    def alias(self, name: str, path: str) -> None:
        """Make the tensor at ``path`` known under ``name`` too, where that is free."""
        place = self._container(name) if is_path(name) else None
        attribute = name.rpartition(".")[2]
        if place is None or hasattr(place, attribute):
            return
        owner, _, field = path.rpartition(".")
        tensor = getattr(self.root.get_submodule(owner), field)
        if isinstance(tensor, nn.Parameter):
            place.register_parameter(attribute, tensor)
        else:
            place.register_buffer(attribute, tensor)

    def fits(self, path: str, module: nn.Module) -> bool:
        """Whether ``module`` can be put at ``path``."""
        if not is_path(path):
            return False
        above, attribute = self._container(path.rpartition(".")[0] + ".x"), path.rpartition(".")[2]
        if above is None:
            return False
        there = getattr(above, attribute, None)
        if there is None:
            return True
        own = {name for name, _ in (*module.named_parameters(), *module.named_buffers(), *module.named_children())}
        held = {*there._parameters, *there._buffers, *there._modules} if type(there) is nn.Module else own
        return type(there) is nn.Module and not held & own

    def put(self, path: str, module: nn.Module, form: tuple[Any, ...]) -> None:
        """Put ``module`` at ``path``; what a plain container there holds already moves into it."""
        above, attribute = self._container(path.rpartition(".")[0] + ".x"), path.rpartition(".")[2]
        assert above is not None  # fits() has asked
        there = getattr(above, attribute, None)
        if there is not None:
            module._parameters.update(there._parameters)
            module._buffers.update(there._buffers)
            module._modules.update(there._modules)
            module._non_persistent_buffers_set |= there._non_persistent_buffers_set
        above._modules[attribute] = module
        self._forms[path] = form

    def form(self, path: str) -> tuple[Any, ...] | None:
        """What :meth:`put` was told of the module at ``path``."""
        return self._forms.get(path)

    def _container(self, path: str) -> nn.Module | None:
        """The module that owns the last part of ``path``, made where it does not exist; ``None``: a tensor is there."""
        place = self.root
        for part in path.split(".")[:-1]:
            if not part:
                continue
            if part not in place._modules:
                if hasattr(place, part):
                    return None
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        return place


class Stateless(nn.Module):
    """A module that is called with its tensors: for constants that cannot all be its own.

    Attributes:
        names: of the tensors, in the order in which they are given behind the input.
    """

    def __init__(self, form: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        object.__setattr__(self, "form", form)  # no child: its tensors are nobody's
        self.names = tuple(names)

    def forward(self, value: torch.Tensor, *tensors: torch.Tensor) -> Any:
        form: nn.Module = self.__dict__["form"]
        form.train(self.training)
        return torch.func.functional_call(form, dict(zip(self.names, tensors, strict=True)), (value,))


class StatelessBatchNorm(nn.Module):
    """Batch normalisation whose tensors live elsewhere; like the module it moves the statistics while training."""

    def __init__(self, momentum: float | None, eps: float, names: Sequence[str]) -> None:
        super().__init__()
        self.momentum, self.eps, self.names = momentum, eps, tuple(names)

    def forward(self, value: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        named = dict(zip(self.names, tensors, strict=True))
        mean, variance = named["running_mean"], named["running_var"]
        weight, bias = named.get("weight"), named.get("bias")
        return F.batch_norm(value, mean, variance, weight, bias, self.training, self.momentum or 0.0, self.eps)


def borrowed(
    graph: fx.Graph, tree: Tree, name: str, module: nn.Module, inputs: Sequence[Any], tensors: Mapping[str, fx.Node]
) -> fx.Node:
    """Call what ``module`` does on tensors that live elsewhere.

    Args:
        graph: grows by the call.
        tree: owner of the module, where one is needed; it holds no tensors.
        name: for that module.
        module: says what to do; its own tensors are not looked at.
        inputs: fx nodes to call it with.
        tensors: the tensors by attribute of the module.
    """
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if type(module) is nn.Linear:
        return graph.call_function(F.linear, (*inputs, weight, bias))
    if type(module) is nn.LayerNorm:
        return graph.call_function(F.layer_norm, (*inputs, module.normalized_shape, weight, bias, module.eps))
    if type(module) is nn.Embedding:
        return graph.call_function(F.embedding, (*inputs, weight))
    if isinstance(module, nn.modules.conv._ConvNd) and type(module) in _CONVOLUTIONS:
        settings: tuple[Any, ...] = (module.stride, module.padding, module.dilation, module.groups)
        return graph.call_function(_CONVOLUTIONS[type(module)], (*inputs, weight, bias, *settings))
    target = tree.unique(name)
    called: nn.Module = Stateless(module, tuple(tensors))
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        called = StatelessBatchNorm(module.momentum, module.eps, tuple(tensors))
    tree.root.add_module(target, called)
    return graph.call_module(target, (*inputs, *tensors.values()))


def is_path(name: str) -> bool:
    """Whether ``name`` can be a state-dict key."""
    parts = name.split(".")
    ordinary = all(_PART.fullmatch(part) and part not in _ordinary() for part in parts)
    return ordinary and parts[0] not in _reserved()


def common_path(names: Mapping[str, str]) -> str | None:
    """``p`` where every attribute's name is ``p.<attribute>``."""
    paths = {name.removesuffix(f".{attribute}") for attribute, name in names.items()}
    path = paths.pop()
    fits = not paths and all(name == f"{path}.{attribute}" for attribute, name in names.items())
    return path if fits and is_path(path) else None


def size_of(value: torch.Tensor, axis: int) -> int:
    """The size of an axis."""
    return value.shape[axis]


@cache
def _ordinary() -> frozenset[str]:
    return frozenset(dir(nn.Module()))


@cache
def _reserved() -> frozenset[str]:
    """What every fx module has itself."""
    graph = fx.Graph()
    graph.output(None)
    return frozenset(dir(fx.GraphModule(nn.Module(), graph)))
