import sys

import numpy as np
import pytest

from eexform.data import open_source
from eexform.errors import DataError

CODE = """
import numpy as np
import torch

class Toy(torch.utils.data.Dataset):
    classes = ["a", "b"]
    layout = "nchw"

    def __init__(self, n=6):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        if index >= self.n:
            raise IndexError(index)
        return torch.full((1, 2, 2), float(index)), index % 2

def plain():
    return Toy()

def parts():
    return {"train": Toy(6), "test": Toy(3)}

class Named(Toy):
    classes = None

    def __getitem__(self, index):
        return {"ids": np.arange(3) + index, "mask": np.ones(3, dtype=np.int64)}, torch.tensor(index % 2)

class Bare(Toy):
    def __getitem__(self, index):
        return torch.zeros(3)

class Stated(Toy):
    digest = "v1"
    labels = [0, 1] * 3

    def __getitem__(self, index):
        if index > 1:
            raise AssertionError("read although labels and digest are stated")
        return super().__getitem__(index)

class Ragged(Toy):
    def __getitem__(self, index):
        return np.zeros(index + 1), 0

class Failing(Toy):
    def __getitem__(self, index):
        raise RuntimeError("disk on fire")

class Words(Toy):
    def __getitem__(self, index):
        return "text", 0

class Soft(Toy):
    def __getitem__(self, index):
        return np.zeros(2), 0.5

class Odd(Toy):
    layout = "chwn"

named, bare, stated, ragged, failing, words, soft, odd = (
    Named(), Bare(), Stated(), Ragged(), Failing(), Words(), Soft(), Odd()
)
empty = Toy(0)

def broken():
    raise ValueError("no such disk")

def stream():
    return iter([])
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy_module.py").write_text(CODE)
    (tmp_path / "toy_broken.py").write_text("import nothing_of_that_name")
    monkeypatch.chdir(tmp_path)
    yield "toy_module"
    sys.modules.pop("toy_module", None)


def test_function_that_returns_a_torch_dataset(toy) -> None:
    source = open_source(f"{toy}:plain")
    assert source.parts == {"all": 6}
    assert source.classes == ("a", "b")
    assert source.layout == "nchw"
    samples = source.fetch("all", np.array([4, 1]))
    assert samples.inputs[None].shape == (2, 1, 2, 2)
    assert samples.inputs[None][:, 0, 0, 0].tolist() == [4.0, 1.0]
    assert samples.labels.tolist() == [0, 1]
    assert source.labels("all").tolist() == [0, 1] * 3
    assert source.digest == open_source(f"{toy}:plain").digest
    assert source.digest != open_source(f"{toy}:parts").digest


def test_parts_named_inputs_and_no_labels(toy) -> None:
    assert open_source(f"{toy}:parts").parts == {"train": 6, "test": 3}
    named = open_source(f"{toy}:named")
    assert {key: array.shape for key, array in named.fetch("all", np.arange(2)).inputs.items()} == {
        "ids": (2, 3),
        "mask": (2, 3),
    }
    assert open_source(f"{toy}:bare").labels("all") is None


def test_stated_digest_and_labels_save_the_scan(toy) -> None:
    source = open_source(f"{toy}:stated")
    assert source.labels("all").tolist() == [0, 1] * 3
    assert len(source.digest) == 64


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "has no 'nothing'"),
        ("plan", "did you mean 'plain'"),
        ("broken", "function failed: ValueError: no such disk"),
        ("stream", "expected a data set with a length"),
        ("empty", "part 'all' is empty"),
        ("odd", "'layout' is 'chwn'"),
    ],
)
def test_opening_fails_clearly(toy, name, words) -> None:
    with pytest.raises(DataError, match=words):
        open_source(f"{toy}:{name}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("failing", "item 0 of part 'all' cannot be had: RuntimeError: disk on fire"),
        ("words", "x is a str: expected an array or tensor"),
        ("ragged", "differ in shape.*pad them"),
        ("soft", "labels of part 'all': expected whole numbers"),
    ],
)
def test_fetching_fails_clearly(toy, name, words) -> None:
    with pytest.raises(DataError, match=words):
        open_source(f"{toy}:{name}").fetch("all", np.arange(2))


def test_modules_that_cannot_be_imported(toy) -> None:
    with pytest.raises(DataError, match=r"module 'toy_missing' cannot be imported.*No module named"):
        open_source("toy_missing:data")
    with pytest.raises(DataError, match=r"module 'toy_broken' cannot be imported.*nothing_of_that_name"):
        open_source("toy_broken:data")
    with pytest.raises(DataError, match=r"expected 'module:attribute'"):
        open_source("factory:toy_module")


def test_the_search_path_is_left_as_it_was(toy) -> None:
    before = list(sys.path)
    open_source(f"{toy}:plain")
    assert sys.path == before
