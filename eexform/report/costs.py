"""What a model or a plan costs, by one or several cost models: by node, by stretch of the trunk, by exit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eexform.cost_models import Cost, CostModel
from eexform.cost_models._device import Memory, load_device
from eexform.cost_models._kernels import Kernel, kernels
from eexform.cost_models._parts import Part, Stretch, divide, stretches
from eexform.cost_models.energy import Energy
from eexform.cost_models.macs import Macs
from eexform.cost_models.peak_ram_bytes import Fit, PeakRam, fits
from eexform.cost_models.roofline import Roofline
from eexform.cost_models.table import Table
from eexform.errors import OptionError, need
from eexform.ir.graph import Graph
from eexform.ir.sites import Site, find_sites
from eexform.progress import Progress, Silent
from eexform.report.cost_choice import chosen, label, unique
from eexform.report.cost_comparison import Column, Comparison, compared
from eexform.report.layout import count
from eexform.search.candidates import choose_sites
from eexform.search.front import Plan
from eexform.search.run import Run
from eexform.search.space import plain

SITES = 8
"""Places at which a model without exits is divided, at most."""

BOUNDS = ("compute", "bandwidth", "overhead")


@dataclass(frozen=True)
class ModelCosts:
    """What one cost model says.

    Attributes:
        model: the cost model.
        label: its name, with settings where another of that name takes part.
        cost: of the whole graph: heads included, routing not.
        parts: per stretch of :attr:`CostReport.stretches`.
        mean: over the samples of a split, by the exits that they leave at; of a plan only, and not of sizes and memory.
        original: cost of the model that the plan was made from; ``None`` where there is no plan.
        fit: whether the memory of the device is enough; of ``peak_ram_bytes`` on a device whose memory is known.
    """

    model: CostModel
    label: str
    cost: Cost
    parts: tuple[Part, ...]
    mean: Mapping[str, float] = field(default_factory=dict)
    original: float | None = None
    fit: Fit | None = None

    @property
    def worst(self) -> float:
        """What the dearest path costs: mostly that of a sample which never leaves."""
        return max(part.path for part in self.parts)


@dataclass(frozen=True)
class CostReport:
    """What :func:`cost` found.

    Attributes:
        graph: what was priced.
        stretches: its parts, in the order in which a sample meets them.
        costs: one per cost model asked for in detail.
        comparison: cost models side by side, where that was asked for.
        plan: index of the plan in its run.
        rates: by split, the share of samples that leave at each stretch's end.
        notes: what to know about the figures.
    """

    graph: Graph
    stretches: tuple[Stretch, ...]
    costs: tuple[ModelCosts, ...]
    comparison: Comparison | None = None
    plan: int | None = None
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> ModelCosts:
        """What the cost model of this label says."""
        return {entry.label: entry for entry in self.costs}[name]

    def to_json(self) -> dict[str, Any]:
        """Plain values; the keys are stable."""
        heads = [item.head for item in self.graph.exits]
        return {
            "name": self.graph.gs.name,
            "digest": self.graph.digest,
            "plan": self.plan,
            "stretches": [
                {
                    "end": piece.end or None,
                    "nodes": len(piece.trunk),
                    "head": heads[place] if place < len(heads) else None,
                    "rates": {split: rates[place] for split, rates in self.rates.items()},
                }
                for place, piece in enumerate(self.stretches)
            ],
            "costs": [_plain(entry, self) for entry in self.costs],
            "comparison": None if self.comparison is None else self.comparison.to_json(),
            "notes": list(self.notes),
        }


def cost(
    what: Graph | Plan,
    models: str | CostModel | Sequence[str | CostModel] = "macs",
    *,
    compare: Sequence[str | CostModel] = (),
    device: str | None = None,
    sites: int = SITES,
    progress: Progress | None = None,
) -> CostReport:
    """What a model, or a plan of a run, costs.

    Args:
        what: a graph without exits is divided at some of its candidate sites; one with exits, or a plan, at its own.
        models: cost models to report in detail, as texts (``roofline:device=rpi5``) or as objects; may be empty where
            some are compared.
        compare: cost models to put side by side. Where one of them is measured, the others are judged by it.
        device: for every model named by a text that has a setting ``device`` and is not given one there, and whose RAM
            and flash ``peak_ram_bytes`` is held to.
        sites: at how many places a graph without exits is divided, at most.
        progress: told beforehand what will be measured, and then how far that is.

    Raises:
        OptionError: a cost model or a setting does not exist or is missing; nothing has been priced then.
        GraphError: a shape that a cost model needs is not known.
    """
    named = [models] if isinstance(models, str | CostModel) else list(models)
    need(len(compare) != 1, "there is nothing to compare one cost model with; name two at least", OptionError)
    every = chosen([*named, *compare], device)
    detailed, listed = unique(every[: len(named)]), unique(every[len(named) :])
    taking_part = unique([*detailed, *listed])
    memory = _memory(device, taking_part)
    graph, original = _subject(what)
    rates, notes = _rates(what, graph)
    places = () if graph.exits else _places(graph, sites, taking_part)
    pieces = stretches(graph, [site.value for site in places])
    found = _priced(taking_part, graph, places, original, progress or Silent())
    labels = [label(model, taking_part) for model in taking_part]
    entries = []
    for model, name, (whole, parts, alone) in zip(taking_part, labels, found, strict=True):
        mean, fit = _means(model, parts, rates), _fit(model, graph, memory)
        entries.append(ModelCosts(model, name, whole, parts, mean, alone, fit))
    comparison = None
    if listed:
        columns = [_column(entries[taking_part.index(model)], bool(graph.exits)) for model in listed]
        comparison = compared(columns, [piece.end for piece in pieces], paths=bool(graph.exits))
    return CostReport(
        graph,
        pieces,
        tuple(entries[taking_part.index(model)] for model in detailed),
        comparison,
        what.index if isinstance(what, Plan) else None,
        rates,
        notes,
    )


def _subject(what: Graph | Plan) -> tuple[Graph, Graph | None]:
    """The graph to price, and the one that it is compared with."""
    need(isinstance(what, Graph | Plan), f"{what!r} is neither a graph (ee.load) nor a plan of a run", OptionError)
    if not isinstance(what, Plan):
        return what, None
    return what.materialise(), what.source.original if isinstance(what.source, Run) else None


def _memory(device: str | None, models: Sequence[CostModel]) -> Memory | None:
    """What the device named has, where a model needs to know it."""
    if device is None or not any(isinstance(model, PeakRam) for model in models):
        return None
    return load_device(device).memory


def _fit(model: CostModel, graph: Graph, memory: Memory | None) -> Fit | None:
    if memory is None or memory.ram_bytes is None or not isinstance(model, PeakRam):
        return None
    return fits(graph, memory.ram_bytes, memory.flash_bytes, model=model)


def _rates(what: Graph | Plan, graph: Graph) -> tuple[dict[str, tuple[float, ...]], tuple[str, ...]]:
    """Shares of samples by the graph's exits, by split; and what to say where the plan does not tell them."""
    if not isinstance(what, Plan):
        return {}, ()
    found = {}
    for split, figures in (("select", what.select), ("test", what.test)):
        if figures:
            shares = dict(zip([exit_.site for exit_ in what.exits], figures["rates"], strict=False))
            kept = [shares.get(item.site, math.nan) for item in graph.exits] + [figures["rates"][-1]]
            if not math.isclose(sum(kept), 1.0, abs_tol=1e-6):
                why = "passes behind insert_exits changed the exits, so the plan's exit rates are not theirs: no means"
                return {}, (why,)
            found[split] = tuple(map(float, kept))
    return found, ()


