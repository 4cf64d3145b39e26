"""Put stored parameters in place of a graph's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from eexform.errors import OptionError, PassError, need, suggest
from eexform.ir.digest import digest_arrays
from eexform.ir.graph import Graph
from eexform.passes._contract import Pass, PassContext, PassResult, Skip
from eexform.passes._exits import refresh_exits
from eexform.pruning.repair_layers import outputs_of
from eexform.tunables import parameter

BIASED = ("Conv", "ConvTranspose", "Gemm")
"""Operators whose third input is a bias that may be left out."""


@dataclass(frozen=True)
class SetParameters(Pass):
    """Put stored arrays in place of the constants of the same names.

    The arrays come from ``context.arrays``, in a plan from the file beside it. This is how a plan holds what was
    computed from data: passes that do so give this one as their replay.
    """

    name: ClassVar[str] = "set_parameters"
    keeps_structure: ClassVar[bool] = True

    digest: str = parameter(help="of the stored arrays (sha-256)")
    biases: Mapping[str, str] = parameter(
        default={}, help="node = name of the stored array that becomes its bias, where it had none"
    )

    def __post_init__(self) -> None:
        plain = isinstance(self.digest, str) and len(self.digest) == 64 and set(self.digest) <= set("0123456789abcdef")
        need(plain, f"digest: {self.digest!r} is not a sha-256 in hex", OptionError)
        object.__setattr__(self, "biases", {str(node): str(name) for node, name in self.biases.items()})

    @classmethod
    def of(
        cls, arrays: Mapping[str, np.ndarray], biases: Mapping[str, str] | None = None
    ) -> tuple[SetParameters, dict[str, Mapping[str, np.ndarray]]]:
        """The pass that sets ``arrays``, and what it needs in ``context.arrays``.

        Args:
            arrays: by constant name.
            biases: as the parameter.
        """
        digest = digest_arrays(arrays)
        return cls(digest, dict(biases or {})), {digest: dict(arrays)}

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        arrays = context.arrays.get(self.digest)
        need(
            arrays is not None,
            f"the parameters {self.digest[:12]} are not stored here: name the plan's weights in the recipe "
            '(weights = "plan.safetensors")',
        )
        return PassResult(*put(graph, arrays or {}, self.biases))


def put(
    graph: Graph, arrays: Mapping[str, np.ndarray], biases: Mapping[str, str] | None = None
) -> tuple[Graph, bool, tuple[Skip, ...]]:
    """``graph`` with ``arrays`` in place of its constants, whether that changed it, and what was skipped.

    Args:
        graph: the graph; its own arrays are left alone.
        arrays: by constant name; shape and type as the constant's.
        biases: node = array that becomes its bias; the array's name must be new, or that of the bias it has.

    Raises:
        PassError: a constant does not exist or has another shape or type, or a node cannot take a bias.
    """
    biases = biases or {}
    draft = graph.copy().gs
    nodes = {node.name: node for node in draft.nodes}
    fresh = {}
    for node_name, name in biases.items():
        if node_name not in nodes:
            raise PassError(f"the graph has no node {node_name!r}: {suggest(node_name, nodes)}")
        need(name in arrays, f"the bias {name!r} of {node_name!r} is not among the stored arrays")
        if name not in graph.constants:
            _add_bias(nodes[node_name], name, arrays[name], graph)
            fresh[name] = node_name
    held = {name: graph.constants[name] for name in graph.parameters()}  # sizes and indices are no parameters
    for name, values in arrays.items():
        if name in fresh:
            continue
        if name not in held:
            raise PassError(f"the graph has no parameter {name!r}: {suggest(name, held)}")
        shape, kind = tuple(held[name].shape), np.dtype(held[name].dtype)
        need(
            tuple(values.shape) == shape and values.dtype == kind,
            f"parameter {name!r} is {kind} {list(shape)}, what is stored for it is {values.dtype} "
            f"{list(values.shape)}; was the plan made from this model?",
        )
    different = {
        name: values
        for name, values in arrays.items()
        if name not in fresh and not np.array_equal(held[name].values, values)
    }
    if not different and not fresh:
        return graph, False, (Skip("graph", "it holds these parameters already"),)
    replaced: dict[str, gs.Constant] = {}
    for node in draft.nodes:
        for place, tensor in enumerate(node.inputs):
            if isinstance(tensor, gs.Constant) and tensor.name in different:
                if tensor.name not in replaced:
                    replaced[tensor.name] = gs.Constant(tensor.name, different[tensor.name])
                node.inputs[place] = replaced[tensor.name]
    made = graph.replace(draft)
    if not fresh:
        made.__dict__["types"] = graph.types  # the same names, shapes and types
    return refresh_exits(graph, made), True, ()


def empty_bias(node: gs.Node) -> np.ndarray:
    """Zeros of the shape and type that a bias of ``node`` has.

    Raises:
        PassError: its operator takes none, or its weight is computed, so that nothing says how long it is.
    """
    need(
        node.op in BIASED and not node.domain,
        f"{node.op} {node.name!r} takes no bias; those that do are {', '.join(BIASED)}",
    )
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if not isinstance(weight, gs.Constant):
        raise PassError(f"the weight of {node.op} {node.name!r} is computed; nothing says how long its bias is")
    return np.zeros(outputs_of(node), weight.dtype)


def _add_bias(node: gs.Node, name: str, values: np.ndarray, graph: Graph) -> None:
    need(name not in graph.tensors, f"a bias cannot be called {name!r}: the graph has another value of that name")
    expected = empty_bias(node)
    absent = len(node.inputs) < 3 or node.inputs[2].is_empty()
    need(absent, f"{node.op} {node.name!r} has a bias already: {node.inputs[-1].name!r}")
    need(
        values.shape == expected.shape and values.dtype == expected.dtype,
        f"the bias {name!r} of {node.name!r} must be {expected.dtype} {list(expected.shape)}, what is stored for it is "
        f"{values.dtype} {list(values.shape)}; was the plan made from this model?",
    )
    node.inputs = [*node.inputs[:2], gs.Constant(name, values)]
    if node.op == "Gemm":
        node.attrs["beta"] = 1.0
