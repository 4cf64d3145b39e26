"""Finding the classifier in a model: its output, and whether that holds logits or probabilities."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from eexform.errors import ModelError, suggest
from eexform.ir.exits import Scores
from eexform.ir.graph import BATCH, Graph
from eexform.ir.inference import element_type, numpy_type

_TRANSPARENT = {"Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast", "Dropout"}


def choose_output(draft: gs.Graph, output: str | None) -> None:
    """Leave the classifier's output as the only one, in place.

    Raises:
        ModelError: there is no such output, or several could be the classifier.
    """
    tensors = {tensor.name: tensor for tensor in draft.outputs}
    if output is not None:
        if output not in tensors:
            raise ModelError(f"the model has no output {output!r}: {suggest(output, tensors)}")
        draft.outputs = [tensors[output]]
        return
    if not tensors:
        raise ModelError("the model has no output")
    if len(tensors) > 1:
        fitting = [name for name, tensor in tensors.items() if _could_be_scores(tensor)]
        if len(fitting) != 1:
            listing = ", ".join(f"{name!r} {_declared(tensor)}" for name, tensor in tensors.items())
            raise ModelError(
                f"the model has {len(tensors)} outputs and {'none' if not fitting else 'several'} could be the class "
                f"scores [batch, classes]: {listing}; name it with --output (in Python output=)"
            )
        tensors = {fitting[0]: tensors[fitting[0]]}
    draft.outputs = list(tensors.values())


def check_outputs(graph: Graph) -> None:
    """The outputs are class scores ``[N, K]`` in floating point, with the same ``K`` >= 2.

    Raises:
        ModelError: says what the output is instead.
    """
    classes = set()
    for name in graph.outputs:
        known = graph.types[name]
        what = f"output {name!r} is {known}, not class scores: expected a float tensor [{BATCH}, classes]"
        if known.shape is None:
            raise ModelError(f"{what}; its shape cannot be told (custom operators or control flow before it)")
        if known.dtype is not None and not np.issubdtype(known.dtype, np.floating):
            raise ModelError(f"{what}; give the model with its scores rather than the predicted label")
        if len(known.shape) != 2 or known.batch_axis != 0:
            hint = ""
            if len(known.shape) > 2 and known.batch_axis == 0:
                hint = "; a detector or a segmenter has no exits of this kind, for a classifier add a Flatten"
            raise ModelError(what + hint)
        if not isinstance(known.shape[1], int):
            raise ModelError(f"{what}; the number of classes must be fixed")
        if known.shape[1] < 2:
            raise ModelError(f"{what} with at least 2 classes; a single score (binary or regression) has no confidence")
        classes.add(known.shape[1])
    if len(classes) > 1:
        raise ModelError(f"the exits disagree about the number of classes: {sorted(classes)}")


def scores_of(graph: Graph, given: Scores | None) -> Scores:
    """Whether the output holds logits or probabilities, seen from the operator that makes it.

    ``Softmax`` over the classes makes probabilities; ``LogSoftmax`` counts as logits (a softmax of it gives the same
    probabilities back); anything else makes logits.

    Raises:
        ModelError: it ends in ``Sigmoid``: one model for many independent labels.
    """
    if given is not None:
        if given not in ("logits", "probabilities"):
            raise ModelError(f"scores={given!r}: choose 'logits' or 'probabilities'")
        return given
    producers = {tensor.name: node for node in graph.nodes for tensor in node.outputs}
    node = producers.get(graph.final)
    while node is not None and node.op in _TRANSPARENT and node.domain in (None, "", "ai.onnx"):
        node = producers.get(node.inputs[0].name)
    if node is None or node.domain not in (None, "", "ai.onnx"):
        return "logits"
    if node.op in ("Sigmoid", "HardSigmoid"):
        raise ModelError(
            f"output {graph.final!r} comes from node {node.name!r} ({node.op}): independent labels, not one class per "
            "sample, so 'the most likely class' and its confidence mean nothing. If the classes do exclude each other, "
            "give --scores probabilities (in Python scores='probabilities')"
        )
    if node.op == "Exp":
        before = producers.get(node.inputs[0].name)
        return "probabilities" if before is not None and before.op == "LogSoftmax" else "logits"
    return "probabilities" if node.op == "Softmax" else "logits"


def _could_be_scores(tensor: gs.Tensor) -> bool:
    dtype = numpy_type(element_type(tensor.dtype))
    floating = dtype is None or np.issubdtype(dtype, np.floating)
    return floating and tensor.shape is not None and len(tensor.shape) == 2


def _declared(tensor: gs.Tensor) -> str:
    shape = "?" if tensor.shape is None else list(tensor.shape)
    return f"{numpy_type(element_type(tensor.dtype)) or '?'}{shape}"
