"""Types of all values by running shape inference on concrete sizes and comparing the answers.

Every symbol of the graph's inputs gets a number, the network is walked node by node with onnx's own inference rules and
with the content of small integer tensors (shape arithmetic) computed exactly, and the walk is repeated with other
numbers. A dimension that stays is a number; one that follows the batch is ``"N"`` or ``"64*N"``; one that follows
another symbol carries its name. So no rule is needed for symbolic arithmetic, and ``Shape -> Gather -> Concat ->
Reshape`` chains of any form are followed. The work is linear in the number of nodes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.shape_inference import infer_node_outputs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from eexform.errors import ModelError
from eexform.ir.evaluate import LIMIT, evaluate
from eexform.ir.order import ordered
from eexform.ir.types import Dim, TensorType

if TYPE_CHECKING:
    from eexform.ir.graph import Graph

BATCH = "N"
_BATCH_PROBES = (5, 7)
_SYMBOL_PROBES = (64, 96)
_PRODUCT = re.compile(r"(?:(\d+)\*)?(.+)")
_STANDARD = ("", "ai.onnx", None)
_SAME_AS_FIRST = {"MeanVarianceNormalization", "GroupNormalization"}  # onnx has no shape rule for these
_FLOAT_SHAPE_DATA = {"Resize", "Upsample", "Range"}


class InferenceError(ModelError):
    """Shape inference found a contradiction; ``node`` is where."""

    def __init__(self, message: str, node: gs.Node) -> None:
        super().__init__(message)
        self.node = node


@dataclass(frozen=True, eq=False, slots=True)
class Known:
    """What one walk knows of a value.

    Attributes:
        element: ONNX element type, 0 where unknown.
        shape: sizes, ``None`` for an unknown one; ``None`` as a whole where the rank is unknown.
        content: the elements, for small tensors that are computed from constants and sizes alone.
        proto: type of a value that is not a tensor (sequence, optional, map).
    """

    element: int
    shape: tuple[int | None, ...] | None
    content: np.ndarray | None = None
    proto: onnx.TypeProto | None = None


UNKNOWN = Known(0, None)


def infer_types(graph: Graph) -> dict[str, TensorType]:
    """Type of every value of ``graph``: inputs, constants and what nodes compute.

    Raises:
        ModelError: the sizes contradict each other; names the node, its operator and its input shapes.
        GraphError: the graph has a cycle.
    """
    walk = Inference(graph.gs)
    for node in ordered(graph.gs.nodes):
        walk.step(node)
    return walk.types()


def split_dim(dim: str) -> tuple[int, str]:
    """``"64*N"`` -> ``(64, "N")``; ``"N"`` -> ``(1, "N")``."""
    match = _PRODUCT.fullmatch(dim)
    return (int(match[1] or 1), match[2]) if match else (1, dim)


def element_type(dtype: Any) -> int:
    """ONNX element type of a numpy dtype (or of an ONNX element type, as graphsurgeon has it for some); 0 for None."""
    if dtype is None:
        return 0
    if isinstance(dtype, int):
        return dtype
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def numpy_type(element: int) -> np.dtype | None:
    """Numpy dtype of an ONNX element type; ``None`` for 0."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element)) if element else None


