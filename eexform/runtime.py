"""Running a staged network: numpy and onnxruntime, nothing else of eexform but its errors and file helpers.

session = StagedSession("stages/")
result = session.run({"input": batch})
result.scores, result.exit_index, result.confidence
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from eexform.errors import ModelError, RunError
from eexform.files import file_sha256, read_json

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Result:
    """What each sample gets.

    Attributes:
        scores: [n, classes] of the exit that the sample left at.
        exit_index: [n] int64: 0..E-1, E for the final classifier.
        confidence: [n] float32 there.
    """

    scores: np.ndarray
    exit_index: np.ndarray
    confidence: np.ndarray


@dataclass(frozen=True)
class _Stage:
    session: onnxruntime.InferenceSession
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]  # scores, confidence, then what is handed on
    live: Mapping[str, int]
    fixed: frozenset[str]
    threshold: np.float32 | None


class StagedSession:
    """A staged network, ready to run: per exit, samples that are sure enough leave and the rest goes on.

    Attributes:
        manifest: the manifest as read.
        inputs: names of the network's inputs.
        stages: number of stages (exits and the final classifier).
        runs: how often each stage was executed so far.
    """

    def __init__(
        self, folder: str | Path, *, threads: int = 1, check_files: bool = True, optimize: bool = True
    ) -> None:
        """Load every stage.

        Args:
            folder: what ``eexform export --form stages`` wrote.
            threads: onnxruntime's threads inside an operator.
            check_files: compare each file's sha-256 with the manifest.
            optimize: let onnxruntime fuse and rewrite; ``False`` runs the nodes as they stand.

        Raises:
            ModelError: no manifest, a stage is missing or is not the file that was exported.
            RunError: the manifest is damaged or was written by a newer version.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise ModelError(f"{folder}: no {MANIFEST} there; give the folder that a staged export wrote")
        self.manifest = _checked(read_json(folder / MANIFEST), folder)
        self._axes: dict[str, int | None] = _axes(self.manifest, folder)
        self.inputs: tuple[str, ...] = tuple(self._axes)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        stages = self.manifest["stages"]
        self._stages = [_open(folder, stage, options, check_files) for stage in stages]
        self._fixed = frozenset().union(*(stage.fixed for stage in self._stages))
        self.stages = len(self._stages)
        self.runs = [0] * self.stages

    def with_thresholds(self, thresholds: Sequence[float]) -> StagedSession:
        """The same network, loaded once, under other thresholds (one per exit).

        Raises:
            ModelError: not as many thresholds as exits.
        """
        other = copy(self)
        other._stages = [
            replace(stage, threshold=threshold)
            for stage, threshold in zip(self._stages, self._chosen(thresholds), strict=True)
        ]
        other.runs = [0] * self.stages
        return other

    def run(self, feeds: Mapping[str, np.ndarray]) -> Result:
        """Classify a batch.

        Args:
            feeds: arrays by input name, the batch on the axis that the manifest gives.

        Raises:
            ModelError: an input is missing, unknown, or batches of different size.
        """
        pool = {name: np.asarray(feeds[name]) for name in self._check(feeds)}
        axis, first = next((axis, name) for name, axis in self._axes.items() if axis is not None)
        rows = np.arange(pool[first].shape[axis])
        scores = np.zeros((len(rows), self.manifest["num_classes"]), np.float32)
        exit_index = np.full(len(rows), len(self._stages) - 1, np.int64)
        confidence = np.zeros(len(rows), np.float32)
        for place, stage in enumerate(self._stages):
            self.runs[place] += 1
            made = _execute(stage, place, pool)
            pool.update(zip(stage.outputs[2:], made[2:], strict=True))
            if stage.threshold is None:
                scores[rows], confidence[rows] = made[0], made[1]
                break
            stays = ~(made[1] >= stage.threshold)
            if stays.all() and rows.size:
                continue
            leaving = rows[~stays]
            scores[leaving], confidence[leaving], exit_index[leaving] = made[0][~stays], made[1][~stays], place
            rows = rows[stays]
            if not rows.size:
                break
            kept = {name: np.compress(stays, pool[name], axis=at) for name, at in stage.live.items()}
            kept |= {
                name: value for name, value in pool.items() if name in self._fixed or self._axes.get(name, 0) is None
            }
            pool = kept
        return Result(scores, exit_index, confidence)

    def _chosen(self, thresholds: Sequence[float]) -> list[np.float32 | None]:
        if len(thresholds) != self.stages - 1:
            raise ModelError(f"the network has {self.stages - 1} exits, but {len(thresholds)} thresholds were given")
        return [*(np.float32(value) for value in thresholds), None]

    def _check(self, feeds: Mapping[str, np.ndarray]) -> tuple[str, ...]:
        missing = [name for name in self.inputs if name not in feeds]
        unknown = [name for name in feeds if name not in self.inputs]
        if missing or unknown:
            raise ModelError(f"the network's inputs are {list(self.inputs)}, found {list(feeds)}")
        flat = [name for name, axis in self._axes.items() if axis is not None and np.ndim(feeds[name]) <= axis]
        if flat:
            raise ModelError(f"input {flat[0]!r} has shape {np.shape(feeds[flat[0]])}: there is no batch axis in it")
        sizes = {name: np.shape(feeds[name])[axis] for name, axis in self._axes.items() if axis is not None}
        if len(set(sizes.values())) != 1:
            raise ModelError(f"the inputs' batch sizes differ: {sizes}")
        return self.inputs


