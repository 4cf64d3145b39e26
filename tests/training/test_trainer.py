"""Head training: resumable to the bit, early stopping, label-free, honest about NaN, and scores that are realised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

from eexform.backends import ort
from eexform.backends.lower_multi import lower_multi
from eexform.data import ArraySource, Dataset, open_dataset
from eexform.data.source import Samples
from eexform.errors import DataError, EexformError, ModelError
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.passes import PassContext
from eexform.passes.insert_exits import InsertExits
from eexform.training import Bank, TrainOptions, checkpoint, trainer
from tests import tiny
from tests.training import support

SPLITS = ("calibrate", "select", "test")


@pytest.fixture(scope="module")
def trunk() -> Graph:
    return tiny.trained()


def attached(graph: Graph, bank: Bank, head: str) -> Graph:
    """The trunk with the bank's heads of one kind as exits."""
    sites = bank.sites(graph.digest)
    step = InsertExits(sites=sites, heads=dict.fromkeys(sites, head), thresholds=dict.fromkeys(sites, 0.5))
    return step(graph, PassContext(heads=bank)).graph


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probabilities", [False, True])
def test_scores_are_those_of_the_exported_network(tmp_path: Path, probabilities: bool) -> None:
    graph, data = tiny.trained(probabilities=probabilities), tiny.digits()
    bank, _ = support.train(tmp_path, graph, data)
    bound = data.bind(graph)
    for head in support.HEADS:
        whole = attached(graph, bank, head)
        session = ort.session(lower_multi(whole))
        for split in SPLITS:
            (batch,) = bound.batches(split, 1000)
            found = list(ort.run(session, batch.feeds).values())
            assert len(found) == 3
            np.testing.assert_allclose(found[0], bank.final(split), atol=1e-6, rtol=1e-6)
            for exit_, scores in zip(whole.exits, found[1:], strict=True):
                stored = bank.scores(exit_.site, head, split)
                assert stored.dtype == np.float32
                np.testing.assert_allclose(scores, stored, atol=1e-6, rtol=1e-6)
                if probabilities:
                    np.testing.assert_allclose(stored.sum(axis=1), 1.0, atol=1e-5)
            assert batch.labels is not None
            np.testing.assert_array_equal(bank.labels(split), batch.labels)
    if probabilities:
        assert bank.facts["scores"] == "probabilities"
        assert {record.temperature for record in bank.records.values()} == {1.0}


def test_heads_learn_and_the_trunk_stays_as_it_is(trunk: Graph, tmp_path: Path) -> None:
    before = trunk.digest
    data, site = tiny.digits(1797), find_sites(trunk).sites[-1]
    options = TrainOptions(epochs=5, batch_size=32, learning_rate=0.02)
    bank, _ = support.train(tmp_path, trunk, data, heads=["conv:1x8/avg"], options=options, at=[site])
    right = bank.scores(site.value, "conv:1x8/avg", "test").argmax(axis=1) == bank.labels("test")
    assert right.mean() > 0.7
    assert trunk.replace().digest == before  # computed anew: parameters and structure are untouched


def test_facts_about_the_trunk(trunk: Graph, tmp_path: Path) -> None:
    bank, _ = support.train(tmp_path, trunk, tiny.digits())
    facts = bank.facts
    for split in SPLITS:
        accuracy = (bank.final(split).argmax(axis=1) == bank.labels(split)).mean()
        assert facts["accuracy"][split] == pytest.approx(accuracy)
        assert facts["samples"][split] == len(bank.labels(split))
    assert facts["samples"]["head_train"] == 160
    assert 0.1 < facts["temperature"] < 10


