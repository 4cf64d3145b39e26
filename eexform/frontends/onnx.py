"""The front door for ONNX: a file or a model in memory becomes a :class:`eexform.ir.graph.Graph`, or is refused.

What comes out holds to these rules, so that nothing behind this door has to ask: opset 13 or newer, flat (functions
inlined, ``Constant`` nodes are initialisers), node and value names unique, the batch dimension of every input called
``"N"``, exactly one classifier output ``[N, classes]`` (and one per exit), finite parameters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER
from onnx_graphsurgeon.util.exception import OnnxGraphSurgeonException

from eexform.errors import EexformError, GraphError, ModelError
from eexform.foreign import about
from eexform.frontends import batch, classifier, names, opset, skeleton
from eexform.frontends.external import ExternalData, is_external, tensors
from eexform.frontends.opset import first_line
from eexform.ir.checks import check, check_finite
from eexform.ir.exits import Scores
from eexform.ir.graph import Graph
from eexform.ir.serialize import read_metadata, save, to_model

__all__ = ["from_model", "load", "save", "to_model"]


_ABSOLUTE_PATH = re.compile(r"""(?:^|[\s"'=(,\[])(?:~?/[^/\s]+/|[A-Za-z]:[\\/]|\\\\)|file://""")
"""A path from the root, a drive, a share or a home folder; an address such as https://... is none."""


def load(
    path: str | Path,
    *,
    scores: Scores | None = None,
    output: str | None = None,
    input_shapes: Mapping[str, Sequence[int | str]] | None = None,
    min_opset: int = 17,
) -> Graph:
    """Read a trained classifier from an ONNX file, with its weights mapped rather than read where they lie beside it.

    Args:
        path: the ``.onnx`` file.
        scores: whether the output holds logits or probabilities; by default seen from the graph.
        output: name of the classifier's output, where the model has several.
        input_shapes: shapes by input name, batch first, numbers or symbols; for models that do not say them.
        min_opset: the model is converted up to this operator set where it is older (see ``frontends.opset.lift``).

    Raises:
        ModelError: the file cannot be read, or is no classifier that eexform can handle; says why and where.
    """
    path = Path(path)
    if not path.exists():
        raise ModelError(f"{path}: no such file")
    if not path.is_file() or not path.stat().st_size:
        raise ModelError(about(path) or f"{path}: not a file; give the .onnx file itself")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError and OSError share no base class
        raise ModelError(
            about(path)
            or f"{path}: cannot be read as an ONNX model ({first_line(error)}); it is truncated, damaged or "
            "another kind of file"
        ) from error
    try:
        return from_model(
            model, path.parent, scores=scores, output=output, input_shapes=input_shapes, min_opset=min_opset
        )
    except EexformError as error:
        error.args = (f"{path}: {error}",)  # kinds of errors differ in what their constructors want
        raise


def from_model(
    model: onnx.ModelProto,
    base_dir: str | Path | None = None,
    *,
    scores: Scores | None = None,
    output: str | None = None,
    input_shapes: Mapping[str, Sequence[int | str]] | None = None,
    min_opset: int = 17,
) -> Graph:
    """Like :func:`load`, for a model in memory (which is not changed).

    Args:
        model: the model; its external data, if any, is not loaded yet.
        base_dir: folder of external data.
        scores, output, input_shapes, min_opset: see :func:`load`.
    """
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise ModelError("there is no network in it; the file is empty, truncated or another kind of file")
    opset.standard_version(model)
    properties = {prop.key: prop.value for prop in model.metadata_props}
    if _exported_alone(properties):  # a plan without exits is an ordinary network
        properties = {key: text for key, text in properties.items() if key not in _ABOUT_EXPORT}
    if properties.get("eexform.form"):
        raise ModelError(
            f"this network already has its exits built in (form {properties['eexform.form']!r}); load the model it was "
            "made from"
        )
    exits, kind, metadata = read_metadata(properties)
    external = ExternalData(None if base_dir is None else Path(base_dir))
    model = batch.with_shapes(model, input_shapes or {})
    _validate(model, external)

    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    model = opset.lift(model, min_opset)
    draft = _import(model, external)
    if exits:
        if output is not None:
            raise ModelError("the file has exits: its outputs are fixed, leave out --output (output=)")
    else:
        classifier.choose_output(draft, output)
    names.tidy(draft)
    batch.make_symbolic(draft)

    graph = Graph(draft, exits=exits, metadata=_without_paths(metadata))
    graph.scores = classifier.scores_of(graph, scores or kind)
    try:
        if exits:
            check(graph)
        classifier.check_outputs(graph)
        check_finite(graph)
    except GraphError as error:
        raise ModelError(str(error)) from error
    return graph


_ABOUT_EXPORT = ("eexform.version", "eexform.form", "eexform.plan", "eexform.trunk_digest")


def _exported_alone(properties: Mapping[str, str]) -> bool:
    """Whether the file was exported from a plan that has no exits."""
    try:
        return "eexform.form" in properties and json.loads(properties.get("eexform.plan", "{}")).get("exits") == []
    except (ValueError, AttributeError):
        return False


def _validate(model: onnx.ModelProto, external: ExternalData) -> None:
    """External data by our own rules, everything else by onnx's checker."""
    for tensor in tensors(model.graph):
        if is_external(tensor):
            external.array(tensor)  # raises where the file is missing, too short or outside the folder
    try:
        skeleton.check(model)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"the model is not valid ONNX: {first_line(error)}") from error
    except ValueError as error:
        raise ModelError(f"the model cannot be checked: {first_line(error)}") from error


def _import(model: onnx.ModelProto, external: ExternalData) -> gs.Graph:
    """The graphsurgeon graph: weights as arrays, constants as initialisers, no stale intermediate shapes."""
    try:
        with G_LOGGER.suppress(G_LOGGER.ERROR):  # it warns about types that _materialise puts right
            draft = gs.import_onnx(model)
    except (OnnxGraphSurgeonException, UnicodeDecodeError, ValueError) as error:
        raise ModelError(f"onnx-graphsurgeon cannot read the model: {first_line(error)}") from error
    draft.doc_string = ""
    draft.opset = opset.standard_version(model)
    draft.functions = []
    for body in (draft, *draft.subgraphs(recursive=True)):
        names.constants_to_initialisers(body)
        for node in body.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant):
                    _materialise(tensor, external)
            # Absent and empty mean the same, and graphsurgeon cannot write an empty list.
            for key in [key for key, value in node.attrs.items() if isinstance(value, list) and not value]:
                del node.attrs[key]
            for value in node.attrs.values():
                if isinstance(value, gs.Constant):
                    _materialise(value, external)
    return draft


def _materialise(constant: gs.Constant, external: ExternalData) -> None:
    values = constant._values
    if isinstance(values, np.ndarray):
        return
    proto = values.tensor
    try:
        if isinstance(proto, onnx.SparseTensorProto):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(proto.values.data_type)
            constant.values = values.load().astype(dtype)
        elif is_external(proto):
            constant.values = external.array(proto)
        elif proto.data_type != onnx.TensorProto.STRING:  # numpy has no bytes of its own for strings: they stay as is
            constant.values = onnx.numpy_helper.to_array(proto)
    except ValueError as error:
        raise ModelError(f"parameter {constant.name!r} is damaged: {first_line(error)}") from error
    constant.data_location = None


def _without_paths(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata without entries that tell about somebody's machine (our own hold value names, which may look alike)."""
    return {
        key: value for key, value in metadata.items() if key.startswith("eexform.") or not _ABSOLUTE_PATH.search(value)
    }
