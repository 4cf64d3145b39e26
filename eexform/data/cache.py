"""Decoded pixels, kept so that no image is decoded twice.

Decoding 50,000 small images takes longer than a training epoch over them. What is kept is the image after geometry
(colour, resize, crop), in its raw type. With a folder, pixels go to a memory-mapped file there, keyed by content and
geometry, and serve later runs too; without one they stay in memory up to a stated budget; beyond the budgets nothing is
kept and every fetch decodes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

from eexform.data.preprocess import Preprocess
from eexform.data.source import DataSource, Samples, dims
from eexform.errors import DataError
from eexform.files import writing

MEMORY_BYTES = 256 << 20
DISK_BYTES = 32 << 30


class PixelCache:
    """Geometry-processed samples of a costly source.

    Args:
        source: what to fetch from.
        preprocess: its geometry is applied before samples are kept.
        folder: where to keep them on disk; ``None``: in memory.
        memory_bytes: per part, the most that is kept in memory.
        disk_bytes: per part, the most that is kept on disk (reserved in full at first use).
    """

    def __init__(
        self,
        source: DataSource,
        preprocess: Preprocess,
        *,
        folder: str | Path | None = None,
        memory_bytes: int = MEMORY_BYTES,
        disk_bytes: int = DISK_BYTES,
    ) -> None:
        self._source = source
        self._preprocess = preprocess
        self._layout = preprocess.layout or source.layout
        self._folder = None if folder is None else Path(folder)
        self._limit = memory_bytes if folder is None else disk_bytes
        self._stores: dict[str, _Store | None] = {}

    def serves(self, source: DataSource, preprocess: Preprocess) -> bool:
        """Whether samples kept here are those of ``source`` after the geometry of ``preprocess``."""
        return source is self._source and _geometry(preprocess) == _geometry(self._preprocess)

    def fetch(self, part: str, indices: np.ndarray) -> Samples:
        """Like :meth:`DataSource.fetch`, after geometry."""
        if part not in self._stores:
            self._stores[part] = self._open(part)
        store = self._stores[part]
        if store is None:
            return self._decode(part, indices)
        missing = np.unique(indices[store.done[indices] == 0])
        if len(missing):
            fresh = np.asarray(self._decode(part, missing).inputs[store.key])
            if fresh.shape[1:] != store.pixels.shape[1:] or fresh.dtype != store.pixels.dtype:
                raise DataError(self._uneven(part, missing, fresh, store.pixels))
            store.pixels[missing] = fresh
            store.done[missing] = 1
        return Samples({store.key: store.pixels[indices]})

    def _uneven(self, part: str, indices: np.ndarray, found: np.ndarray, kept: np.ndarray) -> str:
        which = f"samples {indices[0]}..{indices[-1]} are" if len(indices) > 1 else f"sample {indices[0]} is"
        advice = "say --resize HEIGHTxWIDTH" if found.shape[1:3] != kept.shape[1:3] else "say --colour rgb or grey"
        if found.shape[1:] == kept.shape[1:]:
            advice = "convert them first"
        return (
            f"{self._source.name}, part {part!r}: images differ: {which} {dims(found.shape[1:])} {found.dtype}, "
            f"sample 0 is {dims(kept.shape[1:])} {kept.dtype}: {advice}"
        )

    def _decode(self, part: str, indices: np.ndarray) -> Samples:
        raw = self._source.fetch(part, indices)
        name = f"{self._source.name}, part {part!r}"
        return Samples(
            {key: self._preprocess.geometry(value, self._layout, name) for key, value in raw.inputs.items()}, raw.labels
        )

    def _open(self, part: str) -> _Store | None:
        first = self._decode(part, np.zeros(1, dtype=np.int64))
        if len(first.inputs) != 1:
            return None
        key, sample = next(iter(first.inputs.items()))
        if not isinstance(sample, np.ndarray) or sample.ndim != 4:
            return None
        shape = (self._source.parts[part], *sample.shape[1:])
        if int(np.prod(shape)) * sample.dtype.itemsize > self._limit:
            return None
        if self._folder is None:
            return _Store(key, np.empty(shape, sample.dtype), np.zeros(shape[0], np.uint8))
        plain = f"{self._source.digest}|{part}|{shape}|{sample.dtype.str}|{_geometry(self._preprocess)}"
        stem = f"{re.sub(r'[^A-Za-z0-9_-]', '_', part)}-{hashlib.sha256(plain.encode()).hexdigest()[:24]}"
        return _Store(key, *_mapped(self._folder / f"{stem}.npy", shape, sample.dtype))


class _Store:
    """Pixels ``[samples, H, W, C]`` of one part, and which of them are there (uint8 ``[samples]``)."""

    def __init__(self, key: str | None, pixels: np.ndarray, done: np.ndarray) -> None:
        self.key = key
        self.pixels = pixels
        self.done = done


def _geometry(preprocess: Preprocess) -> str:
    plain = preprocess.to_json()
    return json.dumps([plain[name] for name in ("layout", "resize", "crop", "colour")])


def _mapped(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and flags as two views of one file, so that neither can be there without the other."""
    flags = -(-shape[0] // 64) * 64
    size = flags + int(np.prod(shape)) * dtype.itemsize
    if not _whole(path, size):
        # Space is reserved here, where a full disk is an error; writing through a map to a full disk kills the process.
        with writing(path) as temporary:
            np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(size,)).flush()
            with open(temporary, "r+b") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    content = np.lib.format.open_memmap(path, mode="r+")
    return content[flags:].view(dtype).reshape(shape), content[: shape[0]]


def _whole(path: Path, size: int) -> bool:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return False
    return found.shape == (size,) and found.dtype == np.uint8
