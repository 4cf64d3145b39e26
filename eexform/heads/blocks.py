"""Blocks that head layers are built from, emitted as IR nodes with freshly initialised parameters.

Only operators whose form is the same in opsets 17 to 25 are used (no ``ReduceMean``, whose axes moved), so that a head
can be grafted into a trunk of any of them.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from eexform.ir.emit import Emitter

BN_EPSILON = 1e-5
BN_MOMENTUM = 0.9
"""Weight of the old running statistics (ONNX's sense; PyTorch calls 0.1 what this is)."""


class HeadEmitter(Emitter):
    """An emitter that also draws initial parameters.

    Attributes:
        rng: source of the initial weights; ``None`` leaves them zero, for graphs that are only counted.
    """

    def __init__(
        self, draft: gs.Graph, rng: np.random.Generator | None, prefix: str = "", *, _taken: set[str] | None = None
    ) -> None:
        super().__init__(draft, prefix, _taken=_taken)
        self.rng = rng

    def scoped(self, prefix: str) -> HeadEmitter:
        return HeadEmitter(self.draft, self.rng, self.prefix + prefix, _taken=self._taken)

    def normal(self, name: str, shape: tuple[int, ...], deviation: float) -> gs.Constant:
        """A float32 parameter drawn from a normal distribution."""
        if self.rng is None:
            return self.constant(name, np.zeros(shape, np.float32))
        return self.constant(name, (self.rng.standard_normal(shape) * deviation).astype(np.float32))

    def filled(self, name: str, size: int, value: float) -> gs.Constant:
        """A float32 vector of equal entries."""
        return self.constant(name, np.full(size, value, np.float32))


def conv_bn_relu(
    emitter: HeadEmitter,
    value: gs.Variable,
    in_channels: int,
    out_channels: int,
    *,
    kernel: int,
    stride: int = 1,
    depthwise: bool = False,
    name: str = "conv",
) -> gs.Variable:
    """Convolution without bias, batch normalisation, ReLU.

    Args:
        emitter: where to.
        value: [N, in_channels, ...space], one or two spatial axes.
        in_channels: of ``value``.
        out_channels: of the result; equal to ``in_channels`` where ``depthwise``.
        kernel: odd size along every spatial axis; padded so that stride 1 keeps the size.
        stride: along every spatial axis.
        depthwise: one filter per channel.
        name: of the convolution; its normalisation is called ``<name>_bn`` (``bn`` for ``conv``).

    Returns:
        [N, out_channels, ...space / stride rounded up].
    """
    space = list(value.shape[2:])
    rank = len(space)
    groups = in_channels if depthwise else 1
    fan_in = in_channels // groups * kernel**rank
    # He et al., "Delving deep into rectifiers", eq. 10: variance 2 / fan-in keeps the signal's size through a ReLU
    weight = emitter.normal(
        f"{name}.weight", (out_channels, in_channels // groups, *[kernel] * rank), math.sqrt(2.0 / fan_in)
    )
    shape = [value.shape[0], out_channels, *(_strided(size, stride) for size in space)]
    found = emitter.node(
        "Conv",
        value,
        weight,
        name=name,
        shape=shape,
        kernel_shape=[kernel] * rank,
        strides=[stride] * rank,
        pads=[kernel // 2] * (2 * rank),
        dilations=[1] * rank,
        group=groups,
    )
    label = "bn" if name == "conv" else f"{name}_bn"
    found = emitter.node(
        "BatchNormalization",
        found,
        emitter.filled(f"{label}.weight", out_channels, 1.0),
        emitter.filled(f"{label}.bias", out_channels, 0.0),
        emitter.filled(f"{label}.running_mean", out_channels, 0.0),
        emitter.filled(f"{label}.running_var", out_channels, 1.0),
        name=label,
        shape=shape,
        epsilon=BN_EPSILON,
        momentum=BN_MOMENTUM,
    )
    return emitter.node("Relu", found, name=f"{name}_relu", shape=shape)


def linear(
    emitter: HeadEmitter, value: gs.Variable, in_features: int, out_features: int, *, name: str, gain: float
) -> gs.Variable:
    """Fully connected layer on [N, in_features], weights normal with variance ``gain / in_features``, bias 0."""
    weight = emitter.normal(f"{name}.weight", (out_features, in_features), math.sqrt(gain / in_features))
    bias = emitter.filled(f"{name}.bias", out_features, 0.0)
    return emitter.node("Gemm", value, weight, bias, name=name, shape=[value.shape[0], out_features], transB=1)


def shrink(emitter: HeadEmitter, value: gs.Variable, stride: int, *, name: str = "shrink") -> gs.Variable:
    """Average pooling by ``stride`` along every spatial axis (by the axis' whole size where that is smaller).

    Rows and columns left over at the far edge are dropped.
    """
    space = list(value.shape[2:])
    window = [min(stride, size) if isinstance(size, int) else stride for size in space]
    if all(size == 1 for size in window):
        return value
    shape = [
        *value.shape[:2],
        *(size // step if isinstance(size, int) else None for size, step in zip(space, window, strict=True)),
    ]
    return emitter.node("AveragePool", value, name=name, shape=shape, kernel_shape=window, strides=window)


def pool_space(emitter: HeadEmitter, value: gs.Variable, channels: int, pool: str) -> tuple[gs.Variable, int]:
    """From [N, channels, ...space] to [N, features]: the mean over space, with ``avg+max`` the maximum behind it."""
    flat = []
    for kind in pool.split("+"):
        op = {"avg": "GlobalAveragePool", "mean": "GlobalAveragePool", "max": "GlobalMaxPool"}[kind]
        shape = [*value.shape[:2], *[1] * (len(value.shape) - 2)]
        pooled = emitter.node(op, value, name=f"pool.{kind}", shape=shape)
        flat.append(emitter.node("Flatten", pooled, name=f"flat.{kind}", shape=[value.shape[0], channels], axis=1))
    if len(flat) == 1:
        return flat[0], channels
    features = channels * len(flat)
    return emitter.node("Concat", *flat, name="pool", shape=[value.shape[0], features], axis=1), features


def _strided(size: int | str | None, stride: int) -> int | None:
    return -(-size // stride) if isinstance(size, int) else None
