"""The search as a whole: reproducible, resumable, within its limits, better than chance."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eexform.errors import OptionError, RunError, StorageError
from eexform.search import baselines
from eexform.search.archive import Archive, hypervolume, non_dominated
from eexform.search.bits import BitScorer
from eexform.search.evaluation import Evaluation
from eexform.search.genome import Individual
from eexform.search.goals import Goals
from eexform.search.journal import Journal, read_journal
from eexform.search.nsga2 import Settings, State, evolve, select, start, step
from eexform.search.scorer import Scorer
from tests.search import synthetic

WHERE = synthetic.places(4, 3)
DATA = synthetic.scores(WHERE, 250)
SMALL = Settings(population=16, generations=6, refine_every=2, refine_elites=4)


def fresh(**options: Any) -> Evaluation:
    return synthetic.evaluation(WHERE, DATA, **options)


def frozen(state: State, evaluation: Evaluation) -> str:
    """Everything about a state but the clock."""
    members = [[one.key, one.fitness.values, one.fitness.violation] for one in (*state.population, *state.archive)]
    return json.dumps([state.generation, members, state.evaluated, state.rng.bit_generator.state])


def test_same_seed_same_search_and_no_global_state() -> None:
    results = []
    for _ in range(2):
        random.seed(99)
        np.random.seed(5)
        before = random.getstate()
        evaluation = fresh()
        results.append(frozen(evolve(evaluation.space, evaluation, SMALL, seed=3), evaluation))
        assert random.getstate() == before
    assert results[0] == results[1]
    other = fresh()
    assert frozen(evolve(other.space, other, SMALL, seed=4), other) != results[0]


@pytest.mark.parametrize(("killed_after", "least"), [(0, 0.0), (1, 0.0), (3, 0.0), (5, 0.0), (1, 0.82), (3, 1.0)])
def test_resumed_equals_straight_run(tmp_path: Path, killed_after: int, least: float) -> None:
    """Without limits, with one that few plans keep, and with one that none keeps."""
    limits = synthetic.limits(min_accuracy=least)
    straight = fresh(constraints=limits)
    journal = Journal(tmp_path / "straight.jsonl", straight.space, SMALL.to_json(), 7)
    journal.begin()
    expected = evolve(straight.space, straight, SMALL, seed=7, on_generation=journal.append)

    class KilledError(Exception):
        pass

    first = fresh(constraints=limits)
    path = tmp_path / "resumed.jsonl"
    journal = Journal(path, first.space, SMALL.to_json(), 7)
    journal.begin()

    def append(state: State) -> None:
        journal.append(state)
        if state.generation == killed_after:
            raise KilledError

    with pytest.raises(KilledError):
        evolve(first.space, first, SMALL, seed=7, on_generation=append)
    with open(path, "ab") as stream:  # the crash tore a line
        stream.write(b'{"generation":')
    random.seed(0)
    second = fresh(constraints=limits)
    journal = Journal(path, second.space, SMALL.to_json(), 7)
    state = journal.resume()
    assert state is not None
    assert state.generation == killed_after
    found = evolve(second.space, second, SMALL, seed=7, state=state, on_generation=journal.append)
    assert frozen(found, second) == frozen(expected, straight)

    def lines(name: str) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k != "seconds"} for line in read_journal(tmp_path / name)]

    assert lines("resumed.jsonl") == lines("straight.jsonl")
    newly = [json.dumps(one) for line in lines("straight.jsonl")[1:] for one in line["archive"]]
    assert len(set(newly)) == len(newly)  # what a generation brought, not all of the archive again and again


def test_a_generation_leaves_the_state_before_it_alone() -> None:
    evaluation = fresh()
    state = start(evaluation.space, evaluation, SMALL, 5)
    once, again = (step(evaluation.space, evaluation, SMALL, state) for _ in range(2))
    assert frozen(once, evaluation) == frozen(again, evaluation)


def test_journal_refuses_what_it_cannot_continue(tmp_path: Path) -> None:
    evaluation = fresh()
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, evaluation.space, SMALL.to_json(), 1)
    with pytest.raises(RunError, match="no journal to resume"):
        journal.resume()
    journal.begin()
    assert journal.resume() is None
    journal.append(start(evaluation.space, evaluation, SMALL, 1))
    with pytest.raises(RunError, match=r"another seed \(then 1, now 2\)"):
        Journal(path, evaluation.space, SMALL.to_json(), 2).resume()
    with pytest.raises(RunError, match=r"another settings \(population: then 16, now 96\)"):
        Journal(path, evaluation.space, Settings().to_json() | {"generations": 6}, 1).resume()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"generation":0', b'"generation":1'))
    with pytest.raises(RunError, match="expected generation 0 on line 2"):
        journal.resume()
    path.write_bytes(whole[:200] + b"#" + whole[200:])
    with pytest.raises(RunError, match="line 1 is damaged"):
        journal.resume()
    path.write_bytes(whole.replace(b'"version":1', b'"version":2'))
    with pytest.raises(RunError, match="newer version of eexform"):
        journal.resume()
    path.write_bytes(b"")
    with pytest.raises(RunError, match="first line is missing"):
        journal.resume()


def test_journal_says_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = fresh()
    journal = Journal(tmp_path / "journal.jsonl", evaluation.space, {}, 1)
    journal.begin()
    state = start(evaluation.space, evaluation, SMALL, 1)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        journal.append(state)


def test_interrupted_search_keeps_its_last_generation() -> None:
    evaluation = fresh()
    calls = itertools.count()
    score = evaluation.evaluate

    def evaluate(individuals: Any) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt
        score(individuals)

    evaluation.evaluate = evaluate  # type: ignore[method-assign]
    state = evolve(evaluation.space, evaluation, SMALL, seed=0)
    assert state.interrupted
    assert state.generation == 1
    assert len(state.archive)


def test_archive_is_exact_and_holds_the_trunk() -> None:
    evaluation = fresh()
    seen: list[Individual] = []
    score = evaluation.evaluate

    def evaluate(individuals: Any) -> None:
        score(individuals)
        seen.extend(individuals)

    evaluation.evaluate = evaluate  # type: ignore[method-assign]
    state = evolve(evaluation.space, evaluation, SMALL, seed=0)
    assert len(seen) == state.evaluated
    points = np.array([one.fitness.values for one in seen])
    np.testing.assert_array_equal(state.archive.points, points[non_dominated(points)])
    trunk = seen[0]
    assert not evaluation.candidate(trunk).exits
    assert trunk.fitness.values[1] == 40e6
    assert state.archive.points[-1, 0] <= trunk.fitness.values[0]
    for one in list(state.archive)[:: max(1, len(state.archive) // 10)]:
        scored = Scorer({"select": DATA}, synthetic.costs(WHERE)).exact(evaluation.candidate(one), "select")
        assert one.fitness.values == (pytest.approx(1 - scored.accuracy), pytest.approx(scored.cost["macs"]))
        recipe = evaluation.recipe(one)
        assert set(recipe[0][1]["thresholds"]) == {exit_.site for exit_ in evaluation.candidate(one).exits}


def test_children_are_new_and_the_population_has_no_twins() -> None:
    evaluation = fresh()
    state = start(evaluation.space, evaluation, SMALL, 0)
    for _ in range(4):
        state = step(evaluation.space, evaluation, SMALL, state)
        keys = [one.key for one in state.population]
        assert len(set(keys)) == len(keys) == SMALL.population


def test_constraints_hold_on_the_archive() -> None:
    limits = synthetic.limits(max_cost=30e6, max_params=272e3, min_accuracy=0.5, max_worst=42e6)
    evaluation = fresh(constraints=limits)
    scored: list[Individual] = []
    score = evaluation.evaluate

    def evaluate(individuals: Any) -> None:
        scored.extend(individuals)
        score(individuals)

    evaluation.evaluate = evaluate  # type: ignore[method-assign]
    state = evolve(evaluation.space, evaluation, SMALL, seed=0)
    exact = Scorer({"select": DATA}, synthetic.costs(WHERE))
    assert len(state.archive)
    for one in state.archive:
        plan = exact.exact(evaluation.candidate(one), "select")
        assert plan.cost["macs"] <= 30e6
        assert plan.cost["params"] <= 272e3
        assert plan.accuracy >= 0.5
        assert plan.worst["macs"] <= 42e6
    # what is certain beforehand is not even scored; the trunk alone always is
    assert all(evaluation.certain_violation(one) == 0 for one in scored[1:])


def test_violation_is_that_of_the_exact_figures() -> None:
    """Limits are about accuracies, whatever else answers are judged by."""
    limits = synthetic.limits(max_cost=24e6, max_worst=41e6, max_params=273e3, min_accuracy=0.8)
    costs = synthetic.costs(WHERE)
    bits = BitScorer(DATA, costs, WHERE, measures=synthetic.MEASURES, levels=32, trust=0.6)
    evaluation = Evaluation(fresh().space, bits, Goals.of("macs"), limits)
    exact = Scorer({"select": DATA}, costs, trust=0.6)
    rng = np.random.default_rng(2)
    people = [evaluation.space.sample(rng) for _ in range(40)]
    evaluation.evaluate(people)
    for one in people:
        found = exact.exact(evaluation.candidate(one), "select")
        expected = limits.after(found.figure, found.accuracy)
        assert one.fitness.violation == pytest.approx(expected)
        assert one.fitness.values == pytest.approx((1.0 - found.judged, found.cost["macs"]))
        assert evaluation.certain_violation(one) <= one.fitness.violation + 1e-12


def test_the_trunk_is_there_even_where_it_breaks_a_limit() -> None:
    evaluation = fresh(constraints=synthetic.limits(max_cost=25e6))
    first, *others = start(evaluation.space, evaluation, SMALL, 0).population
    assert not evaluation.candidate(first).exits
    assert first.fitness.violation == pytest.approx(40 / 25 - 1)
    assert others
    assert all(not evaluation.certain_violation(one) for one in others)


def test_impossible_limits_are_refused() -> None:
    evaluation = fresh(constraints=synthetic.limits(max_worst=1e6))
    with pytest.raises(OptionError, match="none of the plans tried keeps the cost limits"):
        evolve(evaluation.space, evaluation, SMALL, seed=0)
    bits = BitScorer(DATA, {"macs": synthetic.costs(WHERE)["macs"]}, WHERE, measures=synthetic.MEASURES)
    with pytest.raises(OptionError, match="limit 'params' is no cost model here: choose from 'macs'"):
        Evaluation(evaluation.space, bits, Goals.of("macs"), synthetic.limits(max_params=1e9))
    with pytest.raises(OptionError, match="objective 'mac' is no cost model here: did you mean 'macs'"):
        Evaluation(evaluation.space, bits, Goals.of("mac"))
    free = BitScorer(DATA, {"macs": synthetic.costs(WHERE, trunk=0.0)["macs"]}, WHERE, measures=synthetic.MEASURES)
    with pytest.raises(OptionError, match=r"the trunk costs 0.0 under 'macs', so there is nothing to save"):
        Evaluation(evaluation.space, free, Goals.of("macs"))
    with pytest.raises(OptionError, match="population 10 is not a multiple of 4"):
        Settings(population=10)


def test_tiny_spaces_are_exhausted_without_trouble() -> None:
    where = synthetic.places(1, 1)
    evaluation = synthetic.evaluation(
        where, synthetic.scores(where, 40), levels=2, measures=("margin",), carries=(0.0,)
    )
    state = evolve(evaluation.space, evaluation, SMALL, seed=0)
    assert 1 <= len(state.population) <= 3


def test_selection_prefers_feasible_then_least_violating() -> None:
    people = [Individual({}, str(number)) for number in range(6)]
    for number, one in enumerate(people):
        one.fitness.values = (0.1 * number, 10.0 - number)
        one.fitness.violation = 0.0 if number < 2 else 1.0 / number
    assert [one.key for one in select(people, 4)] in (["0", "1", "5", "4"], ["1", "0", "5", "4"])


def test_search_beats_chance_and_nears_the_optimum() -> None:
    where = synthetic.places(3, 2)
    data = synthetic.scores(where, 300)
    options: dict[str, Any] = {"levels": 8, "measures": ("margin",), "carries": (0.0,)}
    evaluation = synthetic.evaluation(where, data, **options)
    bits = evaluation.scorer
    best = baselines.exhaustive(bits, "macs", range(8))
    reference = (1.0, 41e6)
    optimum = hypervolume(best, reference)
    assert baselines.count_plans(bits, range(8)) == 17**3
    for seed in range(3):
        state = evolve(evaluation.space, evaluation, Settings(population=24, generations=12), seed=seed)
        chance = baselines.random_search(evaluation.space, evaluation, state.evaluated, np.random.default_rng(seed))
        found = hypervolume(state.archive.points, reference)
        assert hypervolume(chance.points, reference) < found <= optimum + 1e-6
        assert found > 0.99 * optimum
    with pytest.raises(OptionError, match="too many to enumerate"):
        baselines.exhaustive(bits, "macs", range(8), limit=10)


def test_baselines() -> None:
    evaluation = fresh()
    state = start(evaluation.space, evaluation, SMALL, 0)
    scorer = Scorer({"select": DATA}, synthetic.costs(WHERE))
    candidate = next(evaluation.candidate(one) for one in state.archive if len(evaluation.candidate(one).exits) > 1)
    scored = scorer.exact(candidate, "select")
    best = baselines.oracle(scorer, candidate, "select")
    lot = baselines.random_exit(scorer, candidate, "select")
    assert best.accuracy >= scored.accuracy >= lot.accuracy
    assert lot.cost == scored.cost
    heads = [*(DATA.of(*pair) for pair in candidate.pairs), DATA.final]
    right = np.array([scores.argmax(axis=1) == DATA.labels for scores in heads])
    taken = [int(np.flatnonzero(column)[0]) if column.any() else len(heads) - 1 for column in right.T]
    paid = np.array(scorer.costs["macs"].path(candidate.pairs))
    assert best.cost["macs"] == pytest.approx(paid[taken].mean())


def test_hypervolume_and_non_domination_by_hand() -> None:
    points = np.array([[0.5, 1.0], [0.25, 2.0], [0.25, 2.0], [0.6, 1.5], [0.1, 5.0], [0.2, 9.0]])
    assert non_dominated(points).tolist() == [0, 1, 4]
    assert hypervolume(points, (1.0, 4.0)) == 0.5 * 1 + 0.75 * 2
    assert hypervolume(points, (0.05, 4.0)) == hypervolume(np.empty((0, 2)), (1.0, 1.0)) == 0.0
    rng = np.random.default_rng(0)
    cloud = rng.integers(0, 8, (200, 2)) / 8.0
    brute = {tuple(p) for p in cloud if not any((q <= p).all() and (q < p).any() for q in cloud)}
    assert {tuple(p) for p in cloud[non_dominated(cloud)]} == brute
    archive = Archive()
    for error, cost in cloud:
        one = Individual({}, "")
        one.fitness.values = (float(error), float(cost))
        archive.offer([one])
    assert {tuple(p) for p in archive.points} == brute
    assert len(archive) == len(brute)
    grid = (np.stack(np.meshgrid(np.arange(8), np.arange(8)), -1).reshape(-1, 2) + 0.5) / 8
    covered = [(cloud <= cell).all(axis=1).any() for cell in grid]
    assert hypervolume(cloud, (1.0, 1.0)) == pytest.approx(np.mean(covered))
