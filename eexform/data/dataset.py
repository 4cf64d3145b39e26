"""A data set as training, search and verification use it: batches that fit the model, of one of the four splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from eexform.data._binding import Feed, bind_inputs, check_classes
from eexform.data.augment import Augment, Mix
from eexform.data.cache import PixelCache
from eexform.data.preprocess import Preprocess
from eexform.data.source import DataSource, Layout, Samples, SourceOptions
from eexform.data.splits import Splits
from eexform.errors import DataError, OptionError
from eexform.ir.graph import Graph

LabelMode = Literal["given", "none"]


@dataclass(frozen=True)
class Batch:
    """Some samples, ready for the model.

    Attributes:
        feeds: per model input, its array, batch on the axis where the model has it.
        labels: int64 ``[n]``; ``None`` in label-free mode.
        indices: int64 ``[n]``: where the samples are in their part.
        positions: int64 ``[n]``: where the samples are in the split, 0 .. size - 1.
        mix: where samples were blended, the other samples' labels and the weight of their own; else ``None``.
    """

    feeds: dict[str, np.ndarray]
    labels: np.ndarray | None
    indices: np.ndarray
    positions: np.ndarray
    mix: Mix | None = None

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Source, preprocessing, splits and augmentation together.

    Make one with :func:`eexform.data.open_dataset` (or from parts), then :meth:`bind` it to a graph: only a bound
    data set gives batches. Memory: two batches (one is prepared in the background), plus what the source and the
    cache state.

    Attributes:
        source: the samples.
        preprocess: what is done to them.
        splits: who sees which.
        augment: what is done to training images on top.
        labels: ``given``, or ``none``: labels are neither needed nor handed out.
        cache: decoded pixels of a costly source, see :mod:`eexform.data.cache`.
        feeds: how the model's inputs are fed; set by :meth:`bind`.
        num_classes: of the model; set by :meth:`bind`.
        origin: the text and options that opened the source, where it was opened by text.
    """

    source: DataSource
    preprocess: Preprocess
    splits: Splits
    augment: Augment = field(default_factory=Augment)
    labels: LabelMode = "given"
    cache: PixelCache | None = field(default=None, repr=False)
    feeds: Mapping[str, Feed] | None = field(default=None, repr=False)
    num_classes: int | None = None
    origin: tuple[str, SourceOptions] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.labels not in ("given", "none"):
            raise OptionError(f"labels: expected 'given' or 'none', found {self.labels!r}")
        self.splits.check(self.source, labels=self.labels == "given")
        if self.cache is not None and not self.cache.serves(self.source, self.preprocess):
            object.__setattr__(self, "cache", None)

    # -- what it is -----------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout | None:
        """Layout of raw images: what the user said, or else what the source knows by construction."""
        return self.preprocess.layout or self.source.layout

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.source.classes

    @cached_property
    def digest(self) -> str:
        """sha-256 of source content, preprocessing, splits, augmentation and label mode."""
        parts = [self.source.digest, self.preprocess.digest, self.splits.digest, str(self.augment), self.labels]
        return hashlib.sha256(json.dumps(["eexform data 1", *parts]).encode()).hexdigest()

    def size(self, split: str) -> int:
        """Number of samples in ``split``."""
        return len(self.splits[split])

    def labels_of(self, split: str) -> np.ndarray | None:
        """Labels of the samples of ``split`` in its order, int64; ``None`` in label-free mode."""
        if self.labels == "none":
            return None
        chosen = self.splits[split]
        labels = self.source.labels(chosen.part)
        return None if labels is None else labels[chosen.indices]

    def describe(self) -> dict[str, Any]:
        """Plain JSON values for reports."""
        return {
            "source": self.source.name,
            "parts": dict(self.source.parts),
            "classes": None if self.classes is None else list(self.classes),
            "splits": {name: {"part": split.part, "samples": len(split)} for name, split in self.splits.items()},
            "seed": self.splits.seed,
            "preprocess": self.preprocess.to_json(),
            "augment": str(self.augment),
            "labels": self.labels,
        }

    # -- fitting it to a model -----------------------------------------------------------------------------------

    def bind(self, graph: Graph) -> Dataset:
        """This data set, checked against ``graph``: every input fed, shapes and types equal, labels within its classes.

        Raises:
            DataError: they do not fit; the message says what was expected, what was found and which option helps.
            OptionError: augmentation of what is no image.
        """
        types = graph.types
        split = self.splits.head_train
        samples = self._raw(split.part, split.indices[:1])
        inputs = {name: types[name] for name in graph.inputs}
        feeds = bind_inputs(inputs, samples, self.preprocess, self.layout, self.source.name)
        if self.augment.active:
            self._image_key(samples)
        num_classes = graph.num_classes
        if self.labels == "given":
            check_classes(self.source, self.splits, num_classes)
        return replace(self, feeds=feeds, num_classes=num_classes)

    def with_augment(self, augment: Augment | str) -> Dataset:
        """The same data set with another augmentation."""
        chosen = Augment.parse(augment) if isinstance(augment, str) else augment
        if chosen.active and self.feeds is not None:
            split = self.splits.head_train
            self._image_key(self._raw(split.part, split.indices[:1]))
        return replace(self, augment=chosen)

    # -- batches -----------------------------------------------------------------------------------

    def batch(
        self, split: str, positions: np.ndarray, *, augment: bool = False, seed: int = 0, epoch: int = 0
    ) -> Batch:
        """The samples at ``positions`` (int64 ``[n]``, 0 .. size - 1) of ``split``, in that order.

        Raises:
            DataError: NaN or infinity in a sample (which one is said), images that cannot be decoded or differ in size.
        """
        if self.feeds is None:
            raise DataError("the data set is not bound to a model yet: use the one that Dataset.bind(graph) returns")
        chosen = self.splits[split]
        positions = np.asarray(positions, dtype=np.int64)
        indices = chosen.indices[positions]
        samples = self._raw(chosen.part, indices)
        known = self.source.labels(chosen.part) if self.labels == "given" else None
        labels = None if known is None else known[indices]
        mix: Mix | None = None
        inputs = dict(samples.inputs)
        if augment and self.augment.active:
            key, layout = self._image_key(samples)
            images = self.augment.apply(np.asarray(inputs[key]), layout, seed=seed, epoch=epoch, indices=indices)
            images, mix = self.augment.mix(images, labels, layout, seed=seed, epoch=epoch, indices=indices)
            inputs[key] = images
        feeds = {
            name: feed.make(np.asarray(inputs[feed.key]), self.preprocess, self.layout, self.source.name)
            for name, feed in self.feeds.items()
        }
        return Batch(feeds, labels, indices, positions, mix)

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int | None = None,
        augment: bool = False,
        epoch: int = 0,
        drop_last: bool = False,
        prefetch: bool = True,
    ) -> Iterator[Batch]:
        """Every sample of ``split`` once.

        Args:
            split: ``head_train``, ``calibrate``, ``select`` or ``test``.
            batch_size: samples per batch; the last batch may be smaller.
            seed: shuffles (differently in every epoch) and seeds augmentation; ``None``: in the order of the split.
            augment: apply :attr:`augment`.
            epoch: from 0.
            drop_last: leave out a smaller last batch.
            prefetch: prepare the next batch in a thread while the caller works on this one.
        """
        if batch_size < 1:
            raise OptionError(f"batch size: expected at least 1, found {batch_size}")
        size = self.size(split)
        order = np.arange(size) if seed is None else np.random.default_rng([seed, epoch]).permutation(size)
        stop = size - size % batch_size if drop_last else size
        chunks = [order[start : start + batch_size] for start in range(0, stop, batch_size)]

        def make(positions: np.ndarray) -> Batch:
            return self.batch(split, positions, augment=augment, seed=seed or 0, epoch=epoch)

        return _ahead(make, chunks) if prefetch and len(chunks) > 1 else map(make, chunks)

    def sample_feeds(self, split: str, count: int) -> dict[str, np.ndarray]:
        """Feeds of the first ``count`` samples of ``split``, starting over where it is smaller."""
        return self.batch(split, np.arange(count) % self.size(split)).feeds

    # -- raw samples -----------------------------------------------------------------------------------

    def _raw(self, part: str, indices: np.ndarray) -> Samples:
        """Samples after geometry, every input one array; NaN and infinity refused."""
        if self.cache is not None:
            samples = self.cache.fetch(part, indices)
        else:
            fetched = self.source.fetch(part, indices)
            name = f"{self.source.name}, part {part!r}"
            inputs = {}
            for key, raw in fetched.inputs.items():
                image = not isinstance(raw, np.ndarray) or raw.ndim == 4 or len(fetched.inputs) == 1
                inputs[key] = self.preprocess.geometry(raw, self.layout, name) if image else raw
            samples = Samples(inputs)
        for key, array in samples.inputs.items():
            if isinstance(array, np.ndarray) and array.dtype.kind == "f" and not np.isfinite(array).all():
                bad = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1))[0]
                where = "" if key is None else f", input {key!r}"
                raise DataError(
                    f"{self.source.name}: sample {indices[bad]} of part {part!r}{where} holds NaN or infinity: "
                    "clean the data or leave the sample out"
                )
        return samples

    def _image_key(self, samples: Samples) -> tuple[str | None, Layout]:
        """Which input holds images, and their layout."""
        images = [key for key, array in samples.inputs.items() if isinstance(array, np.ndarray) and array.ndim == 4]
        if len(images) != 1:
            shapes = ", ".join("x".join(map(str, np.shape(array)[1:])) for array in samples.inputs.values())
            raise OptionError(
                f"augmentation {str(self.augment)!r} is for images; samples of {self.source.name} are {shapes}: "
                "use --augment none"
            )
        if self.layout is None:
            raise OptionError(
                f"augmentation {str(self.augment)!r}: the layout of {self.source.name} is not known: "
                "say --layout nhwc or nchw"
            )
        return images[0], self.layout


def _ahead(make: Any, chunks: list[np.ndarray]) -> Iterator[Batch]:
    """``make(chunk)`` for each chunk, one ahead in a thread; its errors surface where the batch is due."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="eexform-data") as pool:
        pending = pool.submit(make, chunks[0])
        for chunk in chunks[1:]:
            ready = pending.result()
            pending = pool.submit(make, chunk)
            yield ready
        yield pending.result()
