"""Adding nodes to an onnx-graphsurgeon draft: unique names under a prefix, and one call for operators that changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from eexform.errors import GraphError
from eexform.ir.types import Dim

Shape = Sequence[Dim] | None


class Emitter:
    """Appends nodes and constants to a draft graph.

    Every name starts with the emitter's prefix and is made unique among the names of the draft, so heads, measures and
    lowering can add what they need without looking. The draft is edited in place: it must be a copy of one's own.

    Attributes:
        draft: the graph that grows.
        prefix: put in front of every name, e.g. ``"exit0."``.
    """

    def __init__(self, draft: gs.Graph, prefix: str = "", *, _taken: set[str] | None = None) -> None:
        self.draft = draft
        self.prefix = prefix
        self._taken = _names(draft) if _taken is None else _taken

    @property
    def opset(self) -> int:
        return int(self.draft.opset)

    def scoped(self, prefix: str) -> Emitter:
        """An emitter on the same draft whose names carry ``prefix`` after this one's."""
        return Emitter(self.draft, self.prefix + prefix, _taken=self._taken)

    # -- names ------------------------------------------------------------------------------------------------------

    def unique(self, name: str) -> str:
        """``prefix + name``, with a number behind it where that is taken; the name is taken from now on."""
        wanted = self.prefix + name
        found, count = wanted, 1
        while found in self._taken:
            found, count = f"{wanted}_{count}", count + 1
        self._taken.add(found)
        return found

    # -- building blocks --------------------------------------------------------------------------------------------

    def constant(self, name: str, values: np.ndarray | np.generic | Sequence[int] | float) -> gs.Constant:
        """A constant; Python floats become float32, Python integers int64."""
        if isinstance(values, np.ndarray | np.generic):
            array = np.asarray(values)
        elif isinstance(values, float):
            array = np.asarray(values, dtype=np.float32)
        else:
            array = np.asarray(values, dtype=np.int64)
        return gs.Constant(self.unique(name), np.ascontiguousarray(array).reshape(array.shape))

    def nodes(
        self,
        op: str,
        inputs: Sequence[gs.Tensor],
        outputs: int,
        *,
        name: str = "",
        domain: str | None = None,
        **attrs: Any,
    ) -> list[gs.Variable]:
        """Append a node and return its ``outputs`` output values.

        The first value is named like the node with ``_out`` behind it; types are left to inference.
        """
        node_name = self.unique(name or op)
        values = [gs.Variable(self._unique_as_is(f"{node_name}_out{place or ''}")) for place in range(outputs)]
        self.draft.nodes.append(
            gs.Node(op=op, name=node_name, attrs=attrs, inputs=list(inputs), outputs=list(values), domain=domain)
        )
        return values

    def node(
        self,
        op: str,
        *inputs: gs.Tensor,
        name: str = "",
        shape: Shape = None,
        dtype: np.dtype | type | None = None,
        domain: str | None = None,
        **attrs: Any,
    ) -> gs.Variable:
        """Append a node with one output and return its value.

        Args:
            op: operator.
            inputs: values and constants.
            name: of the node, prefixed and made unique; the operator's name by default.
            shape: of the value, where known; the batch is ``"N"``.
            dtype: of the value; that of the first input by default.
            domain: operator domain, ONNX's own by default.
            attrs: attributes.
        """
        (value,) = self.nodes(op, inputs, 1, name=name, domain=domain, **attrs)
        value.dtype = dtype if dtype is not None else getattr(inputs[0], "dtype", None) if inputs else None
        value.shape = list(shape) if shape is not None else None
        return value

    def rename(self, value: gs.Variable, name: str) -> gs.Variable:
        """Give ``value`` exactly this name (no prefix).

        Raises:
            GraphError: the name is taken.
        """
        if name in self._taken:
            raise GraphError(f"cannot name a value {name!r}: the graph has that name already")
        self._taken.discard(value.name)
        self._taken.add(name)
        value.name = name
        return value

    def _unique_as_is(self, name: str) -> str:
        return Emitter(self.draft, _taken=self._taken).unique(name)

    # -- operators whose operands moved between opsets --------------------------------------------------------------

    def reduce(
        self,
        op: str,
        value: gs.Tensor,
        axes: Sequence[int],
        *,
        keepdims: bool = False,
        name: str = "",
        shape: Shape = None,
    ) -> gs.Variable:
        """``ReduceMean`` and its kin: ``axes`` are an attribute before opset 18 (``ReduceSum``: 13), an input since."""
        since = 13 if op == "ReduceSum" else 18
        if self.opset >= since:
            operand = self.constant((name or op) + ".axes", [int(axis) for axis in axes])
            return self.node(op, value, operand, name=name, shape=shape, keepdims=int(keepdims))
        return self.node(op, value, name=name, shape=shape, axes=[int(axis) for axis in axes], keepdims=int(keepdims))

    def squeeze(self, value: gs.Tensor, axes: Sequence[int], *, name: str = "", shape: Shape = None) -> gs.Variable:
        """``Squeeze``: remove axes of size 1."""
        return self.node(
            "Squeeze", value, self.constant((name or "Squeeze") + ".axes", list(axes)), name=name, shape=shape
        )

    def unsqueeze(self, value: gs.Tensor, axes: Sequence[int], *, name: str = "", shape: Shape = None) -> gs.Variable:
        """``Unsqueeze``: insert axes of size 1."""
        operand = self.constant((name or "Unsqueeze") + ".axes", list(axes))
        return self.node("Unsqueeze", value, operand, name=name, shape=shape)

    def clip(
        self, value: gs.Tensor, low: float | None, high: float | None, *, name: str = "", shape: Shape = None
    ) -> gs.Variable:
        """``Clip`` to ``[low, high]``; ``None`` leaves a side open."""
        label = name or "Clip"
        operands: list[gs.Tensor] = [value]
        if low is not None or high is not None:
            operands.append(gs.Variable.empty() if low is None else self.constant(label + ".low", float(low)))
        if high is not None:
            operands.append(self.constant(label + ".high", float(high)))
        return self.node("Clip", *operands, name=name, shape=shape)


def _names(draft: gs.Graph) -> set[str]:
    """Every node and value name of the draft, nested graphs included: they must not capture a new outer value."""
    taken: set[str] = set()
    for tensor in (*draft.inputs, *draft.outputs):
        taken.add(tensor.name)
    for node in draft.nodes:
        taken.add(node.name)
        taken.update(tensor.name for tensor in (*node.inputs, *node.outputs) if tensor.name)
        for attribute in node.attrs.values():
            if isinstance(attribute, gs.Graph):
                taken |= _names(attribute)
    taken.discard("")
    return taken
