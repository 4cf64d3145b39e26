"""The search space of a recipe: a gene for each tunable that the recipe leaves open.

The passes in front of ``insert_exits`` decide which trunk it is, and nothing about a trunk depends on the exits that
will be attached: so they are searched first, in a space of their own (:func:`trunk_space`), and the exits of each trunk
found after that (:func:`build_space`).

Nothing here knows a particular pass, but for one thing: the thresholds of ``insert_exits`` are real numbers whose
useful range differs from head to head and measure to measure, so that a mutation of the number would mean nothing
after the head has changed. Their genes are *levels* instead (see :func:`eexform.search.bits.level_ranks`): level l
stands for "the same share of the samples, if all came here, would leave", whatever head is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eexform.errors import OptionError, RunError
from eexform.ir.graph import Graph
from eexform.passes import Pass, PassContext, get
from eexform.passes.insert_exits import threshold
from eexform.search.genome import Genome, Individual, Key
from eexform.tunables import Choice, Domain, Each, Integer, Rng, Subset, missing_parameters, tunable_fields

EXITS = "insert_exits"
"""Name of the pass whose parameters the scorers understand."""

SUPERSEDED: Mapping[str, tuple[str, ...]] = {"ratios": ("ratio", "scope")}
"""Parameters of pruning passes that count for nothing where another one is given: no genes beside that one's."""


@dataclass(frozen=True)
class Gene:
    """One open parameter."""

    key: Key
    owner: str
    domain: Domain

    @property
    def label(self) -> str:
        return f"{self.owner}.{self.key[1]}"


