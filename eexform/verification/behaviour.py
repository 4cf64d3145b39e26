"""Does whatever was made of a plan decide like the simulator? The same questions for files, programs and modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from eexform.errors import EexformError, VerificationError
from eexform.ir.graph import Graph
from eexform.ir.policy import Decisions
from eexform.verification.simulate import Simulated, chunks, samples_in, take

BATCHES = (1, 7, 32)
SINGLES = 48
"""At batch 1 only this many samples are run: each costs a run of its own."""


class Runs(Protocol):
    """What can be asked to run a batch, under its own thresholds or others."""

    def run(
        self, feeds: Mapping[str, np.ndarray], thresholds: Sequence[float] | None = None, *, optimize: bool = True
    ) -> Decisions: ...


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
        near_ties: how many of them lie within 1e-6 (of programs and modules 1e-5) of a threshold, where the exit may
            differ.
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


class Behaviour:
    """Questions about what a network with exits answers, whatever form it has.

    Attributes:
        checks: answers so far.
        places: how many exits there are.
        count: samples that are run.
        ties: how many of them lie so near to a threshold that rounding may change the exit.
    """

    def __init__(
        self,
        network: Runs,
        exits: int,
        against: Graph,
        feeds: Mapping[str, np.ndarray],
        atol: float,
        rtol: float,
        progress: Callable[[str, int, int], None],
        total: int,
    ) -> None:
        """Ask about ``network``.

        Args:
            network: what was made.
            exits: how many it has.
            against: whose inputs it takes.
            feeds: samples by input, [n, ...].
            atol: absolute tolerance on scores and confidences.
            rtol: relative tolerance on them.
            progress: told the name of each check before it is made, how many were made, and how many there are.
            total: how many questions there will be besides those of :meth:`behaves`.

        Raises:
            DataError: the samples do not fit.
        """
        self.network, self.places, self.against, self.feeds = network, exits, against, feeds
        self.atol, self.rtol, self.progress = atol, rtol, progress
        self.count = samples_in(against, feeds)
        self.ties = 0
        self.checks: list[Check] = []
        self.total = total + len(BATCHES) + 1 + 2 * (exits + 1)

    def behaves(self, simulated: Simulated) -> None:
        """All questions about answers."""
        self.ties = int(simulated.near_ties().sum())
        for size in BATCHES:
            self.ask(f"decisions at batch {size}", partial(self._decisions, simulated, size))
        self.ask("mixed batches", lambda: self._mixed(simulated))
        for place in range(self.places + 1):
            self.ask(f"everyone leaves at {self._label(place)}", partial(self._uniform, simulated, place))
            self.ask(f"forced to {self._label(place)}", partial(self._forced, simulated, place))

    def ask(self, name: str, question: Callable[[], tuple[bool, str]]) -> bool:
        """Make one check; returns whether it holds."""
        self.progress(name, len(self.checks), self.total)
        try:
            ok, detail = question()
        except EexformError as error:
            ok, detail = False, str(error)
        self.checks.append(Check(name, ok, detail))
        return ok

    def _label(self, place: int) -> str:
        return "the final classifier" if place == self.places else f"exit {place}"

    def _decisions(self, simulated: Simulated, size: int) -> tuple[bool, str]:
        return self._run(simulated, np.arange(min(self.count, SINGLES) if size == 1 else self.count), size)

    def _mixed(self, simulated: Simulated) -> tuple[bool, str]:
        """Thresholds at the median of what arrives, so that every batch is split at every exit.

        Once without the optimiser too: it replaces many a shape computation by a constant pattern, and so mends a file
        that takes the batch size from the wrong place.
        """
        thresholds = middles(simulated)
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
        spread = np.bincount(forced.decisions().exit_index, minlength=self.places + 1).tolist()
        return True, f"samples per exit {spread}; {details[-1]}"

    def _uniform(self, simulated: Simulated, place: int) -> tuple[bool, str]:
        """A batch of samples that all leave at one exit under the plan's own thresholds."""
        rows = np.flatnonzero(simulated.decisions().exit_index == place)[: BATCHES[-1]]
        if not rows.size:
            return True, f"no sample of {self.count} leaves there by itself; see the forced run"
        return self._run(simulated, rows, len(rows))

    def _forced(self, simulated: Simulated, place: int) -> tuple[bool, str]:
        policy = [np.inf] * place + [-np.inf] * (self.places - place)
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
            parts.append(self.network.run(batch, thresholds, optimize=optimize))
        found = Decisions(
            np.concatenate([part.exit_index for part in parts]),
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.confidence for part in parts]),
        )
        return compare(simulated.take(rows), found, self.atol, self.rtol)


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


def middles(simulated: Simulated) -> list[float]:
    """Per exit the median of the confidences that arrive there, where all before leave at theirs."""
    inside = np.arange(len(simulated.final))
    thresholds: list[float] = []
    for row in simulated.confidences():
        thresholds.append(_middle(row[inside]))
        inside = inside[row[inside] < np.float32(thresholds[-1])]
    return thresholds


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
