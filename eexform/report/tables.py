"""Tables for people, each from the plain values that ``--json`` prints.

They stay readable at 80 columns: numbers are short and to the right, long names of values stand once, in a legend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from itertools import pairwise
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eexform.report.layout import Fitting, Labels, amount, count, indented, named, paragraphs, table_of, title

_WIDE = 34
"""Longest name of a file that stands in the table of times: with the other columns it fills 100 characters."""

SHOWN = 25
"""Plans that the front's table shows unless all are asked for."""


def inspection(plain: Mapping[str, Any], rejected: bool = False) -> RenderableType:
    """Of ``eexform inspect``."""
    inputs = ", ".join(f"{entry['name']} {_shape(entry['shape'])}" for entry in plain["inputs"])
    lines = [
        f"{plain['name'] or 'model'}: {plain['nodes']} nodes, opset {plain['opset']}, {_unit(plain['macs'], 'MACs')}, "
        f"{_unit(plain['params'], 'parameters')}",
        f"{inputs} -> {plain['output']} ({plain['classes']} classes, {plain['scores']})",
    ]
    lines += _uncounted(plain["uncounted"])
    if any("module" in site for site in plain["sites"]):  # no column of its own: the names begin with the path
        lines.append(f"values are called after the sub-modules of {plain['name'] or 'the module'} that compute them")
    carried = Labels(value for site in plain["sites"] for value in site["live"] if value != site["value"])
    table = table_of("\nvalue", "\nshape", ">\nstride", ">MACs\nbefore", ">\n%", ">params\nbefore", "also\ncarries")
    for site in plain["sites"]:
        table.add_row(
            site["value"],
            _shape(site["shape"]),
            "" if site["stride"] is None else str(site["stride"]),
            amount(site["macs_before"]),
            f"{100 * site['macs_before'] / max(1, plain['macs']):.1f}",
            amount(site["params_before"]),
            " ".join(carried[value] for value in site["live"] if value != site["value"]),
        )
    parts = paragraphs(lines)
    parts += [title(f"{len(plain['sites'])} sites, in the order in which a sample meets them"), table]
    parts += carried.legend("also carried:")
    if rejected:
        why = table_of("value", "why it is no site")
        for entry in plain["rejected"]:
            why.add_row(entry["value"], entry["reason"])
        parts += [title(f"{len(plain['rejected'])} other values"), why]
    elif plain["rejected"]:
        parts += paragraphs([f"{len(plain['rejected'])} other values are no sites: --rejected says why"])
    return Group(*parts)


def pareto(plain: Mapping[str, Any], every: bool = False, exported: int | None = None) -> RenderableType:
    """Of ``eexform pareto``: the front, thinned evenly over cost where it is long.

    Args:
        plain: what ``--json`` prints.
        every: do not thin.
        exported: index of a plan to mark.
    """
    trunk, run = plain["trunk"], plain["run"]
    accuracy = "agreement" if run["labels"] == "none" else "accuracy"
    lines = [
        f"model alone: {accuracy} {_percent(trunk['accuracy_select'])} on select, "
        f"{_percent(trunk['accuracy_test'])} on test; {_unit(trunk['macs'], 'MACs')}"
        + "".join(
            f", {goal['cost']} {_figure(cost, goal['unit'])}"
            for goal, cost in zip(run["objectives"], trunk["objectives"], strict=True)
            if goal["cost"] != "macs" and len(goal["terms"]) == 1
        )
    ]
    lines += _tuned(plain["tuned"], trunk, accuracy)
    lines += _uncounted(run["uncounted"])
    if run["memorisation"]:
        lines.append(run["memorisation"]["message"])
    if run["state"] != "done":
        lines.append(f"the run is not finished (state: {run['state']}); go on with --resume")
    shown = list(plain["plans"]) if every else thin(plain["plans"], SHOWN, trunk["objectives"][0])
    marks = {index: mark for index, mark in ((exported, "+"), (plain["knee"], "*")) if index is not None}
    there = {plan["index"] for plan in shown}
    shown += [plain["plans"][index] for index in marks if index not in there]
    shown.sort(key=lambda plan: plan["index"])
    met = {exit_["site"] for plan in shown for exit_ in plan["exits"]}
    labels = Labels(site for site in _places(plain["plans"]) if site in met)
    table = Fitting(_front(plain, shown, labels, marks, grid=True), _front(plain, shown, labels, marks, grid=False))
    heading = f"front: {count(len(plain['plans']), 'plan')}"
    if len(shown) < len(plain["plans"]):
        heading += f", {len(shown)} of them here (--all shows every one)"
    meaning = f"acc: {accuracy} in %; points: against the model alone; {_costs(run['objectives'])}, in % of the model's"
    parts = [*paragraphs(lines), title(heading), *paragraphs([meaning]), table]
    if plain["knee"] is not None:
        parts += paragraphs(["* the knee, which --pick knee takes"])
    if exported is not None and exported != plain["knee"]:
        parts += paragraphs(["+ the plan that was exported"])
    return Group(*parts, *labels.legend("exits, end is the model's own classifier:"))


