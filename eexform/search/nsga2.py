"""NSGA-II with DEAP's operators, a memetic step, and an archive of every non-dominated plan.

One numpy generator drives everything; DEAP's tournament, which draws from Python's global ``random``, is given a seed
from it for the length of the call. A generation is a function of the state before it alone, so a state read from a
journal continues exactly as the run that wrote it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
from deap import tools

from eexform.errors import OptionError, need
from eexform.search.archive import Archive
from eexform.search.genome import Individual
from eexform.search.handling import Handling, Seen, seen
from eexform.search.space import Space
from eexform.tunables import Rng


class Evaluator(Protocol):
    """What the search asks about individuals (see :class:`eexform.search.evaluation.Evaluation`)."""

    def evaluate(self, individuals: Sequence[Individual]) -> None: ...

    def certain_violation(self, individual: Individual) -> float: ...

    def seeds(self, count: int, rng: Rng) -> list[Individual]: ...

    def refine(self, individuals: Sequence[Individual], rng: Rng) -> list[Individual]: ...


@dataclass(frozen=True)
class Settings:
    """How the search is run.

    Attributes:
        population: individuals kept from generation to generation; a multiple of 4 (the tournament works on fours).
        generations: how many after the initial population.
        crossover: odds that two parents are crossed.
        mutation: odds that a crossed child is mutated as well (an uncrossed one always is).
        seeded: share of the initial population that is made rather than drawn.
        refine_every: generations between two memetic steps; 0 never.
        refine_elites: individuals improved in each.
        tries: attempts to replace a child that is known already or certain to violate a constraint.
        handling: how plans that violate a constraint are compared with others.
    """

    population: int = 96
    generations: int = 60
    crossover: float = 0.9
    mutation: float = 0.6
    seeded: float = 0.5
    refine_every: int = 4
    refine_elites: int = 12
    tries: int = 8
    handling: Handling = field(default_factory=Handling)

    def __post_init__(self) -> None:
        need(
            self.population >= 4 and self.population % 4 == 0,
            f"population {self.population} is not a multiple of 4",
            OptionError,
        )
        need(self.generations >= 0, f"generations {self.generations} is negative", OptionError)
        for name in ("crossover", "mutation", "seeded"):
            need(0.0 <= getattr(self, name) <= 1.0, f"{name} {getattr(self, name)} is not in 0..1", OptionError)
        need(
            self.refine_every >= 0 and self.refine_elites >= 0 and self.tries >= 1,
            "refine_*, tries too small",
            OptionError,
        )

    def to_json(self) -> dict[str, Any]:
        plain = asdict(self)
        if self.handling == Handling():  # as before there was a choice, so that older journals go on
            del plain["handling"]
        return plain


@dataclass
class State:
    """Everything the next generation depends on.

    Attributes:
        generation: the one just finished; 0 is the initial population.
        population: survivors, scored.
        archive: every non-dominated individual so far.
        rng: the generator, as it stands after ``generation``.
        evaluated: plans scored so far.
        added: what the last generation brought into the archive.
        seconds: how long the last generation took.
        interrupted: the search was stopped by Ctrl-C before its last generation.
    """

    generation: int
    population: list[Individual]
    archive: Archive
    rng: Rng
    evaluated: int = 0
    added: list[Individual] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False


def evolve(
    space: Space,
    evaluation: Evaluator,
    settings: Settings,
    *,
    seed: int,
    state: State | None = None,
    on_generation: Callable[[State], None] | None = None,
) -> State:
    """Run the search to its last generation.

    Args:
        space: the genes.
        evaluation: scores individuals.
        settings: how.
        seed: of the generator.
        state: where to go on (from a journal); ``None`` begins anew.
        on_generation: called after every generation, the initial population included (journal, progress).

    Returns:
        The last state; with ``interrupted`` set where Ctrl-C came first: then it is that of the last whole generation.

    Raises:
        OptionError: no plan that was tried keeps the constraints that can be judged beforehand.
    """
    report = on_generation or (lambda _: None)
    if state is None:
        state = start(space, evaluation, settings, seed)
        report(state)
    while state.generation < settings.generations:
        try:
            state = step(space, evaluation, settings, state)
        except KeyboardInterrupt:
            state.interrupted = True
            return state
        report(state)
    return state


def start(space: Space, evaluation: Evaluator, settings: Settings, seed: int) -> State:
    """The initial population: made and drawn individuals."""
    begun = time.perf_counter()
    rng = np.random.default_rng(seed)
    wanted = settings.population
    made = evaluation.seeds(max(1, round(settings.seeded * wanted)), rng) if settings.seeded else []
    # the trunk alone comes first and stays, whatever the constraints say: it is what everything is compared with
    population = [one for place, one in enumerate(made) if place == 0 or not evaluation.certain_violation(one)]
    known = {one.key for one in population}
    least = min((evaluation.certain_violation(one) for one in made), default=np.inf)
    for _ in range(settings.tries * wanted):
        if len(population) >= wanted:
            break
        drawn = space.sample(rng)
        violation = evaluation.certain_violation(drawn)
        least = min(least, violation)
        if drawn.key not in known and not violation:
            known.add(drawn.key)
            population.append(drawn)
    if least > 0:
        raise OptionError(
            f"none of the plans tried keeps the cost limits; the nearest exceeds them by {100 * least:.1f} %: "
            "raise the limit"
        )
    evaluation.evaluate(population)
    archive = Archive()
    added = archive.offer(population)
    return State(0, population, archive, rng, len(population), added, time.perf_counter() - begun)


def step(space: Space, evaluation: Evaluator, settings: Settings, state: State) -> State:
    """One generation. ``state`` stays as it was (a copy of its generator goes on), so an interruption is harmless."""
    begun = time.perf_counter()
    rng = np.random.Generator(type(state.rng.bit_generator)())
    rng.bit_generator.state = state.rng.bit_generator.state
    generation = state.generation + 1
    children = _children(space, evaluation, settings, state.population, rng)
    evaluation.evaluate(children)
    evaluated = len(children)
    pool = [*state.population, *children]
    if settings.refine_every and generation % settings.refine_every == 0:
        known = {one.key for one in pool}
        refined = []
        for one in evaluation.refine(elites(pool, settings.refine_elites), rng):
            if one.key not in known and not evaluation.certain_violation(one):
                known.add(one.key)
                refined.append(one)
        evaluation.evaluate(refined)
        evaluated += len(refined)
        children = [*children, *refined]
        pool += refined
    archive = Archive()
    archive.offer(list(state.archive))
    added = archive.offer(children)
    return State(
        generation,
        select(pool, settings.population, settings.handling),
        archive,
        rng,
        state.evaluated + evaluated,
        added,
        time.perf_counter() - begun,
    )


def select(pool: Sequence[Individual], count: int, handling: Handling | None = None) -> list[Individual]:
    """NSGA-II's survivors. Feasibility first: those that keep all constraints, then the least violating ones; or with
    what another ``handling`` adds to the objectives of those that violate one."""
    fit = [one for one in pool if not one.fitness.violation]
    if len(fit) < len(pool) and handling is not None and handling.kind != "feasible-first":
        return [one.individual for one in tools.selNSGA2(seen(pool, handling), min(count, len(pool)), nd="log")]
    unfit = sorted((one for one in pool if one.fitness.violation), key=lambda one: one.fitness.violation)
    chosen = tools.selNSGA2(fit, min(count, len(fit)), nd="log") if fit else []
    return [*chosen, *unfit[: count - len(chosen)]]


def elites(pool: Sequence[Individual], count: int) -> list[Individual]:
    """Individuals of the first front, the loneliest first."""
    fit = [one for one in pool if not one.fitness.violation]
    if not fit or not count:
        return []
    front = tools.sortLogNondominated(fit, len(fit), first_front_only=True)
    return list(tools.selNSGA2(front, min(count, len(front)), nd="log"))


@contextmanager
def seeded_random(rng: Rng) -> Iterator[None]:
    """Python's global ``random``, seeded from ``rng`` inside the block and as it was behind it."""
    before = random.getstate()
    random.seed(int(rng.integers(2**63)))
    try:
        yield
    finally:
        random.setstate(before)


