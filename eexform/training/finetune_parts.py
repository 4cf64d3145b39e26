"""Parts of fine-tuning: the teacher, the judgement on held-out samples, optimisers and schedules of torch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.optim import lr_scheduler

from eexform.backends import ort
from eexform.backends.fx import raise_to_fx
from eexform.data.dataset import Dataset
from eexform.errors import OptionError, need
from eexform.ir.graph import Graph
from eexform.ir.types import Dim
from eexform.training.calibrate import fit_temperature, negative_log_likelihood
from eexform.training.finetune_options import FinetuneOptions
from eexform.training.network import TINY, Arithmetic, Network

EVALUATION_BATCH = 250
"""Samples per batch where nothing is trained, at most: a smaller batch for training holds here too."""


class Teacher:
    """The original trunk, which only answers.

    Torch runs it where the student is computed in half precision or on an accelerator; in float32 on a CPU onnxruntime
    was never the slower one.

    Args:
        graph: the original trunk.
        arithmetic: of the student.
        inputs: names of the student's inputs, in the order in which they are fed; default those of ``graph``.
    """

    def __init__(self, graph: Graph, arithmetic: Arithmetic, inputs: Sequence[str] | None = None) -> None:
        self._arithmetic = arithmetic
        fed = list(graph.inputs if inputs is None else inputs)
        self._order = [fed.index(name) for name in same_inputs(graph.inputs, fed)]
        self._probabilities = graph.scores == "probabilities"
        self._names = (graph.inputs, [graph.final])
        self._session = self._module = None
        if arithmetic.device.type == "cpu" and arithmetic.half is None:
            self._session = ort.session(graph, threads=torch.get_num_threads())
            return
        self._module = arithmetic.place(raise_to_fx(graph)).eval()
        for parameter in self._module.parameters():
            parameter.requires_grad_(False)

    def __call__(self, feeds: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits, float32 [B, classes], of the student's inputs in order."""
        scores = self._scores([feeds[place] for place in self._order]).float()
        return scores.clamp_min(TINY).log() if self._probabilities else scores

    def _scores(self, feeds: Sequence[torch.Tensor]) -> torch.Tensor:
        if self._module is None:
            inputs, outputs = self._names
            given = {name: np.ascontiguousarray(feed.numpy()) for name, feed in zip(inputs, feeds, strict=True)}
            return torch.from_numpy(ort.run(self._session, given, outputs)[outputs[0]])
        with torch.no_grad(), self._arithmetic.autocast():
            found: torch.Tensor = self._module(*feeds)
        return found


def same_inputs(teacher: Sequence[str], student: Sequence[str]) -> list[str]:
    """The student's input behind each of the teacher's: that of the same name; of one input each, that one."""
    if len(teacher) == len(student) == 1 or set(teacher) != set(student):
        return list(student)
    return list(teacher)


def check_teacher(graph: Graph, teacher: Graph) -> None:
    """Whether a network can learn from another one: the same inputs, the same classes.

    Raises:
        OptionError: it cannot; the message says what differs.
    """
    said = "the teacher cannot teach this network"
    need(
        teacher.num_classes == graph.num_classes,
        f"{said}: it tells {teacher.num_classes} classes apart and the network {graph.num_classes}; give the model "
        "that the network was made from, or another one for the same classes",
        OptionError,
    )
    ours, theirs = graph.inputs, teacher.inputs
    need(
        len(ours) == len(theirs) and (len(ours) == 1 or set(ours) == set(theirs)),
        f"{said}: it takes {', '.join(theirs)} and the network {', '.join(ours)}",
        OptionError,
    )
    for name, fed in zip(theirs, same_inputs(theirs, ours), strict=True):
        theirs_type, ours_type = teacher.types[name], graph.types[fed]
        need(
            theirs_type.dtype == ours_type.dtype and _fits(theirs_type.shape, ours_type.shape),
            f"{said}: its input {name!r} is {theirs_type} and the network's {fed!r} {ours_type}",
            OptionError,
        )


def _fits(left: Sequence[Dim] | None, right: Sequence[Dim] | None) -> bool:
    """Whether shapes can be the same: dimensions without a number can be any."""
    if left is None or right is None:
        return True
    pairs = zip(left, right, strict=False)
    return len(left) == len(right) and all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


