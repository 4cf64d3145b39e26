"""The run that comes out of fine-tuning: trunk and heads of a plan trained on, then searched again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eexform.data import Dataset, DataSource, load_dataset, save_dataset
from eexform.data.cache import PixelCache
from eexform.errors import OptionError, RunError, need
from eexform.ir.graph import Graph
from eexform.ir.measures import is_learned
from eexform.ir.serialize import save
from eexform.passes import PlanStore
from eexform.progress import Progress, Silent
from eexform.search.driver import Prepared, carry_out, prepare
from eexform.search.folder import RunFolder
from eexform.search.front import Plan
from eexform.search.ledger import agree, outcome
from eexform.search.limits import Limits
from eexform.search.objectives import Objectives
from eexform.search.options import SearchOptions
from eexform.search.run import Run, open_run
from eexform.search.space import EXITS, plain
from eexform.search.tuning import Tuning, parameters_of, split, tuning_of
from eexform.search.variants import Origin
from eexform.training.finetune_options import FinetuneOptions
from eexform.training.options import TrainOptions

if TYPE_CHECKING:
    from eexform.training.finetune import FinetuneReport


def train(
    run: Run | str | Path,
    *,
    pick: str = "knee",
    out: str | Path,
    options: FinetuneOptions | None = None,
    data: str | DataSource | None = None,
    resume: bool = False,
    population: int | None = None,
    generations: int | None = None,
    limits: Limits | None = None,
    threads: int = 0,
    progress: Progress | None = None,
    device: str = "auto",
) -> Run:
    """Fine-tune a plan's trunk and heads together, then search its policy anew.

    The old run stays as it is. The new one holds the trained trunk, the same splits, a bank with the trained heads
    (scored by onnxruntime, temperatures fitted again) and the front of a search over exactly the plan's sites and
    heads: which of them to keep, thresholds, measure and carry. Everything is still compared with the model that the
    first search was given, in accuracy as in cost.

    Args:
        run: the run, or its folder.
        pick: the plan (see :meth:`eexform.search.front.Front.pick`).
        out: folder of the new run, or of the one to ``resume``.
        options: how trunk and heads are trained; its seed is that of the search, too.
        data: where the samples are now, if not where they were.
        resume: go on with an interrupted run, in whichever stage it was; the options must be the same.
        population: of the search; default as in the old run.
        generations: of the search; default as in the old run.
        limits: what every plan must keep; default as in the old run.
        threads: 0 is one per core.
        progress: who is told.
        device: to train on: ``auto`` (CUDA where there is one), ``cpu``, ``cuda``, ``cuda:1``.

    Returns:
        The new run, with its front. After Ctrl-C during the search it is readable, with the state ``interrupted``.

    Raises:
        EexformError: something does not fit, see the message. Where that shows before training, nothing is written.
        KeyboardInterrupt: Ctrl-C during training; what is trained stays, and ``resume`` goes on.
    """
    source = run if isinstance(run, Run) else open_run(run)
    plan = source.front.pick(pick)
    job = _Job(
        source,
        RunFolder(out),
        options or FinetuneOptions(),
        plan=plan,
        data=data,
        resume=resume,
        population=population,
        generations=generations,
        limits=limits,
        threads=threads,
        progress=progress or Silent(),
        device=device,
    )
    return job.run()


class _Job:
    """One fine-tuning with the search behind it, checked before anything is written."""

    def __init__(
        self,
        source: Run,
        folder: RunFolder,
        options: FinetuneOptions,
        *,
        plan: Plan,
        data: str | DataSource | None,
        resume: bool,
        population: int | None,
        generations: int | None,
        limits: Limits | None,
        threads: int,
        progress: Progress,
        device: str,
    ) -> None:
        self.source, self.folder, self.options, self.show = source, folder, options, progress
        self.resume, self.threads, self.device = resume, threads, device
        self._check_folder()
        self.tuning = tuning_of(source, plan)
        labelled = source.facts.get("labels", "given") == "given"
        gated = bool(plan.exits) and all(is_learned(exit_.measure) for exit_ in plan.exits)
        self.options = options = options.settled(labelled=labelled, gated=gated)
        self.place = _check(self.tuning.graph, options, labelled, device)
        self.dataset = _dataset(source, data, self.tuning)
        old = SearchOptions.from_json(source.facts["options"])
        self.effort = replace(
            old,
            sites=(),
            heads=(),
            population=old.population if population is None else population,
            generations=old.generations if generations is None else generations,
            seed=options.seed,
            threads=threads,
        )
        self.limits = Limits.from_json(source.facts["limits"]) if limits is None else limits
        self.request = self._request()
        self.first = self._prepared(self.tuning, None)  # what cannot be searched afterwards shows now

    def run(self) -> Run:
        """Do what is left to do."""
        with self.folder.locked():
            facts = self._begin()
            if facts["state"] == "done":
                self.show.say(f"{self.folder.path}: is finished, there is nothing to go on with")
                return open_run(self.folder.path)
            if self.dataset.cache is not None:  # decoded samples are kept in the new run; the old one stays as it is
                cache = PixelCache(self.dataset.source, self.dataset.preprocess, folder=self.folder.path / "cache")
                self.dataset = replace(self.dataset, cache=cache)
            with outcome(self.folder, facts):
                if "finetuned" not in facts:
                    self._finetune(facts)
                prepared = self._trained()
                agree(self.folder, facts, {**prepared.settings, "trained_from": self.request}, self.show)
                facts["state"] = "training"
                self.folder.write(facts)
                carry_out(prepared, facts)
        return open_run(self.folder.path)

    # -- before anything is done -------------------------------------------------------------------------------------

    def _check_folder(self) -> None:
        path, source = self.folder.path.resolve(), self.source.folder.path.resolve()
        need(
            source not in path.parents,
            f"{self.folder.path}: lies in the run that is trained from, which stays as it is; choose another --out",
            RunError,
        )
        if not self.resume:
            self.folder.fresh()
            return
        need(
            self.folder.exists,
            f"{self.folder.path}: holds no run (no run.json), there is nothing to go on with; leave --resume out",
            RunError,
        )
        need(
            "trained_from" in self.folder.read(),
            f"{self.folder.path}: this run is one of `eexform search`; go on with that command and --resume, or choose "
            "another --out",
            RunError,
        )

    def _request(self) -> dict[str, Any]:
        """What was asked for, as plain values; the same for a resume."""
        plan, source = self.tuning.plan, self.source
        alone = source.front.trunk.recipe
        origin = {
            "original": source.original.digest,
            "original_passes": [[name, given] for name, given in alone[: [name for name, _ in alone].index(EXITS)]],
        }
        described = plan.to_json()
        asked = {
            "trunk_digest": source.facts["trunk_digest"],
            "plan": plan.index,
            "exits": [{key: exit_[key] for key in ("site", "head", "measure")} for exit_ in described["exits"]],
            "recipe": described["recipe"],
            "strategy": self.options.strategy,
            "options": self.options.to_json(),
            **origin,
            "earlier": source.trained_from or None,
        }
        return dict(json.loads(json.dumps(plain(asked))))

    def _prepared(self, tuning: Tuning, heads: PlanStore | None) -> Prepared:
        facts = self.source.facts
        passes = [(str(name), dict(given)) for name, given in self.request["original_passes"]]
        return prepare(
            tuning.trunk,
            self.dataset.bind(tuning.trunk),
            self.folder,
            objectives=Objectives.from_json(facts),
            steps=tuning.steps,
            options=self.effort,
            train=TrainOptions(**facts["train"]),
            limits=self.limits,
            progress=self.show,
            origin=Origin(self.source.original, passes),
            trained=None if heads is None else parameters_of(heads, self._heads),
        )

    @property
    def _heads(self) -> Mapping[str, str]:
        return {exit_.site: exit_.head for exit_ in self.tuning.plan.exits}

    # -- the stages --------------------------------------------------------------------------------------------------

    def _begin(self) -> dict[str, Any]:
        """Lay down the new run, or check that it is the same job. Returns the facts to go on from."""
        # the request first: of what follows from it, the difference would be hard to read
        settings = {"trained_from": self.request, **self.first.settings}
        if not self.resume:
            self.folder.fresh()
            facts = {"state": "finetuning", **settings}
            self.folder.write(facts)
            return facts
        facts = self.folder.read()
        if "finetuned" in facts:
            settings["trunk_digest"] = facts["trunk_digest"]  # by now that of the trained trunk
        state = facts["state"]
        agree(self.folder, facts, settings, self.show)
        if state != "done":
            facts["state"] = "training" if "finetuned" in facts else "finetuning"
            self.folder.write(facts)
        return facts

    def _finetune(self, facts: dict[str, Any]) -> None:
        """Train, and put trunk and heads where the search looks for them."""
        from eexform.training.finetune import finetune

        if not self.folder.original.exists():
            save(self.source.original, self.folder.original)
        save_dataset(self.dataset, self.folder.path)
        self._announce()
        report = finetune(
            self.tuning.graph,
            self.dataset,
            self.options,
            folder=self.folder.finetune,
            teacher=self.source.original,
            threads=self.threads,
            progress=self.show,
            device=self.device,
        )
        trunk, heads = split(self.tuning, report.graph)
        heads.save(self.folder.tuned_heads)
        save(trunk, self.folder.trunk)
        facts.update(trunk_digest=trunk.digest, finetuned=_finished(report))
        self.folder.write(facts)

    def _trained(self) -> Prepared:
        """The search over what was trained."""
        trunk = open_run(self.folder.path).graph
        return self._prepared(replace(self.tuning, trunk=trunk), PlanStore.load(self.folder.tuned_heads))

    def _announce(self) -> None:
        """Say what will be done before it is done."""
        from eexform.training.objectives import parse

        plan, options, say = self.tuning.plan, self.options, self.show.say
        losses = options.losses or ()  # settled
        exits = ", ".join(f"{exit_.site} ({exit_.head})" for exit_ in plan.exits)
        what = f"exits at {exits}, and the final one" if exits else "no exits but the final one"
        say(f"plan {plan.index} of {self.source.folder.path}: {what}")
        say(
            f"fine-tuning: strategy {options.strategy}, {options.epochs} epochs of {self.dataset.size('head_train')} "
            f"samples, {options.optimiser}; loss: {' + '.join(losses)}; on {self.place}"
        )
        if self.tuning.left_out:
            say(f"applied again after training, not before: {', '.join(self.tuning.left_out)}")
        gated = any(exit_.confidence for exit_ in self.tuning.graph.exits)
        if gated and not any("gates" in parse(text).needs for text in losses):
            say(
                "no term of the loss trains the gates, which stay as they are while what they read moves; add "
                "confidence_bce"
            )
        if plan.carry:
            say(
                "exits are trained to speak for themselves: carrying scores from exit to exit belongs to the policy, "
                "which the search chooses anew"
            )


def _check(graph: Graph, options: FinetuneOptions, labelled: bool, device: str) -> str:
    from eexform.training.finetune_check import check_finetuning  # imports torch, which takes a second or two

    return check_finetuning(graph, options, labelled=labelled, device=device)


def _dataset(source: Run, data: str | DataSource | None, tuning: Tuning) -> Dataset:
    """The old run's data, bound to the trunk."""
    dataset = load_dataset(source.folder.path, data=data).bind(tuning.trunk)
    if dataset.digest != source.facts["data_digest"]:
        raise OptionError(
            f"{dataset.source.name}: these are not the samples of {source.folder.path} (digest {dataset.digest[:12]}, "
            f"expected {str(source.facts['data_digest'])[:12]}); name them with --data"
        )
    return dataset


def _finished(report: FinetuneReport) -> dict[str, Any]:
    """What came of training, for the run's facts."""
    return {
        "epochs": report.epochs,
        "best_epoch": report.best_epoch,
        "seconds": round(report.seconds, 2),
        "device": report.device,
    }
