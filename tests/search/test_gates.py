"""Plans that leave by learned gates: scored alike by all scorers, searched, realised, verified."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eexform.backends.export import export
from eexform.errors import OptionError
from eexform.ir import measures
from eexform.ir.measures import Stick
from eexform.search.bits import BitScorer
from eexform.search.margins import with_margins
from eexform.search.run import Run
from eexform.search.scorer import Candidate, PlannedExit, Scorer
from eexform.search.terms import Term
from eexform.search.thresholds import Draft, descend, improve, total
from eexform.verification.verify import verify
from tests import tiny
from tests.search import synthetic
from tests.search.running import OPTIONS, chosen, options, recipe, run_and_check, start

WHERE = synthetic.places(4, 2)
DATA = synthetic.scores(WHERE, 500)
GATED = ("none/avg/gate", "conv:1x8/avg/gate")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return start(tmp_path_factory.mktemp("gates") / "run", options=options(heads=GATED, generations=6))


# -- scoring ----------------------------------------------------------------------------------------------------------


def scorer() -> BitScorer:
    return BitScorer(DATA, synthetic.costs(WHERE), WHERE, measures=synthetic.LEARNED, levels=32)


def test_columns_are_what_the_measures_say() -> None:
    bits, heads = scorer(), (0, 3, 4, 7)
    gates = [DATA.gates[bits.heads[head]] for head in heads]
    for measure, name in enumerate(synthetic.LEARNED):
        expected = measures.get_gate(name).accumulate(gates)
        for carry in (0.0, 0.5):  # gates do not hear what scores are carried
            grids, reached = bits.columns(heads, measure, carry)
            for grid, levels, confidence in zip(grids, reached, expected, strict=True):
                assert set(grid.tolist()) <= set(confidence.tolist())
                np.testing.assert_array_equal(levels, (confidence[:, None] >= grid).sum(axis=1))
    assert bits.by_path(1, 0.0)
    assert not bits.by_path(0, 0.0)


def test_stick_depends_on_the_path_and_gate_does_not() -> None:
    exact = Scorer({"select": DATA}, synthetic.costs(WHERE))
    both = tuple(PlannedExit(f"s{place}", "h0", 0.5) for place in (0, 2))
    for measure, same in (("gate", True), ("stick", False)):
        first = exact.confidences(Candidate(both, measure), "select")[1]
        alone = exact.confidences(Candidate(both[1:], measure), "select")[0]
        assert (first == alone).all() == same
        assert (first >= alone).all()


def test_local_search_never_loses() -> None:
    bits, rng = scorer(), np.random.default_rng(0)
    for measure in (0, 1):
        for weight in (0.02, 0.3):
            for _ in range(10):
                heads = tuple(sorted(rng.choice(8, 3, replace=False).tolist()))
                heads = tuple(head for head, after in pairwise((*heads, 99)) if head // 2 != after // 2)
                draft = Draft(heads, tuple(rng.integers(0, 32, len(heads)).tolist()), measure)
                price = weight / bits.costs["macs"].trunk
                # dropping an exit of a stick moves the confidences behind it, so only levels are free there
                better = descend(bits, draft, {Term("macs"): price}, drop=not bits.by_path(measure, 0.0))
                assert total(bits, better, {Term("macs"): price}) <= total(bits, draft, {Term("macs"): price}) + 1e-9
    grown = improve(bits, Draft((), (), 0), {Term("macs"): 0.3 / bits.costs["macs"].trunk})
    assert grown.heads
    assert improve(bits, Draft((), (), 1), {Term("macs"): 0.3 / bits.costs["macs"].trunk}).heads == ()


@pytest.mark.parametrize("measure", synthetic.LEARNED)
@pytest.mark.parametrize("carry", [0.0, 0.5])
def test_margins_change_no_decision(measure: str, carry: float) -> None:
    exact = Scorer({"select": DATA}, synthetic.costs(WHERE))
    free = Candidate(tuple(PlannedExit(f"s{place}", "h1", 0.5) for place in range(4)), measure, carry)
    edges = [float(np.sort(sure)[300]) for sure in exact.confidences(free, "select")]
    before = Candidate(
        tuple(PlannedExit(item.site, item.head, edge) for item, edge in zip(free.exits, edges, strict=True)),
        measure,
        carry,
    )
    after = with_margins(before, exact)
    assert all(new.threshold < old.threshold for new, old in zip(after.exits, before.exits, strict=True))
    ours, theirs = exact.decide(before, "select"), exact.decide(after, "select")
    np.testing.assert_array_equal(ours.exit_index, theirs.exit_index)


def test_a_head_without_a_gate_is_named() -> None:
    bare = synthetic.HeadScores(DATA.final, DATA.labels, DATA.heads, DATA.temperatures)
    exact = Scorer({"select": bare}, synthetic.costs(WHERE))
    with pytest.raises(OptionError, match="head 'h0' at 's1' has no gate"):
        exact.decide(Candidate((PlannedExit("s1", "h0", 0.5),), "stick"), "select")


# -- searching --------------------------------------------------------------------------------------------------------


def test_only_measures_that_read_gates_are_searched(done: Run) -> None:
    used = {exit_.measure for plan in done.front for exit_ in plan.exits}
    assert used
    assert used <= {"gate", "stick"}
    assert any(plan.exits for plan in done.front)


@pytest.mark.parametrize("measure", synthetic.LEARNED)
@pytest.mark.parametrize("split", ["select", "test"])
def test_predicted_is_realised(tmp_path_factory: pytest.TempPathFactory, measure: str, split: str) -> None:
    run = _searched(tmp_path_factory, measure)
    data = tiny.digits(1797).bind(run.graph)
    plans = chosen(run)
    assert any(len(plan.exits) > 1 for plan in plans)
    for plan in plans:
        run_and_check(plan, data, split)


@pytest.mark.parametrize("form", ["if", "stages", "multi"])
@pytest.mark.parametrize("measure", synthetic.LEARNED)
def test_exports_verify(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, measure: str, form: Any) -> None:
    run = _searched(tmp_path_factory, measure)
    for plan in chosen(run, count=1):
        plan.export(tmp_path / f"{plan.index}", form=form)
        report = verify(tmp_path / f"{plan.index}", run.graph, tiny.digits(1797), samples=64)
        report.require()


def test_a_sum_of_gates_in_place_of_the_stick_is_found(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault: each gate counts in full, not its share of what is left."""
    run = _searched(tmp_path_factory, "stick")
    plan = max(run.front, key=lambda plan: len(plan.exits))
    assert len(plan.exits) > 1
    right = Stick.emit

    def wrong(self: Stick, emitter: Any, before: Any, gate: Any) -> Any:
        if before is None:
            return right(self, emitter, before, gate)
        return emitter.node("Add", before, gate, name="stick", shape=["N"], dtype=np.float32)

    for form in ("if", "stages", "multi"):
        with monkeypatch.context() as patch:
            patch.setattr(Stick, "emit", wrong)
            export(plan.materialise(), tmp_path / f"wrong-{form}", form=form)
        # whether what is left is computed at verification is of no help to the fault: it is done in numpy
        report = verify(tmp_path / f"wrong-{form}", run.graph, tiny.digits(1797), samples=64)
        assert not report.ok
        assert "mixed batches" in {check.name for check in report.checks if not check.ok}
        with monkeypatch.context() as patch:
            patch.setattr(Stick, "emit", wrong)
            assert not verify(tmp_path / f"wrong-{form}", run.graph, tiny.digits(1797), samples=64).ok


