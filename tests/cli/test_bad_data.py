"""Data that cannot be used: one message that says what, where and what to do; exit code 2; nothing half-written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.support import SEARCH, fine, listing, refused

QUICK = SEARCH[4:]  # without --data and --fractions


def save(path: Path, count: int = 120, shape: tuple[int, ...] = (1, 8, 8), **arrays: Any) -> Path:
    """Random digits; ``arrays`` replaces what is there."""
    rng = np.random.default_rng(0)
    arrays.setdefault("x", rng.uniform(0, 16, (count, *shape)).astype(np.float32))
    arrays.setdefault("y", np.arange(count) % 10)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def check(model: Path, folder: Path, data: object, *more: object, says: list[str]) -> None:
    """``search`` refuses ``data`` and leaves no folder behind."""
    before = listing(folder)
    refused("search", model, "--data", data, *QUICK, *more, "--out", folder / "run", says=says)
    assert listing(folder) == before


def test_more_classes_than_the_model_has(model: Path, tmp_path: Path) -> None:
    data = save(tmp_path / "d.npz", y=np.arange(120) % 12)
    check(model, tmp_path, data, says=["d.npz", "sample 11", "label 11", "10 classes"])


def test_images_of_the_wrong_size(model: Path, tmp_path: Path) -> None:
    data = save(tmp_path / "d.npz", shape=(1, 9, 9))
    check(model, tmp_path, data, says=["1x9x9", "1x8x8", "--resize"])
    check(model, tmp_path, save(tmp_path / "e.npz", shape=(8, 8, 1)), says=["8x8x1", "1x8x8", "--layout nhwc"])
    check(model, tmp_path, save(tmp_path / "f.npz", shape=(3, 8, 8)), says=["3x8x8", "1x8x8"])


def test_empty_and_one_class_splits(model: Path, tmp_path: Path) -> None:
    check(model, tmp_path, save(tmp_path / "few.npz", 3), says=["split", "is empty", "--fractions"])
    check(model, tmp_path, save(tmp_path / "none.npz", 0), says=["none.npz", "is empty"])
    one = save(tmp_path / "one.npz", y=np.full(120, 4))
    check(model, tmp_path, one, says=["split 'head_train'", "of one class (4)"])


def test_data_that_are_no_numbers(model: Path, tmp_path: Path) -> None:
    """Found when the samples are first read; the run says so and can be read."""
    x = np.random.default_rng(0).uniform(0, 16, (120, 1, 8, 8)).astype(np.float32)
    x[50, 0, 3, 3] = np.nan
    data = save(tmp_path / "nan.npz", x=x)
    refused(
        "search", model, "--data", data, *QUICK, "--out", tmp_path / "run",
        says=["nan.npz", "sample 50", "NaN or infinity"],
    )  # fmt: skip
    if (tmp_path / "run").exists():
        refused("pareto", tmp_path / "run", says=["no front", "failed"])


def test_files_of_another_kind(model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("not an archive")
    check(model, tmp_path, tmp_path / "text.npz", says=["text.npz", "archive"])
    check(model, tmp_path, tmp_path / "absent.npz", says=["absent.npz", "no such file"])
    check(model, tmp_path, "nonsense", says=["nonsense", "not a data source", "no file or folder"])
    check(model, tmp_path, "no_module:factory", says=["no_module", "cannot be imported"])
    whole = save(tmp_path / "whole.npz")
    (tmp_path / "cut.npz").write_bytes(whole.read_bytes()[:9000])
    check(model, tmp_path, tmp_path / "cut.npz", says=["cut.npz"])
    objects = np.empty(120, object)
    objects[:] = ["a"] * 120
    check(model, tmp_path, save(tmp_path / "pickled.npz", y=objects), says=["pickled.npz", "pickle"])
    (tmp_path / "images").mkdir()
    check(model, tmp_path, tmp_path / "images", says=["images", "folder"])


def test_labels(model: Path, tmp_path: Path) -> None:
    unlabelled = save(tmp_path / "u.npz", y=None)
    check(model, tmp_path, unlabelled, says=["u.npz", "--label-key", "--labels none"])
    check(model, tmp_path, unlabelled, "--label-key", "z", says=["no array 'z'"])
    check(model, tmp_path, save(tmp_path / "neg.npz", y=np.arange(120) % 10 - 1), says=["neg.npz", "-1"])
    check(
        model,
        tmp_path,
        save(tmp_path / "half.npz", y=np.arange(120) / 2),
        says=["half.npz", "whole numbers", "float64"],
    )
    check(model, tmp_path, save(tmp_path / "short.npz", y=np.arange(119) % 10), says=["short.npz", "119", "120"])
    fine(
        "search",
        model,
        "--data",
        unlabelled,
        *QUICK,
        "--labels",
        "none",
        "--generations",
        "0",
        "--out",
        tmp_path / "run",
    )
    assert "agreement" in fine("pareto", tmp_path / "run").out


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        f"x_{part}": rng.uniform(0, 16, (60, 1, 8, 8)).astype(np.float32) for part in ("train", "val", "test")
    }
    arrays |= {f"y_{part}": np.arange(60) % 10 for part in ("train", "val", "test")}
    np.savez(tmp_path / "parts.npz", **arrays)
    return tmp_path / "parts.npz"


def test_parts(model: Path, tmp_path: Path, parts: Path) -> None:
    check(model, tmp_path, parts, says=["train (60)", "--select-from", "NOT trained"])
    check(model, tmp_path, parts, "--select-from", "tset", says=["--select-from", "'tset'", "'test'"])
    check(model, tmp_path, parts, "--select-from", "val", says=["--train-from"])


def test_checking_needs_one_part_only(model: Path, exported: Path, parts: Path) -> None:
    data = ("--data", parts, "--select-from", "test", "--samples", "8")
    assert fine("verify", exported, "--against", model, *data, "--json").json["ok"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--fractions", "0.5,0.6,0.1,0.1"), ["fractions", "add up to 1.3"]),
        (("--fractions", "half"), ["--fractions", "'half'", "0.1,0.4,0.5"]),
        (("--fractions", "0.5,0.5"), ["fractions", "expected 4 numbers", "found 2"]),
        (("--labels", "some"), ["--labels", "'some'", "given", "none"]),
        (("--scale", "a/b"), ["scale", "1/255", "'a/b'"]),
        (("--layout", "hwc"), ["layout", "'nhwc' or 'nchw'", "'hwc'"]),
        (("--preset", "imagnet"), ["preset", "did you mean 'imagenet'"]),
        (("--preset", "imagenet", "--mean", "0.5"), ["imagenet", "--mean"]),
        (("--resize", "32by32"), ["resize", "HEIGHTxWIDTH", "'32by32'"]),
        (("--augment", "flipp"), ["flipp", "flip"]),
        (("--image-key", "img"), ["digits", "--image-key"]),
    ],
)
def test_options_about_data(options: tuple[str, ...], says: list[str], model: Path, tmp_path: Path) -> None:
    check(model, tmp_path, "digits", *options, says=says)
