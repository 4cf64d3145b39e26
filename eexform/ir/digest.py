"""Digests: full sha-256 of what a graph computes with, never of how a file lays it out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from eexform.ir.graph import Graph
from eexform.ir.inference import element_type
from eexform.ir.serialize import opset_versions


def digest(graph: Graph) -> str:
    """Sha-256 (hex) of nodes, names, attributes, constants, inputs, outputs, opset, exits and kind of scores.

    The same for any order of the nodes, and after saving and loading. Metadata is left out. Weights are hashed in
    place: no second copy of them is made.
    """
    hasher = hashlib.sha256(b"eexform graph 1\0")
    _feed(hasher, "opset", sorted(opset_versions(graph.gs).items()))
    _feed(hasher, "scores", graph.scores)
    _feed(hasher, "exits", [exit_.to_json() for exit_ in graph.exits])
    hasher.update(_body(graph.gs, {}))
    return hasher.hexdigest()


def digest_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """Sha-256 (hex) of named arrays: names, types, shapes and contents; the order of the mapping does not matter."""
    hasher = hashlib.sha256(b"eexform arrays 1\0")
    for name in sorted(arrays):
        _feed(hasher, "array", name)
        hasher.update(_array(np.asarray(arrays[name])))
    return hasher.hexdigest()


def _body(body: gs.Graph, seen: dict[int, bytes]) -> bytes:
    hasher = hashlib.sha256()
    constants: dict[str, bytes] = {}
    nodes = []
    for node in body.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant) and tensor.name not in constants:
                key = id(tensor._values)  # arrays live as long as the graph, so ids do not repeat
                if key not in seen:
                    seen[key] = _constant(tensor)
                constants[tensor.name] = seen[key]
        nodes.append(_node(node, seen))
    _feed(hasher, "inputs", [_declared(tensor) for tensor in body.inputs])
    _feed(hasher, "outputs", [tensor.name for tensor in body.outputs])
    for encoded in sorted(nodes):
        hasher.update(encoded)
    for name in sorted(constants):
        _feed(hasher, "constant", name)
        hasher.update(constants[name])
    return hasher.digest()


def _node(node: gs.Node, seen: dict[int, bytes]) -> bytes:
    hasher = hashlib.sha256()
    domain = "" if node.domain in (None, "ai.onnx") else node.domain
    _feed(hasher, "node", [domain, node.op, node.name])
    _feed(hasher, "in", _without_trailing_gaps([tensor.name for tensor in node.inputs]))
    _feed(hasher, "out", _without_trailing_gaps([tensor.name for tensor in node.outputs]))
    for key in sorted(node.attrs):
        value = node.attrs[key]
        _feed(hasher, "attribute", key)
        if isinstance(value, gs.Graph):
            hasher.update(_body(value, seen))
        elif isinstance(value, gs.Constant):
            hasher.update(_constant(value))
        else:
            _feed(hasher, "value", _plain(value))
    return hasher.digest()


def _constant(constant: gs.Constant) -> bytes:
    values = constant._values
    if isinstance(values, np.ndarray):
        return _array(values)
    proto = values.tensor
    if isinstance(proto, onnx.TensorProto) and proto.data_type == onnx.TensorProto.STRING:
        hasher = hashlib.sha256()
        _feed(hasher, "strings", [list(proto.dims), [item.hex() for item in proto.string_data]])
        return hasher.digest()
    return _array(np.asarray(values.load()))


def _array(array: np.ndarray) -> bytes:
    hasher = hashlib.sha256()
    _feed(hasher, "dtype", [element_type(array.dtype), list(array.shape)])
    if array.dtype.kind == "O":
        _feed(hasher, "strings", [str(item) for item in array.reshape(-1)])
    elif array.dtype.byteorder == ">":
        hasher.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    elif array.size:
        hasher.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return hasher.digest()


def _declared(tensor: gs.Tensor) -> list[Any]:
    shape = None if tensor.shape is None else [dim if dim is None else _plain(dim) for dim in tensor.shape]
    return [tensor.name, element_type(tensor.dtype), shape]


def _plain(value: Any) -> Any:
    """An attribute as it reads after a trip through a file: single precision, lists, element types as numbers."""
    if isinstance(value, (type, np.dtype)):
        return element_type(value)
    if isinstance(value, (bool, int, np.integer, np.bool_)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(np.float32(value)).hex()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    return str(value)


def _without_trailing_gaps(names: list[str]) -> list[str]:
    while names and not names[-1]:
        names.pop()
    return names


def _feed(hasher: Any, tag: str, value: Any) -> None:
    """Add a tagged plain value; the length in front keeps neighbours apart."""
    encoded = json.dumps([tag, value], sort_keys=True, ensure_ascii=True).encode()
    hasher.update(len(encoded).to_bytes(8, "little") + encoded)
