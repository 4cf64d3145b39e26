"""Making the batch symbolic: renaming it where the model has a symbol, freeing it where the model was exported for one.

A fixed batch is freed only with a proof, node by node: sizes inferred for two batches must scale on one axis, and every
operator on the way must keep samples apart (:mod:`eexform.frontends.rows`). Then each row of the output depends on its
own sample alone, and since nothing changes at the exported batch, the freed network computes the same for every sample.
What exporters bake in is repaired on the way (:mod:`eexform.frontends.repairs`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import onnx_graphsurgeon as gs

from eexform.errors import ModelError, suggest
from eexform.frontends import frames, rows
from eexform.frontends.repairs import repair
from eexform.ir.graph import BATCH
from eexform.ir.inference import Inference, InferenceError, split_dim


def make_symbolic(draft: gs.Graph) -> None:
    """Call the batch ``"N"`` in every input, in place, and make it free where it was a number.

    Raises:
        ModelError: shapes are missing, or a node forbids another batch size (named).
    """
    _name_unknown_dims(draft)
    fixed = _rename_batch(draft)
    if fixed is not None:
        for tensor in draft.inputs:
            if tensor.shape and tensor.shape[0] == fixed:
                tensor.shape = [BATCH, *tensor.shape[1:]]
    _walk(draft, fixed)


def with_shapes(model: onnx.ModelProto, given: Mapping[str, Sequence[int | str]]) -> onnx.ModelProto:
    """The model with input shapes filled in (a copy where something is given).

    Raises:
        ModelError: an input has no shape and none is given, or what is given does not fit.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: value for value in model.graph.input if value.name not in constants}
    for name, shape in given.items():
        if name not in inputs:
            raise ModelError(f"--shape (input_shapes): the model has no input {name!r}: {suggest(name, inputs)}")
        old = inputs[name].type.tensor_type
        dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in old.shape.dim]
        if old.HasField("shape") and not _fits(dims, shape):
            listed = [dim.dim_param or dim.dim_value or "?" for dim in old.shape.dim]
            raise ModelError(
                f"--shape (input_shapes): {list(shape)} does not fit input {name!r}, whose shape is {listed}"
            )
    for name, value in inputs.items():
        tensor = value.type.tensor_type
        if value.type.WhichOneof("value") == "tensor_type" and not tensor.HasField("shape") and name not in given:
            raise ModelError(
                f"input {name!r} has no shape in the model: give it, batch first: --shape {name}=N,... "
                f"(in Python input_shapes={{{name!r}: ['N', ...]}})"
            )
    if not given:
        return model
    filled = onnx.ModelProto()
    filled.CopyFrom(model)
    for value in filled.graph.input:
        if value.name in given:
            element = value.type.tensor_type.elem_type
            value.type.CopyFrom(onnx.helper.make_tensor_type_proto(element, list(given[value.name])))
    return filled


def _fits(old: Sequence[int | None], new: Sequence[int | str]) -> bool:
    return len(old) == len(new) and all(a is None or a == b for a, b in zip(old, new, strict=True))


def _name_unknown_dims(draft: gs.Graph) -> None:
    for tensor in draft.inputs:
        if tensor.shape is None or tensor.dtype is None:
            raise ModelError(f"input {tensor.name!r} is not a tensor; eexform handles models whose inputs are tensors")
        tensor.shape = [
            dim if (isinstance(dim, str) and dim) or (isinstance(dim, int) and dim >= 0) else f"{tensor.name}.{axis}"
            for axis, dim in enumerate(tensor.shape)
        ]
        if 0 in tensor.shape[1:]:
            raise ModelError(f"input {tensor.name!r} has an empty dimension: {list(tensor.shape)}")


