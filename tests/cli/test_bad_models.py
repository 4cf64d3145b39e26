"""Models that cannot be used: one message that says what, where and what to do; exit code 2; nothing written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from tests import text
from tests.cli.support import SEARCH, cli, fine, listing, network, refused, save_network


@pytest.mark.parametrize("command", ["inspect", "search", "verify", "bench", "apply"])
def test_every_command_refuses_a_broken_file(command: str, tmp_path: Path, model: Path, exported: Path) -> None:
    broken = tmp_path / "cut.onnx"
    broken.write_bytes(model.read_bytes()[:5000])
    arguments: dict[str, tuple[object, ...]] = {
        "inspect": (broken,),
        "search": (broken, *SEARCH, "--out", tmp_path / "run"),
        "verify": (exported, "--against", broken, "--data", "digits"),
        "bench": (exported, "--vs", broken, "--data", "digits"),
        "apply": (broken, tmp_path / "recipe.toml", "-o", tmp_path / "out.onnx"),
    }
    refused(command, *arguments[command], says=["cut.onnx", "truncated"])
    assert listing(tmp_path) == ["cut.onnx"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"hello, I am no network at all\n" * 20, "not"),
        (bytes(range(256)) * 16, "ONNX"),
    ],
)
def test_files_of_another_kind(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.onnx"
    path.write_bytes(content)
    refused("inspect", path, says=["odd.onnx", says])


def test_missing_files(tmp_path: Path, run: Path, model: Path, exported: Path) -> None:
    absent = tmp_path / "absent.onnx"
    refused("inspect", absent, says=["absent.onnx", "no such file"])
    refused("inspect", tmp_path, says=[str(tmp_path), "not a file"])
    refused("search", absent, *SEARCH, "--out", tmp_path / "run", says=["absent.onnx", "no such file"])
    refused("verify", absent, "--against", model, "--run", run, says=["absent.onnx", "no such file"])
    refused("verify", exported, "--against", absent, "--run", run, says=["absent.onnx", "no such file"])
    refused("bench", absent, "--vs", model, "--run", run, says=["absent.onnx", "no such file"])
    refused("bench", exported, "--vs", absent, "--run", run, says=["absent.onnx", "no such file"])
    refused("pareto", tmp_path / "none", says=["none", "holds no run", "eexform search"])
    refused("export", tmp_path / "none", "-o", tmp_path / "x.onnx", says=["none", "holds no run"])
    refused("apply", model, tmp_path / "none.toml", "-o", tmp_path / "x.onnx", says=["none.toml", "no such file"])
    assert listing(tmp_path) == []


def test_no_classifier(tmp_path: Path) -> None:
    plane = save_network(tmp_path / "plane.onnx", "map = Identity(stage1_block1_relu_out)", "float[N,12,4,4] map")
    refused("inspect", plane, says=["plane.onnx", "'map'", "not class scores", "[N, classes]"])
    label = save_network(
        tmp_path / "label.onnx",
        "logits = Gemm<transB=1>(flat, w, bias) best = ArgMax<axis=1, keepdims=0>(logits)",
        "int64[N] best",
    )
    refused("search", label, *SEARCH, "--out", tmp_path / "run", says=["label.onnx", "'best'", "scores rather than"])
    two = save_network(
        tmp_path / "two.onnx",
        "logits = Gemm<transB=1>(flat, w, bias) other = Neg(logits)",
        "float[N,10] logits, float[N,10] other",
    )
    refused("inspect", two, says=["two.onnx", "'logits'", "'other'", "--output"])
    assert fine("inspect", two, "--output", "logits", "--json").json["output"] == "logits"
    refused("inspect", two, "--output", "logit", says=["no output 'logit'", "did you mean 'logits'"])
    single = save_network(
        tmp_path / "single.onnx",
        "y = Gemm<transB=1>(flat, w, bias) one = ReduceMax<keepdims=1, axes=[1]>(y)",
        "float[N,1] one",
    )
    refused("inspect", single, says=["single.onnx", "at least 2 classes"])
    assert not (tmp_path / "run").exists()


def test_logits_that_are_probabilities_already(tmp_path: Path) -> None:
    """Detected; confidences are then the probabilities themselves."""
    ending = "logits = Gemm<transB=1>(flat, w, bias) probabilities = Softmax<axis=1>(logits)"
    path = save_network(tmp_path / "soft.onnx", ending, "float[N,10] probabilities")
    assert fine("inspect", path, "--json").json["scores"] == "probabilities"
    run = tmp_path / "run"
    fine("search", path, *SEARCH, "--generations", "1", "--out", run)
    out = tmp_path / "ee.onnx"
    fine("export", run, "--pick", "2", "-o", out)
    assert fine("verify", out, "--against", path, "--run", run, "--samples", "16", "--json").json["ok"]
    session = onnxruntime.InferenceSession(out)
    images = np.random.default_rng(1).uniform(0, 16, (64, 1, 8, 8)).astype(np.float32)
    answers = dict(
        zip([value.name for value in session.get_outputs()], session.run(None, {"image": images}), strict=True)
    )
    np.testing.assert_allclose(answers["probabilities"].sum(axis=1), 1, rtol=1e-5)
    final = answers["exit_index"] == answers["exit_index"].max()
    measures = {exit_["measure"] for exit_ in fine("pareto", run, "--json").json["plans"][2]["exits"]}
    top = np.sort(answers["probabilities"][final], axis=1)
    if measures == {"max_prob"}:
        np.testing.assert_allclose(answers["confidence"][final], top[:, -1], rtol=1e-5)
    elif measures == {"margin"}:
        np.testing.assert_allclose(answers["confidence"][final], top[:, -1] - top[:, -2], rtol=1e-4, atol=1e-6)
    refused("inspect", path, "--scores", "odds", says=["--scores", "'odds'", "logits", "probabilities"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers(bad: float, tmp_path: Path) -> None:
    built = network()
    tensor = next(tensor for tensor in built.graph.initializer if tensor.name == "a_w")
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[7] = bad
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, "a_w"))
    onnx.save(built, tmp_path / "nan.onnx")
    refused("inspect", tmp_path / "nan.onnx", says=["nan.onnx", "'a_w'", "Conv_1", "of 216 elements"])
    refused("search", tmp_path / "nan.onnx", *SEARCH, "--out", tmp_path / "run", says=["nan.onnx", "'a_w'"])
    assert listing(tmp_path) == ["nan.onnx"]


def test_missing_shapes(tmp_path: Path) -> None:
    built = network()
    built.graph.input[0].type.tensor_type.ClearField("shape")
    path = tmp_path / "unshaped.onnx"
    onnx.save(built, path)
    refused("inspect", path, says=["unshaped.onnx", "'image'", "has no shape", "--shape image=N,"])
    assert len(fine("inspect", path, "--shape", "image=N,1,8,8", "--json").json["sites"]) == 3
    refused("inspect", path, "--shape", "image:N,1,8,8", says=["--shape", "'image:N,1,8,8'", "NAME=N,3,32,32"])
    refused("inspect", path, "--shape", "image=N,,8,8", says=["--shape", "NAME=N,3,32,32"])
    refused("inspect", path, "--shape", "img=N,1,8,8", says=["no input 'img'", "did you mean 'image'"])


def test_a_network_that_has_its_exits_already(exported: Path, tmp_path: Path, model: Path) -> None:
    refused("inspect", exported, says=["ee.onnx", "already has its exits", "load the model it was made from"])
    refused("bench", exported, "--data", "digits", says=["ee.onnx", "already has its exits", "--vs"])


def test_verifying_what_eexform_did_not_export(model: Path, run: Path, tmp_path: Path) -> None:
    refused("verify", model, "--against", model, "--run", run, says=["model.onnx", "not exported by eexform"])
    (tmp_path / "folder").mkdir()
    refused("verify", tmp_path / "folder", "--against", model, "--run", run, says=["folder", "manifest.json"])


def test_verifying_against_another_model(run: Path, exported: Path, tmp_path: Path) -> None:
    """It can be checked, and it is wrong: code 1."""
    other = save_network(tmp_path / "other.onnx", "z = Gemm<transB=1>(flat, w, bias) logits = Neg(z)")
    done = cli("verify", exported, "--against", other, "--run", run, "--samples", "8")
    assert done.code == 1
    assert "trunk" in done.out
    assert "FAILED" in done.out


def test_a_model_without_any_site(tmp_path: Path) -> None:
    onnx.save(text.linear(64, 10), tmp_path / "linear.onnx")
    np.savez(tmp_path / "flat.npz", x=text.normal(80, 64), y=np.arange(80) % 10)
    shown = fine("inspect", tmp_path / "linear.onnx")
    assert "0 sites" in shown.out
    refused(
        "search", tmp_path / "linear.onnx", "--data", tmp_path / "flat.npz", "--out", tmp_path / "run",
        says=["site", "eexform inspect"],
    )  # fmt: skip
    assert not (tmp_path / "run").exists()
