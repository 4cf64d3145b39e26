"""Samples with the same content in two splits: disjoint by index, but the same image."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

from eexform.data.source import DataSource
from eexform.data.splits import Splits


@dataclass(frozen=True)
class Duplicate:
    """A sample that stands in two splits: split name, and index in its part, of both."""

    left: str
    left_index: int
    right: str
    right_index: int


def find_duplicates(source: DataSource, splits: Splits, *, batch_size: int = 256) -> tuple[Duplicate, ...]:
    """Samples of the same raw content in two splits (labels are not compared); one entry per content.

    Reads every sample once; keeps 16 bytes per sample.
    """
    seen: dict[str, dict[bytes, int]] = {name: {} for name, _ in splits.items()}
    for name, split in splits.items():
        for start in range(0, len(split), batch_size):
            indices = split.indices[start : start + batch_size]
            inputs = source.fetch(split.part, indices).inputs
            for place, index in enumerate(indices.tolist()):
                hasher = hashlib.blake2b(digest_size=16)
                for raw in inputs.values():
                    sample = np.ascontiguousarray(raw[place])
                    hasher.update(f"{sample.dtype.str}{sample.shape}".encode() + sample.tobytes())
                seen[name].setdefault(hasher.digest(), index)
    return tuple(
        Duplicate(left, seen[left][key], right, seen[right][key])
        for left, right in itertools.combinations(seen, 2)
        for key in seen[left]
        if key in seen[right]
    )


def describe_duplicates(duplicates: tuple[Duplicate, ...]) -> str | None:
    """A warning for the user, or ``None`` where there is nothing to warn of."""
    if not duplicates:
        return None
    counts: dict[tuple[str, str], int] = {}
    for pair in duplicates:
        counts[pair.left, pair.right] = counts.get((pair.left, pair.right), 0) + 1
    listed = ", ".join(f"{count} in both {left} and {right}" for (left, right), count in counts.items())
    first = duplicates[0]
    return (
        f"some samples stand in two splits with the same content: {listed} (for example index {first.left_index} of "
        f"{first.left} and {first.right_index} of {first.right}): scores there are better than on unseen data"
    )
