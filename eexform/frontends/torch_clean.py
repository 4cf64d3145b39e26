"""What the exporter leaves behind, tidied: constants folded, names that a person can read, origins of nodes.

Without its optimiser the exporter keeps BatchNormalization and the names of the state dict, but every conversion it
considered stays in the graph, too (casts to the type that a value has, biases of zeros computed from shapes). Here the
library's own constant folding runs, restricted to what does not come from the state dict: no parameter is folded or
renamed. What is left is renamed after the module: ``layer1.0.relu_1`` instead of ``relu_14``.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir
import onnx_ir.passes.common as passes
from onnxscript.optimizer import fold_constants_ir
from torch import nn

from eexform.ir.provenance import Origin

_LIMIT = 1 << 24  # elements of a constant that folding may read or make
_END = np.iinfo(np.int64).max
_SCOPES = "pkg.torch.onnx.name_scopes"
_NUMBER = re.compile(r"_\d+$")


def tidy(model: onnx_ir.Model, module: nn.Module, output: str) -> dict[str, Origin]:
    """Fold, rename and strip ``model`` in place.

    Args:
        model: as exported, not optimised.
        module: what was exported; its state-dict names stay.
        output: new name of the graph's one output.

    Returns:
        Origin of each node by its new name.
    """
    passes.InlinePass()(model)
    graph = model.graph
    named = set(module.state_dict(keep_vars=True)) | {name for name, _ in module.named_buffers(remove_duplicate=False)}
    _merge_tied(graph, module)
    for _ in range(2):
        _fold(model, named)
        _drop_zero_biases(graph, named)
        _follow_batch(graph)
        _drop_whole_slices(graph)
    _keep_paddings(graph)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    found = _rename(graph, module, named, output)
    passes.ClearMetadataAndDocStringPass()(model)
    for value in graph.initializers.values():
        value.metadata_props.clear()
    model.metadata_props.clear()
    graph.metadata_props.clear()
    return found


def tied_names(module: nn.Module, kept: Collection[str]) -> dict[str, str]:
    """Other state-dict names of shared parameters and buffers, each with the name under which the graph has them.

    Args:
        module: the module.
        kept: names of the graph's constants.
    """
    tied: dict[str, str] = {}
    for names in _groups(module):
        first = next((name for name in names if name in kept), names[0])
        tied |= {name: first for name in names if name != first}
    return tied


def _groups(module: nn.Module) -> list[list[str]]:
    """State-dict names of each tensor that has several."""
    names: dict[int, list[str]] = {}
    for name, tensor in (
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ):
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _merge_tied(graph: onnx_ir.Graph, module: nn.Module) -> None:
    for names in _groups(module):
        present = [name for name in names if name in graph.initializers]
        for alias in present[1:]:
            onnx_ir.convenience.replace_all_uses_with(graph.initializers[alias], graph.initializers[present[0]])
            del graph.initializers[alias]
        if present and present[0] != names[0]:  # the exporter keeps the last name, torch's own listing the first
            value = graph.initializers.pop(present[0])
            value.name = names[0]
            if value.const_value is not None:
                value.const_value.name = names[0]
            graph.register_initializer(value)


def _fold(model: onnx_ir.Model, named: Collection[str]) -> None:
    """Constant folding without the rewrite rules that merge batch normalisation into its neighbours."""

    def allowed(node: onnx_ir.Node) -> bool | None:
        return False if any(value is not None and value.name in named for value in node.inputs) else None

    scopes = {value.name: node.metadata_props.get(_SCOPES) for node in model.graph for value in node.outputs}
    with np.errstate(divide="ignore", invalid="ignore"):  # a logarithm of 0, say, that torch.where does not choose
        fold_constants_ir(
            model, onnx_shape_inference=True, input_size_limit=_LIMIT, output_size_limit=_LIMIT, should_fold=allowed
        )
    for node in model.graph:  # a sequence of pieces has become one Split, made anew, with outputs NAME_split_0, ...
        origin = scopes.get((node.outputs[0].name or "").removesuffix("_split_0"))
        if node.op_type == "Split" and _SCOPES not in node.metadata_props and origin is not None:
            node.metadata_props[_SCOPES] = origin
    passes.IdentityEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)


def _drop_zero_biases(graph: onnx_ir.Graph, named: Collection[str]) -> None:
    """A convolution without bias was given one of zeros; as a parameter of its own it would be trained."""
    for node in graph:
        if node.op_type not in ("Conv", "ConvTranspose") or len(node.inputs) < 3:
            continue
        bias = node.inputs[2]
        if bias is None or bias.name in named or bias.const_value is None:
            continue
        if not np.any(bias.const_value.numpy()):
            node.resize_inputs(2)


def _follow_batch(graph: onnx_ir.Graph) -> None:
    """``Reshape`` to [batch, 64], with the batch read from a shape, becomes ``Reshape`` to [-1, 64].

    Equal wherever the first is defined: one size follows from all others and the number of elements. So the graph
    needs no shape arithmetic, which every tool behind it would have to follow.
    """
    for node in graph:
        if node.op_type != "Reshape" or node.inputs[1] is None or node.inputs[1].const_value is not None:
            continue
        target = node.inputs[1].producer()
        if target is None or target.op_type != "Concat":
            continue
        sizes: list[int] = []
        for piece in target.inputs:
            if piece is not None and piece.const_value is not None:
                sizes += piece.const_value.numpy().reshape(-1).tolist()
            elif piece is not None and piece.shape is not None and piece.shape.is_static() and piece.shape.dims == (1,):
                sizes.append(-1)
            else:
                break
        else:
            sizes = _resolved(sizes, node.outputs[0].shape)
            if sizes.count(-1) == 1 and min(size for size in (*sizes, 1) if size != -1) > 0:
                made = onnx_ir.Value(
                    name=f"{node.outputs[0].name}.shape",
                    const_value=onnx_ir.tensor(np.array(sizes, np.int64), name=f"{node.outputs[0].name}.shape"),
                    shape=onnx_ir.Shape([len(sizes)]),
                    type=onnx_ir.TensorType(onnx_ir.DataType.INT64),
                )
                graph.register_initializer(made)
                node.replace_input_with(1, made)


def _resolved(sizes: Sequence[int], traced: onnx_ir.Shape | None) -> list[int]:
    """``sizes``, each -1 that the exporter knows replaced: of ``x.view(x.shape[0], -1)`` only the batch is left."""
    if traced is None or len(traced) != len(sizes):
        return list(sizes)
    return [
        known if size == -1 and isinstance(known, int) else size for size, known in zip(sizes, traced.dims, strict=True)
    ]


def _drop_whole_slices(graph: onnx_ir.Graph) -> None:
    """``x[:, :, ::2]`` is written as one ``Slice`` per axis; those that take everything do nothing."""
    for node in graph:
        if node.op_type != "Slice":
            continue
        data = node.inputs[0]
        constants = [None if value is None else value.const_value for value in node.inputs[1:]]
        if data is None or any(constant is None for constant in constants):
            continue
        bounds = [constant.numpy().reshape(-1) for constant in constants if constant is not None]
        starts, ends, steps = bounds[0], bounds[1], bounds[3] if len(bounds) > 3 else np.ones(1)
        if not starts.any() and (ends == _END).all() and (steps == 1).all() and not node.outputs[0].is_graph_output():
            onnx_ir.convenience.replace_all_uses_with(node.outputs[0], data)


def _keep_paddings(graph: onnx_ir.Graph) -> None:
    """``Pad`` in front of ``MaxPool`` names its axes: onnxruntime merges others into the pooling, which pads with minus
    infinity where theirs is 0, and gives other numbers where values are negative."""
    for node in list(graph):
        pads = node.inputs[1] if node.op_type == "Pad" and len(node.inputs) in (2, 3) else None
        if pads is None or pads.const_value is None or not any(user.op_type == "MaxPool" for user in _readers(node)):
            continue
        name = f"{node.outputs[0].name}.axes"
        axes = np.arange(pads.const_value.size // 2)
        made = onnx_ir.Value(
            name=name,
            const_value=onnx_ir.tensor(axes, name=name),
            shape=onnx_ir.Shape([len(axes)]),
            type=onnx_ir.TensorType(onnx_ir.DataType.INT64),
        )
        graph.register_initializer(made)
        node.resize_inputs(4)
        node.replace_input_with(3, made)


def _readers(node: onnx_ir.Node) -> list[onnx_ir.Node]:
    return [use.node for use in node.outputs[0].uses()]


def _rename(graph: onnx_ir.Graph, module: nn.Module, named: Collection[str], output: str) -> dict[str, Origin]:
    """Names after the module path for values, nodes and generated constants; origins by new node name."""
    nodes = list(graph)
    known = [_origin(node) for node in nodes]
    paths = {path for path, _ in module.named_modules()}
    last = {origin: place for place, origin in enumerate(known) if origin is not None}
    taken = {value.name for value in graph.inputs} | set(named) | {output}
    final = graph.outputs[0]
    counts: Counter[str] = Counter()

    def free(stem: str) -> str:
        while True:
            name = stem if not counts[stem] else f"{stem}_{counts[stem]}"
            counts[stem] += 1
            if name not in taken:
                taken.add(name)
                return name

    names: list[str] = []
    for place, (node, origin) in enumerate(zip(nodes, known, strict=True)):
        stem = node.op_type.lower() if origin is None or origin.module not in paths else _stem(module, origin)
        if origin is not None and last[origin] != place:
            stem += f".{node.op_type.lower()}"
        names.append(free(stem))
    values = {id(value) for node in nodes for value in node.outputs}
    generated = [graph.initializers.pop(name) for name in list(graph.initializers) if name not in named]
    for node, name in zip(nodes, names, strict=True):
        node.name = name
        for position, value in enumerate(node.outputs):
            value.name = output if value is final else name if not position else free(name)
    for value in generated:
        user, position = next(iter(_users(value, nodes)))
        value.name = free(f"{user}.in{position}")
        if value.const_value is not None:
            value.const_value.name = value.name
        graph.register_initializer(value)
    assert id(final) in values, "the output is computed"
    return {name: origin for name, origin in zip(names, known, strict=True) if origin is not None}


def _users(value: onnx_ir.Value, nodes: Sequence[onnx_ir.Node]) -> Iterator[tuple[str, int]]:
    places: Mapping[int, int] = {id(node): place for place, node in enumerate(nodes)}
    uses = sorted((places.get(id(use.node), len(nodes)), use.idx, use.node.name or "") for use in value.uses())
    yield from ((name, position) for _, position, name in uses)


def _stem(module: nn.Module, origin: Origin) -> str:
    """Name for what a call computes: the path of a layer of torch's own, else path and operator."""
    part = module.get_submodule(origin.module)
    operator = _NUMBER.sub("", origin.fx_node).strip("_")
    if not origin.module:
        return operator
    whole = type(part).__module__.startswith("torch.nn.") and not any(part.children())
    return origin.module if whole else f"{origin.module}.{operator}"


def _origin(node: onnx_ir.Node) -> Origin | None:
    text = node.metadata_props.get(_SCOPES)
    if text is None:
        return None
    scopes = ast.literal_eval(text)
    if not scopes:
        return None
    return Origin(scopes[-2] if len(scopes) > 1 else "", scopes[-1])
