"""Heads worth trying at a site, each within a share of the trunk's work."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from eexform.errors import GraphError
from eexform.heads.build import head_macs, unsupported
from eexform.heads.spec import HeadSpec

if TYPE_CHECKING:
    from eexform.ir.sites import Site

_NARROWEST, _WIDEST = 16, 128
_SMALL = 8
"""Maps of at most so many pixels along an axis need no third layer."""


def portfolio(
    site: Site, *, trunk_macs: float, max_share: float = 0.08, num_classes: int, gates: bool = False
) -> tuple[HeadSpec, ...]:
    """Default candidates for a site, cheapest kind first.

    Space: no layer; and stacks of 3x3 convolutions of stride 2 with average and maximum pooling side by side: two, and
    three (on small maps one), each as wide as the budget allows. Tokens and flat features: no layer, one fully
    connected layer. A kind that never fits the budget is left out; ``none`` always stays.

    Measured on CIFAR-10 with a frozen ResNet-20: two strided convolutions beat one by 4 to 7 points at the two sites
    compared, and both poolings beat the average alone by 2. Depthwise layers are slow to train on a CPU for the MACs
    they take, so they and bottlenecks are not among the defaults; their accuracy was not compared. Name them to search
    them.

    Args:
        site: where the heads will be attached.
        trunk_macs: multiply-accumulates of the whole trunk for one sample.
        max_share: what a head may cost, as a share of that.
        num_classes: classes of the trunk.
        gates: give every head a gate; it costs a multiplication per feature and two more, which the budget does not
            count, so that the heads are those that there are without.
    """
    budget = max_share * trunk_macs
    found: list[HeadSpec | None]
    if site.kind == "spatial":
        small = max(_space(site), default=_SMALL) <= _SMALL
        found = [HeadSpec(pool="avg+max")]
        for depth in (1, 2) if small else (2, 3):
            found.append(_fit(site, "conv", depth, _WIDEST, budget, num_classes, pool="avg+max"))
    elif site.kind == "sequence":
        pools = ("cls", "mean")
        found = [HeadSpec(pool=pool) for pool in pools]
        found += [_fit(site, "mlp", 1, _width(site.channels), budget, num_classes, pool=pool) for pool in pools]
    else:
        found = [HeadSpec(), _fit(site, "mlp", 1, _width(site.channels), budget, num_classes)]
    kept = [spec for spec in found if spec is not None and unsupported(spec, site) is None]
    return tuple(dict.fromkeys(replace(spec, gate=gates) for spec in kept))


def _fit(
    site: Site, layer: str, depth: int, widest: int, budget: float, num_classes: int, pool: str = "avg"
) -> HeadSpec | None:
    """The head of a kind that reduces space least and, of those, is widest, at a cost of at most ``budget``."""
    widths = [width for width in (128, 64, 32, 16) if width <= widest]
    for stride in _strides(site, depth):
        for width in widths:
            spec = HeadSpec(layer, depth, width, pool, stride)
            if unsupported(spec, site) is not None:
                continue
            try:
                if head_macs(spec, site, num_classes=num_classes) <= budget:
                    return spec
            except GraphError:  # the site's size is not known: nothing to count, so a modest head unchecked
                return HeadSpec(layer, depth, min(width, 64), pool, 2**depth)
    return None


def _strides(site: Site, depth: int) -> tuple[int, ...]:
    """Total strides to try: one of 2 per layer, two at most and down to about 4 pixels, or as far as there is room."""
    if site.kind != "spatial":
        return (1,)
    longest = max(_space(site), default=32)
    room = [2**power for power in range(6) if power == 0 or longest >> power >= 2]
    least = min(2 ** min(depth, 2), max(1, longest // 4))
    return tuple(stride for stride in room if stride >= least) or (room[-1],)


def _space(site: Site) -> list[int]:
    axis = site.channel_axis % (len(site.shape) + 1) - 1
    return [size for place, size in enumerate(site.shape) if place != axis and isinstance(size, int)]


def _width(channels: int) -> int:
    """A power of two near ``channels``, within reason."""
    rounded = 1 << max(0, channels - 1).bit_length()
    return min(max(rounded, _NARROWEST), _WIDEST)
