"""Does an exported network do what its plan says? Structure, parameters, decisions, scores, and work really skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from eexform.errors import DataError, EexformError, VerificationError
from eexform.ir.exit_nodes import head_digest
from eexform.ir.graph import Graph
from eexform.ir.policy import Decisions
from eexform.verification.deployed import Deployed
from eexform.verification.profile import unskipped
from eexform.verification.rebuild import Reference, head_parameters, reference, trunk_of
from eexform.verification.simulate import Simulated, chunks, samples_in, simulate, take

if TYPE_CHECKING:
    from eexform.data.dataset import Dataset

BATCHES = (1, 7, 32)
SAMPLES = 256
SINGLES = 48
"""At batch 1 only this many samples are run: each costs a run of its own."""

_INLINE_BYTES = 1_900_000_000


@dataclass(frozen=True)
class Check:
    """One question and its answer."""

    name: str
    ok: bool
    detail: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "ok": self.ok, "detail": self.detail}


@dataclass(frozen=True)
class Report:
    """The outcome of a verification.

    Attributes:
        checks: in the order in which they were made.
        form: of the exported network.
        samples: how many were run.
        near_ties: how many of them lie within 1e-6 of a threshold, where the exit may differ.
    """

    checks: tuple[Check, ...]
    form: str = ""
    samples: int = 0
    near_ties: int = 0

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """``{ok, form, samples, near_ties, checks: [{name, ok, detail}]}``."""
        return {
            "ok": self.ok,
            "form": self.form,
            "samples": self.samples,
            "near_ties": self.near_ties,
            "checks": [check.to_json() for check in self.checks],
        }

    def require(self) -> None:
        """Raise ``VerificationError`` naming the failed checks, if any."""
        failed = [f"{check.name}: {check.detail}" for check in self.checks if not check.ok]
        if failed:
            raise VerificationError("the exported network failed verification: " + "; ".join(failed))


def verify(
    path: str | Path,
    against: Graph,
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
    """Verify an exported file, or a folder of stages, against the original trunk.

    Args:
        path: what was exported.
        against: the original model, as loaded.
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
        RunError: exported by a newer version.
        DataError: the samples do not fit the model.
    """
    deployed = Deployed(path, threads=threads)
    feeds = _feeds(data, against, split, samples)
    told = progress or (lambda name, made, total: None)
    verifier = _Verifier(deployed, against, feeds, atol, rtol, told, arrays)
    verifier.run()
    return Report(tuple(verifier.checks), deployed.form, verifier.count, verifier.ties)


class _Verifier:
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
        self.arrays = arrays
        self.deployed, self.against, self.feeds = deployed, against, feeds
        self.atol, self.rtol, self.progress = atol, rtol, progress
        self.exits = deployed.exported.exits
        self.count = samples_in(against, feeds)
        self.ties = 0
        self.checks: list[Check] = []
        fixed, per_exit = 7 + len(BATCHES) + (deployed.form != "multi"), 2
        self.total = fixed + per_exit * (len(self.exits) + 1)

    def run(self) -> None:
        self._ask("valid ONNX", self._valid)
        self._ask("plan", self._plan)
        self._ask("thresholds", self._thresholds)
        self._ask("head parameters", self._digests)
        trunk = self._build("trunk", self._trunk)
        made: list[Reference] = []
        if trunk is not None:
            self._ask("reference", lambda: self._reference(trunk, made))
        flat = made[0].graph if made else None
        if flat is None:
            return
        simulated = simulate(flat, self.feeds, gates=made[0].gates, threads=self.deployed.threads)
        self.ties = int(simulated.near_ties().sum())
        for size in BATCHES:
            self._ask(f"decisions at batch {size}", partial(self._decisions, simulated, size))
        self._ask("mixed batches", lambda: self._mixed(simulated))
        for place in range(len(self.exits) + 1):
            self._ask(f"everyone leaves at {self._label(place)}", partial(self._uniform, simulated, place))
            self._ask(f"forced to {self._label(place)}", partial(self._forced, simulated, place))
        if self.deployed.form != "multi":
            self._ask("skipped work", lambda: self._skipped(flat))

    # -- plumbing -----------------------------------------------------------------------------------------------------

    def _ask(self, name: str, question: Callable[[], tuple[bool, str]]) -> None:
        self.progress(name, len(self.checks), self.total)
        try:
            ok, detail = question()
        except EexformError as error:
            ok, detail = False, str(error)
        self.checks.append(Check(name, ok, detail))

    def _build(self, name: str, build: Callable[[], tuple[Graph, bool, str]]) -> Graph | None:
        found: list[Graph] = []

        def question() -> tuple[bool, str]:
            graph, ok, detail = build()
            found.append(graph)
            return ok, detail

        self._ask(name, question)
        return found[0] if found else None

    def _label(self, place: int) -> str:
        return "the final classifier" if place == len(self.exits) else f"exit {place}"

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

    # -- behaviour ----------------------------------------------------------------------------------------------------

    def _decisions(self, simulated: Simulated, size: int) -> tuple[bool, str]:
        return self._run(simulated, np.arange(min(self.count, SINGLES) if size == 1 else self.count), size)

    def _mixed(self, simulated: Simulated) -> tuple[bool, str]:
        """Thresholds at the median of what arrives, so that every batch is split at every exit.

        Once without the optimiser too: it replaces many a shape computation by a constant pattern, and so mends a file
        that takes the batch size from the wrong place.
        """
        inside = np.arange(self.count)
        thresholds: list[float] = []
        for row in simulated.confidences():
            thresholds.append(_middle(row[inside]))
            inside = inside[row[inside] < np.float32(thresholds[-1])]
        forced = simulated.with_thresholds(thresholds)
        details = []
        for size in BATCHES:
            rows = np.arange(min(self.count, SINGLES) if size == 1 else self.count)
            ok, detail = self._run(forced, rows, size, thresholds)
            if not ok:
                return ok, f"batch {size}: {detail}"
            details.append(detail)
        ok, detail = self._run(forced, np.arange(min(self.count, 64)), 7, thresholds, optimize=False)
        if not ok:
            return ok, f"without onnxruntime's optimiser, batch 7: {detail}"
        spread = np.bincount(forced.decisions().exit_index, minlength=len(self.exits) + 1).tolist()
        return True, f"samples per exit {spread}; {details[-1]}"

    def _uniform(self, simulated: Simulated, place: int) -> tuple[bool, str]:
        """A batch of samples that all leave at one exit under the plan's own thresholds."""
        rows = np.flatnonzero(simulated.decisions().exit_index == place)[: BATCHES[-1]]
        if not rows.size:
            return True, f"no sample of {self.count} leaves there by itself; see the forced run"
        return self._run(simulated, rows, len(rows))

    def _forced(self, simulated: Simulated, place: int) -> tuple[bool, str]:
        exits = len(self.exits)
        policy = [np.inf] * place + [-np.inf] * (exits - place)
        forced = simulated.with_thresholds(policy)
        for size in BATCHES:
            ok, detail = self._run(forced, np.arange(min(self.count, 2 * size if size > 1 else 3)), size, policy)
            if not ok:
                return ok, f"batch {size}: {detail}"
        return True, detail

    def _run(
        self,
        simulated: Simulated,
        rows: np.ndarray,
        size: int,
        thresholds: list[float] | None = None,
        *,
        optimize: bool = True,
    ) -> tuple[bool, str]:
        parts = []
        for piece in chunks(len(rows), size):
            batch = take(self.against, self.feeds, rows[piece])
            parts.append(self.deployed.run(batch, thresholds, optimize=optimize))
        found = Decisions(
            np.concatenate([part.exit_index for part in parts]),
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.confidence for part in parts]),
        )
        return compare(simulated.take(rows), found, self.atol, self.rtol)

    def _skipped(self, flat: Graph) -> tuple[bool, str]:
        feeds = take(self.against, self.feeds, np.arange(min(self.count, 4)))
        found = unskipped(self.deployed, flat, feeds)
        wrong = [f"exit {place}: {', '.join(names[:5])}" for place, names in enumerate(found) if names]
        if wrong:
            return False, "executed although every sample had left: " + "; ".join(wrong)
        return True, "nothing behind an exit runs once every sample has left there (traced for each exit)"


