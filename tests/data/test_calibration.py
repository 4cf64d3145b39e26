"""Calibration samples: fixed, unaugmented, drawn from one split."""

from __future__ import annotations

import numpy as np
import pytest

from eexform.data import Calibration, Dataset, Preprocess, open_dataset
from eexform.errors import DataError, OptionError
from eexform.pruning.samples import first
from tests.data.helpers import images_source, model


def dataset(bound: bool = True, **options: object) -> Dataset:
    made = open_dataset(images_source(90), **{"preprocess": Preprocess(), "augment": "flip", **options})  # type: ignore[arg-type]
    return made.bind(model(image=(3, 8, 8))) if bound else made


def test_the_same_every_time_and_never_augmented() -> None:
    data = dataset()
    chosen = Calibration(data, size=20)
    assert chosen.size == 20
    once, again = (np.concatenate([feeds["image"] for feeds, _ in chosen.batches(size)]) for size in (7, 20))
    assert np.array_equal(once, again)
    plain = data.batch("head_train", chosen.positions)
    assert np.array_equal(once, plain.feeds["image"])
    labels = np.concatenate([labels for _, labels in chosen.batches(6) if labels is not None])
    assert np.array_equal(labels, plain.labels)
    assert [len(feeds["image"]) for feeds, _ in chosen.batches(7)] == [7, 7, 6]


def test_seed_split_and_size() -> None:
    data = dataset()
    base = Calibration(data, size=20)
    assert Calibration(data, size=20).digest == base.digest
    others = [Calibration(data, size=20, seed=1), Calibration(data, size=19), Calibration(data, "select", size=20)]
    assert len({base.digest, *(other.digest for other in others)}) == 4
    assert not np.array_equal(base.positions, others[0].positions)
    assert Calibration(data, size=10_000).size == data.size("head_train")
    assert Calibration(data, "head-train", 20).digest == base.digest
    assert Calibration(dataset(augment="none"), size=20).digest == base.digest
    other = Calibration(dataset(preprocess=Preprocess(scale=0.5)), size=20)
    assert other.digest != base.digest


def test_label_free() -> None:
    chosen = Calibration(dataset(labels="none"), size=8)
    assert all(labels is None for _, labels in chosen.batches(4))


def test_mistakes() -> None:
    with pytest.raises(DataError, match="not bound to a model"):
        Calibration(dataset(bound=False))
    with pytest.raises(OptionError, match="at least 1, found 0"):
        Calibration(dataset(), size=0)
    with pytest.raises(OptionError, match="whole number from 0, found -1"):
        Calibration(dataset(), seed=-1)
    with pytest.raises(OptionError, match="no split is called 'train'"):
        Calibration(dataset(), "train")
    with pytest.raises(OptionError, match="batch size"):
        next(iter(Calibration(dataset(), size=4).batches(0)))


@pytest.mark.parametrize("count", [1, 5, 6, 10, 50])
def test_first(count: int) -> None:
    chosen = Calibration(dataset(), size=20)
    found = list(first(chosen, count, 6))
    whole = np.concatenate([feeds["image"] for feeds, _ in chosen.batches(20)])
    taken = np.concatenate([feeds["image"] for feeds, _ in found])
    assert np.array_equal(taken, whole[: min(count, 20)])
    assert sum(len(labels) for _, labels in found if labels is not None) == min(count, 20)
