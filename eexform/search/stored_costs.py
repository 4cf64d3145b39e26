"""Measured path costs, kept with a run: a search that goes on compares with the figures it began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from eexform import files
from eexform.cost_models import CostModel, PathCosts, path_costs
from eexform.errors import RunError
from eexform.heads import HeadSpec
from eexform.ir.graph import Graph
from eexform.ir.sites import Site
from eexform.search.space import plain


def model_settings(model: CostModel) -> dict[str, Any]:
    """Name and settings of a cost model as plain values."""
    settings: dict[str, Any] = asdict(model) if is_dataclass(model) else {}
    return {"name": model.name, **{key: plain(value) for key, value in settings.items()}}


def stored_path_costs(
    folder: Path, model: CostModel, trunk: Graph, sites: Sequence[Site], heads: Mapping[str, Sequence[HeadSpec]]
) -> PathCosts:
    """:func:`eexform.cost_models.path_costs`; of a measured model, what was measured the first time.

    Args:
        folder: where measurements are kept, by what was measured and how.
        model: the cost model.
        trunk: a graph without exits.
        sites: in the order in which a sample meets them.
        heads: site value -> heads.
    """
    classes = trunk.num_classes
    if not model.measured:
        return path_costs(model, trunk, sites, heads, num_classes=classes)
    places = [[site.value, [str(spec) for spec in heads[site.value]]] for site in sites]
    identity = json.dumps([trunk.digest, model_settings(model), places], sort_keys=True)
    path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()}.json"
    if path.exists():
        return _from_json(files.read_json(path), path)
    costs = path_costs(model, trunk, sites, heads, num_classes=classes)
    files.write_json(path, _to_json(costs))
    return costs


def _to_json(costs: PathCosts) -> dict[str, Any]:
    return {
        **{key: plain(value) for key, value in vars(costs).items() if key in _FIELDS},
        "head": [[site, head, cost] for (site, head), cost in costs.head.items()],
        "between": [[before, after, cost] for (before, after), cost in costs.between.items()],
        "conditions": plain(costs.conditions),
    }


_FIELDS = (
    *("trunk", "prefix", "decision", "onward", "unit", "per_sample", "combine"),
    *("sites", "cells", "unknown", "estimated"),
)


def _from_json(value: Any, path: Path) -> PathCosts:
    try:
        if "routing" in value:  # before routing was told apart: one figure, paid at every exit
            value = {**value, "decision": dict.fromkeys(value["sites"], value["routing"]), "onward": {}}
        if value.get("combine", "sum") not in ("sum", "max"):
            raise ValueError(value["combine"])
        return PathCosts(
            trunk=float(value["trunk"]),
            prefix={str(site): float(cost) for site, cost in value["prefix"].items()},
            head={(str(site), str(head)): float(cost) for site, head, cost in value["head"]},
            decision={str(site): float(cost) for site, cost in value["decision"].items()},
            onward={str(site): float(cost) for site, cost in value["onward"].items()},
            unit=str(value["unit"]),
            per_sample=bool(value["per_sample"]),
            between={(str(before), str(after)): float(cost) for before, after, cost in value.get("between", ())},
            combine="max" if value.get("combine") == "max" else "sum",
            sites=tuple(map(str, value["sites"])),
            cells=tuple((int(mask), float(cost)) for mask, cost in value["cells"]),
            unknown=tuple((str(node), str(operator)) for node, operator in value["unknown"]),
            estimated=tuple((str(node), str(why)) for node, why in value.get("estimated", ())),
            conditions=dict(value["conditions"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path}: damaged measurements ({error!r}); delete the file to measure anew") from error
