import threading
import tracemalloc

import numpy as np
import pytest

from eexform.data import ArraySource, Augment, Dataset, Preprocess, make_splits, open_dataset
from eexform.errors import DataError, OptionError
from tests.data.helpers import images_source, model, parts_source, write_image


def dataset(source=None, **options) -> Dataset:
    options.setdefault("seed", 1)
    return open_dataset(source if source is not None else images_source(), **options)


def test_batches_cover_the_split_once_and_in_order() -> None:
    bound = dataset().bind(model(x=(3, 8, 8)))
    batches = list(bound.batches("head_train", 7))
    assert [len(batch) for batch in batches] == [7, 7, 7, 7, 7, 1]
    np.testing.assert_array_equal(np.concatenate([b.indices for b in batches]), bound.splits.head_train.indices)
    np.testing.assert_array_equal(np.concatenate([b.positions for b in batches]), np.arange(36))
    np.testing.assert_array_equal(np.concatenate([b.labels for b in batches]), bound.labels_of("head-train"))
    assert batches[0].feeds["x"].shape == (7, 3, 8, 8)
    assert batches[0].feeds["x"].dtype == np.float32
    raw = bound.source.fetch("all", batches[0].indices).inputs[None]
    np.testing.assert_array_equal(batches[0].feeds["x"], raw.transpose(0, 3, 1, 2))
    assert [len(batch) for batch in bound.batches("head_train", 7, drop_last=True)] == [7] * 5


def test_shuffling_is_seeded_and_differs_by_epoch() -> None:
    bound = dataset().bind(model(x=(3, 8, 8)))

    def order(**options) -> list[int]:
        return [int(i) for batch in bound.batches("head_train", 5, **options) for i in batch.indices]

    assert order(seed=1) == order(seed=1, prefetch=False)
    assert order(seed=1) != order(seed=1, epoch=1)
    assert sorted(order(seed=1)) == order()


def test_augmentation_is_the_same_whatever_the_batch_size() -> None:
    bound = dataset(augment="flip,crop:2").bind(model(x=(3, 8, 8)))
    small = [b.feeds["x"] for b in bound.batches("head_train", 4, seed=3, augment=True, epoch=2)]
    large = [b.feeds["x"] for b in bound.batches("head_train", 36, seed=3, augment=True, epoch=2)]
    np.testing.assert_array_equal(np.concatenate(small), large[0])
    plain = next(iter(bound.batches("head_train", 36, seed=3, epoch=2)))
    assert (plain.feeds["x"] != large[0]).any()
    assert plain.mix is None


def test_mixing_hands_out_both_labels() -> None:
    bound = dataset(augment="mixup:0.5", preprocess=Preprocess.parse(scale="1/255")).bind(model(x=(3, 8, 8)))
    batch = next(iter(bound.batches("head_train", 8, seed=0, augment=True)))
    other, weight = batch.mix
    assert other.shape == weight.shape == (8,)
    assert batch.feeds["x"].max() <= 1
    labelless = dataset(augment="mixup:0.5", labels="none").bind(model(x=(3, 8, 8)))
    assert next(iter(labelless.batches("head_train", 8, seed=0, augment=True))).mix[0] is None


def test_label_free_mode() -> None:
    free = dataset(ArraySource("toy", {"all": ({None: np.zeros((40, 2), np.float32)}, None)}), labels="none")
    bound = free.bind(model(x=(2,)))
    assert bound.labels_of("select") is None
    assert next(iter(bound.batches("select", 4))).labels is None
    with pytest.raises(DataError, match=r"no labels; name them with --label-key"):
        dataset(ArraySource("toy", {"all": ({None: np.zeros((40, 2))}, None)}))
    with pytest.raises(OptionError, match=r"labels: expected 'given' or 'none', found 'given '"):
        dataset(labels="given ")


def test_must_be_bound() -> None:
    with pytest.raises(DataError, match=r"not bound to a model yet"):
        next(iter(dataset().batches("select", 4)))


