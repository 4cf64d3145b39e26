"""How heads are trained."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from eexform.errors import OptionError, need


@dataclass(frozen=True)
class TrainOptions:
    """Settings of head training; all of them are part of a head's identity in the bank.

    Attributes:
        epochs: passes over head-train at most.
        batch_size: samples per step.
        learning_rate: peak of a one-cycle schedule (AdamW): linear warm-up over the first ``warmup`` share of the
            steps, half a cosine to zero after it.
        warmup: share of the steps spent warming up.
        weight_decay: AdamW's decoupled weight decay.
        label_smoothing: for the cross-entropy with the labels.
        distill: weight of the distillation from the trunk's final scores, 0-1; the cross-entropy with the labels gets
            the rest. Without labels it is 1. The default is 0: on CIFAR-10 distillation beside labels gained nothing.
        distill_temperature: temperature ``T`` of Hinton, Vinyals & Dean (2015): the loss is
            ``T² · KL(softmax(teacher / T) ‖ softmax(head / T))``.
        ema: decay of the exponential moving average of the parameters that is evaluated and kept; 0 turns it off.
        patience: training stops when no head's loss on calibrate has improved for this many epochs; 0 never.
        seed: of initialisation, order and augmentation.
    """

    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 3e-3
    warmup: float = 0.15
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    distill: float = 0.0
    distill_temperature: float = 2.0
    ema: float = 0.0
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        def check(holds: bool, text: str) -> None:
            need(holds, text, OptionError)

        check(self.epochs >= 1, f"epochs: {self.epochs} must be at least 1")
        check(self.batch_size >= 2, f"batch_size: {self.batch_size} must be at least 2 (batch normalisation)")
        for name in ("learning_rate", "distill_temperature"):
            value = getattr(self, name)
            check(0 < value < float("inf"), f"{name}: {value} must be a positive number")
        decays = 0 <= self.weight_decay < float("inf")
        check(decays, f"weight_decay: {self.weight_decay} must be a number that is not negative")
        check(0 <= self.warmup < 1, f"warmup: {self.warmup} must be in [0, 1)")
        check(0 <= self.distill <= 1, f"distill: {self.distill} must be between 0 and 1")
        check(0 <= self.label_smoothing < 1, f"label_smoothing: {self.label_smoothing} must be in [0, 1)")
        check(0 <= self.ema < 1, f"ema: {self.ema} must be in [0, 1)")
        check(self.patience >= 0, f"patience: {self.patience} must not be negative")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def digest(self) -> str:
        """sha-256 of the settings."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
