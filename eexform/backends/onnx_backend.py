"""The fx backend under onnx's own interface, so that onnx's backend test suite (and any user of it) can run it.

Models need not be classifiers here: whatever :func:`eexform.backends.fx.raise_to_fx` has rules for is run, of every
operator set. Computation is torch's, in evaluation mode and without gradients; who wants to train takes
``raise_to_fx`` itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
import torch
from onnx.backend.base import Backend, BackendRep
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER
from onnx_graphsurgeon.util.exception import OnnxGraphSurgeonException

from eexform.backends.fx import raise_to_fx
from eexform.backends.torch_types import to_array, to_tensor
from eexform.errors import EexformError, ModelError
from eexform.ir.graph import Graph
from eexform.ir.order import ordered

_STANDARD = ("", "ai.onnx")
_LIFT_BELOW, _LIFT_TO = 13, 17
"""Operators of sets before 13 take as attributes what later ones take as inputs; onnx itself can convert most."""


class EexformBackend(Backend):
    """Runs ONNX models as torch modules (``onnx.backend.base.Backend``)."""

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> bool:
        """Whether every operator of the model can be raised."""
        try:
            cls.prepare(model, device, **kwargs)
        except (EexformError, onnx.checker.ValidationError):
            return False
        return True

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> EexformRep:
        """The model as a module that can be run many times.

        Raises:
            ModelError: an operator or a form of it cannot be raised, or the device is not there.
            onnx.checker.ValidationError: the model is not valid ONNX.
        """
        if not cls.supports_device(device):
            raise ModelError(f"device {device!r} is not there; this machine has {', '.join(_devices())}")
        super().prepare(model, device, **kwargs)  # onnx's checker
        graph = import_model(model)
        module = raise_to_fx(graph).eval().to(_devices()[device.split(":")[0]])
        return EexformRep(module, graph.inputs, graph.outputs, [tensor.dtype for tensor in graph.gs.outputs])

    @classmethod
    def run_node(
        cls,
        node: onnx.NodeProto,
        inputs: Any,
        device: str = "CPU",
        outputs_info: Sequence[tuple[np.dtype, tuple[int, ...]]] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Run one operator of the newest operator set (``opset_version=`` for another).

        Args:
            node: the operator with the names of its inputs and outputs.
            inputs: arrays in the order of the node's inputs that are not left out.
            device: ``"CPU"`` or ``"CUDA"``.
            outputs_info: not needed; part of the interface.
        """
        names = [name for name in node.input if name]
        values = list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)
        if len(names) != len(values):
            raise ModelError(f"operator {node.op_type} has {len(names)} inputs, {len(values)} values were given")
        graph = onnx.helper.make_graph(
            [node],
            "node",
            [
                onnx.helper.make_tensor_value_info(
                    name, onnx.helper.np_dtype_to_tensor_dtype(np.asarray(value).dtype), np.shape(value)
                )
                for name, value in zip(names, values, strict=True)
            ],
            [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in node.output if name],
        )
        opset = int(kwargs.get("opset_version", onnx.defs.onnx_opset_version()))
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid(node.domain, opset)])
        module = raise_to_fx(import_model(model)).eval().to(_devices()[device.split(":")[0]])
        return EexformRep(module, tuple(names), tuple(name for name in node.output if name)).run(values)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """``"CPU"``, and ``"CUDA"`` where torch sees one."""
        return device.split(":")[0] in _devices()