def _costs(goals: Sequence[Mapping[str, Any]]) -> str:
    """What the columns of costs mean."""
    first, *others = goals
    simple = len(first["terms"]) == 1 and first["terms"][0]["statistic"] == "mean"
    if not others and simple and first["target"] is None:
        return f"cost and worst: {first['cost']} on average and on the dearest path"
    named = [f"{_column(place)}: {goal['cost']}{_aim(goal)}" for place, goal in enumerate(goals)]
    return ", ".join([*named, "worst: cost on the dearest path"])


def _aim(goal: Mapping[str, Any]) -> str:
    if goal["target"] is None:
        return ""
    return f" (target{' at most' if goal['sided'] == 'one' else ''} {_figure(goal['target'], goal['unit'])})"


def _column(place: int) -> str:
    return "cost" if place == 0 else f"cost {place + 1}"


def _front(
    plain: Mapping[str, Any],
    shown: Sequence[Mapping[str, Any]],
    labels: Labels,
    marks: Mapping[int, str],
    *,
    grid: bool,
) -> Table:
    """The plans; with ``grid``, the shares of samples that leave stand in columns."""
    trunk = plain["trunk"]
    whole = trunk["objectives"]
    places = [*labels.values(), "end"]
    header = "".join(f"{place:>4}" for place in places)[1:]
    rates = f"leave at, % of test\n{header}" if grid else "leave at,\n% of test"
    costs = [f">\n{_column(place)}" for place in range(len(whole))]
    table = table_of(
        ">#", ">select\nacc", ">\npoints", *costs, ">test\nacc", ">\npoints", *costs, ">\nworst", rates, gap=1
    )
    table.columns[3 + len(whole)].min_width = 7
    table.columns[-1].no_wrap = grid
    for plan in shown:
        figures = []
        for split, key in (("select", "accuracy_select"), ("test", "accuracy_test")):
            found = plan[split]
            figures += [f"{100 * found['accuracy']:.2f}", _points(found["accuracy"], trunk[key])]
            figures += [f"{100 * cost / w:.1f}" for cost, w in zip(found["objectives"], whole, strict=True)]
        mark = marks.get(plan["index"], "")
        table.add_row(
            f"{plan['index']}{mark or ' '}",
            *figures,
            f"{100 * plan['worst']['objectives'][0] / whole[0]:.1f}",
            _columns(plan, labels) if grid else leaving(plan, labels),
            style="bold" if mark else None,
        )
    return table


def _columns(plan: Mapping[str, Any], labels: Labels) -> str:
    """Shares under their letters; a dot where the plan has no such exit."""
    sites = [*(exit_["site"] for exit_ in plan["exits"]), None]
    rates = dict(zip(sites, plan["test"]["rates"], strict=True))
    return "".join(f"{_rate(rates[site]) if site in rates else '.':>4}" for site in [*labels, None])[1:]


def leaving(plan: Mapping[str, Any], names: Mapping[str, str] | None = None) -> str:
    """``relu_9:61 relu_13:20 end:19``: percent of the test split per exit, sites renamed by ``names``."""
    places = [exit_["site"] if names is None else names[exit_["site"]] for exit_ in plan["exits"]]
    rates = [_rate(rate) for rate in plan["test"]["rates"]]
    return " ".join(f"{place}:{rate}" for place, rate in zip([*places, "end"], rates, strict=True))


def thin(plans: Sequence[Mapping[str, Any]], most: int, whole: float) -> list[Mapping[str, Any]]:
    """At most ``most`` plans, ends included: evenly over cost up to ``whole``, that of the model alone, three beyond.

    Beyond it are plans that buy accuracy with heads; they may cost several times as much and would leave little room.
    With several costs, or where plans are not in the order of the cost (there is a target), they are thinned by place.
    """
    if len(plans) <= most:
        return list(plans)
    costs = np.array([plan["select"]["objectives"][0] for plan in plans])
    if len(plans[0]["select"]["objectives"]) > 1 or (np.diff(costs) < 0).any():
        return [plans[place] for place in np.linspace(0, len(plans) - 1, most).round().astype(int)]
    beyond = np.flatnonzero(costs > whole) if costs[0] <= whole else np.array([], int)
    kept = {int(place) for place in beyond[np.linspace(0, len(beyond) - 1, min(3, len(beyond))).round().astype(int)]}
    inside = costs[: len(costs) - len(beyond)]
    wanted = np.linspace(inside[0], inside[-1], most - len(kept))
    kept |= {int(np.abs(inside - cost).argmin()) for cost in wanted}
    return [plans[index] for index in sorted(kept)]


