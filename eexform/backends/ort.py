"""onnxruntime: sessions with clear errors, and graphs that show their inner values."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime

from eexform.errors import GraphError, ModelError, suggest
from eexform.foreign import about
from eexform.ir.graph import Graph
from eexform.ir.serialize import EXTERNAL_ABOVE, save, to_model, weight_bytes

Feeds = Mapping[str, np.ndarray]
_QUIET = 3  # errors only: onnxruntime's warnings are about its own optimiser


def session(
    model: onnx.ModelProto | bytes | str | Path | Graph,
    *,
    threads: int = 1,
    optimize: bool = True,
    profile: Path | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> onnxruntime.InferenceSession:
    """Open a session.

    Args:
        model: a file, a model in memory, or a graph.
        threads: threads inside an operator; operators run one after the other.
        optimize: let onnxruntime fuse and rewrite; ``False`` runs the nodes as they stand.
        profile: where given, a JSON trace is written to a file whose name starts with this path, at the latest on
            ``session.end_profiling()``, which returns the full name.
        providers: execution providers in order of preference.

    Raises:
        ModelError: onnxruntime does not take the model.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _QUIET
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if isinstance(model, Graph):
        if weight_bytes(model) > EXTERNAL_ABOVE:
            with tempfile.TemporaryDirectory(prefix="eexform-") as folder:
                path = Path(folder) / "model.onnx"
                save(model, path)
                return _open(str(path), options, providers)
        model = to_model(model)
    if isinstance(model, onnx.ModelProto):
        return _open(model.SerializeToString(), options, providers)
    if isinstance(model, bytes):
        return _open(model, options, providers)
    if not Path(model).is_file():
        raise ModelError(f"{model}: no such file")
    try:
        return _open(str(model), options, providers)
    except ModelError as error:
        raise ModelError(about(model) or f"{model}: {error}") from error


def run(
    session: onnxruntime.InferenceSession, feeds: Feeds, outputs: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Run a session.

    Args:
        session: from :func:`session`.
        feeds: an array per input.
        outputs: names of the outputs wanted; all by default.

    Raises:
        ModelError: an input is missing or unknown, or onnxruntime fails; says which node where it can be told.
    """
    expected = {value.name for value in session.get_inputs()}
    for name in feeds:
        if name not in expected:
            raise ModelError(f"the model has no input {name!r}: {suggest(name, expected)}")
    missing = sorted(expected - set(feeds))
    if missing:
        raise ModelError(f"the model's inputs {missing} were not given")
    names = [value.name for value in session.get_outputs()] if outputs is None else list(outputs)
    try:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))
    except Exception as error:  # onnxruntime's exceptions share only the base class of all
        raise ModelError(f"onnxruntime failed: {_reason(error)}") from error


def tap(graph: Graph, values: Sequence[str]) -> Graph:
    """The graph with more outputs: the given values, after those it has (each once, in the given order).

    Raises:
        GraphError: a value does not exist, or is a constant or an input (which need no tap).
    """
    draft = graph.copy()
    outputs = list(draft.gs.outputs)
    present = {tensor.name for tensor in outputs}
    for name in values:
        tensor = draft.tensor(name)
        if isinstance(tensor, gs.Constant) or not tensor.inputs:
            raise GraphError(
                f"the value {name!r} is {'a constant' if isinstance(tensor, gs.Constant) else 'an input'} "
                "of the graph; only what a node computes can be tapped"
            )
        if name not in present:
            present.add(name)
            known = graph.types[name]
            tensor.dtype = known.dtype
            tensor.shape = None if known.shape is None else list(known.shape)
            outputs.append(tensor)
    draft.gs.outputs = outputs
    tapped = graph.replace(draft.gs)
    tapped.__dict__["types"] = graph.types  # the same values: no need to infer again
    return tapped


def _open(
    source: str | bytes, options: onnxruntime.SessionOptions, providers: Sequence[str]
) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(source, options, providers=list(providers))
    except Exception as error:  # as above
        raise ModelError(f"onnxruntime does not take the model: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """onnxruntime's message without its code numbers and source lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    parts = text.split(" : ", 3)
    return parts[-1] if text.startswith("[ONNXRuntimeError]") else text