def test_wrong_size_says_both_shapes_and_what_to_do() -> None:
    with pytest.raises(
        DataError, match=r"'x' expects samples of 3x16x16, the data gives 3x8x8 \(raw: 8x8x3\): say --resize 16x16"
    ):
        dataset().bind(model(x=(3, 16, 16)))
    assert dataset(preprocess=Preprocess(resize=(16, 16))).bind(model(x=(3, 16, 16))).size("test") == 9
    with pytest.raises(DataError, match=r"say --colour rgb and --resize 9x9"):
        dataset(images_source(shape=(8, 8, 1))).bind(model(x=(3, 9, 9)))
    with pytest.raises(DataError, match=r"say --model-layout nhwc|say --layout nchw and --model-layout nhwc"):
        dataset().bind(model(x=(8, 8, 3)))
    unknown = ArraySource("toy", {"all": ({None: np.zeros((60, 8, 8, 3), np.uint8)}, np.arange(60) % 3)})
    with pytest.raises(DataError, match=r"expects samples of 3x8x8, the data gives 8x8x3: say --layout nhwc"):
        dataset(unknown).bind(model(x=(3, 8, 8)))
    with pytest.raises(DataError, match=r"the data gives 8x8x3: say --layout nhwc"):  # what was said is wrong
        dataset(unknown, preprocess=Preprocess(layout="nchw")).bind(model(x=(3, 8, 8)))
    dataset(unknown, preprocess=Preprocess(layout="nhwc")).bind(model(x=(3, 8, 8)))
    first = ArraySource("toy", {"all": ({None: np.zeros((60, 3, 8, 8), np.uint8)}, np.arange(60) % 3)})
    with pytest.raises(DataError, match=r"the data gives 8x8x3 \(raw: 3x8x8\): say --model-layout nchw"):
        dataset(first, preprocess=Preprocess(layout="nchw", model_layout="nhwc")).bind(model(x=(3, 8, 8)))
    with pytest.raises(DataError, match=r"expects samples of 4, the data gives 1"):
        dataset(parts_source(all=60)).bind(model(x=(4,)))


def test_free_dimensions_take_any_size() -> None:
    assert dataset().bind(model(x=(3, "h", None))).num_classes == 3


