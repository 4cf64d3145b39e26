import os

import numpy as np
import pytest

from eexform.data import ArraySource, Preprocess, Samples, open_source
from eexform.data.cache import PixelCache
from eexform.errors import DataError, StorageError
from tests.data.helpers import write_image


@pytest.fixture
def source(tmp_path):
    for i in range(10):
        write_image(tmp_path / "images" / f"class{i % 2}" / f"{i}.png", i, (8, 8))
    return open_source(str(tmp_path / "images"))


def fetched(cache: PixelCache, *indices: int) -> np.ndarray:
    return np.asarray(cache.fetch("all", np.array(indices)).inputs[None])


@pytest.mark.parametrize("on_disk", [False, True])
def test_the_same_pixels_in_any_order_and_twice(source, tmp_path, on_disk) -> None:
    cache = PixelCache(source, Preprocess(), folder=tmp_path / "cache" if on_disk else None)
    direct = np.asarray(source.fetch("all", np.arange(10)).inputs[None])
    for order in ((3, 1, 3), (0, 9, 1), tuple(range(10))):
        np.testing.assert_array_equal(fetched(cache, *order), direct[list(order)])


def test_beyond_the_budget_nothing_is_kept(source, monkeypatch) -> None:
    cache = PixelCache(source, Preprocess(), memory_bytes=100)
    fetched(cache, 1)
    monkeypatch.setattr("eexform.data.images.decode", lambda *a: np.zeros((8, 8, 3), np.uint8))
    assert fetched(cache, 1).sum() == 0


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (np.full((1, 1, 3), 99, np.uint8), r"sample 9 is 1x1x3 uint8, sample 0 is 8x8x3 uint8: say --resize"),
        (np.full((8, 8, 1), 99, np.uint8), r"sample 9 is 8x8x1 uint8, sample 0 is 8x8x3 uint8: say --colour"),
        (np.full((8, 8, 3), 999, np.uint16), r"sample 9 is 8x8x3 uint16, .* convert them"),
    ],
)
def test_an_odd_image_alone_in_its_batch_is_not_stretched(source, monkeypatch, odd, words) -> None:
    whole = source.fetch("all", np.arange(10)).inputs[None]
    mixed = ArraySource("mixed", {"all": ({None: whole}, None)}, layout="nhwc")
    cache = PixelCache(mixed, Preprocess())
    fetched(cache, 0, 1)
    monkeypatch.setattr(mixed, "fetch", lambda part, indices: Samples({None: odd[None]}))
    with pytest.raises(DataError, match=words):
        fetched(cache, 9)


def test_geometry_and_content_are_part_of_the_key(source, tmp_path) -> None:
    folder = tmp_path / "cache"
    fetched(PixelCache(source, Preprocess(), folder=folder), 0)
    assert fetched(PixelCache(source, Preprocess(resize=(4, 4)), folder=folder), 0).shape == (1, 4, 4, 3)
    assert len(list(folder.glob("*.npy"))) == 2
    cache = PixelCache(source, Preprocess(), folder=folder)
    assert cache.serves(source, Preprocess(scale=2.0))
    assert not cache.serves(source, Preprocess(resize=(4, 4)))


def test_a_damaged_file_is_made_anew(source, tmp_path) -> None:
    folder = tmp_path / "cache"
    fetched(PixelCache(source, Preprocess(), folder=folder), 0, 1)
    next(folder.glob("*.npy")).write_bytes(b"rubbish")
    direct = np.asarray(source.fetch("all", np.arange(2)).inputs[None])
    np.testing.assert_array_equal(fetched(PixelCache(source, Preprocess(), folder=folder), 0, 1), direct)


def test_a_full_disk_is_an_error_not_a_crash(source, tmp_path, monkeypatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match=r"No space left on device"):
        fetched(PixelCache(source, Preprocess(), folder=tmp_path / "cache"), 0)
    assert list((tmp_path / "cache").iterdir()) == []
