"""What the passes that cut units of channel groups share; they differ in the kinds of groups that they cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from eexform import plugins
from eexform.errors import OptionError, PassError, need, suggest
from eexform.ir.cut import Figures, predicted
from eexform.ir.cut import cut as cut_units
from eexform.ir.graph import BATCH, Graph
from eexform.ir.groups import ChannelGroups, Group
from eexform.ir.inference import split_dim
from eexform.passes._contract import Pass, PassContext, PassResult, Skip
from eexform.passes._exits import refresh_exits
from eexform.pruning import criteria
from eexform.pruning.allocate import NORMALISATIONS, SCOPES, Cuts, Limits, Order, nearest_share, to_cost, to_share
from eexform.tunables import Choice, Domain, Each, Real, parameter, tunable

CONTROL = "random"
"""The criterion that no search should choose."""

_RATIO = Real(0.0, 0.9)
_LISTED = 20
"""Groups that are listed one by one when they are left alone."""


def _criteria() -> Choice:
    return Choice([name for name in plugins.available(criteria.GROUP) if name != CONTROL])


@dataclass(frozen=True)
class PruneGroups(Pass):
    """Cut the least important units of channel groups; base of ``prune_channels`` and ``prune_heads``."""

    kinds: ClassVar[tuple[str, ...]]
    """Kinds of groups that are cut."""

    unit: ClassVar[str]
    """What their units are called, and what ``of`` calls a share of their number."""

    ratio: float = tunable(_RATIO, default=0.5, help="share to save, of what `of` names")
    of: str = parameter(default="macs", help="what ratio is a share of: the network's macs or params, or the units")
    scope: str = tunable(
        Choice(SCOPES), default="global", help="global: groups compete; uniform: each loses the same share of its units"
    )
    criterion: str = tunable(
        lambda graph: _criteria(),
        default="l2",
        help="how much a unit matters, e.g. l2 or taylor:samples=256 (see `eexform criteria`)",
        domain_help="any registered criterion but random",
    )
    normalise: str = parameter(default="family", help="scale on which groups compete: " + ", ".join(NORMALISATIONS))
    round_to: int = parameter(default=1, help="what is left of a group that is cut is a multiple of this many channels")
    least: int = parameter(default=1, help="units that every group keeps at least")
    most: float = parameter(default=0.9, help="largest share of a group's units that is cut")
    ratios: Mapping[str, float] = tunable(
        lambda graph: Each("families", {}),
        default={},
        help="share of units to cut by family (or group), used instead of ratio; what is not listed stays whole",
        domain_help="for each family of groups: " + _RATIO.describe(),
    )
    only: tuple[str, ...] = parameter(default=(), help="groups that may be cut; all by default")
    skip: tuple[str, ...] = parameter(default=(), help="groups that stay as they are")
    cut: Mapping[str, tuple[int, ...]] = parameter(default={}, help="exactly these units by group, and nothing else")

    bindings: Mapping[str, int] = parameter(
        default={}, help="sizes of symbolic dimensions other than the batch, to count macs"
    )

    def __post_init__(self) -> None:
        _RATIO.validate(self.ratio, "ratio")
        shares = self.shares()
        need(self.of in shares, f"of: {self.of!r} is not a choice: {suggest(str(self.of), shares)}", OptionError)
        self.limits()  # checks what it is made of
        criteria.parse(self.criterion)
        for name in ("only", "skip"):
            given = getattr(self, name)
            need(not isinstance(given, str), f"{name}: expected a list of names, found {given!r}", OptionError)
            object.__setattr__(self, name, tuple(map(str, given)))
        ratios = {str(name): _RATIO.validate(share, f"ratios[{name}]") for name, share in self.ratios.items()}
        object.__setattr__(self, "ratios", ratios)
        object.__setattr__(self, "cut", {str(name): _units(name, units) for name, units in self.cut.items()})
        for name in ("ratios", "only", "skip"):
            clash = bool(self.cut) and bool(getattr(self, name))
            need(not clash, f"cut says exactly what goes, so {name} cannot be given with it", OptionError)

    @classmethod
    def shares(cls) -> tuple[str, ...]:
        """What ``ratio`` may be a share of."""
        return ("macs", "params", cls.unit)

    @classmethod
    def space(cls, graph: Graph, context: PassContext) -> dict[str, Domain]:
        """Ratios for the families that this graph has; criteria that can work with what the context holds."""
        domains = super().space(graph, context)
        families = {
            family: _RATIO
            for family, names in graph.groups.families().items()
            if any(cls.takes(graph.groups.by_name[name]) for name in names)
        }
        known = _criteria().values
        if context.samples is None:
            known = tuple(name for name in known if not criteria.get(name).needs)
        return {**domains, "criterion": Choice(known), "ratios": Each("families", families)}

    @classmethod
    def follow(cls, item: Any, before: Graph, after: Graph) -> Any:
        """A family is called after its first group, which may have gone with a block: then after the next one."""
        members = set(before.groups.families().get(item, ()))
        families = after.groups.families()
        return next((family for family, names in families.items() if members & set(names)), item)

    @classmethod
    def takes(cls, group: Group) -> bool:
        """Whether ``group`` is one that the pass could cut."""
        return group.kind in cls.kinds and group.prunable

    def limits(self) -> Limits:
        """What is respected, whatever the scores."""
        return Limits(self.scope, self.normalise, self.round_to, self.least, self.most)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        if self.cut:
            self._check_cut(graph.groups)
            return self._cut(graph, self.cut, (), (), settled=True)
        names = self._names(graph.groups)
        skipped = _frozen(self.kinds, self.unit, graph.groups)
        groups = [group for group in graph.groups.groups if group.name in names]
        if not groups:
            why = f"none of its groups of {self.unit} can be cut" if skipped else f"it has no groups of {self.unit}"
            return PassResult(graph, changed=False, skipped=(*skipped, Skip("graph", why)), replay=())
        criterion = criteria.parse(self.criterion)
        if criterion.needs and context.samples is None:
            raise PassError(
                f"criterion {criterion.name!r} {criteria.NEEDS['samples']} (--data), or take one that looks at weights "
                "alone, such as l2"
            )
        scores, reasons = criteria.score(criterion, graph, groups, context.samples)
        skipped += _listed(Skip(name, f"criterion {criterion.name!r}: {why}") for name, why in reasons.items())
        judged = [group for group in groups if group.name in scores]
        cuts, notes = self._allocated(graph, judged, scores)
        return self._cut(graph, cuts, skipped, notes)

    def _names(self, groups: ChannelGroups) -> frozenset[str]:
        """Groups that may be cut, after ``only``, ``skip`` and ``ratios``.

        Raises:
            PassError: one that is named does not exist, or cannot be cut.
        """
        wanted = {group.name for group in groups.groups if self.takes(group)}
        for where, given in (("only", self.only), ("ratios", tuple(self.ratios)), ("skip", self.skip)):
            for name in given:
                need(name in groups.by_name, f"{where}: {_unknown(groups, name)}")
                takes = where == "skip" or self.takes(groups[name])
                need(takes, f"{where}: {name!r} cannot be cut: {self._refusal(groups[name])}")
        if self.ratios:
            wanted = {name for names, _ in self._shares(groups) for name in names}
        if self.only:
            wanted &= set(self.only)
        return frozenset(wanted - set(self.skip))

    def _shares(self, groups: ChannelGroups) -> list[tuple[tuple[str, ...], float]]:
        """The groups that each entry of ``ratios`` is about, and its share.

        A name that is a family's stands for the family, except for those of its groups that have an entry of their own.
        """
        families = groups.families()
        alone = {name for name in self.ratios if name not in families}
        return [
            (tuple(other for other in families.get(name, (name,)) if other == name or other not in alone), share)
            for name, share in self.ratios.items()
        ]

    def _refusal(self, group: Group) -> str:
        if group.frozen is not None:
            return group.frozen
        if group.kind not in self.kinds:
            return f"its units are {group.kind}, and {self.name} cuts {', '.join(self.kinds)}"
        return "it has a single unit"

    def _check_cut(self, groups: ChannelGroups) -> None:
        """Refuse a ``cut`` of groups that the pass does not cut; units are checked where they are cut."""
        for name in self.cut:
            need(name in groups.by_name, f"cut: {_unknown(groups, name)}")
            need(self.takes(groups[name]), f"cut: {name!r} cannot be cut: {self._refusal(groups[name])}")

    def _allocated(self, graph: Graph, groups: Sequence[Group], scores: Mapping[str, Any]) -> tuple[Cuts, list[str]]:
        """Which units go, and what there is to say about it."""
        families = graph.groups.families()
        limits = self.limits()
        if not self.ratios:
            order = Order(groups, scores, list(families.values()), limits, self._savings(graph, groups))
            if self.of == self.unit:
                cuts, met = to_share(order, self.ratio)
            else:
                cuts, met = to_cost(order, self._cost(graph), self.ratio)
            short = f"the limits (least, most, round_to) leave less than {self.ratio:.1%} of {self.of} to cut"
            return cuts, [] if met else [f"{short}: everything that may go is cut"]
        cuts = {}
        for names, share in self._shares(graph.groups):
            chosen = [group for group in groups if group.name in names]
            if chosen:
                cuts.update(nearest_share(Order(chosen, scores, [names], limits), share))
        return {group.name: cuts[group.name] for group in groups if group.name in cuts}, []

    def _cut(
        self,
        graph: Graph,
        cuts: Mapping[str, Sequence[int]],
        skipped: Iterable[Skip],
        notes: Iterable[str],
        *,
        settled: bool = False,
    ) -> PassResult:
        """The result of cutting exactly ``cuts``."""
        exact = {name: tuple(units) for name, units in cuts.items() if units}
        if not exact:
            skips = (*skipped, Skip("graph", f"no {self.unit} were to be cut"))
            return PassResult(graph, changed=False, skipped=skips, notes=tuple(notes), replay=None if settled else ())
        after = refresh_exits(graph, cut_units(graph, exact, graph.groups))
        return PassResult(
            after,
            changed=True,
            skipped=tuple(skipped),
            notes=(self._said(graph, exact), *notes),
            replay=None if settled else (self._settled(exact),),
        )

    def _savings(self, graph: Graph, groups: Sequence[Group]) -> dict[str, float]:
        """What the first unit of each group saves; empty where nothing depends on it."""
        if self.normalise != "cost" or self.of == self.unit or self.scope == "uniform":
            return {}
        cost = self._cost(graph)
        whole = cost({})
        return {group.name: whole - cost({group.name: (0,)}) for group in groups}

    def _settled(self, cuts: Mapping[str, tuple[int, ...]]) -> PruneGroups:
        """The pass that cuts exactly this."""
        return type(self)(cut=cuts, bindings=self.bindings)

    def _cost(self, graph: Graph) -> Callable[[Mapping[str, Sequence[int]]], float]:
        """What ``of`` says, as a function of the cut.

        Raises:
            GraphError: work is asked for, and a symbolic dimension has no size.
        """
        place = Figures._fields.index(self.of)
        bindings = self.bindings if self.of == "macs" else {**_unbound(graph), **self.bindings}
        return lambda cuts: float(predicted(graph, cuts, graph.groups, bindings)[place])

    def _said(self, graph: Graph, cuts: Mapping[str, Sequence[int]]) -> str:
        """What was cut and saved; without the work where a symbolic dimension has no size."""
        gone = sum(map(len, cuts.values()))
        total = sum(group.size for group in graph.groups.groups if self.takes(group))
        how = "" if self.cut else f" by {self.criterion}"
        free = _unbound(graph)
        before, after = (
            predicted(graph, each, graph.groups, {**free, **self.bindings}) for each in (dict[str, Any](), cuts)
        )
        parts = [("MACs", before.macs, after.macs)] if free.keys() <= self.bindings.keys() else []
        parts += [("parameters", before.params, after.params)]
        figures = ", ".join(f"{name} {old:,} -> {new:,} ({_change(old, new)})" for name, old, new in parts)
        where = f"{len(cuts)} group{'s' * (len(cuts) > 1)}"
        return f"cut {gone} of {total} {self.unit} in {where}{how}: {figures}"


def _unbound(graph: Graph) -> dict[str, int]:
    """Symbolic dimensions other than the batch, each as 1: parameters do not depend on them."""
    dims = {dim for known in graph.types.values() for dim in known.shape or () if isinstance(dim, str)}
    return dict.fromkeys(sorted({split_dim(dim)[1] for dim in dims} - {BATCH}), 1)


def _unknown(groups: ChannelGroups, name: str) -> str:
    return f"the graph has no channel group {name!r}: {suggest(name, groups.by_name)}"


def _frozen(kinds: Sequence[str], unit: str, groups: ChannelGroups) -> tuple[Skip, ...]:
    """The groups that may not be cut, with their reasons."""
    return _listed(Skip(g.name, g.frozen) for g in groups.groups if g.frozen is not None and g.kind in kinds)


def _listed(skips: Iterable[Skip]) -> tuple[Skip, ...]:
    """The first of many, and how many more there are."""
    found = list(skips)
    more = len(found) - _LISTED
    return (*found[:_LISTED], Skip("graph", f"{more} more groups were left alone")) if more > 1 else tuple(found)


def _units(name: Any, units: Any) -> tuple[int, ...]:
    """Units of a group, rising.

    Raises:
        OptionError: not a list of different whole numbers.
    """
    fine = isinstance(units, Sequence) and not isinstance(units, str)
    fine = fine and all(isinstance(unit, int) and not isinstance(unit, bool) and unit >= 0 for unit in units)
    need(fine, f"cut[{name}]: expected a list of unit numbers, found {units!r}", OptionError)
    need(len(set(units)) == len(units), f"cut[{name}]: a unit is listed twice", OptionError)
    return tuple(sorted(units))


def _change(before: int, after: int) -> str:
    return f"{100 * (after - before) / before:+.1f} %" if before and math.isfinite(before) else "0 %"
