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
    first = functional.cross_entropy(scores, labels, label_smoothing=smoothing, reduction="none")
    second = functional.cross_entropy(scores, torch.from_numpy(other), label_smoothing=smoothing, reduction="none")
    share = torch.from_numpy(weight).to(scores.dtype)
    return (share * first + (1 - share) * second).mean()


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
