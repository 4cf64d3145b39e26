"""Tables for people, each from the plain values that ``--json`` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

SHOWN = 25
"""Plans that the front's table shows unless all are asked for."""


def amount(number: float) -> str:
    """A count with a suffix: ``40.6 M``."""
    for size, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{suffix}" if abs(number) < 100 * size else f"{number / size:.1f}{suffix}"
    return f"{number:.4g}"


def inspection(plain: Mapping[str, Any], rejected: bool = False) -> RenderableType:
    """Of ``eexform inspect``."""
    inputs = ", ".join(f"{entry['name']} {_shape(entry['shape'])}" for entry in plain["inputs"])
    lines = [
        f"{plain['name'] or 'model'}: {plain['nodes']} nodes, opset {plain['opset']}, {amount(plain['macs'])}MACs, "
        f"{amount(plain['params'])}parameters",
        f"{inputs} -> {plain['output']} ({plain['classes']} classes, {plain['scores']})",
    ]
    if plain["uncounted"]:
        named = ", ".join(f"{entry['node']} ({entry['operator']})" for entry in plain["uncounted"][:5])
        lines.append(f"not counted in MACs, no rule for the operator: {named}")
    table = _table(f"{len(plain['sites'])} sites", "value", "shape", "stride", "MACs before", "share", "params", "carried")
    for site in plain["sites"]:
        table.add_row(
            site["value"],
            _shape(site["shape"]),
            "" if site["stride"] is None else str(site["stride"]),
            amount(site["macs_before"]),
            f"{100 * site['macs_before'] / max(1, plain['macs']):.1f} %",
            amount(site["params_before"]),
            ", ".join(site["live"]),
        )
    parts: list[RenderableType] = [*map(_plain, lines), table]
    if rejected:
        why = _table(f"{len(plain['rejected'])} other values", "value", "why it is no site")
        for entry in plain["rejected"]:
            why.add_row(entry["value"], entry["reason"])
        parts.append(why)
    elif plain["rejected"]:
        parts.append(_plain(f"{len(plain['rejected'])} other values are no sites: --rejected says why"))
    return Group(*parts)


def pareto(plain: Mapping[str, Any], every: bool = False) -> RenderableType:
    """Of ``eexform pareto``: the front, thinned evenly over cost where it is long."""
    trunk, run = plain["trunk"], plain["run"]
    objective = run["objective"]
    whole = trunk["cost"][objective]
    lines = [
        f"model alone: {_percent(trunk['accuracy_select'])} on select, {_percent(trunk['accuracy_test'])} on test, "
        f"{amount(trunk['macs'])}MACs"
        + ("" if objective == "macs" else f", {objective} {whole:.4g}")
    ]
    if run["memorisation"]:
        lines.append(run["memorisation"]["message"])
    if run["state"] != "done":
        lines.append(f"the run is not finished (state: {run['state']}); go on with --resume")
    plans = plain["plans"] if every else thin(plain["plans"], SHOWN, objective)
    table = _table(
        f"front: {len(plain['plans'])} plans" + (f", {len(plans)} shown" if len(plans) < len(plain["plans"]) else ""),
        "#",
        "select",
        "points",
        f"{objective}",
        "test",
        "points",
        f"{objective}",
        "worst",
        "leave at (share of test)",
    )
    for plan in plans:
        select, test = plan["select"], plan["test"]
        table.add_row(
            f"{plan['index']}{' knee' if plan['index'] == plain['knee'] else ''}",
            _percent(select["accuracy"]),
            _points(select["accuracy"], trunk["accuracy_select"]),
            f"{100 * select['cost'][objective] / whole:.1f} %",
            _percent(test["accuracy"]),
            _points(test["accuracy"], trunk["accuracy_test"]),
            f"{100 * test['cost'][objective] / whole:.1f} %",
            f"{100 * plan['worst']['cost'][objective] / whole:.1f} %",
            leaving(plan),
        )
    return Group(*map(_plain, lines), table)


def leaving(plan: Mapping[str, Any]) -> str:
    """``relu_9 61 %, relu_13 20 %, end 19 %``."""
    places = [*(entry["site"] for entry in plan["exits"]), "end"]
    return ", ".join(
        f"{place} {100 * rate:.0f} %" for place, rate in zip(places, plan["test"]["rates"], strict=True)
    )


