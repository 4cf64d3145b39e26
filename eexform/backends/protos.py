"""From scopes to ONNX messages, and the frame that every exported model shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter, dtype_to_onnx

from eexform import files
from eexform._version import __version__
from eexform.errors import GraphError
from eexform.ir.graph import BATCH, Graph
from eexform.ir.serialize import EXTERNAL_ABOVE, weight_bytes
from eexform.ir.types import Dim


def value_info(name: str, dtype: np.dtype | type | int, shape: Sequence[Dim] | None) -> onnx.ValueInfoProto:
    """A typed value; unknown dimensions stay open, products such as ``64*N`` become a symbol of that name."""
    return helper.make_tensor_value_info(name, dtype_to_onnx(dtype), None if shape is None else list(shape))


def constants(nodes: Iterable[gs.Node]) -> dict[str, gs.Constant]:
    """The constants that the nodes use, by name, in order of first use."""
    return {t.name: t for node in nodes for t in node.inputs if isinstance(t, gs.Constant)}


def initializer(constant: gs.Constant, name: str | None = None) -> onnx.TensorProto:
    """The constant's data as an initialiser, loaded from disk where it still lies there."""
    stored = getattr(constant, "_values", None)
    proto = getattr(stored, "tensor", None)
    if isinstance(proto, onnx.TensorProto) and proto.data_location != onnx.TensorProto.EXTERNAL:
        copied = onnx.TensorProto()
        copied.CopyFrom(proto)  # keeps element types that numpy does not have
    elif isinstance(proto, onnx.TensorProto):
        copied = numpy_helper.from_array(np.ascontiguousarray(constant.values))
    else:
        copied = onnx.TensorProto()
        copied.CopyFrom(OnnxExporter.export_tensor_proto(constant))
    copied.name = name or constant.name
    return copied


def graph_proto(
    name: str,
    nodes: Sequence[onnx.NodeProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[onnx.TensorProto],
    inputs: Sequence[onnx.ValueInfoProto] = (),
) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), name, list(inputs), list(outputs), initializer=list(initializers))


def node_protos(draft: gs.Graph) -> list[onnx.NodeProto]:
    """The nodes of a draft, in the order in which they were emitted (which is topological)."""
    return [OnnxExporter.export_node(node) for node in draft.nodes]


def model(source: Graph, graph: onnx.GraphProto, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """The model around a lowered graph: opsets of the source, our name and version, the metadata; checked.

    Raises:
        GraphError: onnx's checker refuses the result.
    """
    imports = {"": source.opset}
    for entry in source.gs.import_domains or ():
        imports.setdefault(entry.domain, entry.version)
    for domain in _domains(graph):
        imports.setdefault(domain, 1)
    opsets = [helper.make_opsetid(domain, version) for domain, version in imports.items()]
    built = helper.make_model(
        graph,
        opset_imports=opsets,
        producer_name="eexform",
        producer_version=__version__,
    )
    built.ir_version = max(8, helper.find_min_ir_version_for(opsets, ignore_unknown=True))
    helper.set_model_props(built, dict(metadata))
    if weight_bytes(source) < EXTERNAL_ABOVE:
        check(built)
    return built


def check(built: onnx.ModelProto) -> None:
    """onnx's full check.

    Raises:
        GraphError: the model is refused.
    """
    try:
        onnx.checker.check_model(built, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GraphError(
            f"the lowered model is not valid ONNX; this is a bug in eexform, please report it: {error}"
        ) from error


def scores_info(source: Graph, name: str, rows: str = BATCH) -> onnx.ValueInfoProto:
    """Class scores: ``[rows, classes]`` in the element type of the final classifier."""
    return value_info(name, source.types[source.final].dtype or np.float32, [rows, source.num_classes])


def input_infos(source: Graph) -> list[onnx.ValueInfoProto]:
    """The graph's inputs as inference knows them."""
    found = []
    for tensor in source.gs.inputs:
        kind = source.types.get(tensor.name)
        shape = tensor.shape if kind is None or kind.shape is None else kind.shape
        found.append(value_info(tensor.name, tensor.dtype, shape))
    return found


def save(built: onnx.ModelProto, path: str | Path) -> None:
    """Write a lowered model, whole or not at all; above 1.9 GB the weights go to ``<path>.data`` beside it.

    Raises:
        StorageError: it cannot be written.
    """
    target = Path(path)
    weights = [tensor for tensor in _tensors(built.graph) if len(tensor.raw_data) >= 1024]
    if sum(len(tensor.raw_data) for tensor in weights) <= EXTERNAL_ABOVE:
        files.write_bytes(target, built.SerializeToString())
        return
    side = target.with_name(target.name + ".data")
    with files.writing(target) as temporary:
        slim = onnx.ModelProto()
        with files.writing(side) as data, open(data, "wb") as stream:  # renamed first: never a model without its data
            slim.CopyFrom(built)
            for tensor in _tensors(slim.graph):
                if len(tensor.raw_data) >= 1024:
                    stream.write(b"\0" * (-stream.tell() % 4096))
                    place = {"location": side.name, "offset": stream.tell(), "length": len(tensor.raw_data)}
                    stream.write(tensor.raw_data)
                    tensor.ClearField("raw_data")
                    tensor.data_location = onnx.TensorProto.EXTERNAL
                    for key, value in place.items():
                        tensor.external_data.add(key=key, value=str(value))
        temporary.write_bytes(slim.SerializeToString())


def subgraphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    """The graph and every graph inside its nodes, outermost first."""
    found = [graph]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += subgraphs(attribute.g)
    return found


def _tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    return [tensor for part in subgraphs(graph) for tensor in part.initializer]


def _domains(graph: onnx.GraphProto) -> set[str]:
    return {node.domain for part in subgraphs(graph) for node in part.node} - {"", "ai.onnx"}
