"""The journal: one JSON line per generation, holding everything that the next one depends on.

Line 0 says what is searched and how; line g + 1 holds generation g *after* it was finished, the state of the random
generator included, so that resuming continues with generation g + 1 and repeats nothing. A line that was cut short by
a crash is forgotten.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eexform import files
from eexform.errors import RunError
from eexform.search.archive import Archive
from eexform.search.genome import Individual
from eexform.search.nsga2 import State
from eexform.search.space import Space

VERSION = 1


class Journal:
    """Append-only log of a search.

    Args:
        path: the file; its folder must exist.
        space: the genes.
        settings: everything that must be the same for a resume (search settings, objective, constraints, identity of
            data and heads), JSON values.
        seed: of the search.
    """

    def __init__(self, path: str | Path, space: Space, settings: Mapping[str, Any], seed: int) -> None:
        self.path = Path(path)
        self._space = space
        self._header = json.loads(
            _line({"version": VERSION, "space": space.describe(), "settings": dict(settings), "seed": seed})
        )

    def begin(self) -> None:
        """Write the first line; an earlier journal at this path is replaced."""
        files.write_bytes(self.path, _line(self._header))

    def append(self, state: State) -> None:
        """Write a finished generation and see it to the disk.

        Raises:
            StorageError: the disk is full or the file cannot be written.
        """
        data = _line(
            {
                "generation": state.generation,
                "population": [self._encode(one) for one in state.population],
                "archive": [self._encode(one) for one in state.added],
                "evaluated": state.evaluated,
                "rng": state.rng.bit_generator.state,
                "seconds": round(state.seconds, 4),
            }
        )
        try:
            with open(self.path, "ab") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise files.storage_error(self.path, error) from error

    def resume(self) -> State | None:
        """The state after the last whole generation; ``None`` where none was finished. A torn last line is cut off.

        Raises:
            RunError: no journal, from a newer version, of another search, or damaged.
        """
        lines, whole = _read(self.path)
        self._check(lines[0])
        archive = Archive()
        for expected, line in enumerate(lines[1:]):
            _need_generation(self.path, line, expected)
            archive.offer([self._decode(plain) for plain in line["archive"]])
        _truncate(self.path, whole)
        if len(lines) == 1:
            return None
        last = lines[-1]
        population = [self._decode(plain) for plain in last["population"]]
        rng = np.random.default_rng()
        try:
            rng.bit_generator.state = last["rng"]
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{self.path}: the random generator's state is damaged ({error})") from error
        added = [self._decode(plain) for plain in last["archive"]]
        return State(last["generation"], population, archive, rng, last["evaluated"], added, last["seconds"])

    def _check(self, header: Mapping[str, Any]) -> None:
        for part in ("space", "settings", "seed"):
            if header.get(part) != self._header[part]:
                difference = _difference(header.get(part), self._header[part])
                raise RunError(
                    f"{self.path}: it was written with another {part} ({difference}); "
                    "resume with the same options or start a new run"
                )

    def _encode(self, one: Individual) -> dict[str, Any]:
        plain: dict[str, Any] = {"genome": self._space.encode(one.genome), "fitness": list(one.fitness.values)}
        if one.fitness.violation:
            plain["violation"] = one.fitness.violation
        return plain

    def _decode(self, plain: Mapping[str, Any]) -> Individual:
        try:
            one = self._space.decode(plain["genome"])
            values = tuple(map(float, plain["fitness"]))
            if len(values) < 2:
                raise ValueError("an error and a cost at least")
            one.fitness.values = values
            one.fitness.violation = float(plain.get("violation", 0.0))
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{self.path}: an individual is damaged ({error!r})") from error
        return one


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """Header and whole generations as plain JSON values, for reports; the file is not changed.

    Raises:
        RunError: missing, damaged, or from a newer version.
    """
    return _read(Path(path))[0]


def _line(value: Any) -> bytes:
    return (json.dumps(value, allow_nan=False, separators=(",", ":")) + "\n").encode()


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines, and how many bytes they take."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise RunError(f"{path}: there is no journal to resume; start the search without resuming") from error
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from error
    lines: list[dict[str, Any]] = []
    whole = 0
    pieces = data.split(b"\n")[:-1]  # what follows the last line end was not written to its end
    for number, piece in enumerate(pieces):
        try:
            value = json.loads(piece)
        except ValueError as error:
            if number == len(pieces) - 1 and lines:
                break
            raise RunError(f"{path}: line {number + 1} is damaged; start a new run") from error
        if not isinstance(value, dict):
            raise RunError(f"{path}: line {number + 1} is not a journal entry; start a new run")
        lines.append(value)
        whole += len(piece) + 1
    if not lines or "version" not in lines[0]:
        raise RunError(f"{path}: no journal (its first line is missing); start a new run")
    version = lines[0]["version"]
    if not isinstance(version, int) or version > VERSION:
        raise RunError(
            f"{path}: written by a newer version of eexform (journal version {version}, this one knows {VERSION}); "
            "update eexform"
        )
    return lines, whole


def _need_generation(path: Path, line: Mapping[str, Any], expected: int) -> None:
    missing = {"generation", "population", "archive", "evaluated", "rng", "seconds"} - set(line)
    if missing or line["generation"] != expected:
        raise RunError(f"{path}: expected generation {expected} on line {expected + 2}; the journal is damaged")


def _truncate(path: Path, size: int) -> None:
    try:
        if path.stat().st_size != size:
            os.truncate(path, size)
    except OSError as error:
        raise files.storage_error(path, error) from error


def _difference(found: Any, expected: Any) -> str:
    """Where two JSON values differ, in a few words."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        for key in [*expected, *found]:
            if found.get(key) != expected.get(key):
                return f"{key}: {_difference(found.get(key), expected.get(key))}"
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        return next(_difference(f, e) for f, e in zip(found, expected, strict=True) if f != e)
    return f"then {_short(found)}, now {_short(expected)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
