import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eexform.data import SPLITS, ArraySource, Split, Splits, make_splits, open_source
from eexform.errors import DataError, OptionError, RunError
from tests.data.helpers import parts_source


def indices(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(12, 60), min_size=2, max_size=5),
    shares=st.tuples(*[st.floats(0.15, 0.24)] * 4),
    seed=st.integers(0, 2**31),
)
def test_disjoint_stratified_and_of_the_right_size(counts, shares, seed) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    source = ArraySource("toy", {"all": ({None: np.zeros((len(labels), 1))}, labels)})
    splits = make_splits(source, fractions=shares, seed=seed)
    for left, right in itertools.combinations(SPLITS, 2):
        assert not set(splits[left].indices) & set(splits[right].indices)
    for name, share in zip(SPLITS, shares, strict=True):
        assert abs(len(splits[name]) - share * len(labels)) <= 1
        assert (np.diff(splits[name].indices) > 0).all()
        for label, count in enumerate(counts):
            held = (labels[splits[name].indices] == label).sum()
            assert abs(held - share * count) <= 2


def test_rare_classes_go_everywhere() -> None:
    labels = np.concatenate([np.zeros(800, np.int64), np.arange(1, 201)])
    source = ArraySource("toy", {"all": ({None: np.zeros((1000, 1))}, labels)})
    splits = make_splits(source, fractions=(0.25, 0.25, 0.25, 0.25))
    for name in SPLITS:
        assert 25 <= (labels[splits[name].indices] > 0).sum() <= 75, name


def test_same_seed_same_splits() -> None:
    source = open_source("digits")
    assert make_splits(source, seed=3).digest == make_splits(source, seed=3).digest
    assert make_splits(source, seed=3).digest != make_splits(source, seed=4).digest
    assert make_splits(source).sizes == {"head_train": 1078, "calibrate": 180, "select": 269, "test": 270}


def test_unseen_part() -> None:
    splits = make_splits(parts_source(train=90, test=60), select_from="test")
    assert splits.sizes == {"head_train": 90, "calibrate": 6, "select": 24, "test": 30}
    assert splits.head_train.part == "train"
    assert splits["head-train"].part == "train"
    assert {splits[name].part for name in SPLITS[1:]} == {"test"}


def test_a_part_of_its_own_for_test() -> None:
    splits = make_splits(parts_source(train=90, val=60, test=30), select_from="val", test_from="test")
    assert splits.sizes == {"head_train": 90, "calibrate": 12, "select": 48, "test": 30}
    shared = make_splits(parts_source(train=90, test=30), train_from="train", select_from="train", test_from="test")
    assert shared.sizes == {"head_train": 54, "calibrate": 9, "select": 27, "test": 30}
    assert (
        make_splits(parts_source(train=90, test=30), train_from="train", select_from="train").head_train.part == "train"
    )


def test_limit_is_stratified() -> None:
    source = parts_source(train=900, test=60)
    splits = make_splits(source, select_from="test", limit=30)
    assert len(splits.head_train) == 30
    assert np.bincount(splits.head_train.indices % 3).tolist() == [10, 10, 10]
    assert len(make_splits(source, select_from="test", limit=10**6).head_train) == 900


def test_which_part_is_unseen_must_be_said() -> None:
    with pytest.raises(DataError, match=r"parts train \(90\), test \(60\): say with --select-from"):
        make_splits(parts_source(train=90, test=60))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"select_from": "tset"}, "--select-from: toy has no part 'tset': did you mean 'test'"),
        ({"select_from": "test", "test_from": "test"}, "both 'test'"),
        ({"select_from": "test", "train_from": "train", "test_from": "train"}, "test must stay unseen"),
        ({"select_from": "test", "fractions": (0.5, 0.5)}, r"expected 3 numbers \(calibrate, select, test\), found 2"),
        ({"select_from": "test", "fractions": (0.5, 0.5, 0.5)}, "add up to 1.5"),
        ({"select_from": "test", "fractions": (0.5, 0.5, -0.5)}, "between 0 and 1"),
        ({"select_from": "test", "fractions": (0.5, float("nan"), 0.1)}, "between 0 and 1"),
        ({"select_from": "test", "limit": 0}, "at least 1 sample"),
        ({"select_from": "test", "seed": -1}, "seed: expected"),
    ],
)
def test_bad_options(options, words) -> None:
    with pytest.raises(OptionError, match=words):
        make_splits(parts_source(train=90, test=60), **options)


