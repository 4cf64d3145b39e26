"""A folder of images with one sub-folder per class: ``data/cat/1.png``, ``data/dog/2.png``.

Class names are sorted as text and numbered from 0. Where every top-level folder is called ``train``, ``test``, ``val``,
``valid`` or ``validation``, these are the parts and the classes are one level down. Images are decoded when fetched.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np

from eexform.data import images
from eexform.data.source import Layout, Samples, SourceOptions
from eexform.errors import DataError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
_PARTS = {"train", "test", "val", "valid", "validation"}


class FolderSource:
    """Images by class; raw samples are ``[H, W, C]``, uint8 unless the files are deeper."""

    costly = True
    layout: Layout | None = "nhwc"

    def __init__(self, root: Path) -> None:
        self.name = str(root)
        self._root = root
        folders = _folders(root)
        named = {folder.name for folder in folders}
        roots = {folder.name: folder for folder in folders} if named and named <= _PARTS else {"all": root}
        self._files: dict[str, list[Path]] = {}
        self._labels: dict[str, np.ndarray] = {}
        self.classes: tuple[str, ...] | None = None
        for part, folder in sorted(roots.items()):
            self._read_part(part, folder)
        self.parts = {part: len(files) for part, files in self._files.items()}

    @classmethod
    def takes(cls, text: str) -> bool:
        return Path(text).is_dir()

    @classmethod
    def open(cls, text: str, options: SourceOptions) -> FolderSource:
        """Open the folder ``text``.

        Raises:
            DataError: no such folder, no class folders, a class without images, parts with different classes.
        """
        options.refuse(text, "image_key", "label_key", "inputs")
        root = Path(text)
        if not root.is_dir():
            raise DataError(f"{text}: no such folder")
        return cls(root)

    def _read_part(self, part: str, folder: Path) -> None:
        class_folders = _folders(folder)
        if not class_folders:
            raise DataError(f"{folder}: expected one sub-folder of images per class, found no sub-folder")
        names = tuple(sorted(entry.name for entry in class_folders))
        if self.classes is not None and names != self.classes:
            odd = sorted(set(names) ^ set(self.classes))
            raise DataError(f"{self.name}: the parts have different classes: {odd[0]!r} is in one of them only")
        self.classes = names
        files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(names):
            found = sorted(
                path
                for path in (folder / name).rglob("*")
                if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()
            )
            if not found:
                raise DataError(f"{folder / name}: no images there (looked for {' '.join(EXTENSIONS)})")
            files += found
            labels += [label] * len(found)
        self._files[part] = files
        self._labels[part] = np.array(labels, dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """sha-256 of names, sizes and contents, read as a stream."""
        hasher = hashlib.sha256(b"eexform folder 1\n")
        for part in sorted(self._files):
            for path in self._files[part]:
                try:
                    size = path.stat().st_size
                    hasher.update(f"{part}|{path.relative_to(self._root).as_posix()}|{size}|".encode())
                    with open(path, "rb") as file:
                        while block := file.read(1 << 20):
                            hasher.update(block)
                except OSError as error:
                    raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
        return hasher.hexdigest()

    def labels(self, part: str) -> np.ndarray | None:
        return self._labels[part]

    def fetch(self, part: str, indices: np.ndarray) -> Samples:
        files = self._files[part]
        decoded = [images.decode(files[index], str(files[index])) for index in indices.tolist()]
        return Samples({None: images.stack(decoded)}, self._labels[part][indices])


def _folders(root: Path) -> list[Path]:
    try:
        return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))
    except OSError as error:
        raise DataError(f"{root}: cannot be read: {error.strerror or error}") from error
