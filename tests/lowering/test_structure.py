"""What a lowered file looks like: weights in their branch, nothing of the batch captured, names, metadata, errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import helper, numpy_helper

import eexform
from eexform.backends import metadata, ort
from eexform.backends.export import export
from eexform.backends.lower_if import MAX_EXITS, lower_if
from eexform.backends.lower_multi import lower_multi
from eexform.backends.lower_stages import lower_stages, save_stages
from eexform.backends.protos import subgraphs
from eexform.errors import GraphError, ModelError, OptionError, RunError
from eexform.ir.exits import Exit
from eexform.ir.graph import Graph
from eexform.ir.policy import Decisions
from eexform.runtime import StagedSession
from eexform.verification.simulate import simulate
from eexform.verification.verify import compare
from tests.lowering import nets


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_weights_live_in_the_branch_that_uses_them(name):
    graph = nets.with_exits(name, 2)
    model = lower_if(graph)
    for part in subgraphs(model.graph):
        own = {tensor.name for tensor in part.initializer}
        used = {value for node in part.node for value in node.input}
        assert own <= used, "an initialiser is not used by the graph that holds it"
    where = {tensor.name: part.name for part in subgraphs(model.graph) for tensor in part.initializer}
    blocks = {parameter for parameter in graph.parameters() if where.get(parameter, "").startswith("go_on")}
    assert len(blocks) > 5
    assert set(graph.parameters()) <= set(where), "parameters keep their names"


def test_inner_names_never_repeat_outer_ones():
    model = lower_if(nets.with_exits("swin", 3))
    seen: set[str] = set()
    nodes: set[str] = set()
    for part in subgraphs(model.graph):
        made = {value for node in part.node for value in node.output if value} | {t.name for t in part.initializer}
        assert not made & seen
        seen |= made
        names = {node.name for node in part.node}
        assert len(names) == len(part.node)
        assert not names & nodes
        nodes |= names


def test_a_branch_never_reads_a_shape_of_the_outer_batch():
    """Inside a branch no value computed from an outer batch size is used, directly or through Shape."""
    graph = nets.with_exits("vit", 3)
    model = lower_if(graph)
    branch = next(part for part in subgraphs(model.graph) if part.name == "go_on_from_exit0")
    inside = {value for node in branch.node for value in node.output} | {t.name for t in branch.initializer}
    captured = {value for node in branch.node for value in node.input if value} - inside
    for value in captured:
        kind = graph.types.get(value)
        if kind is not None and kind.batch_dependent:
            uses = {node.op_type for node in branch.node if value in node.input}
            assert uses <= {"Compress", "ScatterND"}, (value, uses)


def test_if_outputs_and_types():
    graph = nets.with_exits("resnet", 2)
    model = lower_if(graph)
    assert [value.name for value in model.graph.output] == ["logits", "exit_index", "confidence"]
    kinds = [value.type.tensor_type.elem_type for value in model.graph.output]
    assert kinds == [onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.FLOAT]
    for part in subgraphs(model.graph):
        for value in part.output:
            assert value.type.tensor_type.HasField("shape"), "branches state the rank of their results"


@pytest.mark.parametrize("form", ["if", "multi", "stages"])
def test_metadata(form, tmp_path):
    graph = nets.with_exits("resnet", 2)
    graph = graph.replace(
        metadata={**graph.metadata, metadata.PLAN: json.dumps({"recipe": {"pass": []}}), "note": "kept"}
    )
    export(graph, tmp_path / "out", form)
    files = sorted((tmp_path / "out").glob("*.onnx")) if form == "stages" else [tmp_path / "out"]
    for file in files:
        model = onnx.load(file)
        onnx.checker.check_model(model, full_check=True)
        assert (model.producer_name, model.producer_version) == ("eexform", eexform.__version__)
        found = metadata.read(model)
        assert (found.form, found.scores, found.num_classes) == (form, "logits", 5)
        assert found.exits == graph.exits
        assert found.trunk_digest == nets.trunk("resnet").digest
        assert found.plan == {"recipe": {"pass": []}}
        assert {entry.key: entry.value for entry in model.metadata_props}["note"] == "kept"
        assert str(tmp_path).encode() not in file.read_bytes()


def test_metadata_errors():
    good = metadata.build(nets.with_exits("resnet", 2), "if")
    with pytest.raises(ModelError, match="not exported by eexform"):
        metadata.parse({})
    with pytest.raises(RunError, match="written by eexform 99"):
        metadata.parse({**good, metadata.VERSION: "99.0.0"})
    with pytest.raises(ModelError, match="no version"):
        metadata.parse({**good, metadata.VERSION: "new"})
    with pytest.raises(ModelError, match="form 'loop'"):
        metadata.parse({**good, metadata.FORM: "loop"})
    for damaged in ("{", "[]", "{}", '{"exits": [{}], "scores": "logits", "num_classes": 5}'):
        with pytest.raises(ModelError, match=r"damaged|hold"):
            metadata.parse({**good, metadata.PLAN: damaged})


def test_never_and_always_survive_the_file():
    graph = nets.set_thresholds(nets.with_exits("resnet", 2), [np.inf, -np.inf])
    found = metadata.read(lower_if(graph))
    assert [item.threshold for item in found.exits] == [np.inf, -np.inf]


def test_forms_refuse_what_they_cannot_do(tmp_path):
    trunk = nets.trunk("resnet")
    for lower in (lower_if, lower_multi, lower_stages):
        with pytest.raises(GraphError, match="no exits"):
            lower(trunk)
    graph = nets.with_exits("resnet", 1)
    crowded = graph.replace(exits=graph.exits * (MAX_EXITS + 1))
    with pytest.raises(GraphError, match=f"at most {MAX_EXITS}"):
        lower_if(crowded)
    with pytest.raises(OptionError, match="did you mean 'stages'"):
        export(graph, tmp_path / "x", "stage")
    with pytest.raises(OptionError, match="form 'if' only"):
        export(graph, tmp_path / "x", "multi", thresholds_as_input=True)
    assert not list(tmp_path.iterdir())


def test_the_deepest_nesting_can_be_read_and_run():
    node = helper.make_node
    count = MAX_EXITS
    nodes = [node("MatMul", [f"e{i - 1}" if i else "x", "w"], [f"e{i}"], f"e{i}") for i in range(count)]
    nodes.append(node("MatMul", [f"e{count - 1}", "w"], ["logits"], "last"))
    model = hand_made(nodes, {"w": np.eye(4, dtype=np.float32)}, [floats("x", "N", 4)])
    graph = exits_on(model, [f"e{i}" for i in range(count)])
    deep = onnx.load_from_string(lower_if(nets.set_thresholds(graph, [np.inf] * count)).SerializeToString())
    feeds = {"x": np.arange(12, dtype=np.float32).reshape(3, 4)}
    found = ort.run(ort.session(deep), feeds)
    assert found["exit_index"].tolist() == [count] * 3
    np.testing.assert_array_equal(found["logits"], feeds["x"])


def exits_on(model: onnx.ModelProto, values: list[str], scores: str = "logits") -> Graph:
    """A hand-made graph with exits whose scores are the given values."""
    draft = gs.import_onnx(model)
    tensors = draft.tensors()
    draft.outputs += [tensors[value] for value in values]
    exits = [Exit(value, "none/avg", value, threshold=0.5) for value in values]
    return Graph(draft, exits=exits, scores=scores)


def hand_made(nodes, weights, inputs, classes=4):
    outputs = [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["N", classes])]
    body = helper.make_graph(
        nodes, "hand", inputs, outputs, [numpy_helper.from_array(v, k) for k, v in weights.items()]
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def floats(name, *shape):
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)


def check_both_forms(graph, feeds, folder):
    expected = simulate(graph, feeds)
    thresholds = nets.spread(expected)
    graph, expected = nets.set_thresholds(graph, thresholds), expected.with_thresholds(thresholds)
    assert len(set(expected.decisions().exit_index.tolist())) > 1
    found = ort.run(ort.session(lower_if(graph)), feeds)
    scores = found[graph.final]
    ok, detail = compare(expected, Decisions(found["exit_index"], scores, found["confidence"]))
    assert ok, detail
    save_stages(graph, folder / "stages")
    result = StagedSession(folder / "stages").run(feeds)
    ok, detail = compare(expected, Decisions(result.exit_index, result.scores, result.confidence))
    assert ok, detail


RNG = np.random.default_rng(0)


def weight(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def test_a_shape_of_a_value_that_is_not_handed_on(tmp_path):
    """The rest reads the size of an early value (batch and a symbol) that no longer exists behind the exit."""
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w0"], ["h"], "h"),  # [N, seq, 6]
        node("Tanh", ["h"], ["early"], "early"),
        node("ReduceMean", ["early"], ["m"], "m", axes=[1], keepdims=0),
        node("MatMul", ["m", "we"], ["e0"], "e0"),
        node("MatMul", ["early", "w1"], ["late"], "late"),
        node("Shape", ["early"], ["s"], "s"),  # [N, seq, 6], of a value that is not live
        node("Gather", ["s", "i0"], ["n"], "n"),
        node("Gather", ["s", "i1"], ["t"], "t"),
        node("Unsqueeze", ["n", "ax"], ["n1"], "n1"),
        node("Unsqueeze", ["t", "ax"], ["t1"], "t1"),
        node("Concat", ["n1", "t1", "two", "three"], ["target"], "target", axis=0),
        node("Reshape", ["late", "target"], ["split"], "split"),  # [N, seq, 2, 3]
        node("ReduceMean", ["split"], ["r"], "r", axes=[1, 2], keepdims=0),
        node("MatMul", ["r", "wf"], ["logits"], "logits"),
    ]
    weights = {"w0": weight(5, 6), "we": weight(6, 4), "w1": weight(6, 6), "wf": weight(3, 4)} | {
        key: np.array(value, np.int64) for key, value in {"i0": 0, "i1": 1, "ax": [0], "two": [2], "three": [3]}.items()
    }
    model = hand_made(nodes, weights, [floats("x", "N", "seq", 5)])
    graph = exits_on(model, ["e0"])
    for length in (2, 5):
        check_both_forms(graph, {"x": RNG.normal(size=(9, length, 5)).astype(np.float32) * 3}, tmp_path / str(length))


def test_a_batch_that_is_not_the_first_axis(tmp_path):
    node = helper.make_node
    nodes = [
        node("Transpose", ["x"], ["time_first"], "tf", perm=[1, 0, 2]),  # [seq 3, N, 4]
        node("Tanh", ["time_first"], ["h"], "h"),
        node("ReduceMean", ["h"], ["e0"], "e0", axes=[0], keepdims=0),
        node("Mul", ["h", "scale"], ["h2"], "h2"),
        node("Sin", ["h2"], ["h3"], "h3"),
        node("ReduceMax", ["h3"], ["m"], "m", axes=[0], keepdims=0),
        node("MatMul", ["m", "w"], ["logits"], "logits"),
    ]
    model = hand_made(nodes, {"scale": weight(4), "w": weight(4, 4)}, [floats("x", "N", 3, 4)])
    graph = exits_on(model, ["e0"])
    assert graph.types["h"].batch_axis == 1
    check_both_forms(graph, {"x": RNG.normal(size=(9, 3, 4)).astype(np.float32) * 4}, tmp_path)


def test_a_constant_used_on_both_sides_of_an_exit(tmp_path):
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w"], ["h"], "h"),
        node("Add", ["h", "shared"], ["e0"], "e0"),
        node("MatMul", ["e0", "w"], ["g"], "g"),
        node("Add", ["g", "shared"], ["logits"], "logits"),
    ]
    model = hand_made(nodes, {"w": weight(4, 4), "shared": weight(4)}, [floats("x", "N", 4)])
    check_both_forms(exits_on(model, ["e0"]), {"x": RNG.normal(size=(9, 4)).astype(np.float32)}, tmp_path)


@pytest.mark.parametrize("taken", ["exit_index", "confidence"])
def test_names_of_our_outputs_that_the_trunk_uses_itself(taken):
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w"], ["e0"], "e0"),
        node("Tanh", ["e0"], [taken], "t"),
        node("MatMul", [taken, "w"], ["logits"], "logits"),
    ]
    graph = exits_on(hand_made(nodes, {"w": weight(4, 4)}, [floats("x", "N", 4)]), ["e0"])
    model = lower_if(graph)
    assert [value.name for value in model.graph.output] == ["logits", "exit_index", "confidence"]
    with pytest.raises(GraphError, match="a name that the lowered model needs itself"):
        lower_if(
            exits_on(
                hand_made(
                    [
                        helper.make_node("MatMul", [taken, "w"], ["e0"], "e0"),
                        helper.make_node("Tanh", ["e0"], ["logits"], "l"),
                    ],
                    {"w": weight(4, 4)},
                    [floats(taken, "N", 4)],
                ),
                ["e0"],
            )
        )


def test_probabilities_get_no_second_softmax():
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w"], ["h"], "h"),
        node("Softmax", ["h"], ["e0"], "e0", axis=1),
        node("MatMul", ["h", "w2"], ["g"], "g"),
        node("Softmax", ["g"], ["logits"], "logits", axis=1),
    ]
    model = hand_made(nodes, {"w": weight(4, 4), "w2": weight(4, 4)}, [floats("x", "N", 4)])
    graph = exits_on(model, ["e0"], scores="probabilities")
    lowered = lower_if(graph)
    assert sum(n.op_type == "Softmax" for part in subgraphs(lowered.graph) for n in part.node) == 2
    found = ort.run(ort.session(lowered), {"x": RNG.normal(size=(9, 4)).astype(np.float32)})
    np.testing.assert_allclose(found["confidence"], found["logits"].max(axis=1), rtol=1e-6)


def test_manifest_and_its_errors(tmp_path):
    graph = nets.with_exits("resnet", 2)
    folder = tmp_path / "stages"
    save_stages(graph, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["version"] == eexform.__version__
    assert [stage["file"] for stage in manifest["stages"]] == ["stage0.onnx", "stage1.onnx", "stage2.onnx"]
    assert manifest["stages"][-1]["threshold"] is None
    assert "/" not in "".join(stage["file"] for stage in manifest["stages"])
    session = StagedSession(folder)
    with pytest.raises(ModelError, match="inputs are \\['image'\\]"):
        session.run({"picture": np.zeros((1, 3, 16, 16), np.float32)})
    with pytest.raises(ModelError, match="2 exits, but 1 thresholds"):
        session.with_thresholds([0.5])

    def broken(change):
        other = json.loads(json.dumps(manifest))
        change(other)
        (folder / "manifest.json").write_text(json.dumps(other))

    broken(lambda m: m.update(format=99))
    with pytest.raises(RunError, match="newer eexform"):
        StagedSession(folder)
    broken(lambda m: m["stages"][0].pop("live"))
    with pytest.raises(RunError, match="damaged"):
        StagedSession(folder)
    broken(lambda m: m["stages"][0].update(file="../stage0.onnx"))
    with pytest.raises(RunError, match="outside the folder"):
        StagedSession(folder)
    broken(lambda m: None)
    (folder / "stage1.onnx").write_bytes(b"something else")
    with pytest.raises(ModelError, match="not the file that was exported"):
        StagedSession(folder)
    (folder / "stage1.onnx").unlink()
    with pytest.raises(ModelError, match="no such file"):
        StagedSession(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(RunError, match="JSON"):
        StagedSession(folder)
    with pytest.raises(ModelError, match=r"no manifest\.json"):
        StagedSession(tmp_path)


def test_the_source_graph_is_left_alone():
    graph = nets.with_exits("vit", 2)
    before = graph.digest
    consumers = {name: len(constant.outputs) for name, constant in graph.constants.items()}
    for lower in (lower_if, lower_multi, lower_stages):
        lower(graph)
    again = graph.replace()
    assert again.digest == before
    assert {name: len(constant.outputs) for name, constant in graph.constants.items()} == consumers


def test_lowering_is_reproducible():
    graph = nets.with_exits("swin", 2)
    assert lower_if(graph).SerializeToString(deterministic=True) == lower_if(graph).SerializeToString(
        deterministic=True
    )


def test_runtime_needs_no_compiler():
    """The staged runtime imports numpy, onnxruntime, errors and files of eexform, nothing that transforms graphs."""
    root = Path(eexform.__file__).parent
    text = (root / "runtime.py").read_text()
    imported = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    allowed = ("eexform.errors", "eexform.files", "numpy", "onnxruntime", "math", "collections", "copy", "dataclasses",
               "pathlib", "typing", "__future__")  # fmt: skip
    assert all(line.split()[1].startswith(allowed) for line in imported)
