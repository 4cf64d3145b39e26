"""Groups of channels that must be cut together, read off the couplings of a whole graph.

Positions of axes that :mod:`eexform.ir.coupling` connects form *units*; units that touch the same slots in the same way
form a *group*, from which any may be removed but the last. The connected components are found in two steps: first over
slots, to leave out what no weight takes part in (space, kernels, shape operands), then over positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from eexform.errors import GraphError, suggest
from eexform.ir.coupling import STRONG, Coupler, Kind, Slot

if TYPE_CHECKING:
    from eexform.ir.graph import Graph

_FREE = np.iinfo(np.int64).max
_KINDS: tuple[Kind, ...] = ("heads", "embedding", "channels", "width")


@dataclass(frozen=True, eq=False)
class Member:
    """One slot of a group.

    Attributes:
        slot: value and axis.
        role: what a constant's axis is to its reader (:data:`eexform.ir.coupling.Role`); ``activation`` for what is
            computed.
        node: the node that reads the constant in this role, or that computes the value; empty for a graph input.
        constant: whether the value is a constant.
        units: [units, k] positions of each unit in this slot, sorted; the same ``k`` for all units.
    """

    slot: Slot
    role: str
    node: str
    constant: bool
    units: np.ndarray


@dataclass(frozen=True, eq=False)
class Group:
    """Units that touch the same slots: any of them may be removed without the others.

    Attributes:
        name: of its first filter parameter (or embedding table) without ``.weight``, with ``#2`` behind it for the
            second group that the parameter starts; ``NAME.in`` for what is only read, such as a network's input.
        size: number of units.
        members: the slots that lose positions with a unit; a constant that is read in two roles is there twice.
        frozen: why nothing may be cut; ``None`` where it may.
        inexact: statistics over the channels (LayerNorm, softmax, mean) that removing one changes, beyond what setting
            it to zero would.
        kind: channels of convolutions, attention heads, features of matrix products, features of an embedding.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    frozen: str | None
    inexact: tuple[str, ...]
    kind: Kind

    @property
    def exact(self) -> bool:
        """Whether removing a unit is the same as nobody reading it."""
        return not self.inexact

    @property
    def prunable(self) -> bool:
        """Whether a unit can be removed."""
        return self.frozen is None and self.size > 1

    @cached_property
    def slots(self) -> Mapping[Slot, np.ndarray]:
        """Positions of each unit, [units, k], per slot, each slot once."""
        return {member.slot: member.units for member in self.members}

    def constants(self, *roles: str) -> tuple[Member, ...]:
        """The members that are constants, in the given roles (default: in any)."""
        return tuple(m for m in self.members if m.constant and (not roles or m.role in roles))

    def to_json(self) -> dict[str, Any]:
        """Plain values, positions left out."""
        return {
            "name": self.name,
            "kind": self.kind,
            "size": self.size,
            "prunable": self.prunable,
            "frozen": self.frozen,
            "inexact": list(self.inexact),
            "members": [
                {"value": m.slot.value, "axis": m.slot.axis, "role": m.role, "node": m.node, "constant": m.constant}
                for m in self.members
            ],
        }


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """The groups of a graph, in the order in which a sample meets their first slot.

    Attributes:
        groups: all of them, those that may not be cut included.
        operators: operator of each node of the graph.
    """

    groups: tuple[Group, ...]
    operators: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def by_name(self) -> Mapping[str, Group]:
        """Group by name."""
        return {group.name: group for group in self.groups}

    def __getitem__(self, name: str) -> Group:
        """The group called ``name``.

        Raises:
            GraphError: there is none; lists similar names.
        """
        if name not in self.by_name:
            raise GraphError(f"there is no channel group {name!r}: {suggest(name, self.by_name)}")
        return self.by_name[name]

    @property
    def prunable(self) -> tuple[Group, ...]:
        """The groups of which something may be cut."""
        return tuple(group for group in self.groups if group.prunable)

    @cached_property
    def _families(self) -> Mapping[str, tuple[str, ...]]:
        found: dict[tuple[Any, ...], list[str]] = {}
        for group in self.prunable:
            found.setdefault(self._structure(group), []).append(group.name)
        return {names[0]: tuple(names) for names in found.values()}

    def families(self) -> Mapping[str, tuple[str, ...]]:
        """Prunable groups with the same structure and size, by the name of the first.

        The structure is the multiset of its members' roles, axes and positions per unit, with the operators that read
        or make them: the inner channels of all blocks of a residual network's stage are one family, its residual
        stream another.
        """
        return self._families

    def family(self, name: str) -> str:
        """Family of a prunable group.

        Raises:
            GraphError: there is no such group, or nothing may be cut from it.
        """
        for first, names in self._families.items():
            if name in names:
                return first
        raise GraphError(f"channel group {self[name].name!r} belongs to no family: nothing may be cut from it")

    def _structure(self, group: Group) -> tuple[Any, ...]:
        parts = Counter((m.role, m.slot.axis, m.units.shape[1], self.operators.get(m.node, "")) for m in group.members)
        return group.kind, group.size, tuple(sorted(parts.items()))

    def to_json(self) -> dict[str, Any]:
        """Plain values: groups and families."""
        return {
            "groups": [group.to_json() for group in self.groups],
            "families": {name: list(names) for name, names in self.families().items()},
        }


