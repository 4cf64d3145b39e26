"""Batches of made-up exits, for tests of loss terms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax

from eexform.training.objectives import ExitBatch

B, K, E = 6, 4, 2
COSTS = (0.3, 0.7, 1.2)
WEIGHTS = (0.5, 1.0, 1.5)
GATED = ("stick_breaking", "confidence_bce", "expected_cost:limit=0.4", "support")
TERMS = (
    "cross_entropy",
    "cross_entropy:weight=2,exits=cost,smoothing=0.2",
    "distill",
    "distill:teacher=final,temperature=3,weight=0.5",
    *GATED,
    "survivors",
    "survivors:softness=0,floor=0.2,exits=1/0/2",
)


def batch(*, mixed: bool = False, seed: int = 0, labels: np.ndarray | None = None, **changes: Any) -> ExitBatch:
    """Scores far from ties, confidences far from 0 and 1; everything float64, gradients wanted where they may be."""
    rng = np.random.default_rng(seed)
    known = rng.integers(0, K, B) if labels is None else labels
    other = torch.from_numpy(rng.integers(0, K, B))
    found = ExitBatch(
        logits=tuple(torch.from_numpy(2 * rng.standard_normal((B, K))).requires_grad_() for _ in range(E + 1)),
        path_costs=torch.tensor(COSTS, dtype=torch.float64),
        weights=torch.tensor(WEIGHTS, dtype=torch.float64),
        labels=torch.from_numpy(known),
        mix=(other, torch.from_numpy(rng.uniform(0.1, 0.9, B))) if mixed else None,
        smoothing=0.1,
        teacher=torch.from_numpy(2 * rng.standard_normal((B, K))),
        confidences=tuple(torch.from_numpy(rng.uniform(0.1, 0.9, B)).requires_grad_() for _ in range(E)),
        measured=tuple(torch.from_numpy(rng.uniform(0, 1, B)) for _ in range(E)),
        thresholds=(0.5, 0.7),
        support=torch.from_numpy(rng.uniform(0, 1, (E, K))),
    )
    return replace(found, **changes)


def numbers(tensor: torch.Tensor | None) -> np.ndarray:
    assert tensor is not None
    return np.asarray(tensor.detach().numpy())


def reference_cross_entropy(given: ExitBatch, smoothing: float) -> np.ndarray:
    """[E + 1, B]: ``-(1 - s) log p[label] - s * mean_k log p[k]``, shares of both labels where mixed."""
    rows = []
    for scores in given.logits:
        logs = log_softmax(numbers(scores), axis=1)

        def of(labels: np.ndarray, logs: np.ndarray = logs) -> np.ndarray:
            return -(1 - smoothing) * logs[np.arange(len(logs)), labels] - smoothing * logs.mean(axis=1)

        row = of(numbers(given.labels))
        if given.mix is not None:
            share = numbers(given.mix[1])
            row = share * row + (1 - share) * of(numbers(given.mix[0]))
        rows.append(row)
    return np.stack(rows)