def test_accuracy_on_head_train_is_that_of_all_classes(trunk: Graph, tmp_path: Path) -> None:
    """Stored class by class, as folders of images are; the first samples show one class only."""
    data = tiny.digits(1797)
    labels = data.source.labels("all")
    assert labels is not None
    order = np.argsort(labels, kind="stable")
    images = data.source.fetch("all", order).inputs[None]
    source = ArraySource("sorted", {"all": ({None: np.asarray(images)}, labels[order])}, layout="nchw")
    ordered = open_dataset(source, fractions=(0.7, 0.1, 0.1, 0.1), preprocess=data.preprocess)
    bank, _ = support.train(tmp_path, trunk, ordered, heads=[])
    right = total = 0
    for batch in ordered.bind(trunk).batches("head_train", 500):
        answers = ort.run(ort.session(trunk), batch.feeds)[trunk.final].argmax(axis=1)
        right, total = right + int((answers == batch.labels).sum()), total + len(batch)
    assert bank.facts["samples"]["head_train"] == 500 < total
    assert bank.facts["accuracy"]["head_train"] == pytest.approx(right / total, abs=0.02)


def test_trunk_with_names_like_ours(tmp_path: Path) -> None:
    graph = tiny.network()
    draft = graph.copy().gs
    for node in draft.nodes:
        node.name = f"head0.{node.name}"
        for tensor in node.outputs:
            if tensor.name != "scores":
                tensor.name = f"head0.{tensor.name}"
    bank, report = support.train(tmp_path, Graph(draft), tiny.digits(100))
    assert report.trained == len(bank.records) == 4


# -- interrupted and resumed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("steps", [1, 5, 7, 12])
def test_resumed_is_straight_to_the_bit(trunk: Graph, tmp_path: Path, steps: int, ema: float) -> None:
    """Stopped in the first epoch, at the end of one, within the second, and in the last; 80 samples are 3 steps."""
    data, options = tiny.digits(200, augment="crop:1"), TrainOptions(epochs=4, batch_size=32, ema=ema)
    straight, _ = support.train(tmp_path / "straight", trunk, data, options=options)
    with pytest.raises(KeyboardInterrupt):
        support.train(tmp_path / "halted", trunk, data, options=options, progress=tiny.Watch("training heads", steps))
    folder = support.open_bank(tmp_path / "halted", trunk, data, options).folder
    assert (folder / checkpoint.FILE).exists() == (steps > 3)
    watch = tiny.Watch()
    resumed, report = support.train(tmp_path / "halted", trunk, data, options=options, progress=watch)
    assert any("going on after epoch" in line for line in watch.said) == (steps > 3)
    assert support.content(resumed) == support.content(straight)
    assert not (folder / checkpoint.FILE).exists()
    assert report.epochs == 4


def test_interrupted_twice(trunk: Graph, tmp_path: Path) -> None:
    data, options = tiny.digits(200), TrainOptions(epochs=3, batch_size=32)
    straight, _ = support.train(tmp_path / "straight", trunk, data, options=options)
    # the bar of a resumed training begins with the steps that are behind it
    for label, steps in (("training heads", 4), ("training heads", 8), ("scoring heads", 60)):
        with pytest.raises(KeyboardInterrupt):
            support.train(tmp_path / "halted", trunk, data, options=options, progress=tiny.Watch(label, steps))
    resumed, _ = support.train(tmp_path / "halted", trunk, data, options=options)
    assert support.content(resumed) == support.content(straight)


