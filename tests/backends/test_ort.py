"""Sessions: clear errors, and taps that show inner values without changing the outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from eexform.backends import ort
from eexform.errors import GraphError, ModelError
from eexform.frontends.onnx import from_model, save
from eexform.ir import serialize
from tests.graphs import random_classifier
from tests.text import linear, model, normal


def test_every_way_to_give_a_model(tmp_path: Path) -> None:
    source = random_classifier(0)
    graph = from_model(source)
    save(graph, tmp_path / "model.onnx")
    feeds = {"image": normal(2, 3, 8, 8)}
    expected = ort.run(ort.session(source), feeds)["scores"]
    for given in (source.SerializeToString(), tmp_path / "model.onnx", str(tmp_path / "model.onnx"), graph):
        for optimize in (True, False):
            found = ort.run(ort.session(given, optimize=optimize), feeds)
            np.testing.assert_allclose(found["scores"], expected, rtol=1e-5, atol=1e-6)


def test_a_graph_too_big_for_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = from_model(random_classifier(0))
    feeds = {"image": normal(2, 3, 8, 8)}
    expected = ort.run(ort.session(graph), feeds)["scores"]
    for module in (serialize, ort):
        monkeypatch.setattr(module, "EXTERNAL_ABOVE", 100)
    np.testing.assert_array_equal(ort.run(ort.session(graph), feeds)["scores"], expected)


def test_tap() -> None:
    graph = from_model(random_classifier(4))
    values = [node.outputs[0].name for node in graph.nodes if node.op in ("Conv", "Relu")]
    tapped = ort.tap(graph, [*values, values[0], graph.final])
    assert tapped.outputs == (graph.final, *values)
    assert graph.outputs == (graph.final,)
    feeds = {"image": normal(2, 3, 8, 8)}
    found = ort.run(ort.session(tapped), feeds)
    np.testing.assert_allclose(
        found[graph.final], ort.run(ort.session(graph), feeds)[graph.final], rtol=1e-5, atol=1e-6
    )
    for name in values:
        assert found[name].shape[1:] == graph.types[name].sample_shape
    some = ort.run(ort.session(tapped), feeds, [values[1]])
    assert list(some) == [values[1]]
    for name, why in (("image", "an input"), ("fc.bias", "a constant"), ("absent", "no value")):
        with pytest.raises(GraphError, match=why):
            ort.tap(graph, [name])


def test_wrong_feeds() -> None:
    opened = ort.session(linear())
    with pytest.raises(ModelError, match="no input 'z'"):
        ort.run(opened, {"z": normal(1, 4)})
    with pytest.raises(ModelError, match=r"inputs \['x'\] were not given"):
        ort.run(opened, {})
    with pytest.raises(ModelError, match=r"onnxruntime failed: .*float") as caught:
        ort.run(opened, {"x": normal(1, 4).astype(np.float64)})
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"onnxruntime failed: .*[Ii]nvalid dimensions|onnxruntime failed"):
        ort.run(opened, {"x": normal(1, 5)})


def test_models_that_onnxruntime_refuses(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        ort.session(tmp_path / "absent.onnx")
    with pytest.raises(ModelError, match="does not take the model"):
        ort.session(b"nonsense")
    custom = model("y = acme.Magic(x)", domains=', "acme" : 1')
    with pytest.raises(ModelError, match=r"does not take the model: .*acme") as caught:
        ort.session(custom)
    assert "ONNXRuntimeError" not in str(caught.value)


def test_profile(tmp_path: Path) -> None:
    opened = ort.session(linear(), profile=tmp_path / "trace")
    ort.run(opened, {"x": normal(1, 4)})
    written = Path(opened.end_profiling())
    assert written.parent == tmp_path
    assert written.name.startswith("trace")
    assert b"Gemm" in written.read_bytes()


def test_models_in_memory_are_not_changed() -> None:
    source = random_classifier(0)
    before = source.SerializeToString()
    ort.session(source)
    assert source.SerializeToString() == before
    assert isinstance(source, onnx.ModelProto)
