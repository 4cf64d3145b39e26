import builtins
import io

import numpy as np
import pytest
from PIL import Image

from eexform.data import Preprocess, open_dataset, open_source
from eexform.errors import DataError
from tests.data.helpers import model

datasets = pytest.importorskip("datasets")


def png(seed: int, size: tuple[int, int] = (6, 5)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write(folder, part: str, rows: dict, **kinds) -> None:
    folder.mkdir(exist_ok=True)
    table = datasets.Dataset.from_dict(rows)
    for column, kind in kinds.items():
        table = table.cast_column(column, kind)
    table.to_parquet(str(folder / f"{part}-00000-of-00001.parquet"))


def images(folder, **sizes: int) -> str:
    label = datasets.ClassLabel(names=["a", "b", "c"])
    for part, n in sizes.items():
        rows = {"image": [{"bytes": png(i), "path": None} for i in range(n)], "label": [i % 3 for i in range(n)]}
        write(folder, part, rows, image=datasets.Image(), label=label)
    return f"hf:{folder}"


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_local_parquet_images(tmp_path) -> None:
    source = open_source(images(tmp_path / "d", train=7, test=4), cache_folder=tmp_path / "cache")
    assert source.parts == {"train": 7, "test": 4}
    assert source.classes == ("a", "b", "c")
    assert source.layout == "nhwc"
    samples = source.fetch("train", np.array([5, 2]))
    with Image.open(io.BytesIO(png(5))) as expected:
        np.testing.assert_array_equal(samples.inputs[None][0], np.asarray(expected))
    assert source.labels("train").tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert source.digest == open_source(images(tmp_path / "e", train=7, test=4)).digest
    assert source.digest != open_source(images(tmp_path / "f", train=6, test=4)).digest


def test_decoded_pixels_are_cached_on_disk(tmp_path, monkeypatch) -> None:
    text = images(tmp_path / "d", train=12, test=30)
    folder = tmp_path / "cache"
    build = {"select_from": "test", "cache_folder": folder, "preprocess": Preprocess.parse(resize="4x4")}
    dataset = open_dataset(text, **build).bind(model(x=(3, 4, 4)))
    first = [batch.feeds["x"] for batch in dataset.batches("head_train", 5)]
    again = open_dataset(text, **build).bind(model(x=(3, 4, 4)))
    monkeypatch.setattr("eexform.data.images.decode", lambda *a: pytest.fail("decoded twice"))
    for left, right in zip(first, again.batches("head_train", 5), strict=True):
        np.testing.assert_array_equal(left, right.feeds["x"])
    assert list(folder.glob("train-*.npy"))


def test_token_columns(tmp_path) -> None:
    rows = {"ids": [[i, i + 1] for i in range(6)], "mask": [[1, 0]] * 6, "label": [0, 1] * 3, "text": ["?"] * 6}
    write(tmp_path / "d", "train", rows)
    source = open_source(f"hf:{tmp_path / 'd'}", inputs="input_ids=ids,attention_mask=mask")
    found = source.fetch("train", np.array([2]))
    assert found.inputs["input_ids"].tolist() == [[2, 3]]
    with pytest.raises(DataError, match=r"no column holds images.*--image-key.*ids \("):
        open_source(f"hf:{tmp_path / 'd'}")
    with pytest.raises(DataError, match=r"no column 'idz' for an input: did you mean 'ids'"):
        open_source(f"hf:{tmp_path / 'd'}", inputs="idz")
    with pytest.raises(DataError, match=r"holds no numbers.*tokenise"):
        open_source(f"hf:{tmp_path / 'd'}", inputs="text").fetch("train", np.array([0]))


def test_rows_of_different_length(tmp_path) -> None:
    write(tmp_path / "d", "train", {"ids": [[1], [1, 2]], "label": [0, 1]})
    source = open_source(f"hf:{tmp_path / 'd'}", inputs="ids")
    with pytest.raises(DataError, match=r"differ in length: pad or cut"):
        source.fetch("train", np.array([0, 1]))


def test_columns_that_could_be_meant(tmp_path) -> None:
    kind = datasets.ClassLabel(names=["a", "b"])
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(2)], "fine": [0, 1], "coarse": [0, 1]}
    write(tmp_path / "d", "train", rows, image=datasets.Image(), fine=kind, coarse=kind)
    with pytest.raises(DataError, match=r"labels could be any of the columns fine, coarse"):
        open_source(f"hf:{tmp_path / 'd'}")
    assert open_source(f"hf:{tmp_path / 'd'}", label_key="fine").classes == ("a", "b")
    with pytest.raises(DataError, match=r"no column 'fin' for the labels: did you mean 'fine'"):
        open_source(f"hf:{tmp_path / 'd'}", label_key="fin")
    with pytest.raises(DataError, match=r"column 'coarse' is no image column"):
        open_source(f"hf:{tmp_path / 'd'}", label_key="fine", image_key="coarse")
    with pytest.raises(DataError, match=r"either --image-key or --inputs"):
        open_source(f"hf:{tmp_path / 'd'}", label_key="fine", image_key="image", inputs="image")


def test_corrupt_image_is_named(tmp_path) -> None:
    rows = {"image": [{"bytes": png(0), "path": None}, {"bytes": b"rubbish", "path": None}], "label": [0, 1]}
    write(tmp_path / "d", "train", rows, image=datasets.Image())
    source = open_source(f"hf:{tmp_path / 'd'}")
    with pytest.raises(DataError, match=r"row 1 of part 'train', column 'image': not an image"):
        source.fetch("train", np.array([0, 1]))


def test_missing_labels_matter_only_when_asked_for(tmp_path) -> None:
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(12)], "label": [None, *range(11)]}
    write(tmp_path / "d", "train", rows, image=datasets.Image())
    source = open_source(f"hf:{tmp_path / 'd'}")
    with pytest.raises(DataError, match=r"row 0 of part 'train' has no label"):
        source.labels("train")
    dataset = open_dataset(f"hf:{tmp_path / 'd'}", labels="none").bind(model(x=(3, 6, 5)))
    assert next(iter(dataset.batches("select", 1))).labels is None


def test_what_cannot_be_loaded(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"cannot be loaded \(folder: "):
        open_source(f"hf:{tmp_path / 'empty'}")
    with pytest.raises(DataError, match=r"there is no such folder, and on the hub"):
        open_source("hf:nobody/nothing-of-that-name")
    with pytest.raises(DataError, match=r"expected a folder or a name"):
        open_source("hf:")


def test_without_the_extra(monkeypatch) -> None:
    real = builtins.__import__

    def without(name, *rest, **options):
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install eexform\[hf\]"):
        open_source("hf:anything")
