"""Distillation: a network that was made smaller learns from the answers of the one that it was made from.

Fine-tuning (:mod:`eexform.training.finetune`) by the teacher's logits, for networks without exits as for those with.
What comes back has the names, the metadata and the exits of what was given.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from eexform.backends import ort
from eexform.data.dataset import Dataset
from eexform.errors import RunError, need
from eexform.ir.graph import Graph
from eexform.ir.serialize import save
from eexform.progress import Progress, Silent
from eexform.training.finetune_options import FinetuneOptions, losses_of

LEARNING_RATE = 0.05
"""Peak for a network that has to find back what was cut away; fine-tuning of a whole one begins lower."""

_BATCH = 250


@dataclass(frozen=True, eq=False)
class DistillReport:
    """What a distillation did.

    Attributes:
        graph: the network with the parameters of the best epoch, under the names that it had.
        epochs: epochs after which training ended; those before an interruption count.
        best_epoch: after how many epochs the loss on calibrate was lowest.
        seconds: wall time of all epochs, those before an interruption included.
        device: where, and in what arithmetic.
        history: what was measured before training (entry 0) and after every epoch, as of
            :class:`~eexform.training.finetune.FinetuneReport`.
        test: figures on the test split by onnxruntime, where they were asked for: ``samples``, ``agreement`` with the
            teacher, and with labels ``accuracy`` and ``teacher_accuracy``; of the network ``before`` and ``after``.
    """

    graph: Graph
    epochs: int
    best_epoch: int
    seconds: float
    device: str
    history: tuple[dict[str, Any], ...]
    test: Mapping[str, Any] = field(default_factory=dict)

    @property
    def losses(self) -> tuple[float, ...]:
        """The training loss of each epoch."""
        return tuple(sum(entry["losses"].values()) for entry in self.history[1:])

    @property
    def agreement(self) -> tuple[float, ...]:
        """Share of calibrate on which network and teacher give the same answer: before training, after each epoch."""
        return tuple(self._calibrate("agreement"))

    @property
    def accuracy(self) -> tuple[float, ...]:
        """Share of right answers on calibrate, alike; without labels the agreement."""
        return tuple(self._calibrate("accuracy"))

    def _calibrate(self, name: str) -> list[float]:
        return [float(entry["calibrate"][name][-1]) for entry in self.history if name in entry["calibrate"]]

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the graph."""
        return {
            "epochs": self.epochs,
            "best_epoch": self.best_epoch,
            "seconds": round(self.seconds, 2),
            "device": self.device,
            "losses": list(self.losses),
            "agreement": list(self.agreement),
            "accuracy": list(self.accuracy),
            "test": dict(self.test),
        }


def distill_trunk(
    graph: Graph,
    dataset: Dataset,
    teacher: Graph,
    *,
    folder: str | Path,
    options: FinetuneOptions | None = None,
    threads: int = 0,
    progress: Progress | None = None,
    device: str = "auto",
    **settings: Any,
) -> DistillReport:
    """Train ``graph`` to answer as ``teacher`` does.

    After every epoch the state goes to ``folder``; called again with the same arguments it goes on from there, and a
    finished training is not repeated.

    Args:
        graph: flat, with exits or without; normalisation not folded, so that it is trained as normalisation.
        dataset: bound to the graph or not; head-train is streamed with augmentation, calibrate judges the epochs.
        teacher: with the same inputs and classes, usually the network before it was cut.
        folder: of the checkpoint; one training each.
        options: how to train; default :func:`distill_options`.
        threads: of the CPU; 0 is one per core.
        progress: who is told.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda:1``, ...
        settings: single ones of :class:`FinetuneOptions`, such as ``epochs``, in place of those of ``options``.

    Raises:
        OptionError: teacher and network do not fit each other, or a setting is wrong.
        DataError: the data do not fit the network, or there is nothing to train on.
        RunError: the folder holds the state of another training.
        TrainingError: the loss is not finite.
    """
    from eexform.training.finetune import finetune  # it imports torch, which takes a second or two
    from eexform.training.finetune_parts import check_teacher

    show = progress or Silent()
    check_teacher(graph, teacher)
    bound = dataset.bind(graph)
    labelled = bound.labels == "given"
    chosen = distill_options(graph, labelled=labelled, **settings) if options is None else replace(options, **settings)
    chosen = chosen.settled(labelled=labelled, gated=False)
    if _normalised(teacher) and not _normalised(graph):
        show.say(
            "warning: the teacher has batch normalisation and the network has none: it is folded into the weights, "
            "which then learn slowly and less well; distil first, and fold afterwards"
        )
    found = finetune(
        graph, bound, chosen, folder=folder, teacher=teacher, threads=threads, progress=show, device=device
    )
    return DistillReport(found.graph, found.epochs, found.best_epoch, found.seconds, found.device, found.history)