def test_killed_between_two_heads(trunk: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some heads are stored, the state of all still lies there: the rest is taken from it, not trained again."""
    data = tiny.digits(200)
    straight, _ = support.train(tmp_path / "straight", trunk, data)
    put, stored = Bank.put_head, []

    def once(self: Bank, *args: Any, **kwargs: Any) -> None:
        if stored:
            raise KeyboardInterrupt
        put(self, *args, **kwargs)
        stored.append(args)

    with monkeypatch.context() as patch:
        patch.setattr(Bank, "put_head", once)
        with pytest.raises(KeyboardInterrupt):
            support.train(tmp_path / "killed", trunk, data)
    watch = tiny.Watch()
    resumed, report = support.train(tmp_path / "killed", trunk, data, progress=watch)
    assert (report.trained, report.reused) == (3, 1)
    assert f"going on after epoch {support.OPTIONS.epochs} of an interrupted training" in watch.said
    whole, again = support.content(straight), support.content(resumed)
    assert whole.keys() == again.keys()
    # onnxruntime may add up in another order in a graph with fewer heads, so scores are compared as numbers
    assert {n for n in whole if whole[n] != again[n]} <= {n for n in whole if n.startswith("scores/")}
    for pair, record in straight.records.items():
        assert resumed.records[pair] == record
        for split in SPLITS:
            np.testing.assert_allclose(resumed.scores(*pair, split), straight.scores(*pair, split), atol=1e-6)


def test_state_of_other_heads_is_left_unused(trunk: Graph, tmp_path: Path) -> None:
    data = tiny.digits(200)
    with pytest.raises(KeyboardInterrupt):
        support.train(tmp_path / "a", trunk, data, heads=["none/avg"], progress=tiny.Watch("training heads", 4))
    bank, _ = support.train(tmp_path / "a", trunk, data, heads=["conv:1x8/avg"])
    straight, _ = support.train(tmp_path / "b", trunk, data, heads=["conv:1x8/avg"])
    assert support.content(bank) == support.content(straight)


@pytest.mark.parametrize("size", [0, 100, -10])
def test_damaged_state_means_starting_afresh(trunk: Graph, tmp_path: Path, size: int) -> None:
    data = tiny.digits(200)
    with pytest.raises(KeyboardInterrupt):
        support.train(tmp_path / "a", trunk, data, progress=tiny.Watch("training heads", 4))
    path = support.open_bank(tmp_path / "a", trunk, data).folder / checkpoint.FILE
    path.write_bytes(path.read_bytes()[:size])
    bank, _ = support.train(tmp_path / "a", trunk, data)
    straight, _ = support.train(tmp_path / "b", trunk, data)
    assert support.content(bank) == support.content(straight)


def test_a_head_is_the_same_whatever_is_trained_beside_it(trunk: Graph, tmp_path: Path) -> None:
    data = tiny.digits(200)
    beside, _ = support.train(tmp_path / "beside", trunk, data)
    alone, _ = support.train(tmp_path / "alone", trunk, data, heads=["none/avg"], at=support.sites(trunk)[1:])
    ((site, head),) = alone.records
    assert alone.records[site, head].digest == beside.records[site, head].digest


# -- when to stop -----------------------------------------------------------------------------------------------------


def test_early_stopping(trunk: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses as planted: the one head is best in epoch 2, the other in 3; two more without gain end the training."""
    planted = {"none/avg": [3.0, 1.0, 2.0, 2.0, 2.0, 0.5], "conv:1x8/avg": [3.0, 2.0, 1.0, 1.5, 1.5, 0.5]}
    seen: dict[str, list[np.ndarray]] = {head: [] for head in planted}
    consider = trainer.Student.consider

    def considered(self: Any, loss: float, epoch: int) -> None:
        seen[str(self.spec)].append(self.parameters()["classifier.weight"])
        consider(self, planted[str(self.spec)][epoch - 1], epoch)

    monkeypatch.setattr(trainer.Student, "consider", considered)
    options = TrainOptions(epochs=6, batch_size=32, patience=2)
    at = support.sites(trunk)[:1]
    bank, report = support.train(tmp_path, trunk, tiny.digits(200), options=options, at=at)
    assert report.epochs == 5
    for (site, head), record in bank.records.items():
        assert (record.epochs, record.loss) == (5, 1.0)
        best = {"none/avg": 1, "conv:1x8/avg": 2}[head]
        kept = bank.trained(trunk.digest, site, head).parameters["classifier.weight"]
        np.testing.assert_array_equal(kept, seen[head][best])


def test_patience_survives_an_interruption(trunk: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Best in the first epoch, two stale ones, stopped in the fourth: the resumed training ends after that one."""
    consider = trainer.Student.consider
    monkeypatch.setattr(trainer.Student, "consider", lambda self, loss, epoch: consider(self, float(epoch), epoch))
    options = TrainOptions(epochs=8, batch_size=32, patience=3)
    with pytest.raises(KeyboardInterrupt):
        support.train(tmp_path, trunk, tiny.digits(200), options=options, progress=tiny.Watch("training heads", 10))
    bank, report = support.train(tmp_path, trunk, tiny.digits(200), options=options)
    assert report.epochs == 4
    assert {(record.epochs, record.loss) for record in bank.records.values()} == {(4, 1.0)}


def test_last_batch_of_one_sample(trunk: Graph, tmp_path: Path) -> None:
    """81 samples in batches of 16: one is left over, over which batch normalisation has no variance."""
    data = tiny.digits(200)
    data = replace(data, splits=replace(data.splits, head_train=replace(
        data.splits.head_train, indices=np.append(data.splits.head_train.indices, data.splits.test.indices[0])
    ), test=replace(data.splits.test, indices=data.splits.test.indices[1:])))  # fmt: skip
    assert data.size("head_train") == 81
    bank, _ = support.train(tmp_path, trunk, data, options=TrainOptions(epochs=1, batch_size=16))
    assert all(np.isfinite(bank.scores(*pair, "test")).all() for pair in bank.records)


# -- without labels ---------------------------------------------------------------------------------------------------


def test_label_free(trunk: Graph, tmp_path: Path) -> None:
    data = tiny.digits(400, labels="none")
    bank, _ = support.train(tmp_path, trunk, data, options=TrainOptions(epochs=6, batch_size=32))
    for split in SPLITS:
        np.testing.assert_array_equal(bank.labels(split), bank.final(split).argmax(axis=1))
        assert bank.facts["accuracy"][split] == 1.0
    assert bank.facts["accuracy"]["head_train"] == 1.0
    agreement = [(bank.scores(*pair, "test").argmax(axis=1) == bank.labels("test")).mean() for pair in bank.records]
    assert max(agreement) > 0.3


def test_label_free_with_the_answers_of_another_network(trunk: Graph, tmp_path: Path) -> None:
    data = tiny.digits(200, labels="none")
    other = tiny.network(seed=5)
    answers = trainer.trunk_answers(trunk, data.bind(trunk), support.OPTIONS)
    bank = support.open_bank(tmp_path, other, data)
    trainer.train_bank(other, data.bind(other), (), {}, bank, support.OPTIONS, answers=answers)
    for split in SPLITS:
        np.testing.assert_array_equal(bank.labels(split), answers[split])
        assert bank.facts["accuracy"][split] == (bank.final(split).argmax(axis=1) == answers[split]).mean() < 1.0


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_nan_from_the_trunk(tmp_path: Path) -> None:
    """log(sum of pixels) is not finite for the one black image, and the message says which that is."""
    image = gs.Variable("image", np.dtype(np.float32), ["N", 1, 8, 8])
    draft = gs.Graph(inputs=[image], opset=17)
    value = gs.Variable("mean", np.dtype(np.float32), ["N", 1, 1, 1])
    draft.nodes.append(gs.Node("GlobalAveragePool", "pool", inputs=[image], outputs=[value]))
    logs = gs.Variable("logs", np.dtype(np.float32), ["N", 1, 1, 1])
    draft.nodes.append(gs.Node("Log", "log", inputs=[value], outputs=[logs]))
    flat = gs.Variable("flat", np.dtype(np.float32), ["N", 1])
    draft.nodes.append(gs.Node("Flatten", "flatten", inputs=[logs], outputs=[flat]))
    scores = gs.Variable("scores", np.dtype(np.float32), ["N", 10])
    weight = gs.Constant("weight", np.ones((1, 10), np.float32))
    draft.nodes.append(gs.Node("MatMul", "classify", inputs=[flat, weight], outputs=[scores]))
    draft.outputs = [scores]
    graph = Graph(draft)

    def data(split: str) -> tuple[Dataset, int]:
        good = tiny.digits(100)
        black = int(good.splits[split].indices[3])
        images = np.array(good.source.fetch("all", np.arange(100)).inputs[None])
        images[black] = 0
        source = ArraySource("digits", {"all": ({None: images}, good.source.labels("all"))}, layout="nchw")
        return Dataset(source, good.preprocess, good.splits), black

    for split in ("calibrate", "test", "head_train"):
        chosen, black = data(split)
        with pytest.raises(DataError, match=rf"'scores' holds NaN or infinity for sample {black} of split {split}"):
            support.train(tmp_path / split, graph, chosen, at=())
        assert not support.open_bank(tmp_path / split, graph, chosen).facts


class Failing(ArraySource):
    """Digits of which some cannot be read, once ``armed``."""

    armed = False

    def fetch(self, part: str, indices: np.ndarray) -> Samples:
        if self.armed:
            raise DataError("some digits: the disk went away")
        return super().fetch(part, indices)


def test_errors_of_the_data_thread_surface(trunk: Graph, tmp_path: Path) -> None:
    good = tiny.digits(200)
    samples = good.source.fetch("all", np.arange(200))
    source = Failing("failing", {"all": (samples.inputs, samples.labels)})
    data = Dataset(source, good.preprocess, good.splits)

    class Arm(tiny.Watch):
        def say(self, message: str) -> None:
            source.armed = message.startswith("training")  # from here on: the first batch of head-train fails

    with pytest.raises(DataError, match="the disk went away"):
        support.train(tmp_path, trunk, data, progress=Arm())
    source.armed = False
    assert support.train(tmp_path, trunk, data)[1].trained == 4


@pytest.mark.parametrize("call", [1, 3])
def test_errors_of_the_trunk_thread_surface(
    trunk: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    session, names = trainer._tapped(trunk, (), 1)
    batches = tiny.digits(200).bind(trunk).batches("head_train", 16)
    run, calls = ort.run, []

    def failing(*args: Any) -> dict[str, np.ndarray]:
        calls.append(args)
        if len(calls) == call:
            raise ModelError("onnxruntime is out of sorts")
        return run(*args)

    monkeypatch.setattr(trainer.ort, "run", failing)
    seen: list[tuple[Any, dict[str, np.ndarray]]] = []
    with pytest.raises(ModelError, match="out of sorts"):
        seen.extend(trainer._ahead(batches, session, names))
    assert len(seen) == call - 1
    for batch, values in seen:  # and what came before belongs together
        np.testing.assert_array_equal(values[trunk.final], run(session, batch.feeds)[trunk.final])


def test_every_batch_meets_its_own_values(trunk: Graph) -> None:
    session, names = trainer._tapped(trunk, (), 1)
    batches = tiny.digits(200).bind(trunk).batches("head_train", 16)
    seen = list(trainer._ahead(batches, session, names))
    assert [len(batch) for batch, _ in seen] == [16] * 5
    for batch, values in seen:
        np.testing.assert_allclose(values[trunk.final], ort.run(session, batch.feeds)[trunk.final], atol=1e-6)


def test_a_loss_that_is_not_finite(trunk: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exploded(self: Any, features: np.ndarray) -> np.ndarray:
        return np.full((len(features), 10), np.nan, np.float32)

    monkeypatch.setattr(trainer.Student, "predict", exploded)
    with pytest.raises(EexformError, match=r"head none/avg at .*: the loss is not finite after epoch 1; lower"):
        support.train(tmp_path, trunk, tiny.digits(200))


def test_the_callers_torch_threads_are_given_back(trunk: Graph, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    support.train(tmp_path, trunk, tiny.digits(100))
    with pytest.raises(KeyboardInterrupt):
        support.train(tmp_path / "b", trunk, tiny.digits(100), progress=tiny.Watch("training heads", 1))
    assert torch.get_num_threads() == before


def test_learning_rate_warms_up_and_fades() -> None:
    options = TrainOptions(learning_rate=2.0, warmup=0.2)
    rates = [trainer._learning_rate(done, options) for done in np.linspace(0, 1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[20] == max(rates) == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.0)
    assert all(a < b for a, b in pairwise(rates[:21]))
    assert all(a > b for a, b in pairwise(rates[20:]))
    assert trainer._learning_rate(0.0, TrainOptions(warmup=0.0)) == pytest.approx(TrainOptions().learning_rate)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, on a machine that may be busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