def exported(plain: Mapping[str, Any]) -> RenderableType:
    """Of ``eexform export``."""
    plan, trunk = plain["plan"], plain["trunk"]
    whole, goals = trunk["objectives"], plain["objectives"]
    costs = [
        f"{100 * cost / of:.1f} % of the model's {goal['cost']}"
        for cost, of, goal in zip(plan["test"]["objectives"], whole, goals, strict=True)
    ]
    table = table_of("exit at", "head", "measure", ">threshold", ">leave, %")
    for exit_, rate in zip(plan["exits"], plan["test"]["rates"], strict=False):
        threshold = exit_["threshold"] if isinstance(exit_["threshold"], str) else f"{exit_['threshold']:.4g}"
        table.add_row(exit_["site"], exit_["head"], exit_["measure"], threshold, _rate(rate))
    table.add_row("end", "", "", "", _rate(plan["test"]["rates"][-1]))
    lines = [
        f"wrote {plain['out']} (form {plain['form']}): plan {plan['index']}, {count(len(plan['exits']), 'exit')}",
        f"predicted on test: {_percent(plan['test']['accuracy'])} "
        f"({_points(plan['test']['accuracy'], trunk['accuracy_test'])} points), "
        f"{', '.join(costs)}, worst case {100 * plan['worst']['objectives'][0] / whole[0]:.1f} %",
    ]
    checked = plain["checked"]
    if checked is not None and checked["ok"] is None:
        lines.append(f"the program was NOT checked, there are no samples to run it on: {checked['why_not']}")
    elif checked is not None:
        lines.append(
            f"the program decides like the simulator: {count(len(checked['checks']), 'check')} on {checked['samples']} "
            "samples of the run, made before it was written (eexform verify does not open .pt2 files)"
        )
    return Group(*paragraphs(lines), table)


def verification(plain: Mapping[str, Any]) -> RenderableType:
    """Of ``eexform verify``."""
    table = table_of("check", "", "detail")
    for check in plain["checks"]:
        verdict = Text("ok", style="green") if check["ok"] else Text("FAILED", style="bold red")
        table.add_row(check["name"], verdict, check["detail"])
    failed = sum(not check["ok"] for check in plain["checks"])
    ties = f" ({plain['near_ties']} samples within 1e-6 of a threshold)" if plain["near_ties"] else ""
    said = f"NOT verified: {count(failed, 'check')} failed" if failed else f"verified: {len(plain['checks'])} checks"
    return Group(title(f"form {plain['form']}, {plain['samples']} samples"), table, *paragraphs([said + ties]))


def timings(plain: Mapping[str, Any], reference: str | None = None) -> RenderableType:
    """Of ``eexform bench``."""
    base = {entry["batch"]: entry for entry in plain["results"] if entry["file"] == reference}
    columns = ["file", ">batch", ">median ms", ">mean ms", ">p95 ms", ">batches"]
    table = table_of(*columns, *([">median", ">mean"] if base else []))
    files = Labels(entry["file"] for entry in plain["results"])
    long = max(map(len, files), default=0) > _WIDE  # names broken over lines can be neither read nor copied
    for entry in plain["results"]:
        row = [
            files[entry["file"]] if long else entry["file"],
            str(entry["batch"]),
            f"{entry['median_ms']:.3f}",
            f"{entry['mean_ms']:.3f}",
            f"{entry['p95_ms']:.3f}",
            str(entry["count"]),
        ]
        if base:
            other = base[entry["batch"]]
            row += [f"{entry[figure] / other[figure]:.3f}x" for figure in ("median_ms", "mean_ms")]
        table.add_row(*row)
    parts: list[RenderableType] = [title(f"{plain['device']}; milliseconds per batch"), table]
    if base:
        against = files[reference] if long and reference is not None else reference
        parts += paragraphs([f"x: against {against}; the mean is what a stream of samples costs"])
    return Group(*parts, *(files.legend("files:") if long else []))


