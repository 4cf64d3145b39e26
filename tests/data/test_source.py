import numpy as np
import pytest

from eexform import plugins
from eexform.data import ArraySource, open_source
from eexform.data.source import SourceOptions, as_labels, parse_inputs
from eexform.errors import DataError, OptionError


def test_digits_are_built_in() -> None:
    source = open_source("digits")
    assert source.parts == {"all": 1797}
    assert source.classes == tuple("0123456789")
    samples = source.fetch("all", np.array([3, 1]))
    assert samples.inputs[None].shape == (2, 1, 8, 8)
    assert samples.inputs[None].dtype == np.float32
    assert samples.labels is not None
    assert samples.labels.tolist() == [3, 1]
    assert source.digest == open_source("digits").digest


def test_digits_refuses_what_means_nothing_to_it() -> None:
    with pytest.raises(OptionError, match=r"--label-key means nothing"):
        open_source("digits", label_key="y")
    with pytest.raises(OptionError, match=r"takes nothing after its name"):
        open_source("digits:8x8")


def test_unknown_data_says_what_was_tried(tmp_path) -> None:
    with pytest.raises(
        DataError, match=r"(?s)nowhere: not a data source.*digits.*npz.*folder.*module:attribute.*no file"
    ):
        open_source("nowhere")
    odd = tmp_path / "data.csv"
    odd.write_text("1,2")
    with pytest.raises(DataError, match=r"it is a file, but of \.csv type"):
        open_source(str(odd))
    with pytest.raises(DataError, match=r"data: empty"):
        open_source(" ")


def test_third_party_sources_are_opened_by_prefix(monkeypatch) -> None:
    class Ours(ArraySource):
        @classmethod
        def open(cls, text: str, options: SourceOptions) -> ArraySource:
            return cls(text, {"all": ({None: np.zeros((4, 2))}, np.arange(4))})

    monkeypatch.setattr(plugins, "names", lambda group: ("digits", "ours"))
    monkeypatch.setattr(plugins, "load", lambda group, name: Ours)
    assert open_source("ours:here").name == "here"

    class Broken:
        open = staticmethod(lambda text, options: object())

    monkeypatch.setattr(plugins, "load", lambda group, name: Broken)
    with pytest.raises(DataError, match=r"returned a object, which has no 'name'"):
        open_source("ours:here")


def test_inputs_as_text() -> None:
    assert parse_inputs("mfcc") == "mfcc"
    assert parse_inputs("a=x, b=y") == {"a": "x", "b": "y"}
    for wrong, words in (("a=x,b", "'b' is not"), ("a=x,a=y", "twice"), ("", "empty"), ("a=", "'a=' is not")):
        with pytest.raises(OptionError, match=words):
            parse_inputs(wrong)


def test_labels_must_be_whole_numbers() -> None:
    assert as_labels([[1], [2]], "here").tolist() == [1, 2]
    assert as_labels([True, False], "here").tolist() == [1, 0]
    with pytest.raises(DataError, match=r"here: expected whole numbers.*float64"):
        as_labels([1.0, 2.0], "here")
    with pytest.raises(DataError, match=r"one-hot labels become numbers with argmax"):
        as_labels(np.eye(3), "here")


def test_arrays_must_agree() -> None:
    x = np.zeros((4, 2), dtype=np.float32)
    with pytest.raises(DataError, match=r"differ in their number of samples.*'input': 4.*'labels': 3"):
        ArraySource("toy", {"all": ({None: x}, np.arange(3))})
    with pytest.raises(DataError, match=r"part 'all' is empty"):
        ArraySource("toy", {"all": ({None: x[:0]}, None)})
    with pytest.raises(DataError, match=r"parts have different inputs"):
        ArraySource("toy", {"a": ({"x": x}, None), "b": ({"z": x}, None)})
    with pytest.raises(DataError, match=r"no samples"):
        ArraySource("toy", {})


def test_digest_is_of_the_content() -> None:
    x = np.arange(8, dtype=np.float32).reshape(4, 2)
    plain = ArraySource("a", {"all": ({None: x}, np.arange(4))}).digest
    assert plain == ArraySource("b", {"all": ({None: x.astype(">f4")}, np.arange(4))}).digest
    changed = x.copy()
    changed[3, 1] += 1
    assert plain != ArraySource("a", {"all": ({None: changed}, np.arange(4))}).digest
    assert plain != ArraySource("a", {"all": ({None: x}, np.arange(4)[::-1])}).digest
    assert plain != ArraySource("a", {"all": ({None: x.reshape(4, 1, 2)}, np.arange(4))}).digest