def test_default_heads_with_gates(tmp_path: Path) -> None:
    run = start(tmp_path / "run", options=options(heads=(), gates=True, max_sites=2))
    assert run.facts["options"]["gates"] is True
    heads = {exit_.head for plan in run.front for exit_ in plan.exits}
    assert heads
    assert all(head.endswith("/gate") for head in heads)
    for plan in chosen(run, count=1):
        run_and_check(plan, tiny.digits(1797).bind(run.graph), "test")


def test_options_without_gates_are_as_before() -> None:
    assert "gates" not in options().to_json()
    assert type(options()).from_json(options(gates=True).to_json()).gates


@pytest.mark.parametrize(
    ("changed", "given", "message"),
    [
        ({"heads": ("none/avg", "conv:1x8/avg/gate")}, {}, "has a gate and 'none/avg' has none.*give all candidates"),
        ({}, {"measure": "stick"}, "'stick', which reads gates, but the heads have none: drop it, or give .*--gates"),
        ({"heads": GATED}, {"measure": "margin"}, "'margin', which reads scores, but the heads have gates: drop it"),
    ],
)
def test_what_does_not_go_together_is_told_before_training(
    tmp_path: Path, changed: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        start(tmp_path / "run", options=options(**changed), recipe=recipe(("insert_exits", given)))
    assert not (tmp_path / "run").exists()


_RUNS: dict[str, Run] = {}


def _searched(factory: pytest.TempPathFactory, measure: str) -> Run:
    """A search with the measure given, made once."""
    if measure not in _RUNS:
        out = factory.mktemp(measure) / "run"
        given = options(**{**OPTIONS, "heads": GATED, "generations": 8, "population": 24})
        _RUNS[measure] = start(out, options=given, recipe=recipe(("insert_exits", {"measure": measure})))
    return _RUNS[measure]
