"""The zoo's modules as graphs, through both doors; each made once per process: treat them as constants."""

from __future__ import annotations

import tempfile
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

import eexform as ee
from eexform.ir.graph import Graph
from tests.zoo import modules
from tests.zoo.torch_transformers import Bert

DOORS = ("torch", "onnx")


@cache
def module(name: str) -> torch.nn.Module:
    """The network; evaluate it, leave it as it is."""
    return modules.module(name)


@cache
def exported(name: str) -> onnx.ModelProto:
    """What torch's own exporter makes of the network by default, batch dynamic."""
    batch = torch.export.Dim("batch", min=1, max=1024)
    args = modules.inputs(name, 2, seed=2)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            _plain(modules.module(name)),
            args,
            path,
            dynamo=True,
            dynamic_shapes=tuple({0: batch} for _ in args),
            verbose=False,
            external_data=False,
        )
        return onnx.load(path)


def _plain(made: torch.nn.Module) -> torch.nn.Module:
    """The module with its dataclass as a dictionary: torch's exporter takes no classes that it has not been told of."""
    if isinstance(made, Bert):
        forward = made.forward
        made.forward = lambda input_ids, attention_mask: vars(forward(input_ids, attention_mask))
    return made


@cache
def graph(name: str, door: str) -> Graph:
    """The network through one of the doors."""
    if door == "torch":
        return ee.load(modules.module(name), example_inputs=modules.inputs(name, 2, seed=2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(exported(name), path)
        return ee.load(path, output=_output(name))


def _output(name: str) -> str | None:
    """The first output's name where there are several; a dataclass' fields are anonymous in an exported file."""
    outputs = exported(name).graph.output
    return outputs[0].name if len(outputs) > 1 else None


def feeds(graph: Graph, args: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
    """A module's arguments by the names of the graph's inputs."""
    return {key: value.numpy() for key, value in zip(graph.inputs, args, strict=True)}


@torch.no_grad()
def answers(name: str, args: tuple[Tensor, ...]) -> np.ndarray:
    """What the module says, [N, classes]."""
    return modules.logits(module(name)(*args)).numpy()
