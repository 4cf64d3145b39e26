"""Operators with random attributes, shapes and types: the raised module against onnxruntime (see ``test_random``).

Where onnxruntime has no kernel, onnx's reference implementation is what counts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import torch
from hypothesis import assume, note
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from eexform.backends.fx import raise_to_fx
from eexform.backends.torch_types import to_array, to_tensor
from eexform.ir.graph import Graph

OPSET = 21
FLOATS, NUMBERS = ("float32", "float64"), ("float32", "float64", "int32", "int64")
BATCHES = (2, 1, 7, 0)
TOLERANCE = {"float16": (2e-2, 2e-3), "float32": (1e-4, 2e-5), "float64": (1e-6, 1e-7)}
"""Relative and absolute, by the type of the result."""


@dataclass
class Case:
    """One node.

    Attributes:
        op: the operator.
        operands: arrays; ``None`` is left out.
        attrs: attributes of the node.
        outputs: how many it has.
        opset: operator set.
        fixed: places of the operands that are constants, as in every real network.
        loose: factor of the tolerance, for sums of many rounded terms.
        reference: onnx's reference implementation is asked, not onnxruntime; the reason stands where this is set.
    """

    op: str
    operands: list[Any]
    attrs: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = OPSET
    fixed: tuple[int, ...] = ()
    loose: float = 1.0
    reference: bool = False


class Draw:
    """What a case draws its operands with."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))

    def pick(self, choices: Iterable[Any]) -> Any:
        return self.data.draw(st.sampled_from(list(choices)))

    def number(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def flag(self) -> bool:
        return self.data.draw(st.booleans())

    def numbers(self, count: int, low: int, high: int) -> list[int]:
        return [self.number(low, high) for _ in range(count)]

    def shape(self, low: int = 1, high: int = 4) -> tuple[int, ...]:
        """Axis 0, the batch, may be empty; no other axis is."""
        rank = self.number(low, high)
        return (self.pick(BATCHES), *self.numbers(rank - 1, 1, 4)) if rank else ()

    def array(self, shape: Iterable[int], kinds: Iterable[str] = NUMBERS) -> np.ndarray:
        """Numbers about zero; whole ones in integer types, with some equal ones among them."""
        values = self.random.normal(size=tuple(shape)) * 2
        kind = np.dtype(self.pick(kinds))
        if kind.kind == "b":
            return np.asarray(values > 0)
        values = np.round(np.abs(values) if kind.kind == "u" else values) if kind.kind in "iu" else values
        return np.asarray(values, kind)

    def weights(self, *shape: int, kind: Any = np.float32) -> np.ndarray:
        return np.asarray(self.random.normal(size=shape), kind)

    def axis(self, rank: int) -> int:
        return self.number(-rank, rank - 1)

    def axes(self, rank: int, least: int = 0) -> np.ndarray:
        """Some axes in any order, counted from either end."""
        chosen = self.data.draw(st.permutations(range(rank)))[: self.number(min(least, rank), rank)]
        return np.array([axis - rank if self.flag() else axis for axis in chosen], np.int64)

    def broadcast(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape that broadcasts to ``shape``."""
        kept = shape[self.number(0, len(shape)) :]
        return tuple(1 if self.number(0, 3) == 0 else size for size in kept)


def built(case: Case, computed: Iterable[bool], known: bool = False) -> Graph:
    """A graph of the node; operands are constants where not ``computed``, else inputs (of ``known`` sizes)."""
    tensors: list[gs.Tensor] = []
    for place, (array, fed) in enumerate(zip(case.operands, computed, strict=True)):
        if array is None:
            tensors.append(gs.Variable.empty())
        elif fed:
            sizes = list(array.shape) if known else [None] * array.ndim
            tensors.append(gs.Variable(f"x{place}", array.dtype, sizes))
        else:
            tensors.append(gs.Constant(f"x{place}", array))
    results = [gs.Variable(f"y{place}") for place in range(case.outputs)]
    node = gs.Node(case.op, name="the_node", attrs=case.attrs, inputs=tensors, outputs=results)
    inputs = [tensor for tensor in tensors if isinstance(tensor, gs.Variable) and not tensor.is_empty()]
    return Graph(gs.Graph(nodes=[node], inputs=inputs, outputs=results, opset=case.opset))


def expected(graph: Graph, feeds: dict[str, np.ndarray], reference: bool = False) -> list[np.ndarray]:
    """What onnxruntime, or the reference implementation, computes; cases that both refuse are not looked at."""
    model = gs.export_onnx(graph.gs, do_type_check=False)
    model.ir_version = 10
    for output in model.graph.output:
        output.ClearField("type")
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    try:
        typed = onnx.shape_inference.infer_shapes(model)
        if not reference:
            return list(ort.InferenceSession(typed.SerializeToString(), options).run(None, feeds))
    except ort.capi.onnxruntime_pybind11_state.NotImplemented:
        pass
    except Exception:  # onnxruntime's refusals are of many types
        assume(False)
    try:
        return [np.asarray(array) for array in ReferenceEvaluator(typed).run(None, feeds)]
    except Exception:
        assume(False)
    raise AssertionError("assume has returned")


def compare(case: Case, computed: list[bool], known: bool = False) -> None:
    """The raised module, a deep copy of it and the reference agree; gradients are finite."""
    case.operands = [None if array is None else np.asarray(array) for array in case.operands]
    graph = built(case, computed, known)
    fed = [array for array, is_fed in zip(case.operands, computed, strict=True) if is_fed and array is not None]
    wanted = expected(graph, dict(zip(graph.inputs, fed, strict=True)), case.reference)
    module = raise_to_fx(graph).eval()
    values = [to_tensor(array) for array in fed]
    for value in values:
        value.requires_grad_(value.is_floating_point())
    found, again = (_listed(held.forward(*values)) for held in (module, copy.deepcopy(module)))
    for result, repeated, right in zip(found, again, wanted, strict=True):
        array = to_array(result)
        assert array.dtype == right.dtype, (case.op, array.dtype, right.dtype)
        assert array.shape == right.shape, (case.op, array.shape, right.shape)
        relative, absolute = TOLERANCE.get(array.dtype.name, (0.0, 0.0))
        np.testing.assert_allclose(
            array, right, rtol=relative * case.loose, atol=absolute * case.loose, err_msg=case.op
        )
        np.testing.assert_array_equal(to_array(repeated), array)
    for value, array in zip(values, fed, strict=True):
        np.testing.assert_array_equal(to_array(value), array, err_msg=f"{case.op} wrote into its input")
    trained = [result.double()[torch.isfinite(result)].sum() for result in found if result.requires_grad]
    if trained:
        sum(trained).backward()
        for value in (*values, *module.parameters()):
            assert value.grad is None or bool(torch.isfinite(value.grad).all()), f"{case.op}: gradient is not finite"


def check(family: Callable[[Draw], Case], data: st.DataObject) -> None:
    """Draw one case of a family and compare it."""
    draw = Draw(data)
    case = family(draw)
    note(f"{case.op} {case.attrs} of {[None if held is None else np.shape(held) for held in case.operands]}")
    computed = [place == 0 or (place not in case.fixed and draw.flag()) for place in range(len(case.operands))]
    compare(case, computed, draw.flag())


def _listed(found: Any) -> list[torch.Tensor]:
    return list(found) if isinstance(found, tuple) else [found]
