"""What no plan can cost less than: a limit below it is refused before anything is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from eexform.cost_models import CostModel, PathCosts, path_costs
from eexform.errors import OptionError
from eexform.ir.graph import Graph
from eexform.search.candidates import Places
from eexform.search.genome import Limit
from eexform.search.limits import Limits
from eexform.search.objectives import Objectives
from eexform.search.terms import Term, least

Exits = tuple[tuple[str, str], ...]


def check_reachable(limits: Limits, objectives: Objectives, trunk: Graph, places: Places, original: Graph) -> None:
    """Refuse limits that nothing can keep, as far as that is known before training.

    Further exits only add to what a sample pays: no plan is cheaper than the trunk alone, or one exit at which every
    sample leaves. Which share of the samples does is not known yet, and neither is what has to be measured.

    Args:
        limits: of every plan.
        objectives: with every cost model that the limits name.
        trunk: that gets the exits.
        places: candidate sites and heads.
        original: the model that limits such as ``0.7x`` are shares of.

    Raises:
        OptionError: a limit is below that; the message says what the cheapest plan costs.
    """
    known = {key: model for key, model in objectives.models.items() if not model.measured}
    # what is to be measured has a price of 1 here: its limits are not looked at
    originals = {key: _alone(model, original) for key, model in known.items()}
    originals = {**dict.fromkeys(objectives.models, 1.0), **originals}
    asked = limits.bind(objectives, objectives.goals(originals), originals, 0.5).limits
    asked = tuple(limit for limit in asked if all(term.model in known for term in limit.amount.terms))
    used = {term.model for limit in asked for term in limit.amount.terms}
    costs = {
        key: path_costs(known[key], trunk, places.sites, places.heads, num_classes=trunk.num_classes) for key in used
    }
    single = [(site.value, str(spec)) for site in places.sites for spec in places.heads[site.value]]
    for limit in asked:
        found = cheapest(limit, costs, single)
        if found is None or found[0] <= limit.most * (1 + 1e-9):
            continue
        least_of_all, best = found
        share = least_of_all / float(limit.amount(lambda term: originals[term.model]))
        raise OptionError(
            f"no plan can keep {limit.label} at or below {limit.most:.6g}: the cheapest is {_named(best)}, which "
            f"comes to {least_of_all:.6g} ({share:.3g}x of the original's); raise the limit"
            f"{', or offer earlier sites or smaller heads' if best else ''}"
        )


def cheapest(
    limit: Limit, costs: Mapping[str, PathCosts], pairs: Iterable[tuple[str, str]]
) -> tuple[float, Exits] | None:
    """What no plan can be below, whoever leaves where, and the exits that come nearest to it.

    Among paths that only grow from exit to exit, those of a plan begin where the path of its first exit alone begins.

    Args:
        limit: whose amount is asked for.
        costs: by cost model; of every term.
        pairs: of site and head that there may be.

    Returns:
        ``None``: not known, because something that is passed saves costs.
    """
    parts = {term.model: costs[term.model] for term in limit.amount.terms}
    if any(_saves(part) for part in parts.values()):
        return None
    # what a branch costs more to the end of the network depends on the exits between: without it the bound still holds
    known = {
        key: replace(part, between={pair: cost for pair, cost in part.between.items() if not pair[0]})
        for key, part in parts.items()
    }
    bounds: dict[Exits, float] = {exits: _bound(limit, known, exits) for exits in ((), *((pair,) for pair in pairs))}
    best = min(bounds, key=lambda exits: bounds[exits])
    return bounds[best], best


def _saves(costs: PathCosts) -> bool:
    """Whether a part of a path lowers what the path costs."""
    added = (costs.head, costs.decision, costs.onward, costs.between)
    return any(cost < 0 for table in added for cost in table.values()) or any(cost < 0 for _, cost in costs.cells)


def _alone(model: CostModel, graph: Graph) -> float:
    return path_costs(model, graph, (), {}, num_classes=graph.num_classes).trunk


def _bound(limit: Limit, costs: Mapping[str, PathCosts], exits: Exits) -> float:
    def figure(term: Term) -> float:
        return float(least(term.statistic, np.array([costs[term.model].path(exits)]))[0])

    return float(limit.amount(figure))


def _named(exits: Exits) -> str:
    if not exits:
        return "the network without exits"
    ((site, head),) = exits
    return f"an exit at {site!r} ({head}) that every sample takes"
