"""Files are whole or absent."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from eexform import files
from eexform.errors import RunError, StorageError


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    files.write_json(target, {"x": 1})

    def fail() -> None:
        with files.writing(target) as temporary:
            temporary.write_text("half")
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()
    assert files.read_json(target) == {"x": 1}
    assert listing(tmp_path) == ["a.json"]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    with pytest.raises(StorageError, match=r"a\.bin: cannot be written: No space left"), files.writing(target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert listing(tmp_path) == []


def test_a_real_write_failure_leaves_nothing(tmp_path: Path) -> None:
    """The kernel refuses to let the file grow: the same path through the code as a disk that fills up."""
    script = (
        "import signal, sys\n"
        "from eexform import files\n"
        "from eexform.errors import StorageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "try:\n    files.write_bytes(sys.argv[1], b'x' * 100_000)\n"
        "except StorageError as error:\n    print(error); sys.exit(2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "big.bin")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "big.bin: cannot be written" in done.stdout
    assert listing(tmp_path) == []


def test_folders_are_swapped_whole(tmp_path: Path) -> None:
    target = tmp_path / "stages"
    for content in ("one", "two"):
        with files.writing_folder(target) as temporary:
            (temporary / "part").write_text(content)
    assert (target / "part").read_text() == "two"

    def fail() -> None:
        with files.writing_folder(target) as temporary:
            (temporary / "part").write_text("three")
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()
    assert (target / "part").read_text() == "two"
    assert listing(tmp_path) == ["stages"]


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such file"):
        files.read_json(tmp_path / "absent.json")
    (tmp_path / "cut.json").write_text('{"a": ')
    with pytest.raises(RunError, match="may be damaged"):
        files.read_json(tmp_path / "cut.json")
    with pytest.raises(ValueError, match="Out of range"):
        files.write_json(tmp_path / "nan.json", float("nan"))
    assert listing(tmp_path) == ["cut.json"]


def test_a_folder_that_cannot_be_swapped_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "stages"
    target.mkdir()
    (target / "old").write_text("kept")
    real = os.replace

    def replace(source: Path, to: Path) -> None:
        if Path(source).suffix == ".part":
            raise OSError(errno.EIO, "Input/output error")
        real(source, to)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(StorageError, match="nothing was changed"), files.writing_folder(target) as temporary:
        (temporary / "new").write_text("lost")
    assert [path.name for path in tmp_path.iterdir()] == ["stages"]
    assert (target / "old").read_text() == "kept"
