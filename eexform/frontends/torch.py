"""The front door for PyTorch: an ``nn.Module`` becomes a :class:`eexform.ir.graph.Graph`, or is refused.

The module is exported (``torch.export``, then ``torch.onnx``, not optimised) and goes through the ONNX door, so that
all of its rules hold. Beyond them: constants are called as in the module's state dict, BatchNormalization is a node
(folding is a pass, taken when asked), values are called after the sub-module that computes them, and the metadata say
where each node comes from (:mod:`eexform.ir.provenance`), what each constant is (:mod:`eexform.ir.kinds`) and which
names share one tensor.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir
import torch
from torch import Tensor, nn

from eexform.errors import EexformError, ModelError, OptionError
from eexform.frontends import onnx as onnx_door
from eexform.frontends import torch_clean, torch_export, torch_outputs, torch_state
from eexform.frontends.torch_reference import from_reference
from eexform.frontends.torch_weights import load_weights
from eexform.ir.exits import Scores
from eexform.ir.graph import Graph
from eexform.ir.kinds import TIED, Kind, with_kinds
from eexform.ir.provenance import Origin, with_origins

__all__ = ["from_module", "from_reference", "load_weights"]

OPSET = 20
_FIRST_OPSET = 18  # what torch.onnx writes at least
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")


def from_module(
    module: nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | Tensor,
    *,
    scores: Scores | None = None,
    output: str | int | None = None,
    opset: int = OPSET,
) -> Graph:
    """Make a graph of a trained classifier, as it computes in eval mode (so dropout is gone).

    The module is left as found: training flags, parameters, buffers, gradients, device. A module on another device than
    the CPU is copied.

    Args:
        module: takes tensors and returns class scores [batch, classes], or a tuple, dict or dataclass that holds them.
            ``DataParallel`` and ``torch.compile`` are unwrapped.
        example_inputs: what ``forward`` takes: a tensor, positional arguments, or keyword arguments as a mapping. Their
            values do not matter, but shapes and types do. The batch is axis 0 of every tensor that is as long there as
            the first one, and is free in the graph; every other size is fixed. An exporter takes a batch of one for a
            constant, so examples of one sample are repeated.
        scores: whether the scores are logits or probabilities; by default seen from the last operator.
        output: name or index of the scores, where the module returns several things and none is called ``logits``.
        opset: of ONNX, at least 18.

    Raises:
        ModelError: the module cannot be run or exported (says why, and in which sub-module), or is no classifier that
            eexform can handle.
        OptionError: ``opset`` is too low.
    """
    if opset < _FIRST_OPSET:
        raise OptionError(f"opset {opset}: the PyTorch exporter writes {_FIRST_OPSET} or newer")
    module = _unwrapped(module)
    _check(module)
    arguments, named = _examples(example_inputs)
    order = list(inspect.signature(module.forward).parameters)
    named = dict(sorted(named.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))
    if any(tensor.device.type != "cpu" for tensor in (*module.parameters(), *module.buffers())):
        module = copy.deepcopy(module).cpu()
    with torch_state.as_found(module):
        result = torch_export.run(module, arguments, named)
        chosen = torch_outputs.choose(result, output, _batch(arguments, named))
        with torch_export.giving(module, chosen):
            model = torch_export.export(module, arguments, named, opset=opset, expected=chosen(result))
        origins = torch_clean.tidy(model, module, chosen.name)
        proto = onnx_ir.to_proto(model)
    proto.graph.name = type(module).__name__
    try:
        graph = onnx_door.from_model(proto, scores=scores)
    except EexformError as error:
        error.args = (f"{type(module).__name__}: {error}",)  # kinds of errors differ in what their constructors want
        raise
    _refuse_random(module, graph, origins)
    nodes = {node.name for node in graph.nodes}
    metadata = with_origins(graph.metadata, {name: origin for name, origin in origins.items() if name in nodes})
    metadata = with_kinds(metadata, _kinds(module, graph))
    tied = torch_clean.tied_names(module, graph.constants)
    if tied:
        metadata[TIED] = json.dumps(tied, sort_keys=True)
    return graph.replace(metadata=metadata)


def _refuse_random(module: nn.Module, graph: Graph, origins: Mapping[str, Origin]) -> None:
    for node in graph.nodes:
        drops = node.op == "Dropout" and len(node.inputs) > 2
        if drops or node.op in _RANDOM:
            where = torch_export.at(module, origins[node.name].module if node.name in origins else "")
            advice = (
                "F.dropout drops in eval mode, too, unless told training=self.training"
                if drops
                else "leave out the noise where not self.training"
            )
            raise ModelError(
                f"the module draws random numbers in eval mode{where}, node {node.name!r} ({node.op}): its answers "
                f"cannot be compared; {advice}"
            )


def _kinds(module: nn.Module, graph: Graph) -> dict[str, Kind]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
    if len(frozen) == len(parameters):
        frozen = set()  # for inference, which says nothing about what may be trained
    buffers = frozen | {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules(remove_duplicate=False)
        for name in part._buffers.keys() - part._non_persistent_buffers_set  # those are in no state dict
    }
    return {
        name: "buffer" if name in buffers else "parameter" if name in parameters else "constant"
        for name in graph.constants
    }


def _unwrapped(module: nn.Module) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got a {type(module).__name__}")
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError("a TorchScript module cannot be exported: give the Python module it was made of")
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):  # torch.compile
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


def _check(module: nn.Module) -> None:
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if not any(True for _ in module.parameters()):
        raise ModelError(f"{type(module).__name__} has no parameters: expected a trained classifier")
    for name, tensor in tensors.items():
        if nn.parameter.is_lazy(tensor):
            raise ModelError(f"parameter {name!r} has no shape yet: run the lazy module once before loading it")
        if tensor.is_meta:
            raise ModelError(f"parameter {name!r} is on the meta device and has no values: load the weights first")
        if tensor.dtype in (torch.float16, torch.bfloat16) or tensor.is_complex() or tensor.is_quantized:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ModelError(f"parameter {name!r} is {kind}: eexform works in float32, give module.float()")


def _examples(given: Sequence[Any] | Mapping[str, Any] | Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword examples, on the CPU, with at least two samples."""
    if isinstance(given, (Tensor, np.ndarray)):
        given = (given,)
    if isinstance(given, Mapping):
        named = {str(name): _tensor(value) for name, value in given.items()}
        arguments: tuple[Any, ...] = ()
    elif isinstance(given, (tuple, list)):
        named, arguments = {}, tuple(_tensor(value) for value in given)
    else:
        raise ModelError(
            f"example_inputs is a {type(given).__name__}: expected a tuple of tensors or a mapping of keyword arguments"
        )
    values = {**{f"argument {place}": value for place, value in enumerate(arguments)}, **named}
    for name, value in values.items():
        if not isinstance(value, Tensor) and not (value is None or isinstance(value, (bool, int, float, str))):
            raise ModelError(f"example input {name!r} is a {type(value).__name__}: expected a tensor")
    batch = _batch(arguments, named)
    if batch == 0:
        raise ModelError("the example inputs hold no sample: give at least one")
    if batch == 1:
        taken = {len(value) for value in values.values() if isinstance(value, Tensor) and value.ndim}
        samples = next(count for count in range(2, len(taken) + 3) if count not in taken)
        arguments = tuple(_repeated(value, samples) for value in arguments)
        named = {name: _repeated(value, samples) for name, value in named.items()}
    return arguments, named


def _tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _repeated(value: Any, samples: int) -> Any:
    """Several samples of one; two arguments that are the same tensor stay two."""
    if isinstance(value, Tensor) and value.ndim and len(value) == 1:
        return value.repeat(samples, *[1] * (value.ndim - 1))
    return value


def _batch(arguments: Sequence[Any], named: Mapping[str, Any]) -> int:
    first = next((value for value in (*arguments, *named.values()) if isinstance(value, Tensor) and value.ndim), None)
    if first is None:
        raise ModelError("example_inputs hold no tensor with a batch: give what forward takes, batch first")
    return len(first)
