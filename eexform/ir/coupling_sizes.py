"""What shape arithmetic computes, element by element, and how such an operand is mended after a cut.

``Shape -> Gather -> Concat -> Reshape`` chains hand sizes from one value to another. Each element of such a vector is
a number that the file holds, the size of one axis of one value (which follows a cut by itself), or something computed
from sizes (which follows too, but nobody says how). Rules ask here before they allow a cut, and mend the numbers after
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from eexform.ir.coupling import Coupler, Cut, Slot
from eexform.ir.evaluate import evaluate

if TYPE_CHECKING:
    from eexform.ir.emit import Emitter
    from eexform.ir.graph import Graph

Element = int | Slot | frozenset[Slot]
"""A number; the size of an axis; something computed from the sizes of these axes."""

LONGEST = 64
"""Vectors of sizes that are followed: no tensor has more axes, twice for the amounts of a ``Pad``."""


class SizeChains:
    """The shape arithmetic of one graph.

    Args:
        graph: the graph; it must not change afterwards.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._elements: dict[str, np.ndarray] = {}
        self._leaves: dict[str, frozenset[Slot]] = {}
        flow = graph.flow
        for name in flow.topological:
            if name in flow.shape_nodes:
                self._follow(flow.nodes[name])

    def elements(self, tensor: gs.Tensor) -> list[Element] | None:
        """The elements of an integer vector (or number), ``None`` where it is not known what they are."""
        found = self._array(tensor)
        return None if found is None else list(found.reshape(-1))

    def leaves(self, value: str) -> frozenset[Slot]:
        """The axes whose sizes a value is computed from; none for constants and for data."""
        return self._leaves.get(value, frozenset())

    # -- inside --------------------------------------------------------------------------------------------------------

    def _array(self, tensor: gs.Tensor) -> np.ndarray | None:
        if isinstance(tensor, gs.Constant):
            return _numbers(tensor)
        return self._elements.get(tensor.name)

    def _follow(self, node: gs.Node) -> None:
        if node.op in ("Shape", "Size"):
            shape = self._graph.types[node.inputs[0].name].shape if node.inputs[0].name in self._graph.types else None
            axes = range(len(shape or ()))
            sizes: list[Element] = [Slot(node.inputs[0].name, axis) for axis in axes]
            if isinstance(node.inputs[0], gs.Constant) and np.dtype(node.inputs[0].dtype).kind in "iub":
                sizes = [int(dim) for dim in node.inputs[0].shape]  # numbers have no channels
            made = np.array([None, *sizes], dtype=object)[1:]
            leaves = _leaves(made)
            found = made[slice(node.attrs.get("start", 0), node.attrs.get("end"))] if node.op == "Shape" else None
            if shape is None:
                found = None
        else:
            leaves = frozenset().union(*(self.leaves(tensor.name) for tensor in node.inputs))
            found = self._moved(node)
        for tensor in node.outputs:
            self._leaves[tensor.name] = leaves
        if len(node.outputs) == 1:
            if found is None and leaves:
                found = self._opaque(node.outputs[0].name, leaves)
            if found is not None and found.size <= LONGEST:
                self._elements[node.outputs[0].name] = found
                if node.op != "Size":
                    self._leaves[node.outputs[0].name] = _leaves(found)

    def _moved(self, node: gs.Node) -> np.ndarray | None:
        """Elements of a node that only moves elements; ``None`` for any other."""
        if node.domain not in ("", "ai.onnx", None):
            return None
        arrays = [None if tensor.is_empty() else self._array(tensor) for tensor in node.inputs]
        if any(array is None and not tensor.is_empty() for array, tensor in zip(arrays, node.inputs, strict=True)):
            return None
        rule = _MOVES.get(node.op)
        if rule is not None and arrays[0] is not None:
            try:
                return rule(node, arrays)  # type: ignore[arg-type]
            except (IndexError, ValueError, TypeError):  # not a vector of sizes after all
                pass
        return self._computed(node, arrays)

    def _computed(self, node: gs.Node, arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
        """Elements of a node whose operands are numbers; ``None`` where they are not, or the result is no integers."""
        try:
            given = [None if one is None else np.array(_ints(one), np.int64).reshape(one.shape) for one in arrays]
        except TypeError:
            return None
        found = evaluate(OnnxExporter.export_node(node), given, self._graph.opset)
        if found is None or len(found) != 1 or found[0].dtype.kind not in "iu" or found[0].size > LONGEST:
            return None
        return _objects(found[0])

    def _opaque(self, value: str, leaves: frozenset[Slot]) -> np.ndarray | None:
        known = self._graph.types.get(value)
        if known is None or known.shape is None or not all(isinstance(dim, int) for dim in known.shape):
            return None
        count = int(np.prod([dim for dim in known.shape if isinstance(dim, int)], dtype=np.int64))
        if count > LONGEST:
            return None
        made = np.empty(count, dtype=object)
        made[:] = [leaves] * count
        return made.reshape([dim for dim in known.shape if isinstance(dim, int)])


def _numbers(tensor: gs.Constant) -> np.ndarray | None:
    if int(np.prod(tensor.shape, dtype=np.int64)) > LONGEST or np.dtype(tensor.dtype).kind not in "iu":
        return None
    return _objects(np.asarray(tensor.values))


def _objects(values: np.ndarray) -> np.ndarray:
    made = np.empty(values.size, dtype=object)
    made[:] = [int(number) for number in values.reshape(-1)]
    return made.reshape(values.shape)


def _leaves(elements: np.ndarray) -> frozenset[Slot]:
    found: set[Slot] = set()
    for element in elements.reshape(-1):
        if isinstance(element, Slot):
            found.add(element)
        elif isinstance(element, frozenset):
            found |= element
    return frozenset(found)


Arrays = Sequence[np.ndarray]


def _ints(array: np.ndarray) -> list[int]:
    found = array.reshape(-1).tolist()
    if not all(isinstance(number, int) for number in found):
        raise TypeError("not numbers")
    return found


def _gather(node: gs.Node, arrays: Arrays) -> np.ndarray:
    index = arrays[1].astype(np.int64)
    return np.asarray(np.take(arrays[0], index, axis=int(node.attrs.get("axis", 0))), dtype=object)


def _slice(node: gs.Node, arrays: Arrays) -> np.ndarray:
    starts, ends = _ints(arrays[1]), _ints(arrays[2])
    axes = _ints(arrays[3]) if len(arrays) > 3 else [0]
    steps = _ints(arrays[4]) if len(arrays) > 4 else [1]
    if arrays[0].ndim != 1 or axes not in ([0], [-1]) or steps != [1]:
        raise ValueError("not a piece of a vector")
    return arrays[0][starts[0] : ends[0]]


def _reshape(node: gs.Node, arrays: Arrays) -> np.ndarray:
    return arrays[0].reshape(_ints(arrays[1]))


def _expand_dims(node: gs.Node, arrays: Arrays) -> np.ndarray:
    return np.expand_dims(arrays[0], tuple(_ints(arrays[1])))


def _squeeze(node: gs.Node, arrays: Arrays) -> np.ndarray:
    return np.squeeze(arrays[0], tuple(_ints(arrays[1])) if len(arrays) > 1 else None)


_MOVES: dict[str, Callable[[gs.Node, Arrays], np.ndarray]] = {
    "Identity": lambda node, arrays: arrays[0],
    "Cast": lambda node, arrays: arrays[0],
    "Concat": lambda node, arrays: np.concatenate(list(arrays), axis=int(node.attrs["axis"])),
    "Gather": _gather,
    "Slice": _slice,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _expand_dims,
}

_chains: WeakKeyDictionary[Graph, SizeChains] = WeakKeyDictionary()


def size_chains(graph: Graph) -> SizeChains:
    """The shape arithmetic of ``graph``, read once."""
    if graph not in _chains:
        _chains[graph] = SizeChains(graph)
    return _chains[graph]


def numbers(graph: Graph, tensor: gs.Tensor | None) -> np.ndarray | None:
    """Content of an operand of integers: of a constant, or of what is computed from constants alone."""
    if tensor is None or tensor.is_empty():
        return None
    known = graph.constants.get(tensor.name)
    if known is not None:
        return np.asarray(known.values)
    elements = size_chains(graph).elements(tensor)
    if elements is None or not all(isinstance(element, int) for element in elements):
        return None
    return np.array(elements, np.int64)


def put(node: gs.Node, place: int, array: np.ndarray, cut: Cut, emitter: Emitter) -> None:
    """Give the draft's ``node`` other numbers as an operand, whether they were a constant or computed."""
    if cut.array(node.inputs[place]) is not None:
        cut.replace(node, place, array)
    else:
        node.inputs[place] = emitter.constant(f"{node.name}.{node.inputs[place].name}", array)


def guard(coupler: Coupler, operands: Iterable[gs.Tensor], own: Iterable[Slot], by: str) -> None:
    """Freeze the axes whose sizes operands are computed from, but for those that are the same as one of ``own``.

    Where an axis of the node itself is cut, its rule mends the operand; where some other axis is, nobody would.
    """
    classes = {coupler.axis_class(slot) for slot in own} - {None}
    for tensor in operands:
        for leaf in sorted(size_chains(coupler.graph).leaves(tensor.name)):
            if coupler.size(leaf.value, leaf.axis) is not None and coupler.axis_class(leaf) not in classes:
                coupler.freeze(leaf, f"its size is read by {by}")


def follows(element: Element, cut: Cut) -> int | str | None:
    """What an element becomes by itself after a cut; ``None`` where that is not known."""
    if isinstance(element, Slot):
        return cut.size(element)
    return element if isinstance(element, int) else None


def mend(node: gs.Node, place: int, wanted: Sequence[int | None], cut: Cut, emitter: Emitter) -> None:
    """Put numbers into a vector of sizes.

    Args:
        node: the draft's node.
        place: the operand.
        wanted: per element the number it must be, ``None`` to leave it.
        cut: what is cut.
        emitter: on the draft.
    """
    operand = node.inputs[place]
    known = numbers(cut.graph, operand)
    if known is not None:
        changed = [old if new is None else new for old, new in zip(known.tolist(), wanted, strict=True)]
        if changed != known.tolist():
            put(node, place, np.array(changed, known.dtype), cut, emitter)
        return
    if all(number is None for number in wanted):
        return
    if _mend_pieces(node, place, wanted, cut, emitter):
        return
    name = f"{node.name}.sizes"  # numbers where they are wanted, the rest as computed
    fixed = emitter.constant(f"{name}.fixed", np.array([number is not None for number in wanted]))
    values = emitter.constant(f"{name}.values", [number or 0 for number in wanted])
    node.inputs[place] = emitter.node("Where", fixed, values, operand, name=name, dtype=np.dtype(np.int64))
    _move(emitter.draft, node)


def _move(draft: gs.Graph, node: gs.Node) -> None:
    """Put the node that was added last in front of its reader."""
    made = draft.nodes.pop()
    draft.nodes.insert(next(place for place, other in enumerate(draft.nodes) if other is node), made)


def _mend_pieces(node: gs.Node, place: int, wanted: Sequence[int | None], cut: Cut, emitter: Emitter) -> bool:
    """Mend a ``Concat`` of numbers and computed sizes; False where a computed one would have to be another."""
    operand = node.inputs[place]
    if len(operand.inputs) != 1 or operand.inputs[0].op != "Concat":
        return False
    concat = operand.inputs[0]
    chains = size_chains(cut.graph)
    pieces: list[np.ndarray | None] = []
    at = 0
    for tensor in concat.inputs:
        elements = chains.elements(tensor)
        if elements is None:
            return False
        part = wanted[at : at + len(elements)]
        at += len(elements)
        known = cut.array(tensor)
        if all(number is None for number in part):
            pieces.append(None)
        elif known is None:
            return False
        else:
            changed = [old if new is None else new for old, new in zip(known.reshape(-1).tolist(), part, strict=True)]
            pieces.append(np.array(changed, known.dtype).reshape(known.shape))
    if at != len(wanted):
        return False
    if len(operand.outputs) > 1:  # others read it, too
        name = emitter.unique(concat.name)
        made = gs.Variable(emitter.unique(operand.name), operand.dtype, operand.shape)
        concat = gs.Node("Concat", name, dict(concat.attrs), list(concat.inputs), [made])
        emitter.draft.nodes.append(concat)
        _move(emitter.draft, node)
        node.inputs[place] = made
    for number, piece in enumerate(pieces):
        if piece is not None:
            cut.replace(concat, number, piece)
    return True
