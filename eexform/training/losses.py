"""The loss of one head on one batch, as small named parts that add up."""

from __future__ import annotations

import torch
from torch.nn import functional

from eexform.data.dataset import Batch
from eexform.training.options import TrainOptions


def distillation(scores: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """``T² · KL(softmax(teacher / T) ‖ softmax(scores / T))``, mean over the batch (Hinton, Vinyals & Dean 2015).

    Args:
        scores, teacher: logits, [batch, classes]; the teacher gets no gradient.
        temperature: ``T`` > 0.
    """
    target = functional.log_softmax(teacher.detach() / temperature, dim=1)
    ours = functional.log_softmax(scores / temperature, dim=1)
    return temperature**2 * functional.kl_div(ours, target, log_target=True, reduction="batchmean")


def cross_entropy(scores: torch.Tensor, batch: Batch, smoothing: float) -> torch.Tensor:
    """Cross-entropy with the labels, mean over the batch; a mixed sample's two labels count by their shares."""
    labels = torch.from_numpy(batch.labels)
    if batch.mix is None:
        return functional.cross_entropy(scores, labels, label_smoothing=smoothing)
    other, weight = batch.mix
    mix = (torch.from_numpy(other), torch.from_numpy(weight))
    return sample_cross_entropy(scores, labels, mix, smoothing).mean()


def sample_cross_entropy(
    scores: torch.Tensor, labels: torch.Tensor, mix: tuple[torch.Tensor, torch.Tensor] | None, smoothing: float
) -> torch.Tensor:
    """Cross-entropy of each sample with its label, [batch].

    Args:
        scores: logits, [batch, classes].
        labels: int64 [batch].
        mix: labels of the other samples (int64 [batch]) and the weight of a sample's own ([batch]), where blended.
        smoothing: label smoothing, 0-1.
    """
    first = functional.cross_entropy(scores, labels, label_smoothing=smoothing, reduction="none")
    if mix is None:
        return first
    other, weight = mix
    second = functional.cross_entropy(scores, other, label_smoothing=smoothing, reduction="none")
    share = weight.to(scores.dtype)
    return share * first + (1 - share) * second


def head_loss(scores: torch.Tensor, teacher: torch.Tensor, batch: Batch, options: TrainOptions) -> torch.Tensor:
    """``(1 - d) · cross-entropy + d · distillation``; without labels the distillation alone.

    Args:
        scores: the head's logits, [batch, classes].
        teacher: the trunk's final logits on the same inputs.
        batch: labels (``None`` in label-free mode) and how they were mixed.
        options: ``distill`` is ``d``.
    """
    if batch.labels is None:
        return distillation(scores, teacher, options.distill_temperature)
    loss = scores.new_zeros(())
    if options.distill < 1:
        loss = loss + (1 - options.distill) * cross_entropy(scores, batch, options.label_smoothing)
    if options.distill > 0:
        loss = loss + options.distill * distillation(scores, teacher, options.distill_temperature)
    return loss


def balanced_bce(confidence: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``½ (mean over right of -log c + mean over wrong of -log(1 - c))``: class-balanced binary cross-entropy.

    Right and wrong answers weigh the same however few there are of one kind; where there is only one kind, its mean
    alone. (Of NACHOS: binary cross-entropy with the weights ``n / 2 n_right`` and ``n / 2 n_wrong``.)

    Args:
        confidence: [batch] in [0, 1].
        right: share to which each answer is right, [batch] in [0, 1]; gets no gradient.
    """
    right = right.detach().to(confidence.dtype)
    # both logarithms are bounded by -100, as torch bounds them: a gate that is surely wrong has a finite loss
    for_right = functional.binary_cross_entropy(confidence, torch.ones_like(confidence), reduction="none")
    for_wrong = functional.binary_cross_entropy(confidence, torch.zeros_like(confidence), reduction="none")
    shares = ((right, for_right), (1 - right, for_wrong))
    kinds = [(share * each).sum() / share.sum() for share, each in shares if bool(share.any())]
    return torch.stack(kinds).mean()


def right_share(
    scores: torch.Tensor, labels: torch.Tensor, mix: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """To which share each answer is right, [batch] in [0, 1], without gradient.

    Args:
        scores: logits, [batch, classes].
        labels: what is right, int64 [batch].
        mix: labels of the other samples and the weight of a sample's own, where blended.
    """
    answer = scores.detach().argmax(dim=1)
    right = (answer == labels).to(scores.dtype)
    if mix is None:
        return right
    other, weight = mix
    share = weight.to(scores.dtype)
    return share * right + (1 - share) * (answer == other).to(scores.dtype)


def gate_loss(gate: torch.Tensor, scores: torch.Tensor, teacher: torch.Tensor, batch: Batch) -> torch.Tensor:
    """What a gate says against whether its head is right: :func:`balanced_bce`.

    Args:
        gate: what it says, [batch] in [0, 1].
        scores: the head's logits, [batch, classes]; they get no gradient.
        teacher: the trunk's final logits; without labels an answer is right where it is the trunk's.
        batch: labels (``None`` in label-free mode); a mixed sample's answer is right to the share of its label.
    """
    if batch.labels is None:
        return balanced_bce(gate, right_share(scores, teacher.argmax(dim=1)))
    mix = None if batch.mix is None else (torch.from_numpy(batch.mix[0]), torch.from_numpy(batch.mix[1]))
    return balanced_bce(gate, right_share(scores, torch.from_numpy(batch.labels), mix))
