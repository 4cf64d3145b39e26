"""Head training: one streaming pass of the frozen trunk per epoch feeds every head at every site.

Memory does not grow with the data set: at any time there is one batch of inputs, the trunk's values at the sites for
that batch, the heads with their gradients and optimiser state, and pages of score files that the system may drop.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from onnxruntime import InferenceSession as Session

from eexform.backends import ort
from eexform.data.dataset import Batch, Dataset
from eexform.errors import DataError, TrainingError
from eexform.heads import HeadSpec, head_graph, with_parameters
from eexform.heads.build import GATE
from eexform.ir.extract import graft
from eexform.ir.graph import Graph
from eexform.ir.sites import Site
from eexform.progress import Progress, Silent
from eexform.training import checkpoint
from eexform.training.bank import SPLITS, Bank, head_key
from eexform.training.calibrate import fit_temperature, negative_log_likelihood
from eexform.training.memory import step_memory
from eexform.training.options import TrainOptions
from eexform.training.student import GivenHead, Student
from eexform.training.threads import torch_threads

EVALUATION_BATCH = 250
"""Samples per batch where nothing is trained, at most: a smaller batch for training holds here too."""


@dataclass(frozen=True)
class TrainReport:
    """What :func:`train_bank` did.

    Attributes:
        trained: number of heads trained now.
        reused: number of heads that were in the bank already, or whose parameters were given.
        epochs: epochs after which training ended; those before an interruption count.
        seconds: wall time of the training loop.
        seconds_scoring: wall time of the passes that stored scores.
        memory_bytes: bound on the memory that one step holds (see :func:`step_memory`).
    """

    trained: int
    reused: int
    epochs: int
    seconds: float
    seconds_scoring: float
    memory_bytes: int


def train_bank(
    graph: Graph,
    dataset: Dataset,
    sites: Sequence[Site],
    heads: Mapping[str, Sequence[HeadSpec]],
    bank: Bank,
    options: TrainOptions,
    *,
    threads: int = 0,
    progress: Progress | None = None,
    answers: Mapping[str, np.ndarray] | None = None,
    trained: Mapping[tuple[str, str], Mapping[str, np.ndarray]] | None = None,
) -> TrainReport:
    """Train the heads that the bank lacks, and store them with their scores.

    Args:
        graph: the trunk.
        dataset: bound to ``graph``; head-train is streamed with augmentation, the other splits without.
        sites: in the order in which a sample meets them.
        heads: specs per site value.
        bank: where to look and to store.
        options: how to train.
        threads: to use in all; 0 is one per core. While heads train, half run the trunk and half the heads.
        progress: who is told.
        answers: in label-free mode, what counts as right per split (int64 [samples]; see :func:`trunk_answers`);
            by default the trunk's own answers do.
        trained: parameters by (site, head text) of heads that were trained elsewhere: they are stored and scored, and
            get a temperature, as they are.

    Raises:
        DataError: scores or inputs hold NaN.
        TrainingError: a head's loss is not finite.
    """
    show = progress or Silent()
    threads = threads or os.cpu_count() or 1
    if not bank.facts:
        _score_trunk(graph, dataset, bank, options, threads, show, answers)
    wanted = [(order, site, spec) for order, site in enumerate(sites) for spec in heads.get(site.value, ())]
    missing = [entry for entry in wanted if not bank.has(entry[1].value, str(entry[2]))]
    known = trained or {}
    given = [GivenHead(*entry, known[key]) for entry in missing if (key := (entry[1].value, str(entry[2]))) in known]
    if given:
        _score_heads(graph, dataset, given, bank, options, threads, show, 0)
        missing = [entry for entry in missing if (entry[1].value, str(entry[2])) not in known]
    memory = step_memory(graph, sites, missing, options.batch_size)
    if not missing:
        checkpoint.discard(bank.folder)  # left behind by a process that was killed when the last head was stored
        return TrainReport(0, len(wanted), 0, 0.0, 0.0, memory)

    students = [Student(order, site, spec, graph.num_classes, options) for order, site, spec in missing]
    show.say(
        f"training {len(students)} heads at {len({s.site.value for s in students})} sites "
        f"({len(wanted) - len(missing)} more are in the bank), at most {options.epochs} epochs; "
        f"a step holds up to {memory / 2**20:.0f} MiB"
    )
    started = time.perf_counter()
    trunk_threads = max(1, threads // 2)
    with torch_threads(max(1, threads - trunk_threads)):
        epochs = _fit(graph, dataset, students, bank, options, trunk_threads, show)
    fitted = time.perf_counter()
    _score_heads(graph, dataset, students, bank, options, threads, show, epochs)
    checkpoint.discard(bank.folder)
    return TrainReport(
        trained=len(students),
        reused=len(wanted) - len(missing),
        epochs=epochs,
        seconds=fitted - started,
        seconds_scoring=time.perf_counter() - fitted,
        memory_bytes=memory,
    )


def trunk_answers(graph: Graph, dataset: Dataset, options: TrainOptions, *, threads: int = 0) -> dict[str, np.ndarray]:
    """The class that a trunk gives to each sample of the splits that the bank keeps, int64 [samples]."""
    session, names = _tapped(graph, (), threads or os.cpu_count() or 1)
    found = {split: np.empty(dataset.size(split), np.int64) for split in SPLITS}
    for split, chosen in found.items():
        for values, rows in _stream(dataset, split, _evaluation_batch(options), session, names):
            chosen[rows] = values[graph.final].argmax(axis=1)
    return found


def _evaluation_batch(options: TrainOptions) -> int:
    return min(EVALUATION_BATCH, options.batch_size)


def _tapped(graph: Graph, values: Sequence[str], threads: int) -> tuple[Session, list[str]]:
    names = list(dict.fromkeys(values))
    return ort.session(ort.tap(graph, names), threads=threads), [graph.final, *names]


def _fit(
    graph: Graph,
    dataset: Dataset,
    students: list[Student],
    bank: Bank,
    options: TrainOptions,
    trunk_threads: int,
    show: Progress,
) -> int:
    """Run the epochs; afterwards every student holds its best parameters. Returns the number of epochs it took."""
    session, names = _tapped(graph, [student.site.value for student in students], trunk_threads)
    parameters = [p for student in students for p in student.module.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=options.weight_decay)
    steps = -(-dataset.size("head_train") // options.batch_size)
    first = checkpoint.restore(bank.folder, students, optimiser)
    if first:
        show.say(f"going on after epoch {first} of an interrupted training")
    with show.task("training heads", options.epochs * steps) as task:
        task.advance(first * steps)
        for epoch in range(first, options.epochs):
            if _exhausted(students, options):
                return epoch
            for student in students:
                student.module.train()
            batches = dataset.batches("head_train", options.batch_size, seed=options.seed, augment=True, epoch=epoch)
            for step, (batch, values) in enumerate(_ahead(batches, session, names)):
                rate = _learning_rate((epoch * steps + step) / (options.epochs * steps), options)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                if len(batch) < 2:
                    continue  # batch normalisation has no variance over one sample
                teacher = torch.from_numpy(_as_logits(values[graph.final], graph))
                features = {name: torch.from_numpy(values[name]) for name in names[1:]}
                optimiser.zero_grad(set_to_none=True)
                total = torch.zeros(())
                for student in students:
                    total = total + student.loss(features[student.site.value], teacher, batch, options)
                total.backward()
                optimiser.step()
                for student in students:
                    student.update_average()
                task.advance(1, f"epoch {epoch + 1}, mean loss {total.item() / len(students):.3f}")
            _assess(dataset, students, bank, options, session, names, epoch + 1)
            checkpoint.save(bank.folder, students, optimiser, epoch + 1)
    return options.epochs


def _ahead(
    batches: Iterator[Batch], session: Session, names: list[str]
) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """Each batch with the trunk's values on it; the trunk runs on the next batch while the heads train on this one.

    Trunk and heads take turns on one sample of work, not on one core: with a thread each they need no barrier, and
    neither waits for the other's threads to spin down.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="eexform-trunk") as pool:
        pending = None
        for batch in batches:
            following = (batch, pool.submit(ort.run, session, batch.feeds, names))
            if pending is not None:
                yield pending[0], pending[1].result()
            pending = following
        if pending is not None:
            yield pending[0], pending[1].result()


