"""Loss terms: formulas written out in numpy, gradients against finite differences, and what happens at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax

from eexform.errors import OptionError
from eexform.training import objectives
from eexform.training.loss_terms import ExpectedCost, leaving
from eexform.training.objectives import ExitBatch, Loss, exit_weights, parse

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


# -- formulas ----------------------------------------------------------------------------------------------------------


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


# -- gradients ---------------------------------------------------------------------------------------------------------


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


# -- edges -------------------------------------------------------------------------------------------------------------


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
    with pytest.raises(OptionError, match="needs labels, and the data set has none"):
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


# -- names and settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "no loss is called 'nothing'"),
        ("distill:heat=2", "has no parameter 'heat'"),
        ("distill:2", "is no setting"),
        ("distill:temperature=0", "temperature: 0 must be a positive number"),
        ("distill:teacher=me", "'me' is not a choice"),
        ("distill:weight=-1", "weight: -1 must be a positive number"),
        ("distill:weight=much", "expected float"),
        ("cross_entropy:exits=many", "neither uniform, linear or cost"),
        ("cross_entropy:exits=0/0", "not all zero"),
        ("cross_entropy:smoothing=1", "must be below 1"),
        ("expected_cost:limit=0", "limit: 0 must be a positive number"),
        ("survivors:floor=2", "floor: 2 must be between 0 and 1"),
        ("survivors:softness=-1", "softness"),
    ],
)
def test_settings_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse(text)


def test_listing() -> None:
    found = {entry["name"]: entry for entry in objectives.listing()}
    assert {text.partition(":")[0] for text in TERMS} <= set(found)
    for entry in found.values():
        assert entry["error"] is None
        assert entry["summary"]
        assert "weight" in {setting["name"] for setting in entry["settings"]}


def test_exit_weights() -> None:
    costs = (0.2, 0.6, 1.0)
    assert exit_weights("uniform", costs) == (1, 1, 1)
    assert exit_weights("linear", costs) == pytest.approx((0.5, 1, 1.5))
    assert exit_weights("cost", costs) == pytest.approx((1 / 3, 1, 5 / 3))
    assert exit_weights("1/0/2", costs) == (1, 0, 2)
    assert exit_weights((1, 0, 2), costs) == (1, 0, 2)
    with pytest.raises(OptionError, match="expected 3 numbers, the final exit's last, found 2"):
        exit_weights("1/2", costs)