class EexformRep(BackendRep):
    """A raised model.

    Attributes:
        module: the torch module, in evaluation mode.
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.
        kinds: element types of the outputs, where the model says them.
    """

    def __init__(
        self,
        module: torch.fx.GraphModule,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        kinds: Sequence[Any] | None = None,
    ) -> None:
        self.module = module
        self.inputs = inputs
        self.outputs = outputs
        self.kinds = [None] * len(outputs) if kinds is None else list(kinds)
        place = next((value.device for value in (*module.parameters(), *module.buffers())), None)
        self._device = place or torch.device("cpu")

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Compute the outputs.

        Args:
            inputs: arrays in the model's order, or by name; a list of arrays for a sequence, ``None`` for an empty
                optional.

        Returns:
            one array (list of arrays, ``None``) per output, in the model's order.
        """
        if isinstance(inputs, Mapping):
            values = [inputs[name] for name in self.inputs]
        else:
            values = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        if len(values) > len(self.inputs):
            raise ModelError(f"the model has {len(self.inputs)} inputs, {len(values)} values were given")
        with torch.no_grad():
            # forward, not a call: fx prints a traceback of its own to the terminal where a call fails
            found = self.module.forward(*(_fed(value, self._device) for value in values))
        results = (found,) if len(self.outputs) == 1 else tuple(found)
        return tuple(_read(value, kind) for value, kind in zip(results, self.kinds, strict=True))


def import_model(model: onnx.ModelProto) -> Graph:
    """A graph for ``raise_to_fx`` from any valid model: functions inlined, constants as such, nodes named and sorted.

    Raises:
        ModelError: onnx-graphsurgeon cannot read the model.
    """
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    model = _lifted(model)
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    _constants(copied.graph)
    try:
        with G_LOGGER.suppress(G_LOGGER.ERROR):
            draft = gs.import_onnx(copied)
    except (OnnxGraphSurgeonException, UnicodeDecodeError, ValueError, KeyError) as error:
        raise ModelError(f"onnx-graphsurgeon cannot read the model: {error}") from error
    versions = [item.version for item in model.opset_import if item.domain in _STANDARD]
    draft.opset = versions[0] if versions else onnx.defs.onnx_opset_version()
    for body in (draft, *draft.subgraphs(recursive=True)):
        for number, node in enumerate(body.nodes):
            node.name = node.name or f"{node.op}_{number}"
            for tensor in node.inputs:
                _loaded(tensor)
            for key in [key for key, value in node.attrs.items() if isinstance(value, list) and not value]:
                del node.attrs[key]  # absent and empty mean the same
        for tensor in body.outputs:
            _loaded(tensor)
    draft.nodes = ordered(draft.nodes)
    return Graph(draft)


def _lifted(model: onnx.ModelProto) -> onnx.ModelProto:
    """Old operator sets through onnx's own converter, as it is where that cannot."""
    versions = {item.domain: item.version for item in model.opset_import}
    version = versions.get("", versions.get("ai.onnx"))
    if version is None or version >= _LIFT_BELOW or set(versions) - set(_STANDARD):
        return model
    if version < 7 and any(node.op_type == "PRelu" for node in model.graph.node):
        return model  # the converter forgets that its slopes went with the channels then, and broadcast since
    if version < 9 and any(node.op_type == "Scan" for node in model.graph.node):
        return model  # ... and drops the batch that they scanned sample by sample then
    try:
        return onnx.version_converter.convert_version(model, _LIFT_TO)
    except Exception:  # C++ exceptions of several kinds; the rules know the common old forms themselves
        return model


def _constants(body: onnx.GraphProto) -> None:
    """``Constant`` nodes of numbers become initialisers, in sub-graphs too; what is an output stays a node."""
    outputs, kept = {value.name for value in body.output}, []
    for node in body.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                _constants(inner)
        tensor = _constant_tensor(node) if node.op_type == "Constant" and node.domain in _STANDARD else None
        if tensor is None or node.output[0] in outputs:
            kept.append(node)
            continue
        tensor.name = node.output[0]
        body.initializer.append(tensor)
    del body.node[:]
    body.node.extend(kept)


def _constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    attribute = node.attribute[0]
    match attribute.name:
        case "value" if attribute.t.data_type != onnx.TensorProto.STRING:
            return attribute.t
        case "value_int" | "value_ints":
            return onnx.numpy_helper.from_array(np.array(onnx.helper.get_attribute_value(attribute), np.int64))
        case "value_float" | "value_floats":
            return onnx.numpy_helper.from_array(np.array(onnx.helper.get_attribute_value(attribute), np.float32))
    return None


def _loaded(tensor: gs.Tensor) -> None:
    """Element types that graphsurgeon keeps in a form of its own become arrays of these types."""
    if isinstance(tensor, gs.Constant) and isinstance(tensor._values, LazyValues):
        proto = tensor._values.tensor
        if isinstance(proto, onnx.TensorProto) and proto.data_type != onnx.TensorProto.STRING:
            tensor.values = onnx.numpy_helper.to_array(proto)


def _devices() -> dict[str, str]:
    return {"CPU": "cpu", "CUDA": "cuda"} if torch.cuda.is_available() else {"CPU": "cpu"}


def _fed(value: Any, device: torch.device) -> Any:
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return [_fed(item, device) for item in value]
    if isinstance(value, onnx.TensorProto):
        value = onnx.numpy_helper.to_array(value)
    return to_tensor(np.asarray(value)).to(device)


def _read(value: Any, kind: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_read(item, kind) for item in value]
    return to_array(value, kind) if isinstance(value, torch.Tensor) else value
