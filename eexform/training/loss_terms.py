"""The built-in loss terms.

Notation: exit i of E early ones, the final exit is i = E; ``w_i`` its weight; ``CE_in`` the cross-entropy of exit i
with the label of sample n; ``c_in`` the learned confidence; ``p_in`` the probability that the sample leaves there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from eexform.errors import OptionError
from eexform.training.losses import balanced_bce, distillation, right_share, sample_cross_entropy
from eexform.training.objectives import ExitBatch, Loss, exit_weights, parse_weights
from eexform.tunables import Choice, parameter

NAMED_WEIGHTS = ("uniform", "linear", "cost")


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Cross-entropy of every exit with the labels: ``sum_i w_i mean_n CE_in``.

    Joint training of all classifiers, as in BranchyNet (Teerapittayanon et al. 2016) and MSDNet (Huang et al. 2018). A
    blended sample's two labels count by their shares.
    """

    name: ClassVar[str] = "cross_entropy"

    exits: str = parameter(default="", help="uniform, linear, cost or numbers 0.5/0.5/1; empty: the training's own")
    smoothing: float = parameter(default=-1.0, help="label smoothing, 0-1; negative: the training's own")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exits and self.exits not in NAMED_WEIGHTS:
            parse_weights(self.exits)
        if self.smoothing >= 1:
            raise OptionError(f"smoothing: {self.smoothing} must be below 1")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("labels",)

    def value(self, batch: ExitBatch) -> torch.Tensor:
        smoothing = batch.smoothing if self.smoothing < 0 else self.smoothing
        means = torch.stack([_cross_entropy(scores, batch, smoothing).mean() for scores in batch.logits])  # [E + 1]
        return (_weights(batch, self.exits) * means).sum()


@dataclass(frozen=True)
class Distill(Loss):
    """Every exit learns the softened answers of a teacher: ``sum_i w_i T² mean_n KL(teacher_n ‖ exit_in)``.

    Both distributions are softmax(logits / T) (Hinton, Vinyals & Dean 2015). The teacher is the trunk as it was before
    training or the final exit as it is now; the latter, self-distillation (Zhang et al. 2019; Phuong & Lampert 2019),
    gets no gradient from here and is no student of itself.
    """

    name: ClassVar[str] = "distill"

    teacher: str = parameter(default="trunk", help="trunk (the original one) or final (the final exit as it is now)")
    temperature: float = parameter(default=2.0, help="T, above 0; higher shows more of the wrong classes")
    exits: str = parameter(default="", help="uniform, linear, cost or numbers 0.5/0.5/1; empty: the training's own")

    def __post_init__(self) -> None:
        super().__post_init__()
        Choice(("trunk", "final")).validate(self.teacher, "teacher")
        if not 0 < self.temperature < float("inf"):
            raise OptionError(f"temperature: {self.temperature} must be a positive number")
        if self.exits and self.exits not in NAMED_WEIGHTS:
            parse_weights(self.exits)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("teacher",) if self.teacher == "trunk" else ("exits",)

    def value(self, batch: ExitBatch) -> torch.Tensor:
        teacher, students = batch.teacher, batch.logits
        if self.teacher == "final":
            teacher, students = batch.logits[-1].detach(), batch.logits[:-1]
        assert teacher is not None
        parts = [distillation(scores, teacher, self.temperature) for scores in students]
        return (_weights(batch, self.exits)[: len(parts)] * torch.stack(parts)).sum()


@dataclass(frozen=True)
class StickBreaking(Loss):
    """Cross-entropy of where a sample leaves: ``mean_n sum_i p_in CE_in`` with learned confidences.

    ``p_i = c_i prod_{j<i} (1 - c_j)``, and the final exit gets what is left, so that they sum to 1: the expected
    cross-entropy of a network whose samples leave at random with these probabilities (NACHOS; stick-breaking as in
    PonderNet, Banino et al. 2021). Differentiable in scores and confidences.
    """

    name: ClassVar[str] = "stick_breaking"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("labels", "gates")

    def value(self, batch: ExitBatch) -> torch.Tensor:
        losses = torch.stack([_cross_entropy(scores, batch, batch.smoothing) for scores in batch.logits])  # [E + 1, B]
        return (leaving(batch.gates) * losses).sum(dim=0).mean()


@dataclass(frozen=True)
class ConfidenceBce(Loss):
    """The learned confidence says whether its exit is right: class-balanced binary cross-entropy.

    ``mean_i ½ (mean_{n right at i} -log c_in + mean_{n wrong at i} -log(1 - c_in))``: right and wrong samples weigh the
    same however few of one kind a batch holds (NACHOS); where there is only one kind, its mean alone. What is right
    is taken from the scores without a gradient; the answer to a blended sample is right to the share of its label.
    Without labels, an answer is right where it is the original trunk's.
    """

    name: ClassVar[str] = "confidence_bce"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("answers", "gates")

    def value(self, batch: ExitBatch) -> torch.Tensor:
        labels, mix = batch.labels, batch.mix
        if labels is None:
            assert batch.teacher is not None
            labels, mix = batch.teacher.argmax(dim=1), None
        pairs = zip(batch.logits, batch.gates, strict=False)
        parts = [balanced_bce(confidence, right_share(scores, labels, mix)) for scores, confidence in pairs]
        return torch.stack(parts).mean() if parts else _zero(batch)


