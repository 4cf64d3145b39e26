"""Pixels: decoding image files and the geometry of images, ``[H, W, C]`` each."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from eexform.data.source import Raw
from eexform.errors import DataError

Colour = Literal["rgb", "grey"]

# Pillow modes that are pixels as they stand; others are expanded to what they mean.
_PLAIN = {"L", "LA", "RGB", "RGBA", "I;16", "I;16L", "F", "I"}
_EXPANDED = {
    "1": "L",
    "CMYK": "RGB",
    "YCbCr": "RGB",
    "LAB": "RGB",
    "HSV": "RGB",
    "RGBX": "RGB",
    "PA": "RGBA",
    "La": "LA",
}


def decode(data: bytes | Path, where: str) -> np.ndarray:
    """An image as ``[H, W, C]``; C is 1 for grey, 3 for RGB, one more with an alpha channel. uint8, unless deeper.

    Raises:
        DataError: not an image, cut off, or too large to be one; ``where`` says which.
    """
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as opened:
            opened.load()
            image: Image.Image = opened
            mode = image.mode
            if mode == "P":
                image = image.convert("RGBA" if "transparency" in image.info else "RGB")
            elif mode not in _PLAIN:
                image = image.convert(_EXPANDED.get(mode, "RGB"))
            pixels = np.array(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: not an image that can be read, or damaged ({error})") from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def stack(images: list[np.ndarray]) -> Raw:
    """One array where all images agree in shape and type, else the list."""
    if len({(image.shape, image.dtype) for image in images}) == 1:
        return np.stack(images)
    return images


def recolour(image: np.ndarray, colour: Colour) -> np.ndarray:
    """``[..., H, W, C]`` with three channels (``rgb``) or one (``grey``, luma after ITU-R 601); alpha is dropped."""
    channels = image.shape[-1]
    if channels not in (1, 2, 3, 4):
        raise DataError(f"--colour {colour}: expected images of 1 to 4 channels, found {channels}")
    if channels in (2, 4):
        image = image[..., : channels - 1]
        channels -= 1
    if colour == "rgb":
        return np.repeat(image, 3, axis=-1) if channels == 1 else image
    if channels == 1:
        return image
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    if np.issubdtype(image.dtype, np.integer):
        grey = np.rint(grey)
    return grey.astype(image.dtype)[..., None]


def resize(image: np.ndarray, size: tuple[int, int] | int) -> np.ndarray:
    """``[H, W, C]`` at ``size`` (height, width), or with its shorter edge at ``size``; Pillow's bilinear filter.

    Integer pixels stay integers (rounded), as in the usual pipelines that resize before they convert to float.
    """
    height, width = image.shape[:2]
    if isinstance(size, int):
        short = min(height, width)
        size = (max(1, height * size // short), max(1, width * size // short))
    if (height, width) == size:
        return image
    target = (size[1], size[0])
    if image.dtype == np.uint8 and image.shape[2] in (1, 3, 4):
        pixels = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        resized = np.asarray(pixels.resize(target, Image.Resampling.BILINEAR))
        return resized[:, :, None] if resized.ndim == 2 else resized
    planes = [
        np.asarray(Image.fromarray(image[:, :, c].astype(np.float32)).resize(target, Image.Resampling.BILINEAR))
        for c in range(image.shape[2])
    ]
    whole = np.stack(planes, axis=-1)
    if np.issubdtype(image.dtype, np.integer):
        limits = np.iinfo(image.dtype)
        return np.clip(np.rint(whole), limits.min, limits.max).astype(image.dtype)
    return whole.astype(image.dtype)


def centre_crop(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle ``size`` (height, width) of ``[H, W, C]``.

    Raises:
        DataError: the image is smaller than that.
    """
    height, width = image.shape[:2]
    if height < size[0] or width < size[1]:
        raise DataError(
            f"--crop {size[0]}x{size[1]}: an image is only {height}x{width}; make it larger first with --resize"
        )
    top, left = (height - size[0] + 1) // 2, (width - size[1] + 1) // 2
    return image[top : top + size[0], left : left + size[1]]
