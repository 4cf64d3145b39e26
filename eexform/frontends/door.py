"""One way in for everything: the path of an ONNX file, an ONNX model in memory, or a PyTorch module."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from eexform.errors import ModelError, OptionError
from eexform.frontends import onnx as onnx_door
from eexform.ir.exits import Scores
from eexform.ir.graph import Graph

if TYPE_CHECKING:
    from torch import nn


def load(
    source: str | Path | onnx.ModelProto | nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    scores: Scores | None = None,
    output: str | int | None = None,
    input_shapes: Mapping[str, Sequence[int | str]] | None = None,
    min_opset: int | None = None,
) -> Graph:
    """Load a trained classifier.

    Args:
        source: path of an ``.onnx`` file, an ``onnx.ModelProto``, or a ``torch.nn.Module``.
        example_inputs: for a module: what its ``forward`` takes, a tuple of tensors or a mapping of keyword arguments
            (see :func:`eexform.frontends.torch.from_module`).
        scores: whether the output holds logits or probabilities; by default seen from the graph.
        output: the classifier's output where there are several: its name; for a module also an index.
        input_shapes: for ONNX: shapes by input name, batch first, for models that do not say them.
        min_opset: convert ONNX up to this operator set where it is older (17), or export a module with it (20).

    Raises:
        ModelError: the source cannot be read or exported, or is no classifier that eexform can handle.
        OptionError: an argument does not go with the source.
    """
    if isinstance(source, (str, os.PathLike, onnx.ModelProto)):
        if example_inputs is not None:
            raise OptionError("example_inputs is for PyTorch modules: an ONNX model says what it takes, leave it out")
        if isinstance(output, int):
            raise OptionError(f"output={output}: an ONNX model's outputs go by name")
        options: dict[str, Any] = {"scores": scores, "output": output, "input_shapes": input_shapes}
        if min_opset is not None:
            options["min_opset"] = min_opset
        if isinstance(source, onnx.ModelProto):
            return onnx_door.from_model(source, **options)
        return onnx_door.load(Path(source), **options)
    torch = sys.modules.get("torch")  # who has a module has imported it
    if torch is None or not isinstance(source, torch.nn.Module):
        raise ModelError(
            f"cannot load a {type(source).__name__}: expected the path of an .onnx file, an onnx.ModelProto or a "
            "torch.nn.Module"
        )
    if example_inputs is None:
        raise OptionError(
            f"a module does not say what it takes: ee.load({type(source).__name__.lower()}, example_inputs=(x,)) with "
            "tensors, batch first"
        )
    if input_shapes:
        raise OptionError("input_shapes is for ONNX models: a module's shapes are those of example_inputs")
    from eexform.frontends.torch import OPSET, from_module

    return from_module(source, example_inputs, scores=scores, output=output, opset=min_opset or OPSET)