@dataclass(frozen=True, eq=False)
class Judgement:
    """How a network does on held-out samples, for each exit, final last.

    Attributes:
        nll: mean negative log-likelihood, [exits + 1], at the temperature that suits each exit best: temperatures are
            fitted after training anyway, and a network must not seem worse for being too sure of itself.
        accuracy: share of right answers, [exits + 1].
        by_class: accuracy of each early exit on each class, [exits, classes]; on a class without samples, that on all.
        agreement: share of the teacher's answers, [exits + 1]; ``None`` where there is no teacher.
    """

    nll: np.ndarray
    accuracy: np.ndarray
    by_class: np.ndarray
    agreement: np.ndarray | None = None


def assess(
    network: Network, dataset: Dataset, labels: np.ndarray, batch_size: int, answers: np.ndarray | None = None
) -> Judgement:
    """Judge the (averaged) parameters on calibrate; the module is left in evaluation mode.

    Args:
        network: what is judged.
        dataset: bound to its graph.
        labels: what is right, int64 [samples].
        batch_size: of training; batches here are no larger.
        answers: the teacher's, int64 [samples], where there is one.
    """
    graph = network.graph
    exits, classes, rows = len(graph.exits) + 1, graph.num_classes, dataset.size("calibrate")
    scores = np.empty((exits, rows, classes), np.float32)
    network.module.eval()
    with torch.inference_mode():
        for batch in dataset.batches("calibrate", min(EVALUATION_BATCH, batch_size)):
            feeds = [network.arithmetic.tensor(batch.feeds[name]) for name in graph.inputs]
            outputs = network(feeds, judged=True)
            scores[:, batch.positions] = torch.stack(outputs.logits).cpu().numpy()
    nll = np.empty(exits)
    accuracy = np.empty(exits)
    by_class = np.empty((exits - 1, classes))
    for place in range(exits):
        finite = bool(np.isfinite(scores[place]).all())
        temperature = fit_temperature(scores[place], labels) if finite and graph.scores == "logits" else 1.0
        nll[place] = negative_log_likelihood(scores[place], labels, temperature=temperature) if finite else np.nan
        right = scores[place].argmax(axis=1) == labels
        accuracy[place] = right.mean()
        if place < exits - 1:
            count = np.bincount(labels, minlength=classes)
            hits = np.bincount(labels, weights=right, minlength=classes)
            by_class[place] = np.where(count > 0, hits / np.maximum(count, 1), accuracy[place])
    agreement = None if answers is None else (scores.argmax(axis=2) == answers).mean(axis=1)
    return Judgement(nll, accuracy, by_class, agreement)


def optimiser_for(network: Network, options: FinetuneOptions, *, heads_only: bool) -> torch.optim.Optimizer:
    """A new optimiser of what a phase trains."""
    groups = list(network.groups(options, heads_only=heads_only))
    if options.optimiser == "adamw":
        return torch.optim.AdamW(groups)
    nesterov = options.nesterov and options.momentum > 0
    return torch.optim.SGD(groups, momentum=options.momentum, nesterov=nesterov)


def schedule_for(
    optimiser: torch.optim.Optimizer, options: FinetuneOptions, steps: int, done: int
) -> lr_scheduler.LRScheduler:
    """The schedule of a phase, after ``done`` of its ``steps``.

    It is walked there step by step, so that an interrupted training meets the very same rates as a straight one.
    """
    peaks = [group["lr"] for group in optimiser.param_groups]
    warm = round(options.warmup * steps)
    found: lr_scheduler.LRScheduler
    with warnings.catch_warnings():
        # torch takes a walk for forgotten steps of the optimiser, and its own SequentialLR for an old way of calling
        warnings.filterwarnings("ignore", category=UserWarning)
        if options.schedule == "one-cycle":
            # torch divides by the way up, which must have a step; of one step in all, one more is never walked
            total = max(steps, 2) + 1
            share = max(options.warmup, 1 / (total - 1))
            found = lr_scheduler.OneCycleLR(
                optimiser, peaks, total_steps=total, pct_start=share, cycle_momentum=False, div_factor=20
            )
        else:
            rest = max(1, steps - warm)
            then: lr_scheduler.LRScheduler
            if options.schedule == "cosine":
                then = lr_scheduler.CosineAnnealingLR(optimiser, rest)
            elif options.schedule == "linear":
                then = lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=rest)
            else:
                then = lr_scheduler.ConstantLR(optimiser, 1.0)
            if warm:
                first = lr_scheduler.LinearLR(optimiser, 0.05, 1.0, total_iters=warm)
                then = lr_scheduler.SequentialLR(optimiser, [first, then], milestones=[warm])
            found = then
        for _ in range(done):
            found.step()
    return found
