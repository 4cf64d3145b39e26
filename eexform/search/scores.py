"""Cached scores of a split: what all scoring works on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from eexform.errors import DataError, OptionError, need, suggest
from eexform.ir.exits import Scores


@dataclass(frozen=True)
class HeadScores:
    """What the bank knows about one split: scores of the trunk and of every trained head.

    Attributes:
        final: scores of the trunk, float32 [samples, classes].
        labels: true labels, or the trunk's own answers in label-free mode, int64 [samples].
        heads: scores by (site, head text), float32 [samples, classes].
        temperatures: calibrated temperature of each head.
        scores: whether the arrays hold logits or probabilities.
        final_temperature: temperature of the trunk's own scores (used by ``carry`` only).
        gates: what the gates of heads say, by (site, head text), float32 [samples]; heads without one are not in it.
        opinion: scores and temperature of the network that judges answers (see :class:`eexform.search.judge.Judge`),
            where that is not this trunk: what plans are compared with.
    """

    final: np.ndarray
    labels: np.ndarray
    heads: Mapping[tuple[str, str], np.ndarray]
    temperatures: Mapping[tuple[str, str], float]
    scores: Scores = "logits"
    final_temperature: float = 1.0
    gates: Mapping[tuple[str, str], np.ndarray] = field(default_factory=dict)
    opinion: tuple[np.ndarray, float] | None = None

    def __post_init__(self) -> None:
        need(self.final.ndim == 2 and len(self.final) > 0, f"scores of shape {self.final.shape}: no samples", DataError)
        need(
            self.labels.shape == self.final.shape[:1],
            f"{len(self.labels)} labels for {len(self.final)} samples",
            DataError,
        )

    def __len__(self) -> int:
        return len(self.final)

    def of(self, site: str, head: str) -> np.ndarray:
        """Scores of one head.

        Raises:
            OptionError: it has not been trained.
            DataError: its scores do not fit the trunk's.
        """
        key = (site, head)
        if key not in self.heads:
            known = [other for at, other in self.heads if at == site]
            raise OptionError(f"no head {head!r} has been trained at {site!r}: {suggest(head, known)}")
        found = self.heads[key]
        need(
            found.shape == self.final.shape,
            f"head {head!r} at {site!r}: scores of shape {found.shape}, the trunk's are {self.final.shape}",
            DataError,
        )
        return found

    def gate(self, site: str, head: str) -> np.ndarray:
        """What the gate of one head says.

        Raises:
            OptionError: it has none.
            DataError: it does not fit the trunk's scores.
        """
        if (site, head) not in self.gates:
            raise OptionError(f"head {head!r} at {site!r} has no gate, and only gates can be asked for that measure")
        found = self.gates[site, head]
        need(
            found.shape == self.final.shape[:1],
            f"head {head!r} at {site!r}: its gate speaks of {found.shape} samples, the trunk of {len(self.final)}",
            DataError,
        )
        return found
