"""A graph as onnxruntime executes it: its operators after fusion and layout changes, as kernels.

The optimised graph is what onnxruntime itself writes; run once operator by operator, it shows the shapes of all values.
It differs from the original where it matters for time: convolutions are fused with what follows them and work on
blocks of channels (``nchwc.Conv``), and moving into and out of that layout takes calls of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from eexform.backends import ort
from eexform.cost_models._kernels import Kernel
from eexform.cost_models._ort_describe import Call, Value, describe
from eexform.cost_models._timing import random_feeds
from eexform.errors import ModelError
from eexform.ir.graph import Graph
from eexform.ir.serialize import to_model

_BLOCKED = "_nchwc"
"""Onnxruntime names a blocked operator after the value that it used to make, with this behind it."""

_SHORT = 16  # numbers in a vector of axes or sizes; longer ones are data
_TINY = {"float16": np.finfo(np.float16).tiny, "float32": np.finfo(np.float32).tiny, "float64": np.finfo(float).tiny}


@dataclass(frozen=True, eq=False)
class Execution:
    """One operator of the optimised graph.

    Attributes:
        kernel: what it is to a table; its name is the node of the original graph that its time belongs to.
        node: as onnxruntime wrote it.
        feeds: values of its inputs in one run, constants among them, by name.
        constants: which of them are parameters.
        opsets: versions of the operator sets.
        control_flow: whether there are graphs inside it, which are not looked into.
    """

    kernel: Kernel
    node: onnx.NodeProto
    feeds: Mapping[str, np.ndarray]
    constants: frozenset[str]
    opsets: tuple[onnx.OperatorSetIdProto, ...]
    control_flow: bool = False


def kernels(graph: Graph, bindings: Mapping[str, int] | None = None) -> list[Kernel]:
    """The operators that onnxruntime executes, one sample; in order of execution."""
    return [execution.kernel for execution in executions(graph, bindings)]


def executions(graph: Graph, bindings: Mapping[str, int] | None = None) -> list[Execution]:
    """The operators that onnxruntime executes, with the values that they get for one random sample.

    Args:
        graph: exits are outputs as any other.
        bindings: sizes of symbolic dimensions other than the batch.

    Raises:
        ModelError: onnxruntime does not take the graph, or its weights are too big for one message.
        GraphError: the size of an input is not known.
        OptionError: the type of an input is not known.
    """
    model = optimised(graph)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    values: dict[str, Any] = {**constants, **_computed(model, random_feeds(graph, 1, bindings or {}))}
    blocked = {name for node in model.graph.node if _is_blocked(node) for name in node.output}
    described = {name: _value(array, name in constants, name in blocked) for name, array in values.items()}
    owners = _owners(graph, model)
    opsets = tuple(model.opset_import)
    found = []
    for node, owner in zip(model.graph.node, owners, strict=True):
        kernel = _kernel(node, owner, described)
        feeds = {name: values[name] for name in node.input if name in values}
        inside = any(attribute.type in _GRAPHS for attribute in node.attribute)
        found.append(Execution(kernel, node, feeds, frozenset(feeds) & frozenset(constants), opsets, inside))
    return found


def optimised(graph: Graph) -> onnx.ModelProto:
    """What onnxruntime makes of a graph when all its optimisations are on.

    Raises:
        ModelError: onnxruntime does not take the graph, or its weights are too big for one message.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    content = to_model(graph).SerializeToString()
    with tempfile.TemporaryDirectory(prefix="eexform-") as folder:
        path = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(path)
        try:
            onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            return onnx.load(path)
        except Exception as error:  # onnxruntime's errors share only the base class of all
            raise ModelError(f"onnxruntime does not optimise the graph: {error}") from error


