"""``hf:``: a data set read by Hugging Face ``datasets`` (``pip install eexform[hf]``).

``hf:folder`` is a local folder of parquet (or other data) files, or one written by ``save_to_disk``;
``hf:owner/name`` (and ``hf:owner/name#config``) is fetched from the hub. Parts are its splits. The image column is
the one of type ``Image`` (or ``image_key``), the label column the one of type ``ClassLabel``, else one called
``label``, ``labels`` or ``y`` (or ``label_key``). Without images, say which columns of numbers feed which model
input (``inputs``); all rows of such a column must have one length. Images are decoded when fetched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eexform.data import images
from eexform.data.source import Layout, Raw, Samples, SourceOptions, as_labels
from eexform.errors import DataError, suggest

_LABEL_NAMES = ("label", "labels", "y")


class HuggingFaceSource:
    """Rows of a Hugging Face data set; images as ``[H, W, C]``."""

    def __init__(self, name: str, parts: Mapping[str, Any], options: SourceOptions) -> None:
        self.name = name
        self._rows = dict(parts)
        self.parts = {part: len(rows) for part, rows in self._rows.items()}
        empty = [part for part, size in self.parts.items() if size == 0]
        if empty or not self.parts:
            raise DataError(f"{name}: part {empty[0]!r} has no rows" if empty else f"{name}: no data in it")
        features = next(iter(self._rows.values())).features
        self._label_key = _label_column(features, name, options)
        self._columns = _input_columns(features, name, options, self._label_key)
        self._images = {key for key, column in self._columns.items() if _kind(features[column]) == "Image"}
        self.layout: Layout | None = "nhwc" if self._images else None
        self.costly = bool(self._images)
        names = getattr(features[self._label_key], "names", None) if self._label_key else None
        self.classes: tuple[str, ...] | None = None if names is None else tuple(names)
        self._known_labels: dict[str, np.ndarray | None] = {}

    @classmethod
    def open(cls, text: str, options: SourceOptions) -> HuggingFaceSource:
        """Open ``text``, what stands behind ``hf:``.

        Raises:
            DataError: ``datasets`` is not installed, cannot read the data, or columns cannot be told apart.
        """
        if not text:
            raise DataError("hf: expected a folder or a name of the hub after 'hf:'")
        try:
            import datasets
        except ImportError as error:
            raise DataError("hf: needs Hugging Face datasets: pip install eexform[hf]") from error
        place, _, config = text.partition("#")
        folder = None if options.cache_folder is None else str(Path(options.cache_folder) / "huggingface")
        try:
            with _quiet(datasets):
                if Path(place).is_dir() and any((Path(place) / name).is_file() for name in _SAVED):
                    loaded = datasets.load_from_disk(place)
                else:
                    loaded = datasets.load_dataset(place, config or None, cache_dir=folder)
        except Exception as error:  # whatever the library, its file readers or the network raise
            where = "folder" if Path(place).is_dir() else "there is no such folder, and on the hub"
            lines = str(error).strip().splitlines()
            what = lines[0] if lines else type(error).__name__
            raise DataError(f"hf:{text}: cannot be loaded ({where}: {type(error).__name__}: {what})") from error
        parts = loaded if isinstance(loaded, Mapping) else {str(loaded.split or "all"): loaded}
        return cls(f"hf:{text}", {str(part): rows for part, rows in parts.items()}, options)

    @cached_property
    def digest(self) -> str:
        """sha-256 of the columns in use, row by row: the same for the same rows, however they are stored."""
        hasher = hashlib.sha256(b"eexform hf 1\n")
        columns = sorted({*self._columns.values(), *([self._label_key] if self._label_key else [])})
        for part in sorted(self._rows):
            hasher.update(f"{part}|{self.parts[part]}|{columns}|{self.classes}|".encode())
            rows = self._rows[part].select_columns(columns).with_format("arrow")
            for table in rows.iter(batch_size=1000):
                for column in columns:
                    for value in table.column(column).to_pylist():
                        data = _image_bytes(value) if isinstance(value, dict) else repr(value).encode()
                        hasher.update(len(data).to_bytes(8, "little") + data)
        return hasher.hexdigest()

    def labels(self, part: str) -> np.ndarray | None:
        if part not in self._known_labels:
            found: np.ndarray | None = None
            if self._label_key is not None:
                values = self._label_values(part)
                if None in values:
                    raise DataError(
                        f"{self.name}: row {values.index(None)} of part {part!r} has no label in column "
                        f"{self._label_key!r}"
                    )
                found = as_labels(values, f"{self.name}: column {self._label_key!r} of part {part!r}")
            self._known_labels[part] = found
        return self._known_labels[part]

    def _label_values(self, part: str) -> list[Any]:
        table = self._rows[part].select_columns([self._label_key]).with_format("arrow")[:]
        values: list[Any] = table.column(self._label_key).to_pylist()
        return values

    def fetch(self, part: str, indices: np.ndarray) -> Samples:
        columns = list(dict.fromkeys(self._columns.values()))
        table = self._rows[part].select_columns(columns).with_format("arrow")[indices.tolist()]
        inputs: dict[str | None, Raw] = {}
        for key, column in self._columns.items():
            values = table.column(column).to_pylist()
            where = f"{self.name}: row {{}} of part {part!r}, column {column!r}"
            if key in self._images:
                decoded = [
                    images.decode(_image_bytes(value), where.format(index))
                    for index, value in zip(indices.tolist(), values, strict=True)
                ]
                inputs[key] = images.stack(decoded)
            else:
                inputs[key] = _numbers(values, indices, where)
        return Samples(inputs)


_SAVED = ("dataset_dict.json", "state.json")  # what Dataset.save_to_disk writes


def _label_column(features: Mapping[str, Any], name: str, options: SourceOptions) -> str | None:
    if options.label_key is not None:
        if options.label_key not in features:
            raise DataError(
                f"{name}: no column {options.label_key!r} for the labels: {suggest(options.label_key, features)}"
            )
        return options.label_key
    found = [column for column, feature in features.items() if _kind(feature) == "ClassLabel"]
    found = found or [column for column in _LABEL_NAMES if column in features]
    if len(found) > 1:
        raise DataError(f"{name}: labels could be any of the columns {', '.join(found)}: say which with --label-key")
    return found[0] if found else None


def _input_columns(
    features: Mapping[str, Any], name: str, options: SourceOptions, label_key: str | None
) -> dict[str | None, str]:
    columns = ", ".join(f"{column} ({_kind(feature)})" for column, feature in features.items())
    chosen: dict[str | None, str] = {}
    if options.inputs is not None and options.image_key is not None:
        raise DataError(f"{name}: give either --image-key or --inputs, not both")
    if options.inputs is not None:
        chosen.update(((None, options.inputs),) if isinstance(options.inputs, str) else options.inputs.items())
    elif options.image_key is not None:
        chosen[None] = options.image_key
    else:
        found = [column for column, feature in features.items() if _kind(feature) == "Image"]
        if len(found) != 1:
            what = f"images could be any of {', '.join(found)}" if found else "no column holds images"
            raise DataError(
                f"{name}: {what}: say which column with --image-key, or which columns of numbers feed the model "
                f"with --inputs 'model input=column,...'; columns are {columns}"
            )
        chosen[None] = found[0]
    for column in chosen.values():
        if column not in features or column == label_key:
            raise DataError(
                f"{name}: no column {column!r} for an input: {suggest(column, set(features) - {str(label_key)})}"
            )
    if options.image_key is not None and _kind(features[options.image_key]) != "Image":
        raise DataError(f"{name}: column {options.image_key!r} is no image column; columns are {columns}")
    return chosen


def _kind(feature: Any) -> str:
    return type(feature).__name__


def _image_bytes(value: Any) -> bytes:
    if not isinstance(value, dict):
        return b""
    if value.get("bytes") is not None:
        return bytes(value["bytes"])
    try:
        return Path(value["path"]).read_bytes() if value.get("path") else b""
    except OSError as error:
        raise DataError(f"{value['path']}: cannot be read: {error.strerror or error}") from error


def _numbers(values: list[Any], indices: np.ndarray, where: str) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:  # rows of different lengths
        raise DataError(
            f"{where.format(indices[0])} and other rows differ in length: pad or cut them to one length first "
            "(as a tokeniser does with padding='max_length')"
        ) from error
    if array.dtype.kind not in "biuf":
        raise DataError(f"{where.format(indices[0])} holds no numbers ({array.dtype}): tokenise text first")
    return array.astype(np.float32) if array.dtype == np.float64 else array


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars of the library, which would tear ours."""
    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