def _places(graph: Graph, most: int, models: Sequence[CostModel]) -> tuple[Site, ...]:
    """Candidate sites spread over the graph's multiply-accumulates, as a search would choose them."""
    report = find_sites(graph)
    if not report.sites or most < 1:
        return ()
    bindings = (getattr(model, "bindings", None) for model in models)
    macs = Macs(next(filter(None, bindings), {})).cost(graph)
    return choose_sites(report, graph.flow.accumulate(macs.nodes), macs.total, most) if macs.total else ()


def _priced(
    models: Sequence[CostModel], graph: Graph, places: Sequence[Site], original: Graph | None, progress: Progress
) -> list[tuple[Cost, tuple[Part, ...], float | None]]:
    """Cost, parts and the original's cost by each model; what is measured comes last, when nothing else can fail."""

    def price(model: CostModel) -> tuple[Cost, tuple[Part, ...], float | None]:
        return *divide(model, graph, places), None if original is None else model.cost(original).total

    found = {place: price(model) for place, model in enumerate(models) if not model.measured}
    measured = {place: model for place, model in enumerate(models) if model.measured}
    if measured:
        divided = count(len(graph.exits), "exit") if graph.exits else count(len(places), "place")
        names = ", ".join(label(model, models) for model in measured.values())
        progress.say(f"to be measured on this machine: {names}; the whole network and what runs up to {divided}")
        with progress.task("measuring", len(measured)) as task:
            for place, model in measured.items():
                found[place] = price(model)
                task.advance(note=model.name)
    return [found[place] for place in range(len(models))]


