"""Passes in front of ``insert_exits``, carried out and written down so that they can be replayed without data.

A pass that looked at samples says afterwards what it did (:attr:`eexform.passes.PassResult.replay`): which channels it
cut, which numbers it put in. A trunk is the list of these *settled* passes, and the numbers by their digest.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from eexform.errors import EexformError, PassError
from eexform.ir.graph import Graph
from eexform.passes import Pass, PassContext, get, make
from eexform.passes.set_parameters import SetParameters
from eexform.search.genome import Key
from eexform.tunables import Each, Subset, missing_parameters, tunable_fields

BoundRecipe = Sequence[tuple[str, Mapping[str, Any]]]

STORED = SetParameters.name
"""The pass that puts stored numbers in place."""


Numbers = Mapping[str, Mapping[str, np.ndarray]]
"""Sets of parameters by their digest."""


@dataclass(frozen=True)
class Layered(Numbers):
    """Two collections of sets as one; nothing is copied or read."""

    first: Numbers
    second: Numbers

    def __getitem__(self, digest: str) -> Mapping[str, np.ndarray]:
        return self.first[digest] if digest in self.first else self.second[digest]

    def __contains__(self, digest: object) -> bool:
        return digest in self.first or digest in self.second

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self.first, *self.second)))

    def __len__(self) -> int:
        return len(list(iter(self)))


@dataclass(frozen=True)
class Settled:
    """What a recipe in front of ``insert_exits`` came to.

    Attributes:
        passes: that make the same trunk from the original, without data.
        arrays: numbers that they need beyond those that were there before, by digest.
        graph: the trunk.
    """

    passes: tuple[tuple[str, Mapping[str, Any]], ...]
    arrays: Numbers
    graph: Graph


def settle_passes(steps: BoundRecipe, original: Graph, context: PassContext, genes: Collection[Key] = ()) -> Settled:
    """Carry out passes and write down what they did.

    A pass that changed nothing is left out, unless it is one that only makes networks faster. What a gene says about
    something that a pass before has taken away does not count.

    Args:
        steps: passes with parameters; a tunable that has neither a value nor a default is drawn, always the same.
        original: the trunk as loaded; it is also what repair compares with.
        context: samples and stored numbers.
        genes: (place, parameter) pairs whose values a search chose on the original; the others stand as they are.

    Raises:
        OptionError, PassError: a pass cannot run.
    """
    context = replace(context, reference=original)
    graph, passes = original, []
    arrays: dict[str, Mapping[str, np.ndarray]] = {}
    for place, (name, given) in enumerate(steps):
        chosen = _fitted(get(name), given, [field for at, field in genes if at == place], original, graph)
        if chosen is None:
            continue
        step = make_step(name, chosen, graph)
        known = Layered(arrays, context.arrays) if arrays else context.arrays
        try:
            result = step(graph, replace(context, arrays=known))
        except EexformError as error:
            raise PassError(f"pass {name!r} in front of insert_exits: {error}") from error
        graph = result.graph
        arrays.update(result.arrays)
        if result.changed or step.preserves_outputs:
            passes += [(one.name, one.to_plain()) for one in ((step,) if result.replay is None else result.replay)]
    return Settled(tuple(passes), arrays, graph)


def replay_passes(passes: BoundRecipe, original: Graph, arrays: Numbers) -> list[Graph]:
    """The trunk before and after each of some settled passes."""
    graphs, context = [original], PassContext(arrays=arrays)
    for name, given in passes:
        graphs.append(make_step(name, given, graphs[-1])(graphs[-1], context).graph)
    return graphs


def needed_arrays(passes: BoundRecipe) -> tuple[str, ...]:
    """Digests of the numbers that settled passes put in place."""
    return tuple(dict.fromkeys(str(given["digest"]) for name, given in passes if name == STORED))


def divide(passes: BoundRecipe) -> tuple[BoundRecipe, BoundRecipe]:
    """The passes up to the last one that changes what a network answers, and those that only make it faster.

    Training stands between them: normalisation that is folded cannot be trained any more.
    """
    changing = [place for place, (name, _) in enumerate(passes) if not get(name).preserves_outputs]
    cut = changing[-1] + 1 if changing else 0
    return list(passes[:cut]), list(passes[cut:])


def trainable(passes: BoundRecipe) -> tuple[BoundRecipe, BoundRecipe]:
    """The passes that training starts from, and those that it leaves for later: they only make networks faster.

    Where the first ones name channels or parameters of a network, everything in front of them stays.
    """
    if any(name == STORED or given.get("cut") for name, given in passes):
        return divide(passes)
    kept = [(name, given) for name, given in passes if not get(name).preserves_outputs]
    return kept, [(name, given) for name, given in passes if get(name).preserves_outputs]


def with_numbers(passes: BoundRecipe, original: Graph, arrays: Numbers, trained: Graph) -> Settled:
    """Settled passes whose trunk has the numbers of ``trained``.

    Args:
        passes: settled, of the trunk that was trained.
        original: the trunk as loaded.
        arrays: numbers that ``passes`` need.
        trained: what training made of the trunk in front of the passes that only make it faster (see :func:`divide`).

    Raises:
        EexformError: it is another network.
    """
    first, later = divide(passes)
    first = list(first)
    biases: dict[str, str] = {}
    while first and first[-1][0] == STORED:
        _, given = first.pop()  # every number of theirs that still counts is among those of ``trained``
        biases = {**given.get("biases", {}), **biases}
    bare = replay_passes(first, original, arrays)[-1].parameters()
    found = trained.parameters()
    added = set(found) - set(bare)
    if set(bare) - set(found) or added - set(biases.values()):
        odd = sorted((set(bare) - set(found)) | (added - set(biases.values())))
        raise EexformError(f"the trained network is not the one that was to be trained: {odd[:3]} differ")
    kept = {node: name for node, name in biases.items() if name in found}
    changed = {
        name: values
        for name, values in found.items()
        if name in kept.values() or not np.array_equal(values, bare[name])
    }
    sets: dict[str, Mapping[str, np.ndarray]] = {}
    stored: list[tuple[str, Mapping[str, Any]]] = []
    if changed:
        step, sets = SetParameters.of(changed, kept)
        stored = [(STORED, step.to_plain())]
    settled = (*first, *stored, *later)
    graph = replay_passes(settled, original, Layered(sets, arrays))[-1]
    return Settled(settled, sets, graph)


def make_step(name: str, given: Mapping[str, Any], graph: Graph) -> Pass:
    """A pass with its parameters, for this graph."""
    cls = get(name)
    return make(name, **given, **drawn(name, missing_parameters(cls, given), graph))


def drawn(name: str, absent: Sequence[str], graph: Graph) -> dict[str, Any]:
    """A value for each tunable among ``absent``, the parameters of a pass that have none: always the same."""
    cls = get(name)
    wanted = [item for item in absent if item in tunable_fields(cls)]
    domains = cls.space(graph, PassContext()) if wanted else {}
    return {item: domains[item].sample(np.random.default_rng(0)) for item in wanted}


def _fitted(
    cls: type[Pass], given: Mapping[str, Any], genes: Sequence[str], original: Graph, graph: Graph
) -> Mapping[str, Any] | None:
    """``given`` with what genes say about the original put in terms of ``graph``.

    Returns:
        ``None`` where a table had entries and all that they are about is gone: there is nothing to do. (An empty table
        would mean the pass's default.)
    """
    tables = [name for name in genes if isinstance(given.get(name), (Mapping, list, tuple))]
    if not tables or graph is original:
        return given
    domains = cls.space(graph, PassContext())
    fitted = dict(given)
    for name in tables:
        domain, value = domains.get(name), given[name]
        if isinstance(domain, Each) and isinstance(value, Mapping):
            followed = {cls.follow(item, original, graph): entry for item, entry in value.items()}
            fitted[name] = {item: entry for item, entry in followed.items() if item in domain.domains}
            if value and not fitted[name]:
                return None
        elif isinstance(domain, Subset) and not isinstance(value, Mapping):
            fitted[name] = tuple(item for item in value if item in domain.items)
    return fitted


class DataNeededError(Exception):
    """A pass asked for samples where none may be looked at. Not an ``EexformError``: nobody is to explain it away."""


@dataclass(frozen=True)
class Withheld:
    """Samples of which only it is known that there will be some."""

    digest: str
    size: int

    def batches(self, batch_size: int) -> Iterator[Any]:
        raise DataNeededError


def shape_of(steps: BoundRecipe, original: Graph, samples: Withheld, genes: Collection[Key] = ()) -> Graph | None:
    """The trunk's structure, its numbers left out, where it can be told without looking at data.

    Passes that would look at data and leave nodes and shapes as they are (``keeps_structure``) are passed over.

    Returns:
        ``None`` where a pass needs data to decide what to cut.

    Raises:
        OptionError, PassError: a pass cannot run.
    """
    graph = original
    context = PassContext(samples=samples, reference=original)
    for place, (name, given) in enumerate(steps):
        chosen = _fitted(get(name), given, [field for at, field in genes if at == place], original, graph)
        if chosen is None or keeps_structure(name):
            continue
        try:
            graph = make_step(name, chosen, graph)(graph, context).graph
        except DataNeededError:
            return None
    return graph


def keeps_structure(name: str) -> bool:
    """Whether a pass changes numbers only."""
    return get(name).keeps_structure
