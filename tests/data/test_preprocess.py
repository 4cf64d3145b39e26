import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eexform.data import Preprocess
from eexform.errors import DataError, OptionError

RAW = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)


def test_nothing_is_done_unless_said() -> None:
    raw = np.arange(12, dtype=np.float32).reshape(2, 6)
    np.testing.assert_array_equal(Preprocess().values(raw, None, "toy"), raw)
    assert Preprocess().geometry(raw, None, "toy") is raw


def test_scale_mean_std_and_layout_in_that_order() -> None:
    steps = Preprocess.parse(preset="imagenet")
    made = steps.values(RAW, "nhwc", "toy")
    expected = (RAW / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(made, expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-5)
    assert made.dtype == np.float32
    assert made.flags.c_contiguous
    last = Preprocess.parse(preset="imagenet", model_layout="nhwc").values(RAW, "nhwc", "toy")
    np.testing.assert_array_equal(last, made.transpose(0, 2, 3, 1))
    back = Preprocess.parse(preset="imagenet", model_layout="nhwc").values(RAW.transpose(0, 3, 1, 2), "nchw", "toy")
    np.testing.assert_array_equal(back, last)


def test_the_input_is_not_changed() -> None:
    raw = np.ones((2, 3), dtype=np.float32)
    Preprocess(scale=2.0).values(raw, None, "toy")
    assert raw.sum() == 6


def test_text_forms() -> None:
    steps = Preprocess.parse(
        scale="1/255", mean="0.5", std=".5,.25,1", resize="8x9", crop="4", layout="NHWC", colour="RGB"
    )
    assert steps == Preprocess(
        layout="nhwc", scale=1 / 255, mean=(0.5,), std=(0.5, 0.25, 1.0), resize=(8, 9), crop=(4, 4), colour="rgb"
    )
    assert Preprocess.parse(resize="256").resize == 256
    assert Preprocess.parse(mean="imagenet").mean == (0.485, 0.456, 0.406)


@given(
    st.builds(
        Preprocess,
        layout=st.sampled_from([None, "nhwc", "nchw"]),
        scale=st.floats(0.001, 10),
        mean=st.none() | st.lists(st.floats(-5, 5), min_size=1, max_size=3).map(tuple),
        std=st.none() | st.lists(st.floats(0.01, 5), min_size=1, max_size=3).map(tuple),
        resize=st.none() | st.integers(1, 99) | st.tuples(st.integers(1, 99), st.integers(1, 99)),
        colour=st.sampled_from([None, "rgb", "grey"]),
    )
)
def test_json_there_and_back(steps) -> None:
    again = Preprocess.from_json(json.loads(json.dumps(steps.to_json())))
    assert again == steps
    assert again.digest == steps.digest


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": "1/0"}, "scale: expected a number such as 0.5 or 1/255"),
        ({"scale": "__import__('os')"}, "scale: expected a number"),
        ({"scale": "0"}, "other than 0"),
        ({"scale": "nan"}, "scale: expected a number"),
        ({"mean": "a,b"}, "mean: expected a number"),
        ({"std": "1,0"}, "std: expected numbers above 0"),
        ({"resize": "32xx32"}, "resize: expected HEIGHTxWIDTH"),
        ({"resize": "0x4"}, "resize: expected height and width"),
        ({"crop": "-3"}, "crop: expected height and width"),
        ({"layout": "hwc"}, "layout: expected 'nhwc' or 'nchw', found 'hwc'"),
        ({"colour": "bgr"}, "colour: expected 'rgb' or 'grey', found 'bgr'"),
        ({"preset": "imagnet"}, "preset: 'imagnet' is not known: did you mean 'imagenet'"),
        ({"preset": "imagenet", "scale": "1"}, "already sets scale, mean and std: leave out --scale"),
    ],
)
def test_bad_options(options, words) -> None:
    with pytest.raises(OptionError, match=words):
        Preprocess.parse(**options)


