"""What a head looks like, as a small value with a canonical text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from eexform import plugins
from eexform.errors import OptionError, suggest

POOLS = ("avg", "avg+max", "cls", "mean")
_TEXT = re.compile(
    r"(?P<layer>[a-z_0-9]+?)(?::(?P<depth>\d+)x(?P<width>\d+))?/(?P<pool>[a-z+]+)(?:/s(?P<stride>\d+))?(?P<gate>/gate)?"
)


@dataclass(frozen=True, order=True)
class HeadSpec:
    """Shape of a head: optional down-sampling layers, pooling, linear classifier, and a learned gate where wanted.

    Attributes:
        layer: kind of hidden layer (entry-point group ``eexform.head_layers``); ``none`` has no hidden layer.
        depth: number of hidden layers, 0-3 (0 exactly when ``layer`` is ``none``).
        width: channels (or features, for ``mlp``) of the last hidden layer; a layer in front of a further stride of 2
            has half as many, so ``conv:3x64/avg/s4`` is 32 (stride 2), 64 (stride 2), 64.
        pool: ``avg`` or ``avg+max`` over space, ``cls`` or ``mean`` over tokens.
        stride: factor by which space is reduced before pooling, a power of two: taken by the layers' own strides first,
            the rest by average pooling in front of them.
        gate: whether a second output says how sure the head is: a confidence that is learned, not read off the scores.
    """

    layer: str = "none"
    depth: int = 0
    width: int = 0
    pool: str = "avg"
    stride: int = 1
    gate: bool = False

    def __post_init__(self) -> None:
        if self.pool not in POOLS:
            raise OptionError(f"head pooling {self.pool!r} does not exist: {suggest(self.pool, POOLS)}")
        if (self.layer == "none") != (self.depth == 0) or not 0 <= self.depth <= 3:
            raise OptionError(f"head {self.layer!r} with depth {self.depth}: depth is 1-3, and 0 exactly for 'none'")
        if self.depth and self.width < 1:
            raise OptionError(f"head {self.layer!r}: width {self.width} must be at least 1")
        if self.stride < 1 or self.stride & (self.stride - 1):
            raise OptionError(f"head stride {self.stride} is not a power of two")

    def __str__(self) -> str:
        hidden = f":{self.depth}x{self.width}" if self.depth else ""
        stride, gate = f"/s{self.stride}" if self.stride > 1 else "", "/gate" if self.gate else ""
        return f"{self.layer}{hidden}/{self.pool}{stride}{gate}"

    @classmethod
    def parse(cls, text: str) -> HeadSpec:
        """Read the canonical text, e.g. ``none/avg``, ``conv:2x64/avg+max/s4``, ``conv:1x32/avg/s2/gate``.

        Raises:
            OptionError: not a head, or an unknown layer kind.
        """
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise OptionError(
                f"{text!r} is not a head; write LAYER:DEPTHxWIDTH/POOL/sSTRIDE, with /gate behind it for a learned "
                "confidence, e.g. conv:2x64/avg/s2"
            )
        known = plugins.names("eexform.head_layers")
        if match["layer"] not in known:
            raise OptionError(f"head layer {match['layer']!r} does not exist: {suggest(match['layer'], known)}")
        return cls(
            layer=match["layer"],
            depth=int(match["depth"] or 0),
            width=int(match["width"] or 0),
            pool=match["pool"],
            stride=int(match["stride"] or 1),
            gate=match["gate"] is not None,
        )
