"""Does the data fit the model? Inputs by name, shape and type; labels by number of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eexform.data.preprocess import Preprocess
from eexform.data.source import DataSource, Layout, Samples, dims
from eexform.data.splits import Splits
from eexform.errors import DataError, suggest
from eexform.ir.types import Dim, TensorType


@dataclass(frozen=True)
class Feed:
    """How one model input is fed.

    Attributes:
        key: the source's input.
        type: what the model takes.
        name: of the model input.
    """

    key: str | None
    type: TensorType
    name: str

    def make(self, raw: np.ndarray, preprocess: Preprocess, layout: Layout | None, source: str) -> np.ndarray:
        """``n`` raw samples (after geometry) as the model takes them."""
        dtype = self.type.dtype if self.type.dtype is not None else np.dtype(np.float32)
        where = f"{source}, input {self.name!r}"
        if np.issubdtype(dtype, np.floating):
            made = preprocess.values(raw, layout, where).astype(dtype, copy=False)
        elif np.issubdtype(raw.dtype, np.floating):
            raise DataError(
                f"{where}: the model takes {dtype}, the data holds {raw.dtype}: convert the data, or choose "
                "another array with --inputs"
            )
        else:
            made = np.ascontiguousarray(preprocess.arrange(raw, layout).astype(dtype, copy=False))
        axis = self.type.batch_axis or 0
        return made if axis == 0 else np.ascontiguousarray(np.moveaxis(made, 0, axis))


def bind_inputs(
    inputs: Mapping[str, TensorType], samples: Samples, preprocess: Preprocess, layout: Layout | None, source: str
) -> dict[str, Feed]:
    """Match the model's inputs with the source's and check one sample against each."""
    keys = _match(list(inputs), list(samples.inputs), source)
    feeds = {name: Feed(keys[name], kind, name) for name, kind in inputs.items()}
    for feed in feeds.values():
        raw = np.asarray(samples.inputs[feed.key])
        made = feed.make(raw, preprocess, layout, source)
        _check_shape(feed, made, raw, layout, source)
    return feeds


def _match(inputs: Sequence[str], keys: Sequence[str | None], source: str) -> dict[str, str | None]:
    wanted = ", ".join(map(repr, inputs))
    if None in keys:
        if len(inputs) != 1:
            raise DataError(
                f"{source}: the model has {len(inputs)} inputs ({wanted}), the data gives one array without a name: "
                "say which array feeds which with --inputs 'model input=array,...'"
            )
        return {inputs[0]: None}
    for name in inputs:
        if name not in keys:
            raise DataError(
                f"{source}: nothing feeds the model input {name!r}; the data gives {', '.join(map(repr, keys))}: "
                "say which array feeds which with --inputs 'model input=array,...'"
            )
    for key in keys:
        if key not in inputs:
            raise DataError(
                f"{source}: the model has no input {key!r}: {suggest(str(key), inputs)} (its inputs are {wanted})"
            )
    return {name: name for name in inputs}


def _check_shape(feed: Feed, made: np.ndarray, raw: np.ndarray, layout: Layout | None, source: str) -> None:
    if feed.type.shape is None:
        return
    axis = feed.type.batch_axis
    if axis is None:
        raise DataError(
            f"model input {feed.name!r} ({feed.type}) has no batch axis, so it cannot take samples one by one"
        )
    expected = feed.type.sample_shape
    found = tuple(size for place, size in enumerate(made.shape) if place != axis)
    if len(found) == len(expected) and all(
        not isinstance(want, int) or want == have for want, have in zip(expected, found, strict=True)
    ):
        return
    steps = "" if raw.shape[1:] == found else f" (raw: {dims(raw.shape[1:])})"
    raise DataError(
        f"{source}: model input {feed.name!r} expects samples of {dims(expected)}, the data gives "
        f"{dims(found)}{steps}{_advice(expected, found, layout, moved=bool(steps))}"
    )


def _advice(expected: tuple[Dim, ...], found: tuple[int, ...], layout: Layout | None, *, moved: bool) -> str:
    if len(expected) != 3 or len(found) != 3 or not all(isinstance(size, int) for size in expected):
        return ""
    sizes = [size for size in expected if isinstance(size, int)]
    if sizes == [found[2], found[0], found[1]]:
        as_said = layout == "nhwc" or (layout is not None and moved)
        return ": say --model-layout nchw" if as_said else ": say --layout nhwc, so that channels move first"
    if sizes == [found[1], found[2], found[0]]:
        return ": say --layout nchw and --model-layout nhwc"
    first = sizes[0] in (1, 3) or found[0] in (1, 3)
    channels, size = ((sizes[0], found[0]), sizes[1:]) if first else ((sizes[2], found[2]), sizes[:2])
    advice = []
    if channels[0] != channels[1] and channels[0] in (1, 3):
        advice.append(f"--colour {'rgb' if channels[0] == 3 else 'grey'}")
    if size != list(found[1:] if first else found[:2]):
        advice.append(f"--resize {size[0]}x{size[1]}")
    return f": say {' and '.join(advice)}" if advice else ""


def check_classes(source: DataSource, splits: Splits, num_classes: int) -> None:
    """Check labels against the model's number of classes.

    Raises:
        DataError: a label out of range, or another number of classes; the classes are listed.
    """
    known = source.classes
    listed = "" if known is None else f": {', '.join(known[:20])}{', ...' if len(known) > 20 else ''}"
    if known is not None and len(known) != num_classes:
        raise DataError(
            f"{source.name}: the data has {len(known)} classes{listed}; the model has {num_classes} outputs"
        )
    highest = -1
    for part in sorted({split.part for _, split in splits.items()}):
        labels = source.labels(part)
        if labels is None:
            raise DataError(f"{source.name}: no labels; name them with --label-key, or use --labels none")
        low, high = int(labels.min()), int(labels.max())
        highest = max(highest, high)
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            hint = " (-1 often stands for a hidden label: use another part, or --labels none)" if low == -1 else ""
            first = int(np.flatnonzero(labels == wrong)[0])
            raise DataError(
                f"{source.name}: sample {first} of part {part!r} has label {wrong}, but the model has "
                f"{num_classes} classes, 0 to {num_classes - 1}{listed}{hint}"
            )
    if known is None and highest + 1 < num_classes:
        raise DataError(
            f"{source.name}: labels go from 0 to {highest}, {highest + 1} classes, but the model has {num_classes} "
            "outputs; if the data really holds only some of the model's classes, give it their names "
            f"('classes', {num_classes} of them)"
        )
