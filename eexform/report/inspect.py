"""What a model offers: its sites with their cumulative cost, and why other values are no sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from eexform.cost_models.macs import Macs
from eexform.cost_models.params import Params
from eexform.ir.graph import Graph
from eexform.ir.provenance import module_of
from eexform.ir.sites import SiteReport, find_sites


@dataclass(frozen=True)
class Inspection:
    """A model's trunk table.

    Attributes:
        graph: the model.
        report: its sites and the values that are none.
        macs: multiply-accumulates for one sample.
        params: number of parameters.
        macs_before: MACs up to each site.
        params_before: parameters used up to each site.
        uncounted: ``(node, operator)`` pairs that the MAC count has no rule for.
    """

    graph: Graph
    report: SiteReport
    macs: float
    params: float
    macs_before: dict[str, float]
    params_before: dict[str, float]
    uncounted: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; the keys are stable."""
        graph = self.graph
        modules = module_of(graph)
        return {
            "name": graph.gs.name,
            "digest": graph.digest,
            "opset": graph.opset,
            "nodes": len(graph.nodes),
            "inputs": [{"name": name, "shape": list(graph.types[name].shape or ())} for name in graph.inputs],
            "output": graph.final,
            "classes": graph.num_classes,
            "scores": graph.scores,
            "exits": [exit_.to_json() for exit_ in graph.exits],
            "macs": int(self.macs),
            "params": int(self.params),
            "uncounted": [{"node": node, "operator": operator} for node, operator in self.uncounted],
            "sites": [
                {
                    "value": site.value,
                    "kind": site.kind,
                    "shape": list(site.shape),
                    "channels": site.channels,
                    "stride": site.stride,
                    "macs_before": int(self.macs_before[site.value]),
                    "params_before": int(self.params_before[site.value]),
                    "live": list(site.live),
                    **({"module": modules[site.value]} if site.value in modules else {}),
                }
                for site in self.report.sites
            ],
            "rejected": [{"value": entry.value, "reason": entry.reason} for entry in self.report.rejected],
        }


def inspect(graph: Graph, *, max_live: int = 3) -> Inspection:
    """Sites of a model and what lies before them.

    Args:
        graph: as loaded; a graph with exits is looked at whole.
        max_live: how many tensors an exit may have to carry on.
    """
    macs = Macs().cost(graph)
    params = Params().cost(graph)
    report = find_sites(graph, max_live=max_live)
    before = graph.flow.accumulate(macs.nodes)
    params_before = graph.flow.accumulate(params.nodes)
    return Inspection(
        graph=graph,
        report=report,
        macs=macs.total,
        params=params.total,
        macs_before={site.value: before[site.value] for site in report.sites},
        params_before={site.value: params_before[site.value] for site in report.sites},
        uncounted=macs.unknown,
    )