def couple(graph: Graph) -> Coupler:
    """Let every node's rule speak, and freeze inputs and outputs."""
    coupler = Coupler(graph)
    for value in graph.inputs:
        for slot in coupler.slots(value):
            coupler.freeze(slot, f"graph input {value!r}")
    for name in coupler.flow.topological:
        node = coupler.flow.nodes[name]
        if coupler.is_size_node(node):
            coupler.read_sizes(node)
        else:
            coupler.visit(node)
    for value in graph.outputs:
        for slot in coupler.slots(value):
            coupler.freeze(slot, f"graph output {value!r}")
    coupler.settle()
    return coupler


def find_groups(graph: Graph) -> ChannelGroups:
    """Every group of the graph that a weight takes part in, those that may not be cut included; see ``Graph.groups``.

    Raises:
        GraphError: a rule contradicts the graph.
    """
    coupler = couple(graph)
    groups = _Reader(coupler).groups()
    return ChannelGroups(groups, {name: node.op for name, node in coupler.flow.nodes.items()})


class _Reader:
    """From what a coupler collected to groups."""

    def __init__(self, coupler: Coupler) -> None:
        self.coupler = coupler
        self.statements = coupler.statements()
        self.slots = self.statements.slots
        self.role_order = {slot: place for place, slot in enumerate(self.statements.roles)}

    def groups(self) -> tuple[Group, ...]:
        said = self.statements
        strong = np.zeros(len(self.slots), bool)
        for slot, roles in said.roles.items():
            strong[said.index[slot]] = any(role in STRONG for role, _ in roles)
        if not strong.any():
            return ()
        part = self._slot_components()
        wanted = np.zeros(part.max() + 1, bool)
        wanted[part[strong]] = True
        chosen = wanted[part]
        sizes = np.where(chosen, said.sizes, 0)
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        total = int(self.offsets[-1])
        owner = np.repeat(np.arange(len(self.slots)), sizes)
        unit = self._units(chosen, total)
        units = int(unit.max()) + 1
        # What a unit touches, as a sum of random numbers, one per slot: equal multisets of slots have equal sums, and
        # unequal ones have equal sums with probability 2^-64.
        marks = np.random.default_rng(0).integers(0, 2**64 - 1, len(self.slots), np.uint64)
        signature = np.zeros(units, np.uint64)
        np.add.at(signature, unit, marks[owner])
        reason = np.full(units, _FREE)
        np.minimum.at(reason, unit, self._reasons(chosen, total))
        touched = np.zeros(units, bool)
        touched[unit[strong[owner]]] = True
        first = np.full(units, total)
        np.minimum.at(first, unit, np.arange(total))
        by_group: dict[tuple[int, bool], list[int]] = {}
        for number in np.argsort(first, kind="stable").tolist():
            if touched[number]:
                by_group.setdefault((int(signature[number]), bool(reason[number] != _FREE)), []).append(number)
        order = np.argsort(unit, kind="stable")  # elements unit by unit, in the order of slots and positions
        starts = np.searchsorted(unit[order], np.arange(units + 1))
        names: Counter[str] = Counter()
        found = []
        for numbers in by_group.values():
            elements = np.stack([order[starts[n] : starts[n + 1]] for n in numbers])
            why = int(reason[numbers].min())
            found.append(self._group(elements, owner, None if why == _FREE else said.frozen[why][1], names))
        return tuple(found)

    def _slot_components(self) -> np.ndarray:
        """Number of the connected component of each slot."""
        said = self.statements
        ends = [*said.same, *((a, b) for a, _, b, _ in said.ties)]
        pairs = np.array(ends, np.int64).reshape(-1, 2)
        return _components(len(self.slots), pairs[:, 0], pairs[:, 1])

    def _units(self, chosen: np.ndarray, total: int) -> np.ndarray:
        """Number of the unit of each position of each chosen slot."""
        said, left, right = self.statements, [], []
        for one, two in said.same:
            if chosen[one]:
                place = np.arange(said.sizes[one])
                left.append(self.offsets[one] + place)
                right.append(self.offsets[two] + place)
        for one, ia, two, ib in said.ties:
            if chosen[one]:
                left.append(self.offsets[one] + ia)
                right.append(self.offsets[two] + ib)
        nothing = [np.zeros(0, np.int64)]
        return _components(total, np.concatenate(left or nothing), np.concatenate(right or nothing))

    def _reasons(self, chosen: np.ndarray, total: int) -> np.ndarray:
        """Number of the first statement that freezes each position."""
        found = np.full(total, _FREE)
        for number, (place, _, positions) in reversed(list(enumerate(self.statements.frozen))):
            if chosen[place]:
                start, end = self.offsets[place], self.offsets[place + 1]
                found[start:end] = number if positions is None else found[start:end]
                if positions is not None:
                    found[start + positions] = number
        return found

    def _group(self, elements: np.ndarray, owner: np.ndarray, frozen: str | None, names: Counter[str]) -> Group:
        """One group from its positions: [units, elements per unit], slot by slot in the same order for each unit."""
        said, owners = self.statements, owner[elements[0]]
        starts = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), len(owners)]
        shared: dict[bytes, np.ndarray] = {}  # equal positions are one array: most members of a group agree
        members: list[Member] = []
        inexact: list[str] = []
        kinds: set[Kind] = set()
        for start, end in pairwise(starts):
            place = int(owners[start])
            slot = self.slots[place]
            positions = elements[:, start:end] - self.offsets[place]
            positions = shared.setdefault(positions.tobytes(), positions)
            positions.setflags(write=False)
            inexact += said.inexact.get(slot, [])
            if slot in said.kinds:
                kinds.add(said.kinds[slot])
            if self.coupler.is_constant(slot.value):
                for role, node in said.roles.get(slot, [("other", "")]):
                    members.append(Member(slot, role, node or self._reader_of(slot.value), True, positions))
            else:
                node = self.coupler.flow.producer.get(slot.value, "")
                members.append(Member(slot, "activation", node, False, positions))
        if any(member.role == "table" for member in members):
            kinds.add("embedding")
        kind: Kind = next((kind for kind in _KINDS if kind in kinds), "width")
        name = self._name([member.slot for member in members], names)
        return Group(name, len(elements), tuple(members), frozen, tuple(dict.fromkeys(inexact)), kind)

    def _reader_of(self, value: str) -> str:
        return next((node.name for node in self.coupler.graph.constants[value].outputs), "")

    def _name(self, slots: list[Slot], names: Counter[str]) -> str:
        """Of the first filter, or else table, or else reader, in the order of the nodes."""
        ranks = {"filter": 0, "table": 1, "reader": 2}
        said = self.statements.roles
        strong = [
            (ranks[role], self.role_order[slot], slot.value)
            for slot in slots
            for role, _ in said.get(slot, ())
            if role in ranks
        ]
        rank, _, value = min(strong)
        name = value.removesuffix(".weight") + (".in" if rank == 2 else "")
        names[name] += 1
        return name if names[name] == 1 else f"{name}#{names[name]}"


def _components(count: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    links = coo_matrix((np.ones(len(left), bool), (left, right)), shape=(count, count))
    return connected_components(links, directed=False)[1]
