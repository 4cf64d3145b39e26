"""``digits``: scikit-learn's 1,797 hand-written digits of 8x8 pixels, which need no download."""

from __future__ import annotations

import numpy as np

from eexform.data.arrays import ArraySource
from eexform.data.source import SourceOptions
from eexform.errors import OptionError


class DigitsSource(ArraySource):
    """float32 ``[1, 8, 8]`` with values 0..16, ten classes, one part ``all``."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        images = np.asarray(pixels, dtype=np.float32).reshape(-1, 1, 8, 8)
        super().__init__(
            "digits", {"all": ({None: images}, labels)}, classes=tuple(str(digit) for digit in range(10)), layout="nchw"
        )

    @classmethod
    def open(cls, text: str, options: SourceOptions) -> DigitsSource:
        if text:
            raise OptionError(f"digits:{text}: 'digits' takes nothing after its name")
        options.refuse("digits", "image_key", "label_key", "inputs")
        return cls()
