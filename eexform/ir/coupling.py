"""What must be cut together: operators say which positions of which axes belong to each other.

A *slot* is one axis of one value (a constant or a computed value). Every operator has a :class:`Rule` that tells a
:class:`Coupler` how the positions of its operands' slots go with those of its results: output channel ``i`` of a
convolution with row ``i`` of its weight, and so on. Positions that are connected over the whole graph form a *unit*:
they can only be cut together. :mod:`eexform.ir.groups` reads the units off, :mod:`eexform.ir.cut` cuts them and lets
each rule mend what the slicing of constants does not (attributes, shape operands).

To write a rule, put a class into a file that :mod:`eexform.ir.coupling_rules` lists::

    @rule("Relu", "Sigmoid")
    class Unary(Rule):
        def couple(self, node, coupler):
            for axis in range(len(coupler.shape(node.inputs[0].name))):
                coupler.same(Slot(node.inputs[0].name, axis), Slot(node.outputs[0].name, axis))

Nothing is cut by mistake: an axis that a rule does not mention (neither ``same``, ``tie``, ``join``, ``freeze`` nor
``keep``) is frozen when the rule returns; so are all axes of an operator without a rule, of the graph's inputs and of
its outputs. Constants that name no strong role (:data:`STRONG`) do not make a group by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from eexform.errors import GraphError
from eexform.ir.coupling_cut import Cut, Slot, cut_dim, positions_of
from eexform.ir.coupling_rule import STRONG, Kind, Role, Rule, find_rule, rule
from eexform.ir.types import Dim

if TYPE_CHECKING:
    from eexform.ir.flow import DataFlow
    from eexform.ir.graph import Graph

__all__ = [
    "STRONG",
    "Coupler",
    "Cut",
    "Kind",
    "Role",
    "Rule",
    "Slot",
    "Statements",
    "cut_dim",
    "find_rule",
    "positions_of",
    "rule",
    "touched_values",
]


@dataclass(frozen=True)
class Statements:
    """What the rules said, by numbers of slots.

    Attributes:
        slots: the slots that were mentioned.
        index: number of each.
        sizes: positions of each.
        same: pairs of slots whose positions go together one by one.
        ties: slot, positions, slot, positions.
        frozen: slot, reason, positions (``None``: all), in the order in which it was said.
        inexact: reasons by slot.
        roles: role and node by slot, constants only.
        kinds: what the units of a slot are.
    """

    slots: Sequence[Slot]
    index: Mapping[Slot, int]
    sizes: Sequence[int]
    same: Sequence[tuple[int, int]]
    ties: Sequence[tuple[int, np.ndarray, int, np.ndarray]]
    frozen: Sequence[tuple[int, str, np.ndarray | None]]
    inexact: Mapping[Slot, Sequence[str]]
    roles: Mapping[Slot, Sequence[tuple[str, str]]]
    kinds: Mapping[Slot, Kind]


class Coupler:
    """Collects which positions go together; built for one graph, handed to every rule.

    Values that hold sizes rather than data (integers that come from ``Shape`` and constants alone) have no slots;
    neither have axes without a fixed size, such as the batch. Every method accepts them and does what is safe.

    Attributes:
        graph: the graph.
        flow: its data flow.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.flow: DataFlow = graph.flow
        self._types = graph.types
        self._index: dict[Slot, int] = {}
        self._slots: list[Slot] = []
        self._sizes: list[int] = []
        self._same: list[tuple[int, int]] = []
        self._ties: list[tuple[int, np.ndarray, int, np.ndarray]] = []
        self._frozen: list[tuple[int, str, np.ndarray | None]] = []
        self._inexact: dict[Slot, list[str]] = {}
        self._roles: dict[Slot, list[tuple[str, str]]] = {}
        self._kinds: dict[Slot, Kind] = {}
        self._links: list[int] = []  # union-find over slots that are the same, to ask what is frozen on the way
        self._closed: dict[int, bool] = {}
        self._node: gs.Node | None = None
        self._touched: set[Slot] = set()
        self._deferred: list[tuple[gs.Node | None, Callable[[], None]]] = []
        self._inherited: list[tuple[Slot, Role, str]] = []
        self._size_values = _size_values(graph)
        self._positions: dict[str, tuple[int | None, ...]] = {}

    # -- questions -----------------------------------------------------------------------------------------------------

    def shape(self, value: str) -> tuple[Dim, ...] | None:
        """Shape of a value; ``None`` where not even the rank is known, or the name is empty."""
        constant = self.graph.constants.get(value)
        if constant is not None:
            return tuple(int(dim) for dim in constant.shape)
        known = self._types.get(value)
        return None if known is None else known.shape

    def rank(self, value: str) -> int:
        """Number of axes of a value; 0 where the shape is not known."""
        return len(self.shape(value) or ())

    def size(self, value: str, axis: int) -> int | None:
        """Positions of a slot; ``None`` where the axis has no fixed size or the value holds sizes: no slot then.

        An axis ``"3*N"``, such as heads merged with the batch, has 3 positions: position p of sample n is at n * 3 + p
        (the rule of Reshape, which makes such axes, freezes those of another order).
        """
        sizes = self._positions.get(value)
        if sizes is None:
            known = () if value in self._size_values else self.shape(value) or ()
            sizes = self._positions[value] = tuple(positions_of(dim) for dim in known)
        return sizes[axis] if 0 <= axis < len(sizes) else None

    def slots(self, value: str) -> tuple[Slot, ...]:
        """All axes of a value, those without a fixed size included."""
        return tuple(Slot(value, axis) for axis in range(self.rank(value)))

    def is_constant(self, value: str) -> bool:
        """Whether the value is a constant of the graph."""
        return value in self.graph.constants

    def is_data(self, value: str) -> bool:
        """Whether the value has slots at all: a constant or data, no sizes."""
        return bool(value) and value not in self._size_values

    def array(self, tensor: gs.Tensor | None) -> np.ndarray | None:
        """Content of a constant operand; ``None`` for anything else."""
        return np.asarray(tensor.values) if isinstance(tensor, gs.Constant) else None

    def is_frozen(self, slot: Slot) -> bool:
        """Whether the nodes so far froze the whole axis, here or at a slot that is the same (not through ties)."""
        if self.size(slot.value, slot.axis) is None:
            return True
        return slot in self._index and self._closed.get(self._root(self._index[slot]), False)

    # -- statements ----------------------------------------------------------------------------------------------------

    def same(self, a: Slot, b: Slot) -> None:
        """Position i of ``a`` goes with position i of ``b``.

        Where one of them has no fixed size, or they have different ones, nothing can be said: what is a slot is frozen.
        """
        first, second = self.size(a.value, a.axis), self.size(b.value, b.axis)
        if first is None or second is None or first != second:
            for slot, size in ((a, first), (b, second)):
                if size is not None:
                    self.freeze(slot, "is matched with an axis of unknown or other size")
            return
        one, two = self._at(a), self._at(b)
        if one == two:
            return
        self._same.append((one, two))
        one, two = self._root(one), self._root(two)
        if one != two:
            self._links[two] = one
            if self._closed.pop(two, False):
                self._closed[one] = True

    def tie(self, a: Slot, ia: Sequence[int] | np.ndarray, b: Slot, ib: Sequence[int] | np.ndarray) -> None:
        """Position ``ia[k]`` of ``a`` goes with position ``ib[k]`` of ``b``; repeats tie several to one."""
        first, second = np.asarray(ia, np.int64).reshape(-1), np.asarray(ib, np.int64).reshape(-1)
        if len(first) != len(second):
            raise GraphError(f"{self._where()}: {len(first)} positions of {a} cannot be tied to {len(second)} of {b}")
        sizes = [self.size(slot.value, slot.axis) for slot in (a, b)]
        for slot, size, positions in ((a, sizes[0], first), (b, sizes[1], second)):
            if size is not None and len(positions) and not 0 <= positions.min() <= positions.max() < size:
                raise GraphError(f"{self._where()}: positions of {slot} outside 0..{size - 1}")
        if sizes[0] is None or sizes[1] is None:
            for slot, size, positions in ((a, sizes[0], first), (b, sizes[1], second)):
                if size is not None:
                    self.freeze(slot, "is matched with an axis of unknown size", positions)
            return
        self._ties.append((self._at(a), first, self._at(b), second))

    def join(self, a: Slot, ia: Sequence[int] | np.ndarray, ib: Sequence[int] | np.ndarray) -> None:
        """Positions of one slot go together: ``ia[k]`` with ``ib[k]``."""
        self.tie(a, ia, a, ib)

    def keep(self, slot: Slot) -> None:
        """Say that this node puts no condition on the axis: its positions may go without anything else here."""
        if self.size(slot.value, slot.axis) is not None:
            self._at(slot)

    def freeze(self, slot: Slot, why: str, positions: Sequence[int] | np.ndarray | None = None) -> None:
        """Positions of a slot (all by default) may not be cut; the node's name is added to the reason."""
        if self.size(slot.value, slot.axis) is None:
            return
        place = self._at(slot)
        chosen = None if positions is None else np.unique(np.asarray(positions, np.int64))
        reason = why if self._node is None else f"{why} ({self._where()})"
        self._frozen.append((place, reason, chosen))
        if chosen is None or len(chosen) == self._sizes[place]:
            self._closed[self._root(place)] = True

    def freeze_all(self, node: gs.Node, why: str) -> None:
        """Freeze every axis that the node touches, what its sub-graphs read included."""
        for value in touched_values(node):
            for slot in self.slots(value):
                self.freeze(slot, why)

    def inexact(self, slot: Slot, why: str) -> None:
        """Cutting here changes a statistic over the axis (a mean, a softmax): allowed, but not as if it were zero."""
        if self.size(slot.value, slot.axis) is not None:
            self._at(slot)
            self._inexact.setdefault(slot, []).append(f"{why} ({self._where()})")

    def role(self, slot: Slot, role: Role) -> None:
        """What the axis of a constant is to the node; ignored for data.

        Where the operand is computed from constants alone (transposed, cast, put together from pieces), the constants
        behind it get the role.
        """
        if self.size(slot.value, slot.axis) is None:
            return
        reader = "" if self._node is None else self._node.name
        if self.is_constant(slot.value):
            self._at(slot)
            found = self._roles.setdefault(slot, [])
            if all(role != known for known, _ in found):
                found.append((role, reader))
        elif self.flow.producer.get(slot.value) in self.flow.shape_nodes:
            self._inherited.append((slot, role, reader))

    def kind(self, slot: Slot, kind: Kind) -> None:
        """Say what the units of a slot are where roles do not show it, such as attention heads."""
        if self.size(slot.value, slot.axis) is not None:
            self._at(slot)
            self._kinds.setdefault(slot, kind)

    def defer(self, statement: Callable[[], None]) -> None:
        """Let a rule speak again, in the name of the same node, after all nodes have spoken (see :meth:`settle`).

        For rules that choose by what is frozen, or the same, elsewhere: a reshape that splits an axis in two.
        """
        self._deferred.append((self._node, statement))

    def axis_class(self, slot: Slot) -> int | None:
        """The same number for slots that are the same by what was said so far; ``None`` for what was not mentioned."""
        return self._root(self._index[slot]) if slot in self._index else None

    # -- for the engine ------------------------------------------------------------------------------------------------

    def statements(self) -> Statements:
        """Everything that was said."""
        return Statements(
            self._slots,
            self._index,
            self._sizes,
            self._same,
            self._ties,
            self._frozen,
            self._inexact,
            self._roles,
            self._kinds,
        )

    def settle(self) -> None:
        """Run what rules deferred, in the order of the nodes; to be called once, after the last :meth:`visit`."""
        for node, statement in self._deferred:
            self._node = node
            statement()
        self._deferred.clear()
        self._node = None
        self._inherit_roles()

    def _inherit_roles(self) -> None:
        """Hand roles of computed parameters on to the constants that they are computed from."""
        if not self._inherited:
            return
        behind: dict[int, set[int]] = {}  # slot of a node's result -> slots of its operands that it was tied to
        for one, two in (*self._same, *((a, b) for a, _, b, _ in self._ties)):
            for result, operand in ((one, two), (two, one)):
                producer = self.flow.producer.get(self._slots[result].value)
                if producer in self.flow.shape_nodes:
                    operands = {tensor.name for tensor in self.flow.nodes[producer].inputs}
                    if self._slots[operand].value in operands:
                        behind.setdefault(result, set()).add(operand)
        for slot, role, reader in self._inherited:
            ahead, seen = [self._index[slot]] if slot in self._index else [], set()
            if ahead and not behind.get(ahead[0]):  # its operator has no rule: listed by its own name, with the reason
                self._roles.setdefault(slot, []).append((role, reader))
            while ahead:
                place = ahead.pop()
                found = self._slots[place]
                if self.is_constant(found.value):
                    roles = self._roles.setdefault(found, [])
                    if all(role != known for known, _ in roles):
                        roles.append((role, reader))
                seen.add(place)
                ahead += sorted(behind.get(place, set()) - seen)

    def visit(self, node: gs.Node) -> None:
        """Let the rule of ``node`` speak; freeze what it does not mention."""
        self._node, self._touched = node, set()
        made = find_rule(node)
        if made is None or not made.follows_sizes:
            self._freeze_sizes(node)
        unknown = [value for value in touched_values(node) if self.is_data(value) and self.shape(value) is None]
        if made is None or any(isinstance(item, gs.Graph) for item in node.attrs.values()):
            self.freeze_all(node, f"{node.op} has no rule")
        elif unknown:
            self.freeze_all(node, f"the shape of {unknown[0]!r} is not known")
        else:
            made.couple(node, self)
            for value in touched_values(node):
                for slot in self.slots(value):
                    if slot not in self._touched:
                        self.freeze(slot, f"axis {slot.axis} of {slot.value!r} has no rule")
        self._node = None

    def _freeze_sizes(self, node: gs.Node) -> None:
        """Freeze the axes whose sizes a node reads as numbers, through ``Shape`` and arithmetic."""
        from eexform.ir.coupling_sizes import guard

        guard(self, node.inputs, (), f"{node.op} {node.name!r}")
        self._touched.clear()

    def read_sizes(self, node: gs.Node) -> None:
        """Freeze what a node that computes sizes reads as numbers, rather than through ``Shape``."""
        if node.op in ("Shape", "Size"):
            return
        self._node = node
        for tensor in node.inputs:
            for slot in self.slots(tensor.name):
                self.freeze(slot, "is read by shape arithmetic")
        self._node = None

    def is_size_node(self, node: gs.Node) -> bool:
        """Whether the node only computes sizes: it has no slots and needs no rule."""
        return node.name in self.flow.shape_nodes and all(
            tensor.name in self._size_values for tensor in node.outputs if tensor.name
        )

    def _where(self) -> str:
        return "the graph" if self._node is None else f"{self._node.op} {self._node.name!r}"

    def _at(self, slot: Slot) -> int:
        self._touched.add(slot)
        place = self._index.get(slot)
        if place is None:
            size = self.size(slot.value, slot.axis)
            assert size is not None
            place = self._index[slot] = len(self._slots)
            self._slots.append(slot)
            self._sizes.append(size)
            self._links.append(place)
        return place

    def _root(self, place: int) -> int:
        while self._links[place] != place:
            self._links[place] = self._links[self._links[place]]
            place = self._links[place]
        return place


def touched_values(node: gs.Node) -> Iterator[str]:
    """Names of what a node reads and writes, each once, what its sub-graphs take from around them included."""
    from eexform.ir.order import node_inputs

    yield from dict.fromkeys((*node_inputs(node), *(tensor.name for tensor in node.outputs if tensor.name)))


def _size_values(graph: Graph) -> frozenset[str]:
    """Values that hold sizes: what shape nodes compute, except floating-point arrays, which rules can follow.

    A class token that is expanded to the batch or a parameter that is cast is computed from constants alone, too, but
    its axes are channels like those of any other value.
    """
    found = set()
    for name in graph.flow.shape_nodes:
        for tensor in graph.flow.nodes[name].outputs:
            known = graph.types.get(tensor.name)
            floating = known is not None and known.dtype is not None and np.issubdtype(known.dtype, np.floating)
            if tensor.name and not floating:
                found.add(tensor.name)
    return frozenset(found)