def _checked(manifest: Any, folder: Path) -> dict[str, Any]:
    needed = ("format", "inputs", "stages", "num_classes", "output")
    if not isinstance(manifest, dict) or any(key not in manifest for key in needed) or not manifest["stages"]:
        raise RunError(f"{folder / MANIFEST}: not the manifest of a staged network, or damaged")
    if not isinstance(manifest["format"], int) or manifest["format"] > FORMAT:
        raise RunError(
            f"{folder / MANIFEST}: format {manifest['format']} was written by a newer eexform "
            f"({manifest.get('version')}); this one reads up to {FORMAT}"
        )
    if not isinstance(manifest["stages"], list) or not isinstance(manifest["num_classes"], int):
        raise RunError(f"{folder / MANIFEST}: its stages or its number of classes are damaged; export the stages again")
    return manifest


def _axes(manifest: Mapping[str, Any], folder: Path) -> dict[str, int | None]:
    """Batch axis of every input."""
    try:
        axes = {str(port["name"]): port["batch_axis"] for port in manifest["inputs"]}
        if not all(axis is None or isinstance(axis, int) for axis in axes.values()) or not any(
            axis is not None for axis in axes.values()
        ):
            raise ValueError(axes)
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{folder / MANIFEST}: the description of the inputs is damaged: {error!r}") from error
    return axes


def _threshold(value: Any) -> np.float32 | None:
    named = {"never": math.inf, "always": -math.inf}
    return None if value is None else np.float32(named.get(value, value) if isinstance(value, str) else value)


def _execute(stage: _Stage, place: int, pool: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    try:
        return list(stage.session.run(list(stage.outputs), {name: pool[name] for name in stage.inputs}))
    except Exception as error:  # onnxruntime's errors share no base class
        raise ModelError(f"stage {place}: onnxruntime failed: {error}") from error


def _open(folder: Path, stage: Mapping[str, Any], options: onnxruntime.SessionOptions, check_files: bool) -> _Stage:
    try:
        path = folder / str(stage["file"])
        outputs = (stage["scores"], stage["confidence"], *stage["hands_on"])
        live = {str(entry["name"]): int(entry["batch_axis"]) for entry in stage["live"]}
        inputs = tuple(str(port["name"]) for port in stage["inputs"])
        fixed = frozenset(map(str, stage["fixed"]))
        threshold = _threshold(stage["threshold"])
        digests = {path: stage["sha256"], path.with_name(path.name + ".data"): stage["data_sha256"]}
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{folder / MANIFEST}: a stage's description is damaged: {error!r}") from error
    if path.resolve().parent != folder.resolve():
        raise RunError(f"{folder / MANIFEST}: stage file {stage['file']!r} lies outside the folder")
    for file, digest in digests.items():
        if digest is None:
            continue
        if not file.is_file():
            raise ModelError(f"{file}: no such file, but the manifest names it; export the stages again")
        if check_files and file_sha256(file) != digest:
            raise ModelError(f"{file}: not the file that was exported (its sha-256 differs from the manifest's)")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class
        raise ModelError(f"{path}: onnxruntime cannot load it: {error}") from error
    return _Stage(session, inputs, outputs, live, fixed, threshold)
