"""Rules for changes of the element type (see :mod:`eexform.backends.fx`).

Types of four and two bits have no torch type: their numbers are carried in ``int8``, ``uint8`` and ``float32``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from torch import fx

from eexform.backends.fx import Raiser, op
from eexform.backends.torch_types import torch_type
from eexform.errors import ModelError

_TYPE = onnx.TensorProto.DataType
_BITS: dict[int, int] = {_TYPE.INT4: 4, _TYPE.INT2: 2, _TYPE.UINT4: 4, _TYPE.UINT2: 2}
_SIGNED = (_TYPE.INT4, _TYPE.INT2)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
_ROUNDS_TO_448 = 464.0


def element_of(kind: Any) -> int:
    """ONNX element type from a number or a numpy type."""
    return int(kind) if isinstance(kind, int) else int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)))


@op("Cast")
def _cast(raiser: Raiser, node: gs.Node) -> fx.Node:
    return cast_node(raiser, node, raiser.value(node, 0), element_of(node.attrs["to"]))


@op("CastLike")
def _cast_like(raiser: Raiser, node: gs.Node) -> fx.Node:
    kind = node.inputs[1].dtype
    if kind is not None:
        return cast_node(raiser, node, raiser.value(node, 0), element_of(kind))
    saturate = bool(node.attrs.get("saturate", 1))
    return raiser.call(cast_like, raiser.value(node, 0), raiser.value(node, 1), saturate)


@op("BitCast")
def _bit_cast(raiser: Raiser, node: gs.Node) -> fx.Node:
    return raiser.call(bit_cast, raiser.value(node, 0), torch_type(element_of(node.attrs["to"])))


def cast_node(raiser: Raiser, node: gs.Node, value: fx.Node, element: int) -> fx.Node:
    """The call that casts ``value`` to an ONNX element type as ``node`` says."""
    if element == _TYPE.STRING:
        raise ModelError(f"node {node.name!r} ({node.op}): a cast to strings cannot be raised to torch")
    saturate = bool(node.attrs.get("saturate", 1))
    if element in _BITS:
        return raiser.call(to_few_bits, value, _BITS[element], element in _SIGNED)
    if element == _TYPE.FLOAT4E2M1:
        return raiser.call(to_float4, value)
    kind = torch_type(element)
    if element == _TYPE.FLOAT8E8M0:
        return raiser.call(to_float8_scale, value, saturate, str(node.attrs.get("round_mode", "up")))
    if kind in _FLOAT8:
        return raiser.call(to_float8, value, kind, saturate)
    return raiser.call(cast, value, kind)


# -- torch functions -----------------------------------------------------------------------------------------------


def cast(value: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    return value.to(kind)


def cast_like(value: torch.Tensor, other: torch.Tensor, saturate: bool) -> torch.Tensor:
    return to_float8(value, other.dtype, saturate) if other.dtype in _FLOAT8 else value.to(other.dtype)


def bit_cast(value: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    """The same bits as another type of the same size."""
    return value.contiguous().view(kind)


def to_float8(value: torch.Tensor, kind: torch.dtype, saturate: bool) -> torch.Tensor:
    """``saturate``: what is too large becomes the largest number, else what the type has for overflow."""
    held = value.to(torch.float32)
    if saturate:
        limit = torch.finfo(kind).max
        held = held.clamp(-limit, limit)  # leaves what is not a number
    elif kind == torch.float8_e4m3fn:  # torch saturates here; what rounds to more than 448 has no number
        held = torch.where(held.abs() > _ROUNDS_TO_448, torch.nan, held)
    return held.to(kind)


def to_float8_scale(value: torch.Tensor, saturate: bool, mode: str) -> torch.Tensor:
    """Powers of two (``float8e8m0``), rounded up, down or to the nearest; what has none becomes NaN."""
    held = value.to(torch.float32).abs()
    mantissa, exponent = torch.frexp(held)  # mantissa in [0.5, 1)
    low = exponent - 1
    match mode:
        case "up":
            power = torch.where(mantissa > 0.5, low + 1, low)
        case "down":
            power = low
        case _:
            power = torch.where(mantissa >= 0.75, low + 1, low)
    code = (power + 127).to(torch.int32)
    code = torch.where(held == 0, 0, code)
    too_large = (code > 254) | torch.isinf(held)
    code = torch.where(too_large, 254 if saturate else 255, code.clamp(min=0))
    code = torch.where(torch.isnan(held), 255, code)
    return code.to(torch.uint8).view(torch.float8_e8m0fnu)


def to_few_bits(value: torch.Tensor, bits: int, signed: bool) -> torch.Tensor:
    """An integer of 4 or 2 bits: the low bits of the number cut towards zero, in a carrier of 8 bits."""
    low = value.to(torch.int64) & (2**bits - 1)
    if not signed:
        return low.to(torch.uint8)
    return torch.where(low >= 2 ** (bits - 1), low - 2**bits, low).to(torch.int8)


def to_float4(value: torch.Tensor) -> torch.Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with the sign (ties to the even code), carried in ``float32``."""
    held = value.to(torch.float32)
    size = held.abs()
    step = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    return torch.copysign((torch.round(size / step) * step).clamp(max=6.0), held)
