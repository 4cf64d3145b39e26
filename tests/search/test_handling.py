"""Plans that break a limit: how selection sees them, and that none of them is ever a result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eexform.errors import OptionError
from eexform.search.genome import Individual
from eexform.search.handling import HANDLINGS, Handling, seen
from eexform.search.journal import Journal
from eexform.search.nsga2 import Settings, evolve, select
from eexform.search.options import SearchOptions
from eexform.search.scorer import Scorer
from tests.search import synthetic
from tests.search.test_evolve import frozen

WHERE = synthetic.places(4, 3)
DATA = synthetic.scores(WHERE, 250)


def people(*figures: tuple[float, ...]) -> list[Individual]:
    """Individuals from error, costs and, last, violation."""
    made = []
    for place, (*values, violation) in enumerate(figures):
        made.append(Individual({}, str(place)))
        made[-1].fitness.values = tuple(values)
        made[-1].fitness.violation = violation
    return made


def test_adaptive_weighs_by_the_share_that_is_feasible() -> None:
    pool = people((0.1, 40.0, 0.5), (0.3, 20.0, 0.0), (0.2, 30.0, 0.0), (0.5, 10.0, 0.0))
    found = [one.fitness.values for one in seen(pool, Handling("adaptive"))]
    scaled = np.array([(0.0, 1.0), (0.5, 1 / 3), (0.25, 2 / 3), (1.0, 0.0)])
    np.testing.assert_allclose(found, 0.75 * scaled + 0.25 * np.array([[0.5], [0], [0], [0]]))
    assert [one.individual for one in seen(pool, Handling("adaptive"))] == pool
    assert all(not one.fitness.violation for one in seen(pool, Handling("adaptive")))


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e9])
def test_adaptive_knows_no_unit(unit: float) -> None:
    pool = people((0.1, 40.0 * unit, 0.5), (0.3, 20.0 * unit, 0.0), (0.5, 10.0 * unit, 0.1))
    again = people((0.1, 40.0, 0.5), (0.3, 20.0, 0.0), (0.5, 10.0, 0.1))
    for kind in HANDLINGS:
        kept = [one.key for one in select(pool, 2, Handling(kind))]
        assert kept == [one.key for one in select(again, 2, Handling(kind))]


def test_with_nobody_feasible_violations_alone_decide() -> None:
    pool = people((0.1, 1.0, 0.9), (0.9, 9.0, 0.2), (0.5, 5.0, 0.4))
    for kind in ("feasible-first", "adaptive"):
        assert [one.key for one in select(pool, 2, Handling(kind))] == ["1", "2"]


def test_penalty_multiplies_every_objective() -> None:
    pool = people((0.1, 40.0, 3.0, 0.5), (0.3, 20.0, 2.0, 0.0))
    found = [one.fitness.values for one in seen(pool, Handling("penalty", 4.0))]
    assert found == [pytest.approx((0.3, 120.0, 9.0)), pytest.approx((0.3, 20.0, 2.0))]


def test_a_plan_just_over_a_limit_may_stay() -> None:
    """Feasible-first drops it; the others keep it, for what it has may be worth handing on."""
    pool = people((0.1, 20.2, 0.01), (0.5, 10.0, 0.0), (0.4, 15.0, 0.0), (0.45, 15.5, 0.0))
    assert "0" not in {one.key for one in select(pool, 3, Handling())}
    assert "0" in {one.key for one in select(pool, 3, Handling("adaptive"))}
    assert "0" in {one.key for one in select(pool, 3, Handling("penalty"))}


def test_a_plan_far_over_its_budget_goes_whatever_its_error() -> None:
    pool = people((0.05, 90.0, 8.0), *((0.1 + 0.01 * place, 10.0 - place, 0.0) for place in range(8)))
    for kind in HANDLINGS:
        assert "0" not in {one.key for one in select(pool, 5, Handling(kind))}


@pytest.mark.parametrize("kind", HANDLINGS)
def test_without_violations_all_handlings_are_one(kind: str) -> None:
    results = []
    for handling in (Handling(), Handling(kind)):
        evaluation = synthetic.evaluation(WHERE, DATA)
        settings = Settings(population=16, generations=4, handling=handling)
        results.append(frozen(evolve(evaluation.space, evaluation, settings, seed=2), evaluation))
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", HANDLINGS)
def test_only_what_keeps_all_limits_is_a_result(kind: str) -> None:
    limits = synthetic.limits(0.6, "macs@p95=1.02x", max_cost=26e6)
    evaluation = synthetic.evaluation(WHERE, DATA, constraints=limits)
    settings = Settings(population=24, generations=8, handling=Handling(kind))
    states = []
    evolve(evaluation.space, evaluation, settings, seed=1, on_generation=states.append)
    exact = Scorer({"select": DATA}, synthetic.costs(WHERE))
    assert len(states[-1].archive)
    for one in states[-1].archive:
        scored = exact.exact(evaluation.candidate(one), "select")
        assert scored.accuracy >= 0.6
        assert scored.cost["macs"] <= 26e6
        assert scored.percentiles["p95"]["macs"] <= 1.02 * 40e6
        assert one.fitness.values == pytest.approx((1 - scored.accuracy, scored.cost["macs"]))  # its own, unblended
    broken = [sum(one.fitness.violation > 0 for one in state.population) for state in states[1:]]
    # with feasible plans enough, feasible-first holds none that is not; the others live with some
    assert (max(broken[-3:]) > 0) == (kind != "feasible-first")


def test_resuming_goes_on_as_it_was(tmp_path: Path) -> None:
    limits = synthetic.limits(0.7, max_cost=24e6)
    settings = Settings(population=16, generations=6, refine_every=2, refine_elites=4, handling=Handling("adaptive"))
    straight = synthetic.evaluation(WHERE, DATA, constraints=limits)
    expected = evolve(straight.space, straight, settings, seed=7)
    assert any(one.fitness.violation for one in expected.population)
    for stop in (1, 3):
        path = tmp_path / f"{stop}.jsonl"
        first = synthetic.evaluation(WHERE, DATA, constraints=limits)
        journal = Journal(path, first.space, settings.to_json(), 7)
        journal.begin()
        cut = Settings(**{**vars(settings), "generations": stop})
        evolve(first.space, first, cut, seed=7, on_generation=journal.append)
        second = synthetic.evaluation(WHERE, DATA, constraints=limits)
        state = Journal(path, second.space, settings.to_json(), 7).resume()
        assert state is not None
        assert state.generation == stop
        found = evolve(second.space, second, settings, seed=7, state=state)
        assert frozen(found, second) == frozen(expected, straight)


def test_settings_of_older_searches_are_as_they_were() -> None:
    assert "handling" not in Settings().to_json()
    assert Settings(handling=Handling("penalty", 3.0)).to_json()["handling"] == {"kind": "penalty", "weight": 3.0}
    assert not {"constraints", "penalty"} & set(SearchOptions().to_json())
    changed = SearchOptions(constraints="adaptive")
    assert SearchOptions.from_json(changed.to_json()) == changed
    with pytest.raises(OptionError, match="constraints: 'adaptiv' does not exist: did you mean 'adaptive'"):
        SearchOptions(constraints="adaptiv")
    with pytest.raises(OptionError, match="a penalty weight belongs to constraints penalty, not to adaptive"):
        SearchOptions(constraints="adaptive", penalty=3.0)
    with pytest.raises(OptionError, match="penalty weight 0 is not positive"):
        SearchOptions(constraints="penalty", penalty=0)
