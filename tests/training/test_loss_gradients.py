"""Loss terms: gradients against finite differences, and who gets one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from eexform.training.loss_terms import ExpectedCost
from eexform.training.objectives import ExitBatch, Loss, parse
from tests.training.exit_batches import TERMS, E, batch


def check_gradients(term: Callable[[ExitBatch], torch.Tensor], given: ExitBatch, frozen: tuple[int, ...] = ()) -> None:
    """Compare autograd with central differences in every score (but of ``frozen`` exits) and learned confidence."""
    free = [*given.logits, *given.gates]
    for tensor in free:
        tensor.grad = None
    loss = term(given)
    if loss.requires_grad:
        loss.backward()  # type: ignore[no-untyped-call]
    step = 1e-6
    for place, tensor in enumerate(free):
        if place in frozen:
            assert tensor.grad is None, f"value {place} must get no gradient"
            continue
        found = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        flat = tensor.detach().view(-1)
        for entry in range(flat.numel()):
            kept = flat[entry].item()
            flat[entry] = kept + step
            above = term(given).item()
            flat[entry] = kept - step
            below = term(given).item()
            flat[entry] = kept
            slope = (above - below) / (2 * step)
            assert found.view(-1)[entry].item() == pytest.approx(slope, rel=1e-5, abs=1e-8), (place, entry)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("text", TERMS)
def test_gradient(text: str, mixed: bool) -> None:
    own_teacher = (E,) if "teacher=final" in text else ()  # it moves the value, and gets no gradient: that is the point
    check_gradients(parse(text), batch(mixed=mixed), frozen=own_teacher)


@dataclass(frozen=True)
class WithoutGradient(ExpectedCost):
    """The mistake of a published implementation: the expected cost is counted from decided, not soft, exits."""

    name: ClassVar[str] = "without_gradient"

    def value(self, batch: ExitBatch) -> torch.Tensor:
        return super().value(replace(batch, confidences=tuple(c.detach() for c in batch.gates)))


@dataclass(frozen=True)
class HalfGradient(ExpectedCost):
    """Only the first exit's confidence is learned."""

    name: ClassVar[str] = "half_gradient"

    def value(self, batch: ExitBatch) -> torch.Tensor:
        first, *others = batch.gates
        return super().value(replace(batch, confidences=(first, *(c.detach() for c in others))))


@pytest.mark.parametrize("wrong", [WithoutGradient, HalfGradient])
def test_a_wrong_gradient_is_noticed(wrong: type[Loss]) -> None:
    with pytest.raises(AssertionError):
        check_gradients(wrong(limit=0.4), batch())  # type: ignore[call-arg]


@pytest.mark.parametrize("text", ["stick_breaking", "expected_cost:limit=0.4", "support", "confidence_bce"])
def test_confidences_do_learn(text: str) -> None:
    given = batch()
    parse(text)(given).backward()
    for confidence in given.gates:
        assert confidence.grad is not None
        assert confidence.grad.abs().sum() > 0


def test_confidence_bce_leaves_the_scores_alone() -> None:
    given = batch()
    parse("confidence_bce")(given).backward()
    assert all(scores.grad is None for scores in given.logits)


def test_teachers_get_no_gradient() -> None:
    given = batch()
    assert given.teacher is not None
    given.teacher.requires_grad_()
    (parse("distill")(given) + parse("distill:teacher=final")(given)).backward()
    assert given.teacher.grad is None


def test_survivors_do_not_pull_at_the_confidences() -> None:
    given = batch()
    for confidence in given.measured:
        confidence.requires_grad_()
    parse("survivors")(given).backward()
    assert all(confidence.grad is None for confidence in given.measured)


def test_expected_cost_falls_when_its_gradient_is_followed() -> None:
    given, term = batch(), parse("expected_cost:limit=0.4")
    before = term(given).item()
    term(given).backward()
    with torch.no_grad():
        moved = tuple(c - 0.1 * c.grad for c in given.gates)  # type: ignore[operator]
    assert term(replace(given, confidences=moved)).item() < before
