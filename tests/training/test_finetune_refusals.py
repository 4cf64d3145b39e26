"""Fine-tuning: what is refused, and what the message says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eexform.backends import fx
from eexform.backends.fx import raise_to_fx
from eexform.errors import DataError, EexformError, ModelError, OptionError
from eexform.heads import with_parameters
from eexform.ir.graph import Graph
from eexform.training import network as network_module
from eexform.training.finetune_check import check_finetuning
from eexform.training.finetune_heads import with_new_heads
from eexform.training.finetune_options import FinetuneOptions
from eexform.training.network import Arithmetic, Network
from eexform.training.objectives import parse
from tests import tiny
from tests.training.multi_exit import flat, tune

CPU = Arithmetic(torch.device("cpu"), None, channels_last=True)
GATED = ("cross_entropy", "stick_breaking", "confidence_bce", "expected_cost:limit=0.5", "support")


@pytest.mark.parametrize("options", [{"strategy": "frozen"}, {"strategy": "mixed"}, {"strategy": "heads-then-joint"}])
def test_strategies_about_heads_on_a_graph_without_exits(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="is about heads, and the graph has no exits: take distill or joint"):
        tune(tmp_path, tiny.trained(), epochs=3, **options)


@pytest.mark.parametrize(
    ("loss", "message"),
    [(text, "needs a learned confidence at every exit") for text in GATED[1:]]
    + [("distill:teacher=final", "needs early exits")],
)
def test_terms_about_exits_on_a_graph_without_any(loss: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        tune(tmp_path, tiny.trained(), losses=("cross_entropy", loss))


@pytest.mark.parametrize("text", GATED[1:])
def test_gates_are_asked_for(text: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"'{parse(text).name}' needs a learned confidence at every exit"):
        tune(tmp_path, flat(), losses=(text,))


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(EexformError, match=r"epoch \d+.*not finite; lower the learning rates") as caught:
        tune(tmp_path, flat(), learning_rate=1e30, trunk_learning_rate=1e30, clip=0, optimiser="sgd")
    assert "exit" in str(caught.value)
    kept = list(tmp_path.rglob("*.safetensors"))
    assert ("is kept in" in str(caught.value)) == bool(kept), kept


def test_scores_that_are_not_finite_are_named(tmp_path: Path) -> None:
    graph = flat()
    bad = graph.copy()
    bad.constants["exit1.classifier.bias"].values = np.full(10, np.nan, np.float32)
    with pytest.raises(EexformError, match="exit 1 at "):
        tune(tmp_path, bad)


def test_too_little_data(tmp_path: Path) -> None:
    graph = flat()
    data = tiny.digits(300).bind(graph)
    few = data.splits.head_train
    assert len(few) > 2
    object.__setattr__(few, "indices", few.indices[:1])
    with pytest.raises(DataError, match="at least 2 are needed"):
        tune(tmp_path, graph, data=data)


def test_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_module, "raise_to_fx", lambda graph: raise_to_fx(graph).double())
    with pytest.raises(ModelError, match="a network is trained in float32"):
        Network(flat(), CPU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "thawed"}, "strategy: 'thawed' is not a choice"),
        ({"schedule": "steps"}, "schedule"),
        ({"optimiser": "lion"}, "optimiser"),
        ({"amp": "fp8"}, "amp"),
        ({"epochs": 0}, "epochs: 0 must be at least 1"),
        ({"strategy": "heads-then-joint", "epochs": 2, "head_epochs": 2}, "head_epochs: 2 must be"),
        ({"batch_size": 1}, "batch_size: 1"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"trunk_learning_rate": -1.0}, "trunk_learning_rate"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"weight_decay": float("inf")}, "weight_decay: inf must be a number"),
        ({"warmup": 1.0}, "warmup"),
        ({"clip": -1.0}, "clip"),
        ({"clip": float("inf")}, "clip: inf must be a number"),
        ({"ema": 1.0}, "ema"),
        ({"patience": -1}, "patience"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"seed": -1}, "seed"),
        ({"losses": ()}, "losses: expected a list"),
        ({"losses": "distill"}, "losses: expected a list"),
        ({"losses": ("hinge",)}, "no loss is called 'hinge'"),
        ({"exit_weights": "some"}, "neither uniform, linear or cost"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        FinetuneOptions(**options)


def test_options_survive_json() -> None:
    options = FinetuneOptions(losses=("distill:weight=2",), exit_weights="1/0/2")
    again = FinetuneOptions.from_json(json.loads(json.dumps(options.to_json())))
    assert again == options
    assert again.digest == options.digest != FinetuneOptions().digest
    with pytest.raises(OptionError, match=r"\['depth'\] are not known"):
        FinetuneOptions.from_json({"depth": 2})


def test_exit_weights_that_do_not_fit_the_graph(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="expected 3 numbers, the final exit's last, found 2"):
        tune(tmp_path, flat(), exit_weights="1/2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there() -> None:
    graph: Graph = flat()
    with pytest.raises(OptionError, match="device 'cuda' cannot be used here"):
        Arithmetic.choose(graph, "cuda", "auto")
    with pytest.raises(OptionError, match="float16 needs a CUDA device"):
        Arithmetic.choose(graph, "cpu", "float16")
    assert Arithmetic.choose(graph, "auto", "off") == CPU


def test_heads_that_were_rewritten_cannot_start_anew() -> None:
    graph = flat()
    first, *others = graph.exits
    cut = graph.replace(exits=[type(first)(**{**vars(first), "parameters": first.parameters[1:]}), *others])
    with pytest.raises(EexformError, match="it cannot start anew"):
        with_new_heads(cut, 0)
    assert with_parameters(cut, {}).exits == cut.exits


def test_an_operator_without_a_rule_shows_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = flat()
    assert "cpu" in check_finetuning(graph, FinetuneOptions(), labelled=True, device="cpu")
    monkeypatch.delitem(fx._OPS, "Relu")
    with pytest.raises(ModelError, match="'Relu' cannot be raised"):
        check_finetuning(graph, FinetuneOptions(), labelled=True, device="cpu")
