"""Cut whole channels, wherever they appear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eexform.passes._prune import PruneGroups


@dataclass(frozen=True)
class PruneChannels(PruneGroups):
    """Cut the least important channels and features; what is left is an ordinary narrower network.

    Channels that depend on each other (:mod:`eexform.ir.groups`) are cut together. ``criterion`` scores them,
    ``scope`` and ``normalise`` say how groups compete, and the shortest cut that saves ``ratio`` of the network's
    ``macs`` (``params``, or of the ``channels``) is taken; see :mod:`eexform.pruning.allocate`. Or ``ratios`` gives the
    share of each family or group, or ``cut`` the very channels.

    The replay holds the channels that were cut, so it needs neither data nor scores.
    """

    name: ClassVar[str] = "prune_channels"
    kinds: ClassVar[tuple[str, ...]] = ("channels", "width", "embedding")
    unit: ClassVar[str] = "channels"