def _rename_batch(draft: gs.Graph) -> int | None:
    """Rename the batch's symbols to ``"N"``; the exported batch size where it is a number everywhere.

    The batch is the first dimension of the inputs, unless the declared output starts with a symbol that an input has
    elsewhere (time-first layouts).
    """
    carriers = [tensor for tensor in draft.inputs if tensor.shape]
    if not carriers:
        raise ModelError("no input has a batch dimension (the model has no tensor input)")
    symbols = {dim for tensor in carriers for dim in tensor.shape if isinstance(dim, str)}
    declared = draft.outputs[0].shape if isinstance(draft.outputs[0], gs.Variable) else None
    named = declared[0] if declared and declared[0] in symbols else None
    batch = {t.shape[0] for t in carriers if isinstance(t.shape[0], str)} if named is None else {named}
    if named is not None:
        # Inputs without that symbol have a batch of another name.
        batch |= {t.shape[0] for t in carriers if named not in t.shape and isinstance(t.shape[0], str)}
    if not batch:
        sizes = {tensor.shape[0] for tensor in carriers}
        if len(sizes) > 1:
            listing = ", ".join(f"{tensor.name!r} {list(tensor.shape)}" for tensor in carriers)
            raise ModelError(
                f"the inputs have different first dimensions, so the batch cannot be told: {listing}; "
                "export the model with a symbolic batch"
            )
        _rename(draft, {BATCH: f"{BATCH}_"} if BATCH in symbols else {})
        return int(sizes.pop())
    new = dict.fromkeys(batch, BATCH)
    if BATCH in symbols - batch:
        new[BATCH] = f"{BATCH}_"
    _rename(draft, new)
    return None


def _rename(draft: gs.Graph, new: Mapping[str, str]) -> None:
    """Rename symbols wherever a shape is declared (inputs, outputs, outputs of custom operators)."""

    def renamed(dim: object) -> object:
        if not isinstance(dim, str):
            return dim
        factor, symbol = split_dim(dim)
        symbol = new.get(symbol, symbol)
        return symbol if factor == 1 else f"{factor}*{symbol}"

    seen: set[int] = set()
    for tensor in (*draft.inputs, *draft.outputs, *(t for node in draft.nodes for t in node.outputs)):
        if isinstance(tensor, gs.Variable) and tensor.shape is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            tensor.shape = [renamed(dim) for dim in tensor.shape]


def _walk(draft: gs.Graph, fixed: int | None) -> None:
    """Infer node by node, repairing and judging each; then write down what the outputs are."""
    walk = Inference(draft)
    done: list[gs.Node] = []
    for node in draft.nodes:
        try:
            for extra in repair(node, walk, fixed):
                walk.step(extra)
                done.append(extra)
            walk.step(node)
        except InferenceError as error:
            if fixed is None:
                raise
            raise ModelError(
                f"the model was exported for a batch of {fixed} and cannot be freed from it: {error}; export it with a "
                "symbolic batch"
            ) from error
        done.append(node)
        verdict = rows.judge(node, walk)
        if verdict is not None and (verdict.mixes or fixed is not None):
            start = (
                "samples of a batch influence one another"
                if verdict.mixes
                else f"the model was exported for a batch of {fixed} and it cannot be shown that another batch is safe"
            )
            advice = (
                "early exits need samples to be independent" if verdict.mixes else "export it with a symbolic batch"
            )
            raise ModelError(f"{start}: node {node.name!r} ({node.op}) {verdict.why}; {advice}")
    draft.nodes = frames.batch_first(done, walk)
    for tensor in draft.outputs:
        if fixed is not None and walk.type(tensor.name).batch_axis != 0:
            raise ModelError(
                f"the model was exported for a batch of {fixed}; with the batch free its output {tensor.name!r} is "
                f"{walk.type(tensor.name)}, not [{BATCH}, classes]: export it with a symbolic batch"
            )
        known = walk.type(tensor.name)
        if known.dtype is not None:
            tensor.dtype = known.dtype
        if known.shape is not None:
            tensor.shape = list(known.shape)
