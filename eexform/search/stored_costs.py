"""Measured path costs, kept with a run: a search that goes on compares with the figures it began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from eexform import files
from eexform.cost_models import CostModel, PathCosts, make, path_costs
from eexform.errors import EexformError, RunError
from eexform.heads import HeadSpec
from eexform.ir.graph import Graph
from eexform.ir.sites import Site
from eexform.search.space import plain


def model_settings(model: CostModel) -> dict[str, Any]:
    """Name and settings of a cost model as plain values."""
    settings: dict[str, Any] = asdict(model) if is_dataclass(model) else {}
    return {"name": model.name, **{key: plain(value) for key, value in settings.items()}}


def files_read(models: Iterable[CostModel]) -> dict[str, str]:
    """Files that settings of cost models name (tables, devices), with their sha-256: a path alone says little."""
    named = {value for model in models for value in model_settings(model).values() if isinstance(value, str)}
    return {name: files.file_sha256(name) for name in sorted(named) if name and Path(name).is_file()}


def same_settings(older: Any, settings: Mapping[str, Any]) -> bool:
    """Whether :func:`model_settings` of an older version of eexform mean the same: what it did not know yet has its
    default."""
    if older == settings:
        return True
    if not isinstance(older, Mapping) or older.get("name") != settings["name"]:
        return False
    given = {key: value for key, value in older.items() if key != "name"}
    try:
        return model_settings(make(settings["name"], **given)) == settings
    except EexformError:
        return False


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
    path = _path(folder, model, trunk.digest, places)
    if path.exists():
        return _from_json(files.read_json(path), path)
    costs = path_costs(model, trunk, sites, heads, num_classes=classes)
    files.write_json(path, _to_json(costs))
    return costs


def _path(folder: Path, model: CostModel, digest: str, places: Sequence[Any]) -> Path:
    """File of a measurement; that of an older version of eexform, which knew fewer settings (new ones stand behind the
    others), where there is one."""

    def path(settings: Mapping[str, Any]) -> Path:
        identity = json.dumps([digest, settings, places], sort_keys=True)
        return folder / f"{hashlib.sha256(identity.encode()).hexdigest()}.json"

    settings = model_settings(model)
    own = path(settings)
    if own.exists() or not is_dataclass(model):
        return own
    for item in reversed(fields(model)):
        if settings.pop(item.name) != item.default:
            break
        if path(settings).exists():
            return path(settings)
    return own


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
