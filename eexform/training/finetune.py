"""Fine-tuning: trunk and heads of a graph trained together, by torch, from and back to the graph."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eexform.cost_models import exit_costs, make
from eexform.data.dataset import Batch, Dataset
from eexform.errors import DataError, OptionError, TrainingError
from eexform.ir.graph import Graph
from eexform.progress import Progress, Silent, Task
from eexform.training import finetune_state as state
from eexform.training.finetune_heads import trunk_of, with_new_heads
from eexform.training.finetune_options import NEED_HEADS, FinetuneOptions, Phase
from eexform.training.finetune_parts import Teacher, assess, check_teacher, optimiser_for, schedule_for
from eexform.training.network import Arithmetic, Network
from eexform.training.objectives import NEEDS, ExitBatch, Loss, exit_weights, parse
from eexform.training.threads import torch_threads


@dataclass(frozen=True, eq=False)
class FinetuneReport:
    """What :func:`finetune` did.

    Attributes:
        graph: the graph with the parameters of the best epoch.
        epochs: epochs after which training ended; those before an interruption count.
        best_epoch: after how many epochs the loss on calibrate was lowest.
        history: what was measured before training (entry 0) and after every epoch: losses by term; per exit, final
            last, accuracy, negative log-likelihood (at its best temperature) and, where there is a teacher, agreement
            with its answers on calibrate; seconds.
        seconds: wall time of all epochs, those before an interruption included.
        device: where, and in what arithmetic.
    """

    graph: Graph
    epochs: int
    best_epoch: int
    history: tuple[dict[str, Any], ...]
    seconds: float
    device: str


def finetune(
    graph: Graph,
    dataset: Dataset,
    options: FinetuneOptions,
    *,
    folder: str | Path,
    teacher: Graph | None = None,
    threads: int = 0,
    progress: Progress | None = None,
    device: str = "auto",
) -> FinetuneReport:
    """Train a graph with its exits, or one that has none.

    After every whole epoch the state goes to ``folder`` (``finetune.safetensors``, ``history.jsonl``); called
    again with the same arguments, training goes on from there, on one thread with the very same result.

    Args:
        graph: flat; its batch normalisation not folded, so that it can be trained.
        dataset: bound to the graph; head-train is streamed with augmentation, calibrate judges the epochs.
        options: how to train.
        folder: of the checkpoint; one training each.
        teacher: the original trunk, or any other network with the same inputs and classes, for distillation; by default
            the graph's own trunk as it is given.
        threads: of the CPU; 0 is one per core.
        progress: who is told.
        device: ``auto`` (CUDA where there is one), ``cpu``, ``cuda:1``, ...

    Raises:
        OptionError: a term of the loss or the strategy needs what there is not, or the teacher is for other inputs or
            other classes.
        DataError: the data set has nothing to train on.
        RunError: the folder holds the state of another training.
        TrainingError: the loss is not finite.
    """
    threads = threads or os.cpu_count() or 1
    with torch_threads(threads):
        training = _Training(graph, dataset, options, Path(folder), teacher, progress or Silent(), device)
        return training.run()


class _Training:
    """One training: everything that stays the same over the epochs, and where it stands."""

    def __init__(
        self,
        graph: Graph,
        dataset: Dataset,
        options: FinetuneOptions,
        folder: Path,
        teacher: Graph | None,
        show: Progress,
        device: str,
    ) -> None:
        self.labelled = dataset.labels == "given"
        options = options.settled(labelled=self.labelled, gated=has_gates(graph))
        self.data, self.options, self.folder, self.show = dataset, options, folder, show
        self.terms = terms_of(options, graph, labelled=self.labelled)
        if teacher is not None:
            check_teacher(graph, teacher)
        size = dataset.size("head_train")
        # A small rest is left out, another one each epoch: normalised by statistics of a few samples, its step would
        # weigh as much as any other. One sample alone has no variance at all.
        self.smallest = max(2, options.batch_size // 4) if size >= options.batch_size else 2
        self.steps = size // options.batch_size + (size % options.batch_size >= self.smallest)
        if not self.steps:
            raise DataError(f"head-train has {size} samples: at least 2 are needed for a step")
        self.arithmetic = Arithmetic.choose(graph, device, options.amp)
        original = trunk_of(graph) if teacher is None else teacher
        self.identity = _digest(graph.digest, dataset.digest, original.digest, options.digest)
        self.network = Network(
            with_new_heads(graph, options.seed) if options.new_heads else graph, self.arithmetic, ema=options.ema
        )
        asked = {need for _, term in self.terms for need in term.needs}
        self.measured = "measured" in asked
        taught = "teacher" in asked or not self.labelled
        self.teacher = Teacher(original, self.arithmetic, graph.inputs) if taught else None
        alone = trunk_of(graph)
        # while the trunk stands still, its final exit says what the original says: no need to run that as well
        self.own_teacher = original.digest == alone.digest and alone.final == graph.final
        costs = exit_costs(graph, make("macs"))
        trunk = exit_costs(graph, make("macs"), heads_free=True)[-1]
        relative = [cost / trunk if trunk else 1.0 for cost in costs]
        self.costs = torch.tensor(relative, dtype=torch.float32, device=self.arithmetic.device)
        weights = exit_weights(options.exit_weights, relative)
        self.weights = torch.tensor(weights, dtype=torch.float32, device=self.arithmetic.device)
        self.thresholds = tuple(item.threshold for item in graph.exits)
        still = self.own_teacher and all(phase.heads_only for phase in options.phases)
        asks = self.teacher is not None and not (still and self.labelled)
        self.answers = self._answers("calibrate") if asks else None
        known = dataset.labels_of("calibrate")
        self.labels = known if known is not None else self.answers
        self.standing = state.Standing()

    def run(self) -> FinetuneReport:
        stored = state.restore(self.folder, self.identity, self.network)
        heads, trunk = (sum(p.numel() for _, p in part) for part in (self.network.heads, self.network.trunk))
        count = len(self.network.graph.exits)
        parts = f"{count} heads with {heads:,} parameters, trunk with {trunk:,}" if count else f"{trunk:,} parameters"
        self.show.say(
            f"fine-tuning ({self.options.strategy}): {parts}; at most {self.options.epochs} epochs of {self.steps} "
            f"steps on {self.arithmetic}"
        )
        slots: dict[str, dict[str, torch.Tensor]] = {}
        if stored is not None:
            self.standing, slots = stored.standing, stored.slots
            self.show.say(f"going on after epoch {self.standing.epoch} of an interrupted training")
        else:
            self._assess(0, {}, 0.0, "before training")
        with self.show.task("fine-tuning", self.options.epochs * self.steps) as task:
            task.advance(self.standing.epoch * self.steps)
            for phase in self.options.phases:
                if self.standing.epoch < phase.stop and not self._exhausted():
                    self._phase(phase, slots, task)
                    slots = {}
        self.network.load(self.standing.best_state)
        before = self.standing.history[0]["calibrate"]["loss"]
        if before < self.standing.best:
            self.show.say(
                f"warning: training made it worse: the loss on calibrate was {before:.3f} before and is "
                f"{self.standing.best:.3f} after the best epoch; lower the learning rates, or train for longer"
            )
        return FinetuneReport(
            graph=self.network.written_back(),
            epochs=self.standing.epoch,
            best_epoch=self.standing.best_epoch,
            history=tuple(self.standing.history),
            seconds=sum(entry["seconds"] for entry in self.standing.history),
            device=str(self.arithmetic),
        )

    # -- epochs ------------------------------------------------------------------------------------------------------

    def _phase(self, phase: Phase, slots: dict[str, dict[str, torch.Tensor]], task: Task) -> None:
        done = self.standing.epoch - phase.start
        self.network.train(heads_only=phase.heads_only)
        optimiser = optimiser_for(self.network, self.options, heads_only=phase.heads_only)
        schedule = schedule_for(optimiser, self.options, phase.epochs * self.steps, done * self.steps)
        if done:
            state.fill(optimiser, self.network, slots)
        half = self.arithmetic.half is torch.float16
        scaler = torch.amp.GradScaler(self.arithmetic.device.type, enabled=half)
        if done and half and self.standing.scaler:  # there is none where the epochs before were not in half precision
            scaler.load_state_dict(self.standing.scaler)
        while self.standing.epoch < phase.stop and not self._exhausted():
            started = time.perf_counter()
            losses = self._epoch(phase, optimiser, schedule, scaler, task)
            self.standing.epoch += 1
            # what stays beside the bar is the epoch, not its last batch, which may be a handful of samples
            task.advance(0, f"epoch {self.standing.epoch}, loss {sum(losses.values()):.3f}")
            self.standing.scaler = scaler.state_dict() if half else {}
            self._assess(self.standing.epoch, losses, started, phase.name, optimiser)
            ended = self.standing.epoch == phase.stop
            state.save(self.folder, self.identity, self.standing, self.network, None if ended else optimiser)

    def _epoch(
        self,
        phase: Phase,
        optimiser: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        scaler: torch.amp.GradScaler,
        task: Task,
    ) -> dict[str, float]:
        """One pass over head-train; the mean of every term over its steps."""
        options, network, epoch = self.options, self.network, self.standing.epoch
        network.train(heads_only=phase.heads_only)
        trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        totals = torch.zeros(len(self.terms), dtype=torch.float64)
        batches = self.data.batches("head_train", options.batch_size, seed=options.seed, augment=True, epoch=epoch)
        step = 0
        for batch in batches:
            if len(batch) < self.smallest:
                continue
            exits = self._look(batch, own=self.own_teacher and phase.heads_only)
            parts = [term(exits) for _, term in self.terms]
            optimiser.zero_grad(set_to_none=True)
            scaler.scale(torch.stack(parts).sum()).backward()
            # looked at while an accelerator is on its way back, instead of before that; nothing has moved yet
            values = torch.stack([part.detach() for part in parts]).cpu().double()
            if not bool(values.isfinite().all()):
                raise TrainingError(self._diverged(exits, values, step))
            totals += values
            scaler.unscale_(optimiser)
            if options.clip:
                torch.nn.utils.clip_grad_norm_(trained, options.clip)
            scaler.step(optimiser)
            scaler.update()
            schedule.step()
            network.follow()
            step += 1
            task.advance(1, f"epoch {epoch + 1}, loss {values.sum().item():.3f}")
        return {label: total / step for (label, _), total in zip(self.terms, totals.tolist(), strict=True)}

    def _look(self, batch: Batch, *, own: bool) -> ExitBatch:
        """All exits on a batch of head-train, with what the terms need beside them; ``own``: the final exit teaches."""
        place = self.arithmetic.tensor
        feeds = [place(batch.feeds[name]) for name in self.network.graph.inputs]
        outputs = self.network(feeds)
        labels = None if batch.labels is None else place(batch.labels)
        mix = None
        if batch.mix is not None and batch.mix[0] is not None:
            mix = (place(batch.mix[0]), place(batch.mix[1]))
        teacher = None
        if self.teacher is not None:
            teacher = outputs.logits[-1].detach() if own else self.teacher(feeds)
        support = self.standing.support
        return ExitBatch(
            logits=outputs.logits,
            path_costs=self.costs,
            weights=self.weights,
            labels=labels,
            mix=mix,
            smoothing=self.options.label_smoothing,
            teacher=teacher,
            confidences=outputs.gates,
            measured=self.network.measured(outputs) if self.measured else (),
            thresholds=self.thresholds if self.measured else (),
            support=torch.tensor(support, dtype=torch.float32, device=self.arithmetic.device) if support else None,
        )

    def _assess(
        self,
        epoch: int,
        losses: dict[str, float],
        started: float,
        phase: str,
        optimiser: torch.optim.Optimizer | None = None,
    ) -> None:
        """Judge the network on calibrate, write it down, and keep it where it is the best so far."""
        assert self.labels is not None  # without labels there is a teacher
        found = assess(self.network, self.data, self.labels, self.options.batch_size, self.answers)
        weights = self.weights.cpu().numpy()
        loss = float((weights * found.nll).sum() / weights.sum())
        if not np.isfinite(loss):
            bad = self._exit_name(int(np.flatnonzero(~np.isfinite(found.nll))[0]))
            if not epoch:
                raise TrainingError(f"before training, {bad}: the scores on calibrate are not finite; mend the model")
            raise TrainingError(
                f"after epoch {epoch}, {bad}: the loss on calibrate is not finite; lower the learning rates, or turn "
                "the averaging of parameters off"
            )
        seconds = time.perf_counter() - started if epoch else 0.0
        judged: dict[str, Any] = {"loss": loss, "nll": found.nll.tolist(), "accuracy": found.accuracy.tolist()}
        if found.agreement is not None:
            judged["agreement"] = found.agreement.tolist()
        samples = min(self.data.size("head_train"), self.steps * self.options.batch_size)
        self.standing.support = found.by_class.tolist()
        self.standing.history.append(
            {
                "epoch": epoch,
                "phase": phase,
                "losses": losses,
                "calibrate": judged,
                "learning_rates": [group["lr"] for group in optimiser.param_groups] if optimiser else [],
                "seconds": seconds,
                "samples_per_second": samples / seconds if epoch else 0.0,
            }
        )
        if epoch and loss < self.standing.best:
            self.standing.best, self.standing.best_epoch = loss, epoch
            self.standing.best_state = self.network.state(averaged=True)
        self.show.say(self._line(self.standing.history[-1]))

    # -- words -------------------------------------------------------------------------------------------------------

    def _line(self, entry: dict[str, Any]) -> str:
        accuracy = [100 * share for share in entry["calibrate"]["accuracy"]]
        exits = "".join(f"exit {place} {share:.1f} %, " for place, share in enumerate(accuracy[:-1]))
        what = "accuracy" if self.labelled else "agreement with the original trunk"
        judged = f"{what} on calibrate: {exits}final {accuracy[-1]:.1f} %"
        if not entry["epoch"]:
            return f"before training: {judged}"
        terms = ", ".join(f"{label} {value:.3f}" for label, value in entry["losses"].items())
        total = sum(entry["losses"].values())
        best = " (best so far)" if entry["epoch"] == self.standing.best_epoch else ""
        where = f"epoch {entry['epoch']}/{self.options.epochs}, {entry['phase']}"
        return (
            f"{where}: loss {total:.3f} ({terms}); {judged}{best}"
            f"; {entry['seconds']:.0f} s, {entry['samples_per_second']:.0f} samples/s"
        )

    def _diverged(self, batch: ExitBatch, values: torch.Tensor, step: int) -> str:
        where = f"epoch {self.standing.epoch + 1}, step {step + 1}"
        bad = [place for place, scores in enumerate(batch.logits) if not bool(scores.isfinite().all())]
        terms = ", ".join(label for (label, _), value in zip(self.terms, values, strict=True) if not value.isfinite())
        at = f"the scores of {self._exit_name(bad[0])} are" if bad else f"the loss ({terms}) is"
        half = "" if self.arithmetic.half is None else ", or compute in full precision (amp off)"
        kept = f"the state after epoch {self.standing.epoch} is kept in {self.folder}, and would come to the same again"
        return (
            f"{where}: {at} not finite; lower the learning rates, cut the gradient (clip) harder{half}; "
            f"{kept if self.standing.epoch else 'no epoch was finished, nothing of the training is kept'}"
        )

    def _exit_name(self, place: int) -> str:
        exits = self.network.graph.exits
        if place < len(exits):
            return f"exit {place} at {exits[place].site!r}"
        return "the final exit" if exits else "the network"

    # -- small things ------------------------------------------------------------------------------------------------

    def _exhausted(self) -> bool:
        # while the heads learn alone, to stop early would mean never to train the rest
        begun = self.options.phases[-1].start
        return 0 < self.options.patience <= self.standing.epoch - max(self.standing.best_epoch, begun)

    def _answers(self, split: str) -> np.ndarray:
        """The teacher's answers on a split, which count as right where there are no labels; int64 [samples]."""
        assert self.teacher is not None
        found = np.empty(self.data.size(split), np.int64)
        for batch in self.data.batches(split, self.options.batch_size):
            feeds = [self.arithmetic.tensor(batch.feeds[name]) for name in self.network.graph.inputs]
            found[batch.positions] = self.teacher(feeds).argmax(dim=1).cpu().numpy()
        return found


def has_gates(graph: Graph) -> bool:
    """Whether every early exit has a learned confidence, and there is one."""
    return bool(graph.exits) and all(item.confidence for item in graph.exits)


def terms_of(options: FinetuneOptions, graph: Graph, *, labelled: bool) -> list[tuple[str, Loss]]:
    """The terms with a label each, checked against what the graph and the data have."""
    found: list[tuple[str, Loss]] = []
    if not graph.exits and options.strategy in NEED_HEADS:
        raise OptionError(
            f"strategy {options.strategy!r} is about heads, and the graph has no exits: take distill or joint, which "
            "train the network itself, or insert exits first"
        )
    gated = has_gates(graph)
    for text in options.settled(labelled=labelled, gated=gated).losses or ():
        term = parse(text)
        for need, there in (("labels", labelled), ("gates", gated), ("exits", bool(graph.exits))):
            if need in term.needs and not there:
                raise OptionError(f"loss {term.name!r} {NEEDS[need]}")
        same = sum(label.partition("#")[0] == term.name for label, _ in found)
        found.append((f"{term.name}#{same + 1}" if same else term.name, term))
    return found


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(["eexform finetune 1", *parts]).encode()).hexdigest()