def test_more_bad_options() -> None:
    with pytest.raises(OptionError, match=r"say with --train-from"):
        make_splits(parts_source(a=30, b=30, c=30), select_from="c")
    with pytest.raises(OptionError, match=r"has only the part all"):
        make_splits(parts_source(all=30), test_from="all")
    with pytest.raises(OptionError, match=r"no split is called 'train'"):
        make_splits(parts_source(all=60))["train"]


def test_empty_split() -> None:
    with pytest.raises(DataError, match=r"split 'calibrate' is empty.*--fractions"):
        make_splits(parts_source(all=60), fractions=(0.6, 0.001, 0.2, 0.1))


def test_one_class_split() -> None:
    x = {None: np.zeros((40, 1))}
    source = ArraySource("toy", {"all": (x, np.full(40, 1))}, classes=("cat", "dog"))
    with pytest.raises(DataError, match=r"split 'head_train': all 24 samples are of one class \(dog\)"):
        make_splits(source)
    assert make_splits(source, labels=False).sizes["head_train"] == 24


def test_no_labels() -> None:
    source = ArraySource("toy", {"all": ({None: np.zeros((40, 1))}, None)})
    with pytest.raises(DataError, match=r"toy: no labels; name them with --label-key, or use --labels none"):
        make_splits(source)
    assert make_splits(source, labels=False).sizes["test"] == 6


def test_shared_samples_are_refused() -> None:
    a, b, c = Split("p", indices(0, 1)), Split("p", indices(2, 3)), Split("p", indices(4))
    with pytest.raises(DataError, match=r"'calibrate' and 'test' share 1 samples of part 'p' .*index 3"):
        Splits(a, b, c, Split("p", indices(3, 9)))
    Splits(a, b, c, Split("q", indices(3, 9)))
    with pytest.raises(DataError, match=r"split 'test' holds a sample twice"):
        Splits(a, b, c, Split("p", indices(9, 9)))
    with pytest.raises(DataError, match=r"indices must be"):
        Splits(a, b, c, Split("p", indices(-1)))


def test_stored_and_loaded(tmp_path) -> None:
    splits = make_splits(parts_source(train=90, test=60), select_from="test", seed=5)
    path = tmp_path / "splits.npz"
    splits.save(path)
    loaded = Splits.load(path)
    assert loaded.digest == splits.digest
    assert loaded.seed == 5
    assert [path.name for path in tmp_path.iterdir()] == ["splits.npz"]


def rewrite(path, **changes) -> None:
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **{**arrays, **changes})


def test_loading_checks(tmp_path) -> None:
    splits = make_splits(parts_source(all=60))
    path = tmp_path / "splits.npz"
    splits.save(path)
    rewrite(path, test=splits.select.indices)
    with pytest.raises(DataError, match=r"must be disjoint"):
        Splits.load(path)
    rewrite(path, format=np.int64(99))
    with pytest.raises(RunError, match=r"newer version of eexform"):
        Splits.load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match=r"may be damaged"):
        Splits.load(path)
    with pytest.raises(RunError, match=r"no such file"):
        Splits.load(tmp_path / "none.npz")


def test_splits_of_other_data() -> None:
    splits = make_splits(parts_source(all=60))
    with pytest.raises(DataError, match=r"names sample 5\d of part 'all', but toy has 30 there"):
        splits.check(parts_source(all=30))
    with pytest.raises(DataError, match=r"is of part 'all', which toy does not have"):
        splits.check(parts_source(train=60))
