import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eexform.data import Augment
from eexform.data.augment import uniforms
from eexform.errors import OptionError

RAW = np.random.default_rng(0).integers(0, 256, (16, 12, 10, 3), dtype=np.uint8)
EVERYTHING = "flip,crop:3,jitter:0.2,cutout:4"


def apply(text: str, batch: np.ndarray = RAW, layout: str = "nhwc", seed: int = 1, epoch: int = 0, first: int = 0):
    indices = np.arange(first, first + len(batch))
    return Augment.parse(text).apply(batch, layout, seed=seed, epoch=epoch, indices=indices)


def test_text_there_and_back() -> None:
    for text in ("none", "flip", "crop:4", "crop:4:reflect", "flip,crop:2,jitter:0.2,cutout:8,mixup:0.4,cutmix:1"):
        assert str(Augment.parse(text)) == text
    assert Augment.parse(" flip , crop:4 ") == Augment(flip=True, crop=4)
    assert not Augment.parse("none").active
    assert Augment.parse("") == Augment()
    for exact in (Augment(jitter=0.123456789), Augment(mixup=1 / 3, cutmix=100_000.25), Augment(cutout=123_456)):
        assert Augment.parse(str(exact)) == exact


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("flop", "'flop' is not known: did you mean 'flip'"),
        ("crop", "'crop': expected crop:NUMBER"),
        ("flip:3", "'flip:3': expected flip"),
        ("crop:x", "'x' is not a valid number"),
        ("crop:-1", "expected a number above 0"),
        ("crop:4:mirror", "expected crop:NUMBER"),
        ("jitter:2", "jitter: expected at most 1"),
        ("mixup:nan", "expected a number above 0"),
        ("cutmix:inf", "cutmix: expected a number"),
    ],
)
def test_bad_text(text, words) -> None:
    with pytest.raises(OptionError, match=words):
        Augment.parse(text)


def test_reflect_without_crop() -> None:
    with pytest.raises(OptionError, match=r"crop:PIXELS:reflect"):
        Augment(reflect=True)


@settings(max_examples=30, deadline=None)
@given(
    cut=st.integers(1, 15),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 99),
    text=st.sampled_from([EVERYTHING, "flip", "crop:2:reflect"]),
)
def test_a_sample_does_not_depend_on_its_batch(cut, seed, epoch, text) -> None:
    whole = apply(text, seed=seed, epoch=epoch)
    left = apply(text, RAW[:cut], seed=seed, epoch=epoch)
    right = apply(text, RAW[cut:], seed=seed, epoch=epoch, first=cut)
    np.testing.assert_allclose(whole, np.concatenate([left, right]), rtol=1e-6)


def test_seed_and_epoch_matter_and_nothing_else() -> None:
    before = RAW.copy()
    np.testing.assert_array_equal(apply(EVERYTHING), apply(EVERYTHING))
    np.testing.assert_array_equal(RAW, before)
    assert (apply(EVERYTHING) != apply(EVERYTHING, epoch=1)).any()
    assert (apply(EVERYTHING) != apply(EVERYTHING, seed=2)).any()


def test_layouts_agree() -> None:
    first = apply(EVERYTHING, RAW.transpose(0, 3, 1, 2), "nchw")
    np.testing.assert_array_equal(first.transpose(0, 2, 3, 1), apply(EVERYTHING))


def test_flip_mirrors_about_half() -> None:
    flipped = apply("flip")
    mirrored = [(image == raw[:, ::-1]).all() for image, raw in zip(flipped, RAW, strict=True)]
    same = [(image == raw).all() for image, raw in zip(flipped, RAW, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 2 < sum(mirrored) < 14


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_crop_shifts(mode) -> None:
    cropped = apply("crop:3:reflect" if mode == "reflect" else "crop:3")
    wide = np.pad(RAW, ((0, 0), (3, 3), (3, 3), (0, 0)), mode=mode)
    offsets = set()
    for image, large in zip(cropped, wide, strict=True):
        hits = [(y, x) for y in range(7) for x in range(7) if (large[y : y + 12, x : x + 10] == image).all()]
        assert len(hits) == 1
        offsets.add(hits[0])
    assert len(offsets) > 8


def test_reflect_needs_room() -> None:
    with pytest.raises(OptionError, match=r"images larger than 10 pixels, not 12x10"):
        apply("crop:10:reflect")


def test_cutout_blanks_a_square() -> None:
    changed = (apply("cutout:4") != RAW).any(axis=-1)
    assert changed.any(axis=(1, 2)).all()
    assert changed.sum(axis=(1, 2)).max() <= 16


def test_jitter_stays_in_range_and_keeps_grey_grey() -> None:
    out = apply("jitter:0.9")
    assert out.dtype == np.float32
    assert out.min() >= 0
    assert out.max() <= 255
    grey = np.repeat(RAW[..., :1], 3, axis=-1)
    jittered = apply("jitter:0.3", grey)
    np.testing.assert_allclose(jittered, np.repeat(jittered[..., :1], 3, axis=-1), rtol=1e-5, atol=1e-3)
    assert apply("jitter:0.3", RAW[..., :1]).shape == (16, 12, 10, 1)


def mix(text: str, labels: np.ndarray | None = None):
    batch = np.stack([np.full((6, 6, 1), i, np.float32) for i in range(16)])
    mixed, result = Augment.parse(text).mix(batch, labels, "nhwc", seed=0, epoch=0, indices=np.arange(16))
    assert result is not None
    return mixed, *result


def test_mixup_weights_match_the_blend() -> None:
    mixed, other, weight = mix("mixup:0.8", np.arange(16))
    np.testing.assert_allclose(mixed[:, 0, 0, 0], weight * np.arange(16) + (1 - weight) * other, rtol=1e-5, atol=1e-5)
    assert (other != np.arange(16)).any()
    assert weight.dtype == np.float32


def test_cutmix_weights_match_the_area() -> None:
    mixed, other, weight = mix("cutmix:1", np.arange(16))
    for i in range(16):
        assert set(np.unique(mixed[i])) <= {i, other[i]}
        if other[i] != i:
            np.testing.assert_allclose((mixed[i] == i).mean(), weight[i], atol=1e-6)


def test_mixing_without_labels_and_not_at_all() -> None:
    _, other, weight = mix("mixup:0.4,cutmix:1")
    assert other is None
    assert weight.shape == (16,)
    batch, result = Augment.parse("flip").mix(RAW, None, "nhwc", seed=0, epoch=0, indices=np.arange(16))
    assert batch is RAW
    assert result is None


def test_uniform_numbers_are_uniform() -> None:
    numbers = uniforms(7, 3, np.arange(20000), 0)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-square, 19 degrees of freedom, p = 0.0007
    others = uniforms(7, 3, np.arange(20000), 1)
    assert abs(np.corrcoef(numbers, others)[0, 1]) < 0.03
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.03
