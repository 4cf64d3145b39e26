"""Kinds of hidden layers that a head may have; registered in the entry-point group ``eexform.head_layers``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import onnx_graphsurgeon as gs

from eexform import plugins
from eexform.errors import OptionError
from eexform.heads.blocks import HeadEmitter, conv_bn_relu, linear

if TYPE_CHECKING:
    from eexform.ir.sites import Site

_GROUP = "eexform.head_layers"
_LARGEST_RANK = 2


class HeadLayer(ABC):
    """A kind of hidden layer. A head stacks ``depth`` of them, each ``width`` wide.

    Attributes:
        spatial: True: layers come before pooling and may reduce space; False: after pooling, on [N, features].
    """

    name: ClassVar[str]
    spatial: ClassVar[bool]

    def supports(self, site: Site) -> str | None:
        """Why the layer cannot be used at ``site``; ``None`` where it can."""
        if not self.spatial:
            return None
        if site.kind != "spatial":
            return f"{self.name!r} layers need a site with space, and {site.value!r} is {site.kind}"
        if len(site.shape) - 1 > _LARGEST_RANK:
            return f"{self.name!r} layers take one or two spatial axes, {site.value!r} has {len(site.shape) - 1}"
        return None

    @abstractmethod
    def emit(
        self, emitter: HeadEmitter, value: gs.Variable, in_channels: int, width: int, stride: int
    ) -> tuple[gs.Variable, int]:
        """Add one layer.

        Args:
            emitter: where to, and the source of initial weights.
            value: [N, in_channels, ...space] for spatial layers, [N, in_channels] for others; ``value.shape`` is set.
            in_channels: channels of ``value``.
            width: channels wanted.
            stride: 1 or 2, along every spatial axis; 1 for layers that are not spatial.

        Returns:
            The layer's value, its ``shape`` set, and its number of channels.
        """


class NoLayer(HeadLayer):
    """No hidden layer: pooling and a linear classifier."""

    name = "none"
    spatial = False

    def emit(
        self, emitter: HeadEmitter, value: gs.Variable, in_channels: int, width: int, stride: int
    ) -> tuple[gs.Variable, int]:
        return value, in_channels


class Conv(HeadLayer):
    """3x3 convolution, batch normalisation, ReLU (kernel 3 on sequences of one spatial axis)."""

    name = "conv"
    spatial = True

    def emit(
        self, emitter: HeadEmitter, value: gs.Variable, in_channels: int, width: int, stride: int
    ) -> tuple[gs.Variable, int]:
        return conv_bn_relu(emitter, value, in_channels, width, kernel=3, stride=stride), width


class DepthwiseSeparable(HeadLayer):
    """Depthwise 3x3 convolution (it takes the stride), then a pointwise one; normalisation and ReLU after each."""

    name = "dwsep"
    spatial = True

    def emit(
        self, emitter: HeadEmitter, value: gs.Variable, in_channels: int, width: int, stride: int
    ) -> tuple[gs.Variable, int]:
        value = conv_bn_relu(
            emitter, value, in_channels, in_channels, kernel=3, stride=stride, depthwise=True, name="depthwise"
        )
        return conv_bn_relu(emitter, value, in_channels, width, kernel=1, name="pointwise"), width


class Bottleneck(HeadLayer):
    """1x1 reduction to a quarter of the width (at least 8), 3x3 convolution (it takes the stride), 1x1 expansion.

    Normalisation and ReLU after each; no shortcut.
    """

    name = "bottleneck"
    spatial = True

    def emit(
        self, emitter: HeadEmitter, value: gs.Variable, in_channels: int, width: int, stride: int
    ) -> tuple[gs.Variable, int]:
        narrow = max(8, width // 4)
        value = conv_bn_relu(emitter, value, in_channels, narrow, kernel=1, name="reduce")
        value = conv_bn_relu(emitter, value, narrow, narrow, kernel=3, stride=stride)
        return conv_bn_relu(emitter, value, narrow, width, kernel=1, name="expand"), width


class Mlp(HeadLayer):
    """Fully connected layer and ReLU, after pooling."""

    name = "mlp"
    spatial = False

    def emit(
        self, emitter: HeadEmitter, value: gs.Variable, in_channels: int, width: int, stride: int
    ) -> tuple[gs.Variable, int]:
        value = linear(emitter, value, in_channels, width, name="linear", gain=2.0)
        return emitter.node("Relu", value, name="relu", shape=value.shape), width


def get(name: str) -> HeadLayer:
    """The layer kind registered as ``name``.

    Raises:
        OptionError: there is none; the message lists the choices.
    """
    found = plugins.load(_GROUP, name)
    layer = found() if isinstance(found, type) else found
    if not isinstance(layer, HeadLayer):
        raise OptionError(f"head layer {name!r}: {found!r} is not a sub-class of eexform.heads.layers.HeadLayer")
    return layer


def names() -> tuple[str, ...]:
    """The registered layer kinds."""
    return plugins.names(_GROUP)
