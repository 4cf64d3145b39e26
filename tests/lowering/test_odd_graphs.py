"""Graphs and inputs at the edge of what lowering takes: it agrees with the simulator there, or says what is wrong."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import onnx
import pytest

from eexform.backends import ort
from eexform.backends.export import export
from eexform.backends.lower_if import lower_if
from eexform.backends.lower_multi import lower_multi
from eexform.backends.lower_stages import lower_stages, save_stages
from eexform.errors import DataError, GraphError, ModelError, RunError
from eexform.frontends.onnx import from_model
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.passes import PassContext
from eexform.passes.insert_exits import InsertExits
from eexform.runtime import StagedSession
from eexform.verification.simulate import samples_in, simulate
from eexform.verification.verify import verify
from tests.graphs import random_classifier
from tests.lowering import nets
from tests.text import model, normal

MLP = """h = MatMul(x, w1) a = Relu(h) h2 = MatMul(a, w2) b = Tanh(h2)
         h3 = MatMul(b, w2) c = Tanh(h3) y = Gemm(c, w3)"""


def weights(dtype: type = np.float32) -> dict[str, np.ndarray]:
    arrays = {"w1": normal(4, 8), "w2": normal(8, 8, seed=1), "w3": normal(8, 3, seed=2)}
    return {name: array.astype(dtype) for name, array in arrays.items()}


def with_exits(source: onnx.ModelProto, **options: float) -> tuple[Graph, Graph]:
    """The trunk, and the trunk with an exit at each of its sites."""
    trunk = from_model(source, min_opset=13)
    return trunk, nets.attach(trunk, find_sites(trunk, max_live=20).sites, **options)


def renamed(old: str, new: str) -> onnx.ModelProto:
    """The small network with one of its values called otherwise."""
    made = model(MLP, weights())
    for node in made.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    for value in (*made.graph.input, *made.graph.output):
        value.name = new if value.name == old else value.name
    return made


def verified(trunk: Graph, graph: Graph, feeds: dict[str, np.ndarray], form: str, folder) -> None:
    simulated = simulate(graph, feeds)
    path = export(nets.set_thresholds(graph, nets.spread(simulated)), folder / form, form)
    verify(path, trunk, feeds).require()


@pytest.mark.parametrize("measure", ["max_prob", "margin", "entropy"])
@pytest.mark.parametrize("rows", [1, 9])
def test_a_confidence_that_is_not_a_number_never_leaves(measure, rows, tmp_path):
    _, graph = with_exits(model(MLP, weights()))
    exits = [replace(item, measure=measure, threshold=-np.inf) for item in graph.exits]
    graph = graph.replace(exits=exits)
    save_stages(graph, tmp_path / "stages")
    feeds = {"x": normal(rows, 4)}
    feeds["x"][rows // 2, 0] = np.nan
    expected = np.zeros(rows, np.int64)
    expected[rows // 2] = len(exits)
    for optimize in (True, False):
        found = ort.run(ort.session(lower_if(graph), optimize=optimize), feeds)
        np.testing.assert_array_equal(found["exit_index"], expected)
        staged = StagedSession(tmp_path / "stages", optimize=optimize).run(feeds)
        np.testing.assert_array_equal(staged.exit_index, expected)
        for confidence in (found["confidence"], staged.confidence):
            np.testing.assert_array_equal(np.isnan(confidence), expected > 0)


@pytest.mark.parametrize("form", ["if", "stages", "multi"])
@pytest.mark.parametrize("opset", [13, 15, 16, 18, 21, 23])
def test_operator_sets(opset, form, tmp_path):
    """A trunk that cannot be lifted (custom operators, branches) keeps its operator set; the forms must do with it."""
    trunk, graph = with_exits(random_classifier(4, opset=opset, blocks=3))
    assert trunk.opset == opset
    verified(trunk, graph, {"image": normal(20, 3, 8, 8)}, form, tmp_path)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            lambda: model(MLP, weights(np.float16), inputs="float16[N,4] x", outputs="float16[N,3] y"),
            "'a' holds float16",
        ),
        (lambda: model(MLP, weights(np.float64), inputs="double[N,4] x", outputs="double[N,3] y"), "'a' holds float64"),
        (
            lambda: model(MLP.replace("y =", "z =") + " y = Cast<to=11>(z)", weights(), outputs="double[N,3] y"),
            "'y' holds float64",
        ),
    ],
)
def test_numbers_that_heads_cannot_read(source, says):
    trunk = from_model(source())
    assert not find_sites(trunk).sites
    step = InsertExits(("a",), {"a": "none/avg"}, {"a": 0.5}, untrained=True)
    with pytest.raises(GraphError, match=says + r" numbers; heads are float32: convert the model"):
        step.requires(trunk)


def test_names_that_lowering_needs_itself():
    for taken, lower in (
        ("confidence", lower_if), ("exit_index", lower_if), ("confidence", lower_stages), ("exit0", lower_multi),
    ):  # fmt: skip
        with pytest.raises(GraphError, match=f"output is called '{taken}' like an output that lowering adds; rename"):
            lower(with_exits(renamed("y", taken))[1])
    with pytest.raises(GraphError, match="'thresholds' has a name that the lowered model needs itself; rename it"):
        lower_if(with_exits(renamed("x", "thresholds"))[1])


@pytest.mark.parametrize("name", ["exit0.classifier_out", "rows1.a", "verify0.a", "/a b\u00e9\u6f22'\"", "../a"])
def test_strange_names(name, tmp_path):
    trunk, graph = with_exits(renamed("a", name))
    for form in ("if", "stages", "multi"):
        verified(trunk, graph, {"x": normal(20, 4) * 2}, form, tmp_path)


@pytest.mark.parametrize("name", ["confidence", "exit_index", "thresholds", "exit0"])
def test_a_parameter_with_the_name_of_an_output(name, tmp_path):
    made = model(MLP.replace("w2", name), {name if key == "w2" else key: value for key, value in weights().items()})
    trunk, graph = with_exits(made)
    for form in ("if", "stages", "multi"):
        verified(trunk, graph, {"x": normal(20, 4) * 2}, form, tmp_path)
    export(graph, tmp_path / "open", thresholds_as_input=True)
    verify(tmp_path / "open", trunk, {"x": normal(20, 4)}).require()


def test_stages_hand_on_what_a_branch_of_the_trunk_uses(tmp_path):
    branches = """n = ReduceSum<keepdims=0>(one) k = Greater(n, zero) c0 = If(k) <
        then_branch = yes () => (float[N,8] t) { s = Mul(a, w2row) t = MatMul(s, w2) },
        else_branch = no () => (float[N,8] e) { e = Tanh(h3) }> c = Tanh(c0)"""
    more = {"one": np.ones(3, np.float32), "zero": np.zeros((), np.float32), "w2row": normal(8)}
    trunk, graph = with_exits(model(MLP.replace("c = Tanh(h3)", branches), {**weights(), **more}))
    assert len(graph.exits) > 1
    verified(trunk, graph, {"x": normal(20, 4)}, "stages", tmp_path)
    with pytest.raises(GraphError, match="inside its own branch; that cannot be re-rooted"):
        lower_if(graph)


def test_no_samples(tmp_path):
    _, graph = with_exits(random_classifier(4, blocks=3))
    save_stages(graph, tmp_path / "stages")
    session = StagedSession(tmp_path / "stages")
    feeds = {"image": np.zeros((0, 3, 8, 8), np.float32)}
    found = session.run(feeds)
    assert (found.scores.shape, found.exit_index.shape, found.confidence.shape) == ((0, 5), (0,), (0,))
    assert session.runs == [1] + [0] * len(graph.exits), "nothing is left to run the rest on"
    lowered = ort.run(ort.session(lower_if(graph)), feeds)
    assert [value.shape for value in lowered.values()] == [(0, 5), (0,), (0,)]
    with pytest.raises(ModelError, match="no batch axis"):
        session.run({"image": np.float32(0)})
    with pytest.raises(DataError, match="without a batch axis"):
        samples_in(graph, {"image": np.float32(0)})


def test_a_masked_class_is_no_difference(tmp_path):
    masked = model(MLP.replace("y =", "z =") + " y = Add(z, mask)", {**weights(), "mask": np.float32([0, 0, -np.inf])})
    trunk, graph = with_exits(masked)
    verified(trunk, graph, {"x": normal(20, 4)}, "if", tmp_path)


@pytest.mark.parametrize("scores", ["logits", "probabilities"])
def test_carry_is_known_without_a_recipe(scores, tmp_path):
    body = MLP if scores == "logits" else MLP.replace("y =", "z =") + " y = Softmax<axis=1>(z)"
    trunk = from_model(model(body, weights()))
    chosen = [site.value for site in find_sites(trunk).sites]
    step = InsertExits(
        tuple(chosen), dict.fromkeys(chosen, "none/avg"), dict.fromkeys(chosen, 0.5),
        carry=0.5, final_temperature=2.0, untrained=True,
    )  # fmt: skip
    verified(trunk, step.run(trunk, PassContext()).graph, {"x": normal(20, 4)}, "if", tmp_path)


def test_a_stage_through_a_link_is_refused(tmp_path):
    save_stages(with_exits(model(MLP, weights()))[1], tmp_path / "stages")
    (tmp_path / "stages" / "stage1.onnx").rename(tmp_path / "elsewhere.onnx")
    os.symlink(tmp_path / "elsewhere.onnx", tmp_path / "stages" / "stage1.onnx")
    with pytest.raises(RunError, match="outside the folder"):
        StagedSession(tmp_path / "stages")


@pytest.mark.parametrize(
    "damage",
    [
        {"inputs": 3},
        {"inputs": []},
        {"inputs": [{"name": "x"}]},
        {"inputs": [{"name": "x", "batch_axis": None}]},
        {"inputs": [{"name": "x", "batch_axis": "first"}]},
        {"stages": 7},
        {"num_classes": "three"},
    ],
)
def test_a_damaged_manifest(damage, tmp_path):
    save_stages(with_exits(model(MLP, weights()))[1], tmp_path / "stages")
    manifest = tmp_path / "stages" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **damage}))
    with pytest.raises(RunError, match=r"manifest\.json: .*damaged"):
        StagedSession(tmp_path / "stages")
