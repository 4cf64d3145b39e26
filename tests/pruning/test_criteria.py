"""Criteria against their formulas, written out once more, and against what really happens to the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from eexform.backends import ort
from eexform.errors import EexformError, OptionError
from eexform.ir.graph import Graph
from eexform.ir.groups import Group
from eexform.pruning import criteria
from eexform.pruning.criteria import Criterion, constants, listing, parse, score
from eexform.pruning.criteria_data import TRAINED, Gradients
from tests.pruning.helpers import Samples, made_by, normed, samples_for, with_arrays

NAMES = ("activation", "bn_scale", "geometric_median", "l1", "l2", "random", "taylor")


def scores_of(text: str, graph: Graph, **given: object) -> dict[str, np.ndarray]:
    groups = {weight: made_by(graph, weight) for weight in ("w1", "w2")}
    found = score(parse(text), graph, list(groups.values()), samples_for(graph, **given))[0]  # type: ignore[arg-type]
    return {weight: found[group.name] for weight, group in groups.items() if group.name in found}


def only(found: Mapping[str, np.ndarray]) -> np.ndarray:
    (array,) = found.values()
    return array


def relative(array: np.ndarray) -> np.ndarray:
    return array / array.mean()


def test_groups_of_the_net_are_as_described() -> None:
    graph = normed()
    assert {group.name: group.size for group in graph.groups.prunable} == {
        made_by(graph, weight).name: size for weight, size in (("w1", 6), ("w2", 8))
    }


def test_every_criterion_is_listed_with_what_it_needs() -> None:
    entries = {entry["name"]: entry for entry in listing()}
    assert set(NAMES) <= set(entries)
    assert all(entry["error"] is None and entry["summary"] for entry in entries.values())
    assert [name for name in NAMES if entries[name]["needs"]] == ["activation", "taylor"]


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_finite_numbers_per_unit_and_the_same_every_time(name: str) -> None:
    graph = normed()
    text = "bn_scale:fallback=l2" if name == "bn_scale" else name
    first, again = scores_of(text, graph), scores_of(text, graph)
    assert {group: array.shape for group, array in first.items()} == {"w1": (6,), "w2": (8,)}
    for group, array in first.items():
        assert array.dtype == np.float64
        np.testing.assert_array_equal(array, again[group])


@pytest.mark.parametrize(("name", "power"), [("l1", 1), ("l2", 2)])
def test_magnitude_adds_what_computes_scales_and_reads_a_unit(name: str, power: int) -> None:
    graph = normed()
    arrays = {key: values.astype(np.float64) for key, values in graph.parameters().items()}

    def norm(values: np.ndarray) -> np.ndarray:  # of the first axis
        return (np.abs(values).reshape(len(values), -1) ** power).sum(axis=1) ** (1 / power)

    filters, readers, scale = norm(arrays["w1"]), norm(arrays["w2"].swapaxes(0, 1)), norm(arrays["scale1"])
    found = scores_of(name, graph)["w1"]
    np.testing.assert_allclose(found, (relative(filters) + relative(readers) + relative(scale)) / 3)
    np.testing.assert_allclose(scores_of(f"{name}:balance=false", graph)["w1"], filters + readers + scale)
    np.testing.assert_allclose(scores_of(f"{name}:parts=filters", graph)["w1"], relative(filters))
    np.testing.assert_allclose(scores_of(f"{name}:parts=readers,balance=false", graph)["w1"], readers)


def test_geometric_median_sums_distances() -> None:
    graph = normed()
    filters = graph.parameters()["w1"].reshape(6, -1).astype(np.float64)
    distances = np.array([sum(np.linalg.norm(one - other) for other in filters) for one in filters])
    np.testing.assert_allclose(scores_of("geometric_median", graph)["w1"], relative(distances))


def test_geometric_median_finds_the_filter_in_the_middle() -> None:
    graph = normed()
    weights = graph.parameters()["w1"].copy()
    weights[3] = np.delete(weights, 3, axis=0).mean(axis=0)
    found = scores_of("geometric_median", with_arrays(graph, {"w1": weights}))["w1"]
    assert int(found.argmin()) == 3


def test_bn_scale_reads_normalisations_and_says_where_there_are_none() -> None:
    graph = normed()
    found = scores_of("bn_scale", graph)
    np.testing.assert_allclose(found["w1"], relative(np.abs(graph.parameters()["scale1"])), rtol=1e-6)
    assert list(found) == ["w1"]
    bare = made_by(graph, "w2")
    reasons = score(parse("bn_scale"), graph, [bare])[1]
    assert "no normalisation" in reasons[bare.name]
    np.testing.assert_array_equal(scores_of("bn_scale:fallback=l1", graph)["w2"], scores_of("l1", graph)["w2"])


def test_random_does_not_depend_on_which_groups_are_asked_for() -> None:
    graph = normed()
    alone = only(score(parse("random"), graph, [made_by(graph, "w2")])[0])
    np.testing.assert_array_equal(alone, scores_of("random", graph)["w2"])
    assert not np.array_equal(alone, scores_of("random:seed=1", graph)["w2"])


def test_activation_weighs_readers_by_what_they_read() -> None:
    graph = normed()
    samples = samples_for(graph)
    found = scores_of("activation:batch=5", graph)["w1"]
    values = ort.run(ort.session(ort.tap(graph, ["r1"])), samples.feeds)["r1"].astype(np.float64)
    sizes = np.sqrt((values**2).mean(axis=(0, 2, 3)))
    readers = np.linalg.norm(graph.parameters()["w2"].swapaxes(0, 1).reshape(6, -1).astype(np.float64), axis=1)
    np.testing.assert_allclose(found, relative(readers * sizes), rtol=1e-5)


def test_activation_looks_at_no_more_samples_than_it_is_told() -> None:
    graph = normed()
    groups = [made_by(graph, "w1")]
    some = only(score(parse("activation:samples=7,batch=3"), graph, groups, samples_for(graph))[0])
    cut = samples_for(graph)
    seven = type(cut)({name: array[:7] for name, array in cut.feeds.items()})
    np.testing.assert_allclose(some, only(score(parse("activation"), graph, groups, seven)[0]), rtol=1e-6)


@pytest.mark.parametrize("name", ["l1", "l2", "activation", "taylor", "taylor:labels=given"])
def test_a_unit_that_nothing_makes_or_reads_counts_least(name: str) -> None:
    graph = normed()
    arrays = {key: graph.parameters()[key].copy() for key in ("w1", "w2", "scale1", "b1")}
    for key in ("w1", "scale1", "b1"):
        arrays[key][4] = 0
    arrays["w2"][:, 4] = 0
    found = scores_of(name, with_arrays(graph, arrays), labelled=True)["w1"]
    assert int(found.argmin()) == 4
    assert found[4] == pytest.approx(0, abs=1e-12)
    assert (np.delete(found, 4) > 0).all()


# -- Taylor: what it predicts must happen ------------------------------------------------------------------------------


def mild() -> Graph:
    """The network with less sure answers."""
    graph = normed()
    return with_arrays(graph, {"w4": graph.parameters()["w4"] * 0.1})


def changes(graph: Graph, groups: Sequence[Group], samples: Samples) -> dict[str, np.ndarray]:
    return Gradients(graph, groups).changes(samples.feeds, samples.labels, np.random.default_rng(0))


def scaled(graph: Graph, group: str, unit: int, factor: float) -> Graph:
    """The graph with all trained numbers of a unit times ``factor``."""
    arrays: dict[str, np.ndarray] = {}
    for member in constants(made_by(graph, group), TRAINED):
        name, axis = member.slot.value, member.slot.axis
        values = arrays.setdefault(name, graph.parameters()[name].astype(np.float64))
        np.moveaxis(values, axis, 0)[member.units[unit]] *= factor
    return with_arrays(graph, arrays)


def log_probabilities(graph: Graph, feeds: object) -> np.ndarray:
    scores = ort.run(ort.session(graph), feeds)[graph.final].astype(np.float64)  # type: ignore[arg-type]
    scores -= scores.max(axis=1, keepdims=True)
    found: np.ndarray = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return found


@pytest.mark.parametrize("group", ["w1", "w2"])
def test_taylor_predicts_the_change_of_the_loss(group: str) -> None:
    graph = mild()
    samples = samples_for(graph, labelled=True)
    assert samples.labels is not None
    rows = np.arange(samples.size)
    change = only(changes(graph, [made_by(graph, group)], samples))
    step = 1e-3
    for unit in range(made_by(graph, group).size):
        up, down = (
            -log_probabilities(scaled(graph, group, unit, factor), samples.feeds)[rows, samples.labels].mean()
            for factor in (1 + step, 1 - step)
        )
        assert (up - down) / (2 * step) == pytest.approx(change[unit], rel=0.03, abs=4e-3)


def test_taylor_with_labels_is_the_squared_change() -> None:
    graph = normed()
    samples = samples_for(graph, labelled=True)
    change = only(changes(graph, [made_by(graph, "w1")], samples))
    found = only(score(parse("taylor:batch=16"), graph, [made_by(graph, "w1")], samples)[0])
    np.testing.assert_allclose(found, 16 * change**2, rtol=1e-5)


def test_taylor_without_labels_predicts_how_far_the_answers_move() -> None:
    graph = mild()
    samples = samples_for(graph, 64)
    groups = [made_by(graph, "w1")]
    found = only(score(parse("taylor:batch=16,draws=60"), graph, groups, samples)[0])
    step = 0.02
    before = log_probabilities(graph, samples.feeds)
    moved = []
    for unit in range(6):
        sides = [log_probabilities(scaled(graph, "w1", unit, 1 + sign * step), samples.feeds) for sign in (1, -1)]
        moved.append(np.mean([(np.exp(before) * (before - after)).sum(axis=1).mean() for after in sides]) * 2 / step**2)
    # 240 estimates, each with the spread of a squared normal number: the standard error is sqrt(2 / 240), 9 %
    np.testing.assert_allclose(found, moved, rtol=0.35)
    assert np.corrcoef(found, moved)[0, 1] > 0.95


def test_taylor_prefers_labels_and_can_be_told_not_to() -> None:
    graph = normed()
    groups = [made_by(graph, "w1")]
    labelled, bare = samples_for(graph, labelled=True), samples_for(graph)
    given = only(score(parse("taylor:labels=given"), graph, groups, labelled)[0])
    np.testing.assert_array_equal(only(score(parse("taylor"), graph, groups, labelled)[0]), given)
    drawn = only(score(parse("taylor:labels=none"), graph, groups, labelled)[0])
    np.testing.assert_array_equal(only(score(parse("taylor"), graph, groups, bare)[0]), drawn)
    assert not np.allclose(given, drawn)
    with pytest.raises(OptionError, match="needs labels"):
        score(parse("taylor:labels=given"), graph, groups, bare)


def test_taylor_leaves_the_graph_alone() -> None:
    graph = normed()
    digest = graph.digest
    scores_of("taylor", graph)
    assert graph.replace().digest == digest


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["l2:parts=all", "random:seed=-1", "taylor:labels=mine", "taylor:batch=0", "l2:x=1"])
def test_wrong_settings_are_refused(text: str) -> None:
    with pytest.raises(OptionError):
        parse(text)


def test_unknown_criterion_is_refused_with_a_suggestion() -> None:
    with pytest.raises(OptionError, match="taylor"):
        parse("tailor")


def test_missing_samples_are_named() -> None:
    graph = normed()
    with pytest.raises(OptionError, match="'activation' needs samples"):
        score(parse("activation"), graph, graph.groups.groups[:1])


@dataclass(frozen=True)
class _Broken(Criterion):
    name: ClassVar[str] = "broken"
    value: float = 0.0
    short: bool = False

    def scores(self, graph, groups, samples):  # type: ignore[no-untyped-def]
        return {group.name: np.full(group.size - self.short, self.value) for group in groups}


@pytest.mark.parametrize("broken", [_Broken(value=float("nan")), _Broken(short=True)])
def test_what_a_plug_in_gives_is_checked(broken: Criterion) -> None:
    graph = normed()
    with pytest.raises(EexformError, match="expected 6 finite numbers"):
        criteria.score(broken, graph, [made_by(graph, "w1")])
