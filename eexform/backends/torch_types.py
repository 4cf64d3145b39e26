"""Arrays to torch tensors and back, the element types that numpy itself does not have included."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch

from eexform.errors import ModelError

# numpy knows these only as types that the package ml_dtypes adds, which torch cannot read: they pass as raw bits
_BITS: dict[str, tuple[torch.dtype, Any, torch.dtype]] = {
    "bfloat16": (torch.bfloat16, np.int16, torch.int16),
    "float8_e4m3fn": (torch.float8_e4m3fn, np.uint8, torch.uint8),
    "float8_e4m3fnuz": (torch.float8_e4m3fnuz, np.uint8, torch.uint8),
    "float8_e5m2": (torch.float8_e5m2, np.uint8, torch.uint8),
    "float8_e5m2fnuz": (torch.float8_e5m2fnuz, np.uint8, torch.uint8),
    "float8_e8m0fnu": (torch.float8_e8m0fnu, np.uint8, torch.uint8),
}
# torch has no such type to compute with: the numbers are carried in another one, which has all of them
_CARRIERS: dict[str, Any] = {
    "int4": np.int8, "int2": np.int8, "uint4": np.uint8, "uint2": np.uint8, "float4_e2m1fn": np.float32,
}  # fmt: skip
_NAMES = {held: name for name, (held, _, _) in _BITS.items()}


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor with a copy of the elements; numbers of 4 and 2 bits are carried in a type that has more.

    Raises:
        ModelError: torch has no such type (strings).
    """
    array = np.asarray(array)
    if array.dtype.name in _CARRIERS:
        array = array.astype(_CARRIERS[array.dtype.name])
    kind = _BITS.get(array.dtype.name)
    if kind is not None:
        return torch.from_numpy(np.array(array).view(kind[1])).view(kind[0])
    try:
        return torch.from_numpy(np.array(array))
    except TypeError as error:
        raise ModelError(f"elements of type {array.dtype.name} do not exist in torch") from error


def to_array(tensor: torch.Tensor, kind: Any = None) -> np.ndarray:
    """A copy of the elements as an array of the same type.

    Args:
        tensor: what to copy.
        kind: type of the elements where the tensor only carries them (see :func:`to_tensor`); else of no account.
    """
    tensor = tensor.detach().cpu().contiguous()
    name = _NAMES.get(tensor.dtype)
    if name is None:
        held = np.array(tensor.numpy())
        return held.astype(kind) if getattr(kind, "name", None) in _CARRIERS else held
    element = onnx.TensorProto.DataType.Value(name.upper().replace("_", "").removesuffix("FNU"))
    return tensor.view(_BITS[name][2]).numpy().view(onnx.helper.tensor_dtype_to_np_dtype(element)).copy()


def torch_type(kind: Any) -> torch.dtype:
    """From an ONNX element type (a number) or a numpy type.

    Raises:
        ModelError: torch has no such type.
    """
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)) if isinstance(kind, int) else np.dtype(kind)
    return to_tensor(np.zeros(1, dtype)).dtype
