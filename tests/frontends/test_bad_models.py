"""Every kind of model that cannot be used gets one clear message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from eexform.errors import GraphError, ModelError
from eexform.frontends.onnx import from_model, load, save, to_model
from eexform.ir.inference import InferenceError
from tests.graphs import random_classifier
from tests.lowering import nets
from tests.text import linear, model, normal


def _external(folder: Path) -> tuple[Path, onnx.ModelProto]:
    """A model file with its weights beside it, and what the file says."""
    path = folder / "model.onnx"
    save(from_model(random_classifier(0)), path, external=True)
    return path, onnx.load(path, load_external_data=False)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load(tmp_path / "absent.onnx")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a file"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x89PNG\r\n\x1a\n" + bytes(100)])
def test_another_kind_of_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="another kind of file" if content else "the file is empty") as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9, 0.999])
def test_truncated(tmp_path: Path, share: float) -> None:
    whole = random_classifier(1).SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelError, match=r"model\.onnx"):
        load(path)


def test_invalid_onnx() -> None:
    broken = linear()
    broken.graph.node[0].input[1] = "absent"
    with pytest.raises(ModelError, match=r"not valid ONNX.*\b") as caught:
        from_model(broken)
    assert "absent" in str(caught.value)


def test_external_data_missing(tmp_path: Path) -> None:
    path, _ = _external(tmp_path)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"model\.onnx\.data.*copy it beside the model"):
        load(path)


def test_external_data_truncated(tmp_path: Path) -> None:
    path, _ = _external(tmp_path)
    side = tmp_path / "model.onnx.data"
    side.write_bytes(side.read_bytes()[:-100])
    with pytest.raises(ModelError, match="truncated or belongs to another model"):
        load(path)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "sub/../../secret", "..\\secret", ""])
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(bytes(10_000))
    folder = tmp_path / "models"
    folder.mkdir()
    path, said = _external(folder)
    for tensor in said.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(said.SerializeToString())
    with pytest.raises(ModelError, match="outside the model's folder"):
        load(path)


def test_external_data_through_a_link(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    path, _ = _external(folder)
    side = folder / "model.onnx.data"
    side.rename(tmp_path / "elsewhere")
    side.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="outside the model's folder"):
        load(path)


def test_external_data_of_another_size(tmp_path: Path) -> None:
    path, said = _external(tmp_path)
    tensor = next(t for t in said.graph.initializer if t.external_data)
    tensor.dims[0] += 1
    path.write_bytes(said.SerializeToString())
    with pytest.raises(ModelError, match=r"takes \d+ bytes, its external data has \d+"):
        load(path)


def test_external_data_without_a_folder(tmp_path: Path) -> None:
    _, said = _external(tmp_path)
    with pytest.raises(ModelError, match="load the model from its path"):
        from_model(said)


@pytest.mark.parametrize("opset", [9, 12])
def test_old_opset(opset: int) -> None:
    with pytest.raises(ModelError, match=f"opset {opset}; 13 and newer"):
        from_model(model("y = Gemm(x, w)", {"w": normal(4, 3)}, opset=opset))


def test_future_opset() -> None:
    with pytest.raises(ModelError, match="update onnx"):
        from_model(model("y = Gemm(x, w)", {"w": normal(4, 3)}, opset=999))


@pytest.mark.parametrize(
    ("body", "outputs", "weights", "message"),
    [
        ("y = Conv(x, w)", "float[N,3,8,8] y", {"w": normal(3, 2, 1, 1)}, "detector or a segmenter"),
        ("p = ReduceMean<axes=[2,3],keepdims=0>(x)\n y = Gemm(p, w)", "float[N,1] y", {"w": normal(2, 1)}, "2 classes"),
        ("p = ReduceMean<axes=[1,2,3],keepdims=0>(x)\n y = Identity(p)", "float[N] y", {}, "not class scores"),
        (
            "p = ReduceMean<axes=[2,3],keepdims=0>(x)\n y = ArgMax<axis=1>(p)",
            "int64[N,1] y",
            {},
            "rather than the predicted label",
        ),
    ],
)
def test_not_a_classifier(body: str, outputs: str, weights: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        from_model(model(body, weights, inputs="float[N,2,8,8] x", outputs=outputs))
    assert "'y'" in str(caught.value)


def test_open_number_of_classes() -> None:
    text = model("y = Relu(x)", inputs="float[N,M] x", outputs="float[N,M] y")
    with pytest.raises(ModelError, match="number of classes must be fixed"):
        from_model(text)


def test_independent_labels() -> None:
    text = model("g = Gemm(x, w)\n y = Sigmoid(g)", {"w": normal(4, 3)})
    with pytest.raises(ModelError, match="independent labels"):
        from_model(text)
    assert from_model(text, scores="probabilities").scores == "probabilities"


def test_two_candidates_for_the_output() -> None:
    text = model("y = Gemm(x, w)\n z = Relu(y)", {"w": normal(4, 3)}, outputs="float[N,3] y, float[N,3] z")
    with pytest.raises(ModelError, match=r"several could be the class scores.*'y'.*'z'.*output="):
        from_model(text)
    assert from_model(text, output="z").outputs == ("z",)
    with pytest.raises(ModelError, match="no output 'q'"):
        from_model(text, output="q")


@pytest.mark.parametrize(("bad", "word"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_weights_that_are_not_numbers(bad: float, word: str) -> None:
    weights = normal(4, 3)
    weights[1, 2] = bad
    with pytest.raises(ModelError, match=rf"parameter 'w' of node 'Gemm_0' \(Gemm\) has 1 {word}"):
        from_model(model("y = Gemm(x, w)", {"w": weights}))


def test_masks_may_hold_infinity() -> None:
    mask = np.array([0, 0, -np.inf], np.float32)
    text = model("g = Gemm(x, w)\n y = Add(g, mask)", {"w": normal(4, 3), "mask": mask})
    assert from_model(text).num_classes == 3


def test_missing_shape() -> None:
    text = linear()
    text.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ModelError, match=r"input 'x' has no shape.*input_shapes"):
        from_model(text)
    assert from_model(text, input_shapes={"x": ["N", 4]}).types["y"].shape == ("N", 3)


def test_wrong_input_shapes() -> None:
    with pytest.raises(ModelError, match="no input 'z'"):
        from_model(linear(), input_shapes={"z": ["N", 4]})
    with pytest.raises(ModelError, match="does not fit input 'x'"):
        from_model(linear(), input_shapes={"x": ["N", 5]})


def test_sizes_that_contradict() -> None:
    with pytest.raises(ModelError, match=r"node 'Gemm_0' \(Gemm\).*'w' \[5, 3\]"):
        from_model(model("y = Gemm(x, w)", {"w": normal(5, 3)}))


def test_a_symbol_that_is_not_free() -> None:
    text = model("f = Flatten(x)\n y = Gemm(f, w)", {"w": normal(16, 3)}, inputs="float[N,4,side] x")
    with pytest.raises(ModelError, match=r"'side' as 64: give input_shapes"):
        from_model(text)
    assert from_model(text, input_shapes={"x": ["N", 4, 4]}).num_classes == 3


def test_newer_format() -> None:
    text = linear()
    text.metadata_props.add(key="eexform.format", value="99")
    with pytest.raises(ModelError, match=r"newer eexform.*update eexform"):
        from_model(text)


def test_damaged_exits() -> None:
    text = linear()
    text.metadata_props.add(key="eexform.exits", value="[{]")
    with pytest.raises(GraphError, match=r"eexform\.exits.*damaged"):
        from_model(text)


def test_already_lowered() -> None:
    text = linear()
    text.metadata_props.add(key="eexform.form", value="if")
    with pytest.raises(ModelError, match="already has its exits"):
        from_model(text)


def test_errors_from_a_file_keep_their_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model("z = MatMul(x, w) y = Add(z, v)", {"w": normal(4, 3), "v": normal(5)}), path)
    with pytest.raises(InferenceError, match=r"its input shapes do not fit") as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.node.op == "Add"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_type": 0}, "element type 0 is unknown"),
        ({"data_type": 999}, "element type 999 is unknown"),
        ({"data_type": onnx.TensorProto.STRING}, "element type 8 is unknown"),
        ({"data_type": onnx.TensorProto.BFLOAT16}, "does not fit its shape"),
        ({"dims": [-1, 3]}, "is not possible"),
        ({"dims": [2**40, 2**40]}, "is not possible"),
        ({"location": "a\0b"}, "outside the model's folder"),
    ],
)
def test_damaged_external_data(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    made = linear()
    tensor = made.graph.initializer[0]
    (tmp_path / "weights").write_bytes(tensor.raw_data)
    location = change.pop("location", "weights")
    damaged = onnx.TensorProto(name=tensor.name, **{"data_type": tensor.data_type, "dims": tensor.dims, **change})
    damaged.data_location = onnx.TensorProto.EXTERNAL
    damaged.external_data.add(key="location", value=location)
    tensor.CopyFrom(damaged)
    with pytest.raises(ModelError, match=message):
        from_model(made, tmp_path)


@pytest.mark.parametrize("field", ["site", "logits", "parameters"])
def test_exits_that_name_what_is_not_there(field: str) -> None:
    damaged = to_model(nets.with_exits("resnet", 1))
    for entry in damaged.metadata_props:
        if entry.key == "eexform.exits":
            plain = json.loads(entry.value)
            plain[0][field] = ["absent"] if field == "parameters" else "absent"
            entry.value = json.dumps(plain)
    with pytest.raises(ModelError, match=r"exit 0.*absent.* not in the graph"):
        from_model(damaged)


def test_an_output_that_is_listed_twice() -> None:
    twice = linear()
    twice.graph.output.append(twice.graph.output[0])
    assert from_model(twice).outputs == ("y",)
