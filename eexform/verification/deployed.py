"""An exported network as verification sees it: messages, parameters, and ways to run it under any thresholds."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from eexform.backends import metadata, ort
from eexform.backends.lower_if import CONFIDENCE, EXIT_INDEX, THRESHOLDS
from eexform.backends.metadata import Exported
from eexform.backends.protos import subgraphs
from eexform.errors import EexformError, ModelError
from eexform.foreign import about
from eexform.ir.policy import Decisions, decide
from eexform.runtime import StagedSession

PROBE = "eexform.verify.threshold"
_BRANCH = "go_on_from_exit"


@dataclass(frozen=True)
class Level:
    """One exit in a file of the form ``if``.

    Attributes:
        graph: the graph that decides at this exit.
        fork: the ``If`` node.
        threshold: name of the value that the confidence is compared with.
    """

    graph: onnx.GraphProto
    fork: onnx.NodeProto
    threshold: str

    @property
    def rest(self) -> onnx.GraphProto:
        """What runs when a sample stays."""
        return next(attribute.g for attribute in self.fork.attribute if attribute.name == "then_branch")


class Deployed:
    """A file (``if``, ``multi``) or a folder of stages.

    Attributes:
        path: where it lies.
        exported: what its metadata say.
        models: file name → message, in order.
    """

    def __init__(self, path: str | Path, *, threads: int = 1) -> None:
        """Read it.

        Raises:
            ModelError: not there, unreadable, or not exported by eexform.
            RunError: written by a newer version.
        """
        self.path = Path(path)
        self.threads = threads
        self.models: dict[str, onnx.ModelProto]
        if self.path.is_dir():
            self._staged = StagedSession(self.path, threads=threads)
            files = [stage["file"] for stage in self._staged.manifest["stages"]]
            self.models = {name: _load(self.path / name) for name in files}
            described = self._staged.manifest.get("metadata", {})
        else:
            self.models = {self.path.name: _load(self.path)}
            described = {prop.key: prop.value for prop in self.model.metadata_props}
        try:
            self.exported: Exported = metadata.parse(described)
        except EexformError as error:
            raise type(error)(f"{self.path}: {error}") from error
        if self.path.is_dir() != (self.exported.form == "stages"):
            raise ModelError(
                f"{self.path}: its metadata say form {self.exported.form!r}, which it is not; export it again"
            )

    @property
    def model(self) -> onnx.ModelProto:
        """The one model, or the first stage."""
        return next(iter(self.models.values()))

    @property
    def form(self) -> str:
        return self.exported.form

    def parameters(self) -> dict[str, np.ndarray]:
        """Every initialiser of every file, branches included, by name."""
        found: dict[str, np.ndarray] = {}
        for name, model in self.models.items():
            folder = self.path if self.form == "stages" else self.path.parent
            for graph in subgraphs(model.graph):
                for tensor in graph.initializer:
                    found.setdefault(tensor.name, _array(tensor, folder, name))
        return found

    # -- the form "if" ------------------------------------------------------------------------------------------------

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The exits of a file of the form ``if``, outermost first.

        Raises:
            ModelError: the file has not the structure that eexform writes.
        """
        return _levels(self.model.graph, len(self.exported.exits), str(self.path))

    def thresholds(self) -> list[float | None]:
        """The thresholds as they stand in the file or manifest; ``None`` where they are an input."""
        if self.form == "stages":
            named = {"never": np.inf, "always": -np.inf}
            given = [stage["threshold"] for stage in self._staged.manifest["stages"][:-1]]
            return [named[value] if isinstance(value, str) else float(value) for value in given]
        if self.form == "multi":
            return [item.threshold for item in self.exported.exits]
        found: list[float | None] = []
        for level in self.levels:
            constant = next((t for t in level.graph.initializer if t.name == level.threshold), None)
            found.append(None if constant is None else float(numpy_helper.to_array(constant)))
        return found

    @cached_property
    def probe(self) -> onnx.ModelProto:
        """A copy of an ``if`` file whose thresholds are inputs, so that one session can be forced to any exit."""
        copied = onnx.ModelProto()
        copied.CopyFrom(self.model)
        for place, level in enumerate(_levels(copied.graph, len(self.exported.exits), str(self.path))):
            if any(value.name == THRESHOLDS for value in copied.graph.input):
                break
            for graph in subgraphs(level.graph):
                for node in graph.node:
                    for index, name in enumerate(node.input):
                        if name == level.threshold:
                            node.input[index] = f"{PROBE}{place}"
            copied.graph.input.append(onnx.helper.make_tensor_value_info(f"{PROBE}{place}", onnx.TensorProto.FLOAT, []))
        return copied

    @cached_property
    def probe_source(self) -> onnx.ModelProto | Path:
        """What to open a session of :attr:`probe` with: a file where the weights lie beside the model."""
        beside = {
            entry.value
            for graph in subgraphs(self.model.graph)
            for tensor in graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        if not beside:
            return self.probe
        self._folder = tempfile.TemporaryDirectory(prefix="eexform-verify-")
        folder = Path(self._folder.name)
        for name in beside:
            # a copy: onnxruntime refuses links, hard or soft, for fear of attacks
            shutil.copyfile(self.path.parent / name, folder / name)
        (folder / self.path.name).write_bytes(self.probe.SerializeToString())
        return folder / self.path.name

    def probe_feeds(self, thresholds: Sequence[float]) -> dict[str, np.ndarray]:
        """What :attr:`probe` wants besides the network's inputs."""
        values = np.asarray(thresholds, np.float32)
        if any(value.name == THRESHOLDS for value in self.model.graph.input):
            return {THRESHOLDS: values}
        return {f"{PROBE}{place}": np.asarray(value) for place, value in enumerate(values)}

    # -- running ------------------------------------------------------------------------------------------------------

    def run(
        self, feeds: Mapping[str, np.ndarray], thresholds: Sequence[float] | None = None, *, optimize: bool = True
    ) -> Decisions:
        """Run a batch.

        Args:
            feeds: the network's inputs.
            thresholds: in place of the file's own.
            optimize: let onnxruntime rewrite the network; it mends some faults, which another runtime would not.
        """
        if self.form == "stages":
            session = self._staged if optimize else self._staged_plain
            result = (session if thresholds is None else session.with_thresholds(thresholds)).run(feeds)
            return Decisions(result.exit_index, result.scores, result.confidence)
        if self.form == "multi":
            found = ort.run(self._session if optimize else self._session_plain, feeds)
            rules = self.exported.exits
            final, *exits = list(found.values())[: 1 + len(rules)]
            learned = [found.get(f"{CONFIDENCE}{place}") for place in range(len(rules))]
            if thresholds is not None:
                rules = tuple(replace(rule, threshold=float(t)) for rule, t in zip(rules, thresholds, strict=True))
            return decide(exits, final, rules, self.exported.scores, learned)
        takes_thresholds = any(value.name == THRESHOLDS for value in self.model.graph.input)
        if thresholds is None and takes_thresholds:
            thresholds = [item.threshold for item in self.exported.exits]
        if thresholds is None:
            found = ort.run(self._session if optimize else self._session_plain, feeds)
        else:
            session = self._probe_session if optimize else self._probe_session_plain
            found = ort.run(session, {**feeds, **self.probe_feeds(thresholds)})
        scores = next((value for name, value in found.items() if name not in (EXIT_INDEX, CONFIDENCE)), None)
        if scores is None or not {EXIT_INDEX, CONFIDENCE} <= set(found):
            raise ModelError(f"{self.path}: its outputs are {list(found)}, expected scores, exit_index and confidence")
        return Decisions(found[EXIT_INDEX], scores, found[CONFIDENCE])

    def staged(self, thresholds: Sequence[float]) -> StagedSession:
        """A staged network under other thresholds."""
        return self._staged.with_thresholds(thresholds)

    @cached_property
    def _session(self) -> onnxruntime.InferenceSession:
        return ort.session(self.path, threads=self.threads)

    @cached_property
    def _session_plain(self) -> onnxruntime.InferenceSession:
        return ort.session(self.path, threads=self.threads, optimize=False)

    @cached_property
    def _probe_session(self) -> onnxruntime.InferenceSession:
        return ort.session(self.probe_source, threads=self.threads)

    @cached_property
    def _probe_session_plain(self) -> onnxruntime.InferenceSession:
        return ort.session(self.probe_source, threads=self.threads, optimize=False)

    @cached_property
    def _staged_plain(self) -> StagedSession:
        return StagedSession(self.path, threads=self.threads, optimize=False)


def _levels(graph: onnx.GraphProto, exits: int, where: str) -> tuple[Level, ...]:
    found: list[Level] = []
    for place in range(exits):
        fork = next((node for node in graph.node if _goes_on(node) == f"{_BRANCH}{place}"), None)
        asked = None if fork is None else _asked(graph, fork)
        if fork is None or asked is None:
            raise ModelError(
                f"{where}: exit {place} has no branch as eexform writes it; the file was changed after the export, or "
                "lowered by something else"
            )
        level = Level(graph, fork, asked.input[1])
        found.append(level)
        graph = level.rest
    return tuple(found)


def _asked(graph: onnx.GraphProto, fork: onnx.NodeProto) -> onnx.NodeProto | None:
    """The comparison that the fork's condition is computed from: does anyone stay <- how many <- where <- leaves."""
    producer = {name: node for node in graph.node for name in node.output}
    node = producer.get(fork.input[0])
    while node is not None and node.op_type in ("Cast", "Size", "NonZero", "Not"):
        node = producer.get(node.input[0])
    return node if node is not None and node.op_type == "GreaterOrEqual" else None


def _goes_on(node: onnx.NodeProto) -> str:
    if node.op_type != "If":
        return ""
    return next((attribute.g.name for attribute in node.attribute if attribute.name == "then_branch"), "")


def _load(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    if not path.stat().st_size:
        raise ModelError(about(path))
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's errors share no base class
        raise ModelError(about(path) or f"{path}: cannot be read as ONNX ({error}); it may be damaged") from error


def _array(tensor: onnx.TensorProto, folder: Path, file: str) -> np.ndarray:
    try:
        return numpy_helper.to_array(tensor, base_dir=str(folder))
    except Exception as error:
        raise ModelError(f"{file}: parameter {tensor.name!r} cannot be read: {error}") from error
