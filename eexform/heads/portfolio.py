"""Heads worth trying at a site, each within a share of the trunk's work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eexform.errors import GraphError
from eexform.heads.build import head_macs, unsupported
from eexform.heads.spec import HeadSpec

if TYPE_CHECKING:
    from eexform.ir.sites import Site

_NARROWEST, _WIDEST = 16, 128


def portfolio(site: Site, *, trunk_macs: float, max_share: float = 0.08, num_classes: int) -> tuple[HeadSpec, ...]:
    """Default candidates for a site, cheapest kind first.

    Space: no layer; one 3x3 convolution within half of the budget; two within all of it; each of stride 2 where there is
    room, with average and maximum pooling side by side. Tokens and flat features: no layer, one fully connected layer.
    Widths are the largest that keep the head within the budget. A kind that never does is left out; ``none`` always stays.

    Depthwise-separable layers and bottlenecks are not among them: on CIFAR-10 they gained nothing over two strided
    convolutions of the same cost, and depthwise layers train three times slower on a CPU. Name them to search them.

    Args:
        site: where the heads will be attached.
        trunk_macs: multiply-accumulates of the whole trunk for one sample.
        max_share: what a head may cost, as a share of that.
        num_classes: classes of the trunk.
    """
    budget = max_share * trunk_macs
    found: list[HeadSpec | None]
    if site.kind == "spatial":
        wide = max(64, _width(2 * site.channels))
        found = [
            HeadSpec(pool="avg+max"),
            _fit(site, "conv", 1, wide, budget / 2, num_classes, pool="avg+max"),
            _fit(site, "conv", 2, wide, budget, num_classes, pool="avg+max"),
        ]
    elif site.kind == "sequence":
        pools = ("cls", "mean")
        found = [HeadSpec(pool=pool) for pool in pools]
        found += [_fit(site, "mlp", 1, _width(site.channels), budget, num_classes, pool=pool) for pool in pools]
    else:
        found = [HeadSpec(), _fit(site, "mlp", 1, _width(site.channels), budget, num_classes)]
    kept = [spec for spec in found if spec is not None and unsupported(spec, site) is None]
    return tuple(dict.fromkeys(kept))


def _fit(
    site: Site, layer: str, depth: int, width: int, budget: float, num_classes: int, pool: str = "avg"
) -> HeadSpec | None:
    """The widest head of a kind, every layer of stride 2 where there is room, that costs at most ``budget``."""
    while width >= _NARROWEST:
        for stride in _strides(site, depth):
            spec = HeadSpec(layer, depth, width, pool, stride)
            if unsupported(spec, site) is not None:
                continue
            try:
                if head_macs(spec, site, num_classes=num_classes) <= budget:
                    return spec
            except GraphError:  # the site's size is not known: nothing to count, so a modest head unchecked
                return HeadSpec(layer, depth, min(width, 64), pool, 2**depth)
        width //= 2
    return None


def _strides(site: Site, depth: int) -> tuple[int, ...]:
    """``2**depth`` and more, as long as two pixels are left along the longest axis; less where even that leaves none."""
    if site.kind != "spatial":
        return (1,)
    space = _space(site)
    longest = max(space) if space else 8
    room = [2**power for power in range(6) if power == 0 or longest >> power >= 2]
    return tuple(stride for stride in room if stride >= 2**depth) or (room[-1],)


def _space(site: Site) -> list[int]:
    axis = site.channel_axis % (len(site.shape) + 1) - 1
    return [size for place, size in enumerate(site.shape) if place != axis and isinstance(size, int)]


def _width(channels: int) -> int:
    """A power of two near ``channels``, within reason."""
    rounded = 1 << max(0, channels - 1).bit_length()
    return min(max(rounded, _NARROWEST), _WIDEST)
