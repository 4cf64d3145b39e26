"""Modules, examples and weights that cannot be used: one message that says what, where and what to do."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import eexform as ee
from eexform.errors import ModelError
from eexform.frontends.torch import from_module, load_weights
from tests.frontends.torch_nets import Head, Outer, Several

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("habit", "says"),
    [
        ("branch", ["Could not guard on data-dependent expression", "torch.where"]),
        ("item", ["data-dependent", "torch.where"]),
        ("batch", ["the batch size of the examples only", "x.shape[0] or -1"]),
        ("size", ["the batch size of the examples only"]),
        ("operator", ["cannot be written as ONNX", "bessel_j0", "replace that operator"]),
        ("error", ["fails on the example inputs", "RuntimeError", "shape '[-1, 5]' is invalid"]),
    ],
)
def test_the_reason_is_told_in_two_lines_with_the_sub_module(
    habit: str, says: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    module = Outer(habit)
    with pytest.raises(ModelError) as caught:
        ee.load(module, (X,))
    message = str(caught.value)
    assert len(message.splitlines()) == 2
    assert "'stage.1' (Inner)" in message
    for part in says:
        assert part in message
    assert "Traceback" not in message
    assert capfd.readouterr() == ("", "")
    assert "forward" not in vars(module)
    assert module.training


def test_samples_that_influence_one_another_are_refused_as_in_onnx() -> None:
    with pytest.raises(ModelError, match=r"Outer: samples of a batch influence one another: node 'stage.1.mean'"):
        ee.load(Outer("mixing"), (X,))


@pytest.mark.parametrize(
    ("noise", "says"),
    [
        (lambda x: torch.nn.functional.dropout(x, 0.5), r"in Noisy.forward.*\(Dropout\).*training=self.training"),
        (lambda x: x + torch.randn_like(x), r"in Noisy.forward.*\(RandomNormalLike\).*leave out the noise"),
    ],
)
def test_random_numbers_in_eval_mode_are_refused(noise: Any, says: str) -> None:
    class Noisy(Head):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(noise(x))

    with pytest.raises(ModelError, match=says):
        ee.load(Noisy(), (X,))


def test_a_table_as_long_as_the_batch_is_explained() -> None:
    class Table(Head):
        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return super().forward(x) @ table

    with pytest.raises(ModelError, match="a number of samples that no other input has as its first size"):
        ee.load(Table(), (torch.zeros(3, 4), torch.zeros(3, 5)))


def test_the_exporters_own_cause_is_told() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("class", nn.Linear(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self._modules["class"](x)  # type: ignore[misc]

    with pytest.raises(ModelError, match="SyntaxError"):
        ee.load(Keyword(), (X,))


def test_buffers_made_in_inference_mode_do_not_hide_the_reason() -> None:
    with torch.inference_mode():
        module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(ModelError, match=r"[Ii]nference tensor"):
        ee.load(module, (X,))


@pytest.mark.parametrize(
    ("form", "output", "says"),
    [
        ("two", None, "several of them could be the class scores"),
        ("two", "7", "there is no '7'"),
        ("dict", "c", "there is no 'c': choose from 'a', 'b'"),
        ("vector", None, r"returns float32\[2\] for a batch of 2"),
        ("volume", None, r"float32\[2, 3, 1\]"),
        ("label", None, r"int64\[2, 1\]"),
        ("text", None, "returns a str"),
        ("one", None, "at least 2 classes"),
        ("nested", None, "output 'logits' is a tuple"),
        ("tuple", 0, r"output 0 is float32\[2, 1, 5\]"),
    ],
)
def test_what_is_no_classifier_is_refused(form: str, output: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        ee.load(Several(form), (X,), output=output)


def test_an_output_named_for_a_plain_tensor_is_refused() -> None:
    with pytest.raises(ModelError, match="returns one tensor: leave out --output"):
        ee.load(Head(), (X,), output="logits")


@pytest.mark.parametrize(
    ("examples", "says"),
    [
        ((), "hold no tensor with a batch"),
        ((torch.zeros(0, 4),), "hold no sample"),
        (([1.0, 2.0],), "is a list: expected a tensor"),
        ("x", "example_inputs is a str"),
        ((X, X), "takes 2 positional arguments"),
        ({"y": X}, "unexpected keyword argument 'y'"),
        ((X.long(),), "Long"),
        ((torch.zeros(2, 5),), "in 'linear' .Linear.: RuntimeError: mat1 and mat2 shapes"),
    ],
)
def test_examples_that_do_not_fit(examples: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        from_module(Head(), examples)


def test_modules_that_hold_no_usable_parameters() -> None:
    with pytest.raises(ModelError, match="Flatten has no parameters"):
        ee.load(nn.Flatten(), (X,))
    with pytest.raises(ModelError, match=r"parameter 'linear.weight' is float16: .* module.float\(\)"):
        ee.load(Head().half(), (X.half(),))
    with pytest.raises(ModelError, match="is bfloat16"):
        ee.load(Head().bfloat16(), (X.bfloat16(),))
    with pytest.raises(ModelError, match="'weight' has no shape yet"):
        ee.load(nn.LazyLinear(3), (X,))
    with pytest.raises(ModelError, match="meta device"):
        ee.load(Head().to("meta"), (X,))
    with pytest.raises(ModelError, match="TorchScript"):
        ee.load(torch.jit.trace(Head(), X), (X,))
    with pytest.raises(ModelError, match=r"expected a torch.nn.Module, got a function"):
        from_module(lambda x: x, (X,))  # type: ignore[arg-type]
    module = Head()
    with torch.no_grad():
        module.linear.bias[1] = float("nan")
    with pytest.raises(ModelError, match=r"Head: .*linear.bias.*NaN"):
        ee.load(module, (X,))


def test_an_error_inside_leaves_the_module_alone() -> None:
    class Stubborn(Head):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("no such layer")

    module = Stubborn()
    module.linear.eval()
    with pytest.raises(ModelError, match=r"in Stubborn.forward: KeyError: 'no such layer'"):
        ee.load(module, (X,))
    assert module.training
    assert not module.linear.training


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_state_dicts_are_understood(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    state = {prefix + name: value + 1 for name, value in Head().state_dict().items()}
    torch.save(state if wrapper is None else {wrapper: state, "epoch": 3}, tmp_path / "w.pt")
    module = Head()
    load_weights(module, tmp_path / "w.pt")
    assert all(torch.equal(value, state[prefix + name]) for name, value in module.state_dict().items())


def test_safetensors_and_counters_that_are_not_there(tmp_path: Path) -> None:
    state = {name: value for name, value in nn.BatchNorm1d(3).state_dict().items() if value.ndim}
    save_file({name: value + 2 for name, value in state.items()}, tmp_path / "w.safetensors")
    module = nn.BatchNorm1d(3)
    load_weights(module, tmp_path / "w.safetensors")
    assert module.weight.tolist() == [3, 3, 3]


def test_a_module_called_module_keeps_its_prefix(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Head()

    state = Wrapped().state_dict()
    torch.save(state, tmp_path / "w.pt")
    taker = Wrapped()
    load_weights(taker, tmp_path / "w.pt")
    assert all(torch.equal(value, state[name]) for name, value in taker.state_dict().items())


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("you should not see this",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"linear.weight": torch.zeros(3, 4)}, r"1 missing \(linear.bias\)"),
        ({**Head().state_dict(), "aux.bias": torch.zeros(2)}, r"1 unexpected \(aux.bias\)"),
        ({"linear.weight": torch.zeros(3, 5), "linear.bias": torch.zeros(3)}, r"linear.weight \[3, 5\] for \[3, 4\]"),
        ({"fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3)}, r"2 missing .*2 unexpected .*did you mean"),
        ({"epoch": 3, "loss": 0.5}, r"'epoch' \(int\), 'loss' \(float\)"),
        ({}, "holds nothing"),
        (torch.zeros(3), "holds a Tensor: expected a state dict"),
        (Head(), r"Python objects besides tensors.*torch.save\(module.state_dict"),
        ({"state_dict": _Evil()}, "Python objects besides tensors"),
    ],
)
def test_weights_that_do_not_fit(content: Any, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(content, tmp_path / "w.pt")
    module = Head()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ModelError, match=says) as caught:
        load_weights(module, tmp_path / "w.pt")
    assert len(str(caught.value).splitlines()) == 1
    assert str(tmp_path / "w.pt") in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert capsys.readouterr().out == ""


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        load_weights(Head(), tmp_path / "absent.pt")
    with pytest.raises(ModelError, match="not a file"):
        load_weights(Head(), tmp_path)
    for name, content in {
        "a.pt": b"",
        "b.pt": b"hello, world",
        "c.safetensors": b"\0" * 20,
        "d.pt": pickle.dumps(np.zeros(3)),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=name):
            load_weights(Head(), tmp_path / name)
    torch.save(Head().state_dict(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:700])
    with pytest.raises(ModelError, match="damaged"):
        load_weights(Head(), tmp_path / "cut.pt")


@pytest.mark.parametrize(("example", "hinted"), [(torch.zeros(2, 4), True), (torch.zeros(2, 4).long(), False)])
def test_words_that_are_no_whole_numbers(example: Tensor, hinted: bool) -> None:
    module = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(15, 3))  # fails on either example
    with pytest.raises(ModelError, match="fails on the example inputs") as caught:
        from_module(module, (example,))
    assert ("whole numbers are --input NAME=1,24:int64" in str(caught.value)) is hinted
