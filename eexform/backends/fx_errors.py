"""What is said where a node cannot be raised (see :mod:`eexform.backends.fx`): node, operator, opset, what to do."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx_graphsurgeon as gs

from eexform.errors import ModelError, suggest

STANDARD = (None, "", "ai.onnx")
_WAY_OUT = "register a rule with eexform.backends.fx.op"


def key_of(node: gs.Node) -> str:
    """Name under which the node's rule is registered."""
    return node.op if node.domain in STANDARD else f"{node.domain}::{node.op}"


def unknown(graph: gs.Graph, node: gs.Node, known: Iterable[str]) -> ModelError:
    """There is no rule for the operator."""
    key = key_of(node)
    return ModelError(
        f"node {node.name!r}: operator {key!r} cannot be raised to torch ({suggest(key, known)}); "
        f"it is {_version(graph, node)}; {_WAY_OUT}"
    )


def refused(graph: gs.Graph, node: gs.Node, error: Exception) -> ModelError:
    """There is a rule, and it does not know this form of the operator, or the node is not what the operator is."""
    text = str(error)
    if isinstance(error, ModelError) and _WAY_OUT in text:  # of a node in a branch
        return error
    if not isinstance(error, ModelError):
        missing = isinstance(error, KeyError) and _lacks(graph, node, error.args[0])
        what = f"attribute {error} is missing" if missing else f"{type(error).__name__}: {text}"
        text = (
            f"its rule fails ({what}); either the node is not valid ONNX, which onnx.checker.check_model tells, or the "
            "rule is wrong"
        )
    named = text if text.startswith("node ") else f"node {node.name!r} ({node.op}): {text}"
    return ModelError(f"{named}; {key_of(node)!r} is {_version(graph, node)}; {_WAY_OUT}")


def _lacks(graph: gs.Graph, node: gs.Node, name: object) -> bool:
    """Whether ``name`` is an attribute of the operator that the node does not have."""
    if name in node.attrs or node.domain not in STANDARD:
        return False
    try:
        return name in onnx.defs.get_schema(node.op, graph.opset).attributes
    except onnx.defs.SchemaError:
        return False


def _version(graph: gs.Graph, node: gs.Node) -> str:
    if node.domain in STANDARD:
        return f"of opset {graph.opset}"
    versions = [item.version for item in graph.import_domains or () if item.domain == node.domain]
    return f"of version {versions[0]} of its domain" if versions else "of a domain that the model does not import"
