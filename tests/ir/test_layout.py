"""Where channels go when a tensor is reshaped, and where they are found in whole networks."""

from __future__ import annotations

from typing import Any

import pytest

from eexform.frontends.onnx import from_model
from eexform.ir.layout import channel_axes, reshaped
from tests import zoo
from tests.zoo.net import Net


@pytest.mark.parametrize(
    ("axes", "before", "after", "expected"),
    [
        ((1,), ["N", 12, 4, 4], ["N", 12, 16], (1,)),  # positions joined
        ((1,), ["N", 12, 4, 4], ["N", 192], (1,)),  # flattened for a linear layer: all are features
        ((1,), ["N", 12, 1, 1], ["N", 12], (1,)),
        ((1,), ["N", 12], ["N", 12, 1, 1], (1,)),
        ((2,), ["N", 16, 36], ["N", 16, 3, 3, 4], (2, 3, 4)),  # queries, keys, values x heads x size
        ((2, 3), ["N", 16, 3, 4], ["N", 16, 12], (2,)),  # heads joined again
        ((1,), ["N", 8, 5, 5], ["N", 2, 4, 5, 5], (1, 2)),  # channel shuffle
        ((1, 2), ["N", 4, 2, 5, 5], ["N", 8, 5, 5], (1,)),
        ((3,), ["N", 8, 8, 6], ["N", 2, 4, 2, 4, 6], (5,)),  # windows
        ((5,), ["N", 2, 2, 4, 4, 6], ["4*N", 16, 6], (2,)),  # windows joined to the batch
        ((2,), ["4*N", 16, 6], ["N", 2, 2, 4, 4, 6], (5,)),
        ((2,), ["N", "seq", 12], ["N", "seq", 3, 4], (2, 3)),
        ((2,), ["N", None, 12], ["N", None, None, 12], (3,)),  # only the ends are known
        ((1,), ["N", 8, 5, 5], ["N", 2, 100], None),  # groups of channels with their positions
        ((1,), ["N", 8, 4], ["N", 4, 8], None),  # read in another order
        ((1,), ["N", 8, 6], ["N", 16, 3], None),
    ],
)  # fmt: skip
def test_reshaped(axes: tuple[int, ...], before: list[Any], after: list[Any], expected: tuple[int, ...] | None) -> None:
    assert reshaped(axes, before, after) == expected


def test_consumers_say_what_producers_do_not() -> None:
    graph = from_model(zoo.build("convnext"))
    assert channel_axes(graph.flow, graph.types)["image"] == (1,)
    net = Net("nhwc")
    x = net.conv(net.transpose(net.input("image", 4, 4, 3), 0, 3, 1, 2), 3, 2)
    graph = from_model(net.model(net.classifier(x, 2, 5), 5))
    assert channel_axes(graph.flow, graph.types)["image"] == (3,)


def test_products_of_activations_take_the_channels_of_the_right_operand() -> None:
    graph = from_model(zoo.build("vit"))
    axes = channel_axes(graph.flow, graph.types)
    assert "matmul_2" not in axes  # queries x keys
    assert axes["matmul_3"] == (1, 3)  # weights x values: heads, size
    assert axes["transpose_4"] == (2, 3)
    assert axes["reshape_3"] == (2,)
