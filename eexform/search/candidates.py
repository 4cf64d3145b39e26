"""Which sites and heads a search gets to choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from eexform.cost_models import Cost
from eexform.errors import ModelError, OptionError, need, suggest
from eexform.heads import HeadSpec, portfolio, unsupported
from eexform.ir.graph import Graph
from eexform.ir.measures import is_learned
from eexform.ir.sites import Site, SiteReport
from eexform.passes.insert_exits import gated
from eexform.search.options import SearchOptions

SHARES = (0.08, 0.96)
"""Sites before the first share of the trunk's cost have seen too little, those behind the second save too little."""

CARRIED = 0.03
"""What a further tensor in the live set counts, as a share of the trunk: it is gathered at every exit passed."""


@dataclass(frozen=True)
class Places:
    """Candidates.

    Attributes:
        sites: in the order in which a sample meets them.
        heads: by site value; every site has one at least.
        left_out: named heads that do not fit a site, and why, one line each.
    """

    sites: tuple[Site, ...]
    heads: Mapping[str, tuple[HeadSpec, ...]]
    left_out: tuple[str, ...] = ()


def choose(graph: Graph, report: SiteReport, macs: Cost, options: SearchOptions, given: Mapping[str, Any]) -> Places:
    """The candidates of a search.

    Args:
        graph: the trunk.
        report: its sites.
        macs: its multiply-accumulates by node.
        options: named sites and heads, or how many to choose.
        given: what the recipe gives ``insert_exits``; it comes first.

    Raises:
        OptionError: a named site is none, a named head fits nowhere, no head fits any site, or some heads have a gate
            that others (or the recipe's measure) do not.
        ModelError: the trunk has no site.
    """
    named = _named(options, given)
    if named is None:
        sites = choose_sites(report, graph.flow.accumulate(macs.nodes), macs.total, options.max_sites)
    else:
        sites = named_sites(report, named)
    left_out: list[str] = []
    heads: dict[str, tuple[HeadSpec, ...]]
    if "heads" in given:
        heads = {site.value: (HeadSpec.parse(str(given["heads"][site.value])),) for site in sites}
    else:
        heads = choose_heads(
            graph,
            sites,
            trunk_macs=macs.total,
            specs=options.heads,
            max_share=options.max_head_share,
            gates=options.gates,
        )
    _check_gates(heads, given)
    for site in sites:
        reasons = {spec: unsupported(spec, site) for spec in heads[site.value]}
        heads[site.value] = tuple(spec for spec, reason in reasons.items() if reason is None)
        left_out += [f"head {spec} is not tried at {site.value!r}: {why}" for spec, why in reasons.items() if why]
    kept = tuple(site for site in sites if heads[site.value])
    if not kept:
        why = left_out[0] if left_out else "raise --max-head-share, or name heads with --head"
        raise OptionError(f"no candidate head fits any candidate site: {why}")
    return Places(kept, {site.value: heads[site.value] for site in kept}, tuple(left_out))


def keep(places: Places, report: SiteReport) -> Places:
    """The same candidates in another variant of the trunk, as far as they are sites there."""
    found = tuple(site for site in report.sites if site.value in places.heads)
    heads = {
        site.value: tuple(spec for spec in places.heads[site.value] if unsupported(spec, site) is None)
        for site in found
    }
    return Places(tuple(site for site in found if heads[site.value]), heads)


def _check_gates(heads: Mapping[str, Sequence[HeadSpec]], given: Mapping[str, Any]) -> None:
    """All candidates have gates or none has, and the recipe's measure, where it gives one, is for such heads."""
    texts = [str(spec) for specs in heads.values() for spec in specs]
    have = gated(texts)
    if "measure" in given and texts and is_learned(str(given["measure"])) != have:
        cure = (
            "drop it, or take heads without /gate" if have else "drop it, or give the heads a gate (--gates, or /gate)"
        )
        raise OptionError(
            f"the recipe gives insert_exits the measure {given['measure']!r}, which reads "
            f"{'scores, but the heads have gates' if have else 'gates, but the heads have none'}: {cure}"
        )


def _named(options: SearchOptions, given: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Values that are to be the candidate sites; ``None`` where that is left to us."""
    if "sites" in given:
        named: tuple[str, ...] | None = tuple(map(str, given["sites"]))
    else:
        named = options.sites or None
    for part in ("heads", "thresholds"):
        if part not in given:
            continue
        known = tuple(map(str, given[part]))
        named = named or known
        for value in named:
            need(value in known, f"the recipe gives insert_exits {part}, but none for the site {value!r}", OptionError)
    return named


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
        raise ModelError(
            f"the model has no site for an exit (for example {reasons}); `eexform inspect` lists all reasons"
        )
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
    gates: bool = False,
) -> dict[str, tuple[HeadSpec, ...]]:
    """Heads per site: the given ones, or the default portfolio kept below ``max_share`` of the trunk's MACs each.

    With ``gates`` every head of the portfolio has one.

    Raises:
        OptionError: a given text is not a head.
    """
    if specs:
        parsed = tuple(HeadSpec.parse(text) for text in specs)
        return {site.value: parsed for site in sites}
    return {
        site.value: portfolio(
            site, trunk_macs=int(trunk_macs), max_share=max_share, num_classes=graph.num_classes, gates=gates
        )
        for site in sites
    }
