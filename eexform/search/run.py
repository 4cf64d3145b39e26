"""A run: what a search left in its folder, ready to be looked at, exported and gone on with."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from eexform import files
from eexform.backends import protos
from eexform.backends.export import export as write_form
from eexform.backends.lower_multi import lower_multi
from eexform.backends.metadata import TRUNK
from eexform.data import Dataset, DataSource, load_dataset
from eexform.errors import OptionError, RunError, need
from eexform.frontends.onnx import load
from eexform.ir.flow import WIDEST
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.passes import PassContext, Pipeline, PlanStore, Recipe, Step, make
from eexform.search.arrays import ArrayStore
from eexform.search.folder import RunFolder
from eexform.search.front import Front, Plan
from eexform.search.settling import BoundRecipe, needed_arrays, replay_passes, trainable
from eexform.search.space import EXITS
from eexform.search.variants import bank_of
from eexform.training.bank import Bank


class Run:
    """A search's results.

    Attributes:
        folder: where everything lies.
        facts: ``run.json``: settings, state (``trunks``, ``training``, ``searching``, ``interrupted``, ``failed`` with
            the message as ``error``, ``done``), timings, figures of the trunk. A run of :func:`eexform.train` is
            ``finetuning`` first, and its ``trained_from`` says what it was made from.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = RunFolder(path)
        self.facts: dict[str, Any] = self.folder.read()

    @property
    def state(self) -> str:
        return str(self.facts.get("state", "unknown"))

    @property
    def trained_from(self) -> dict[str, Any]:
        """Run, plan and options that the trunk and its heads were fine-tuned from; empty for a run of a search."""
        return dict(self.facts.get("trained_from") or {})

    @cached_property
    def front(self) -> Front:
        """The plans found.

        Raises:
            RunError: the search was stopped before its first generation.
        """
        if not self.folder.front.exists():
            raise RunError(f"{self.folder.path}: there is no front yet (state: {self.state}); {self._onward()}")
        return Front.from_json(files.read_json(self.folder.front), source=self)

    @cached_property
    def graph(self) -> Graph:
        """The trunk as it was loaded for the search, or came out of fine-tuning.

        Raises:
            RunError: the file has been replaced, or fine-tuning is not finished.
            ModelError: it is missing or damaged.
        """
        if self.trained_from and not self.folder.trunk.exists():
            raise RunError(f"{self.folder.path}: the fine-tuning is not finished; {self._onward()}")
        graph = load(self.folder.trunk, scores=self.facts["scores"])
        if graph.digest != self.facts["trunk_digest"]:
            raise RunError(
                f"{self.folder.trunk}: is not the model that was searched (digest {graph.digest[:12]}, expected "
                f"{self.facts['trunk_digest'][:12]}); put that one back"
            )
        return graph

    @cached_property
    def original(self) -> Graph:
        """The model that the plans are compared with: the trunk, or what was loaded before anything was fine-tuned.

        Raises:
            RunError: the file has been replaced.
            ModelError: it is missing or damaged.
        """
        if not self.trained_from:
            return self.graph
        graph, expected = load(self.folder.original, scores=self.facts["scores"]), self.trained_from["original"]
        if graph.digest != expected:
            raise RunError(
                f"{self.folder.original}: is not the model that the plans were compared with (digest "
                f"{graph.digest[:12]}, expected {expected[:12]}); put that one back"
            )
        return graph

    def dataset(self, data: str | DataSource | None = None) -> Dataset:
        """The data set of the search, bound to the trunk.

        Args:
            data: where the samples are now, if not where they were.
        """
        return load_dataset(self.folder.path, data=data, cache_folder=self.folder.path / "cache", check=False).bind(
            self.graph
        )

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that was searched, with the tunables that were left open.

        Raises:
            OptionError: it names a pass that is not installed here.
        """
        return Recipe.parse(self.facts["recipe"], where=str(self.folder.run))

    def materialise(self, plan: Plan, *, lean: bool = True) -> Graph:
        """The graph with a plan's exits and trained heads.

        Args:
            plan: of this run.
            lean: with the passes that only make the network faster, as exported files have them. Without,
                normalisation is still there to be trained, and parameters have the names that they had.

        Raises:
            RunError: not ``lean``, and an exit's site is there only behind the passes left out.
        """
        before, after = self._divided(plan)
        if not lean:
            before, after = trainable(before)[0], trainable(after)[0]
        trunk = self._trunk(before)
        heads = self.bank(trunk) if lean else self.heads(plan, trunk)
        context = self.context(heads=heads, exit_rates=tuple(plan.select["rates"]))
        graph = _applied(after, trunk, context)
        metadata = {**graph.metadata, **({} if plan.exits else {TRUNK: trunk.digest})}
        described = {"recipe": self._recipe(plan).to_plain(), "carry": plan.carry, "objective": self.front.objective}
        if needed_arrays(before):  # where numbers are stored, they do not tell any more which model they came from
            described["original"] = self.graph.digest
        return graph.replace(metadata={**metadata, "eexform.plan": json.dumps(described, sort_keys=True)})

    def heads(self, plan: Plan, trunk: Graph) -> PlanStore:
        """A plan's trained heads, for its trunk without the passes that only make it faster.

        Raises:
            RunError: an exit's site is no site of ``trunk``.
        """
        sites = {site.value for site in find_sites(trunk, max_live=WIDEST).sites}
        before, _ = self._divided(plan)
        absent = [exit_.site for exit_ in plan.exits if exit_.site not in sites]
        if absent:
            left_out = ", ".join(name for name, _ in trainable(before)[1])
            raise RunError(
                f"plan {plan.index} has an exit at {absent[0]!r}, which is no site of the trunk before {left_out}:"
                " those passes rename values. To train, save what they make of it with `eexform apply` and search on "
                "that; for a module, give eexform.to_torch the graph plan.materialise()"
            )
        known = self._trunk(before)
        pairs = [(exit_.site, exit_.head) for exit_ in plan.exits]
        store = PlanStore.collect(self.bank(known), known.digest, pairs)
        return PlanStore(trunk.digest, {pair: store.trained(known.digest, *pair) for pair in pairs})

    def export(self, plan: Plan, path: str | Path, *, form: str = "if", thresholds_as_input: bool = False) -> Path:
        """Write a plan in a deployable form (see :func:`eexform.backends.export.export`).

        A plan without exits, of a trunk that was made smaller, is an ordinary network: the forms ``if`` and ``multi``
        are the same file, and there are no others.

        Raises:
            OptionError: a plan without exits is asked for in another form, or is the model that was given.
        """
        if plan.exits:
            return write_form(self.materialise(plan), path, form, thresholds_as_input=thresholds_as_input)
        need(
            not self.is_original(plan),
            f"plan {plan.index} is the model as it was given, without any exit: there is nothing to write",
            OptionError,
        )
        need(
            form in ("if", "multi") and not thresholds_as_input,
            f"plan {plan.index} has no exits, so it has neither stages nor thresholds: it is written as one file, "
            "--form if or multi",
            OptionError,
        )
        protos.save(lower_multi(self.materialise(plan), alone=True), path)
        return Path(path)

    def save_plan(self, plan: Plan, path: str | Path) -> Path:
        """Write a plan as a recipe that :func:`eexform.apply` replays, its trained heads beside it.

        Args:
            plan: of this run.
            path: the ``.toml`` or ``.json`` file; the heads go to ``<stem>.safetensors`` in the same folder.
        """
        target = Path(path)
        before, _ = self._divided(plan)
        trunk, numbers = self._trunk(before), self.context().arrays
        store = PlanStore.collect(self.bank(trunk), trunk.digest, [(exit_.site, exit_.head) for exit_ in plan.exits])
        store = store.with_arrays({digest: numbers[digest] for digest in needed_arrays(before)})
        weights = None
        if not store.empty:
            weights = target.with_suffix(".safetensors").name
            store.save(target.with_name(weights))
        self._recipe(plan, weights).save(target)
        return target

    def context(self, **more: Any) -> PassContext:
        """What the passes of this run's plans need: the stored numbers of its trunks, and ``more``."""
        return PassContext(arrays=ArrayStore(self.folder.trunks), **more)

    def _trunk(self, passes: BoundRecipe) -> Graph:
        """What passes in front of ``insert_exits`` make of the run's trunk.

        Raises:
            RunError: numbers that a plan needs are gone.
        """
        numbers = self.context().arrays
        absent = [digest for digest in needed_arrays(passes) if digest not in numbers]
        if absent:
            raise RunError(f"{self.folder.trunks}: the numbers {absent[0][:12]} of a trunk are gone; put them back")
        return replay_passes(passes, self.graph, numbers)[-1]

    def is_original(self, plan: Plan) -> bool:
        """Whether the plan's trunk answers just as the run's does."""
        return not trainable(self._divided(plan)[0])[0]

    def _onward(self) -> str:
        """What can be done about a run that did not come to its end."""
        command, error = f"eexform {'train' if self.trained_from else 'search'}", self.facts.get("error")
        if self.facts.get("diverged"):
            return (
                f"training diverged, and --resume with the same options would come to the same: begin anew with other "
                f"options and another --out ({error})"
            )
        return f"go on with `{command} --resume`" + (f" once this is put right: {error}" if error else "")

    def _divided(self, plan: Plan) -> tuple[BoundRecipe, BoundRecipe]:
        """The recipe's passes before ``insert_exits`` and from there on."""
        place = [name for name, _ in plan.recipe].index(EXITS)
        return list(plan.recipe[:place]), list(plan.recipe[place:])

    def _recipe(self, plan: Plan, weights: str | None = None) -> Recipe:
        return Recipe(tuple(Step(name, parameters) for name, parameters in plan.recipe), weights)

    def bank(self, trunk: Graph) -> Bank:
        """The bank of a variant of the trunk."""
        return bank_of(
            self.folder.bank,
            trunk.digest,
            origin=self.trained_from.get("original", self.facts["trunk_digest"]),
            data_digest=self.facts["data_digest"],
            train_digest=self.facts["train_digest"],
            labels=self.facts.get("labels", "given"),
        )


def _applied(recipe: BoundRecipe, graph: Graph, context: PassContext) -> Graph:
    return Pipeline([make(name, **parameters) for name, parameters in recipe])(graph, context).graph


def open_run(path: str | Path) -> Run:
    """Open the folder of a search.

    Raises:
        RunError: no run, damaged, or written by a newer version.
    """
    return Run(path)
