"""Augmentation of image batches, seeded per sample.

Given as text: ``none`` or a comma-separated list of

    flip             left-right, for half of the samples
    crop:4           shift by up to 4 pixels, zeros move in; ``crop:4:reflect`` mirrors the image instead
    jitter:0.2       brightness, contrast and (for RGB) saturation by factors in 1 +- 0.2
    cutout:8         an 8x8 square takes the image's mean; it may hang over the edge (DeVries and Taylor 2017)
    mixup:0.4        blend with another sample of the batch, weight from Beta(0.4, 0.4) (Zhang et al. 2018)
    cutmix:1.0       paste a rectangle of another sample, area from Beta(1, 1) (Yun et al. 2019)

and applied in that order, on raw pixels before :meth:`Preprocess.values`. What happens to one sample depends on
seed, epoch and sample index alone, whatever the batch; only mixup and cutmix also depend on who else is in the
batch. With both, each batch takes one of the two at random.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from eexform.data.source import Layout
from eexform.errors import OptionError, suggest

Mix = tuple["np.ndarray | None", np.ndarray]
"""Labels of the other samples (int64 ``[n]``) and the weight of a sample's own label (float32 ``[n]``, in 0..1)."""

_STREAMS = {
    name: number for number, name in enumerate(("flip", "y", "x", "bright", "contrast", "colour", "cut_y", "cut_x"))
}


