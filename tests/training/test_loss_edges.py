"""Loss terms at the edges: classes, confidences and exits that are all alike."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from eexform.errors import OptionError
from eexform.training.objectives import ExitBatch, parse
from tests.training.exit_batches import GATED, TERMS, B, E, K, batch, numbers, reference_cross_entropy


def all_finite(text: str, given: ExitBatch) -> float:
    """The term's value; it and its gradients must be finite."""
    loss = parse(text)(given)
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    assert math.isfinite(loss.item())
    for tensor in (*given.logits, *given.gates):
        assert tensor.grad is None or bool(tensor.grad.isfinite().all())
    return float(loss.item())


@pytest.mark.parametrize("text", TERMS)
@pytest.mark.parametrize("right", [True, False])
def test_all_right_or_all_wrong(text: str, right: bool) -> None:
    labels = np.arange(B) % K
    scores = np.full((B, K), -3.0)
    scores[np.arange(B), labels if right else (labels + 1) % K] = 3.0
    alike = tuple(torch.from_numpy(scores.copy()).requires_grad_() for _ in range(E + 1))
    given = batch(labels=labels, logits=alike)
    value = all_finite(text, given)
    if text == "confidence_bce":
        sure = np.stack([numbers(c) for c in given.confidences])
        assert value == pytest.approx(-np.log(sure if right else 1 - sure).mean(axis=1).mean())


@pytest.mark.parametrize("text", TERMS)
def test_one_class(text: str) -> None:
    all_finite(text, batch(labels=np.full(B, 2)))


@pytest.mark.parametrize("text", TERMS)
@pytest.mark.parametrize("level", [0.0, 1.0, 1e-30])
def test_confidences_at_the_ends(text: str, level: float) -> None:
    sure = tuple(torch.full((B,), level, dtype=torch.float64, requires_grad=True) for _ in range(E))
    given = batch(confidences=sure)
    value = all_finite(text, given)
    if text == "stick_breaking":  # all leave at the first exit, or nobody before the last
        place = 0 if level == 1 else E
        assert value == pytest.approx(reference_cross_entropy(given, 0.1)[place].mean())


def test_an_exit_that_nobody_reaches_is_not_trained() -> None:
    given = batch(thresholds=(-math.inf, 0.5))
    parse("survivors:softness=0")(given).backward()
    first, second, final = given.logits
    assert first.grad is not None and first.grad.abs().sum() > 0  # noqa: PT018
    for scores in (second, final):
        assert scores.grad is None or scores.grad.abs().sum() == 0


@pytest.mark.parametrize("softness", [0, 0.1])
def test_thresholds_that_nobody_passes_make_survivors_of_all(softness: float) -> None:
    given = batch(thresholds=(math.inf, math.inf))
    everybody = parse("cross_entropy")(given).item()
    assert parse(f"survivors:softness={softness}")(given).item() == pytest.approx(everybody)


def test_distillation_from_oneself_is_nothing() -> None:
    given = batch()
    same = replace(given, logits=(given.logits[-1],) * (E + 1))
    assert parse("distill:teacher=final")(same).item() == pytest.approx(0, abs=1e-12)


def test_cost_below_the_limit_is_free() -> None:
    given = batch()
    assert parse("expected_cost:limit=2")(given).item() == 0


@pytest.mark.parametrize("text", [text for text in TERMS if not text.startswith("distill")])
def test_what_needs_labels_refuses_without(text: str) -> None:
    given = replace(batch(), labels=None, mix=None)
    if text.startswith("expected_cost"):
        assert parse(text)(given).item() > 0  # it needs no labels
        return
    if text == "confidence_bce":  # right is what the trunk says
        assert given.teacher is not None
        answers = replace(given, labels=given.teacher.argmax(dim=1))
        assert parse(text)(given).item() == parse(text)(answers).item() != parse(text)(batch()).item()
        given = replace(given, teacher=None)
    with pytest.raises(OptionError, match=r"needs labels(, and the data set has none| or the original trunk's scores)"):
        parse(text)(given)


@pytest.mark.parametrize("text", GATED)
@pytest.mark.parametrize("gates", [(), (None, None), (torch.full((B,), 0.5), None)])
def test_terms_with_gates_refuse_heads_without(text: str, gates: tuple[torch.Tensor | None, ...]) -> None:
    with pytest.raises(OptionError, match=r"needs a learned confidence at every exit: use heads with a gate"):
        parse(text)(batch(confidences=gates))


def test_other_things_that_are_missing() -> None:
    for text, what, lacking in (
        ("distill", "original trunk", {"teacher": None}),
        ("support", "accuracy of every exit on every class", {"support": None}),
        ("survivors", "threshold of every exit", {"measured": ()}),
    ):
        with pytest.raises(OptionError, match=what):
            parse(text)(batch(**lacking))


def test_a_batch_whose_exits_do_not_fit() -> None:
    with pytest.raises(OptionError, match="path_costs: expected one number for each of 3 exits"):
        batch(path_costs=torch.ones(2))
