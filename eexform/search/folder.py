"""A run's folder: what lies where, who may write, and which version wrote it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from eexform import files
from eexform._version import __version__
from eexform.errors import RunError

FORMAT = 1
"""Raised whenever an older eexform could not read the folder any more."""

NEEDED = ("state", "trunk_digest", "data_digest", "train_digest", "scores")
"""What every run's facts hold from the beginning."""

_WRITTEN = tuple(
    f".{name}."
    for name in (
        *("run.json", "front.json", "journal.jsonl", "trunks.jsonl", "data.json", "splits.npz"),
        *("trunk.onnx", "trunk.onnx.data", "original.onnx", "original.onnx.data"),
    )
)
"""How half-written files begin that a run writes right into its folder."""


class RunFolder:
    """Paths of a run, and the rules for opening it.

    ``run.json`` (settings and state), ``trunk.onnx``, ``data.json`` and ``splits.npz`` (which samples went where),
    ``bank/`` (trained heads and their scores), ``latencies/`` (path costs that were measured), ``journal.jsonl`` (one
    line per generation), ``front.json``. A run that searched trunks, too, has ``trunks.jsonl`` (what was tried, trained
    and spent), ``trunks/`` (stored parameters of those that got exits), and a journal for each of them in ``journals/``
    instead of the one. A run that came out of fine-tuning also has ``original.onnx`` (the model that
    its plans are compared with) and ``finetune/`` (checkpoint, history and the trained heads).
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    run = property(lambda self: self.path / "run.json")
    trunk = property(lambda self: self.path / "trunk.onnx")
    bank = property(lambda self: self.path / "bank")
    journal = property(lambda self: self.path / "journal.jsonl")
    front = property(lambda self: self.path / "front.json")
    latencies = property(lambda self: self.path / "latencies")
    original = property(lambda self: self.path / "original.onnx")
    trunks = property(lambda self: self.path / "trunks")
    trunk_log = property(lambda self: self.path / "trunks.jsonl")
    journals = property(lambda self: self.path / "journals")
    finetune = property(lambda self: self.path / "finetune")
    tuned_heads = property(lambda self: self.path / "finetune" / "heads.safetensors")

    def journal_of(self, trunk_digest: str) -> Path:
        """The journal of the search for exits of one trunk among several."""
        return Path(self.journals) / f"{trunk_digest[:32]}.jsonl"

    def forget_search(self) -> bool:
        """Delete the journals, so that a search begins anew; returns whether there was one."""
        found = [path for path in (self.journal, *self.journals.glob("*.jsonl")) if path.exists()]
        for path in found:
            path.unlink()
        return bool(found)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for writing.

        Raises:
            RunError: another process holds it.
            StorageError: the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RunError(
                f"{self.path}: another process is working in this run; wait for it or use another --out"
            ) from error
        except OSError as error:
            raise files.storage_error(self.path / ".lock", error) from error
        try:
            self._sweep()
            yield
        finally:
            lock.release()

    def _sweep(self) -> None:
        """Delete what a process that was killed has left half written; the folder is held, so no other run writes.

        Only what runs write themselves: anything else may be half-written by somebody who is still at it, such as an
        export into this folder. The cache is left alone as well: processes that only look at a run may be filling it.
        """
        folders = (self.bank, self.latencies, self.trunks, self.journals, self.finetune)
        own = [path for folder in folders if not folder.is_symlink() for path in folder.rglob(".*.part")]
        own += [path for path in self.path.glob(".*.part") if path.name.startswith(_WRITTEN)]
        for path in own:
            with suppress(OSError):  # what cannot be deleted is in nobody's way
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    @property
    def exists(self) -> bool:
        return self.run.exists()

    def read(self) -> dict[str, Any]:
        """``run.json``.

        Raises:
            RunError: no run is here, it is damaged, or a newer version wrote it.
        """
        if not self.run.exists():
            raise RunError(f"{self.path}: holds no run (no run.json); make one with `eexform search`")
        plain = files.read_json(self.run)
        if not isinstance(plain, dict) or not isinstance(plain.get("format"), int):
            raise RunError(f"{self.run}: is not a description of a run; it may be damaged")
        if plain["format"] > FORMAT:
            raise RunError(
                f"{self.path}: was written by eexform {plain.get('eexform', '?')} (format {plain['format']}); this is "
                f"{__version__}, which reads up to format {FORMAT}: upgrade eexform"
            )
        absent = [key for key in NEEDED if key not in plain]
        if absent:
            raise RunError(f"{self.run}: lacks {', '.join(absent)}; it may be damaged")
        return plain

    def write(self, facts: Mapping[str, Any]) -> None:
        """Write ``run.json`` whole."""
        files.write_json(self.run, {"format": FORMAT, "eexform": __version__, **facts})

    def fresh(self) -> None:
        """Check that a new run may be laid down here.

        Raises:
            RunError: there is a run already, or the folder holds other things.
        """
        if self.exists:
            diverged = False
            with suppress(RunError):  # a damaged one is a run as well
                diverged = bool(self.read().get("diverged"))
            if diverged:
                raise RunError(f"{self.path}: holds a run whose training diverged; delete it, or choose another --out")
            raise RunError(f"{self.path}: holds a run already; go on with --resume, or choose another --out")
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: is a file, and a run is a folder; choose another --out")
        if self.path.is_dir() and any(not _passing(entry.name) for entry in os.scandir(self.path)):
            raise RunError(f"{self.path}: is not empty and holds no run; choose another --out")


def _passing(name: str) -> bool:
    """Whether a file is none of the run's: the lock, or what is being written and gets its name when it is whole."""
    return name == ".lock" or (name.startswith(".") and name.endswith(".part"))
