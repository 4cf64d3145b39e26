"""Tensor types: dtype, shape with symbolic dimensions, and where the batch is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Dim = int | str | None
"""A dimension: a number, a symbol or a product with one (``"N"``, ``"64*N"``, ``"seq"``), or unknown."""


@dataclass(frozen=True)
class TensorType:
    """What is known about a value without running the network.

    Attributes:
        dtype: element type; ``None`` where unknown (custom operators).
        shape: dimensions, the batch included; ``None`` where even the rank is unknown.
        batch_axis: the axis whose size is exactly the batch; ``None`` where the value does not carry samples one by
            one (a parameter, shape arithmetic, or a batch merged with another axis as in ``64*N``).
        batch_dependent: some dimension, or the content of a shape computation, changes with the batch.
    """

    dtype: np.dtype | None
    shape: tuple[Dim, ...] | None
    batch_axis: int | None = None
    batch_dependent: bool = False

    @property
    def sample_shape(self) -> tuple[Dim, ...]:
        """The shape of one sample: without the batch axis."""
        if self.shape is None or self.batch_axis is None:
            raise ValueError("the value has no batch axis")
        return self.shape[: self.batch_axis] + self.shape[self.batch_axis + 1 :]

    def __str__(self) -> str:
        dims = "?" if self.shape is None else "x".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.dtype if self.dtype is not None else '?'}[{dims}]"
