import json

import numpy as np
import pytest

from eexform.data import (
    Preprocess,
    Splits,
    describe_duplicates,
    find_duplicates,
    load_dataset,
    make_splits,
    open_dataset,
    save_dataset,
)
from eexform.data.arrays import ArraySource
from eexform.errors import DataError, OptionError, RunError
from tests.data.helpers import images_source, model, write_image


@pytest.fixture
def npz(tmp_path) -> str:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "toy.npz", a=rng.random((60, 4)), b=rng.random((60, 4)), t=np.arange(60) % 3)
    return str(tmp_path / "toy.npz")


def test_there_and_back(npz, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    steps = Preprocess(scale=0.5)
    dataset = open_dataset("toy.npz", label_key="t", inputs="x=b", preprocess=steps, seed=4)
    save_dataset(dataset, tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = load_dataset(tmp_path / "run")
    assert again.digest == dataset.digest
    assert again.preprocess == steps
    assert again.splits.seed == 4
    feeds = again.bind(model(x=(4,))).sample_feeds("test", 3)["x"]
    np.testing.assert_array_equal(feeds, dataset.bind(model(x=(4,))).sample_feeds("test", 3)["x"])


def test_augmented_images_and_registered_names(tmp_path) -> None:
    dataset = open_dataset("digits", augment="flip,crop:1", limit=100)
    save_dataset(dataset, tmp_path / "run")
    assert load_dataset(tmp_path / "run").digest == dataset.digest
    for i in range(40):
        write_image(tmp_path / "images" / f"c{i % 2}" / f"{i}.png", i)
    images = open_dataset(str(tmp_path / "images"))
    save_dataset(images, tmp_path / "run")
    assert load_dataset(tmp_path / "run", cache_folder=tmp_path / "cache").digest == images.digest


def test_changed_data_is_noticed(npz, tmp_path) -> None:
    save_dataset(open_dataset(npz, label_key="t", inputs="b"), tmp_path / "run")
    np.savez(npz, b=np.zeros((60, 4)), t=np.arange(60) % 3)
    with pytest.raises(DataError, match=r"the data has changed since .*data.json was written"):
        load_dataset(tmp_path / "run")
    load_dataset(tmp_path / "run", check=False)
    np.savez(npz, b=np.zeros((50, 4)), t=np.arange(50) % 3)
    with pytest.raises(DataError, match=r"expected parts {'all': 60}"):
        load_dataset(tmp_path / "run", check=False)


def test_data_from_python_must_be_given_again(tmp_path) -> None:
    dataset = open_dataset(images_source())
    save_dataset(dataset, tmp_path)
    with pytest.raises(DataError, match=r"came from Python"):
        load_dataset(tmp_path)
    assert load_dataset(tmp_path, data=images_source()).digest == dataset.digest


def test_damaged_and_newer_descriptions(npz, tmp_path) -> None:
    save_dataset(open_dataset(npz, label_key="t", inputs="b"), tmp_path)
    path = tmp_path / "data.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps({**plain, "format": 99}))
    with pytest.raises(RunError, match=r"newer version of eexform"):
        load_dataset(tmp_path)
    path.write_text(json.dumps({"format": 1}))
    with pytest.raises(RunError, match=r"not a description of data"):
        load_dataset(tmp_path)
    path.write_text(json.dumps({**plain, "origin": {"text": npz, "options": {"zip_key": "x"}}}))
    with pytest.raises(OptionError, match=r"'zip_key' is not known"):
        load_dataset(tmp_path)


def test_duplicates_across_splits() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((60, 4)).astype(np.float32)
    source = ArraySource("toy", {"all": ({None: values}, np.arange(60) % 3)})
    splits: Splits = make_splits(source)
    assert find_duplicates(source, splits) == ()
    assert describe_duplicates(()) is None
    train, select = int(splits.head_train.indices[3]), int(splits.select.indices[1])
    values[select] = values[train]
    found = find_duplicates(source, splits, batch_size=7)
    assert [(pair.left, pair.left_index, pair.right, pair.right_index) for pair in found] == [
        ("head_train", train, "select", select)
    ]
    message = describe_duplicates(found)
    assert message is not None
    assert "1 in both head_train and select" in message