@dataclass(frozen=True)
class Space:
    """All open parameters of a recipe.

    Attributes:
        recipe: pass names with the parameters that are given.
        genes: by key, in order of passes and declaration.
        levels: threshold levels per head.
    """

    recipe: tuple[tuple[str, Mapping[str, Any]], ...]
    genes: Mapping[Key, Gene]
    levels: int

    @property
    def exits_place(self) -> int:
        """Place of ``insert_exits`` in the recipe.

        Raises:
            OptionError: the recipe has none, or several.
        """
        return _exits_place([name for name, _ in self.recipe])

    def value(self, genome: Genome, place: int, name: str, default: Any = None) -> Any:
        """A parameter's value: the gene's, else the recipe's, else ``default``."""
        if (place, name) in genome:
            return genome[place, name]
        return self.recipe[place][1].get(name, default)

    def active(self, genome: Genome, gene: Gene) -> tuple[Any, ...]:
        """The items of an :class:`Each` gene that count in this genome."""
        assert isinstance(gene.domain, Each)
        chosen = self.value(genome, gene.key[0], gene.domain.over)
        return tuple(
            item for item in (gene.domain.domains if chosen is None else chosen) if item in gene.domain.domains
        )

    # -- making genomes ------------------------------------------------------------------------------------------------

    def individual(self, genome: Genome) -> Individual:
        """Wrap a genome."""
        return Individual(genome, self.key(genome))

    def sample(self, rng: Rng) -> Individual:
        """An individual drawn at random."""
        return self.individual({key: gene.domain.sample(rng) for key, gene in self.genes.items()})

    def mutate(self, genome: Genome, rng: Rng) -> Genome:
        """A neighbour: one gene changed for sure, each other one with odds 1 / number of genes."""
        changed = dict(genome)
        sure = int(rng.integers(len(self.genes))) if self.genes else -1
        for place, (key, gene) in enumerate(self.genes.items()):
            if place != sure and rng.random() >= 1.0 / len(self.genes):
                continue
            if isinstance(gene.domain, Each):
                changed[key] = gene.domain.mutate(changed[key], rng, self.active(changed, gene))
            else:
                changed[key] = gene.domain.mutate(changed[key], rng)
        return changed

    def cross(self, left: Genome, right: Genome, rng: Rng) -> tuple[Genome, Genome]:
        """Two children.

        What belongs to one item of a subset (whether it is chosen, and its entries in the genes conditional on it)
        stays together: a site travels with its head and its threshold. Items are exchanged one by one or, half the
        time, as a run of neighbours, so that the early exits of one parent meet the late ones of the other.
        """
        first, second = dict(left), dict(right)
        done: set[Key] = set()
        for key, gene in self.genes.items():
            if not isinstance(gene.domain, Subset):
                continue
            linked = [
                other
                for other in self.genes.values()
                if other.key[0] == key[0] and isinstance(other.domain, Each) and other.domain.over == key[1]
            ]
            moved = _exchanged(gene.domain.items, rng)
            first[key] = _fit(gene.domain, _mixed(gene.domain, left[key], right[key], moved), rng)
            second[key] = _fit(gene.domain, _mixed(gene.domain, right[key], left[key], moved), rng)
            for other in linked:
                first[other.key] = {i: (right if i in moved else left)[other.key][i] for i in left[other.key]}
                second[other.key] = {i: (left if i in moved else right)[other.key][i] for i in left[other.key]}
            done.update([key, *(other.key for other in linked)])
        for key, gene in self.genes.items():
            if key not in done:
                first[key], second[key] = gene.domain.cross(left[key], right[key], rng)
        return first, second

    # -- names and files -----------------------------------------------------------------------------------------------

    def key(self, genome: Genome) -> str:
        """Canonical text; genomes that differ only in genes that do not count share it."""
        plain = [self._plain(genome, gene, only_active=True) for gene in self.genes.values()]
        return json.dumps(plain, sort_keys=True, separators=(",", ":"))

    def encode(self, genome: Genome) -> list[Any]:
        """The genome as JSON values, in the order of :attr:`genes`."""
        return [self._plain(genome, gene, only_active=False) for gene in self.genes.values()]

    def decode(self, plain: Sequence[Any]) -> Individual:
        """Inverse of :meth:`encode`.

        Raises:
            RunError: the values do not fit this space.
        """
        if len(plain) != len(self.genes):
            raise RunError(
                f"a stored genome has {len(plain)} values, the search space {len(self.genes)}; it is another space"
            )
        try:
            genome = {
                gene.key: _decode(gene.domain, value, gene.label)
                for gene, value in zip(self.genes.values(), plain, strict=True)
            }
        except (OptionError, KeyError, TypeError, ValueError) as error:
            raise RunError(f"a stored genome does not fit the search space: {error}") from error
        return self.individual(genome)

    def describe(self) -> list[dict[str, Any]]:
        """What is searched, for journal and reports: pass, parameter, domain and, where there are few, the choices."""
        return [
            {"pass": gene.owner, "place": key[0], "name": key[1], "domain": _described(gene.domain)}
            for key, gene in self.genes.items()
        ]

    def fixed_thresholds(self) -> dict[str, float]:
        """Thresholds that the recipe gives, by site: they are not searched."""
        given = self.recipe[self.exits_place][1].get("thresholds", {})
        return {str(site): threshold(value, site) for site, value in given.items()}

    def bind(self, genome: Genome, thresholds: Mapping[str, float]) -> list[tuple[str, dict[str, Any]]]:
        """The recipe with every open parameter bound; of conditional ones, the entries that count.

        Args:
            thresholds: of each chosen site, as numbers (the genome only knows levels).
        """
        return [self._bound(genome, place, thresholds) for place in range(len(self.recipe))]

    def _bound(self, genome: Genome, place: int, thresholds: Mapping[str, float]) -> tuple[str, dict[str, Any]]:
        name, given = self.recipe[place]
        parameters = dict(given)
        for key, gene in self.genes.items():
            if key[0] != place:
                continue
            value = genome[key]
            if isinstance(gene.domain, Each):
                value = {item: value[item] for item in self.active(genome, gene)}
                if name == EXITS and key[1] == "thresholds":
                    value = {site: thresholds[site] for site in value}
            parameters[key[1]] = value
        return name, parameters

    def _plain(self, genome: Genome, gene: Gene, *, only_active: bool) -> Any:
        value = genome[gene.key]
        if isinstance(gene.domain, Each):
            items = self.active(genome, gene) if only_active else tuple(gene.domain.domains)
            return {str(item): plain(value[item]) for item in items}
        return plain(value)


def build_space(
    recipe: Sequence[tuple[str, Mapping[str, Any]]],
    graph: Graph,
    context: PassContext,
    *,
    levels: int = 128,
) -> Space:
    """The space of the tunables of ``insert_exits`` that a recipe leaves open.

    Args:
        recipe: pass names with the parameters that are given; those in front of ``insert_exits`` are taken as they are.
        graph: the trunk that the exits are for.
        context: for domains that depend on trained heads.
        levels: threshold levels per head.

    Raises:
        OptionError: unknown pass, ``insert_exits`` not there exactly once, or a required parameter left open behind it.
    """
    genes: dict[Key, Gene] = {}
    exits_place = _exits_place([name for name, _ in recipe])
    for name, given in recipe[exits_place + 1 :]:
        _refuse_open(name, get(name), given)
    for gene in _genes(exits_place, recipe[exits_place], graph, context):
        if gene.key[1] == "thresholds" and isinstance(gene.domain, Each):
            gene = replace(gene, domain=Each(gene.domain.over, dict.fromkeys(gene.domain.domains, _levels(levels))))
        genes[gene.key] = gene
    return Space(_checked(recipe), genes, levels)


