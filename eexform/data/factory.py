"""``module:attribute``: a torch ``Dataset`` (or anything with ``len`` and ``[index]``) from code that the user names.

The attribute is the data set, a mapping of part name to data set, or a function without arguments that returns
either. Items are ``(x, y)``, with ``x`` an array or tensor or a dict of them by model input, and ``y`` a class
number; or ``x`` alone, for label-free mode. Nothing but the named module is imported; the current folder is
searched as ``python -m`` would.

A data set may say more: ``classes`` (names), ``layout`` (``nhwc`` or ``nchw``), ``labels`` (every ``y``, in order) and
``digest`` (text that changes when its content does). Without the last two, opening reads every item once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from eexform.data import images
from eexform.data.source import Layout, Raw, Samples, SourceOptions, as_labels, hash_array
from eexform.errors import DataError, EexformError
from eexform.references import is_reference, resolve


class FactorySource:
    """Items of the user's own data sets, by part."""

    costly = False

    def __init__(self, name: str, parts: Mapping[str, Any]) -> None:
        self.name = name
        self._items = dict(parts)
        self.parts: dict[str, int] = {}
        for part, items in self._items.items():
            if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
                raise DataError(
                    f"{name}: part {part!r} is a {type(items).__name__}: expected a data set with a length and "
                    "items by index (an iterable one cannot be split)"
                )
            self.parts[part] = len(items)
            if not self.parts[part]:
                raise DataError(f"{name}: part {part!r} is empty")
        first = next(iter(self._items.values()))
        classes = getattr(first, "classes", None)
        self.classes: tuple[str, ...] | None = None if classes is None else tuple(str(entry) for entry in classes)
        layout = getattr(first, "layout", None)
        if layout not in (None, "nhwc", "nchw"):
            raise DataError(f"{name}: its 'layout' is {layout!r}: expected 'nhwc' or 'nchw'")
        self.layout: Layout | None = layout

    @classmethod
    def takes(cls, text: str) -> bool:
        return is_reference(text)

    @classmethod
    def open(cls, text: str, options: SourceOptions) -> FactorySource:
        """Import and, where it is a function, call what ``text`` names.

        Raises:
            DataError: no such module or attribute, or the user's code failed.
        """
        options.refuse(text, "image_key", "label_key", "inputs")
        found = resolve(text, DataError)
        if callable(found) and not hasattr(found, "__getitem__"):
            try:
                found = found()
            except EexformError:
                raise
            except Exception as error:  # the user's code may raise anything
                raise DataError(f"{text}: the function failed: {type(error).__name__}: {error}") from error
        return cls(text, found if isinstance(found, Mapping) else {"all": found})

    @cached_property
    def _scanned(self) -> tuple[str, dict[str, np.ndarray | None]]:
        """Digest and labels, from one pass over every item that does not state them."""
        hasher = hashlib.sha256(b"eexform factory 1\n")
        labels: dict[str, np.ndarray | None] = {}
        for part, items in sorted(self._items.items()):
            stated, known = getattr(items, "digest", None), getattr(items, "labels", None)
            hasher.update(f"{part}|{len(items)}|{stated}|".encode())
            if stated is not None and known is not None:
                labels[part] = self._as_labels(list(known), part)
                continue
            found: list[Any] = []
            for index in range(len(items)):
                x, y = self._item(part, index)
                found.append(y)
                for key, array in sorted(x.items(), key=str):
                    hash_array(hasher, str(key), np.atleast_1d(array))
                hasher.update(repr(y).encode())
            labels[part] = self._as_labels(found, part)
        return hasher.hexdigest(), labels

    @property
    def digest(self) -> str:
        return self._scanned[0]

    def labels(self, part: str) -> np.ndarray | None:
        return self._scanned[1][part]

    def fetch(self, part: str, indices: np.ndarray) -> Samples:
        items = [self._item(part, index) for index in indices.tolist()]
        inputs: dict[str | None, Raw] = {}
        for key in items[0][0]:
            stacked = images.stack([x[key] for x, _ in items])
            if not isinstance(stacked, np.ndarray) and any(array.ndim != 3 for array in stacked):
                shapes = sorted({array.shape for array in stacked})
                raise DataError(
                    f"{self.name}: items of part {part!r} differ in shape ({shapes[0]}, {shapes[-1]}): pad them "
                    "to one shape"
                )
            inputs[key] = stacked
        return Samples(inputs, self._as_labels([y for _, y in items], part))

    def _as_labels(self, values: list[Any], part: str) -> np.ndarray | None:
        if any(value is None for value in values):
            return None
        return as_labels(np.asarray(values), f"{self.name}: labels of part {part!r}")

    def _item(self, part: str, index: int) -> tuple[dict[str | None, np.ndarray], Any]:
        where = f"{self.name}: item {index} of part {part!r}"
        try:
            item = self._items[part][index]
            x, y = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
            named: dict[str | None, Any] = {None: x}
            if isinstance(x, Mapping):
                named = {str(key): value for key, value in x.items()}
            arrays: dict[str | None, np.ndarray] = {key: np.asarray(value) for key, value in named.items()}
            label = None if y is None else np.asarray(y).item()
        except EexformError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise DataError(f"{where} cannot be had: {type(error).__name__}: {error}") from error
        for key, array in arrays.items():
            if array.dtype.kind not in "biuf":
                what = "x" if key is None else f"x[{key!r}]"
                raise DataError(
                    f"{where}: {what} is a {type(named[key]).__name__}: expected an array or tensor of numbers, "
                    "items being (x, y)"
                )
        return arrays, label
