"""From raw samples to what the model takes. Every step is said by the user and stored with the run; none is guessed.

Order: colour, resize, centre crop (all on raw pixels), then to float, multiply by ``scale``, subtract ``mean``,
divide by ``std``, and the layout of the model. Augmentation comes between geometry and values.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Any, cast

import numpy as np

from eexform.data import images
from eexform.data.images import Colour
from eexform.data.source import Layout, Raw, dims
from eexform.errors import DataError, OptionError, suggest

PRESETS: dict[str, dict[str, Any]] = {
    "imagenet": {"scale": 1 / 255, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
}
"""Named settings, used only where the user names them. ``imagenet``: torchvision's, for 8-bit RGB pixels."""


@dataclass(frozen=True)
class Preprocess:
    """How raw samples become model inputs.

    ``scale``, ``mean`` and ``std`` apply to inputs that the model takes as floating-point numbers; geometry applies to
    images (four-dimensional inputs whose layout is known). Token ids and masks pass untouched.

    Attributes:
        layout: of raw images, where the source does not know it (``.npz``, factories); ``None``: leave axes alone.
        model_layout: layout that the model takes.
        scale: factor for raw values, such as 1/255.
        mean: subtracted after scaling; one number, or one per channel.
        std: divisor after that; one number, or one per channel.
        resize: (height, width), or one number for the shorter edge; bilinear.
        crop: (height, width) of a centre crop after resizing.
        colour: ``rgb`` or ``grey``: convert channels; ``None``: leave them.
    """

    layout: Layout | None = None
    model_layout: Layout = "nchw"
    scale: float = 1.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: tuple[int, int] | int | None = None
    crop: tuple[int, int] | None = None
    colour: Colour | None = None

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("layout", self.layout, ("nhwc", "nchw", None)),
            ("model layout", self.model_layout, ("nhwc", "nchw")),
            ("colour", self.colour, ("rgb", "grey", None)),
        ):
            if value not in choices:
                listed = " or ".join(repr(choice) for choice in choices if choice)
                raise OptionError(f"{name}: expected {listed}, found {value!r}")
        object.__setattr__(self, "scale", _number(self.scale, "scale"))
        if not math.isfinite(self.scale) or self.scale == 0:
            raise OptionError(f"scale: expected a finite number other than 0, found {self.scale}")
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if numbers is None:
                continue
            numbers = _numbers(numbers, name)
            if not numbers or not all(map(math.isfinite, numbers)):
                raise OptionError(f"{name}: expected finite numbers, found {list(numbers)}")
            if name == "std" and min(numbers) <= 0:
                raise OptionError(f"std: expected numbers above 0, found {list(numbers)}")
            object.__setattr__(self, name, numbers)
        for name in ("resize", "crop"):
            size = getattr(self, name)
            if isinstance(size, (list, tuple)):
                size = tuple(size)
                object.__setattr__(self, name, size)
            edges = (size,) if isinstance(size, int) else size
            if edges is not None and (
                (isinstance(size, tuple) and len(size) != 2)
                or (name == "crop" and isinstance(size, int))
                or any(not isinstance(edge, int) or isinstance(edge, bool) or edge < 1 for edge in edges)
            ):
                raise OptionError(f"{name}: expected height and width in pixels, found {size!r}")

    @classmethod
    def parse(
        cls,
        *,
        preset: str | None = None,
        layout: str | None = None,
        model_layout: str | None = None,
        scale: str | float | None = None,
        mean: str | float | Sequence[float] | None = None,
        std: str | float | Sequence[float] | None = None,
        resize: str | int | Sequence[int] | None = None,
        crop: str | int | Sequence[int] | None = None,
        colour: str | None = None,
    ) -> Preprocess:
        """From text, as the command line gives it: ``scale="1/255"``, ``mean="0.5,0.5,0.5"``, ``resize="32x32"``.

        Raises:
            OptionError: not of that form; or a preset together with the values that it sets.
        """
        given: dict[str, Any] = {}
        if preset is not None:
            if preset not in PRESETS:
                raise OptionError(f"preset: {preset!r} is not known: {suggest(preset, PRESETS)}")
            clash = [name for name, value in (("scale", scale), ("mean", mean), ("std", std)) if value is not None]
            if clash:
                raise OptionError(f"preset {preset!r} already sets scale, mean and std: leave out --{clash[0]}")
            given.update(PRESETS[preset])
        if scale is not None:
            given["scale"] = _number(scale, "scale")
        for name, numbers in (("mean", mean), ("std", std)):
            if numbers is not None:
                given[name] = _numbers(numbers, name)
        for name, size in (("resize", resize), ("crop", crop)):
            if size is not None:
                parsed = _size(size, name)
                given[name] = (parsed, parsed) if name == "crop" and isinstance(parsed, int) else parsed
        for name, word in (("layout", layout), ("model_layout", model_layout), ("colour", colour)):
            if word is not None:
                given[name] = word.lower()
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, every field."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Preprocess:
        """The inverse of :meth:`to_json`.

        Raises:
            OptionError: a key that this version does not know, or a value that is not valid.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(plain) - known)
        if unknown:
            raise OptionError(f"preprocessing: {unknown[0]!r} is not known: {suggest(unknown[0], known)}")
        given: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in plain.items()
        }
        return cls(**given)

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @property
    def has_geometry(self) -> bool:
        """Whether pixels are converted, resized or cropped."""
        return self.resize is not None or self.crop is not None or self.colour is not None

    def geometry(self, raw: Raw, layout: Layout | None, name: str) -> np.ndarray:
        """Colour, resize and crop: ``n`` raw samples to one array in the same layout.

        Args:
            raw: samples as the source gave them.
            layout: of the raw images, the source's or the option's.
            name: of the data, for messages.

        Raises:
            DataError: images of different sizes and no ``resize``; geometry asked for what is no image.
        """
        if isinstance(raw, np.ndarray) and not self.has_geometry:
            return raw
        if isinstance(raw, np.ndarray) and (raw.ndim != 4 or layout is None):
            if raw.ndim == 4:
                raise DataError(
                    f"{name}: to resize, crop or recolour, the layout must be known: "
                    f"say --layout nhwc or nchw (samples are {dims(raw.shape[1:])})"
                )
            raise DataError(f"{name}: --resize, --crop and --colour are for images; samples are {dims(raw.shape[1:])}")
        first = layout == "nchw"
        batch: Raw = np.moveaxis(raw, 1, -1) if first and isinstance(raw, np.ndarray) else raw
        if self.colour is not None and isinstance(batch, np.ndarray):
            batch = images.recolour(batch, self.colour)
        done = batch
        if not isinstance(batch, np.ndarray) or self.resize is not None or self.crop is not None:
            done = images.stack([self._one(np.asarray(image)) for image in batch])
        if not isinstance(done, np.ndarray):
            raise DataError(_uneven(done, name))
        return np.moveaxis(done, -1, 1) if first else done

    def _one(self, image: np.ndarray) -> np.ndarray:
        if self.colour is not None:
            image = images.recolour(image, self.colour)
        if self.resize is not None:
            image = images.resize(image, self.resize)
        return image if self.crop is None else images.centre_crop(image, self.crop)

    def arrange(self, raw: np.ndarray, layout: Layout | None) -> np.ndarray:
        """Images in the model's layout (a view): ``[n, H, W, C]`` to ``[n, C, H, W]`` or back."""
        if raw.ndim != 4 or layout is None or layout == self.model_layout:
            return raw
        return np.moveaxis(raw, -1, 1) if self.model_layout == "nchw" else np.moveaxis(raw, 1, -1)

    def values(self, raw: np.ndarray, layout: Layout | None, name: str) -> np.ndarray:
        """Layout, float32, scale, mean and std: ``[n, ...]`` float32, newly allocated.

        Raises:
            DataError: ``mean`` or ``std`` per channel where the channel axis is not known or has another size.
        """
        # the layout goes first: after the conversion to float there are four times the bytes to move
        raw = self.arrange(raw, layout)
        image = raw.ndim == 4 and layout is not None
        channel = 1 if image and self.model_layout == "nchw" else raw.ndim - 1
        result = np.array(raw, dtype=np.float32, order="C")
        if self.scale != 1.0:
            result *= np.float32(self.scale)
        for option, numbers in (("mean", self.mean), ("std", self.std)):
            if numbers is None:
                continue
            if len(numbers) > 1 and not image:
                raise DataError(
                    f"{name}: --{option} has {len(numbers)} numbers, one per channel, but the channel axis is "
                    f"not known: say --layout nhwc or nchw (samples are {dims(raw.shape[1:])})"
                )
            if len(numbers) not in (1, raw.shape[channel]):
                raise DataError(
                    f"{name}: --{option} has {len(numbers)} numbers, the images {raw.shape[channel]} channels "
                    f"(samples are {dims(raw.shape[1:])} after the layout change)"
                )
            shape = [1] * raw.ndim
            shape[channel] = len(numbers)
            operand = np.array(numbers, dtype=np.float32).reshape(shape)
            if option == "mean":
                result -= operand
            else:
                result /= operand
        return result


