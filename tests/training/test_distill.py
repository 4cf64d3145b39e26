"""Distillation: that a smaller network learns its original's answers, goes on where it stopped, and refuses misfits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import eexform as ee
from eexform.data import ArraySource, Dataset, open_dataset
from eexform.errors import DataError, EexformError, OptionError, RunError
from eexform.ir.graph import Graph
from eexform.ir.serialize import save
from eexform.training import distill as module
from eexform.training.distill import (
    DistillReport,
    answers,
    begun,
    distill,
    distill_options,
    distill_trunk,
    work_folder,
)
from eexform.training.finetune_options import DISTILLED, FinetuneOptions, losses_of
from tests import tiny
from tests.training.multi_exit import flat, head_names, same, trunk_names

QUICK: dict[str, Any] = {"epochs": 4, "batch_size": 32, "amp": "off", "trunk_learning_rate": 0.1}
STEPS = 23  # 1797 digits, of which 718 are for training


def small(seed: int = 1) -> Graph:
    """What is left of the tiny network: narrower, and not trained at all."""
    graph = tiny.network(seed, widths=(4, 6, 6))
    return graph.replace(metadata={**graph.metadata, "eexform.cut": '{"block1.conv.weight|0":[0,2]}'})


def digits(**options: Any) -> Dataset:
    return tiny.digits(1797, **options)


def learn(folder: Path, graph: Graph | None = None, **given: Any) -> DistillReport:
    data = given.pop("data", None) or digits()
    teacher = given.pop("teacher", None) or tiny.trained()
    settings = {**QUICK, **given}
    return distill_trunk(graph or small(), data, teacher, folder=folder, threads=1, device="cpu", **settings)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> DistillReport:
    return learn(tmp_path_factory.mktemp("straight"))


def test_agreement_rises(straight: DistillReport) -> None:
    assert straight.epochs == 4
    assert len(straight.agreement) == len(straight.accuracy) == 5
    assert straight.agreement[0] < 0.3
    assert straight.agreement[-1] > straight.agreement[0] + 0.3
    assert straight.losses[-1] < 0.6 * straight.losses[0]
    assert straight.history[-1]["losses"].keys() == {"distill", "cross_entropy"}
    assert straight.seconds > 0
    assert straight.device.startswith("cpu, float32")
    assert 1 <= straight.best_epoch <= 4


def test_what_is_reported_is_what_the_network_says(straight: DistillReport) -> None:
    """By onnxruntime, which torch's figures do not come from."""
    bound = digits().bind(straight.graph)
    said, given = (answers(graph, bound, "calibrate", threads=1) for graph in (tiny.trained(), straight.graph))
    assert (said == given).mean() == pytest.approx(straight.agreement[straight.best_epoch])
    right = np.equal(bound.labels_of("calibrate"), given).mean()
    assert right == pytest.approx(straight.accuracy[straight.best_epoch])


def test_names_and_metadata_stay(straight: DistillReport) -> None:
    graph = small()
    assert straight.graph.metadata == graph.metadata
    assert "eexform.cut" in straight.graph.metadata
    assert list(straight.graph.parameters()) == list(graph.parameters())
    assert [node.name for node in straight.graph.nodes] == [node.name for node in graph.nodes]
    assert not same(straight.graph, graph, ["classifier.weight"])
    assert straight.graph.digest != graph.digest


def test_without_labels(tmp_path: Path) -> None:
    watch = tiny.Watch()
    report = learn(tmp_path, data=digits(labels="none"), progress=watch)
    assert report.history[-1]["losses"].keys() == {"distill"}
    assert report.agreement == report.accuracy
    assert report.agreement[-1] > report.agreement[0] + 0.3
    assert "agreement with the original trunk on calibrate: final" in watch.said[-1]


def test_options_as_a_whole_without_labels(tmp_path: Path) -> None:
    """The strategy's own losses lose the labels' term, and losses that were named do not."""
    options = FinetuneOptions(strategy="distill", **QUICK)
    assert losses_of("distill") == (DISTILLED, "cross_entropy:weight=0.1")
    assert options.settled(labelled=True, gated=False).losses == losses_of("distill")
    report = learn(tmp_path, data=digits(labels="none"), options=options, epochs=1)
    assert report.history[-1]["losses"].keys() == {"distill"}
    named = dataclasses.replace(options, losses=("cross_entropy",))
    with pytest.raises(OptionError, match="'cross_entropy' needs labels"):
        learn(tmp_path / "other", data=digits(labels="none"), options=named)