def trunk_space(
    passes: Sequence[tuple[str, Mapping[str, Any]]], graphs: Sequence[Graph], context: PassContext
) -> Space:
    """The space of the open tunables of the passes in front of ``insert_exits``.

    Args:
        passes: names with the parameters that are given.
        graphs: what the domains of each pass depend on.
        context: for domains that depend on more than a graph.
    """
    genes: dict[Key, Gene] = {}
    for place, (step, graph) in enumerate(zip(passes, graphs, strict=True)):
        found = {gene.key[1]: gene for gene in _genes(place, step, graph, context)}
        for name, others in SUPERSEDED.items():
            if name in found and not getattr(found[name].domain, "domains", True):
                del found[name]  # a table without a single item
            elif name in found:
                found = {other: gene for other, gene in found.items() if other not in others}
        genes.update({gene.key: gene for gene in found.values()})
    return Space(_checked(passes), genes, 0)


def _genes(place: int, step: tuple[str, Mapping[str, Any]], graph: Graph, context: PassContext) -> list[Gene]:
    name, given = step
    open_fields = [field for field in tunable_fields(get(name)) if field not in given]
    if not open_fields:
        return []
    domains = get(name).space(graph, context)
    # a domain may say that there is nothing to choose on this graph by being left out
    return [Gene((place, field), name, domains[field]) for field in open_fields if field in domains]


def _levels(count: int) -> Integer:
    return Integer(0, count - 1)


def _checked(recipe: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    return tuple((name, get(name).checked(given)) for name, given in recipe)


def plain(value: Any) -> Any:
    """``value`` with tuples, sets and mappings as JSON knows them."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(entry) for entry in value]
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    return str(value)


def _decode(domain: Domain, value: Any, label: str) -> Any:
    if isinstance(domain, Each):
        return {item: _decode(each, value[str(item)], f"{label}[{item}]") for item, each in domain.domains.items()}
    if isinstance(domain, Choice):
        return domain.values[[plain(choice) for choice in domain.values].index(value)]
    if isinstance(domain, Subset):
        items = {json.dumps(plain(item)): item for item in domain.items}
        return domain.validate(tuple(items[json.dumps(entry)] for entry in value), label)
    return domain.validate(value, label)


def _described(domain: Domain) -> Any:
    if isinstance(domain, Each):
        return {"over": domain.over, "each": {str(item): _described(each) for item, each in domain.domains.items()}}
    if isinstance(domain, Choice):
        return {"choice": [plain(value) for value in domain.values]}
    if isinstance(domain, Subset):
        return {"subset": [plain(item) for item in domain.items], "least": domain.least, "most": domain.most}
    return domain.describe()


def _exits_place(names: Sequence[str]) -> int:
    if names.count(EXITS) != 1:
        raise OptionError(f"a recipe to search needs the pass {EXITS!r} exactly once, found {names.count(EXITS)} times")
    return names.index(EXITS)


def _refuse_open(name: str, cls: type[Pass], given: Mapping[str, Any]) -> None:
    """Behind ``insert_exits`` defaults apply: cached scores cannot tell what a later pass changes."""
    for field in missing_parameters(cls, given):
        if field in tunable_fields(cls):
            raise OptionError(f"{name}.{field}: parameters of passes behind {EXITS!r} cannot be searched; give a value")


def _exchanged(items: Sequence[Any], rng: Rng) -> frozenset[Any]:
    """Which items change parents: each by a coin, or a run of neighbours."""
    if rng.random() < 0.5:
        coins = rng.random(len(items))
        return frozenset(item for item, coin in zip(items, coins, strict=True) if coin < 0.5)
    start, stop = sorted(int(cut) for cut in rng.integers(0, len(items) + 1, size=2))
    return frozenset(items[start:stop])


def _mixed(domain: Subset, own: Sequence[Any], other: Sequence[Any], moved: frozenset[Any]) -> list[Any]:
    return [item for item in domain.items if item in (other if item in moved else own)]


def _fit(domain: Subset, chosen: list[Any], rng: Rng) -> tuple[Any, ...]:
    """``chosen`` with items dropped or added at random until the subset's bounds hold."""
    most = len(domain.items) if domain.most is None else min(domain.most, len(domain.items))
    while len(chosen) > most:
        del chosen[int(rng.integers(len(chosen)))]
    while len(chosen) < domain.least:
        free = [item for item in domain.items if item not in chosen]
        chosen.append(free[int(rng.integers(len(free)))])
    return tuple(item for item in domain.items if item in chosen)
