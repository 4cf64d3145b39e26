"""Loss terms: their formulas written out in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax

from eexform.training.loss_terms import leaving
from eexform.training.objectives import ExitBatch, parse
from tests.training.exit_batches import COSTS, TERMS, WEIGHTS, B, E, batch, numbers, reference_cross_entropy


def reference_leaving(given: ExitBatch) -> np.ndarray:
    """[E + 1, B], sample by sample and exit by exit."""
    sure = [numbers(confidence) for confidence in given.confidences]
    found = np.empty((E + 1, B))
    for n in range(B):
        for i in range(E + 1):
            found[i, n] = math.prod(1 - sure[j][n] for j in range(i)) * (sure[i][n] if i < E else 1)
    return found


def reference(text: str, given: ExitBatch) -> float:
    """The term by its formula, in loops."""
    name, _, rest = text.partition(":")
    said = dict(part.split("=") for part in rest.split(",") if part)
    weight = float(said.get("weight", 1))
    named = {"": WEIGHTS, "cost": tuple(3 * cost / sum(COSTS) for cost in COSTS)}
    exits = said.get("exits", "")
    weights = named[exits] if exits in named else tuple(map(float, exits.split("/")))
    losses = reference_cross_entropy(given, float(said.get("smoothing", 0.1)))
    if name == "cross_entropy":
        value = sum(weights[i] * losses[i].mean() for i in range(E + 1))
    elif name == "distill":
        temperature, of_trunk = float(said.get("temperature", 2)), said.get("teacher", "trunk") == "trunk"
        target = log_softmax(numbers(given.teacher if of_trunk else given.logits[-1]) / temperature, axis=1)
        value = 0.0
        for i, scores in enumerate(given.logits if of_trunk else given.logits[:-1]):
            ours = log_softmax(numbers(scores) / temperature, axis=1)
            value += weights[i] * temperature**2 * (np.exp(target) * (target - ours)).sum(axis=1).mean()
    elif name == "stick_breaking":
        value = (reference_leaving(given) * losses).sum() / B
    elif name == "confidence_bce":
        value = 0.0
        for i in range(E):
            sure, answer = numbers(given.confidences[i]), numbers(given.logits[i]).argmax(axis=1)
            right = (answer == numbers(given.labels)).astype(float)
            if given.mix is not None:
                share = numbers(given.mix[1])
                right = share * right + (1 - share) * (answer == numbers(given.mix[0]))
            kinds = [(right, -np.log(sure)), (1 - right, -np.log(1 - sure))]
            value += np.mean([(share * each).sum() / share.sum() for share, each in kinds if share.any()]) / E
    elif name == "expected_cost":
        expected = (reference_leaving(given) * np.array(COSTS)[:, None]).sum() / B
        value = max(0.0, expected - float(said["limit"])) / float(said["limit"])
    elif name == "support":
        table, labels = numbers(given.support), numbers(given.labels)
        value = 0.0
        for i in range(E):
            for n in range(B):
                target = table[i, labels[n]]
                if given.mix is not None:
                    share = numbers(given.mix[1])[n]
                    target = share * target + (1 - share) * table[i, numbers(given.mix[0])[n]]
                value += (numbers(given.confidences[i])[n] - target) ** 2 / (E * B)
    else:
        softness, floor = float(said.get("softness", 0.1)), float(said.get("floor", 0))
        reach, value = np.ones(B), 0.0
        for i in range(E + 1):
            share = floor + (1 - floor) * reach
            value += weights[i] * (share * losses[i]).sum() / share.sum()
            if i < E:
                gap = numbers(given.measured[i]) - given.thresholds[i]
                reach = reach * (1 - (expit(gap / softness) if softness else (gap >= 0)))
    return weight * float(value)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("text", TERMS)
def test_formula(text: str, mixed: bool) -> None:
    given = batch(mixed=mixed)
    assert parse(text)(given).item() == pytest.approx(reference(text, given), rel=1e-10)


def test_leaving_probabilities_sum_to_one() -> None:
    given = batch()
    shares = leaving(given.gates).detach().numpy()
    np.testing.assert_allclose(shares.sum(axis=0), 1)
    np.testing.assert_allclose(shares, reference_leaving(given))


def test_every_term_of_a_mixed_bag_has_the_type_of_its_batch() -> None:
    for text in TERMS:
        assert parse(text)(batch()).dtype == torch.float64
        assert parse(text)(batch()).shape == ()
