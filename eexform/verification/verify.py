"""Does an exported network do what its plan says? Structure, parameters, decisions, scores, and work really skipped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from eexform.errors import DataError, OptionError
from eexform.ir.exit_nodes import head_digest
from eexform.ir.graph import Graph
from eexform.verification.behaviour import Behaviour, Check, Report, compare
from eexform.verification.deployed import Deployed
from eexform.verification.profile import unskipped
from eexform.verification.rebuild import Reference, head_parameters, reference, trunk_of
from eexform.verification.simulate import samples_in, simulate, take

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from eexform.backends.multi_exit import MultiExitModule
    from eexform.backends.planned import Planned
    from eexform.data.dataset import Dataset

__all__ = ["Check", "Report", "compare", "verify"]

SAMPLES = 256


def verify(
    path: str | Path | ExportedProgram | MultiExitModule,
    against: Graph | Planned,
    data: Dataset | Mapping[str, np.ndarray],
    *,
    samples: int | None = None,
    split: str = "test",
    threads: int = 1,
    atol: float = 1e-4,
    rtol: float = 1e-4,
    progress: Callable[[str, int, int], None] | None = None,
    arrays: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> Report:
    """Verify an exported file, or a folder of stages, against the original model; or a program or module in memory.

    Args:
        path: what was exported; or a program of ``torch.export`` that you lowered or loaded yourself, or a module that
            :func:`eexform.to_torch` made.
        against: for a file the original model, as loaded. For a program or module the plan that it was made from, or
            the graph with exits: these do not say themselves what they should do.
        data: a data set (``split`` is used) or feeds by input name, [n, ...].
        samples: how many samples to run (256 of a data set, all of feeds).
        split: split of a data set.
        threads: of onnxruntime.
        atol: absolute tolerance on scores and confidences.
        rtol: relative tolerance on them.
        progress: told the name of each check before it is made, how many were made, and how many there are.
        arrays: numbers that the plan stores, by digest: those of a run (``run.context().arrays``). Without them they
            are taken from the exported file, and the check of the trunk says so.

    Returns:
        The report. A fault of the exported network is a failed check, not an exception.

    Raises:
        ModelError: nothing there, or not exported by eexform.
        OptionError: ``against`` does not go with what is verified.
        RunError: exported by a newer version.
        DataError: the samples do not fit the model.
    """
    told = progress or (lambda name, made, total: None)
    if not isinstance(path, (str, os.PathLike)):
        from eexform.verification.programs import expected, verify_torch  # torch is slow to import

        graph = expected(path, against)
        return verify_torch(path, graph, _feeds(data, graph, split, samples), threads, atol, rtol, told)
    if not isinstance(against, Graph):
        raise OptionError(
            "an exported file is verified against the original model (ee.load, or run.graph), not against a plan: the "
            "file says itself what the plan is"
        )
    deployed = Deployed(path, threads=threads)
    feeds = _feeds(data, against, split, samples)
    verifier = _Verifier(deployed, against, feeds, atol, rtol, told, arrays)
    verifier.run()
    return Report(tuple(verifier.checks), deployed.form, verifier.count, verifier.ties)


class _Verifier(Behaviour):
    def __init__(
        self,
        deployed: Deployed,
        against: Graph,
        feeds: Mapping[str, np.ndarray],
        atol: float,
        rtol: float,
        progress: Callable[[str, int, int], None],
        arrays: Mapping[str, Mapping[str, np.ndarray]] | None,
    ) -> None:
        self.exits = deployed.exported.exits
        others = 6 + (deployed.form != "multi")
        super().__init__(deployed, len(self.exits), against, feeds, atol, rtol, progress, others)
        self.deployed, self.arrays = deployed, arrays

    def run(self) -> None:
        self.ask("valid ONNX", self._valid)
        self.ask("plan", self._plan)
        self.ask("thresholds", self._thresholds)
        self.ask("head parameters", self._digests)
        trunk = self._build("trunk", self._trunk)
        made: list[Reference] = []
        if trunk is not None:
            self.ask("reference", lambda: self._reference(trunk, made))
        flat = made[0].graph if made else None
        if flat is None:
            return
        simulated = simulate(flat, self.feeds, gates=made[0].gates, threads=self.deployed.threads)
        self.behaves(simulated)
        if self.deployed.form != "multi":
            self.ask("skipped work", lambda: self._skipped(flat))

    # -- plumbing -----------------------------------------------------------------------------------------------------

    def _build(self, name: str, build: Callable[[], tuple[Graph, bool, str]]) -> Graph | None:
        found: list[Graph] = []

        def question() -> tuple[bool, str]:
            graph, ok, detail = build()
            found.append(graph)
            return ok, detail

        self.ask(name, question)
        return found[0] if found else None

    # -- structure ----------------------------------------------------------------------------------------------------

    def _valid(self) -> tuple[bool, str]:
        for name, model in self.deployed.models.items():
            folder = self.deployed.path if self.deployed.form == "stages" else self.deployed.path.parent
            try:
                onnx.checker.check_model(str(folder / name), full_check=True)
            except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
                return False, f"{name}: onnx's checker refuses it: {error}"
            if model.producer_name != "eexform":
                return False, f"{name}: written by {model.producer_name!r}, expected 'eexform'"
        return True, f"{len(self.deployed.models)} file(s) pass onnx's full check"

    def _plan(self) -> tuple[bool, str]:
        exported = self.deployed.exported
        if (exported.scores, exported.num_classes) != (self.against.scores, self.against.num_classes):
            return False, (
                f"the plan says {exported.num_classes} classes, {exported.scores}; the original has "
                f"{self.against.num_classes}, {self.against.scores}"
            )
        if self.deployed.form == "if":
            _ = self.deployed.levels
        return True, f"form {exported.form}, {len(self.exits)} exits, written by {exported.version}"

    def _thresholds(self) -> tuple[bool, str]:
        if self.deployed.form == "multi":
            return True, "no thresholds in this form"
        wrong = []
        for place, (item, found) in enumerate(zip(self.exits, self.deployed.thresholds(), strict=True)):
            if found is not None and np.float32(found) != np.float32(item.threshold):
                wrong.append(f"exit {place} compares with {found:.8g}, the plan says {item.threshold:.8g}")
        return not wrong, "; ".join(wrong) or "as planned"

    def _digests(self) -> tuple[bool, str]:
        parameters = self.deployed.parameters()
        wrong = []
        for place, item in enumerate(self.exits):
            if head_digest(head_parameters(item, parameters)) != item.digest:
                wrong.append(f"exit {place} at {item.site!r}")
        if wrong:
            return False, "parameters are not those that were trained (sha-256 differs): " + ", ".join(wrong)
        return True, f"sha-256 of {len(self.exits)} heads as planned"

    def _trunk(self) -> tuple[Graph, bool, str]:
        replayed = trunk_of(self.against, self.deployed.exported, self.deployed.parameters(), self.arrays)
        trunk, stored = replayed.graph, ""
        made_from = self.deployed.exported.plan.get("original")
        if made_from is not None and made_from != self.against.digest:
            return (
                trunk,
                False,
                (
                    f"the plan was made from the model {str(made_from)[:12]}..., the one given is "
                    f"{self.against.digest[:12]}...: verify against the model that was exported"
                ),
            )
        if replayed.stored:
            stored = (
                f"; cut and connected as the recipe does it to the original; {replayed.taken} of "
                f"{len(trunk.parameters())} parameters are stored ones and taken from the file: all together have the "
                "recorded digest (with --run they are the run's)"
            )
        wanted = self.deployed.exported.trunk_digest
        if wanted and trunk.digest != wanted:
            return (
                trunk,
                False,
                (
                    f"the heads were trained on trunk {wanted[:12]}..., the model given (after the recipe's passes) is "
                    f"{trunk.digest[:12]}...: verify against the model that was exported"
                    + (", or parameters of the file have changed" if replayed.stored else "")
                ),
            )
        if replayed.stored and not wanted:
            return trunk, False, "the file holds stored parameters and names no trunk digest to check them with"
        said = f"digest {trunk.digest[:12]}..." if wanted else "the file names no trunk to compare with"
        return trunk, True, said + stored

    def _reference(self, trunk: Graph, made: list[Reference]) -> tuple[bool, str]:
        made.append(reference(trunk, self.deployed.exported, self.deployed.parameters()))
        return True, f"{len(made[0].graph.nodes)} nodes, rebuilt from the original and the heads' parameters"

    # -- work --------------------------------------------------------------------------------------------------------

    def _skipped(self, flat: Graph) -> tuple[bool, str]:
        feeds = take(self.against, self.feeds, np.arange(min(self.count, 4)))
        found = unskipped(self.deployed, flat, feeds)
        wrong = [f"exit {place}: {', '.join(names[:5])}" for place, names in enumerate(found) if names]
        if wrong:
            return False, "executed although every sample had left: " + "; ".join(wrong)
        return True, "nothing behind an exit runs once every sample has left there (traced for each exit)"


def _feeds(
    data: Dataset | Mapping[str, np.ndarray], against: Graph, split: str, samples: int | None
) -> dict[str, np.ndarray]:
    if isinstance(data, Mapping):
        count = samples_in(against, data)
        return take(against, data, np.arange(min(count, samples or count)))
    if not hasattr(data, "bind"):
        raise OptionError(
            "data: expected a data set (ee.open_dataset, or ee.load_dataset of a run's folder) or arrays by input "
            f"name, found {type(data).__name__}"
        )
    bound = data if data.feeds is not None else data.bind(against)
    count = min(bound.size(split), samples or SAMPLES)
    if count < 1:
        raise DataError(f"the split {split!r} is empty; nothing to verify with")
    return take(against, bound.batch(split, np.arange(count)).feeds, np.arange(count))
