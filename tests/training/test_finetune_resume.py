"""An interrupted fine-tuning that goes on ends where a straight one does, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eexform.errors import RunError
from eexform.ir.graph import Graph
from eexform.training.finetune import FinetuneReport
from eexform.training.finetune_state import FILE
from tests import tiny
from tests.training.multi_exit import flat, gated, tune

GATED = ("cross_entropy", "stick_breaking", "confidence_bce", "support")
STEPS = 8  # of 240 samples for training, 32 a step


def plain(report: FinetuneReport) -> list[dict[str, Any]]:
    """The history without what a clock said."""
    clock = ("seconds", "samples_per_second")
    return [{key: value for key, value in entry.items() if key not in clock} for entry in report.history]


def alike(left: FinetuneReport, right: FinetuneReport) -> None:
    """Assert that two trainings had the same result, bit for bit."""
    one, two = left.graph.parameters(), right.graph.parameters()
    assert [name for name in one if not np.array_equal(one[name], two[name])] == []
    assert left.graph.digest == right.graph.digest
    assert plain(left) == plain(right)
    assert (left.epochs, left.best_epoch) == (right.epochs, right.best_epoch)


@pytest.mark.parametrize("after", [(1,), (STEPS + 3,), (2 * STEPS + 5,), (STEPS + 1, 3 * STEPS + 2)])
def test_resume_equals_straight(after: tuple[int, ...], tmp_path: Path) -> None:
    straight = tune(tmp_path / "straight", flat(), epochs=4)
    assert plain(straight)[-1]["epoch"] == 4
    for stop in after:
        with pytest.raises(KeyboardInterrupt):
            tune(tmp_path / "stopped", flat(), epochs=4, progress=tiny.Watch("fine-tuning", stop))
    watch = tiny.Watch()
    resumed = tune(tmp_path / "stopped", flat(), epochs=4, progress=watch)
    whole = after[-1] // STEPS
    assert any(f"going on after epoch {whole} of" in line for line in watch.said) == (whole > 0)
    alike(resumed, straight)


OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (flat, {"optimiser": "adamw", "learning_rate": 3e-3, "trunk_learning_rate": 1e-3}),
    "average": (flat, {"ema": 0.8, "patience": 3}),
    "one-cycle": (flat, {"schedule": "one-cycle", "warmup": 0.3}),
    "two phases": (flat, {"strategy": "heads-then-joint", "head_epochs": 2}),
    "first phase": (flat, {"strategy": "heads-then-joint", "head_epochs": 3}),
    "mixed": (flat, {"strategy": "mixed", "schedule": "linear"}),
    "frozen": (flat, {"strategy": "frozen", "losses": ("survivors", "distill:teacher=final")}),
    "gates": (lambda: gated("stick"), {"losses": GATED}),
    "half": (flat, {"amp": "bfloat16"}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_resume_equals_straight_whatever_the_options(name: str, tmp_path: Path) -> None:
    make, options = OPTIONS[name]
    straight = tune(tmp_path / "straight", make(), epochs=4, **options)
    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "stopped", make(), epochs=4, progress=tiny.Watch("fine-tuning", 2 * STEPS + 2), **options)
    alike(tune(tmp_path / "stopped", make(), epochs=4, **options), straight)


def test_augmentation_goes_on_where_it_was(tmp_path: Path) -> None:
    def run(folder: str, progress: tiny.Watch | None = None) -> FinetuneReport:
        graph = flat()
        data = tiny.digits(600).with_augment("crop:1,mixup:0.3").bind(graph)
        return tune(tmp_path / folder, graph, data=data, epochs=3, progress=progress)

    straight = run("straight")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", tiny.Watch("fine-tuning", STEPS + 2))
    alike(run("stopped"), straight)


def test_a_different_seed_is_noticed_by_the_comparison(tmp_path: Path) -> None:
    one, two = (tune(tmp_path / str(seed), flat(), seed=seed) for seed in (0, 1))
    with pytest.raises(AssertionError):
        alike(one, two)


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    first = tune(tmp_path, flat())
    watch = tiny.Watch()
    again = tune(tmp_path, flat(), progress=watch)
    alike(first, again)
    assert watch.steps["fine-tuning"] == 2 * STEPS  # all of them were done before
    assert again.seconds == first.seconds


def other_trunk() -> Graph:
    return flat(tiny.trained(epochs=2))


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.01},
        {"epochs": 3},
        {"losses": ("cross_entropy",)},
        {"graph": other_trunk},
        {"teacher": lambda: tiny.trained(epochs=2)},
        {"data": lambda: tiny.digits(300)},
    ],
)
def test_a_checkpoint_of_another_training_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    tune(tmp_path, flat())
    before = (tmp_path / FILE).read_bytes()
    given = {key: value() if callable(value) else value for key, value in change.items()}
    graph = given.pop("graph", None) or flat()
    if "data" in given:
        given["data"] = given["data"].bind(graph)
    with pytest.raises(RunError, match="is of a training with other options, another graph or other data"):
        tune(tmp_path, graph, **given)
    assert (tmp_path / FILE).read_bytes() == before


def test_a_damaged_checkpoint(tmp_path: Path) -> None:
    tune(tmp_path, flat())
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RunError, match=r"is damaged .*; delete it to start afresh"):
        tune(tmp_path, flat())
