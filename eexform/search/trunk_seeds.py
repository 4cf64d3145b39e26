"""Trunks to begin a search with: nothing cut, then ever more of all, then single items of a set alone.

A space of one share per family is wide, and most of it is of no use: shares drawn at random cut what matters as much as
what does not. A global ratio has a good idea of that already. So the search begins with what such ratios come to, and
moves the families' shares from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eexform.ir.graph import Graph
from eexform.passes import PassContext, get, make
from eexform.search.genome import Genome, Individual
from eexform.search.space import Gene, Space
from eexform.tunables import Choice, Domain, Each, Integer, Real, Subset, describe_fields

LEVELS = (0.05, 0.9)
"""Least and largest share that the seeds ask for."""


def trunk_seeds(space: Space, graphs: Sequence[Graph], count: int) -> list[Individual]:
    """Up to ``count`` different individuals, the one that cuts least first.

    Args:
        space: of the passes in front of ``insert_exits``.
        graphs: what the domains of each pass were made for.
        count: how many.
    """
    found: dict[str, Individual] = {}

    def take(genome: Genome) -> None:
        individual = space.individual(genome)
        if len(found) < count:
            found.setdefault(individual.key, individual)

    take(_genome(space, graphs, 0.0, "global"))
    for scope in ("global", "uniform"):
        for level in np.linspace(*LEVELS, max(1, count // 3)):
            take(_genome(space, graphs, float(level), scope))
    for key, gene in space.genes.items():
        if isinstance(gene.domain, Subset) and gene.domain.items:
            whole = _genome(space, graphs, 0.0, "global")
            places = np.linspace(0, len(gene.domain.items) - 1, min(len(gene.domain.items), count)).astype(int)
            for place in dict.fromkeys(places.tolist()):
                take({**whole, key: (gene.domain.items[place],)})
    return list(found.values())


def _genome(space: Space, graphs: Sequence[Graph], level: float, scope: str) -> Genome:
    genome: Genome = {}
    for key, gene in space.genes.items():
        if isinstance(gene.domain, Each) and key[1] == "ratios":
            genome[key] = _shares(gene, space.recipe[key[0]][1], graphs[key[0]], level, scope)
        else:
            genome[key] = _at(gene.domain, level, _default(gene))
    return genome


def _shares(gene: Gene, given: Mapping[str, Any], graph: Graph, level: float, scope: str) -> dict[str, float]:
    """What each family loses where a pass is asked for one ratio, by a criterion that needs no data."""
    assert isinstance(gene.domain, Each)
    none = dict.fromkeys(gene.domain.domains, 0.0)
    if not level:
        return none
    bound = {key: value for key, value in given.items() if key not in ("ratio", "scope", "criterion")}
    result = make(gene.owner, **bound, ratio=min(level, 0.9), scope=scope)(graph, PassContext())
    cut: Mapping[str, Sequence[int]] = getattr((result.replay or (None,))[0], "cut", {})
    groups, families = graph.groups.by_name, graph.groups.families()
    for family, domain in gene.domain.domains.items():
        members = families.get(family, (family,))
        size = sum(groups[name].size for name in members if name in groups)
        gone = sum(len(cut.get(name, ())) for name in members)
        none[family] = _within(domain, gone / size if size else 0.0)
    return none


def _at(domain: Domain, level: float, default: Any) -> Any:
    """A value that cuts about ``level``: numbers go from their low end to their high one."""
    if isinstance(domain, Real):
        return _within(domain, domain.low + level * (domain.high - domain.low))
    if isinstance(domain, Integer):
        steps = (domain.high - domain.low) // domain.step
        return domain.low + domain.step * round(level * steps)
    if isinstance(domain, Choice):
        return default if default in domain.values else domain.values[round(level * (len(domain.values) - 1))]
    if isinstance(domain, Subset):
        return tuple(domain.items[: domain.least])
    if isinstance(domain, Each):
        return {item: _at(each, level, None) for item, each in domain.domains.items()}
    return domain.sample(np.random.default_rng(0))


def _default(gene: Gene) -> Any:
    for field in describe_fields(get(gene.owner)):
        if field["name"] == gene.key[1]:
            return field["default"]
    return None


def _within(domain: Any, value: float) -> float:
    return float(min(max(value, getattr(domain, "low", value)), getattr(domain, "high", value)))
