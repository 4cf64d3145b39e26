"""Who sees what: head-train, calibrate, select and test, disjoint, seeded and stored by index.

Heads are trained on ``head_train``; temperatures are fitted on ``calibrate``; the search chooses on ``select``;
``test`` is only ever reported. ``calibrate`` and ``select`` must be data that the trunk was not trained on: it is
overconfident on what it has memorised, and thresholds chosen there are worthless (see
:mod:`eexform.data.memorisation`).
"""

from __future__ import annotations

import hashlib
import itertools
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eexform.data.source import DataSource
from eexform.errors import DataError, OptionError, RunError, suggest
from eexform.files import writing

SPLITS = ("head_train", "calibrate", "select", "test")
FRACTIONS = (0.6, 0.1, 0.15, 0.15)
"""Default shares of the four splits where all come from one part."""
UNSEEN_FRACTIONS = (0.1, 0.4, 0.5)
"""Default shares of calibrate, select and test where they come from a part of their own."""
SELECT_FRACTIONS = (0.2, 0.8)
"""Default shares of calibrate and select where test has a part of its own."""
SHARED_FRACTIONS = (0.6, 0.1, 0.3)
"""Default shares of head-train, calibrate and select where test has a part of its own and the others share one."""
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Split:
    """Some samples of one part: int64 ``indices``, ascending."""

    part: str
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, eq=False)
class Splits:
    """The four splits; checked to be disjoint and not empty whenever one is made or loaded."""

    head_train: Split
    calibrate: Split
    select: Split
    test: Split
    seed: int = 0

    def __post_init__(self) -> None:
        for name, split in self.items():
            if len(split) == 0:
                raise DataError(f"split {name!r} is empty: give it a larger share with --fractions, or more data")
            if split.indices.dtype != np.int64 or split.indices.ndim != 1 or split.indices.min() < 0:
                raise DataError(f"split {name!r}: indices must be a list of whole numbers from 0")
            if len(np.unique(split.indices)) != len(split):
                raise DataError(f"split {name!r} holds a sample twice")
        for (left_name, left), (right_name, right) in itertools.combinations(self.items(), 2):
            if left.part == right.part:
                shared = np.intersect1d(left.indices, right.indices, assume_unique=True)
                if len(shared):
                    raise DataError(
                        f"splits {left_name!r} and {right_name!r} share {len(shared)} samples of part "
                        f"{left.part!r} (the first is index {shared[0]}): they must be disjoint"
                    )

    def __getitem__(self, name: str) -> Split:
        plain = name.replace("-", "_")
        if plain not in SPLITS:
            raise OptionError(f"no split is called {name!r}: {suggest(plain, SPLITS)}")
        split: Split = getattr(self, plain)
        return split

    def items(self) -> Iterator[tuple[str, Split]]:
        """Name and split, in the order of :data:`SPLITS`."""
        for name in SPLITS:
            yield name, getattr(self, name)

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(split) for name, split in self.items()}

    @property
    def digest(self) -> str:
        """sha-256 of which samples are where."""
        hasher = hashlib.sha256(b"eexform splits 1\n")
        for name, split in self.items():
            hasher.update(f"{name}|{split.part}|{len(split)}|".encode())
            hasher.update(split.indices.astype("<i8").tobytes())
        return hasher.hexdigest()

    def check(self, source: DataSource, *, labels: bool = True) -> None:
        """Check the splits against ``source``: parts exist, indices are in range, every split has two classes or more.

        Raises:
            DataError: they do not fit.
        """
        for name, split in self.items():
            if split.part not in source.parts:
                raise DataError(
                    f"split {name!r} is of part {split.part!r}, which {source.name} does not have: "
                    f"{suggest(split.part, source.parts)}"
                )
            if split.indices.max() >= source.parts[split.part]:
                raise DataError(
                    f"split {name!r} names sample {split.indices.max()} of part {split.part!r}, but "
                    f"{source.name} has {source.parts[split.part]} there: is it the same data?"
                )
            if labels:
                _several_classes(name, split, source)

    def save(self, path: str | Path) -> None:
        """Write to ``path`` (``.npz``), whole or not at all."""
        arrays: dict[str, Any] = {"format": np.int64(_FORMAT), "seed": np.int64(self.seed)}
        for name, split in self.items():
            arrays[name] = split.indices
            arrays[f"{name}.part"] = np.array(split.part)
        with writing(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Splits:
        """Read what :meth:`save` wrote, and check it.

        Raises:
            RunError: missing, damaged, or written by a newer version.
            DataError: the splits in it are not disjoint.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                version = int(stored["format"])
                if version > _FORMAT:
                    raise RunError(
                        f"{path}: written by a newer version of eexform (format {version}, "
                        f"this one reads {_FORMAT}): update eexform"
                    )
                found = {name: Split(str(stored[f"{name}.part"]), stored[name].astype(np.int64)) for name in SPLITS}
                return cls(**found, seed=int(stored["seed"]))
        except FileNotFoundError as error:
            raise RunError(f"{path}: no such file") from error
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise RunError(f"{path}: cannot be read as splits ({error}); it may be damaged") from error


def make_splits(
    source: DataSource,
    *,
    train_from: str | None = None,
    select_from: str | None = None,
    test_from: str | None = None,
    fractions: Sequence[float] | None = None,
    seed: int = 0,
    limit: int | None = None,
    labels: bool = True,
) -> Splits:
    """Draw the four splits, stratified by label where there are labels.

    A source with one part is divided by ``fractions`` (default :data:`FRACTIONS`). Where a source has several
    parts, say which one the trunk has not been trained on (``select_from``): calibrate, select and test are drawn
    from it by three fractions (default :data:`UNSEEN_FRACTIONS`), head-train is the whole of ``train_from``
    (default: the only other part). With ``test_from`` that part is test as a whole, and two fractions (default
    :data:`SELECT_FRACTIONS`) divide ``select_from`` into calibrate and select.

    Args:
        source: the data.
        train_from: part for head-train.
        select_from: part for calibrate, select and (without ``test_from``) test.
        test_from: part for test.
        fractions: shares; four, three or two, as above. They may leave samples over.
        seed: of the draw.
        limit: at most so many samples for head-train, stratified as well.
        labels: stratify by label and refuse one-class splits; ``False`` ignores labels.

    Raises:
        DataError: an empty split, a split with one class, or several parts and no ``select_from``.
        OptionError: no such part, or fractions that make no sense.
    """
    if seed < 0:
        raise OptionError(f"seed: expected a whole number from 0, found {seed}")
    if limit is not None and limit < 1:
        raise OptionError(f"limit: expected at least 1 sample for head-train, found {limit}")
    train_part, select_part, test_part = _parts(source, train_from, select_from, test_from)
    rng = np.random.default_rng([seed, 0x5911])
    chosen: dict[str, Split] = {}
    names: tuple[str, ...]
    default: tuple[float, ...]
    if train_part == select_part:
        names = SPLITS if test_part is None else SPLITS[:3]
        default = FRACTIONS if test_part is None else SHARED_FRACTIONS
    else:
        names = SPLITS[1:] if test_part is None else SPLITS[1:3]
        default = UNSEEN_FRACTIONS if test_part is None else SELECT_FRACTIONS
        chosen["head_train"] = Split(train_part, _spread(source, train_part, rng, labels))
    shares = _fractions(default if fractions is None else fractions, names)
    order = _spread(source, select_part, rng, labels)
    bounds = [round(len(order) * edge) for edge in itertools.accumulate(shares, initial=0.0)]
    for name, low, high in zip(names, bounds, bounds[1:], strict=False):
        chosen[name] = Split(select_part, order[low:high])
    if test_part is not None:
        chosen["test"] = Split(test_part, _spread(source, test_part, rng, labels))
    if limit is not None:
        train = chosen["head_train"]
        # a prefix of an order that spreads every class evenly may still start with one class: spread anew, then cut
        chosen["head_train"] = Split(
            train.part, _evenly(train.indices, _labels(source, train.part, labels), rng)[:limit]
        )
    splits = Splits(**{name: Split(split.part, np.sort(split.indices)) for name, split in chosen.items()}, seed=seed)
    splits.check(source, labels=labels)
    return splits


def _parts(
    source: DataSource, train_from: str | None, select_from: str | None, test_from: str | None
) -> tuple[str, str, str | None]:
    listing = ", ".join(f"{part} ({size})" for part, size in source.parts.items())
    for option, part in (("--train-from", train_from), ("--select-from", select_from), ("--test-from", test_from)):
        if part is not None and part not in source.parts:
            raise OptionError(
                f"{option}: {source.name} has no part {part!r}: {suggest(part, source.parts)} (it has {listing})"
            )
    if len(source.parts) == 1:
        if test_from is not None:
            raise OptionError(
                f"--test-from: {source.name} has only the part {listing}, which is needed for the other splits"
            )
        only = next(iter(source.parts))
        return only, only, None
    if select_from is None:
        raise DataError(
            f"{source.name} has the parts {listing}: say with --select-from which one the model was NOT trained "
            "on; thresholds chosen on data that it has memorised are worthless"
        )
    if test_from == select_from:
        raise OptionError(
            f"--test-from and --select-from are both {test_from!r}: leave out --test-from to share that part"
        )
    if train_from is None:
        others = [part for part in source.parts if part not in (select_from, test_from)]
        if len(others) != 1:
            raise OptionError(
                f"{source.name} has the parts {listing}: say with --train-from which one trains the heads"
            )
        train_from = others[0]
    if train_from == test_from:
        raise OptionError(f"--train-from and --test-from are both {test_from!r}: test must stay unseen")
    return train_from, select_from, test_from


def _fractions(fractions: Sequence[float], names: Sequence[str]) -> list[float]:
    shares = [float(share) for share in fractions]
    words = ", ".join(names)
    if len(shares) != len(names):
        raise OptionError(f"fractions: expected {len(names)} numbers ({words}), found {len(shares)}")
    if not all(0 < share < 1 or share == 1 == len(names) for share in shares):
        raise OptionError(f"fractions: expected numbers between 0 and 1 for {words}, found {shares}")
    if sum(shares) > 1 + 1e-9:
        raise OptionError(f"fractions: {shares} for {words} add up to {sum(shares):g}, more than 1")
    return shares


def _spread(source: DataSource, part: str, rng: np.random.Generator, labels: bool) -> np.ndarray:
    return _evenly(np.arange(source.parts[part], dtype=np.int64), _labels(source, part, labels), rng)


def _labels(source: DataSource, part: str, labels: bool) -> np.ndarray | None:
    if not labels:
        return None
    found = source.labels(part)
    if found is None:
        raise DataError(f"{source.name}: no labels; name them with --label-key, or use --labels none")
    return found


def _evenly(indices: np.ndarray, labels: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """``indices`` in a random order in which every class is spread evenly, so that any cut is stratified.

    The j-th of the n shuffled samples of a class stands at (j + u) / n, with one u in [0, 1) per class; sorting by that
    puts n * f (+- 1) samples of the class into the first share f.
    """
    shuffled = rng.permutation(indices)
    if labels is None:
        return shuffled
    of = labels[shuffled]
    place = np.empty(len(shuffled))
    for label in np.unique(of):
        members = np.flatnonzero(of == label)
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return shuffled[np.argsort(place, kind="stable")]


def _several_classes(name: str, split: Split, source: DataSource) -> None:
    labels = source.labels(split.part)
    if labels is None:
        raise DataError(f"{source.name}: no labels; name them with --label-key, or use --labels none")
    found = np.unique(labels[split.indices])
    if len(found) < 2:
        class_name = source.classes[found[0]] if source.classes and 0 <= found[0] < len(source.classes) else found[0]
        raise DataError(
            f"split {name!r}: all {len(split)} samples are of one class ({class_name}): accuracy there would "
            "mean nothing; give more or other data, or larger --fractions"
        )
