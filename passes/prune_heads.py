"""Cut whole attention heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eexform.passes._prune import PruneGroups
from eexform.tunables import parameter


@dataclass(frozen=True)
class PruneHeads(PruneGroups):
    """Cut the least important attention heads: query, key, value and what reads them.

    Like ``prune_channels``, for groups whose units are heads; ``ratio`` is a share of the heads by default. Every
    attention keeps ``least`` heads.
    """

    name: ClassVar[str] = "prune_heads"
    kinds: ClassVar[tuple[str, ...]] = ("heads",)
    unit: ClassVar[str] = "heads"

    of: str = parameter(default="heads", help="what ratio is a share of: the heads, or the network's macs or params")
