"""Stored parameters: put in place by name, refused where they do not fit, kept in a plan's file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eexform.errors import OptionError, PassError, RunError
from eexform.ir.digest import digest_arrays
from eexform.ir.graph import Graph
from eexform.passes import Pass, PassContext, PassResult, Pipeline, PlanStore, Recipe, Step, make
from eexform.passes.set_parameters import SetParameters
from tests.passes.helpers import CHAIN, assert_same_outputs, feeds_of, graph_of, run
from tests.passes.test_insert_exits import insert, store_of

ARRAYS = {"w1": np.full((3, 2, 3, 3), 0.25, np.float32), "b4": np.arange(4, dtype=np.float32)}


def test_arrays_take_their_places() -> None:
    graph = graph_of(CHAIN)
    step, arrays = SetParameters.of(ARRAYS)
    result = step(graph, PassContext(arrays=arrays))
    assert result.changed
    found = result.graph.parameters()
    assert all(np.array_equal(found[name], values) for name, values in ARRAYS.items())
    assert np.array_equal(found["w2"], graph.parameters()["w2"])
    again = step(result.graph, PassContext(arrays=arrays))
    assert not again.changed
    assert again.graph is result.graph
    assert again.skipped[0].why == "it holds these parameters already"


def test_a_bias_where_there_was_none() -> None:
    graph = graph_of(CHAIN)
    bias = np.array([1.0, 2.0, 3.0], np.float32)
    step, arrays = SetParameters.of({"c1.bias": bias}, {"conv1": "c1.bias"})
    result = step(graph, PassContext(arrays=arrays))
    from eexform.backends import ort

    feeds = feeds_of(graph)
    before, after = (ort.run(ort.session(ort.tap(which, ["c1"])), feeds)["c1"] for which in (graph, result.graph))
    np.testing.assert_allclose(after, before + bias[None, :, None, None], rtol=1e-5, atol=1e-5)
    assert not step(result.graph, PassContext(arrays=arrays)).changed


@pytest.mark.parametrize(
    ("arrays", "biases", "message"),
    [
        ({"w9": np.zeros(3, np.float32)}, {}, r"no parameter 'w9'"),
        ({"b4": np.zeros(5, np.float32)}, {}, r"'b4' is float32 \[4\], what is stored for it is float32 \[5\]"),
        ({"b4": np.zeros(4, np.float64)}, {}, r"stored for it is float64"),
        ({"x": np.zeros(4, np.float32)}, {"fc": "x"}, r"Gemm 'fc' has a bias already: 'b4'"),
        ({"x": np.zeros(4, np.float32)}, {"relu1": "x"}, r"Relu 'relu1' takes no bias"),
        ({"x": np.zeros(4, np.float32)}, {"conv9": "x"}, r"no node 'conv9'"),
        ({"c2": np.zeros(3, np.float32)}, {"conv1": "c2"}, r"another value of that name"),
        ({"x": np.zeros(3, np.float32)}, {"conv1": "y"}, r"'y' of 'conv1' is not among"),
    ],
)
def test_what_does_not_fit_is_refused(arrays: dict[str, np.ndarray], biases: dict[str, str], message: str) -> None:
    step, stored = SetParameters.of(arrays, biases)
    with pytest.raises(PassError, match=message):
        step(graph_of(CHAIN), PassContext(arrays=stored))


def test_missing_set_and_bad_digest() -> None:
    step, _ = SetParameters.of(ARRAYS)
    with pytest.raises(PassError, match=r"are not stored here: name the plan's weights"):
        step(graph_of(CHAIN), PassContext())
    with pytest.raises(OptionError, match="is not a sha-256 in hex"):
        make("set_parameters", digest="abc")


def test_sets_in_a_plans_file(tmp_path: Path) -> None:
    step, arrays = SetParameters.of(ARRAYS)
    path = tmp_path / "plan.safetensors"
    PlanStore("", {}, arrays).save(path)
    again = PlanStore.load(path)
    assert set(again.arrays) == {step.digest}
    assert digest_arrays(again.arrays[step.digest]) == step.digest
    recipe = Recipe.of([step], path.name)
    recipe.save(tmp_path / "plan.toml")
    loaded = Recipe.load(tmp_path / "plan.toml")
    assert loaded.passes() == [step]
    store = loaded.store()
    assert store is not None
    assert loaded.pipeline()(graph_of(CHAIN), PassContext(arrays=store.arrays)).changed
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RunError, match=r"stored parameters .* do not match their digest"):
        PlanStore.load(path)


def test_heads_and_sets_in_one_file_and_old_files(tmp_path: Path) -> None:
    """A file without sets is written as it always was."""
    graph = graph_of(CHAIN)
    _, arrays = SetParameters.of(ARRAYS)
    store = store_of(graph)
    store.save(tmp_path / "old.safetensors")
    assert b'\\"format\\": 1' in (tmp_path / "old.safetensors").read_bytes()
    assert PlanStore.load(tmp_path / "old.safetensors").arrays == {}
    store.with_arrays(arrays).save(tmp_path / "both.safetensors")
    both = PlanStore.load(tmp_path / "both.safetensors")
    assert both.sites(graph.digest) == store.sites(graph.digest)
    assert set(both.arrays) == set(arrays)
    with pytest.raises(OptionError, match="hold no heads, one is wanted at 'r1'"):
        PlanStore(arrays=arrays).trained(graph.digest, "r1", "none/avg")
    assert PlanStore().empty
    assert not both.empty


class _Settles(Pass):
    """Stands for a pass that looks at data: says which graph it was given as reference."""

    name = "settles"

    def __init__(self) -> None:
        self.seen: list[Graph | None] = []

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        self.seen.append(context.reference)
        step, arrays = SetParameters.of(ARRAYS)
        done = step(graph, PassContext(arrays=arrays))
        return PassResult(done.graph, done.changed, replay=(step,), arrays=arrays)


def test_a_pipeline_settles_its_steps() -> None:
    graph = graph_of(CHAIN)
    settles = _Settles()
    whole = Pipeline([make("remove_dead"), Pipeline([settles, insert()])])
    context = PassContext(heads=None)
    with pytest.raises(PassError, match="no trained heads"):
        whole(graph, context)
    assert settles.seen == [graph]
    inner = Pipeline([make("remove_dead"), Pipeline([settles])])
    result = inner(graph, context)
    assert result.replay is not None
    assert [step.name for step in result.replay] == ["remove_dead", "set_parameters"]
    again = Pipeline(result.replay)(graph, PassContext(arrays=result.arrays))
    assert again.graph.digest == result.graph.digest
    other = graph_of(CHAIN, seed=3)
    inner(graph, PassContext(reference=other))
    assert settles.seen[-1] is other


def test_without_data_a_step_stands_for_itself() -> None:
    result = Recipe((Step("remove_dead"), Step("simplify"))).pipeline()(graph_of(CHAIN))
    assert [step.name for step in result.replay or ()] == ["remove_dead", "simplify"]
    assert result.arrays == {}
    assert_same_outputs(graph_of(CHAIN), result.graph)
    assert run(result.graph)
