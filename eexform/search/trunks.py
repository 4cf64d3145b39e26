"""The search for trunks: many are tried as they are, the better ones trained, few get exits.

What a trunk is good for shows after training, and training is dear. So trunks are ranked repaired but not trained, by
their error on calibrate (:mod:`eexform.search.trunk_trials`); those that no other one beats, spread over the cost, are
trained in rungs (:mod:`eexform.search.halving`), each rung keeping about half; the last ones get exits. The original
takes part throughout and is never trained.

Everything is a function of the seed, and everything that takes time is looked up in the log first: going on after an
interruption repeats the decisions and none of the work.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from eexform.data import Calibration, Dataset
from eexform.errors import OptionError, need
from eexform.ir.graph import Graph
from eexform.passes import PassContext, get
from eexform.progress import Progress
from eexform.search.arrays import ArrayStore
from eexform.search.folder import RunFolder
from eexform.search.genome import Constraints, Individual
from eexform.search.goals import Goals
from eexform.search.halving import Rung, plan_rungs, spread
from eexform.search.nsga2 import Settings, State, evolve
from eexform.search.objectives import Objectives
from eexform.search.proxy import Proxy
from eexform.search.settling import (
    BoundRecipe,
    DataNeededError,
    Settled,
    Withheld,
    divide,
    needed_arrays,
    replay_passes,
    settle_passes,
    with_numbers,
)
from eexform.search.space import Space, plain, trunk_space
from eexform.search.trunk_log import TrunkLog
from eexform.search.trunk_options import TrunkOptions
from eexform.search.trunk_trials import Prices, Trials, Trunk

SEEDED = 0.75
"""Share of the first trunks that are made (see :mod:`eexform.search.trunk_seeds`) rather than drawn."""


@dataclass(frozen=True)
class TrunkStage:
    """A search for trunks, checked as far as that is possible without data.

    Attributes:
        original: the trunk as loaded.
        dataset: bound to it.
        folder: of the run.
        objectives: what plans are made small by, with every cost model that they or limits look at.
        steps: the passes in front of ``insert_exits`` with what each is given.
        options: how the search is run.
        seed: of everything.
        threads: 0 is one per core.
        device: to train on.
        progress: who is told.
        limited: keys of the cost models that limits name.
    """

    original: Graph
    dataset: Dataset
    folder: RunFolder
    objectives: Objectives
    steps: BoundRecipe
    options: TrunkOptions
    seed: int
    threads: int
    device: str
    progress: Progress
    limited: frozenset[str] = frozenset()

    @cached_property
    def store(self) -> ArrayStore:
        """Stored numbers of the run's trunks."""
        return ArrayStore(self.folder.trunks)

    @cached_property
    def plain(self) -> BoundRecipe:
        """The passes that only make networks faster: with them alone the original is searched."""
        return settle_passes(preserving(self.steps), self.original, PassContext()).passes

    @cached_property
    def graphs(self) -> list[Graph]:
        """What the domains of each pass are made for: the original behind those that only make it faster."""
        graphs = [self.original]
        for step in self.steps[:-1]:
            kept = preserving([step])
            graphs.append(settle_passes(kept, graphs[-1], PassContext()).graph if kept else graphs[-1])
        return graphs[: len(self.steps)]

    @cached_property
    def space(self) -> Space:
        """Genes of the passes' open tunables."""
        samples = Withheld("", self.options.samples)
        return trunk_space(self.steps, self.graphs, PassContext(samples=samples))

    @property
    def searched(self) -> bool:
        """Whether there is anything to choose; if not, the recipe makes one trunk."""
        return bool(self.space.genes)

    def settled_without_data(self) -> BoundRecipe | None:
        """The passes of a recipe that leaves nothing open, where they need neither data nor stored numbers."""
        if self.searched:
            return None
        try:
            found = settle_passes(self.steps, self.original, PassContext(samples=Withheld("", self.options.samples)))
        except DataNeededError:
            return None
        return None if found.arrays else found.passes

    @cached_property
    def prices(self) -> Prices:
        """Prices of trunks, and the objectives in numbers, given what the original costs."""
        named = {term.model for one in self.objectives.listed for _, term in one.parts} | self.limited | {"params"}
        models = {key: model for key, model in self.objectives.models.items() if key in named}
        prices = Prices(self.folder.latencies, models, Goals(()), self.options.exits)
        return replace(prices, goals=self.objectives.goals(prices.of(self.lean)))

    @cached_property
    def lean(self) -> Graph:
        """The original behind the passes that only make it faster."""
        return replay_passes(self.plain, self.original, {})[-1]

    # -- the search --------------------------------------------------------------------------------------------------

    def run(self, constraints: Constraints, facts: dict[str, Any]) -> list[Trunk]:
        """Find the trunks that get exits, by rising cost; the original is not among them.

        Args:
            constraints: limits on every plan; what a trunk's structure says about them is heeded.
            facts: learns what was tried and spent, interrupted or not.

        Raises:
            OptionError: no trunk that was tried keeps the limits.
            KeyboardInterrupt: Ctrl-C; what was tried and trained is kept.
        """
        log = TrunkLog(self.folder.trunk_log, self._identity())
        trials = self._trials(constraints, log)
        try:
            found = self._searched(trials, facts) if self.searched else self._fixed(trials, facts)
        finally:
            facts["spent"] = {kind: log.spent(kind) for kind in ("tried", "ranked", "trained")}
        facts["trunks"] = [trunk.to_json() for trunk in found]
        return found

    def _trials(self, constraints: Constraints, log: TrunkLog) -> Trials:
        samples = Calibration(self.dataset, size=self.options.samples, seed=self.seed)
        return Trials(
            space=self.space,
            original=self.original,
            graphs=self.graphs,
            context=PassContext(samples=samples, arrays=self.store),
            proxy=Proxy(self.original, self.dataset, self.options.samples, self.threads),
            prices=self.prices,
            constraints=constraints,
            log=log,
            baseline=self.lean.digest,
        )

    def _identity(self) -> dict[str, Any]:
        """All that decides what comes of a trial or of training."""
        return {
            "trunk": self.original.digest,
            "data": self.dataset.digest,
            "recipe": [[name, plain(given)] for name, given in self.steps],
            "space": self.space.describe(),
            "samples": self.options.samples,
            "training": [self.options.learning_rate, self.options.batch_size],
            "seed": self.seed,
        }

    def _searched(self, trials: Trials, facts: dict[str, Any]) -> list[Trunk]:
        options, say = self.options, self.progress.say
        settings = Settings(
            population=options.population, generations=options.generations, seeded=SEEDED, refine_every=0
        )
        prices = self.prices
        whole = prices.of(self.lean)
        anchor = prices.values(trials.rank(self.original), whole)
        say(
            f"trunks: at most {options.population * (options.generations + 1)} are tried, each repaired as the recipe "
            f"says and ranked by its error on {trials.proxy.samples} samples of calibrate"
            + (f"; then at most {options.epochs} epochs of training in all" if options.epochs else ", none trained")
            + f"; {options.survivors} of them and the original {'get exits' if options.exits else 'are compared'}"
        )
        self._evolve(trials, settings)
        pool = sorted(trials.pool.values(), key=lambda entry: (*entry[1][1:], entry[1][0], entry[0].key))
        rungs = plan_rungs(options.epochs, options.survivors, len(pool), options.rungs)
        first = rungs[0].candidates if rungs else options.survivors
        points = np.array([values for _, values in pool], np.float64)
        chosen = [pool[place][0] for place in spread(points, first, anchor)]
        facts["rungs"] = [[rung.candidates, rung.epochs] for rung in rungs]
        trunks = [self._settled(trials, individual, rungs) for individual in chosen]
        label = prices.goals.listed[0].cost_label
        say(f"the original: error {anchor[0]:.4f}, {label} {prices.cost(whole):.6g}")
        self._show("as repaired", trunks, prices.cost(whole))
        if rungs:
            say("training: " + ", then ".join(f"{rung.candidates} trunks for {rung.epochs} epochs" for rung in rungs))
        for place, rung in enumerate(rungs):
            trunks = [self._trained(trials, trunk, rung, place) for trunk in trunks]
            following = rungs[place + 1].candidates if place + 1 < len(rungs) else options.survivors
            points = np.array([prices.values(t.error, prices.noted_of(t.to_json())) for t in trunks], np.float64)
            trunks = [trunks[kept] for kept in spread(points, following, anchor)]
            self._show(f"after rung {place + 1}", trunks, prices.cost(whole))
        return trunks

    def _fixed(self, trials: Trials, facts: dict[str, Any]) -> list[Trunk]:
        """The one trunk that the recipe makes, trained for the whole budget."""
        rungs = plan_rungs(self.options.epochs, 1, 1)
        trunk = self._settled(trials, None, rungs)
        over = trials.over(self.prices.noted_of(trunk.to_json()))
        if over:
            raise OptionError(
                f"the trunk that the recipe makes exceeds the cost limits by {100 * over:.1f} %: raise the limit, or "
                "cut more"
            )
        facts["rungs"] = [[rung.candidates, rung.epochs] for rung in rungs]
        for place, rung in enumerate(rungs):
            self.progress.say(f"training the trunk that the recipe makes for {rung.epochs} epochs")
            trunk = self._trained(trials, trunk, rung, place)
        return [trunk]

    def _evolve(self, trials: Trials, settings: Settings) -> None:
        total = settings.population * (settings.generations + 1)
        with self.progress.task("trying trunks", total) as task:
            trials.report = lambda text: task.advance(1, text)
            state: State = evolve(self.space, trials, settings, seed=self.seed)
        if state.interrupted:
            raise KeyboardInterrupt
        if not trials.pool:
            raise OptionError(
                "every trunk that was tried is the original or breaks a limit: leave more open in the recipe, or "
                "loosen the limits"
            )

    # -- single trunks -----------------------------------------------------------------------------------------------

    def tidy(self, found: Sequence[Trunk]) -> None:
        """Delete the stored numbers of all trunks but those found."""
        self.store.keep([digest for trunk in found for digest in needed_arrays(trunk.passes)])

    def _settled(self, trials: Trials, individual: Individual | None, rungs: Sequence[Rung]) -> Trunk:
        """An individual's trunk (``None``: the recipe's), with its numbers on the disk where they are still needed."""
        key = "" if individual is None else individual.key
        known = trials.log.find("settled", key)
        if known is not None and self.prices.covers(known["trunk"]):
            trunk = Trunk.from_json(known["trunk"])
            done = rungs and trials.log.find("trained", [trunk.digest, 0, rungs[0].epochs]) is not None
            if done or all(digest in self.store for digest in needed_arrays(trunk.passes)):
                return trunk
        begun = time.perf_counter()
        if individual is None:
            settled = settle_passes(self.steps, self.original, trials.context)
        else:
            settled = trials.settled(individual)
        return self._note_settled(trials, key, settled, time.perf_counter() - begun)

    def _note_settled(self, trials: Trials, key: str, settled: Settled, seconds: float) -> Trunk:
        graph = settled.graph
        noted = self.prices.noted(self.prices.of(graph))
        trunk = Trunk(settled.passes, graph.digest, trials.rank(graph), **noted)
        self.store.put(settled.arrays)
        trials.log.note("settled", key, seconds=seconds, trunk=trunk.to_json())
        return trunk

    def _trained(self, trials: Trials, trunk: Trunk, rung: Rung, place: int) -> Trunk:
        """``trunk`` after a rung of training."""
        identity = [trunk.digest, place, rung.epochs]
        known = trials.log.find("trained", identity) or self._train(trials, trunk, rung, identity)
        # training changes no price; those on record may be fewer, from before other limits were asked for
        return replace(Trunk.from_json(known["trunk"]), prices=trunk.prices)

    def _train(self, trials: Trials, trunk: Trunk, rung: Rung, identity: Sequence[Any]) -> dict[str, Any]:
        from eexform.training.distill import distill_trunk  # imports torch, which takes a second or two

        for digest in needed_arrays(trunk.passes):
            need(digest in self.store, f"{self.folder.trunks}: the numbers {digest[:12]} are gone; start a new run")
        begun = time.perf_counter()
        first, _ = divide(trunk.passes)
        graph = replay_passes(first, self.original, self.store)[-1]
        work = self.folder.trunks / f"training-{trunk.digest[:16]}-{identity[1]}"
        report = distill_trunk(
            graph,
            self.dataset,
            self.original,
            folder=work,
            threads=self.threads,
            progress=self.progress,
            device=self.device,
            epochs=rung.epochs,
            seed=self.seed,
            **self._training(),
        )
        settled = with_numbers(trunk.passes, self.original, self.store, report.graph)
        error = trials.rank(settled.graph)
        trained = replace(trunk, epochs=trunk.epochs + rung.epochs)
        if error <= trunk.error:
            self.store.put(settled.arrays)
            trained = replace(trained, passes=settled.passes, digest=settled.graph.digest, error=error)
        else:
            self.progress.say(
                f"training made a trunk worse: error {error:.4f} instead of {trunk.error:.4f}; it stays as it was"
            )
        # the time of an interrupted training counts, too
        seconds = max(report.seconds, time.perf_counter() - begun)
        line = trials.log.note(
            "trained",
            list(identity),
            seconds=seconds,
            epochs=rung.epochs,
            best_epoch=report.best_epoch,
            error=[trunk.error, error],
            trunk=trained.to_json(),
        )
        shutil.rmtree(work, ignore_errors=True)
        return line

    def _training(self) -> dict[str, Any]:
        given = {"trunk_learning_rate": self.options.learning_rate, "batch_size": self.options.batch_size}
        return {name: value for name, value in given.items() if value is not None}

    def _show(self, when: str, trunks: Sequence[Trunk], whole: float) -> None:
        shown = ", ".join(f"{trunk.error:.4f} at {trunk.cost / whole:.3f}x" for trunk in trunks)
        self.progress.say(f"{len(trunks)} trunks {when} (error at cost): {shown}")


def preserving(steps: BoundRecipe) -> BoundRecipe:
    """The passes that leave every answer as it is."""
    return [(name, given) for name, given in steps if get(name).preserves_outputs]