def _computed(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Every value of a model, inputs included; operators run as they stand."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    present = {value.name for value in shown.graph.output}
    for name in dict.fromkeys(name for node in shown.graph.node for name in node.output if name):
        if name not in present:
            shown.graph.output.append(onnx.ValueInfoProto(name=name))
    return {**feeds, **ort.run(ort.session(shown, optimize=False), feeds)}


_GRAPHS = frozenset({onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS})


def _is_blocked(node: onnx.NodeProto) -> bool:
    """Whether what a node makes is in onnxruntime's blocked layout."""
    return node.domain.endswith(".nchwc") and node.op_type != "ReorderOutput"


def _value(array: Any, constant: bool, blocked: bool) -> Value:
    if not isinstance(array, np.ndarray):  # sequences, maps and optionals
        return Value(type(array).__name__, ())
    dtype, whole, subnormal = str(array.dtype), None, False
    if np.issubdtype(array.dtype, np.integer) and array.size <= _SHORT:
        whole = tuple(int(number) for number in array.ravel())
    elif dtype in _TINY:
        size = np.abs(array)
        subnormal = bool(((size > 0) & (size < _TINY[dtype])).any())
    return Value(dtype, tuple(array.shape), constant, whole, subnormal, blocked)


def _kernel(node: onnx.NodeProto, owner: str, values: Mapping[str, Value]) -> Kernel:
    attributes = {
        attribute.name: helper.get_attribute_value(attribute)
        for attribute in node.attribute
        if attribute.type not in _GRAPHS and attribute.type != onnx.AttributeProto.TENSOR
    }
    domain = node.domain.rpartition(".")[2]
    op = node.op_type if node.domain in ("", "ai.onnx") else f"{domain}.{node.op_type}"
    call = Call(
        op,
        attributes,
        tuple(values.get(name) if name else None for name in node.input),
        tuple(values.get(name) if name else None for name in node.output),
    )
    found = describe(call)
    made = call.result
    return Kernel(
        name=owner,
        nodes=(owner,),
        op=op,
        kind=found.kind,
        variant=" ".join(found.tokens),
        sizes=found.sizes,
        macs=found.macs,
        flops=0 if found.kind != "elementwise" else made.elements,
        read_bytes=_bytes(value for value in call.inputs if value is not None and not value.constant),
        write_bytes=_bytes(value for value in call.outputs if value is not None),
        weight_bytes=_bytes(value for value in call.inputs if value is not None and value.constant),
        dtype=made.dtype,
        channels=found.channels,
    )


def _bytes(values: Iterable[Value]) -> int:
    return sum(value.elements * _itemsize(value.dtype) for value in values)


def _itemsize(dtype: str) -> int:
    try:
        return np.dtype(dtype).itemsize
    except TypeError:
        return 0


# -- whose time it is ------------------------------------------------------------------------------------------------


def _owners(graph: Graph, model: onnx.ModelProto) -> list[str]:
    """The original node that each operator's time belongs to: the one whose value it makes or is named after.

    An operator that makes only new values, as one that changes the layout, belongs to the first that follows it and is
    known; where nothing follows, to the nearest before it.
    """
    makers = {tensor.name: node.name for node in graph.nodes for tensor in node.outputs if tensor.name}
    nodes = list(model.graph.node)
    owners = [_named(node, makers) for node in nodes]
    made_by = {name: place for place, node in enumerate(nodes) for name in node.output if name}
    readers: dict[int, list[int]] = {}
    sources: dict[int, list[int]] = {}
    for place, node in enumerate(nodes):
        for name in node.input:
            if name in made_by:
                readers.setdefault(made_by[name], []).append(place)
                sources.setdefault(place, []).append(made_by[name])
    for place in reversed(range(len(nodes))):
        following = [other for other in sorted(readers.get(place, ())) if owners[other] is not None]
        if owners[place] is None and following:
            owners[place] = owners[following[0]]
    for place in range(len(nodes)):
        before = [other for other in sources.get(place, ()) if owners[other] is not None]
        if owners[place] is None and before:
            owners[place] = owners[before[-1]]
    last = makers.get(graph.final, graph.nodes[-1].name if graph.nodes else "")
    return [last if owner is None else owner for owner in owners]


def _named(node: onnx.NodeProto, makers: Mapping[str, str]) -> str | None:
    for value in (*node.output, *_stems(node.name)):
        if value in makers:
            return makers[value]
    return None


def _stems(name: str) -> Iterator[str]:
    if name.endswith(_BLOCKED):
        yield name.removesuffix(_BLOCKED)