@dataclass(frozen=True)
class ExpectedCost(Loss):
    """Hinge on the expected cost: ``max(0, mean_n sum_i p_in cost_i - limit) / limit``.

    ``cost_i`` is the path cost relative to the trunk, heads included; ``p`` are the leaving probabilities of
    :class:`StickBreaking`, so that the confidences get a gradient (the cost term of NACHOS, which has none there).
    """

    name: ClassVar[str] = "expected_cost"

    limit: float = parameter(default=0.7, help="expected cost relative to the trunk (1.0) above which it is charged")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.limit < float("inf"):
            raise OptionError(f"limit: {self.limit} must be a positive number")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("gates",)

    def value(self, batch: ExitBatch) -> torch.Tensor:
        expected = (leaving(batch.gates) * batch.path_costs[:, None]).sum(dim=0).mean()
        return functional.relu(expected - self.limit) / self.limit


@dataclass(frozen=True)
class Support(Loss):
    """Confidences are pulled towards the accuracy of their exit on the sample's class: ``mean_in (c_in - a_i,y(n))²``.

    ``a`` is measured on held-out samples (calibrate) before every epoch and held fixed during it (the support or
    "peak" term of NACHOS). A blended sample's target is blended by the shares of its two labels.
    """

    name: ClassVar[str] = "support"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("labels", "gates", "support")

    def value(self, batch: ExitBatch) -> torch.Tensor:
        assert batch.labels is not None
        assert batch.support is not None
        known = batch.support.detach()
        target = known[:, batch.labels]  # [E, K] by [B] -> [E, B]
        if batch.mix is not None:
            other, share = batch.mix
            target = share * target + (1 - share) * known[:, other]
        if not batch.gates:
            return _zero(batch)
        return ((torch.stack(batch.gates) - target) ** 2).mean()


@dataclass(frozen=True)
class Survivors(Loss):
    """Every exit learns from the samples that reach it: ``sum_i w_i (sum_n r_in CE_in / sum_n r_in)``.

    ``r_in = floor + (1 - floor) prod_{j<i} (1 - l_jn)``, where ``l_jn`` says whether sample n leaves at exit j: softly,
    ``sigmoid((confidence - threshold) / softness)``, or with ``softness=0`` by the plan's threshold itself. ``r`` gets
    no gradient. This trains each classifier on the inputs it will see in use (as boosted training of early exits does,
    Yu et al. 2023); an exit that nobody reaches contributes nothing.
    """

    name: ClassVar[str] = "survivors"

    softness: float = parameter(default=0.1, help="width of the soft decision, in units of confidence; 0: hard")
    floor: float = parameter(default=0.0, help="least weight of a sample at any exit, 0-1")
    exits: str = parameter(default="", help="uniform, linear, cost or numbers 0.5/0.5/1; empty: the training's own")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.softness < float("inf"):
            raise OptionError(f"softness: {self.softness} must be a number that is not negative")
        if not 0 <= self.floor <= 1:
            raise OptionError(f"floor: {self.floor} must be between 0 and 1")
        if self.exits and self.exits not in NAMED_WEIGHTS:
            parse_weights(self.exits)

    @property
    def needs(self) -> tuple[str, ...]:
        return ("labels", "measured")

    def value(self, batch: ExitBatch) -> torch.Tensor:
        parts = []
        for scores, reach in zip(batch.logits, self._reached(batch), strict=True):
            share = self.floor + (1 - self.floor) * reach
            total = share.sum()
            each = _cross_entropy(scores, batch, batch.smoothing)
            # nobody there: 0 / tiny is 0, with a gradient of 0
            parts.append((share * each).sum() / total.clamp_min(torch.finfo(total.dtype).tiny))
        return (_weights(batch, self.exits) * torch.stack(parts)).sum()

    def _reached(self, batch: ExitBatch) -> Iterator[torch.Tensor]:
        reach = torch.ones_like(batch.logits[0][:, 0]).detach()  # [B]
        yield reach
        for confidence, threshold in zip(batch.measured, batch.thresholds, strict=True):
            gap = confidence.detach().to(reach.dtype) - threshold
            leaves = torch.sigmoid(gap / self.softness) if self.softness else (gap >= 0).to(reach.dtype)
            reach = reach * (1 - leaves)
            yield reach


def leaving(confidences: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Probability of leaving at each exit, [E + 1, B]: ``p_i = c_i prod_{j<i} (1 - c_j)``, the final exit the rest."""
    rest = torch.ones_like(confidences[0]) if confidences else torch.ones(1)
    found = []
    for confidence in confidences:
        found.append(rest * confidence)
        rest = rest * (1 - confidence)
    return torch.stack([*found, rest])


def _cross_entropy(scores: torch.Tensor, batch: ExitBatch, smoothing: float) -> torch.Tensor:
    assert batch.labels is not None
    return sample_cross_entropy(scores, batch.labels, batch.mix, smoothing)


def _weights(batch: ExitBatch, own: str) -> torch.Tensor:
    """[E + 1]: the term's own weights of the exits, or those of the training."""
    if not own:
        return batch.weights
    return batch.weights.new_tensor(exit_weights(own, batch.path_costs.tolist()))


def _zero(batch: ExitBatch) -> torch.Tensor:
    return batch.logits[-1].sum() * 0
