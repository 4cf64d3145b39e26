"""Operator-set versions: which are accepted, and how old ones are lifted."""

from __future__ import annotations

import onnx

from eexform.errors import ModelError
from eexform.frontends.skeleton import skeleton

OLDEST = 13
"""Older operator sets have another Softmax and keep axes in attributes; every exporter of the last years is newer."""


def standard_version(model: onnx.ModelProto) -> int:
    """Version of the standard operator set that a model asks for.

    Raises:
        ModelError: it names none, or one older than :data:`OLDEST`.
    """
    versions = [item.version for item in model.opset_import if item.domain in ("", "ai.onnx")]
    if not versions:
        raise ModelError("the model does not say which ONNX operator set it uses; it may be damaged")
    newest = onnx.defs.onnx_opset_version()
    if versions[0] > newest:
        raise ModelError(
            f"the model uses ONNX opset {versions[0]}; the installed onnx knows up to {newest}: update onnx"
        )
    if versions[0] < OLDEST:
        raise ModelError(
            f"the model uses ONNX opset {versions[0]}; {OLDEST} and newer are accepted: export it again with a newer "
            f"opset, or convert it first (onnx.version_converter.convert_version(model, {OLDEST}))"
        )
    return int(versions[0])


def lift(model: onnx.ModelProto, minimum: int) -> onnx.ModelProto:
    """The model at opset ``minimum`` or newer.

    A model with custom operators or with sub-graphs keeps its opset: onnx's converter refuses the first and does not
    look into the second. Big weights do not pass through the converter: they stand in as inputs while it works, so
    that models of any size, and weights in external files, are lifted alike.

    Raises:
        ModelError: the converter failed, or its result is not valid.
    """
    version = standard_version(model)
    if version >= minimum or not _convertible(model):
        return model
    bare, weights = skeleton(model)
    declared = {value.name for value in model.graph.input}
    try:
        lifted = onnx.version_converter.convert_version(bare, minimum)
    except Exception as error:  # C++ exceptions of several kinds
        raise ModelError(
            f"the model cannot be converted from opset {version} to {minimum}: {first_line(error)}; export it again "
            f"with opset {minimum} or newer, or give min_opset={version} to keep it as it is"
        ) from error
    kept = [value for value in lifted.graph.input if value.name in declared]
    del lifted.graph.input[:]
    lifted.graph.input.extend(kept)
    lifted.graph.initializer.extend(weights)
    lifted.metadata_props.extend(model.metadata_props)
    return lifted


def first_line(error: Exception) -> str:
    """First line of a message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _convertible(model: onnx.ModelProto) -> bool:
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            return False
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            return False
    return not model.graph.sparse_initializer
