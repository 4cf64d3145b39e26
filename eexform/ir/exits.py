"""Exits are data: a site, a head's output and the rule for leaving there. Lowering turns them into control flow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from eexform.errors import GraphError, need

Scores = Literal["logits", "probabilities"]
"""What a classifier's output holds. ``probabilities``: confidences are taken as they are, without a second softmax."""


@dataclass(frozen=True)
class Exit:
    """One early exit of a graph.

    Attributes:
        site: value of the trunk at which the head is attached.
        head: canonical text of the :class:`eexform.heads.HeadSpec`.
        logits: value of the graph that holds this exit's class scores, shape [batch, classes].
        measure: name of the confidence measure (entry-point group ``eexform.measures``).
        threshold: a sample leaves where ``confidence >= threshold``; ``inf`` never, ``-inf`` always.
        temperature: the scores are divided by it before the confidence is taken (logits only).
        parameters: names of the head's parameters in the graph.
        digest: sha-256 of the head's parameters, as trained.
        confidence: value of the graph that holds the confidence, [batch] float32 in [0, 1], where the head learned it;
            empty where the measure reads it off the scores.
    """

    site: str
    head: str
    logits: str
    measure: str = "max_prob"
    threshold: float = math.inf
    temperature: float = 1.0
    parameters: tuple[str, ...] = ()
    digest: str = ""
    confidence: str = ""

    def __post_init__(self) -> None:
        need(not math.isnan(self.threshold), f"exit at {self.site!r}: the threshold is not a number", GraphError)
        need(
            self.temperature > 0 and math.isfinite(self.temperature),
            f"exit at {self.site!r}: temperature {self.temperature} must be a positive number",
            GraphError,
        )

    @property
    def values(self) -> tuple[str, ...]:
        """What must be computed before a sample can leave here: scores, and the confidence where that is a value."""
        return (self.logits, self.confidence) if self.confidence else (self.logits,)

    def to_json(self) -> dict[str, Any]:
        """Plain values; infinite thresholds become ``"always"`` / ``"never"`` (JSON has no infinity)."""
        plain = asdict(self)
        if math.isinf(self.threshold):
            plain["threshold"] = "never" if self.threshold > 0 else "always"
        plain["parameters"] = list(self.parameters)
        if not self.confidence:  # as before there were gates, so that digests stay
            del plain["confidence"]
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Exit:
        """Inverse of :meth:`to_json`.

        Raises:
            GraphError: fields are missing or of the wrong kind.
        """
        try:
            named = {"never": math.inf, "always": -math.inf}
            threshold = plain["threshold"]
            return cls(
                site=str(plain["site"]),
                head=str(plain["head"]),
                logits=str(plain["logits"]),
                measure=str(plain["measure"]),
                threshold=named[threshold] if isinstance(threshold, str) else float(threshold),
                temperature=float(plain["temperature"]),
                parameters=tuple(map(str, plain["parameters"])),
                digest=str(plain["digest"]),
                confidence=str(plain.get("confidence", "")),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise GraphError(f"an exit's description is damaged: {error!r} in {plain!r}") from error


def outputs_of(final: str, exits: Sequence[Exit]) -> tuple[str, ...]:
    """Outputs of a graph with exits, in order: final scores, those of every exit, confidences that are values."""
    confidences = (item.confidence for item in exits if item.confidence)
    return (final, *(item.logits for item in exits), *confidences)
