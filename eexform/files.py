"""Files that are either whole or absent: write beside the target, flush, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from eexform.errors import RunError, StorageError


@contextmanager
def writing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the target's folder; rename it to ``path`` when the block ends without an error.

    Raises:
        StorageError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise storage_error(target, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def writing_folder(path: str | Path) -> Iterator[Path]:
    """Like :func:`writing`, for a folder: filled under a temporary name, then swapped in whole."""
    target = Path(path)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        if target.is_dir():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            try:
                os.replace(target, old / target.name)
                try:
                    os.replace(temporary, target)
                except OSError:
                    os.replace(old / target.name, target)
                    raise
            finally:
                if target.is_dir():  # else the old content is nowhere but there
                    shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, target)
        temporary = None
    except StorageError as error:  # of a file inside: the name that matters is the one it was to get
        raise StorageError(str(error).replace(str(temporary), str(target))) from error
    except OSError as error:
        raise storage_error(target, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all."""
    with writing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON (NaN and infinity refused: they are not JSON)."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read JSON.

    Raises:
        RunError: the file is missing or is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path}: no such file") from error
    except (ValueError, OSError, RecursionError) as error:
        raise RunError(f"{path}: cannot be read as JSON ({error}); it may be damaged") from error


def file_sha256(path: str | Path) -> str:
    """Full sha-256 of a file's bytes, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def storage_error(target: Path, error: OSError) -> StorageError:
    """A :class:`StorageError` that names the file and what the system said."""
    reason = error.strerror or str(error)
    free = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with suppress(OSError):
            free = f" ({shutil.disk_usage(target.parent).free / 2**20:.0f} MiB free)"
    return StorageError(f"{target}: cannot be written: {reason}{free}; nothing was changed there")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