@dataclass(frozen=True)
class Augment:
    """What is done to training images; the default does nothing.

    Attributes:
        flip: mirror half of the samples.
        crop: largest shift in pixels.
        reflect: mirror the image outside its edges where ``crop`` shifts it; else zeros.
        jitter: largest relative change of brightness, contrast and saturation.
        cutout: edge of the square that is blanked.
        mixup: parameter of the Beta distribution; 0 is off.
        cutmix: parameter of the Beta distribution; 0 is off.
    """

    flip: bool = False
    crop: int = 0
    reflect: bool = False
    jitter: float = 0.0
    cutout: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < 1e6:
                raise OptionError(f"augmentation: {field.name}: expected a number from 0, found {value}")
        if self.jitter > 1:
            raise OptionError(f"augmentation: jitter: expected at most 1, found {self.jitter}")
        if self.reflect and not self.crop:
            raise OptionError("augmentation: 'reflect' says how 'crop' fills; give crop:PIXELS:reflect")

    @classmethod
    def parse(cls, text: str) -> Augment:
        """From text as in the module's description.

        Raises:
            OptionError: an unknown name, a missing or a bad number.
        """
        result = cls()
        for item in (piece.strip() for piece in text.split(",")):
            if item in ("", "none"):
                continue
            name, *arguments = item.split(":")
            if name not in _CONVERT:
                raise OptionError(f"augmentation: {name!r} is not known: {suggest(name, ('none', *_CONVERT))}")
            reflect = name == "crop" and arguments[1:] == ["reflect"]
            if len(arguments) != (0 if name == "flip" else 2 if reflect else 1):
                form = name if name == "flip" else f"{name}:NUMBER"
                raise OptionError(f"augmentation: {item!r}: expected {form}")
            try:
                value = True if name == "flip" else _CONVERT[name](arguments[0])
            except ValueError as error:
                raise OptionError(f"augmentation: {item!r}: {arguments[0]!r} is not a valid number") from error
            if not value > 0:
                raise OptionError(f"augmentation: {item!r}: expected a number above 0; leave it out to turn it off")
            changes: dict[str, Any] = {name: value}
            if reflect:
                changes["reflect"] = True
            result = replace(result, **changes)
        return result

    def __str__(self) -> str:
        """The canonical text: :meth:`parse` gives the same value back."""
        items = ["flip"] if self.flip else []
        if self.crop:
            items.append(f"crop:{self.crop}" + (":reflect" if self.reflect else ""))
        for name in ("jitter", "cutout", "mixup", "cutmix"):
            value = getattr(self, name)
            if value:
                short = f"{value:g}"
                items.append(f"{name}:{short if float(short) == value else repr(value)}")
        return ",".join(items) or "none"

    @property
    def active(self) -> bool:
        return self != Augment()

    @property
    def mixes(self) -> bool:
        return bool(self.mixup or self.cutmix)

    def apply(self, batch: np.ndarray, layout: Layout, *, seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
        """The per-sample part, on raw images.

        Args:
            batch: ``[n, H, W, C]`` or ``[n, C, H, W]`` as ``layout`` says; not changed.
            layout: of ``batch`` and of the result.
            seed: of the training run.
            epoch: from 0.
            indices: ``[n]``: the samples' indices in their part.

        Returns:
            The same shape; the same type, except float32 where ``jitter`` is on.
        """
        first = layout == "nchw"
        images = np.moveaxis(batch, 1, -1) if first else batch

        def uniform(stream: str) -> np.ndarray:
            return uniforms(seed, epoch, indices, _STREAMS[stream])

        height, width = images.shape[1:3]
        if self.flip or self.crop:
            span = 2 * self.crop + 1
            top = (uniform("y") * span).astype(np.int64)
            left = (uniform("x") * span).astype(np.int64)
            mirrored = uniform("flip") < 0.5 if self.flip else np.zeros(len(images), dtype=bool)
            images = _shift(images, self.crop, self.reflect, top, left, mirrored)
        if self.jitter:
            factors = [1 + self.jitter * (2 * uniform(name) - 1) for name in ("bright", "contrast", "colour")]
            images = _jitter(images, *factors)
        if self.cutout:
            rows = (uniform("cut_y") * height).astype(np.int64) - self.cutout // 2
            columns = (uniform("cut_x") * width).astype(np.int64) - self.cutout // 2
            images = _cutout(images, self.cutout, rows, columns)
        return np.moveaxis(images, -1, 1) if first else images

    def mix(
        self,
        batch: np.ndarray,
        labels: np.ndarray | None,
        layout: Layout,
        *,
        seed: int,
        epoch: int,
        indices: np.ndarray,
    ) -> tuple[np.ndarray, Mix | None]:
        """The part that blends samples of a batch (mixup, cutmix).

        Returns:
            The mixed float32 batch and what became of the labels; the batch as it is and ``None`` where neither is on.
        """
        if not self.mixes:
            return batch, None
        rng = np.random.default_rng([seed, epoch, *np.asarray(indices[:4], dtype=np.uint32).tolist(), len(indices)])
        others = rng.permutation(len(batch))
        use_cutmix = bool(self.cutmix) and (not self.mixup or rng.random() < 0.5)
        alpha = self.cutmix if use_cutmix else self.mixup
        own = rng.beta(alpha, alpha, size=len(batch)).astype(np.float32)
        mixed = np.array(batch, dtype=np.float32)
        if use_cutmix:
            images, donors = (np.moveaxis(a, 1, -1) if layout == "nchw" else a for a in (mixed, batch))
            own = _paste(images, donors, others, own, rng)
        else:
            weight = own.reshape(-1, 1, 1, 1)
            mixed *= weight
            mixed += (1 - weight) * batch[others].astype(np.float32)
        return mixed, (None if labels is None else labels[others], own)


_CONVERT: dict[str, Any] = {
    "flip": bool,
    "crop": int,
    "jitter": float,
    "cutout": int,
    "mixup": float,
    "cutmix": float,
}


def uniforms(seed: int, epoch: int, indices: np.ndarray, stream: int) -> np.ndarray:
    """One number in [0, 1) per sample, a function of the four arguments only.

    The finaliser of SplitMix64 (Steele, Lea and Flood, 2014) over a counter: a generator object per sample would
    cost more than the augmentation itself.
    """
    base = np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)[0]
    with np.errstate(over="ignore"):
        state = (np.asarray(indices).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + base
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _shift(
    images: np.ndarray, pad: int, reflect: bool, top: np.ndarray, left: np.ndarray, mirrored: np.ndarray
) -> np.ndarray:
    n, height, width, _ = images.shape
    if reflect and pad >= min(height, width):
        raise OptionError(
            f"augmentation: crop:{pad}:reflect needs images larger than {pad} pixels, not {height}x{width}"
        )
    wide = images
    if pad:
        wide = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect" if reflect else "constant")
    result = np.empty((n, height, width, images.shape[3]), images.dtype)
    # one slice copy per sample: measured at half the time of one gather over the whole batch
    for i, (y, x, mirror) in enumerate(zip(top.tolist(), left.tolist(), mirrored.tolist(), strict=True)):
        window = wide[i, y : y + height, x : x + width]
        result[i] = window[:, ::-1] if mirror else window
    return result


def _jitter(images: np.ndarray, bright: np.ndarray, contrast: np.ndarray, colour: np.ndarray) -> np.ndarray:
    result = images.astype(np.float32)
    column = (-1, 1, 1, 1)
    # around its mean m: x -> b (c (x - m) + m), brightness and contrast in one go
    mean = result.mean(axis=(1, 2, 3), keepdims=True)
    result *= (bright * contrast).astype(np.float32).reshape(column)
    result += mean * (bright * (1 - contrast)).astype(np.float32).reshape(column)
    if images.shape[3] == 3:
        grey = (result @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None]
        saturation = colour.astype(np.float32).reshape(column)
        result *= saturation
        result += (1 - saturation) * grey
    if np.issubdtype(images.dtype, np.integer):
        np.clip(result, 0, np.iinfo(images.dtype).max, out=result)
    return result


def _cutout(images: np.ndarray, edge: int, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    result = images.copy()
    # rows first: long contiguous additions, several times faster than one mean over both axes
    sums = images.sum(axis=1, dtype=np.float32).sum(axis=1)
    means = (sums / (images.shape[1] * images.shape[2])).astype(images.dtype)
    for i, (y, x) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        result[i, max(y, 0) : max(y + edge, 0), max(x, 0) : max(x + edge, 0)] = means[i]
    return result


def _paste(
    images: np.ndarray, donors: np.ndarray, others: np.ndarray, own: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Paste a rectangle of about ``1 - own`` of the area; returns the share that stayed, float32 ``[n]``."""
    n, height, width, _ = images.shape
    edge = np.sqrt(1 - own)
    rows, columns = np.rint(edge * height).astype(int), np.rint(edge * width).astype(int)
    tops = (rng.random(n) * height).astype(int) - rows // 2
    lefts = (rng.random(n) * width).astype(int) - columns // 2
    stayed = np.empty(n, dtype=np.float32)
    for i in range(n):
        y0, y1 = max(tops[i], 0), min(tops[i] + rows[i], height)
        x0, x1 = max(lefts[i], 0), min(lefts[i] + columns[i], width)
        images[i, y0:y1, x0:x1] = donors[others[i], y0:y1, x0:x1]
        stayed[i] = 1 - (y1 - y0) * (x1 - x0) / (height * width)
    return stayed
