"""How a trunk and its heads are trained together."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from eexform.errors import OptionError, need, suggest

STRATEGIES = ("frozen", "joint", "mixed", "heads-then-joint", "distill")
NEED_HEADS = ("frozen", "mixed", "heads-then-joint")
"""Strategies that are about heads: there is nothing for them to do on a network without exits."""

LOSSES = ("cross_entropy", "distill:weight=0.5,temperature=2")
DISTILLED = "distill:weight=1,temperature=4"
OPTIMISERS = ("sgd", "adamw")
SCHEDULES = ("one-cycle", "cosine", "linear", "constant")
AMP = ("auto", "off", "bfloat16", "float16")


def losses_of(strategy: str, *, labelled: bool = True) -> tuple[str, ...]:
    """The terms of the loss where none are named; without labels they learn from the teacher alone.

    Where the teacher is what counts, its logits are softened more, and the labels only break ties: trained on their
    own they would pull the network away from what it is to resemble.
    """
    if strategy == "distill":
        return (DISTILLED, "cross_entropy:weight=0.1") if labelled else (DISTILLED,)
    return LOSSES if labelled else ("distill:weight=1,temperature=2",)


@dataclass(frozen=True)
class Phase:
    """Some epochs in a row that train the same parameters.

    Attributes:
        name: ``heads`` or ``trunk and heads``.
        start: first epoch, from 0.
        stop: the epoch behind the last.
        heads_only: whether the trunk stands still, its batch-normalisation statistics included.
    """

    name: str
    start: int
    stop: int
    heads_only: bool

    @property
    def epochs(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class FinetuneOptions:
    """Settings of :func:`eexform.training.finetune.finetune`.

    Attributes:
        strategy: ``frozen``: the heads go on learning, the trunk stands still. ``joint``: trunk and heads go on from
            where they are. ``mixed``: the trunk as it is, the heads start anew, everything is trained at once (Kubaty
            et al. 2024). ``heads-then-joint``: the heads start anew and learn alone for ``head_epochs``, then
            everything is trained. ``distill``: as ``joint``, by what the teacher says rather than by the labels.
        epochs: passes over head-train in all, those for the heads alone included.
        head_epochs: of ``heads-then-joint``: the first epochs, which train the heads alone.
        batch_size: samples per step.
        optimiser: ``sgd`` or ``adamw`` (of ``torch.optim``).
        learning_rate: peak for the heads.
        trunk_learning_rate: peak for the trunk.
        momentum: of ``sgd``.
        nesterov: whether ``sgd`` looks ahead.
        weight_decay: of weights, which have more than one axis; scales, shifts and biases are not decayed, and none of
            shape [C, 1, 1].
        schedule: of the learning rates over the steps of a phase: ``one-cycle`` (torch's, cosine up and down),
            ``cosine`` or ``linear`` down to zero after a linear warm-up, or ``constant`` after the warm-up.
        warmup: share of a phase's steps spent warming up.
        clip: the gradient's norm is cut to this; 0 is off.
        ema: decay of an exponential moving average of the parameters, which is then what is evaluated and kept; 0 is
            off. The first steps average over fewer: the decay is at most ``(1 + step) / (10 + step)``.
        patience: training stops when the loss on calibrate has not improved for this many epochs of the last phase; 0:
            never.
        amp: arithmetic of the forward pass: ``off`` (float32), ``bfloat16``, ``float16``, or ``auto``: half precision
            on CUDA, bfloat16 for convolutional networks on CPUs that compute with it, else float32. Parameters and
            losses are float32 whatever it is.
        losses: terms of the loss (entry-point group ``eexform.losses``), written NAME:SETTING=VALUE,SETTING=VALUE;
            ``None``: those of the strategy (see :func:`losses_of`), and ``confidence_bce`` where heads have gates
            (:meth:`settled`, once data and network are known).
        exit_weights: how much each exit counts in sums over the exits: ``uniform``, ``linear``, ``cost``, or numbers
            ``0.5/0.5/1``, the final exit's last.
        label_smoothing: of the cross-entropies.
        seed: of new heads, order and augmentation.
    """

    strategy: str = "joint"
    epochs: int = 10
    head_epochs: int = 2
    batch_size: int = 128
    optimiser: str = "sgd"
    learning_rate: float = 0.05
    trunk_learning_rate: float = 0.02
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    clip: float = 5.0
    ema: float = 0.0
    patience: int = 0
    amp: str = "auto"
    losses: tuple[str, ...] | None = None
    exit_weights: str = "uniform"
    label_smoothing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        def check(holds: bool, text: str) -> None:
            need(holds, text, OptionError)

        def choose(name: str, choices: tuple[str, ...]) -> None:
            value = getattr(self, name)
            check(value in choices, f"{name}: {value!r} is not a choice: {suggest(str(value), choices)}")

        choose("strategy", STRATEGIES)
        choose("optimiser", OPTIMISERS)
        choose("schedule", SCHEDULES)
        choose("amp", AMP)
        check(self.epochs >= 1, f"epochs: {self.epochs} must be at least 1")
        if self.strategy == "heads-then-joint":
            within = 1 <= self.head_epochs < self.epochs
            check(within, f"head_epochs: {self.head_epochs} must be at least 1 and below the epochs ({self.epochs})")
        check(self.batch_size >= 2, f"batch_size: {self.batch_size} must be at least 2 (batch normalisation)")
        for name in ("learning_rate", "trunk_learning_rate"):
            check(0 < getattr(self, name) < float("inf"), f"{name}: {getattr(self, name)} must be a positive number")
        check(0 <= self.momentum < 1, f"momentum: {self.momentum} must be in [0, 1)")
        for name in ("weight_decay", "clip"):
            fits = 0 <= getattr(self, name) < float("inf")
            check(fits, f"{name}: {getattr(self, name)} must be a number that is not negative")
        check(0 <= self.warmup < 1, f"warmup: {self.warmup} must be in [0, 1)")
        check(0 <= self.ema < 1, f"ema: {self.ema} must be in [0, 1)")
        check(self.patience >= 0, f"patience: {self.patience} must not be negative")
        check(0 <= self.label_smoothing < 1, f"label_smoothing: {self.label_smoothing} must be in [0, 1)")
        check(self.seed >= 0, f"seed: {self.seed} must not be negative")
        if self.losses is not None:
            listed = bool(self.losses) and not isinstance(self.losses, str)
            check(listed, "losses: expected a list of at least one term")
            object.__setattr__(self, "losses", tuple(self.losses))
        from eexform.training import objectives  # it needs torch, which options alone do not

        for text in self.losses or ():
            objectives.parse(text)
        if self.exit_weights not in ("uniform", "linear", "cost"):
            objectives.parse_weights(self.exit_weights)

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What is trained when, in order."""
        if self.strategy == "frozen":
            return (Phase("heads", 0, self.epochs, heads_only=True),)
        start = self.head_epochs if self.strategy == "heads-then-joint" else 0
        alone = (Phase("heads", 0, start, heads_only=True),) if start else ()
        return (*alone, Phase("trunk and heads", start, self.epochs, heads_only=False))

    @property
    def new_heads(self) -> bool:
        """Whether the heads start anew."""
        return self.strategy in ("mixed", "heads-then-joint")

    def settled(self, *, labelled: bool, gated: bool) -> FinetuneOptions:
        """These options with the terms of the loss named.

        Args:
            labelled: whether there are labels; without, the teacher is all there is to learn from.
            gated: whether every head has a gate, which must go on learning when what it reads moves.
        """
        if self.losses is not None:
            return self
        gates = ("confidence_bce",) if gated else ()
        return replace(self, losses=(*losses_of(self.strategy, labelled=labelled), *gates))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "losses": None if self.losses is None else list(self.losses)}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> FinetuneOptions:
        """Inverse of :meth:`to_json`.

        Raises:
            OptionError: unknown settings or values.
        """
        unknown = sorted(set(plain) - set(cls.__dataclass_fields__))
        need(not unknown, f"settings of fine-tuning: {unknown} are not known", OptionError)
        named = plain.get("losses")
        return cls(**{**plain, "losses": None if named is None else tuple(named)})

    @property
    def digest(self) -> str:
        """sha-256 of the settings."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
