"""Lowering to one ONNX file per block, for runtimes without control flow or devices that hand work on.

The files share values by name. A runner (:class:`eexform.runtime.StagedSession` is one) keeps a pool of arrays: it
starts with the network's inputs, each stage takes its inputs out of it and puts its ``hands_on`` outputs in, and after
an exit the rows of the values in ``live`` are thinned to the samples that stay (not ``confidence >= threshold``: NaN
never leaves); what is in neither ``live`` nor ``fixed`` may be dropped. ``manifest.json`` beside the files says all
that:

    format, version, form ("stages"), metadata (the ``eexform.*`` keys), output, scores, num_classes,
    inputs: [{name, dtype, shape, batch_axis}],
    stages: [{file, sha256, data_sha256 (weights beside the file) or null,
              inputs: [{name, dtype, shape, batch_axis}],     # batch_axis null: does not depend on the samples
              scores, confidence: names of outputs, hands_on: [names of outputs], fixed: [those without a batch axis],
              live: [{name, batch_axis}],                      # what later stages need, after this stage
              site, head, measure, temperature, threshold}]    # null in the last stage; threshold "never" / "always"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from eexform._version import __version__
from eexform.backends import metadata, protos
from eexform.backends.staging import Part, divide, known_dtype
from eexform.errors import GraphError, StorageError
from eexform.files import file_sha256, write_json, writing_folder
from eexform.ir.graph import Graph
from eexform.ir.types import Dim, TensorType

MANIFEST = "manifest.json"
FORMAT = 1
CONFIDENCE = "confidence"

_OURS = re.compile(r"manifest\.json|stage\d+\.onnx(\.data)?")


@dataclass(frozen=True)
class Stages:
    """A staged network in memory.

    Attributes:
        models: one model per stage, in order.
        manifest: what ``manifest.json`` will hold, but for the files' digests.
    """

    models: tuple[onnx.ModelProto, ...]
    manifest: Mapping[str, Any]


def lower_stages(graph: Graph) -> Stages:
    """One model per block and the manifest that ties them together.

    Args:
        graph: a graph with exits.

    Returns:
        The stages. Every stage yields class scores under the original output's name, and ``confidence`` [N].

    Raises:
        GraphError: no exits, or a value that cannot be recomputed for undecided rows.
    """
    parts = divide(graph, [graph.final, CONFIDENCE])
    models, described = [], []
    if any(CONFIDENCE in part.block.live for part in parts):
        raise GraphError(f"the network has a value called {CONFIDENCE!r} that stages would hand on; rename it")
    for depth, part in enumerate(parts):
        made, stage = _stage(graph, part, depth)
        models.append(made)
        described.append(stage)
    manifest = {
        "format": FORMAT,
        "version": __version__,
        "form": "stages",
        "metadata": metadata.build(graph, "stages"),
        "output": graph.final,
        "scores": graph.scores,
        "num_classes": graph.num_classes,
        "inputs": [_port(tensor.name, graph.types[tensor.name]) for tensor in graph.gs.inputs],
        "stages": described,
    }
    return Stages(tuple(models), manifest)


def save_stages(graph: Graph, folder: str | Path) -> None:
    """Lower to stages and write them, whole or not at all.

    Raises:
        GraphError: see :func:`lower_stages`.
        StorageError: the folder cannot be written, or holds something else than stages.
    """
    _replaceable(Path(folder))
    stages = lower_stages(graph)
    with writing_folder(folder) as temporary:
        described = []
        for stage, made in zip(stages.manifest["stages"], stages.models, strict=True):
            path = temporary / stage["file"]
            protos.save(made, path)
            data = path.with_name(path.name + ".data")
            digests = {"sha256": file_sha256(path), "data_sha256": file_sha256(data) if data.exists() else None}
            described.append({"file": stage["file"], **digests, **stage})
        write_json(temporary / MANIFEST, {**stages.manifest, "stages": described})


def _replaceable(folder: Path) -> None:
    """Writing swaps the whole folder: only one that is empty or holds nothing but earlier stages may go."""
    if not folder.is_dir():
        return
    foreign = sorted(path.name for path in folder.iterdir() if not _OURS.fullmatch(path.name))
    if foreign:
        raise StorageError(
            f"{folder}: holds other things than stages ({', '.join(foreign[:3])}), which would be lost; "
            "name a new folder"
        )


def _stage(graph: Graph, part: Part, depth: int) -> tuple[onnx.ModelProto, dict[str, Any]]:
    block, scope, handed_on = part.block, part.scope, part.hands_on
    part.confidence.name = CONFIDENCE
    scope.publish(block.scores, graph.final, alone=block.scores not in handed_on)
    inputs = part.inputs()
    body = protos.graph_proto(
        f"stage{depth}",
        protos.node_protos(scope.draft),
        [
            protos.scores_info(graph, graph.final),
            protos.value_info(CONFIDENCE, np.float32, ["N"]),
            *(protos.value_info(name, known_dtype(name, kind), kind.shape) for name, kind in handed_on.items()),
        ],
        [protos.initializer(constant) for constant in protos.constants(scope.draft.nodes).values()],
        [protos.value_info(name, known_dtype(name, kind), kind.shape) for name, kind in inputs.items()],
    )
    leaving = graph.exits[depth].to_json() if depth < len(graph.exits) else {}
    stage = {
        "file": f"stage{depth}.onnx",
        "inputs": [_port(name, kind) for name, kind in inputs.items()],
        "scores": graph.final,
        "confidence": CONFIDENCE,
        "hands_on": list(handed_on),
        "fixed": list(part.fixed),
        "live": [{"name": value, "batch_axis": graph.types[value].batch_axis} for value in block.live],
        **{key: leaving.get(key) for key in ("site", "head", "measure", "temperature", "threshold")},
    }
    return protos.model(graph, body, metadata.build(graph, "stages")), stage


def _port(name: str, kind: TensorType) -> dict[str, Any]:
    shape: list[Dim] | None = None if kind.shape is None else list(kind.shape)
    return {"name": name, "dtype": str(known_dtype(name, kind)), "shape": shape, "batch_axis": kind.batch_axis}
