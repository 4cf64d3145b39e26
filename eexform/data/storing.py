"""A data set described by text and options: opened from them, stored with a run, opened again from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eexform import plugins
from eexform.data.augment import Augment
from eexform.data.cache import PixelCache
from eexform.data.dataset import Dataset, LabelMode
from eexform.data.preprocess import Preprocess
from eexform.data.source import GROUP, DataSource, SourceOptions, open_with, parse_inputs
from eexform.data.splits import Splits, make_splits
from eexform.errors import DataError, RunError
from eexform.files import read_json, write_json

_FORMAT = 1
_DESCRIPTION = "data.json"
_SPLITS = "splits.npz"


def open_dataset(
    data: str | DataSource,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    inputs: Mapping[str, str] | str | None = None,
    preprocess: Preprocess | None = None,
    augment: Augment | str = "none",
    labels: LabelMode = "given",
    train_from: str | None = None,
    select_from: str | None = None,
    test_from: str | None = None,
    fractions: Sequence[float] | None = None,
    seed: int = 0,
    limit: int | None = None,
    cache_folder: str | Path | None = None,
) -> Dataset:
    """Open data and split it; every option is that of :func:`open_source`, :class:`Dataset` or :func:`make_splits`."""
    if isinstance(inputs, str):
        inputs = parse_inputs(inputs)
    folder = None if cache_folder is None else str(cache_folder)
    options = SourceOptions(image_key, label_key, inputs, folder)
    source = open_with(data, options) if isinstance(data, str) else data
    splits = make_splits(
        source,
        train_from=train_from,
        select_from=select_from,
        test_from=test_from,
        fractions=fractions,
        seed=seed,
        limit=limit,
        labels=labels == "given",
    )
    steps = preprocess if preprocess is not None else Preprocess()
    return Dataset(
        source,
        steps,
        splits,
        Augment.parse(augment) if isinstance(augment, str) else augment,
        labels,
        cache=PixelCache(source, steps, folder=folder) if source.costly else None,
        origin=(_absolute(data), replace(options, cache_folder=None)) if isinstance(data, str) else None,
    )


def save_dataset(dataset: Dataset, folder: str | Path) -> None:
    """Write ``data.json`` and ``splits.npz`` into ``folder``: what was used, not the samples."""
    origin: dict[str, Any] | None = None
    if dataset.origin is not None:
        text, options = dataset.origin
        origin = {"text": text, "options": options.to_json()}
    dataset.splits.save(Path(folder) / _SPLITS)
    write_json(
        Path(folder) / _DESCRIPTION,
        {
            "format": _FORMAT,
            "origin": origin,
            "source_digest": dataset.source.digest,
            "digest": dataset.digest,
            **dataset.describe(),
        },
    )


def load_dataset(
    folder: str | Path,
    *,
    data: str | DataSource | None = None,
    cache_folder: str | Path | None = None,
    check: bool = True,
) -> Dataset:
    """Open what :func:`save_dataset` described.

    Args:
        folder: where it was written.
        data: where the samples are now, if not where they were.
        cache_folder: as in :func:`open_dataset`.
        check: compare the content with what was used (reads all of it); ``False`` only checks sizes.

    Raises:
        RunError: missing, damaged or newer description.
        DataError: the samples are gone or have changed.
    """
    path = Path(folder) / _DESCRIPTION
    plain = read_json(path)
    try:
        if plain["format"] > _FORMAT:
            raise RunError(
                f"{path}: written by a newer version of eexform (format {plain['format']}, this one reads "
                f"{_FORMAT}): update eexform"
            )
        preprocess = Preprocess.from_json(plain["preprocess"])
        augment = Augment.parse(plain["augment"])
        labels = plain["labels"]
        digest, parts, origin = plain["source_digest"], plain["parts"], plain["origin"]
        text = origin["text"] if origin else None
        options = SourceOptions.from_json(
            origin["options"] if origin else {}, cache_folder=None if cache_folder is None else str(cache_folder)
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: not a description of data ({error!r}); it may be damaged") from error
    if data is None and text is None:
        raise DataError(f"{path}: the data came from Python, not from a file: give the source again")
    chosen = data if data is not None else text
    source = open_with(chosen, options) if isinstance(chosen, str) else chosen
    assert source is not None
    if dict(source.parts) != parts or (check and source.digest != digest):
        raise DataError(
            f"{source.name}: the data has changed since {path} was written: expected parts {parts} and content "
            f"{digest[:12]}, found {dict(source.parts)}" + (f" and {source.digest[:12]}" if check else "")
        )
    return Dataset(
        source,
        preprocess,
        Splits.load(Path(folder) / _SPLITS),
        augment,
        labels,
        cache=PixelCache(source, preprocess, folder=cache_folder) if source.costly else None,
        origin=(_absolute(chosen), replace(options, cache_folder=None)) if isinstance(chosen, str) else None,
    )


def _absolute(text: str) -> str:
    """``text`` with the path in it, where it names one, made absolute: a run is opened from other folders."""
    prefix, _, rest = text.partition(":")
    if prefix in plugins.names(GROUP):
        place, mark, config = rest.partition("#")
        return f"{prefix}:{Path(place).resolve()}{mark}{config}" if place and Path(place).exists() else text
    return str(Path(text).resolve()) if Path(text).exists() else text