class Inference:
    """Shape inference that is driven node by node, over all probes at once.

    Args:
        graph: the graph; its inputs' shapes are read at once, its nodes when :meth:`step` is called.
        batch: symbol of the batch.
    """

    def __init__(self, graph: gs.Graph, batch: str = BATCH) -> None:
        self._graph = graph
        self._domains = {item.domain: item.version for item in graph.import_domains or ()}
        self._opset = int(graph.opset)
        self._opset_ids = [onnx.helper.make_opsetid("", self._opset)]
        self._symbols = _symbols(graph.inputs, batch)
        self._probes = _assignments(self._symbols, batch)
        self._batch = batch
        self._known: dict[str, tuple[Known, ...]] = {}
        self._tainted: set[str] = set()
        for tensor in graph.inputs:
            element = element_type(tensor.dtype)
            self._known[tensor.name] = tuple(Known(element, _at(tensor.shape, probe)) for probe in self._probes)

    # -- walking -------------------------------------------------------------------------------------------------------

    def step(self, node: gs.Node) -> None:
        """Infer the outputs of ``node``, whose inputs must have been inferred before.

        Raises:
            InferenceError: the input shapes do not fit the operator.
        """
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and tensor.name not in self._known:
                self._known[tensor.name] = (_constant(tensor),) * len(self._probes)
        inputs = [self._known.get(t.name, (UNKNOWN,) * len(self._probes)) if t.name else None for t in node.inputs]
        rule = self._rule(node)
        results: list[list[Known]] = []
        for i, probe in enumerate(self._probes):
            at = [None if known is None else known[i] for known in inputs]
            # The same objects in, the same objects out: what does not depend on a symbol is inferred once.
            if i and all(known is None or known[i] is known[0] for known in inputs) and rule is not None:
                results.append(results[0])
            else:
                results.append(self._outputs(node, rule, at, probe))
        for j, tensor in enumerate(node.outputs):
            if tensor.name:
                self._known[tensor.name] = tuple(result[j] for result in results)
        if any(self._content_varies(t.name) for t in node.inputs if t.name):
            self._tainted |= {t.name for t in node.outputs if t.name and self._known[t.name][0].content is None}

    def _rule(self, node: gs.Node) -> tuple[Any, onnx.NodeProto] | None:
        if node.domain in _STANDARD:
            if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
                return None
            schema = _schema(node.op, self._opset, "")
        else:
            schema = _schema(node.op, self._domains.get(node.domain, 1), node.domain)
        return None if schema is None else (schema, OnnxExporter.export_node(node))

    def _outputs(
        self,
        node: gs.Node,
        rule: tuple[Any, onnx.NodeProto] | None,
        inputs: Sequence[Known | None],
        probe: Mapping[str, int],
    ) -> list[Known]:
        declared = [_declared(tensor, probe) for tensor in node.outputs]
        if rule is None or any(known is not None and not known.element and not known.proto for known in inputs):
            return declared
        schema, proto = rule
        standard = node.domain in _STANDARD
        contents = [None if known is None else known.content for known in inputs]
        data = {
            name: onnx.numpy_helper.from_array(array, name)
            for name, array in zip(proto.input, contents, strict=True)
            if array is not None and (array.dtype.kind in "iub" or node.op in _FLOAT_SHAPE_DATA)
        }
        types = {name: _proto(known) for name, known in zip(proto.input, inputs, strict=True) if known is not None}
        try:
            found = infer_node_outputs(schema, proto, types, data, opset_imports=self._opset_ids)
        except Exception as error:  # onnx raises its own C++ types, which share no base class with each other
            raise self._failure(node, inputs, str(error)) from error
        outputs = []
        for tensor, fallback in zip(node.outputs, declared, strict=True):
            known = _from_proto(found.get(tensor.name))
            if known.shape is None and node.op in _SAME_AS_FIRST and inputs[0] is not None:
                known = Known(known.element or inputs[0].element, inputs[0].shape)
            outputs.append(_completed(known, fallback))
        if standard:
            if node.op == "Reshape":
                self._check_reshape(node, inputs, outputs)
            outputs = self._with_content(node, proto, inputs, contents, outputs)
        return outputs

    def _with_content(
        self,
        node: gs.Node,
        proto: onnx.NodeProto,
        inputs: Sequence[Known | None],
        contents: Sequence[np.ndarray | None],
        outputs: list[Known],
    ) -> list[Known]:
        """Add the content of outputs that is computed from sizes and constants."""
        if node.op in ("Shape", "Size"):
            shape = None if inputs[0] is None else inputs[0].shape
            if shape is None:
                return outputs
            if node.op == "Shape":
                shape = shape[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
            if None in shape:
                return outputs
            array = np.array(shape if node.op == "Shape" else _volume(shape), np.int64)
            return [Known(onnx.TensorProto.INT64, array.shape, array)]
        if any(known is not None and content is None for known, content in zip(inputs, contents, strict=True)):
            return outputs
        if any(_volume(known.shape) > LIMIT for known in outputs):
            return outputs
        arrays = evaluate(proto, contents, self._opset)
        if arrays is None:
            return outputs
        with_content = [
            Known(known.element or element_type(array.dtype), array.shape, array if array.size <= LIMIT else None)
            for known, array in zip(outputs, arrays, strict=False)
        ]
        return with_content + outputs[len(with_content) :]

    def _check_reshape(self, node: gs.Node, inputs: Sequence[Known | None], outputs: Sequence[Known]) -> None:
        # onnx's own rule believes a target without -1 whatever the data's size: a baked-in batch would pass.
        before = inputs[0].shape if inputs[0] is not None else None
        after = outputs[0].shape
        if before is None or after is None or None in before or None in after:
            return
        if _volume(before) != _volume(after):
            raise self._failure(node, inputs, f"{list(before)} cannot be reshaped to {list(after)}")

    def _failure(self, node: gs.Node, inputs: Sequence[Known | None], reason: str) -> InferenceError:
        lines = [line.strip() for line in reason.splitlines() if line.strip()]
        text = (lines[0] if lines else "no reason given").removeprefix("[ShapeInferenceError]").strip()
        shapes = ", ".join(
            f"{t.name!r} {list(k.shape) if k is not None and k.shape is not None else '?'}"
            for t, k in zip(node.inputs, inputs, strict=True)
            if t.name
        )
        hint = f"the batch was tried as {_BATCH_PROBES[0]} and {_BATCH_PROBES[1]}"
        others = [symbol for symbol in self._symbols if symbol != self._batch]
        if others:
            named = ", ".join(map(repr, others))
            hint += f" and {named} as {_SYMBOL_PROBES[0]}: give input_shapes (--shape) if it is fixed"
        return InferenceError(
            f"node {node.name!r} ({node.op}): its input shapes do not fit: {text}; inputs: {shapes} ({hint})", node
        )

    # -- answers -------------------------------------------------------------------------------------------------------

    def types(self) -> dict[str, TensorType]:
        """Type of every value met so far."""
        return {name: self.type(name) for name in self._known}

    def known(self, name: str) -> tuple[Known, ...]:
        """What each probe knows of a value, in the order batch 5, batch 7, then one per other symbol."""
        return self._known[name]

    def type(self, name: str) -> TensorType:
        """Type of one value."""
        known = self._known[name]
        first = known[0]
        dtype = None if first.proto is not None else numpy_type(first.element)
        if first.shape is None or any(k.shape is None or len(k.shape) != len(first.shape) for k in known):
            return TensorType(dtype, None, None, name in self._tainted)
        if all(k is first for k in known):
            return TensorType(dtype, first.shape, None, name in self._tainted)
        shapes = [k.shape for k in known if k.shape is not None]
        shape = tuple(self._dim(sizes) for sizes in zip(*shapes, strict=True))
        axes = [axis for axis, dim in enumerate(shape) if dim == self._batch]
        depends = shapes[0] != shapes[1] or self._content_varies(name)
        return TensorType(dtype, shape, axes[0] if len(axes) == 1 else None, depends)

    def _content_varies(self, name: str) -> bool:
        if name in self._tainted:
            return True
        known = self._known.get(name)
        if known is None or known[0] is known[1]:
            return False
        first, second = known[0].content, known[1].content
        return first is not None and (second is None or not np.array_equal(first, second))

    def _dim(self, sizes: Sequence[int | None]) -> Dim:
        numbers = [size for size in sizes if size is not None]
        if len(numbers) < len(sizes):
            return None
        if len(set(numbers)) == 1:
            return numbers[0]
        for symbol in self._symbols:
            values = [probe[symbol] for probe in self._probes]
            factor, rest = divmod(numbers[0], values[0])
            if not rest and numbers == [factor * value for value in values]:
                return symbol if factor == 1 else f"{factor}*{symbol}"
        return None


# -- small pieces ------------------------------------------------------------------------------------------------------


def _symbols(inputs: Iterable[gs.Tensor], batch: str) -> list[str]:
    found = [split_dim(dim)[1] for tensor in inputs for dim in tensor.shape or () if isinstance(dim, str)]
    return list(dict.fromkeys([batch, *found]))


def _assignments(symbols: Sequence[str], batch: str) -> list[dict[str, int]]:
    """Batch 5, batch 7, then one probe per other symbol."""
    base = dict.fromkeys(symbols, _SYMBOL_PROBES[0]) | {batch: _BATCH_PROBES[0]}
    others = [base | {symbol: _SYMBOL_PROBES[1]} for symbol in symbols if symbol != batch]
    return [base, base | {batch: _BATCH_PROBES[1]}, *others]


def _at(shape: Sequence[Dim] | None, probe: Mapping[str, int]) -> tuple[int | None, ...] | None:
    if shape is None:
        return None
    sizes: list[int | None] = []
    for dim in shape:
        if isinstance(dim, str):
            factor, symbol = split_dim(dim)
            sizes.append(factor * probe[symbol] if symbol in probe else None)
        else:
            sizes.append(dim if dim is None or dim >= 0 else None)
    return tuple(sizes)


def _completed(known: Known, declared: Known) -> Known:
    """What inference found, and what the file declares where inference found nothing."""
    if declared.shape is None or known.proto is not None:
        return known
    element = known.element or declared.element
    if known.shape is None:
        return Known(element, declared.shape)
    if None not in known.shape or len(known.shape) != len(declared.shape):
        return known
    return Known(element, tuple(b if a is None else a for a, b in zip(known.shape, declared.shape, strict=True)))


def _declared(tensor: gs.Tensor, probe: Mapping[str, int]) -> Known:
    """What the file said about an output; all there is for custom operators and control flow."""
    if not tensor.name or getattr(tensor, "type", "tensor_type") != "tensor_type":
        return UNKNOWN
    return Known(element_type(tensor.dtype), _at(tensor.shape, probe))


def _constant(tensor: gs.Constant) -> Known:
    shape = tuple(int(size) for size in tensor.shape)
    element = element_type(tensor.dtype)
    small = _volume(shape) <= (LIMIT if numpy_type(element).kind in "iub" else 64)  # type: ignore[union-attr]
    return Known(element, shape, np.asarray(tensor.values) if small else None)


def _volume(shape: Sequence[int | None] | None) -> int:
    if shape is None:
        return 0
    volume = 1
    for size in shape:
        volume *= 1 if size is None else size
    return volume


@lru_cache(maxsize=4096)
def _schema(op: str, version: int, domain: str) -> Any:
    try:
        return onnx.defs.get_schema(op, version, domain)
    except onnx.defs.SchemaError:
        return None


def _proto(known: Known) -> onnx.TypeProto:
    return known.proto if known.proto is not None else _tensor_proto(known.element, known.shape)


@lru_cache(maxsize=4096)
def _tensor_proto(element: int, shape: tuple[int | None, ...] | None) -> onnx.TypeProto:
    return onnx.helper.make_tensor_type_proto(element, shape)


def _from_proto(proto: onnx.TypeProto | None) -> Known:
    if proto is None:
        return UNKNOWN
    kind = proto.WhichOneof("value")
    if kind is None:
        return UNKNOWN
    if kind != "tensor_type":
        return Known(0, None, None, proto)
    tensor = proto.tensor_type
    if not tensor.HasField("shape"):
        return Known(tensor.elem_type, None)
    return Known(tensor.elem_type, tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim))
