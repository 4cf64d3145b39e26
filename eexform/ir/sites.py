"""Sites: the values of a trunk at which a head can be attached, and why all others are none.

Between two layers a network holds many values that are the same point for an early exit: behind a convolution come
its bias, a normalisation, an activation, a residual addition, perhaps a pooling or a few reshapes, and none of them
costs multiply-accumulates. One value stands for such a *point*: the one behind which the fewest values have to be
carried, and of those the one after the last activation or pooling, before it is merely rearranged. Points behind which
exactly the same layers have run (a dense block's newest features, and all its features put together) count once, too.

Points are found on the data flow (:mod:`eexform.ir.flow`). Backwards, a value that is computed without layers from one
other value alone belongs to the same point as that one (its *root*). Forwards, a root belongs to the point of the value
at which everything computed from it comes together again (its immediate post-dominator), if there is no layer between.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from eexform.errors import GraphError, suggest
from eexform.ir.flow import WIDEST, DataFlow
from eexform.ir.graph import Graph
from eexform.ir.layout import Axes, channel_axes
from eexform.ir.roles import Role, role
from eexform.ir.types import Dim, TensorType

Kind = Literal["spatial", "sequence", "flat"]

_FLOATS = frozenset({None, np.dtype(np.float32)})  # element types that heads read and write; None: not known
_REGION = 256  # nodes looked at between a root and its post-dominator; followers of one layer are a dozen at most


@dataclass(frozen=True)
class Site:
    """A value at which a head can be attached.

    What has to run for it is ``graph.flow.ancestors([site.value])``.

    Attributes:
        value: name of the value; its axis 0 is the batch.
        kind: ``spatial`` [N, C, H, W], [N, C, L] or [N, H, W, C]; ``sequence`` [N, T, C]; ``flat`` [N, C].
        channels: number of channels.
        channel_axis: axis of the channels in the value, the batch included: 1 for [N, C, H, W], 3 for [N, H, W, C].
        shape: shape of one sample, without the batch.
        stride: height (or length) of the network's input over that of the site, rounded; ``None`` where either has no
            positions in space or no fixed size.
        live: every value that has to be carried behind the site, the site included where it is needed, in topological
            order; one value means that the site is a cut point of the network, more that it lies inside a block.
    """

    value: str
    kind: Kind
    channels: int
    channel_axis: int
    shape: tuple[Dim, ...]
    stride: int | None
    live: tuple[str, ...]

    @property
    def cuts(self) -> bool:
        """Whether the network behind the site needs nothing but the site: the end of a block, not its inside."""
        return self.live == (self.value,)


@dataclass(frozen=True)
class Rejected:
    """A value that carries samples and is no site, and why."""

    value: str
    reason: str


@dataclass(frozen=True)
class SiteReport:
    """The sites in the order in which a sample meets them, and the rejected values in topological order."""

    sites: tuple[Site, ...]
    rejected: tuple[Rejected, ...]

    def site(self, value: str) -> Site:
        """The site at ``value``.

        Raises:
            GraphError: there is none; the message says why the value was rejected or lists similar names.
        """
        for site in self.sites:
            if site.value == value:
                return site
        for rejected in self.rejected:
            if rejected.value == value:
                raise GraphError(f"value {value!r} is no site: {rejected.reason}")
        raise GraphError(f"there is no site {value!r}: {suggest(value, (site.value for site in self.sites))}")


def find_sites(graph: Graph, *, max_live: int = 3, flow: DataFlow | None = None) -> SiteReport:
    """Every site of ``graph``'s trunk, and a reason for every other floating-point value that carries samples.

    Args:
        graph: the trunk; heads of exits that are already there are left out of the question.
        max_live: how many values a cut may carry, the site included.
        flow: the graph's data flow, if it is not the usual one.

    Raises:
        GraphError: the graph is not well formed, or ``max_live`` is not positive.
    """
    if max_live < 1:
        raise GraphError(f"max_live is {max_live}; a cut carries at least one value")
    if flow is None:
        flow = DataFlow(graph, [graph.final]) if graph.exits else graph.flow
    return _Finder(graph, flow, max_live).report()


class _Finder:
    """Everything known about the values of one graph while its sites are looked for."""

    def __init__(self, graph: Graph, flow: DataFlow, max_live: int) -> None:
        self.graph, self.flow, self.max_live = graph, flow, max_live
        self.types = graph.types
        self.axes = channel_axes(flow, self.types)
        self.roles = {name: self._role(name) for name in flow.topological if name not in flow.shape_nodes}
        needed = {name: kind for name, kind in self.roles.items() if name in flow.needed}
        self.layers = flow.bits(name for name, kind in needed.items() if kind is Role.LAYER)
        self.work = flow.bits(name for name, kind in needed.items() if kind in (Role.LAYER, Role.PRODUCT))
        self.values = [v for v in (*flow.inputs, *self._made()) if self._carries_samples(v)]
        self.roots, self.depths = self._find_roots()
        self.reach = self._find_reach()
        self.reference = self._input_size()

    def _made(self) -> Iterable[str]:
        return (t.name for name in self.flow.topological for t in self.flow.nodes[name].outputs if t.name)

    def _carries_samples(self, value: str) -> bool:
        found = self.types.get(value)
        if found is None or (found.dtype is None and found.shape is None):
            return self.flow.is_data(value)
        floating = found.dtype is None or np.issubdtype(found.dtype, np.floating)
        return floating and (found.batch_axis is not None or (found.batch_dependent and bool(found.shape)))

    def _role(self, name: str) -> Role:
        node = self.flow.nodes[name]
        operands = [tensor.name for tensor in node.inputs if tensor.name]
        kind = role(node, weighted=any(not self.flow.is_data(operand) for operand in operands))
        if kind is Role.POOL:  # a window as large as the plane is global pooling
            shape = self._shape(node.outputs[0].name)
            if shape is not None and all(dim == 1 for dim in shape[2:]):
                return Role.SQUEEZE
        return kind

    def _shape(self, value: str) -> tuple[Dim, ...] | None:
        return self.types[value].shape if value in self.types else None

    # -- points --------------------------------------------------------------------------------------------------------

    def _find_roots(self) -> tuple[dict[str, str], dict[str, int]]:
        """Per data value: the one it is computed from without layers, and how many followers and pools lie between."""
        roots = {value: value for value in self.flow.inputs}
        depths = dict.fromkeys(roots, 0)
        for name, kind in self.roles.items():
            sources = self.flow.data_inputs(name)
            cheap = kind not in (Role.LAYER, Role.PRODUCT)
            shared = {roots[value] for value in sources}
            depth = max((depths[value] for value in sources), default=0) if cheap else 0
            for tensor in self.flow.nodes[name].outputs:
                roots[tensor.name] = shared.copy().pop() if cheap and len(shared) == 1 else tensor.name
                depths[tensor.name] = depth + (kind in (Role.FOLLOWER, Role.POOL))
        return roots, depths

    def _point(self, root: str, known: dict[str, str]) -> str:
        """The last root in which ``root`` is absorbed without a layer between."""
        path = []
        while root not in known:
            path.append(root)
            after = self._absorbed_by(root)
            if after is None:
                known[root] = root
            else:
                root = after
        for visited in path:
            known[visited] = known[root]
        return known[root]

    def _absorbed_by(self, root: str) -> str | None:
        """The next root that everything computed from ``root`` flows into; ``None`` where a layer comes before."""
        node = self.flow.producer.get(root)
        while node is not None:
            meet = self.flow.meet(node)
            if meet is None or not self._cheap_between(node, meet):
                return None
            for tensor in self.flow.nodes[meet].outputs:
                if self.roots[tensor.name] != root:
                    return self.roots[tensor.name]
            node = meet
        return None

    def _cheap_between(self, node: str, meet: str) -> bool:
        """Whether no node behind ``node`` up to and including ``meet`` is a layer."""
        seen, queue = {node}, deque([node])
        while queue:
            for tensor in self.flow.nodes[queue.popleft()].outputs:
                for after in self.flow.data_consumers(tensor.name):
                    if after in seen:
                        continue
                    if self.roles[after] in (Role.LAYER, Role.PRODUCT) or len(seen) > _REGION:
                        return False
                    seen.add(after)
                    if after != meet:
                        queue.append(after)
        return True

    def _find_reach(self) -> dict[str, frozenset[Role]]:
        """Per data value: the roles (layer, product) of the next working nodes behind it."""
        reach: dict[str, frozenset[Role]] = {}
        for name in reversed(self.flow.topological):
            for tensor in self.flow.nodes[name].outputs:
                reach[tensor.name] = self._reached(tensor.name, reach)
        for value in self.flow.inputs:
            reach[value] = self._reached(value, reach)
        return reach

    def _reached(self, value: str, reach: dict[str, frozenset[Role]]) -> frozenset[Role]:
        found: set[Role] = set()
        for name in self.flow.data_consumers(value):
            if self.roles[name] in (Role.LAYER, Role.PRODUCT):
                found.add(self.roles[name])
            else:
                found.update(*(reach[t.name] for t in self.flow.nodes[name].outputs))
        return frozenset(found)

    # -- one value -----------------------------------------------------------------------------------------------------

    def _input_size(self) -> int | None:
        """Height or length of the network's first input with channels, else of what the first layer reads."""
        first = next((n for n in self.flow.topological if self.roles.get(n) is Role.LAYER), None)
        read = self.flow.data_inputs(first)[:1] if first is not None else ()
        for value in (*self.flow.inputs, *read):
            shape, axes = self._shape(value), self.axes.get(value)
            if shape is not None and axes == (1,) and 3 <= len(shape) <= 4:
                size = shape[2]
            elif shape is not None and axes == (3,) and len(shape) == 4:
                size = shape[1]
            else:
                continue
            return size if isinstance(size, int) else None
        return None

    def _site(self, value: str) -> Site | str:
        """The site at ``value``, were it alone in the graph; or why it cannot be one."""
        return self._own_fault(value) or self._place_fault(value) or self._shaped(value)

    def _own_fault(self, value: str) -> str | None:
        """What is wrong with the value itself."""
        found = self.types.get(value)
        if found is None or found.dtype is None or found.shape is None:
            by = self.flow.producer.get(value)
            return "its type is not known" + (f" (operator {self.flow.nodes[by].op!r} of node {by!r})" if by else "")
        for name in (value, self.graph.final):
            if (kind := self.types[name].dtype) not in _FLOATS:
                return f"{name!r} holds {kind} numbers; heads are float32: convert the model to float32"
        if not self.flow.is_data(value):
            return "it is computed from sizes and constants alone and says nothing about the sample"
        if found.batch_axis is None:
            return f"the batch is merged with another axis, or mixed: {found}"
        if found.batch_axis != 0:
            return f"the batch is axis {found.batch_axis} of {found}; heads need it on axis 0"
        return None

    def _place_fault(self, value: str) -> str | None:
        """What is wrong with the place of the value in the network."""
        if value not in self.flow.producer:
            return "it is an input of the network; no layer with weights comes before it"
        if (node := self.flow.producer[value]) not in self.flow.needed:
            return "it does not lead to the final output"
        if not (done := self.flow.ancestor_bits([value])) & self.layers:
            return "no layer with weights comes before it"
        if fault := self._nothing_left(done):
            return fault
        if self.reach[value] == {Role.PRODUCT}:
            return "it is an operand of a product of activations (queries, keys, values or weights of attention)"
        return self._live_fault(value, self.flow.cut(node))

    def _nothing_left(self, done: int) -> str | None:
        left = self.work & ~done
        if not left:
            return "nothing is left to skip: no layer comes after it"
        last = next(self.flow.names(left))
        if left.bit_count() == 1 and self._one_position(last):
            return f"nothing is left to skip but the classifier itself, node {last!r}"
        return None

    def _live_fault(self, value: str, live: tuple[str, ...] | None) -> str | None:
        """What is wrong with what would have to be carried."""
        if live is None:
            return f"more than {WIDEST} values would have to be carried (at most {self.max_live} may)"
        if len(live) > self.max_live:
            shown = ", ".join(live[:6]) + (", ..." if len(live) > 6 else "")
            return f"{len(live)} values would have to be carried (at most {self.max_live} may): {shown}"
        for carried in live:
            found = self.types.get(carried)
            if found is None or found.batch_axis is None:
                return f"{carried!r} would have to be carried, whose batch is merged or not known: {found}"
        if not self.flow.data_consumers(value):
            return "nothing in the rest of the network uses it"
        return None

    def _shaped(self, value: str) -> Site | str:
        """The site, if the shape is one that heads can read."""
        found = self.types[value]
        axes = self.axes.get(value)
        shape = found.sample_shape
        rank = len(found.shape or ())
        kind: Kind
        if rank == 2:
            kind, axes = "flat", (1,)
        elif rank not in (3, 4):
            return f"shape {found}: heads read [N, C], [N, T, C], [N, C, L], [N, C, H, W] and [N, H, W, C]"
        elif axes is None:
            return f"it is not clear which axis of {found} holds the channels"
        elif len(axes) > 1:
            return f"the channels of {found} are spread over the axes {', '.join(map(str, axes))}"
        elif axes[0] not in (1, rank - 1):
            return f"the channels of {found} are on axis {axes[0]}, between others"
        else:
            kind = "sequence" if rank == 3 and axes == (2,) else "spatial"
        if not isinstance(channels := (found.shape or ())[axes[0]], int) or channels < 2:
            return f"{channels} channels: a head needs a fixed number of at least 2"
        live = self.flow.cut(self.flow.producer[value]) or ()
        site = Site(value, kind, channels, axes[0], shape, self._stride(kind, found, axes), live)
        if self._positions(found, axes) == 1:
            sizes = {v: self._positions(self.types[v], self.axes.get(v)) for v in live if v != value}
            larger = [v for v, size in sizes.items() if size != 1]
            if larger:
                return f"a side branch without positions: {larger[0]!r} {self.types[larger[0]]} would still be carried"
        return site

    def _stride(self, kind: Kind, found: TensorType, axes: Axes) -> int | None:
        if kind != "spatial" or self.reference is None or found.shape is None:
            return None
        size = found.shape[2 if axes == (1,) else 1]
        return max(1, round(self.reference / size)) if isinstance(size, int) and size > 0 else None

    def _positions(self, found: TensorType, axes: Axes | None) -> int | None:
        """Number of positions of one sample; ``None`` where unknown."""
        if found.shape is None or found.batch_axis is None or (axes is None and len(found.shape) > 2):
            return None
        kept = [d for i, d in enumerate(found.shape) if i != found.batch_axis and i not in (axes or (1,))]
        return math.prod(d for d in kept if isinstance(d, int)) if all(isinstance(d, int) for d in kept) else None

    def _one_position(self, layer: str) -> bool:
        """Whether a layer works on one position per sample, as a classifier behind global pooling does."""
        for value in self.flow.data_inputs(layer)[:1]:
            found = self.types.get(value)
            return found is not None and self._positions(found, self.axes.get(value)) == 1
        return False

    # -- the report ----------------------------------------------------------------------------------------------------

    def report(self) -> SiteReport:
        known: dict[str, str] = {}
        judged: dict[str, Site | str] = {value: self._site(value) for value in self.values}
        points: dict[str, list[Site]] = {}
        for value, verdict in judged.items():
            if isinstance(verdict, Site):
                point = self._point(self.roots[value], known)
                # a branch that joins the last block's end is as late as that end
                if fault := self._nothing_left(self.flow.ancestor_bits([point])):
                    judged[value] = fault
                else:
                    points.setdefault(point, []).append(verdict)
        # max keeps the first of equals: a value before its rearrangements
        best = {p: max(sites, key=lambda s: (-len(s.live), self.depths[s.value])) for p, sites in points.items()}
        same: dict[int, str] = {}
        for point in best:
            layers = self.flow.ancestor_bits([point]) & self.work
            if layers not in same or not best[same[layers]].cuts:
                same[layers] = point  # the later one holds more, except where nothing but the earlier one is needed
        chosen = {p: best[same[self.flow.ancestor_bits([p]) & self.work]] for p in best}
        sites: list[Site] = []
        rejected: list[Rejected] = []
        for value, verdict in judged.items():
            if isinstance(verdict, str):
                rejected.append(Rejected(value, verdict))
                continue
            site = chosen[self._point(self.roots[value], known)]
            if site.value == value:
                sites.append(site)
            else:
                rejected.append(Rejected(value, self._duplicate(value, site)))
        return SiteReport(tuple(sites), tuple(rejected))

    def _duplicate(self, value: str, best: Site) -> str:
        by, after = self.flow.producer[value], self.flow.data_consumers(value)[0]
        ops = self.flow.nodes
        if self.flow.ancestor_bits([value]) >> self.flow.index(self.flow.producer[best.value]) & 1:
            return f"the site {best.value!r} comes before it without a layer in between ({ops[by].op} {by!r})"
        return f"followed by {ops[after].op} {after!r}, not by a layer; the site is {best.value!r}"
