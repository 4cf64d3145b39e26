"""Small sources and a stand-in for a graph, so that data tests need no model."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from eexform.data import ArraySource
from eexform.ir.types import TensorType


def model(num_classes: int = 3, dtype: str = "float32", batch_axis: int = 0, **inputs: tuple[Any, ...]) -> Any:
    """What ``Dataset.bind`` reads of a graph: inputs, types, number of classes; shapes without batch."""
    types = {}
    for name, shape in inputs.items():
        whole = list(shape)
        whole.insert(batch_axis, "N")
        types[name] = TensorType(np.dtype(dtype), tuple(whole), batch_axis)
    return SimpleNamespace(inputs=tuple(inputs), types=types, num_classes=num_classes)


def images_source(n: int = 60, shape: tuple[int, ...] = (8, 8, 3), classes: int = 3, **options: Any) -> ArraySource:
    """Random 8-bit images of one part, labels 0, 1, 2, 0, 1, 2, ..."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    return ArraySource("toy", {"all": ({None: pixels}, np.arange(n) % classes)}, layout="nhwc", **options)


def parts_source(**sizes: int) -> ArraySource:
    """Vectors that hold their own index, three classes, parts of the given sizes."""
    return ArraySource(
        "toy",
        {part: ({None: np.arange(n, dtype=np.float32)[:, None]}, np.arange(n) % 3) for part, n in sizes.items()},
    )


def write_image(path: Any, seed: int = 0, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> np.ndarray:
    """Save a random image of ``size`` (height, width); returns its pixels."""
    rng = np.random.default_rng(seed)
    shape = size if mode == "L" else (*size, len(mode))
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels
