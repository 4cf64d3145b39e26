"""Verification accepts what the exporter writes and finds every planted fault."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from eexform.backends import metadata, protos
from eexform.backends.export import export
from eexform.backends.protos import subgraphs
from eexform.backends.rebatch import Scope
from eexform.errors import DataError, ModelError, VerificationError
from eexform.files import file_sha256
from eexform.frontends.onnx import from_model
from eexform.passes import PassContext
from eexform.passes.fold_batch_norm import FoldBatchNorm
from eexform.passes.insert_exits import InsertExits
from eexform.passes.lower import Lower
from eexform.verification.simulate import simulate
from eexform.verification.verify import Report, verify
from tests import zoo
from tests.lowering import nets
from tests.text import model, normal

SAMPLES = 40


@cache
def ready(name: str, count: int = 2, carry: float = 0.0):
    """A zoo network with exits whose thresholds split the samples."""
    graph = nets.with_exits(name, count, carry=carry)
    thresholds = nets.spread(nets.scores(name, count, SAMPLES, carry))
    graph = nets.set_thresholds(graph, thresholds)
    if carry:
        recipe = {"pass": [{"name": "insert_exits", "carry": carry}]}
        graph = graph.replace(metadata={**graph.metadata, metadata.PLAN: json.dumps({"recipe": recipe})})
    return graph


def feeds(name: str):
    return zoo.feeds(name, SAMPLES, seed=3)


def check(path, name: str = "resnet") -> Report:
    return verify(path, nets.trunk(name), feeds(name))


def failed(report: Report) -> set[str]:
    assert not report.ok
    assert not report.to_json()["ok"]
    with pytest.raises(VerificationError, match="failed verification"):
        report.require()
    return {item.name for item in report.checks if not item.ok}


@pytest.fixture
def exported(tmp_path):
    path = tmp_path / "ee.onnx"
    export(ready("resnet"), path, "if")
    return path


def rewrite(path, change) -> None:
    """Apply ``change`` to the model in a file."""
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)


# -- nothing wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["if", "stages", "multi"])
@pytest.mark.parametrize("name", ["resnet", "vit", "bert", "unet"])
def test_every_form_passes(name, form, tmp_path):
    export(ready(name), tmp_path / "out", form)
    report = check(tmp_path / "out", name)
    assert report.ok, report.to_json()
    names = [item.name for item in report.checks]
    assert {"decisions at batch 1", "decisions at batch 7", "decisions at batch 32", "mixed batches"} <= set(names)
    assert {"forced to exit 0", "forced to exit 1", "forced to the final classifier"} <= set(names)
    assert {"everyone leaves at exit 0", "everyone leaves at the final classifier"} <= set(names)
    assert ("skipped work" in names) == (form != "multi")
    plain = json.loads(json.dumps(report.to_json()))
    assert set(plain) == {"ok", "form", "samples", "near_ties", "checks"}
    assert set(plain["checks"][0]) == {"name", "ok", "detail"}
    assert (plain["form"], plain["samples"]) == (form, SAMPLES)
    report.require()


@pytest.mark.parametrize("form", ["if", "stages"])
def test_carry_passes(form, tmp_path):
    export(ready("resnet", carry=0.5), tmp_path / "out", form)
    report = check(tmp_path / "out")
    assert report.ok, report.to_json()


def test_thresholds_as_input_pass(tmp_path):
    export(ready("resnet"), tmp_path / "ee.onnx", "if", thresholds_as_input=True)
    report = check(tmp_path / "ee.onnx")
    assert report.ok, report.to_json()


def test_the_pass_lower_passes(tmp_path):
    from eexform.ir.serialize import save

    lowered = Lower().run(ready("resnet"), PassContext()).graph
    save(lowered, tmp_path / "ee.onnx")
    report = check(tmp_path / "ee.onnx")
    assert report.ok, report.to_json()


@pytest.mark.parametrize("form", ["if", "stages", "multi"])
def test_weights_beside_the_file_pass(form, tmp_path, monkeypatch):
    monkeypatch.setattr(protos, "EXTERNAL_ABOVE", 0)
    export(ready("resnet"), tmp_path / "out", form)
    monkeypatch.undo()
    assert list(tmp_path.rglob("*.data"))
    report = check(tmp_path / "out")
    assert report.ok, report.to_json()


def test_passes_in_front_of_the_exits_are_replayed(tmp_path):
    """Heads attached to a folded trunk: the recipe in the file says so, and the original is folded again."""
    trunk = FoldBatchNorm().run(nets.trunk("resnet"), PassContext()).graph
    found = nets.find_sites(trunk).sites[1:3]
    graph = nets.attach(trunk, found)
    recipe = {"recipe": {"pass": [{"name": "fold_batch_norm"}, {"name": "insert_exits"}]}}
    graph = graph.replace(metadata={**graph.metadata, metadata.PLAN: json.dumps(recipe)})
    export(graph, tmp_path / "ee.onnx")
    assert check(tmp_path / "ee.onnx").ok
    rewrite(tmp_path / "ee.onnx", lambda model: put_plan(model, recipe=None))
    assert "trunk" in failed(check(tmp_path / "ee.onnx"))


def test_near_ties_are_counted(tmp_path):
    simulated = nets.scores("resnet", 2, SAMPLES)
    thresholds = [float(np.sort(row)[SAMPLES // 2]) for row in simulated.confidences()]
    export(nets.set_thresholds(nets.with_exits("resnet", 2), thresholds), tmp_path / "ee.onnx")
    report = check(tmp_path / "ee.onnx")
    assert report.ok, report.to_json()
    assert report.near_ties >= 1
    assert "near ties" in next(item.detail for item in report.checks if item.name == "decisions at batch 32")


# -- planted faults ---------------------------------------------------------------------------------------------------


def put_plan(model, **changes) -> None:
    entries = {entry.key: entry.value for entry in model.metadata_props}
    plan = json.loads(entries[metadata.PLAN])
    plan.update(changes)
    entries[metadata.PLAN] = json.dumps({key: value for key, value in plan.items() if value is not None})
    helper.set_model_props(model, entries)


def initializers(model):
    return {tensor.name: tensor for part in subgraphs(model.graph) for tensor in part.initializer}


def test_altered_head_parameters(exported):
    def change(model):
        tensor = initializers(model)["exit0.classifier.weight"]
        array = numpy_helper.to_array(tensor).copy()
        array[0, 0] += 1e-3
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    rewrite(exported, change)
    assert "head parameters" in failed(check(exported))


def test_swapped_heads(tmp_path):
    """Two heads of equal shape change places: numbers, names and digests are all there, at the wrong exit."""
    values = [site for site in nets.sites("resnet") if site.channels == nets.sites("resnet")[0].channels][:2]
    graph = nets.attach(nets.trunk("resnet"), values)
    export(graph, tmp_path / "ee.onnx")

    def change(model):
        found = initializers(model)
        for part in ("weight", "bias"):
            one, two = found[f"exit0.classifier.{part}"], found[f"exit1.classifier.{part}"]
            one.raw_data, two.raw_data = two.raw_data, one.raw_data

    rewrite(tmp_path / "ee.onnx", change)
    names = failed(check(tmp_path / "ee.onnx"))
    assert "head parameters" in names


def test_head_wired_to_another_site(exported):
    graph = ready("resnet")

    def change(model):
        site = graph.exits[0].site
        shape = graph.types[site].shape
        top = {value for node in model.graph.node for value in node.output}
        other = next(v for v, kind in graph.types.items() if kind.shape == shape and v != site and v in top)
        node = next(node for node in model.graph.node if node.name.startswith("exit0.") and site in node.input)
        node.input[list(node.input).index(site)] = other

    rewrite(exported, change)
    names = failed(check(exported))
    assert "forced to exit 0" in names
    assert "head parameters" not in names


@pytest.mark.parametrize("form", ["if", "stages"])
def test_wrong_threshold(form, tmp_path):
    path = tmp_path / "out"
    export(ready("resnet"), path, form)
    if form == "stages":
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["stages"][0]["threshold"] += 0.05
        (path / "manifest.json").write_text(json.dumps(manifest))
    else:

        def change(model):
            tensor = initializers(model)["exit0.threshold"]
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(0.05), tensor.name))

        rewrite(path, change)
    names = failed(check(path))
    assert {"thresholds", "decisions at batch 32"} <= names


def test_captured_batch_size(tmp_path, monkeypatch):
    """Shape arithmetic taken from the outer batch instead of the rows that are left."""
    monkeypatch.setattr(Scope, "_fixed", lambda self, value: True)
    export(ready("vit"), tmp_path / "ee.onnx")
    monkeypatch.undo()
    names = failed(check(tmp_path / "ee.onnx", "vit"))
    assert "mixed batches" in names


def test_another_trunk(exported):
    names = failed(verify(exported, other_trunk(), feeds("resnet")))
    assert "trunk" in names
    assert "forced to the final classifier" in names


def other_trunk():
    draft = nets.trunk("resnet").copy()
    constant = next(c for c in draft.constants.values() if c.values.ndim == 4)
    constant.values = constant.values * np.float32(1.5)
    return draft.replace(draft.gs)


def test_both_sides_computed(exported):
    """The rest is computed for everyone in the outer graph and only chosen by the branch (``Where``)."""

    def change(model):
        part = next(part for part in subgraphs(model.graph) if part.name == "go_on_from_exit0")
        conv = next(node for node in part.node if node.op_type == "Conv")
        held = {tensor.name: tensor for tensor in part.initializer}
        copied = onnx.NodeProto()
        copied.CopyFrom(conv)
        copied.name, copied.output[0] = "hoisted", "hoisted_out"
        site = ready("resnet").exits[0].site
        copied.input[0] = site
        for place, name in enumerate(conv.input[1:], 1):
            tensor = onnx.TensorProto()
            tensor.CopyFrom(held[name])
            tensor.name = copied.input[place] = f"hoisted_{place}"
            model.graph.initializer.append(tensor)
        fork = next(node for node in model.graph.node if node.op_type == "If")
        place = list(model.graph.node).index(fork)
        sink = [
            helper.make_node("ReduceMax", ["hoisted_out"], ["hoisted_max"], "hoisted_max", keepdims=0),
            helper.make_node("Greater", ["hoisted_max", "hoisted_max"], ["hoisted_no"], "hoisted_no"),
            helper.make_node("Where", ["hoisted_no", fork.output[0] + "_in", fork.output[0] + "_in"],
                             [fork.output[0]], "hoisted_where"),
        ]  # fmt: skip
        fork.output[0] += "_in"
        model.graph.node.insert(place, copied)
        model.graph.node.extend(sink)

    rewrite(exported, change)
    report = check(exported)
    assert failed(report) == {"skipped work"}
    assert "heavy operators" in next(item.detail for item in report.checks if item.name == "skipped work")


def test_a_file_without_branches(exported):
    """A flat file that claims the form ``if``."""

    def change(model):
        flat = onnx.load(exported.with_name("multi.onnx"))
        model.graph.CopyFrom(flat.graph)

    export(ready("resnet"), exported.with_name("multi.onnx"), "multi")
    rewrite(exported, change)
    assert {"plan", "skipped work"} <= failed(check(exported))


def test_a_plan_that_names_another_head_or_site(exported):
    def change(model):
        exits = json.loads({e.key: e.value for e in model.metadata_props}[metadata.PLAN])["exits"]
        exits[0]["site"] = "nowhere"
        put_plan(model, exits=exits)

    rewrite(exported, change)
    report = check(exported)
    assert "reference" in failed(report)
    assert "nowhere" in next(item.detail for item in report.checks if item.name == "reference")


def test_a_changed_stage_is_refused(tmp_path):
    export(ready("resnet"), tmp_path / "out", "stages")
    stage = tmp_path / "out" / "stage1.onnx"
    rewrite(stage, lambda model: model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(model.graph.initializer[0]) + 1, model.graph.initializer[0].name)
    ))  # fmt: skip
    with pytest.raises(ModelError, match="sha-256"):
        check(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["stages"][1]["sha256"] = file_sha256(stage)
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    assert failed(check(tmp_path / "out"))


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input(exported, tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        check(tmp_path / "missing.onnx")
    onnx.save(zoo.build("resnet"), tmp_path / "plain.onnx")
    with pytest.raises(ModelError, match="not exported by eexform"):
        check(tmp_path / "plain.onnx")
    (tmp_path / "broken.onnx").write_bytes(exported.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be read"):
        check(tmp_path / "broken.onnx")
    with pytest.raises(DataError, match="inputs are"):
        verify(exported, nets.trunk("resnet"), {"picture": np.zeros((2, 3, 16, 16), np.float32)})
    with pytest.raises(DataError, match="at least one"):
        verify(exported, nets.trunk("resnet"), {"image": np.zeros((0, 3, 16, 16), np.float32)})


def test_heads_folded_after_training_pass(tmp_path):
    """Batch normalisation of trunk and heads folded behind ``insert_exits``: other parameters, the same network."""
    sites = nets.sites("resnet")[2:4]
    step = InsertExits(
        sites=tuple(site.value for site in sites),
        heads={site.value: "conv:1x8/avg" for site in sites},
        thresholds={site.value: 0.3 for site in sites},
        untrained=True,
    )
    graph = FoldBatchNorm().run(step.run(nets.trunk("resnet"), PassContext()).graph, PassContext()).graph
    assert not any(node.op == "BatchNormalization" for node in graph.nodes)
    export(graph, tmp_path / "ee.onnx")
    report = check(tmp_path / "ee.onnx")
    assert report.ok, report.to_json()


@pytest.mark.parametrize(
    ("plan", "what"),
    [
        ({"recipe": ["fold"]}, "is no list of passes"),
        ({"recipe": {"pass": {"name": "fold"}}}, "is no list of passes"),
        ({"recipe": {"pass": ["fold"]}}, "is no list of passes"),
        ({"carry": "much"}, "carry is 'much'"),
        ({"carry": 2.0}, "carry is 2.0"),
        ({"carry": 0.5, "final_temperature": "hot"}, "final_temperature is 'hot'"),
    ],
)
def test_a_damaged_plan_is_a_failed_check(exported, plan, what):
    def change(model):
        entry = next(entry for entry in model.metadata_props if entry.key == metadata.PLAN)
        entry.value = json.dumps({**json.loads(entry.value), **plan})

    rewrite(exported, change)
    report = check(exported)
    failed(report)
    assert what in report.checks[-1].detail


@pytest.mark.parametrize("form", ["if", "stages"])
def test_a_first_state_of_zeros_is_work_that_is_needed(form, tmp_path):
    """A recurrent cell multiplies its first state, which no sample has a say in; that is not behind the exit."""
    text = """size = Shape<start=0, end=1>(x) shape = Concat<axis=0>(size, width) h0 = ConstantOfShape(shape)
              a = MatMul(h0, w) b = MatMul(x, w) c = Add(a, b) h1 = Tanh(c)
              d = MatMul(h1, w) e = MatMul(x, v) f = Add(d, e) h2 = Tanh(f) g = MatMul(h2, w) h3 = Relu(g)
              y = Gemm(h3, out)"""
    weights = {"w": normal(4, 4), "v": normal(4, 4, seed=1), "out": normal(4, 3, seed=2), "width": np.array([4])}
    trunk = from_model(model(text, weights))
    assert trunk.flow.producer["a"] in trunk.flow.shape_nodes
    graph = nets.attach(trunk, [site for site in nets.find_sites(trunk).sites if site.value in ("h1", "h2")])
    assert len(graph.exits) == 2
    samples = {"x": normal(20, 4, seed=3)}
    graph = nets.set_thresholds(graph, nets.spread(simulate(graph, samples)))
    verify(export(graph, tmp_path / "out", form), trunk, samples).require()
