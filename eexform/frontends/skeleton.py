"""A model without its big weights, for onnx's own tools: they copy a model several times and stop at 2 GB."""

from __future__ import annotations

import onnx

from eexform.frontends.external import is_external, tensors

_KEEP = 1024  # elements; shapes, axes and the like are smaller, and tools want to read those


def skeleton(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[onnx.TensorProto]]:
    """A copy in which big weights are inputs, and those weights (not copied)."""
    weights = [tensor for tensor in model.graph.initializer if _big(tensor)]
    names = {tensor.name for tensor in weights}
    graph = onnx.GraphProto(name=model.graph.name)
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name not in names)
    graph.sparse_initializer.extend(model.graph.sparse_initializer)
    graph.value_info.extend(value for value in model.graph.value_info if value.name not in names)
    listed = {value.name for value in graph.input}
    graph.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tuple(tensor.dims))
        for tensor in weights
        if tensor.name not in listed
    )
    bare = onnx.ModelProto(ir_version=max(model.ir_version, 4), graph=graph)
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    for tensor in tensors(bare.graph):
        if is_external(tensor):  # in an attribute: nothing but its type matters here
            kept = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0])
            tensor.CopyFrom(kept)
    return bare, weights


def check(model: onnx.ModelProto) -> None:
    """Onnx's checker on the skeleton; outputs may lack a shape (inference finds it).

    Raises:
        onnx.checker.ValidationError: the model breaks a rule of the standard.
    """
    bare, _ = skeleton(model)
    for value in bare.graph.output:
        if value.type.HasField("tensor_type") and not value.type.tensor_type.HasField("shape"):
            value.type.tensor_type.shape.SetInParent()
    onnx.checker.check_model(bare)


def _big(tensor: onnx.TensorProto) -> bool:
    count = 1
    for dim in tensor.dims:
        count *= dim
    return count > _KEEP or is_external(tensor)
