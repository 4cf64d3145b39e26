"""Which sites and heads a search gets to choose from, where the user names none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eexform.errors import ModelError, OptionError, suggest
from eexform.heads import HeadSpec, portfolio
from eexform.ir.graph import Graph
from eexform.ir.sites import Site, SiteReport

SHARES = (0.08, 0.96)
"""Sites before the first share of the trunk's cost have seen too little, those behind the second save too little."""

CARRIED = 0.03
"""What a further tensor in the live set counts, as a share of the trunk: it is gathered at every exit that is passed."""


def choose_sites(report: SiteReport, prefix: Mapping[str, float], trunk: float, most: int) -> tuple[Site, ...]:
    """At most ``most`` sites spread evenly over the trunk's cost, those with small live sets first.

    Args:
        report: all sites of the trunk.
        prefix: cost of the trunk up to each site.
        trunk: cost of the whole trunk.
        most: how many.

    Raises:
        ModelError: the trunk has no site at all.
    """
    if not report.sites:
        reasons = "; ".join(f"{entry.value}: {entry.reason}" for entry in report.rejected[:3])
        raise ModelError(f"the model has no site for an exit (for example {reasons}); `eexform inspect` lists all reasons")
    shares = {site.value: prefix[site.value] / trunk for site in report.sites}
    usable = [site for site in report.sites if SHARES[0] <= shares[site.value] <= SHARES[1]] or list(report.sites)
    chosen: set[str] = set()
    for target in np.linspace(shares[usable[0].value], shares[usable[-1].value], min(most, len(usable))):
        free = [site for site in usable if site.value not in chosen]
        best = min(free, key=lambda s: (abs(shares[s.value] - target) + CARRIED * (len(s.live) - 1), shares[s.value]))
        chosen.add(best.value)
    return tuple(site for site in usable if site.value in chosen)


def named_sites(report: SiteReport, values: Sequence[str]) -> tuple[Site, ...]:
    """The sites called ``values``, in the order in which a sample meets them.

    Raises:
        OptionError: one of them is no site; the message gives the reason where there is one.
    """
    known = {site.value: site for site in report.sites}
    reasons = {entry.value: entry.reason for entry in report.rejected}
    for value in values:
        if value in reasons:
            raise OptionError(f"{value!r} is no site: {reasons[value]}")
        if value not in known:
            raise OptionError(f"the model has no value {value!r}: {suggest(value, known)}")
    return tuple(site for site in report.sites if site.value in set(values))


def choose_heads(
    graph: Graph,
    sites: Sequence[Site],
    *,
    trunk_macs: float,
    specs: Sequence[str] = (),
    max_share: float = 0.05,
) -> dict[str, tuple[HeadSpec, ...]]:
    """Heads per site: the given ones, or the default portfolio kept below ``max_share`` of the trunk's MACs each.

    Raises:
        OptionError: a given text is not a head.
    """
    if specs:
        parsed = tuple(HeadSpec.parse(text) for text in specs)
        return {site.value: parsed for site in sites}
    return {
        site.value: portfolio(site, trunk_macs=int(trunk_macs), max_share=max_share, num_classes=graph.num_classes)
        for site in sites
    }