def compare(expected: Simulated, found: Decisions, atol: float = 1e-4, rtol: float = 1e-4) -> tuple[bool, str]:
    """Whether decisions are those of the simulator: exits exactly, but for near ties; numbers to tolerance."""
    wanted, near = expected.decisions(), expected.near_ties()
    if found.exit_index.shape != wanted.exit_index.shape or found.scores.shape != wanted.scores.shape:
        return False, f"results for {found.scores.shape}, expected {wanted.scores.shape}"
    differs = found.exit_index != wanted.exit_index
    wrong = np.flatnonzero(differs & ~near)
    if wrong.size:
        first = wrong[0]
        return False, (
            f"{wrong.size} of {len(differs)} samples leave elsewhere (sample {first}: exit {found.exit_index[first]}, "
            f"the simulator says {wanted.exit_index[first]})"
        )
    same = ~differs
    worst = 0.0
    for name, ours, theirs in (
        ("scores", found.scores[same], wanted.scores[same]),
        ("confidence", found.confidence[same], wanted.confidence[same]),
    ):
        error = np.zeros(theirs.shape)
        np.subtract(ours, theirs, out=error, where=ours != theirs, dtype=np.float64)  # a masked class is -inf in both
        np.abs(error, out=error)
        beyond = ~(error <= atol + rtol * np.abs(theirs))  # NaN is beyond
        if beyond.any():
            return (
                False,
                f"{name} differ by up to {np.nanmax(error) if error.size else 0:.3g} in {int(beyond.sum())} values",
            )
        worst = max(worst, float(error.max(initial=0.0)))
    ties = f", {int(near.sum())} near ties ({int(differs.sum())} fell the other way)" if near.any() else ""
    return True, f"{len(differs)} samples, same exits, numbers within {worst:.2g}{ties}"


def _middle(confidences: np.ndarray) -> float:
    """A threshold that splits the samples as evenly as one can, between two of them: a tie would prove nothing."""
    values = np.unique(confidences).astype(np.float64)
    if len(values) < 2:
        return float(np.inf)
    gaps = np.diff(values)
    middle = len(gaps) / 2
    wide = np.flatnonzero(gaps > 4e-6)
    place = int(wide[np.abs(wide - middle).argmin()]) if wide.size else int(gaps.argmax())
    return float(np.float32(values[place] + gaps[place] / 2))


def _feeds(
    data: Dataset | Mapping[str, np.ndarray], against: Graph, split: str, samples: int | None
) -> dict[str, np.ndarray]:
    if isinstance(data, Mapping):
        count = samples_in(against, data)
        return take(against, data, np.arange(min(count, samples or count)))
    bound = data if data.feeds is not None else data.bind(against)
    count = min(bound.size(split), samples or SAMPLES)
    if count < 1:
        raise DataError(f"the split {split!r} is empty; nothing to verify with")
    return take(against, bound.batch(split, np.arange(count)).feeds, np.arange(count))
