import numpy as np
import pytest

from eexform.data import open_source
from eexform.errors import DataError, OptionError
from tests.data.helpers import write_image


def test_one_folder_per_class(tmp_path) -> None:
    expected = write_image(tmp_path / "dog" / "b.png", 1)
    write_image(tmp_path / "cat" / "a.png", 2)
    write_image(tmp_path / "dog" / "deeper" / "c.PNG", 3)
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden").mkdir()
    source = open_source(str(tmp_path))
    assert source.classes == ("cat", "dog")
    assert source.parts == {"all": 3}
    assert source.labels("all").tolist() == [0, 1, 1]
    samples = source.fetch("all", np.array([1]))
    np.testing.assert_array_equal(samples.inputs[None][0], expected)
    assert samples.labels.tolist() == [1]


def test_parts_are_the_top_level(tmp_path) -> None:
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            write_image(tmp_path / part / label / "1.png", 1)
    assert open_source(str(tmp_path)).parts == {"test": 2, "train": 2}
    write_image(tmp_path / "test" / "cow" / "1.png", 1)
    with pytest.raises(DataError, match=r"different classes: 'cow'"):
        open_source(str(tmp_path))


def test_digest_follows_content_and_names(tmp_path) -> None:
    write_image(tmp_path / "cat" / "a.png", 1)
    write_image(tmp_path / "dog" / "a.png", 2)
    before = open_source(str(tmp_path)).digest
    assert before == open_source(str(tmp_path)).digest
    write_image(tmp_path / "dog" / "a.png", 3)
    assert before != open_source(str(tmp_path)).digest


def test_images_of_different_sizes_come_as_a_list(tmp_path) -> None:
    write_image(tmp_path / "cat" / "a.png", 1, (6, 5))
    write_image(tmp_path / "dog" / "a.png", 2, (7, 5))
    raw = open_source(str(tmp_path)).fetch("all", np.array([0, 1])).inputs[None]
    assert [image.shape for image in raw] == [(6, 5, 3), (7, 5, 3)]


def test_corrupt_image_is_named(tmp_path) -> None:
    write_image(tmp_path / "cat" / "a.png", 1, (40, 40))
    write_image(tmp_path / "dog" / "bad.png", 1, (40, 40))
    content = (tmp_path / "dog" / "bad.png").read_bytes()
    (tmp_path / "dog" / "bad.png").write_bytes(content[: len(content) // 2])
    source = open_source(str(tmp_path))
    with pytest.raises(DataError, match=r"bad\.png: not an image that can be read, or damaged"):
        source.fetch("all", np.array([1]))


def test_unusable_folders(tmp_path) -> None:
    with pytest.raises(DataError, match=r"one sub-folder of images per class, found no sub-folder"):
        open_source(str(tmp_path))
    write_image(tmp_path / "cat" / "a.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match=r"dog: no images there"):
        open_source(str(tmp_path))
    with pytest.raises(DataError, match=r"no such folder"):
        open_source(f"folder:{tmp_path / 'missing'}")
    with pytest.raises(OptionError, match=r"--label-key"):
        open_source(str(tmp_path), label_key="y")


def test_grey_and_alpha_keep_their_channels(tmp_path) -> None:
    write_image(tmp_path / "a" / "1.png", mode="L")
    write_image(tmp_path / "b" / "1.png", mode="RGBA")
    source = open_source(str(tmp_path))
    assert source.fetch("all", np.array([0])).inputs[None].shape == (1, 6, 5, 1)
    assert source.fetch("all", np.array([1])).inputs[None].shape == (1, 6, 5, 4)