def _learning_rate(done: float, options: TrainOptions) -> float:
    """Linear warm-up, then half a cosine to zero; ``done`` is the share of all steps behind us."""
    if done < options.warmup:
        return options.learning_rate * (0.05 + 0.95 * done / options.warmup)
    return options.learning_rate * 0.5 * (1 + np.cos(np.pi * (done - options.warmup) / (1 - options.warmup)))


def _exhausted(students: Sequence[Student], options: TrainOptions) -> bool:
    return options.patience > 0 and all(student.stale >= options.patience for student in students)


def _assess(
    dataset: Dataset,
    students: Sequence[Student],
    bank: Bank,
    options: TrainOptions,
    session: Session,
    names: list[str],
    epoch: int,
) -> None:
    """Loss of every student on calibrate; each keeps the parameters of its best epoch."""
    labels = np.asarray(bank.labels("calibrate"))
    totals = np.zeros(len(students))
    for values, rows in _stream(dataset, "calibrate", _evaluation_batch(options), session, names):
        for place, student in enumerate(students):
            scores = student.predict(values[student.site.value])
            totals[place] += negative_log_likelihood(scores, labels[rows]) * len(scores)
    for loss, student in zip((totals / len(labels)).tolist(), students, strict=True):
        if not np.isfinite(loss):
            raise TrainingError(
                f"head {student.spec} at {student.site.value!r}: the loss is not finite after epoch {epoch}; "
                "lower the learning rate, or look for extreme values in the trunk's features there"
            )
        student.consider(loss, epoch)


