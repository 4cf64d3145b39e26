"""What was tried and spent on trunks: one JSON line per trial and per training, in the run's ``trunks.jsonl``.

The search for trunks is the same every time from the same seed, and all that takes time in it is looked up here first.
So a search that goes on repeats its decisions and none of its work. A line that was cut short by a crash is forgotten.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eexform import files
from eexform.errors import RunError

VERSION = 1
_ID = ("kind", "of")


class TrunkLog:
    """Append-only log with a look-up.

    A line has a ``kind`` (``tried``, ``ranked``, ``settled``, ``trained``), ``of`` what (any JSON value), the
    ``seconds`` that it took, the ``epochs`` that it trained (0 but for ``trained``), and what came of it.

    Args:
        path: the file; its folder must exist.
        settings: everything that the outcomes depend on.

    Raises:
        RunError: the file is of another search, damaged, or from a newer version.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._lines: dict[str, dict[str, Any]] = {}
        header = json.loads(_line({"version": VERSION, "settings": dict(settings)}))
        if not self.path.exists():
            files.write_bytes(self.path, _line(header))
            return
        for number, line in enumerate(_read(self.path)):
            if number == 0:
                self._check(line, header)
            else:
                self._lines[_key(line)] = line

    def find(self, kind: str, of: Any) -> dict[str, Any] | None:
        """What was noted about something; ``None`` where nothing was."""
        return self._lines.get(_key({"kind": kind, "of": of}))

    def note(self, kind: str, of: Any, *, seconds: float, epochs: int = 0, **outcome: Any) -> dict[str, Any]:
        """Write down an outcome and see it to the disk.

        Raises:
            StorageError: the disk is full or the file cannot be written.
        """
        data = _line({"kind": kind, "of": of, "seconds": round(seconds, 3), "epochs": epochs, **outcome})
        try:
            with open(self.path, "ab") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise files.storage_error(self.path, error) from error
        line: dict[str, Any] = json.loads(data)
        self._lines[_key(line)] = line
        return line

    def spent(self, kind: str) -> dict[str, Any]:
        """How many lines of a kind there are, and seconds and epochs in all."""
        found = [line for line in self._lines.values() if line["kind"] == kind]
        return {
            "count": len(found),
            "epochs": sum(line["epochs"] for line in found),
            "seconds": round(sum(line["seconds"] for line in found), 2),
        }

    def _check(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        version = found.get("version")
        if not isinstance(version, int) or version > VERSION:
            raise RunError(f"{self.path}: was written by a newer version of eexform, or is no log of trunks")
        if found.get("settings") != wanted["settings"]:
            names = sorted(
                name for name, value in wanted["settings"].items() if (found.get("settings") or {}).get(name) != value
            )
            raise RunError(
                f"{self.path}: was written with other settings ({', '.join(names) or 'fewer'}); resume with the same "
                "options or start a new run"
            )


def _key(line: Mapping[str, Any]) -> str:
    return json.dumps([line[part] for part in _ID], sort_keys=True)


def _line(value: Any) -> bytes:
    return (json.dumps(value, allow_nan=False, separators=(",", ":")) + "\n").encode()


def _read(path: Path) -> list[dict[str, Any]]:
    """The whole lines; a torn last one is cut off."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from error
    pieces, whole = data.split(b"\n")[:-1], 0
    lines: list[dict[str, Any]] = []
    for number, piece in enumerate(pieces):
        try:
            value = json.loads(piece)
            if not isinstance(value, dict) or (number and not all(part in value for part in _ID)):
                raise ValueError("no entry")
        except ValueError as error:
            if number == len(pieces) - 1 and lines:
                break
            raise RunError(f"{path}: line {number + 1} is damaged; start a new run") from error
        lines.append(value)
        whole += len(piece) + 1
    if not lines:
        raise RunError(f"{path}: its first line is missing; start a new run")
    if whole != len(data):
        try:
            os.truncate(path, whole)
        except OSError as error:
            raise files.storage_error(path, error) from error
    return lines