def _children(
    space: Space, evaluation: Evaluator, settings: Settings, population: Sequence[Individual], rng: Rng
) -> list[Individual]:
    known = {one.key for one in population}
    parents = _parents(population, settings.population, settings.handling, rng)
    children: list[Individual] = []

    def take(genome: dict[Any, Any]) -> None:
        for attempt in range(settings.tries):
            child = space.individual(genome)
            if child.key not in known and not evaluation.certain_violation(child):
                known.add(child.key)
                children.append(child)
                return
            # known already: walk on; towards the end, jump
            genome = space.mutate(genome, rng) if attempt < settings.tries // 2 else space.sample(rng).genome

    for left, right in zip(parents[::2], parents[1::2], strict=True):
        pair = (left.genome, right.genome)
        crossed = rng.random() < settings.crossover
        if crossed:
            pair = space.cross(*pair, rng)
        for genome in pair:
            take(space.mutate(genome, rng) if not crossed or rng.random() < settings.mutation else genome)
    return children


def _parents(population: Sequence[Individual], count: int, handling: Handling, rng: Rng) -> list[Individual]:
    """``count`` parents by binary tournaments on domination, then on crowding."""
    crowd = seen(population, handling)
    _measure_crowding(crowd)
    usable = len(population) // 4 * 4
    parents: list[Individual] = []
    while usable and len(parents) < count:
        with seeded_random(rng):
            parents += [one.individual for one in tools.selTournamentDCD(crowd, usable)]
    while len(parents) < count:
        parents.append(population[int(rng.integers(len(population)))])
    return parents[:count]


def _measure_crowding(crowd: Sequence[Seen]) -> None:
    """Set the crowding distances from the population alone (those left by the last selection are lost by a resume)."""
    fit = [one for one in crowd if not one.fitness.violation]
    for one in crowd:
        one.fitness.crowding_dist = 0.0
    for front in tools.sortLogNondominated(fit, len(fit)) if fit else ():
        tools.emo.assignCrowdingDist(front)
