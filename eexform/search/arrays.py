"""Stored parameters of a run's trunks: one safetensors file per set, looked up by digest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from eexform import files
from eexform.errors import RunError
from eexform.ir.digest import digest_arrays

_DIGEST = re.compile(r"[0-9a-f]{64}")


class ArrayStore(Mapping[str, Mapping[str, np.ndarray]]):
    """Sets of parameters by their digest (:func:`eexform.ir.digest.digest_arrays`), in a folder.

    What :attr:`eexform.passes.PassContext.arrays` takes. A set is read when it is asked for, checked against its
    digest, and not kept in memory.

    Args:
        folder: where they lie; it is made with the first set that is put in.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __getitem__(self, digest: str) -> Mapping[str, np.ndarray]:
        path = self._path(digest)
        if not _DIGEST.fullmatch(digest) or not path.exists():
            raise KeyError(digest)
        try:
            arrays: dict[str, np.ndarray] = load_file(path)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{path}: cannot be read ({error}); delete it and go on with --resume") from error
        if digest_arrays(arrays) != digest:
            raise RunError(f"{path}: its parameters do not match their digest; delete it and go on with --resume")
        return arrays

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, str) and bool(_DIGEST.fullmatch(digest)) and self._path(digest).exists()

    def __iter__(self) -> Iterator[str]:
        found = sorted(path.stem for path in self.folder.glob("*.safetensors"))
        return iter([name for name in found if _DIGEST.fullmatch(name)])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def put(self, sets: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Write sets that are not there yet, each whole or not at all."""
        for digest, arrays in sets.items():
            if digest not in self:
                plain = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
                files.write_bytes(self._path(digest), save(plain))

    def keep(self, digests: Iterable[str]) -> None:
        """Delete every other set."""
        wanted = set(digests)
        for digest in list(self):
            if digest not in wanted:
                self._path(digest).unlink(missing_ok=True)

    def _path(self, digest: str) -> Path:
        return self.folder / f"{digest}.safetensors"
