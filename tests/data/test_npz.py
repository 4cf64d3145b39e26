import zipfile

import numpy as np
import pytest

from eexform.data import open_source
from eexform.errors import DataError, OptionError

X = np.arange(24, dtype=np.float32).reshape(6, 4)
Y = np.array([0, 1, 2, 0, 1, 2])


def save(folder, **arrays) -> str:
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return str(path)


def test_default_names(tmp_path) -> None:
    source = open_source(save(tmp_path, anything=X, y=Y, classes=np.array(["a", "b", "c"]), notes=np.array(["?"] * 6)))
    assert source.parts == {"all": 6}
    assert source.classes == ("a", "b", "c")
    samples = source.fetch("all", np.array([5, 0]))
    np.testing.assert_array_equal(samples.inputs[None], X[[5, 0]])
    assert source.labels("all").tolist() == Y.tolist()


def test_parts_by_ending(tmp_path) -> None:
    source = open_source(save(tmp_path, x_train=X, y_train=Y, x_test=X[:3], y_test=Y[:3]))
    assert source.parts == {"train": 6, "test": 3}
    assert source.fetch("test", np.array([2])).labels.tolist() == [2]


def test_large_plain_arrays_are_memory_mapped(tmp_path) -> None:
    big = np.random.default_rng(0).random((300, 1024))
    plain = open_source(save(tmp_path, x=big, y=np.arange(300)))
    assert isinstance(plain._inputs["all"][None], np.memmap)
    np.testing.assert_array_equal(plain.fetch("all", np.arange(300)).inputs[None], big)
    np.savez_compressed(tmp_path / "small.npz", x=big, y=np.arange(300))
    packed = open_source(str(tmp_path / "small.npz"))
    assert not isinstance(packed._inputs["all"][None], np.memmap)
    assert packed.digest == plain.digest


def test_several_inputs(tmp_path) -> None:
    path = save(tmp_path, ids=Y[:, None], mask=Y[:, None], y=Y)
    with pytest.raises(DataError, match=r"input could be any of ids, mask.*--inputs.*ids int64\[6x1\]"):
        open_source(path)
    source = open_source(path, inputs="input_ids=ids,attention_mask=mask")
    assert set(source.fetch("all", np.array([0])).inputs) == {"input_ids", "attention_mask"}
    assert set(open_source(path, inputs="ids").fetch("all", np.array([0])).inputs) == {None}
    with pytest.raises(DataError, match=r"no array 'idz' for an input: did you mean 'ids'"):
        open_source(path, inputs="idz")


def test_what_is_no_array_is_passed_over(tmp_path) -> None:
    path = save(tmp_path, x=X, y=Y)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("readme.txt", "hand-made")
    np.testing.assert_array_equal(open_source(path).fetch("all", np.arange(2)).inputs[None], X[:2])


def test_ambiguous_or_missing_labels(tmp_path) -> None:
    with pytest.raises(DataError, match=r"labels could be any of y, label"):
        open_source(save(tmp_path, x=X, y=Y, label=Y))
    with pytest.raises(DataError, match=r"array 'y' is a single value, not a label per sample.*x float32\[6x4\]"):
        open_source(save(tmp_path, x=X, y=np.array(3)))
    with pytest.raises(DataError, match=r"no array 'target' for the labels.*The file holds x float32\[6x4\]"):
        open_source(save(tmp_path, x=X, y=Y), label_key="target")
    assert open_source(save(tmp_path, x=X, target=Y), label_key="target").labels("all").tolist() == Y.tolist()
    assert open_source(save(tmp_path, x=X)).labels("all") is None


def test_unusable_files(tmp_path) -> None:
    with pytest.raises(DataError, match=r"no such file"):
        open_source(str(tmp_path / "missing.npz"))
    whole = save(tmp_path, x=X, y=Y)
    content = (tmp_path / "data.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cut\.npz: not a NumPy archive, or damaged"):
        open_source(str(tmp_path / "cut.npz"))
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(DataError, match=r"not a NumPy archive"):
        open_source(str(tmp_path / "text.npz"))
    with pytest.raises(OptionError, match=r"--image-key means nothing"):
        open_source(whole, image_key="x")
    with pytest.raises(DataError, match=r"no numeric array with as many samples as there are labels"):
        open_source(save(tmp_path, x=X[:5], y=Y))
    with pytest.raises(DataError, match=r"expected numbers"):
        open_source(save(tmp_path, x=np.array(["a"] * 6), y=Y), inputs="x")
    with pytest.raises(DataError, match=r"class name stands twice"):
        open_source(save(tmp_path, x=X, y=Y, classes=np.array(["a", "a"])))


def test_pickled_content_is_never_loaded(tmp_path) -> None:
    path = save(tmp_path, x=np.array([{"a": 1}] * 6, dtype=object), y=Y)
    with pytest.raises(DataError, match=r"pickled objects, which are never loaded"):
        open_source(path)


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9, 0.999])
def test_cut_off_anywhere(tmp_path, keep) -> None:
    big = np.random.default_rng(0).random((300, 1024))
    path = save(tmp_path, x=big, y=np.arange(300))
    content = (tmp_path / "data.npz").read_bytes()
    (tmp_path / "data.npz").write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match=r"damaged|cut off"):
        open_source(path)
