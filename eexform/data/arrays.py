"""Samples that are arrays already: in memory, or memory-mapped."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property

import numpy as np

from eexform.data.source import Layout, Samples, as_labels, hash_array
from eexform.errors import DataError

Arrays = tuple[Mapping[str | None, np.ndarray], "np.ndarray | None"]
"""The inputs (batch first) and the labels of one part."""


class ArraySource:
    """A source over arrays; give it to :class:`eexform.data.Dataset` directly from Python.

    Args:
        name: what to call it in messages.
        parts: per part, the inputs by model input (key ``None``: the only one) and the labels (or ``None``).
        classes: class names in the order of the labels.
        layout: of four-dimensional inputs, where known.

    Raises:
        DataError: the arrays of a part differ in length, a part is empty, parts have different inputs, bad labels.
    """

    costly = False

    def __init__(
        self,
        name: str,
        parts: Mapping[str, Arrays],
        *,
        classes: tuple[str, ...] | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.name = name
        self.classes = classes
        self.layout: Layout | None = layout
        self._inputs: dict[str, dict[str | None, np.ndarray]] = {}
        self._labels: dict[str, np.ndarray | None] = {}
        self.parts: dict[str, int] = {}
        for part, (inputs, labels) in parts.items():
            self._inputs[part] = dict(inputs)
            self._labels[part] = None if labels is None else as_labels(labels, f"{name}: labels of part {part!r}")
            self.parts[part] = self._length(part)
        if not self.parts:
            raise DataError(f"{name}: no samples")
        if len({frozenset(inputs) for inputs in self._inputs.values()}) > 1:
            raise DataError(
                f"{name}: parts have different inputs: "
                f"{ {part: list(inputs) for part, inputs in self._inputs.items()} }"
            )

    def _length(self, part: str) -> int:
        lengths = {str(key or "input"): len(array) for key, array in self._inputs[part].items()}
        labels = self._labels[part]
        if labels is not None:
            lengths["labels"] = len(labels)
        if len(set(lengths.values())) != 1:
            raise DataError(f"{self.name}: arrays of part {part!r} differ in their number of samples: {lengths}")
        length = next(iter(lengths.values()))
        if length == 0:
            raise DataError(f"{self.name}: part {part!r} is empty")
        return length

    @cached_property
    def digest(self) -> str:
        hasher = hashlib.sha256(b"eexform arrays 1\n")
        hasher.update(repr(self.classes).encode())
        for part in sorted(self.parts):
            for key in sorted(self._inputs[part], key=str):
                hash_array(hasher, f"{part}/{key}", self._inputs[part][key])
            labels = self._labels[part]
            if labels is not None:
                hash_array(hasher, f"{part}/labels", labels)
        return hasher.hexdigest()

    def labels(self, part: str) -> np.ndarray | None:
        return self._labels[part]

    def fetch(self, part: str, indices: np.ndarray) -> Samples:
        labels = self._labels[part]
        inputs = {key: np.asarray(array[indices]) for key, array in self._inputs[part].items()}
        return Samples(inputs, None if labels is None else labels[indices])
