"""Heads: small classifiers attached at sites."""

from eexform.heads.build import head_graph, head_macs, unsupported, with_parameters
from eexform.heads.fold import fold_head
from eexform.heads.layers import HeadLayer
from eexform.heads.portfolio import portfolio
from eexform.heads.spec import POOLS, HeadSpec

__all__ = [
    "POOLS",
    "HeadLayer",
    "HeadSpec",
    "fold_head",
    "head_graph",
    "head_macs",
    "portfolio",
    "unsupported",
    "with_parameters",
]
