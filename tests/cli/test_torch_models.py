"""A PyTorch module as MODEL: named by text, with weights and example inputs, in every command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import eexform as ee
from tests.cli.support import SEARCH, fine, listing, network, refused, shell

CODE = """
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.a = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.b = nn.Conv2d(6, 12, 3, 2, padding=1, bias=False)
        self.c = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.fc = nn.Linear(192, classes)

    def forward(self, image):
        for part in (self.stem, self.a, self.b, self.c):
            image = F.relu(part(image))
        return self.fc(image.flatten(1))

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 8)
        self.fc = nn.Linear(8, 3)

    def forward(self, ids, mask):
        return {"hidden": self.embedding(ids), "logits": self.fc((self.embedding(ids) * mask.unsqueeze(-1)).sum(1))}

made = Net()
number = 3

def small():
    return Net(5)

def wants(argument):
    return Net(argument)

def text():
    return "a network"

def broken():
    raise OSError("no such disk")

class nested:
    net = Net
"""
NAMES = {"stem_w": "stem.weight", "a_w": "a.weight", "b_w": "b.weight", "c_w": "c.weight"}
NAMES |= {"w": "fc.weight", "bias": "fc.bias"}
REFERENCE = "my_torch_nets:Net"
INPUT = ("--input", "1,1,8,8")


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with code and weights that compute what the command line's own network computes; the current folder."""
    import sys

    (tmp_path / "my_torch_nets.py").write_text(CODE)
    arrays = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in network().graph.initializer}
    weights = {f"module.{NAMES[name]}": torch.from_numpy(array) for name, array in arrays.items()}
    torch.save({"state_dict": weights}, tmp_path / "weights.pt")
    onnx.save(network(), tmp_path / "net.onnx")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_torch_nets", None)


def test_the_whole_job(nets: Path) -> None:
    about = (REFERENCE, "--weights", "weights.pt", *INPUT)
    plain = fine("inspect", *about, "--json").json
    assert [site["value"] for site in plain["sites"]] == ["relu", "relu_1", "relu_2"]
    assert [site["module"] for site in plain["sites"]] == ["", "", ""]
    assert plain["params"] == fine("inspect", "net.onnx", "--json").json["params"]
    assert plain["macs"] == fine("inspect", "net.onnx", "--json").json["macs"]
    assert "called after the sub-modules of Net" in fine("inspect", *about).out

    front = fine("search", *about, *SEARCH, "--out", "run", "--json").json
    other = fine("search", "net.onnx", *SEARCH, "--out", "other", "--json").json
    assert front["trunk"]["accuracy_test"] == other["trunk"]["accuracy_test"] > 0.8
    pick = next(plan["index"] for plan in front["plans"] if plan["exits"])
    fine("export", "run", "--pick", pick, "-o", "ee.onnx")
    verified = fine("verify", "ee.onnx", "--against", *about, "--run", "run", "--samples", "40", "--json").json
    assert verified["ok"]
    timed = fine("bench", "ee.onnx", "--vs", *about, "--run", "run", "--samples", "64", "--batch", "8", "--json").json
    assert [entry["file"] for entry in timed["results"]] == ["ee.onnx", REFERENCE]
    for file in ("ee.onnx", "run/trunk.onnx"):
        assert str(nets).encode() not in (nets / file).read_bytes()
    assert not {"module.onnx", "my_torch_nets.onnx"} & set(listing(nets))


def test_apply(nets: Path) -> None:
    (nets / "recipe.toml").write_text('[[pass]]\nname = "remove_dead"\n')
    fine("apply", REFERENCE, "recipe.toml", "--weights", "weights.pt", *INPUT, "-o", "flat.onnx")
    made, own = ee.load("flat.onnx"), ee.load("net.onnx")
    np.testing.assert_array_equal(made.constants["a.weight"].values, own.constants["a_w"].values)