def thin(plans: Sequence[Mapping[str, Any]], most: int, objective: str) -> list[Mapping[str, Any]]:
    """At most ``most`` plans, evenly over the cost range, ends included."""
    if len(plans) <= most:
        return list(plans)
    costs = np.array([plan["select"]["cost"][objective] for plan in plans])
    wanted = np.linspace(costs[0], costs[-1], most)
    chosen = sorted({int(np.abs(costs - cost).argmin()) for cost in wanted})
    return [plans[index] for index in chosen]


def exported(plain: Mapping[str, Any]) -> RenderableType:
    """Of ``eexform export``."""
    plan, trunk = plain["plan"], plain["trunk"]
    lines = [
        f"wrote {plain['out']} (form {plain['form']}): plan {plan['index']}, {len(plan['exits'])} exits",
        f"predicted on test: {_percent(plan['test']['accuracy'])} "
        f"({_points(plan['test']['accuracy'], trunk['accuracy_test'])} points), "
        f"{100 * plan['test']['macs'] / trunk['macs']:.1f} % of the MACs, "
        f"worst case {100 * plan['worst']['macs'] / trunk['macs']:.1f} %; {leaving(plan)}",
    ]
    return Group(*map(_plain, lines))


def verification(plain: Mapping[str, Any]) -> RenderableType:
    """Of ``eexform verify``."""
    table = _table(f"form {plain['form']}, {plain['samples']} samples", "check", "", "detail")
    for check in plain["checks"]:
        verdict = Text("ok", style="green") if check["ok"] else Text("FAILED", style="bold red")
        table.add_row(check["name"], verdict, check["detail"])
    ties = f" ({plain['near_ties']} samples within 1e-6 of a threshold)" if plain["near_ties"] else ""
    return Group(table, _plain(("verified" if plain["ok"] else "NOT verified") + ties))


def timings(plain: Mapping[str, Any], reference: str | None = None) -> RenderableType:
    """Of ``eexform bench``."""
    base = {entry["batch"]: entry for entry in plain["results"] if entry["file"] == reference}
    table = _table(plain["device"], "file", "batch", "median ms", "mean ms", "p95 ms", "mean against reference")
    for entry in plain["results"]:
        other = base.get(entry["batch"])
        table.add_row(
            entry["file"],
            str(entry["batch"]),
            f"{entry['median_ms']:.3f}",
            f"{entry['mean_ms']:.3f}",
            f"{entry['p95_ms']:.3f}",
            f"{entry['mean_ms'] / other['mean_ms']:.3f}x" if other else "",
        )
    return table


def applied(plain: Mapping[str, Any]) -> RenderableType:
    """Of ``eexform apply``."""
    lines = [f"wrote {plain['out']} (form {plain['form']}): {plain['nodes']} nodes before lowering, {len(plain['exits'])} exits"]
    lines += [f"  {note}" for note in plain["notes"]]
    lines += [f"  skipped {skip['where']}: {skip['why']}" for skip in plain["skipped"]]
    return Group(*map(_plain, lines))


def passes(plain: Mapping[str, Any]) -> RenderableType:
    """Of ``eexform passes``."""
    table = _table("passes", "pass", "parameter", "searched in", "default", "what it is")
    for entry in plain["passes"]:
        title = entry["summary"] if not entry["error"] else f"cannot be loaded: {entry['error']}"
        table.add_row(Text(entry["name"], style="bold"), "", "", "", Text(f"{title} [{entry['distribution']}]"))
        for item in entry["parameters"]:
            default = "required" if item["required"] else str(item["default"])
            table.add_row("", item["name"], item["domain"] or "not searched", default, item["help"])
    return table


def costs(plain: Mapping[str, Any]) -> RenderableType:
    """Of ``eexform costs``."""
    table = _table("cost models", "model", "unit", "kind", "setting", "default", "what it is")
    for entry in plain["costs"]:
        title = entry["summary"] if not entry["error"] else f"cannot be loaded: {entry['error']}"
        kind = "measured" if entry["measured"] else "static"
        table.add_row(
            Text(entry["name"], style="bold"), entry["unit"], kind, "", "", Text(f"{title} [{entry['distribution']}]")
        )
        for item in entry["settings"]:
            table.add_row("", "", "", item["name"], "required" if item["required"] else str(item["default"]), item["help"])
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left", show_edge=False, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(Text(column), overflow="fold", no_wrap=place == 0 and len(columns) > 3)
    return table


def _plain(text: str) -> Text:
    return Text(text)


def _shape(dims: Sequence[Any]) -> str:
    return "x".join("?" if dim is None else str(dim) for dim in dims)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _points(share: float, trunk: float) -> str:
    return f"{100 * (share - trunk):+.2f}"
