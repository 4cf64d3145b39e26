"""Files that are no ONNX model are called what they are, wherever one is taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from eexform.backends import ort
from eexform.errors import ModelError
from eexform.foreign import about
from eexform.frontends.onnx import load
from eexform.verification.bench import runner
from eexform.verification.deployed import Deployed


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    torch.save({"a": torch.zeros(2)}, folder / "new.pt")
    torch.save({"a": torch.zeros(2)}, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file({"a": np.zeros(2, np.float32)}, folder / "w.safetensors")
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(3, 2),)), folder / "p.pt2")
    (folder / "renamed.onnx").write_bytes((folder / "p.pt2").read_bytes())
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(3, 2)), folder / "script.pt")
    np.savez(folder / "data.npz", x=np.zeros(3))
    (folder / "empty.onnx").write_bytes(b"")
    (folder / "cut.pt").write_bytes((folder / "new.pt").read_bytes()[:200])
    (folder / "lfs.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n", encoding="utf-8")
    (folder / "keras.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(50))
    return folder


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("new.pt", r"PyTorch weights.*package\.module:factory --weights .*new\.pt"),
        ("old.pth", "PyTorch weights"),
        ("w.safetensors", "PyTorch weights"),
        ("p.pt2", r"program of torch\.export.*--form if"),
        ("renamed.onnx", r"program of torch\.export"),
        ("script.pt", "TorchScript"),
        ("data.npz", "archive of arrays"),
        ("empty.onnx", "empty"),
        ("cut.pt", "cut off"),
        ("lfs.onnx", "git lfs pull"),
        ("keras.h5", "tf2onnx"),
    ],
)
def test_every_reader_says_what_it_is(name, says, place):
    for reader in (load, Deployed, runner, ort.session):
        with pytest.raises(ModelError, match=says) as error:
            reader(place / name)
        assert name in str(error.value)


def test_what_is_not_known_is_not_guessed(place, tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"\x08\x07hello")
    assert about(tmp_path / "x.onnx") == ""
    assert about(tmp_path / "absent.onnx") == ""
    assert "folder" in about(tmp_path)
