"""A head's text."""

from __future__ import annotations

import pytest

from eexform.errors import OptionError
from eexform.heads import HeadSpec


@pytest.mark.parametrize(
    "text",
    [
        "none/avg",
        "conv:2x64/avg+max/s4",
        "mlp:1x128/cls",
        "bottleneck:3x16/avg",
        "none/avg/s2",
        "none/avg/gate",
        "conv:1x8/avg/s2/gate",
    ],
)
def test_text_round_trip(text):
    assert str(HeadSpec.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("conv", "is not a head; write LAYER"),
        ("convv:1x8/avg", "did you mean 'conv'"),
        ("conv:1x8/sum", "pooling 'sum' does not exist"),
        ("conv:4x8/avg", "depth is 1-3"),
        ("none:1x8/avg", "depth is 1-3, and 0 exactly for 'none'"),
        ("conv/avg", "depth is 1-3"),
        ("conv:1x0/avg", "width 0 must be at least 1"),
        ("conv:1x8/avg/s3", "not a power of two"),
        ("conv:1x8/gate", "pooling 'gate' does not exist"),
        ("conv:1x8/avg/gate/s2", "with /gate behind it"),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(OptionError, match=message):
        HeadSpec.parse(text)


def test_a_gate_comes_last_in_order():
    plain, gated = HeadSpec.parse("conv:1x8/avg/s2"), HeadSpec.parse("conv:1x8/avg/s2/gate")
    assert plain < gated
    assert plain != gated
    other = HeadSpec.parse("conv:1x8/avg/s4")
    assert sorted([gated, other, plain]) == [plain, gated, other]
