"""Rules for losses (see :mod:`eexform.backends.fx`)."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs
import torch
import torch.nn.functional as F  # noqa: N812  (its usual name)
from torch import fx

from eexform.backends.fx import Raiser, op

_NOBODY = -100  # torch's own default: no class has this number


@op("SoftmaxCrossEntropyLoss")
def _cross_entropy(raiser: Raiser, node: gs.Node) -> Sequence[fx.Node]:
    logs = raiser.call(torch.log_softmax, raiser.value(node, 0), 1)
    return [_loss(raiser, node, logs), logs]


@op("NegativeLogLikelihoodLoss")
def _negative_log_likelihood(raiser: Raiser, node: gs.Node) -> fx.Node:
    return _loss(raiser, node, raiser.value(node, 0))


def _loss(raiser: Raiser, node: gs.Node, logs: fx.Node) -> fx.Node:
    weights = raiser.value(node, 2) if raiser.has(node, 2) else None
    ignored, reduction = int(node.attrs.get("ignore_index", _NOBODY)), str(node.attrs.get("reduction", "mean"))
    return raiser.call(negative_log_likelihood, logs, raiser.value(node, 1), weights, ignored, reduction)


def negative_log_likelihood(
    logs: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None, ignored: int, reduction: str
) -> torch.Tensor:
    """Minus the log-probabilities ``[N, C, ...]`` at the labels ``[N, ...]``, weighted by class; a mean is weighted."""
    return F.nll_loss(logs, labels.to(torch.int64), weights, ignore_index=ignored, reduction=reduction)
