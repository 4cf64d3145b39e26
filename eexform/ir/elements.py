"""Element types as numbers in memory: which are floating-point, and how many bits each element takes in a file.

numpy has no bfloat16, no floats of 8 bits or less and no integers below 8 bits; where onnx meets them, the package
ml_dtypes adds types of these names, which numpy's own tests (``np.issubdtype``) take for none of its kinds.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from eexform.ir.inference import element_type, numpy_type

_NAME = re.compile(r"(b?float|u?int|complex)(\d+)")


def dtype_of(kind: Any) -> np.dtype | None:
    """Numpy dtype of what graphsurgeon has as a tensor's dtype; ``None`` where it is unknown."""
    return numpy_type(element_type(kind))


def is_float(dtype: np.dtype) -> bool:
    """Whether elements are floating-point numbers of any width."""
    return dtype.kind == "f" or dtype.name.startswith(("float", "bfloat"))


def bits(dtype: np.dtype) -> int:
    """Bits per element in a file: 4 for int4, of which ONNX packs two into a byte; 0 for text of any length."""
    if dtype.kind == "O":
        return 0
    named = _NAME.match(dtype.name)
    return int(named[2]) if named else 8 * dtype.itemsize


def file_bytes(dtype: np.dtype, elements: int) -> int:
    """Bytes of so many elements in a file; each tensor starts at a byte of its own."""
    return -(-bits(dtype) * elements // 8)