def applied(plain: Mapping[str, Any]) -> RenderableType:
    """Of ``eexform apply``."""
    form = "no exits" if plain["form"] == "none" and not plain["exits"] else f"form {plain['form']}"
    lines = [
        f"wrote {plain['out']} ({form}): {plain['nodes']} nodes before lowering, {count(len(plain['exits']), 'exit')}"
        + ("" if plain["changed"] else "; no pass changed anything")
    ]
    lines += [] if plain["plan"] is None else [f"wrote {plain['plan']}: the settled plan"]
    lines += [f"  {note}" for note in plain["notes"]]
    lines += [f"  skipped {skip['where']}: {skip['why']}" for skip in plain["skipped"]]
    return Group(*paragraphs(lines))


def passes(plain: Mapping[str, Any]) -> RenderableType:
    """Of ``eexform passes``."""
    return _listing(plain["passes"], "parameters", lambda entry: "")


def costs(plain: Mapping[str, Any]) -> RenderableType:
    """Of ``eexform costs``."""
    return _listing(
        plain["costs"], "settings", lambda entry: f", {entry['unit']}, {'measured' if entry['measured'] else 'static'}"
    )


def losses(plain: Mapping[str, Any]) -> RenderableType:
    """Of ``eexform losses``."""
    return _listing(plain["losses"], "settings", lambda entry: "")


def criteria(plain: Mapping[str, Any]) -> RenderableType:
    """Of ``eexform criteria``."""
    return _listing(
        plain["criteria"], "settings", lambda entry: f", needs {' and '.join(entry['needs'])}" if entry["needs"] else ""
    )


def _listing(entries: Sequence[Mapping[str, Any]], key: str, about: Any) -> RenderableType:
    """Plug-ins one below the other; their settings indented, in columns of one width throughout."""
    items = [item for entry in entries for item in entry[key]]
    names = max((len(item["name"]) for item in items), default=0)
    parts: list[RenderableType] = []
    for entry in entries:
        where = f"  [{entry['distribution']}]" if entry["distribution"] else ""
        if entry["error"]:
            parts += [named(entry["name"], where), indented(Text(f"cannot be loaded: {entry['error']}", style="red"))]
            continue
        parts += [named(entry["name"], about(entry) + where), indented(Text(entry["summary"].replace("``", "")))]
        if entry[key]:
            table = Table.grid(padding=(0, 2))
            table.add_column(min_width=names, no_wrap=True)
            table.add_column(min_width=8, max_width=14, overflow="fold")
            table.add_column()
            for item in entry[key]:
                default = "required" if item["required"] else _default(item["default"])
                searched = f"; searched: {item['domain']}" if item.get("domain") else ""
                table.add_row(item["name"], default, Text(item["help"] + searched))
            parts.append(indented(table))
    return Group(*parts)


def _places(plans: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The sites of all plans in the order in which a sample meets them: every plan lists its own in that order."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for plan in plans:
        sites = [exit_["site"] for exit_ in plan["exits"]]
        for before, after in pairwise(sites):
            sorter.add(after, before)
        for site in sites:
            sorter.add(site)
    return tuple(sorter.static_order())


def _tuned(tuned: Mapping[str, Any] | None, trunk: Mapping[str, Any], accuracy: str) -> list[str]:
    """The fine-tuned trunk beside the model that everything is compared with."""
    if tuned is None:
        return []
    figures = [
        f"{_percent(tuned[key])} on {split} ({_points(tuned[key], trunk[key])} points)"
        for split, key in (("select", "accuracy_select"), ("test", "accuracy_test"))
    ]
    return [
        f"fine-tuned ({tuned['strategy']}, {count(tuned['epochs'], 'epoch')} in {tuned['seconds'] / 60:.1f} min on "
        f"{tuned['device']}), without exits: {accuracy} {', '.join(figures)}"
    ]


def _uncounted(entries: Sequence[Mapping[str, str]]) -> list[str]:
    if not entries:
        return []
    named = ", ".join(f"{entry['node']} ({entry['operator']})" for entry in entries[:5])
    more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
    return [f"not counted in MACs, no rule for the operator: {named}{more}"]


def _unit(number: float, unit: str) -> str:
    text = amount(number)
    return f"{text}{unit}" if text[-1].isalpha() and unit == "MACs" else f"{text} {unit}"


def _figure(number: float, unit: str) -> str:
    """A cost with its unit; small ones are measured and need their decimals."""
    return _unit(number, unit) if number >= 1000 else f"{number:.4g} {unit}"


def _default(value: Any) -> str:
    return "-" if value in (None, "", [], {}) else str(value)


def _rate(share: float) -> str:
    """Percent; a few samples are not none."""
    return "<1" if 0 < share < 0.005 else f"{100 * share:.0f}"


def _shape(dims: Sequence[Any]) -> str:
    return "x".join("?" if dim is None else str(dim) for dim in dims)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _points(share: float, trunk: float) -> str:
    return f"{100 * (share - trunk):+.2f}"