def test_a_network_with_exits(tmp_path: Path) -> None:
    graph = flat(tiny.network(3))
    report = learn(tmp_path, graph)
    assert [item.site for item in report.graph.exits] == [item.site for item in graph.exits]
    for names in (head_names(graph), trunk_names(graph)):
        assert not same(report.graph, graph, names)
    first, last = (report.history[place]["calibrate"]["agreement"] for place in (0, -1))
    assert len(first) == 3
    assert last[-1] > first[-1] + 0.3
    assert last[1] > first[1]


def test_probabilities_teach_logits(tmp_path: Path) -> None:
    report = learn(tmp_path, teacher=tiny.trained(probabilities=True), epochs=2)
    plain = learn(tmp_path / "plain", epochs=2)
    assert report.agreement[-1] == pytest.approx(plain.agreement[-1], abs=0.05)


def test_a_teacher_of_other_names(tmp_path: Path) -> None:
    """Another network for the same task: its only input may be called something else."""
    model = onnx.load(_saved(tiny.trained(), tmp_path / "teacher.onnx"))
    model.graph.input[0].name = "picture"
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == "image":
                node.input[place] = "picture"
    other = ee.load(model)
    assert other.inputs == ("picture",)
    assert learn(tmp_path / "a", teacher=other).losses == learn(tmp_path / "b").losses
    assert distill(small(), digits(), teacher=other, epochs=1, threads=1, amp="off", device="cpu").test["before"]


@pytest.mark.parametrize("stop", [STEPS + 2, 3 * STEPS])
def test_resume_equals_straight(stop: int, straight: DistillReport, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path, progress=tiny.Watch("fine-tuning", stop))
    watch = tiny.Watch()
    resumed = learn(tmp_path, progress=watch)
    assert any("going on after epoch" in line for line in watch.said)
    assert resumed.graph.digest == straight.graph.digest
    assert resumed.losses == straight.losses
    assert resumed.agreement == straight.agreement


@pytest.mark.parametrize(
    "options",
    [
        {"ema": 0.8, "augmented": True},
        {"optimiser": "adamw", "trunk_learning_rate": 1e-2, "schedule": "one-cycle"},
        {"amp": "bfloat16"},
    ],
)
def test_resume_equals_straight_whatever_the_options(options: dict[str, Any], tmp_path: Path) -> None:
    augmented = options.pop("augmented", False)

    def run(folder: str, watch: tiny.Watch | None = None) -> DistillReport:
        data = digits().with_augment("crop:1,mixup:0.3") if augmented else digits()
        return learn(tmp_path / folder, data=data, progress=watch, epochs=3, **options)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", tiny.Watch("fine-tuning", 2 * STEPS))
    assert run("parts").graph.digest == whole.graph.digest


def test_another_training_is_refused(tmp_path: Path) -> None:
    learn(tmp_path, epochs=1)
    changes: tuple[dict[str, Any], ...] = (
        {"epochs": 2},
        {"teacher": tiny.trained(epochs=2)},
        {"graph": small(2)},
    )
    for change in changes:
        with pytest.raises(RunError, match="is of a training with other options, another graph or other data"):
            learn(tmp_path, **{"epochs": 1, **change})


# -- to a file --------------------------------------------------------------------------------------------------------