def test_stored_values_of_the_wrong_kind() -> None:
    for plain in ({"mean": {"red": 1}}, {"scale": "large"}, {"std": ["a"]}):
        with pytest.raises(OptionError, match=f"{next(iter(plain))}: expected a number such as"):
            Preprocess.from_json(plain)


def test_unknown_stored_key() -> None:
    with pytest.raises(OptionError, match=r"preprocessing: 'zoom' is not known"):
        Preprocess.from_json({"zoom": 2})


def test_resize_crop_and_colour() -> None:
    steps = Preprocess.parse(resize="12x10", crop="4x6", colour="grey")
    assert steps.geometry(RAW, "nhwc", "toy").shape == (3, 4, 6, 1)
    assert steps.geometry(RAW.transpose(0, 3, 1, 2), "nchw", "toy").shape == (3, 1, 4, 6)
    assert Preprocess.parse(resize="10").geometry(RAW, "nhwc", "toy").shape == (3, 12, 10, 3)
    assert Preprocess.parse(colour="rgb").geometry(RAW[..., :1], "nhwc", "toy").shape == (3, 6, 5, 3)
    grey = Preprocess.parse(colour="grey").geometry(np.full((1, 2, 2, 4), 77, np.uint8), "nhwc", "toy")
    assert (grey == 77).all()


def test_constant_images_stay_constant_when_resized() -> None:
    for dtype in (np.uint8, np.uint16, np.float32):
        resized = Preprocess.parse(resize="9x7").geometry(np.full((1, 4, 4, 2), 50, dtype), "nhwc", "toy")
        assert resized.dtype == dtype
        assert resized.shape == (1, 9, 7, 2)
        assert (resized == 50).all()


def test_images_of_different_sizes() -> None:
    images = [np.zeros((4, 4, 3), np.uint8), np.zeros((5, 4, 3), np.uint8)]
    with pytest.raises(DataError, match=r"toy: images differ in size \(4x4, 5x4\): say --resize"):
        Preprocess().geometry(images, "nhwc", "toy")
    assert Preprocess(resize=(3, 3)).geometry(images, "nhwc", "toy").shape == (2, 3, 3, 3)
    mixed = [images[0], np.zeros((4, 4, 1), np.uint8)]
    with pytest.raises(DataError, match=r"images have 1 and 3 channels: say --colour"):
        Preprocess().geometry(mixed, "nhwc", "toy")
    assert Preprocess(colour="rgb").geometry(mixed, "nhwc", "toy").shape == (2, 4, 4, 3)


def test_geometry_needs_images_of_a_known_layout() -> None:
    with pytest.raises(DataError, match=r"--resize, --crop and --colour are for images; samples are 7"):
        Preprocess(resize=(3, 3)).geometry(np.zeros((2, 7)), None, "toy")
    with pytest.raises(DataError, match=r"the layout must be known: say --layout"):
        Preprocess(resize=(3, 3)).geometry(np.zeros((2, 3, 4, 4)), None, "toy")
    with pytest.raises(DataError, match=r"--crop 9x9: an image is only 6x5"):
        Preprocess(crop=(9, 9)).geometry(RAW, "nhwc", "toy")
    with pytest.raises(DataError, match=r"expected images of 1 to 4 channels, found 7"):
        Preprocess(colour="rgb").geometry(np.zeros((1, 2, 2, 7)), "nhwc", "toy")


def test_numbers_per_channel_must_fit() -> None:
    with pytest.raises(DataError, match=r"--mean has 2 numbers, the images 3 channels"):
        Preprocess(mean=(0.1, 0.2)).values(RAW, "nhwc", "toy")
    with pytest.raises(DataError, match=r"--std has 2 numbers, one per channel, but the channel axis is not known"):
        Preprocess(std=(0.1, 0.2)).values(np.zeros((2, 2)), None, "toy")