def _stream(
    dataset: Dataset, split: str, size: int, session: Session, names: list[str]
) -> Iterator[tuple[dict[str, np.ndarray], slice]]:
    """The trunk's values on a split in stored order, with the rows they belong to."""
    for batch in dataset.batches(split, size):
        rows = slice(int(batch.positions[0]), int(batch.positions[-1]) + 1)
        yield ort.run(session, batch.feeds, names), rows


def _with_heads(graph: Graph, students: Sequence[Student | GivenHead]) -> tuple[Graph, list[str], list[str]]:
    """The trunk with all heads as they will be deployed; names of their scores, and of their gates (empty: none)."""
    draft = graph.copy().gs
    values = {tensor.name: tensor for node in draft.nodes for tensor in node.outputs}
    names, gates = [], []
    prefix = "head"
    while any(name.startswith(prefix) for name in (*graph.tensors, *graph.flow.nodes)):
        prefix += "_"  # the trunk has values or nodes of such names
    for place, student in enumerate(students):
        head = head_graph(
            student.spec, student.site, num_classes=graph.num_classes, scores=graph.scores, seed=0, opset=graph.opset
        )
        head = with_parameters(head, student.parameters())
        feeds = {head.inputs[0]: values[student.site.value]}
        outputs = graft(draft, head, feeds=feeds, prefix=f"{prefix}{place}.")
        draft.outputs += outputs.values()
        names.append(outputs[head.final].name)
        gates.append(outputs[GATE].name if GATE in outputs else "")
    return graph.replace(draft), names, gates


def _score_heads(
    graph: Graph,
    dataset: Dataset,
    students: Sequence[Student | GivenHead],
    bank: Bank,
    options: TrainOptions,
    threads: int,
    show: Progress,
    epochs: int,
) -> None:
    """Scores of all students on every kept split, then the heads themselves (a listed head is complete).

    The scores come from onnxruntime running the very nodes that will be exported, so that what a search predicts is
    what the deployed network does.
    """
    for student in students:
        if isinstance(student, Student):
            student.load_best()
    whole, outputs, gates = _with_heads(graph, students)
    session = ort.session(whole, threads=threads)
    keys = [head_key(student.site.value, str(student.spec)) for student in students]
    named = list(zip(keys, outputs, gates, strict=True))
    with show.task("scoring heads", sum(dataset.size(split) for split in SPLITS)) as task:
        for split in SPLITS:
            rows = dataset.size(split)
            stores = {name: bank.new_scores(key, split, rows, graph.num_classes) for key, name, _ in named}
            stores |= {gate: bank.new_gates(key, split, rows) for key, _, gate in named if gate}
            for values, at in _stream(dataset, split, _evaluation_batch(options), session, [*stores]):
                for name, store in stores.items():
                    store[at] = values[name]
                task.advance(at.stop - at.start)
            for store in stores.values():
                store.flush()
    labels = np.asarray(bank.labels("calibrate"))
    for student, key in zip(students, keys, strict=True):
        scores = np.load(bank.folder / "scores" / f"{key}.calibrate.npy", mmap_mode="r", allow_pickle=False)
        temperature = fit_temperature(scores, labels) if graph.scores == "logits" else 1.0
        bank.put_head(
            student.site.value,
            str(student.spec),
            student.parameters(),
            order=student.order,
            temperature=temperature,
            epochs=epochs,
            loss=student.best_loss if isinstance(student, Student) else _loss(scores, labels, graph),
        )


