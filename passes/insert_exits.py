"""Attach heads to sites of the trunk: each becomes an exit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from eexform import plugins
from eexform.backends.lower_if import MAX_EXITS
from eexform.backends.metadata import TRUNK, with_plan
from eexform.errors import OptionError, PassError, need
from eexform.heads import HeadSpec, head_graph, portfolio, with_parameters
from eexform.heads.build import GATE
from eexform.ir import measures
from eexform.ir.arithmetic import node_macs
from eexform.ir.emit import Emitter
from eexform.ir.exit_nodes import head_digest
from eexform.ir.exits import Exit, outputs_of
from eexform.ir.extract import graft
from eexform.ir.flow import WIDEST
from eexform.ir.graph import Graph
from eexform.ir.policy import emit_carry, emit_gates
from eexform.ir.sites import Site, find_sites
from eexform.passes._contract import Pass, PassContext, PassResult, Skip, TrainedHead
from eexform.tunables import Choice, Domain, Each, Real, Subset, parameter, tunable

NAMED = {"never": math.inf, "always": -math.inf}
"""Thresholds that recipes and plans write by name."""

_CARRY = Choice((0.0, 0.25, 0.5, 0.75, 1.0))


def _candidates(graph: Graph, sites: Sequence[Site]) -> dict[str, Choice]:
    """Heads worth training at each site."""
    macs = sum(node_macs(node, graph.types) or 0 for node in graph.nodes)
    classes = graph.num_classes
    return {
        site.value: Choice([str(spec) for spec in portfolio(site, trunk_macs=macs, num_classes=classes)])
        for site in sites
    }


def _sites(graph: Graph) -> Subset:
    return Subset([site.value for site in find_sites(graph).sites], most=MAX_EXITS)


def _heads(graph: Graph) -> Each:
    return Each("sites", _candidates(graph, find_sites(graph).sites))


def _thresholds(graph: Graph) -> Each:
    return Each("sites", {site.value: Real(0.0, 1.0) for site in find_sites(graph).sites})


def _measures(gated: bool | None = None) -> Choice:
    """Measures that heads with a gate (or without one; ``None``: either) may take."""
    return Choice(plugins.available("eexform.measures") if gated is None else measures.of_kind(learned=gated))


def check_measure(measure: str, heads: Mapping[str, str]) -> None:
    """Gated heads go with measures that read gates, other heads with the others.

    Args:
        measure: its name.
        heads: head text by site.

    Raises:
        OptionError: they do not; the message says what to do.
    """
    learned = measures.is_learned(measure)
    wrong = sorted(site for site, text in heads.items() if HeadSpec.parse(text).gate != learned)
    if not wrong:
        return
    head, others = heads[wrong[0]], ", ".join(measures.of_kind(learned=not learned))
    raise OptionError(
        f"heads: measure {measure!r} reads "
        + (
            f"gates, and the head {head!r} at {wrong[0]!r} has none: take {head + '/gate'!r}, or one of the measures "
            if learned
            else f"scores, and the head {head!r} at {wrong[0]!r} has a gate: take it without /gate, or one of the "
            "measures "
        )
        + others
    )


def gated(heads: Iterable[str]) -> bool:
    """Whether the candidate heads have gates.

    Raises:
        OptionError: some have and some have not: no measure could compare their exits.
    """
    kinds = {HeadSpec.parse(text).gate: text for text in heads}
    if len(kinds) == 2:
        raise OptionError(
            f"heads: {kinds[True]!r} has a gate and {kinds[False]!r} has none, and no measure reads both: give all "
            "candidates /gate, or none"
        )
    return kinds.popitem()[0] if kinds else False


@dataclass(frozen=True)
class InsertExits(Pass):
    """Attach trained heads to sites of the trunk and make each an exit.

    The exits' scores become outputs behind the final one, in the order in which a sample meets the sites. With
    ``carry`` b > 0 an exit also hears what the exits before it said: its scores are ``b * (scores before) + logits /
    temperature``, and so are the final ones; the temperatures are then part of the network and each exit's own is 1.

    Heads with a gate go with the measures that read gates; their confidences are outputs behind the scores.
    """

    name: ClassVar[str] = "insert_exits"

    sites: tuple[str, ...] = tunable(
        _sites, help="values of the trunk that get an exit", domain_help="subset of the sites"
    )
    heads: Mapping[str, str] = tunable(
        _heads,
        help="head at each site, e.g. conv:1x32/avg/s2",
        domain_help="for each of sites: one of the trained heads",
    )
    thresholds: Mapping[str, float] = tunable(
        _thresholds,
        help="a sample leaves where confidence >= threshold; also 'never' and 'always'",
        domain_help="for each of sites: real 0..1",
    )
    measure: str = tunable(
        lambda graph: _measures(), default="max_prob", help="confidence measure", domain_help="any registered measure"
    )
    carry: float = tunable(_CARRY, default=0.0, help="weight of the earlier exits' scores")
    final_temperature: float = parameter(default=1.0, help="of the final classifier; used with carry only")
    untrained: bool = parameter(default=False, help="random heads instead of trained ones, to measure speed")

    def __post_init__(self) -> None:
        if isinstance(self.sites, str):
            raise OptionError(f"sites: expected a list of values, found {self.sites!r}")
        sites = tuple(map(str, self.sites))
        need(len(set(sites)) == len(sites), f"sites: an item is listed twice in {list(sites)}", OptionError)
        heads, thresholds = _table(self.heads, "heads"), _table(self.thresholds, "thresholds")
        for site in sites:
            need(site in heads, f"heads: site {site!r} has none", OptionError)
            need(site in thresholds, f"thresholds: site {site!r} has none", OptionError)
        positive = math.isfinite(self.final_temperature) and self.final_temperature > 0
        need(positive, f"final_temperature: {self.final_temperature} is not a positive number", OptionError)
        _measures().validate(self.measure, "measure")
        chosen = {site: str(heads[site]) for site in sites}
        check_measure(self.measure, chosen)
        object.__setattr__(self, "sites", sites)
        object.__setattr__(self, "heads", {site: str(HeadSpec.parse(str(heads[site]))) for site in sites})
        object.__setattr__(self, "thresholds", {site: threshold(thresholds[site], site) for site in sites})

    @classmethod
    def checked(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Heads in canonical form; thresholds as they are, but valid."""
        checked = super().checked(given)
        try:
            if "heads" in checked:
                heads = checked["heads"].items()
                checked["heads"] = {str(site): str(HeadSpec.parse(str(text))) for site, text in heads}
            for site, value in checked.get("thresholds", {}).items():
                threshold(value, site)
        except OptionError as error:
            raise OptionError(f"pass {cls.name!r}: {error}") from error
        return checked

    @classmethod
    def space(cls, graph: Graph, context: PassContext) -> dict[str, Domain]:
        """Sites and heads are the trained ones where ``context.heads`` is given, else all worth training."""
        if context.heads is None:
            found = find_sites(graph).sites
            choices = _candidates(graph, found)
        else:
            trained = set(context.heads.sites(graph.digest))
            found = tuple(site for site in find_sites(graph, max_live=WIDEST).sites if site.value in trained)
            choices = {site.value: Choice(context.heads.heads(graph.digest, site.value)) for site in found}
        domains: dict[str, Domain] = {
            "sites": Subset([site.value for site in found], most=MAX_EXITS),
            "heads": Each("sites", choices),
            "thresholds": Each("sites", {site.value: Real(0.0, 1.0) for site in found}),
            "measure": _measures(gated(str(head) for choice in choices.values() for head in choice.values)),
            "carry": _CARRY,
        }
        return domains

    def requires(self, graph: Graph) -> None:
        need(not graph.exits, f"the graph has {len(graph.exits)} exits already; start from the trunk")
        report = find_sites(graph, max_live=WIDEST)  # how much may be carried is for those to say who choose the sites
        for value in self.sites:
            report.site(value)

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        if not self.sites:
            return PassResult(graph, changed=False, skipped=(Skip("graph", "no sites were chosen"),))
        chosen = [site for site in find_sites(graph, max_live=WIDEST).sites if site.value in self.sites]
        draft = graph.copy().gs
        values = {tensor.name: tensor for node in draft.nodes for tensor in node.outputs}
        scores, gates, exits = [], [], []
        for place, site in enumerate(chosen):
            head, trained = self._head(graph, site, place, context)
            prefix = f"exit{place}."
            feed = {head.inputs[0]: values[site.value]}
            planted = graft(draft, head, feeds=feed, prefix=prefix)
            scores.append(planted[head.final])
            gates += [planted[GATE]] if GATE in planted else []
            logits = graph.scores == "logits"
            exits.append(
                Exit(
                    site=site.value,
                    head=self.heads[site.value],
                    logits=scores[-1].name,
                    measure=self.measure,
                    threshold=self.thresholds[site.value],
                    temperature=trained.temperature if logits or self.carry else 1.0,
                    parameters=tuple(prefix + name for name in sorted(trained.parameters)),
                    digest=trained.digest,
                )
            )
        if self.carry:
            scores, exits = self._carried(draft, scores, exits, graph)
        sure = emit_gates(Emitter(draft), gates, self.measure) if gates else []
        if sure:
            exits = [replace(item, confidence=value.name) for item, value in zip(exits, sure, strict=True)]
        draft.outputs = [draft.outputs[0], *scores, *sure]
        notes = tuple(f"exit {place} at {item.site} with {item.head}" for place, item in enumerate(exits))
        metadata = {**graph.metadata, TRUNK: graph.digest}
        if self.carry:
            metadata = with_plan(metadata, carry=self.carry, final_temperature=self.final_temperature)
        return PassResult(graph.replace(draft, exits=exits, metadata=metadata), changed=True, notes=notes)

    def ensures(self, graph: Graph) -> None:
        need(len(graph.exits) == len(self.sites), f"{len(self.sites)} sites, but {len(graph.exits)} exits")
        need(
            graph.outputs == outputs_of(graph.final, graph.exits),
            f"the outputs {list(graph.outputs)} are not the final scores, those of every exit and the confidences",
        )
        for item in graph.exits:
            learned = measures.is_learned(item.measure)
            need(learned == bool(item.confidence), f"exit at {item.site!r}: {item.measure!r} has no confidence value")
            absent = [name for name in item.parameters if name not in graph.constants]
            need(not absent, f"exit at {item.site!r}: parameters {absent[:3]} are not in the graph")

    def to_plain(self) -> dict[str, Any]:
        plain = super().to_plain()
        names = {value: name for name, value in NAMED.items()}
        plain["thresholds"] = {site: names.get(value, value) for site, value in self.thresholds.items()}
        return plain

    def _head(self, graph: Graph, site: Site, place: int, context: PassContext) -> tuple[Graph, TrainedHead]:
        """The stand-alone head graph for ``site`` with its parameters in place, and what is known about it."""
        text = self.heads[site.value]
        head = head_graph(
            HeadSpec.parse(text),
            site,
            num_classes=graph.num_classes,
            scores=graph.scores,
            seed=context.seed + place,
            opset=graph.opset,
        )
        if self.untrained:
            parameters = head.parameters()
            return head, TrainedHead(parameters, 1.0, head_digest(parameters))
        if context.heads is None:
            raise PassError(
                f"there are no trained heads to attach at {site.value!r}: name the plan's weights in the recipe "
                '(weights = "plan.safetensors"), or say untrained = true for random ones'
            )
        trained = context.heads.trained(graph.digest, site.value, text)
        return with_parameters(head, trained.parameters), trained

    def _carried(self, draft: Any, scores: list[Any], exits: list[Exit], graph: Graph) -> tuple[list[Any], list[Exit]]:
        """Let every exit and the final classifier add up what was said before; the final output keeps its name."""
        emitter = Emitter(draft)
        inner, name = draft.outputs[0], draft.outputs[0].name
        alone = f"{name}.alone"
        while alone in graph.tensors:
            alone += "_"
        emitter.rename(inner, alone)
        temperatures = [*(item.temperature for item in exits), self.final_temperature]
        *states, final = emit_carry(emitter, [*scores, inner], temperatures, self.carry, graph.scores)
        emitter.rename(final, name)
        draft.outputs[0] = final
        moved = [replace(item, logits=state.name, temperature=1.0) for item, state in zip(exits, states, strict=True)]
        return states, moved


def _table(given: Any, name: str) -> dict[str, Any]:
    need(isinstance(given, Mapping), f"{name}: expected a table of site = value, found {given!r}", OptionError)
    return dict(given)


def threshold(value: Any, site: str) -> float:
    """A threshold as a number.

    Raises:
        OptionError: neither a number 0..1 nor a name; ``site`` says which.
    """
    if isinstance(value, str) and value in NAMED:
        return NAMED[value]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    valid = number and (0.0 <= value <= 1.0 or math.isinf(value))
    need(valid, f"thresholds[{site}]: {value!r} is neither a number 0..1 nor 'never' or 'always'", OptionError)
    return float(value)
