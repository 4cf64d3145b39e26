"""Where samples come from: the protocol of a data source and the door that opens one by text.

A source hands out *raw* samples by part and index; what is done to them afterwards is said by
:class:`eexform.data.preprocess.Preprocess`. Sources are plug-ins (entry-point group ``eexform.data_sources``): the
entry point is a class with two class methods beside the protocol, ``open(text, options)`` and, where a text without
its prefix may mean it, ``takes(text)``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from eexform import plugins
from eexform.errors import DataError, OptionError

Layout = Literal["nhwc", "nchw"]
Raw = np.ndarray | list[np.ndarray]
"""Raw samples of one input: one array, batch first, or a list of ``[H, W, C]`` images of different sizes."""

GROUP = "eexform.data_sources"
_PROTOCOL = ("name", "parts", "classes", "layout", "costly", "digest", "labels", "fetch")


@dataclass(frozen=True)
class Samples:
    """Raw samples.

    Attributes:
        inputs: per model input, ``n`` raw samples; the key ``None`` stands for "the only input of the model".
        labels: int64 ``[n]``, where they come along with the inputs; :meth:`DataSource.labels` has them in any case.
    """

    inputs: Mapping[str | None, Raw]
    labels: np.ndarray | None = None


class DataSource(Protocol):
    """A labelled (or unlabelled) collection of samples in one or more named parts.

    Attributes:
        name: what to call it in messages.
        parts: number of samples per part, such as ``{"train": 50000, "test": 10000}`` or ``{"all": 1797}``.
        classes: class names in the order of the labels, where they are known.
        layout: how images are laid out, where the source knows it by construction; else ``None``.
        costly: fetching decodes images, so that a cache pays.
        digest: sha-256 of the content, as hexadecimal text.
    """

    @property
    def name(self) -> str: ...
    @property
    def parts(self) -> Mapping[str, int]: ...
    @property
    def classes(self) -> tuple[str, ...] | None: ...
    @property
    def layout(self) -> Layout | None: ...
    @property
    def costly(self) -> bool: ...
    @property
    def digest(self) -> str: ...

    def labels(self, part: str) -> np.ndarray | None:
        """All labels of ``part``, int64 ``[parts[part]]``, without decoding inputs; ``None`` where there are none."""
        ...

    def fetch(self, part: str, indices: np.ndarray) -> Samples:
        """The samples ``indices`` (int64 ``[n]``) of ``part``, in that order."""
        ...


@dataclass(frozen=True)
class SourceOptions:
    """What a user may say about a source. A source refuses what it has no use for.

    Attributes:
        image_key: column or array that holds the images.
        label_key: column or array that holds the labels.
        inputs: per model input, the column or array that feeds it; as a bare name, the one that feeds the only input.
        cache_folder: where a source may keep what it had to convert; content-addressed, may be deleted at any time.
    """

    image_key: str | None = None
    label_key: str | None = None
    inputs: Mapping[str, str] | str | None = None
    cache_folder: str | None = None

    def refuse(self, source: str, *options: str) -> None:
        """Raise an :class:`OptionError` where one of ``options`` was given to a ``source`` that cannot use it."""
        for option in options:
            if getattr(self, option) is not None:
                raise OptionError(
                    f"{source}: --{option.replace('_', '-')} means nothing for this kind of data; leave it out"
                )

    def to_json(self) -> dict[str, Any]:
        """The options that identify the samples, as JSON (the cache is left out: it changes nothing)."""
        plain = asdict(self)
        plain.pop("cache_folder")
        return {key: value for key, value in plain.items() if value is not None}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any], *, cache_folder: str | None = None) -> SourceOptions:
        """The inverse of :meth:`to_json`; keys that a newer version added are refused."""
        known = {field.name for field in fields(cls)} - {"cache_folder"}
        unknown = sorted(set(plain) - known)
        if unknown:
            raise OptionError(f"data options: {unknown[0]!r} is not known to this version of eexform")
        return cls(**plain, cache_folder=cache_folder)


def parse_inputs(text: str) -> Mapping[str, str] | str:
    """``"mfcc"`` or ``"input_ids=ids,attention_mask=mask"`` as :attr:`SourceOptions.inputs`."""
    items = [item.strip() for item in text.split(",") if item.strip()]
    if len(items) == 1 and "=" not in items[0]:
        return items[0]
    pairs: dict[str, str] = {}
    for item in items:
        model_input, equals, array = (piece.strip() for piece in item.partition("="))
        if not (model_input and equals and array):
            raise OptionError(f"inputs: {item!r} is not 'model input=array'")
        if model_input in pairs:
            raise OptionError(f"inputs: model input {model_input!r} is listed twice")
        pairs[model_input] = array
    if not pairs:
        raise OptionError("inputs: empty; expected 'array' or 'model input=array,...'")
    return pairs


def open_source(
    text: str,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    inputs: Mapping[str, str] | str | None = None,
    cache_folder: str | Path | None = None,
) -> DataSource:
    """Open the data that ``text`` names.

    ``digits`` (or any registered name that needs nothing else), ``name:rest`` for a registered name, a ``.npz``
    file, an existing folder with one sub-folder per class, or ``module:attribute`` for code of the user's own.
    Registered names come first: a folder called ``digits`` is written ``./digits``.

    Args:
        text: which data.
        image_key: column that holds the images (``hf:``).
        label_key: column or array that holds the labels (``hf:``, ``.npz``).
        inputs: which array feeds which model input (``.npz``, ``hf:``); also as text, see :func:`parse_inputs`.
        cache_folder: folder for converted data.

    Raises:
        DataError: the data is missing or cannot be used.
        OptionError: an option does not fit the kind of data.
    """
    if isinstance(inputs, str):
        inputs = parse_inputs(inputs)
    options = SourceOptions(image_key, label_key, inputs, str(cache_folder) if cache_folder is not None else None)
    return open_with(text, options)


def open_with(text: str, options: SourceOptions) -> DataSource:
    """Like :func:`open_source`, with the options in one value."""
    if not text.strip():
        raise DataError("data: empty; expected a name, a .npz file, a folder, 'hf:...' or 'module:attribute'")
    known = plugins.names(GROUP)
    prefix, colon, rest = text.partition(":")
    if prefix in known:
        opened = plugins.load(GROUP, prefix).open(rest if colon else "", options)
    else:
        takers = [name for name in known if _takes(name, text)]
        if not takers:
            raise DataError(_nothing_takes(text, known))
        opened = plugins.load(GROUP, takers[0]).open(text, options)
    # looked up on the class: asking the object would compute its digest
    for member in _PROTOCOL:
        if not hasattr(type(opened), member) and member not in getattr(opened, "__dict__", {}):
            raise DataError(f"{text}: the data source returned a {type(opened).__name__}, which has no {member!r}")
    found: DataSource = opened
    return found


def _takes(name: str, text: str) -> bool:
    try:
        takes = getattr(plugins.load(GROUP, name), "takes", None)
    except OptionError:
        return False  # a plug-in that cannot be imported: an error only where it is asked for by name
    return bool(takes(text)) if takes is not None else False


def _nothing_takes(text: str, known: Sequence[str]) -> str:
    tried = [f"a registered name ({', '.join(known)})", "a .npz file", "an existing folder", "'module:attribute'"]
    missing = "" if Path(text).exists() else "; there is no file or folder of that name"
    if Path(text).is_file():
        missing = f"; it is a file, but of {Path(text).suffix or 'no'} type, not .npz"
    return f"{text}: not a data source: tried {', '.join(tried)}{missing}"


def as_labels(values: Any, where: str) -> np.ndarray:
    """``values`` as int64 ``[n]``.

    Raises:
        DataError: not whole numbers, or more than one per sample; ``where`` says which.
    """
    labels = np.asarray(values)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        shape = "x".join(map(str, labels.shape))
        raise DataError(
            f"{where}: expected one class number per sample, found an array of shape {shape}; "
            "one-hot labels become numbers with argmax"
        )
    if labels.dtype == np.bool_ or np.issubdtype(labels.dtype, np.integer):
        return labels.astype(np.int64)
    raise DataError(f"{where}: expected whole numbers (the class of each sample), found {labels.dtype}")


def hash_array(hasher: hashlib._Hash, name: str, array: np.ndarray) -> None:
    """Feed name, type, shape and content of ``array`` to ``hasher``, about 16 MB at a time."""
    plain = array.dtype.newbyteorder("<")
    hasher.update(f"{name}|{plain.str}|{array.shape}|".encode())
    rows = max(1, (16 << 20) // max(1, array[:1].nbytes))
    for start in range(0, len(array), rows):
        hasher.update(np.ascontiguousarray(array[start : start + rows], dtype=plain).tobytes())


def dims(shape: Sequence[object]) -> str:
    """A shape as text, such as ``3x32x32``."""
    return "x".join(map(str, shape)) or "single numbers"