def _score_trunk(
    graph: Graph,
    dataset: Dataset,
    bank: Bank,
    options: TrainOptions,
    threads: int,
    show: Progress,
    answers: Mapping[str, np.ndarray] | None,
) -> None:
    """The trunk's own scores, labels and accuracy per split; on a sample of head-train too, to see memorisation."""
    session, names = _tapped(graph, (), threads)
    size = _evaluation_batch(options)
    given = dataset.labels == "given"
    accuracy: dict[str, float] = {}
    counted: dict[str, int] = {}
    # evenly over the split, not its beginning: samples are often stored class by class
    train = dataset.size("head_train")
    probe = np.unique(np.linspace(0, train - 1, min(train, max(dataset.size("select"), 500))).astype(np.int64))
    with show.task("scoring the trunk", len(probe) + sum(dataset.size(split) for split in SPLITS)) as task:

        def scores_of(batch: Batch, split: str) -> np.ndarray:
            scores: np.ndarray = ort.run(session, batch.feeds, names)[graph.final]
            bad = ~np.isfinite(scores).all(axis=1)
            if bad.any():
                raise DataError(
                    f"the trunk's output {graph.final!r} holds NaN or infinity for sample {batch.indices[bad][0]} of "
                    f"split {split} ({bad.sum()} of {len(bad)} in its batch): look for extreme inputs or a wrong "
                    "preprocessing"
                )
            task.advance(len(scores))
            return scores

        for split in SPLITS:
            store = bank.new_scores("final", split, dataset.size(split), graph.num_classes)
            labels = np.empty(len(store), np.int64)
            right = 0
            for batch in dataset.batches(split, size):
                scores = scores_of(batch, split)
                store[batch.positions] = scores
                own = scores.argmax(axis=1)
                if given:
                    assert batch.labels is not None
                    labels[batch.positions] = batch.labels
                else:
                    labels[batch.positions] = own if answers is None else answers[split][batch.positions]
                right += int((own == labels[batch.positions]).sum())
            store.flush()
            bank.put_labels(split, labels)
            accuracy[split], counted[split] = right / max(1, len(labels)), len(labels)
        right = 0
        for start in range(0, len(probe), size):
            batch = dataset.batch("head_train", probe[start : start + size])
            own = scores_of(batch, "head_train").argmax(axis=1)
            right += int((own == batch.labels).sum()) if given else len(own)
    accuracy["head_train"], counted["head_train"] = right / max(1, len(probe)), len(probe)
    calibrate = bank.final("calibrate")
    temperature = fit_temperature(calibrate, np.asarray(bank.labels("calibrate"))) if graph.scores == "logits" else 1.0
    bank.put_facts({"accuracy": accuracy, "samples": counted, "temperature": temperature, "scores": graph.scores})


def _loss(scores: np.ndarray, labels: np.ndarray, graph: Graph) -> float:
    return negative_log_likelihood(_as_logits(scores, graph), labels)


def _as_logits(scores: np.ndarray, graph: Graph) -> np.ndarray:
    """Scores whose softmax is the classifier's distribution (the logarithm, where they are probabilities)."""
    return scores if graph.scores == "logits" else np.log(np.maximum(scores, 1e-12))
