"""``*.npz``: arrays in a NumPy archive. Nothing is ever unpickled.

Arrays stored without compression (``numpy.savez``) are memory-mapped; compressed ones are loaded once, when opened.

Names: labels are the array called ``y``, ``label`` or ``labels`` (or the option ``label_key``); the input is the
one other numeric array with as many samples (or the option ``inputs``). Where names end in ``_train``, ``_test``,
``_val`` (as in ``x_train``, ``y_train``, ``x_test``, ``y_test``) the endings are the parts (options then name
arrays without the ending). A one-dimensional text array ``classes`` names the classes.
"""

from __future__ import annotations

import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from eexform.data.arrays import Arrays, ArraySource
from eexform.data.source import SourceOptions
from eexform.errors import DataError, suggest

_LABEL_NAMES = ("y", "label", "labels")
_PART = re.compile(r"^(?P<stem>.+)_(?P<part>train|test|val|valid|validation)$")


class NpzSource(ArraySource):
    """Arrays of a ``.npz`` file; one part ``all`` unless the names say otherwise (see the module)."""

    @classmethod
    def takes(cls, text: str) -> bool:
        return text.lower().endswith(".npz")

    @classmethod
    def open(cls, text: str, options: SourceOptions) -> NpzSource:
        """Open the file ``text``.

        Raises:
            DataError: missing, not an archive, pickled content, no or several arrays that could be meant.
        """
        options.refuse(text, "image_key")
        path = Path(text)
        arrays = _read(path)
        name = path.name
        classes = _classes(arrays, name)
        parts: dict[str, Arrays] = {}
        for part, found in _by_part(arrays).items():
            parts[part] = _choose(found, name if part == "all" else f"{name}, part {part!r}", options)
        return cls(name, parts, classes=classes)


def _by_part(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The arrays grouped by the ending of their names, by stem; one group where there are no endings."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        matched = _PART.match(name)
        if matched:
            groups.setdefault(matched["part"], {})[matched["stem"]] = array
    return groups if len(groups) > 1 else {"all": dict(arrays)}


def _choose(arrays: Mapping[str, np.ndarray], name: str, options: SourceOptions) -> Arrays:
    listing = ", ".join(f"{key} {_shape(array)}" for key, array in arrays.items())
    if options.label_key is not None:
        label_key: str | None = options.label_key
        if label_key not in arrays:
            raise DataError(
                f"{name}: no array {label_key!r} for the labels: {suggest(str(label_key), arrays)} "
                f"The file holds {listing}"
            )
    else:
        candidates = [key for key in _LABEL_NAMES if key in arrays]
        if len(candidates) > 1:
            raise DataError(
                f"{name}: labels could be any of {', '.join(candidates)}: say which with --label-key "
                f"(the file holds {listing})"
            )
        label_key = candidates[0] if candidates else None
    labels = arrays[label_key] if label_key is not None else None
    if labels is not None and labels.ndim == 0:
        raise DataError(
            f"{name}: array {label_key!r} is a single value, not a label per sample; the file holds {listing}"
        )
    if options.inputs is not None:
        wanted: dict[str | None, str] = {}
        if isinstance(options.inputs, str):
            wanted[None] = options.inputs
        else:
            wanted.update(options.inputs)
        for key in wanted.values():
            if key not in arrays:
                raise DataError(
                    f"{name}: no array {key!r} for an input: {suggest(key, arrays)} The file holds {listing}"
                )
        chosen = {model_input: arrays[key] for model_input, key in wanted.items()}
        for model_input, array in chosen.items():
            if array.dtype.kind not in "biuf" or array.ndim < 1:
                raise DataError(f"{name}: array {wanted[model_input]!r} holds {array.dtype}, expected numbers")
        return chosen, labels
    numeric = [
        key for key, array in arrays.items() if key != label_key and array.dtype.kind in "biuf" and array.ndim > 1
    ]
    if labels is not None:
        numeric = [key for key in numeric if len(arrays[key]) == len(labels)]
    if len(numeric) == 1:
        return {None: arrays[numeric[0]]}, labels
    if not numeric:
        same = " with as many samples as there are labels" if labels is not None else ""
        raise DataError(f"{name}: no numeric array{same} could be the input; the file holds {listing or 'nothing'}")
    hint = "" if labels is not None else ", and the labels with --label-key (or --labels none)"
    raise DataError(
        f"{name}: the input could be any of {', '.join(numeric)}: say which with --inputs ARRAY, or "
        f"--inputs 'model input=ARRAY,...' where the model has several{hint}; the file holds {listing}"
    )


def _classes(arrays: Mapping[str, np.ndarray], name: str) -> tuple[str, ...] | None:
    classes = arrays.get("classes")
    if classes is None or classes.dtype.kind != "U" or classes.ndim != 1:
        return None
    names = tuple(str(entry) for entry in classes)
    if len(set(names)) != len(names):
        raise DataError(f"{name}: a class name stands twice in 'classes': {list(names)}")
    return names


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive, np.load(path, allow_pickle=False) as loaded:
            for info in archive.infolist():
                if not info.filename.endswith(".npy"):
                    continue  # no array: a note somebody put into the archive
                key = info.filename.removesuffix(".npy")
                mapped = _mapped(path, info)
                arrays[key] = loaded[key] if mapped is None else mapped
    except (zipfile.BadZipFile, zlib.error, EOFError, struct.error) as error:
        raise DataError(f"{path}: not a NumPy archive, or damaged ({error})") from error
    except (ValueError, KeyError, OSError) as error:
        pickled = "pickle" in str(error) or "Object arrays" in str(error)
        advice = (
            "it holds pickled objects, which are never loaded: store numbers and text only" if pickled else str(error)
        )
        raise DataError(f"{path}: cannot be read: {advice}") from error
    return arrays


def _mapped(path: Path, info: zipfile.ZipInfo) -> np.ndarray | None:
    """The member as a memory map, where it is stored as it is and holds plain numbers; else ``None``."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size < 1 << 20:
        return None
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)  # local file header: lengths of name and extra field stand at 26 and 28
        if header[:4] != b"PK\x03\x04":
            return None
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        file.seek(info.header_offset + 30 + name_length + extra_length)
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            return None
        if dtype.hasobject or fortran or 0 in shape:
            return None
        if file.tell() + dtype.itemsize * int(np.prod(shape)) > path.stat().st_size:
            raise DataError(f"{path}: cut off inside array {info.filename!r}")
        return np.memmap(path, dtype=dtype, mode="r", offset=file.tell(), shape=shape)


def _shape(array: np.ndarray) -> str:
    return f"{array.dtype}[{'x'.join(map(str, array.shape))}]"