def test_to_a_file(tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    report = ee.distill(small(), digits(), teacher=tiny.trained(), out=out, threads=1, device="cpu", **QUICK)
    loaded = ee.load(out)
    assert loaded.digest == report.graph.digest
    assert loaded.metadata["eexform.cut"] == small().metadata["eexform.cut"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.onnx"]
    test = report.test
    assert test["samples"] == digits().size("test")
    assert test["after"]["agreement"] > test["before"]["agreement"] + 0.3
    bound = digits().bind(loaded)
    right = (answers(loaded, bound, "test") == bound.labels_of("test")).mean()
    assert test["after"]["accuracy"] == pytest.approx(right)
    assert report.to_json()["test"] == test


def test_interrupted_and_on(tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    given: dict[str, Any] = {"teacher": tiny.trained(), "out": out, "threads": 1, "device": "cpu", **QUICK}
    with pytest.raises(RunError, match="no whole epoch of a distillation, there is nothing to go on with"):
        distill(small(), digits(), resume=True, **given)
    with pytest.raises(KeyboardInterrupt):
        distill(small(), digits(), progress=tiny.Watch("fine-tuning", 2 * STEPS + 1), **given)
    assert begun(work_folder(out))
    assert not out.exists()
    with pytest.raises(RunError, match="holds a distillation that was begun"):
        distill(small(), digits(), **given)
    report = distill(small(), digits(), resume=True, **given)
    assert report.graph.digest == learn(tmp_path / "straight").graph.digest
    assert not work_folder(out).exists()


def test_a_folder_that_was_given_stays(tmp_path: Path) -> None:
    report = distill(small(), digits(), teacher=tiny.trained(), folder=tmp_path / "work", threads=1, **QUICK)
    assert begun(tmp_path / "work")
    again = distill(
        small(), digits(), teacher=tiny.trained(), folder=tmp_path / "work", threads=1, resume=True, **QUICK
    )
    assert again.graph.digest == report.graph.digest


# -- what is refused --------------------------------------------------------------------------------------------------


def classes(count: int) -> Graph:
    """The tiny network for another number of classes."""
    graph = tiny.network()
    draft = graph.copy()
    draft.constants["classifier.weight"].values = np.zeros((count, 8), np.float32)
    draft.constants["classifier.bias"].values = np.zeros(count, np.float32)
    draft.gs.outputs[0].shape = ["N", count]
    return Graph(draft.gs, scores="logits")


def test_a_teacher_of_other_classes(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="tells 7 classes apart and the network 10"):
        learn(tmp_path, teacher=classes(7))
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_other_inputs(tmp_path: Path) -> None:
    draft = tiny.trained().copy()
    draft.gs.inputs[0].shape = ["N", 1, 16, 16]
    with pytest.raises(OptionError, match=r"its input 'image' is .*16x16\] and the network's 'image' .*8x8\]"):
        learn(tmp_path, teacher=Graph(draft.gs, scores="logits"))


def test_data_of_another_shape(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(200, 1, 12, 12)).astype(np.float32)
    source = ArraySource("wide", {"all": ({None: wide}, rng.integers(0, 10, 200))}, layout="nchw")
    with pytest.raises(DataError, match="12"):
        learn(tmp_path, data=open_dataset(source, fractions=tiny.FRACTIONS))


def test_labels_of_more_classes_than_the_network_has(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="class"):
        learn(tmp_path, classes(7), teacher=classes(7))


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(EexformError, match=r"the scores of the network are not finite; lower the learning rates"):
        learn(tmp_path, learning_rate=1e30, trunk_learning_rate=1e30, clip=0)


def test_settings_that_do_not_exist() -> None:
    with pytest.raises(OptionError, match=r"\['epoch'\] are not known"):
        distill_options(small(), epoch=3)


def test_one_learning_rate_for_a_network_without_exits() -> None:
    assert distill_options(small()).trunk_learning_rate == module.LEARNING_RATE
    assert distill_options(small(), learning_rate=0.3).trunk_learning_rate == 0.3
    assert distill_options(small(), trunk_learning_rate=0.2).learning_rate == 0.2
    assert distill_options(flat()).trunk_learning_rate == FinetuneOptions.trunk_learning_rate


def test_folded_normalisation_is_said(tmp_path: Path) -> None:
    from eexform.passes import PassContext, make

    folded = make("fold_batch_norm")(small(), PassContext()).graph
    watch = tiny.Watch()
    learn(tmp_path, folded, progress=watch, epochs=1)
    assert watch.said[0].startswith("warning: the teacher has batch normalisation and the network has none")
    learn(tmp_path / "other", progress=watch, epochs=1)
    assert sum(line.startswith("warning: the teacher has") for line in watch.said) == 1


def _saved(graph: Graph, path: Path) -> Path:
    save(graph, path)
    return path