def test_classes_and_labels_must_match() -> None:
    named = images_source(classes=3)
    named.classes = ("ant", "bee", "cow")
    with pytest.raises(DataError, match=r"3 classes: ant, bee, cow; the model has 5 outputs"):
        dataset(named).bind(model(5, x=(3, 8, 8)))
    with pytest.raises(DataError, match=r"sample 2 of part 'all' has label 2, but the model has 2 classes, 0 to 1"):
        dataset().bind(model(2, x=(3, 8, 8)))
    with pytest.raises(DataError, match=r"labels go from 0 to 2, 3 classes, but the model has 10 outputs"):
        dataset().bind(model(10, x=(3, 8, 8)))
    hidden = ArraySource("toy", {"all": ({None: np.zeros((60, 2))}, np.arange(60) % 3 - 1)})
    with pytest.raises(DataError, match=r"label -1.*hidden label.*--labels none"):
        dataset(hidden).bind(model(x=(2,)))
    dataset(hidden, labels="none").bind(model(x=(2,)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_found_and_the_sample_named(bad) -> None:
    values = np.zeros((60, 4), dtype=np.float32)
    source = ArraySource("toy", {"all": ({None: values}, np.arange(60) % 3)})
    bound = dataset(source).bind(model(x=(4,)))
    index = int(bound.splits.select.indices[5])
    values[index, 2] = bad
    for prefetch in (True, False):
        with pytest.raises(DataError, match=rf"toy: sample {index} of part 'all' holds NaN or infinity"):
            list(bound.batches("select", 2, prefetch=prefetch))


def test_several_inputs_by_name() -> None:
    ids = np.arange(120).reshape(60, 2)
    source = ArraySource("text", {"all": ({"ids": ids, "mask": np.ones_like(ids)}, np.arange(60) % 3)})
    tokens = dataset(source, preprocess=Preprocess(scale=0.5))
    feeds = tokens.bind(model(dtype="int64", ids=(2,), mask=("seq",))).sample_feeds("select", 3)
    assert feeds["ids"].dtype == np.int64
    np.testing.assert_array_equal(feeds["ids"], ids[tokens.splits.select.indices[:3]])
    with pytest.raises(DataError, match=r"nothing feeds the model input 'types'; the data gives 'ids', 'mask'"):
        tokens.bind(model(dtype="int64", ids=(2,), mask=(2,), types=(2,)))
    with pytest.raises(DataError, match=r"the model has no input 'mask'.*its inputs are 'ids'"):
        tokens.bind(model(dtype="int64", ids=(2,)))
    with pytest.raises(
        DataError, match=r"the model has 2 inputs \('a', 'b'\), the data gives one array without a name"
    ):
        dataset().bind(model(a=(3, 8, 8), b=(3, 8, 8)))


def test_types_must_fit() -> None:
    with pytest.raises(DataError, match=r"input 'x': the model takes int64, the data holds float32"):
        dataset(parts_source(all=60)).bind(model(dtype="int64", x=(1,)))
    half = dataset(parts_source(all=60)).bind(model(dtype="float16", x=(1,)))
    assert half.sample_feeds("test", 2)["x"].dtype == np.float16
    pixels = dataset().bind(model(dtype="uint8", x=(3, 8, 8))).sample_feeds("test", 2)["x"]
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous


def test_batch_on_another_axis() -> None:
    bound = dataset(parts_source(all=60)).bind(model(batch_axis=1, x=(1,)))
    assert bound.sample_feeds("test", 5)["x"].shape == (1, 5)


def test_augmentation_is_for_images_of_a_known_layout() -> None:
    with pytest.raises(OptionError, match=r"'flip' is for images; samples of toy are 1: use --augment none"):
        dataset(parts_source(all=60), augment="flip").bind(model(x=(1,)))
    unknown = ArraySource("toy", {"all": ({None: np.zeros((60, 1, 4, 4), np.float32)}, np.arange(60) % 3)})
    with pytest.raises(OptionError, match=r"the layout of toy is not known: say --layout"):
        dataset(unknown, augment="flip").bind(model(x=(1, 4, 4)))
    bound = dataset(parts_source(all=60)).bind(model(x=(1,)))
    with pytest.raises(OptionError, match=r"is for images"):
        bound.with_augment("crop:1")
    assert str(dataset().bind(model(x=(3, 8, 8))).with_augment(Augment(flip=True)).augment) == "flip"


def test_digest_follows_every_part() -> None:
    base = dataset().digest
    assert base == dataset().digest
    others = [
        dataset(images_source(n=61)),
        dataset(seed=2),
        dataset(preprocess=Preprocess(scale=0.5)),
        dataset(augment="flip"),
        Dataset(images_source(), Preprocess(), make_splits(images_source(), seed=1), labels="none"),
    ]
    assert len({base, *(other.digest for other in others)}) == 6
    assert dataset().bind(model(x=(3, 8, 8))).digest == base


def test_bad_batch_size_and_split() -> None:
    bound = dataset().bind(model(x=(3, 8, 8)))
    with pytest.raises(OptionError, match=r"batch size: expected at least 1"):
        bound.batches("select", 0)
    with pytest.raises(OptionError, match=r"no split is called 'selekt': did you mean 'select'"):
        bound.batches("selekt", 4)


def test_leaving_early_ends_the_thread() -> None:
    bound = dataset().bind(model(x=(3, 8, 8)))
    stream = bound.batches("head_train", 2)
    next(iter(stream))
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("eexform-data")]


def test_memory_does_not_grow_with_the_data() -> None:
    class Endless(ArraySource):
        def fetch(self, part, indices):
            samples = super().fetch(part, indices)
            return type(samples)({None: np.zeros((len(indices), 64, 64, 3), np.uint8)})

    def peak(n: int) -> int:
        source = Endless("toy", {"all": ({None: np.zeros((n, 1))}, np.arange(n) % 3)}, layout="nhwc")
        bound = dataset(source).bind(model(x=(3, 64, 64)))
        tracemalloc.start()
        for _ in bound.batches("head_train", 32):
            pass
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    assert peak(4000) < 1.3 * peak(400)


def test_images_are_decoded_once_within_the_memory_budget(tmp_path, monkeypatch) -> None:
    for i in range(20):
        write_image(tmp_path / f"class{i % 2}" / f"{i}.png", i, (8, 8 + i % 3))
    cached = open_dataset(str(tmp_path), preprocess=Preprocess(resize=(8, 8))).bind(model(2, x=(3, 8, 8)))
    first = [batch.feeds["x"] for batch in cached.batches("head_train", 4)]
    plain = Dataset(cached.source, cached.preprocess, cached.splits).bind(model(2, x=(3, 8, 8)))
    for left, batch in zip(first, plain.batches("head_train", 4), strict=True):
        np.testing.assert_array_equal(left, batch.feeds["x"])
    monkeypatch.setattr("eexform.data.images.decode", lambda *a: pytest.fail("decoded twice"))
    for left, batch in zip(first, cached.batches("head_train", 4), strict=True):
        np.testing.assert_array_equal(left, batch.feeds["x"])


def test_describe_is_json() -> None:
    import json

    plain = json.loads(json.dumps(dataset().describe()))
    assert plain["splits"]["select"] == {"part": "all", "samples": 9}
    assert plain["augment"] == "none"