def distill_options(graph: Graph, *, labelled: bool = True, **settings: Any) -> FinetuneOptions:
    """How :func:`distill_trunk` trains where nothing else is said.

    Args:
        graph: what is trained; a network without exits has one learning rate, whichever of the two is given.
        labelled: whether there are labels.
        settings: of :class:`FinetuneOptions`.

    Raises:
        OptionError: a setting is wrong.
    """
    given = {"strategy": "distill", "losses": losses_of("distill", labelled=labelled), **settings}
    if not graph.exits:
        rate = settings.get("trunk_learning_rate", settings.get("learning_rate", LEARNING_RATE))
        given = {**given, "learning_rate": rate, "trunk_learning_rate": rate}
    return FinetuneOptions.from_json(given)


def distill(
    graph: Graph,
    data: Dataset,
    *,
    teacher: Graph,
    out: str | Path | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    options: FinetuneOptions | None = None,
    threads: int = 0,
    progress: Progress | None = None,
    device: str = "auto",
    **settings: Any,
) -> DistillReport:
    """Train a network, usually one that was pruned, to answer as its original does, and write it to a file.

    Args:
        graph: the small network, from :func:`eexform.load` or a pass.
        data: from :func:`eexform.open_dataset`; labels help, and are not needed.
        teacher: the original.
        out: ``.onnx`` file to write; ``None``: only the report's graph.
        folder: of the checkpoint, which stays; by default one beside ``out``, which goes when the work is done.
        resume: go on with what lies in the folder; the settings must be the same.
        options: how to train, in whole; else :func:`distill_options` with ``settings``.
        threads: 0 is one per core.
        progress: who is told.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
        settings: of :class:`FinetuneOptions`: ``epochs=20, trunk_learning_rate=0.02``.

    Returns:
        The report, with figures on the test split of the network before and after.

    Raises:
        EexformError: something does not fit, see the message.
        KeyboardInterrupt: Ctrl-C; whole epochs are kept, and ``resume`` goes on.
    """
    with ExitStack() as stack:
        work = Path(folder) if folder is not None else work_folder(out) if out is not None else None
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eexform-")))
        kept = begun(work)
        need(
            resume or not kept,
            f"{work}: holds a distillation that was begun; go on with it (resume), or delete the folder",
            RunError,
        )
        need(
            kept or not resume,
            f"{work}: holds no whole epoch of a distillation, there is nothing to go on with; leave resume out",
            RunError,
        )
        report = distill_trunk(
            graph,
            data,
            teacher,
            folder=work,
            options=options,
            threads=threads,
            progress=progress,
            device=device,
            **settings,
        )
        bound = data.bind(graph)
        report = replace(report, test=_figures({"before": graph, "after": report.graph}, teacher, bound, threads))
        if out is not None:
            save(report.graph, out)
            if folder is None:
                shutil.rmtree(work, ignore_errors=True)
    return report


def work_folder(out: str | Path) -> Path:
    """Where the checkpoint lies while ``out`` is being made."""
    target = Path(out)
    return target.with_name(f"{target.name}.training")


def begun(folder: str | Path) -> bool:
    """Whether the folder holds whole epochs of a distillation."""
    from eexform.training.finetune_state import FILE

    return (Path(folder) / FILE).exists()


def _normalised(graph: Graph) -> bool:
    return any(node.op == "BatchNormalization" for node in graph.nodes)


def _figures(networks: Mapping[str, Graph], teacher: Graph, data: Dataset, threads: int) -> dict[str, Any]:
    """Agreement and accuracy of the final exits on test."""
    size, labels = data.size("test"), data.labels_of("test")
    if not size:
        return {}
    said = answers(teacher, data, "test", threads=threads)
    found: dict[str, Any] = {"samples": size}
    if labels is not None:
        found["teacher_accuracy"] = float((said == labels).mean())
    for name, network in networks.items():
        given = answers(network, data, "test", threads=threads)
        found[name] = {"agreement": float((given == said).mean())}
        if labels is not None:
            found[name]["accuracy"] = float((given == labels).mean())
    return found


def answers(graph: Graph, data: Dataset, split: str, *, threads: int = 0) -> np.ndarray:
    """The class that the final exit gives to each sample of a split, by onnxruntime; int64 [samples].

    Args:
        graph: any network that the data's inputs fit, by name or where there is only one.
        data: bound to a network with these inputs.
        split: name of the split.
        threads: of onnxruntime; 0 is one per core.
    """
    session = ort.session(graph, threads=threads)
    found = np.empty(data.size(split), np.int64)
    for batch in data.batches(split, _BATCH):
        feeds = batch.feeds if len(batch.feeds) > 1 else {graph.inputs[0]: next(iter(batch.feeds.values()))}
        (scores,) = ort.run(session, feeds, [graph.final]).values()
        found[batch.positions] = scores.argmax(axis=1)
    return found