def _number(text: str | float, name: str) -> float:
    if isinstance(text, (int, float, np.number)):
        return float(text)
    try:
        # Fraction reads "1/255" and decimals, and evaluates nothing
        return float(Fraction(str(text).strip().replace(" ", "")))
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise OptionError(f"{name}: expected a number such as 0.5 or 1/255, found {text!r}") from error


def _numbers(text: str | float | Sequence[float], name: str) -> tuple[float, ...]:
    if isinstance(text, str):
        if text in PRESETS:
            return cast(tuple[float, ...], PRESETS[text][name])
        return tuple(_number(piece, name) for piece in text.split(",") if piece.strip())
    return (float(text),) if isinstance(text, (int, float)) else tuple(_number(number, name) for number in text)


def _size(text: str | int | Sequence[int], name: str) -> tuple[int, int] | int:
    pieces = text.lower().replace(",", "x").split("x") if isinstance(text, str) else text
    try:
        edges = [pieces] if isinstance(pieces, int) else [int(piece) for piece in pieces]
    except ValueError:
        edges = []
    if len(edges) == 1:
        return edges[0]
    if len(edges) == 2:
        return edges[0], edges[1]
    raise OptionError(f"{name}: expected HEIGHTxWIDTH such as 32x32, or one number, found {text!r}")


def _uneven(batch: list[np.ndarray], name: str) -> str:
    sizes = sorted({image.shape[:2] for image in batch})
    channels = sorted({image.shape[2] for image in batch})
    if len(sizes) > 1:
        shown = ", ".join(f"{height}x{width}" for height, width in sizes[:4])
        more = f" and {len(sizes) - 4} more" if len(sizes) > 4 else ""
        return f"{name}: images differ in size ({shown}{more}): say --resize HEIGHTxWIDTH"
    if len(channels) > 1:
        return f"{name}: images have {' and '.join(map(str, channels))} channels: say --colour rgb or --colour grey"
    depths = ", ".join(sorted({str(image.dtype) for image in batch}))
    return f"{name}: images differ in depth ({depths}): convert them first"