def _means(model: CostModel, parts: Sequence[Part], rates: Mapping[str, Sequence[float]]) -> dict[str, float]:
    if model.combine == "max" or not model.per_sample:
        return {}
    return {
        split: sum(share * part.path for share, part in zip(shares, parts, strict=True))
        for split, shares in rates.items()
    }


def _column(entry: ModelCosts, paths: bool) -> Column:
    """What a model puts into the comparison: what leaving at each exit costs, or each stretch."""
    model = entry.model
    return Column(
        label=entry.label,
        unit=model.unit,
        measured=model.measured,
        differences=not (model.additive or paths),
        adds_up=model.per_sample and model.combine == "sum",
        figures=tuple(part.path if paths else part.trunk for part in entry.parts),
        whole={**entry.mean} if paths else {"total": entry.cost.total},
    )


def _plain(entry: ModelCosts, report: CostReport) -> dict[str, Any]:
    model, found = entry.model, entry.cost
    called = _kernels(model, report.graph)
    return {
        "model": model.name,
        "label": entry.label,
        "settings": {item.name: plain(getattr(model, item.name)) for item in dataclasses.fields(model)},  # type: ignore[arg-type]
        "unit": model.unit,
        "measured": model.measured,
        "additive": model.additive,
        "per_sample": model.per_sample,
        "combine": model.combine,
        "total": found.total,
        "parts": [
            {**dataclasses.asdict(part), "bounds": _bounds(found, piece.trunk)}
            for part, piece in zip(entry.parts, report.stretches, strict=True)
        ],
        "mean": dict(entry.mean) or None,
        "worst": entry.worst,
        "original": entry.original,
        "nodes": _nodes(entry, report, called),
        "bounds": _bounds(found, found.nodes),
        "unknown": [{"node": node, "operator": operator} for node, operator in found.unknown],
        "estimated": [{"node": node, "why": why} for node, why in found.estimated],
        "conditions": plain(found.conditions),
        "kernels": [plain(dataclasses.asdict(kernel)) for kernel in called] or None,
        "fits": None if entry.fit is None else {**dataclasses.asdict(entry.fit), "ok": entry.fit.ok},
    }


def _kernels(model: CostModel, graph: Graph) -> Sequence[Kernel]:
    """What a model takes for one call of a runtime, often several nodes; none where it prices nodes or whole graphs."""
    if isinstance(model, Table):
        return model._kernels(graph)
    if isinstance(model, Roofline) or (isinstance(model, Energy) and model.by == "operations"):
        return kernels(graph, model.bindings)
    return ()


def _bounds(found: Cost, nodes: Any) -> dict[str, float] | None:
    """Cost of some nodes by what limits them; ``None`` where the model does not say."""
    if not found.bounds:
        return None
    sums = dict.fromkeys(BOUNDS, 0.0)
    for name in nodes:
        if name in found.bounds:
            sums[found.bounds[name]] += found.nodes.get(name, 0.0)
    return sums


def _nodes(entry: ModelCosts, report: CostReport, called: Sequence[Kernel]) -> list[dict[str, Any]]:
    """Nodes that cost something, the dearest first, each with its place; where nodes are fused, the last one."""
    found = entry.cost
    where = {
        name: (place, names is piece.head)
        for place, piece in enumerate(report.stretches)
        for names in (piece.trunk, piece.head)
        for name in names
    }
    operators = {node.name: node.op for node in report.graph.nodes}
    fused = {kernel.name: "+".join(operators[name] for name in kernel.nodes) for kernel in called if kernel.nodes}
    dearest = sorted((name for name, figure in found.nodes.items() if figure), key=lambda n: -found.nodes[n])
    listed, so_far = [], 0.0
    for name in dearest:
        so_far += found.nodes[name]
        place, in_head = where.get(name, (None, False))
        listed.append(
            {
                "node": name,
                "operator": fused.get(name) or operators.get(name, ""),
                "cost": found.nodes[name],
                "share": found.nodes[name] / found.total,
                "cumulative": so_far / found.total,
                "bound": found.bounds.get(name),
                "stretch": place,
                "head": in_head,
            }
        )
    return listed
