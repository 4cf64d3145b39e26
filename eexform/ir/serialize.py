"""Writing a graph as ONNX: to a model in memory, or to a file with the weights beside it when they are big.

Exits and the kind of scores travel as metadata (:data:`EXITS_KEY`, :data:`SCORES_KEY`), so that a file loads back to
the same digest. Nothing of the machine is written: no doc strings, no paths.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from eexform import files
from eexform.errors import GraphError, ModelError
from eexform.ir.exits import Exit, Scores
from eexform.ir.graph import Graph
from eexform.ir.provenance import pruned

EXITS_KEY = "eexform.exits"
SCORES_KEY = "eexform.scores"
FORMAT_KEY = "eexform.format"
FORMAT = 1
"""Version of the meaning of the two keys above; a file with a higher one is refused."""

EXTERNAL_ABOVE = 1_900_000_000
"""Bytes of weights above which they go to a side file: one protobuf message cannot hold 2 GB."""

_SMALL = 256
_PAGE = 4096


def to_model(graph: Graph) -> onnx.ModelProto:
    """The graph as one ONNX model in memory, exits as metadata.

    Raises:
        ModelError: the weights are too big for one message; use :func:`save`.
    """
    if weight_bytes(graph) > EXTERNAL_ABOVE:
        raise ModelError(
            f"the weights take {weight_bytes(graph) / 1e9:.1f} GB, more than one ONNX message can hold: save the graph "
            "to a file (its weights go to a file beside it) and use that"
        )
    return _export(graph, None)


def save(graph: Graph, path: str | Path, *, external: bool | None = None) -> None:
    """Write the graph to an ``.onnx`` file, whole or not at all.

    Args:
        graph: what to write.
        path: the file; folders are made.
        external: put the weights into ``<path>.data`` beside it; by default only above :data:`EXTERNAL_ABOVE` bytes.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    target = Path(path)
    if external is None:
        external = weight_bytes(graph) > EXTERNAL_ABOVE
    with ExitStack() as stack:
        temporary = stack.enter_context(files.writing(target))
        if not external:
            temporary.write_bytes(_export(graph, None).SerializeToString())
            return
        side = target.with_name(target.name + ".data")
        data = stack.enter_context(files.writing(side))  # entered last, so renamed first: never a model without data
        with open(data, "wb") as stream:
            model = _export(graph, _SideFile(stream, side.name))
        temporary.write_bytes(model.SerializeToString())


def weight_bytes(graph: Graph) -> int:
    """Bytes that the graph's constants take."""
    return sum(_nbytes(constant) for constant in every_constant(graph.gs))


def every_constant(graph: gs.Graph) -> Iterator[gs.Constant]:
    """Each constant once: those of the graph and those that only its sub-graphs use."""
    seen: set[int] = set()
    for body in (graph, *graph.subgraphs(recursive=True)):
        for node in body.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield tensor


def opset_versions(graph: gs.Graph) -> dict[str, int]:
    """Version of each operator domain that the graph uses, the standard one (``""``) always."""
    declared = {item.domain: int(item.version) for item in graph.import_domains or ()}
    used = {node.domain for body in (graph, *graph.subgraphs(recursive=True)) for node in body.nodes if node.domain} - {
        "ai.onnx"
    }
    return {"": int(graph.opset)} | {domain: declared.get(domain, 1) for domain in sorted(used)}


def read_metadata(props: Mapping[str, str]) -> tuple[tuple[Exit, ...], Scores | None, dict[str, str]]:
    """Exits, kind of scores and everything else from a file's metadata.

    Raises:
        ModelError: written by a newer version.
        GraphError: the description of the exits is damaged.
    """
    rest = dict(props)
    version = rest.pop(FORMAT_KEY, str(FORMAT))
    if not version.isdecimal() or int(version) > FORMAT:
        raise ModelError(
            f"the file was written by a newer eexform (format {version}; this one reads up to {FORMAT}): update eexform"
        )
    exits: tuple[Exit, ...] = ()
    text = rest.pop(EXITS_KEY, None)
    if text is not None:
        try:
            exits = tuple(Exit.from_json(plain) for plain in json.loads(text))
        except (ValueError, TypeError) as error:
            raise GraphError(f"the metadata {EXITS_KEY!r} is damaged: {error}") from error
    kind = rest.pop(SCORES_KEY, None)
    if kind not in (None, "logits", "probabilities"):
        raise GraphError(f"the metadata {SCORES_KEY!r} is damaged: {kind!r} is neither 'logits' nor 'probabilities'")
    return exits, kind, rest  # type: ignore[return-value]


class _SideFile:
    """Weights written one after the other, each array touched once."""

    def __init__(self, stream: BinaryIO, location: str) -> None:
        self._stream = stream
        self._location = location

    def add(self, array: np.ndarray) -> onnx.TensorProto:
        boundary = _PAGE if array.nbytes >= 2**20 else 64
        self._stream.write(b"\0" * (-self._stream.tell() % boundary))
        offset = self._stream.tell()
        self._stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        proto = onnx.TensorProto(
            dims=array.shape,
            data_type=onnx.helper.np_dtype_to_tensor_dtype(array.dtype),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        for key, value in (("location", self._location), ("offset", offset), ("length", array.nbytes)):
            proto.external_data.add(key=key, value=str(value))
        return proto


def _export(graph: Graph, side: _SideFile | None) -> onnx.ModelProto:
    draft = graph.gs.copy()
    for constant in every_constant(draft):
        values = constant._values  # the public property would load a lazy one
        if not isinstance(values, np.ndarray):
            continue
        if side is not None and values.nbytes >= _SMALL and values.dtype.kind in "fiub":
            constant.values = LazyValues(side.add(values))
        elif values.dtype.kind not in "fiub" or values.dtype.byteorder == ">":
            constant.values = LazyValues(onnx.numpy_helper.from_array(values, constant.name))
    for tensor in draft.outputs:
        known = graph.types.get(tensor.name)
        if known is not None and known.dtype is not None and isinstance(tensor, gs.Variable):
            tensor.dtype = known.dtype
            tensor.shape = None if known.shape is None else list(known.shape)
    draft.doc_string = ""
    versions = [onnx.helper.make_opsetid(domain, version) for domain, version in opset_versions(draft).items()]
    model = gs.export_onnx(draft, opset_imports=versions)
    minimum = onnx.helper.find_min_ir_version_for(versions, ignore_unknown=True)
    model.ir_version = max(minimum, int(draft.ir_version or 0), 8)
    model.producer_name, model.producer_version = "eexform", ""
    properties = pruned(graph.metadata, {node.name for node in graph.nodes}) | {
        FORMAT_KEY: str(FORMAT),
        SCORES_KEY: graph.scores,
    }
    if graph.exits:
        properties[EXITS_KEY] = json.dumps([exit_.to_json() for exit_ in graph.exits])
    onnx.helper.set_model_props(model, {key: properties[key] for key in sorted(properties)})
    return model


def _nbytes(constant: gs.Constant) -> int:
    return int(constant._values.nbytes)