@pytest.mark.parametrize("name", ["made", "small", "nested.net"])
def test_modules_classes_and_functions(nets: Path, name: str) -> None:
    plain = fine("inspect", f"my_torch_nets:{name}", *INPUT, "--json").json
    assert plain["classes"] == (5 if name == "small" else 10)


def test_random_weights_are_the_same_every_time(nets: Path) -> None:
    about = ("inspect", REFERENCE, *INPUT, "--json")
    assert fine(*about).json["digest"] == fine(*about).json["digest"]


def test_named_inputs_of_whole_numbers(nets: Path) -> None:
    about = ("--input", "mask=1,7", "--input", "ids=1,7:int64")
    plain = fine("inspect", "my_torch_nets:Words", *about, "--json").json
    assert plain["inputs"] == [{"name": "ids", "shape": ["N", 7]}, {"name": "mask", "shape": ["N", 7]}]
    assert plain["output"] == "logits"
    refused("inspect", "my_torch_nets:Words", *about, "--output", "hidden", says=["'hidden' is float32[2, 7, 8]"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((REFERENCE,), ["give --input 1,3,32,32"]),
        ((REFERENCE, *INPUT, "--shape", "image=N,1,8,8"), ["--shape is for ONNX files"]),
        ((REFERENCE, "--input", "1,x"), ["'1,x' is not of the form"]),
        ((REFERENCE, "--input", "0,1,8,8"), ["is not of the form"]),
        ((REFERENCE, "--input", "1,1,8,8:float"), ["there is no type 'float'", "'float32'"]),
        ((REFERENCE, *INPUT, "--input", "mask=1,3"), ["a name to every input, or to none"]),
        ((REFERENCE, "--input", "image=1,1,8,8", "--input", "image=1,2"), ["given twice"]),
        ((REFERENCE, "--input", "1,1,9,9"), ["my_torch_nets:Net", "fails on the example inputs in 'fc' (Linear)"]),
        ((REFERENCE, "--input", "pixels=1,1,8,8"), ["unexpected keyword argument 'pixels'"]),
        ((REFERENCE, *INPUT, "--weights", "none.pt"), ["none.pt: no such file"]),
        (("my_torch_nets:small", *INPUT, "--weights", "weights.pt"), ["2 of another shape", "fc.weight [10, 192] for"]),
        (("my_torch_nets:Nett", *INPUT), ["has no 'Nett': did you mean 'Net'"]),
        (("no_such_nets:Net", *INPUT), ["'no_such_nets' cannot be imported", "ModuleNotFoundError"]),
        (("my_torch_nets:wants", *INPUT), ["calling it failed: TypeError", "must take no arguments"]),
        (("my_torch_nets:text", *INPUT), ["returned a str: expected a torch.nn.Module"]),
        (("my_torch_nets:number", *INPUT), ["is a int: expected a torch module"]),
        (("net.onnx", "--weights", "weights.pt"), ["--weights is for PyTorch modules", "net.onnx"]),
        (("net.onnx", *INPUT), ["--input is for PyTorch modules", "net.onnx"]),
    ],
)
def test_what_cannot_be_used(nets: Path, arguments: tuple[str, ...], says: list[str]) -> None:
    refused("inspect", *arguments, says=says)


def test_a_factory_that_fails_by_itself(nets: Path) -> None:
    said = refused("inspect", "my_torch_nets:broken", *INPUT, says=["calling it failed: OSError: no such disk"])
    assert "arguments" not in said


def test_bench_takes_one_module(nets: Path) -> None:
    data = ("--data", "digits")
    two = ("--vs", REFERENCE, "--vs", "my_torch_nets:small")
    refused("bench", "net.onnx", *two, *INPUT, *data, says=["one PyTorch module at most"])
    refused("bench", "net.onnx", "--vs", "net.onnx", *INPUT, *data, says=["go with --vs package.module:factory"])


def test_nothing_of_the_exporter_is_printed(nets: Path) -> None:
    done = shell("inspect", REFERENCE, *INPUT, "--json")
    assert done.code == 0
    assert done.err == ""
    assert done.json["classes"] == 10
