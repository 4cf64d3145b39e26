"""The tables of ``eexform cost`` and ``eexform costs --device``, from the plain values that ``--json`` prints."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eexform.report.layout import Labels, paragraphs, table_of, title

TOP = 10
"""Nodes that the table shows unless told otherwise."""

_PREFIXES: Mapping[str, Sequence[tuple[float, str]]] = {
    "ms": ((1e3, "s"), (1.0, "ms"), (1e-3, "us")),
    "mJ": ((1e3, "J"), (1.0, "mJ"), (1e-3, "uJ")),
    "bytes": ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "bytes")),
}
_END = "end"


class Scale:
    """One unit and one number of decimals for figures that stand below each other.

    Args:
        unit: of the figures, as the cost model calls it.
        figures: all that will be shown.
    """

    def __init__(self, unit: str, figures: Iterable[float]) -> None:
        top = max((abs(figure) for figure in figures), default=0.0)
        gap = "" if unit in ("MACs", "FLOPs") else " "
        known = _PREFIXES.get(unit) or [
            (1e9, f"G{gap}{unit}"),
            (1e6, f"M{gap}{unit}"),
            (1e3, f"k{gap}{unit}"),
            (1, unit),
        ]
        self.size, self.unit = next((pair for pair in known if top >= pair[0]), known[-1])
        whole = self.size == 1 and unit not in ("ms", "mJ") and top == int(top)
        digits = math.floor(math.log10(top / self.size)) if top else 0
        self.decimals = 0 if whole or not top else min(6, max(0, 3 - digits))

    def __call__(self, figure: float) -> str:
        """The number alone."""
        return f"{figure / self.size:.{self.decimals}f}"

    def full(self, figure: float) -> str:
        """The number with its unit."""
        return f"{self(figure)} {self.unit}"


def cost(plain: Mapping[str, Any], top: int = TOP) -> RenderableType:
    """Of ``eexform cost``.

    Args:
        plain: what ``--json`` prints.
        top: nodes to show per cost model; 0: none.
    """
    labels = Labels(piece["end"] for piece in plain["stretches"] if piece["end"])
    what = plain["name"] or "model"
    lines = [what if plain["plan"] is None else f"{what}: plan {plain['plan']}", *plain["notes"]]
    parts: list[RenderableType] = paragraphs(lines)
    for entry in plain["costs"]:
        parts += _entry(plain, entry, labels, top)
    if plain["comparison"] is not None:
        parts += _comparison(plain["comparison"], labels)
    return Group(*parts, *_legend(plain, labels))


def _legend(plain: Mapping[str, Any], labels: Labels) -> list[RenderableType]:
    if not _has_exits(plain):
        return labels.legend(f"places, {_END} is the model's own classifier:")
    named = Labels(f"{piece['end']}  {piece['head']}" for piece in plain["stretches"] if piece["end"])
    return named.legend(f"exits and their heads, {_END} is the model's own classifier:")


def _has_exits(plain: Mapping[str, Any]) -> bool:
    return any(piece["head"] for piece in plain["stretches"])


def _place(plain: Mapping[str, Any], labels: Labels, place: int) -> str:
    end = plain["stretches"][place]["end"]
    return labels[end] if end else _END


def _entry(plain: Mapping[str, Any], entry: Mapping[str, Any], labels: Labels, top: int) -> list[RenderableType]:
    """One cost model: what it comes to, by stretch or exit, by node."""
    exits = _has_exits(plain)
    scale = Scale(entry["unit"], [entry["total"], entry["worst"]])
    parts = paragraphs(_summary(entry, scale, exits))
    parts.insert(0, title(f"\n{entry['label']}{', measured' if entry['measured'] else ''}"))
    if exits:
        parts += [title(f"what a sample pays, {scale.unit}"), _exits(plain, entry, labels, scale)]
    else:
        held = entry["combine"] == "max"
        parts.append(title(f"{'the most held on the way' if held else 'from place to place'}, {scale.unit}"))
        parts.append(_stretches(plain, entry, labels, scale))
    shown = entry["nodes"][:top]
    if shown:
        parts.append(title(f"dearest nodes, {len(shown)} of {len(entry['nodes'])}"))
        parts.append(_nodes(plain, entry, labels, shown))
    elif top and not entry["nodes"]:
        parts += paragraphs([f"{entry['label']} has no figures of single nodes: it prices whole parts of a network"])
    return parts


def _summary(entry: Mapping[str, Any], scale: Scale, exits: bool) -> list[str]:
    """What it all comes to, what limits it, and what is not or only roughly in it."""
    if exits:
        whole = entry["original"]
        said = [f"{name} {scale.full(figure)}{_times(figure, whole)}" for name, figure in _means(entry)]
        lines = ["; ".join(said) + ("" if whole is None else f"; the model alone {scale.full(whole)}")]
    else:
        lines = [f"{'most held at once' if entry['combine'] == 'max' else 'total'} {scale.full(entry['total'])}"]
    if entry["bounds"]:
        rest = entry["total"] - sum(entry["bounds"].values())
        lines.append("bound by " + _shares({**entry["bounds"], "the call itself": rest}, entry["total"]))
    lines += _listed("not counted, the model has no rule for", entry["unknown"], "operator")
    lines += _listed("estimated, beyond what the model has data for", entry["estimated"], "why")
    if entry["fits"] is not None:
        lines += _verdict(entry["fits"])
    conditions = entry["conditions"]
    short = [f"{key} {_short(value)}" for key, value in conditions.items() if not isinstance(value, list)]
    lines += ["; ".join(short)] if short else []
    lines += [f"{key}: {'; '.join(map(str, value))}" for key, value in conditions.items() if isinstance(value, list)]
    return lines


def _verdict(fit: Mapping[str, Any]) -> list[str]:
    """Whether the device's memory is enough, and by how much."""
    said = []
    for name, budget in (("RAM", fit["ram"]), ("flash", fit["flash"])):
        if budget["available"] is not None:
            left = budget["available"] - budget["needed"]
            much = f"{_amount(abs(left))} {'left' if left >= 0 else 'too many'}"
            said.append(f"{name} {_amount(budget['needed'])} of {_amount(budget['available'])}: {much}")
    return [f"{'fits' if fit['ok'] else 'does NOT fit'}: {'; '.join(said)}"]


def _means(entry: Mapping[str, Any]) -> list[tuple[str, float]]:
    means = [(f"mean on {split}", figure) for split, figure in (entry["mean"] or {}).items()]
    return [*means, ("worst", entry["worst"])]


def _times(figure: float, whole: float | None) -> str:
    return f" ({figure / whole:.3f}x)" if whole else ""


def _shares(bounds: Mapping[str, float], total: float) -> str:
    """``compute 82 %, overhead 18 %``, the largest first; what is below half a per cent is left out."""
    ordered = sorted(((share, name) for name, share in bounds.items() if share >= 0.005 * total), reverse=True)
    return ", ".join(f"{name} {100 * share / total:.0f} %" for share, name in ordered) if total else ""


def _listed(what: str, entries: Sequence[Mapping[str, str]], about: str) -> list[str]:
    if not entries:
        return []
    named = ", ".join(f"{entry['node']} ({entry[about]})" for entry in entries[:5])
    more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
    return [f"{what}: {named}{more}"]


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        items = [f"{key} {_short(item)}" for key, item in value.items()]
        return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _stretches(plain: Mapping[str, Any], entry: Mapping[str, Any], labels: Labels, scale: Scale) -> Table:
    """The trunk from place to place."""
    held, total = entry["combine"] == "max", entry["total"]
    bounds = entry["bounds"] is not None
    extra = [] if held else [">sum %"]
    table = table_of("up to", ">nodes", f">{scale.unit}", ">%", *extra, *(["bound by"] if bounds else []))
    so_far = 0.0
    for place, part in enumerate(entry["parts"]):
        so_far += part["trunk"]
        nodes = str(plain["stretches"][place]["nodes"])
        row = [_place(plain, labels, place), nodes, scale(part["trunk"]), _percent(part["trunk"], total)]
        row += [] if held else [_percent(so_far, total)]
        table.add_row(*row, *([_shares(part["bounds"], sum(part["bounds"].values()))] if bounds else []))
    return table


def _exits(plain: Mapping[str, Any], entry: Mapping[str, Any], labels: Labels, scale: Scale) -> Table:
    """What each exit costs, and what a sample has paid that leaves there."""
    splits = list(plain["stretches"][0]["rates"])
    beside = [("head", "\nhead"), ("decision", "\ndecision"), ("onward", "going\non")]
    beside = [(key, name) for key, name in beside if key == "head" or any(part[key] for part in entry["parts"])]
    trunk = ">trunk\nso far" if entry["combine"] == "max" else ">trunk"
    rates = [f">% leave,\n{split}" for split in splits]
    table = table_of("\nexit", trunk, *(f">{name}" for _, name in beside), ">leaving\nhere", *rates)
    last = len(entry["parts"]) - 1
    for place, part in enumerate(entry["parts"]):
        shares = plain["stretches"][place]["rates"]
        table.add_row(
            _place(plain, labels, place),
            scale(part["trunk"]),
            *("" if place == last else scale(part[key]) for key, _ in beside),
            scale(part["path"]),
            *(f"{100 * shares[split]:.1f}" for split in splits),
        )
    return table


def _nodes(
    plain: Mapping[str, Any], entry: Mapping[str, Any], labels: Labels, shown: Sequence[Mapping[str, Any]]
) -> Table:
    """Single nodes, the dearest first."""
    scale = Scale(entry["unit"], [node["cost"] for node in shown])
    bounds = entry["bounds"] is not None
    columns = ["node", "operator", "in", f">{scale.unit}", ">%", ">sum %", *(["bound by"] if bounds else [])]
    table = table_of(*columns)
    for node in shown:
        where = "" if node["stretch"] is None else _place(plain, labels, node["stretch"])
        table.add_row(
            node["node"],
            node["operator"],
            f"{where} head" if node["head"] else where,
            scale(node["cost"]),
            f"{100 * node['share']:.1f}",
            f"{100 * node['cumulative']:.1f}",
            *([node["bound"] or ""] if bounds else []),
        )
    return table


def _comparison(plain: Mapping[str, Any], labels: Labels) -> list[RenderableType]:
    """Cost models side by side; with the measured one, how far the others are from it."""
    columns, measured = plain["columns"], plain["measured"]
    reference = next((column for column in columns if column["label"] == measured), None)
    shown = [_in_unit(column, reference) for column in columns]
    heads, scales = [["leaving at" if plain["of"] == "paths" else "up to"]], []
    for column, (figures, whole) in zip(columns, shown, strict=True):
        judged = column["judged"]
        scaled = judged is not None and judged["scale"] is not None
        scale = Scale(reference["unit"] if scaled and reference else column["unit"], [*figures, *whole.values()])
        scales.append(scale)
        heads.append([*_broken(column["label"] + ("*" if scaled else "")), scale.unit])
        heads += [["off by", "%"]] if judged is not None else []
    height = max(map(len, heads))
    first, *others = ["\n" * (height - len(lines)) + "\n".join(lines) for lines in heads]
    table = table_of(first, *(f">{text}" for text in others), gap=1 if len(others) > 6 else 2)
    table.columns[0].no_wrap = True  # letters and a few words
    for place, end in enumerate(plain["rows"]):
        cells: list[str] = []
        for column, (figures, _), scale in zip(columns, shown, scales, strict=True):
            cells.append(scale(figures[place]))
            cells += [] if column["judged"] is None else [_off(column["judged"]["errors"][place])]
        table.add_row(labels[end] if end else _END, *cells)
    for name in dict.fromkeys(name for column in columns for name in column["whole"]):
        cells = []
        for column, (_, whole), scale in zip(columns, shown, scales, strict=True):
            cells.append(scale(whole[name]) if name in whole else "-")
            cells += [] if column["judged"] is None else [_off(column["judged"]["whole"].get(name))]
        table.add_row(name if name == "total" else f"mean, {name}", *cells, style="bold")
    return [title("\nside by side"), table, *_verdicts(plain, labels, reference)]


def _broken(label: str, width: int = 12) -> list[str]:
    """A label in short lines, for the head of a column of numbers: settings each on its own, paths where they must."""
    spaced = re.sub("([:,=])", r"\1 ", label)
    return [piece.replace(" ", "") for piece in textwrap.wrap(spaced, width)]


def _in_unit(column: Mapping[str, Any], reference: Mapping[str, Any] | None) -> tuple[list[float], Mapping[str, float]]:
    """A column's figures, in the measured unit where they can be scaled to it."""
    judged = column["judged"]
    factor = 1.0 if reference is None or judged is None or judged["scale"] is None else judged["scale"]
    return [factor * figure for figure in column["figures"]], {n: factor * f for n, f in column["whole"].items()}


def _verdicts(plain: Mapping[str, Any], labels: Labels, reference: Mapping[str, Any] | None) -> list[RenderableType]:
    """Each prediction in a line; how figures of another unit got into the table."""
    if reference is None:
        return paragraphs(["none of these is measured, so nothing is judged; latency_ort would be"])
    table = table_of(
        "against " + reference["label"], ">median\noff by, %", ">worst\noff by, %", "\nat", ">Kendall\ntau"
    )
    notes = []
    for column in plain["columns"]:
        judged = column["judged"]
        if judged is None:
            continue
        row = judged["worst_row"]
        end = None if row is None else plain["rows"][row]
        table.add_row(
            column["label"] + ("" if judged["scale"] is None else "*"),
            "-" if judged["median_error"] is None else f"{100 * judged['median_error']:.1f}",
            "-" if row is None else _off(judged["errors"][row]),
            "" if row is None else (labels[end] if end else _END),
            "-" if judged["kendall_tau"] is None else f"{judged['kendall_tau']:.3f}",
        )
        if judged["scale"] is not None:
            rate = Scale(column["unit"], [1 / judged["scale"]])
            notes.append(
                f"* the naive baseline: {column['label']} times one constant, {rate.full(1 / judged['scale'])} per "
                f"{reference['unit']}, which makes the sums equal"
            )
    aside = [column["label"] for column in plain["columns"] if column["judged"] is None and column is not reference]
    if aside:
        notes.append(f"not judged, as they are no work or time: {', '.join(aside)}")
    if reference["differences"]:
        notes.append(
            f"{reference['label']} prices what runs up to a place; a stretch is what two such figures differ by: short "
            "stretches are mostly noise"
        )
    return [table, *paragraphs(notes)] if table.row_count else paragraphs(notes)


def _off(error: float | None) -> str:
    return "-" if error is None else f"{100 * error:+.1f}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"


def devices(plain: Mapping[str, Any]) -> RenderableType:
    """Of ``eexform costs --device``."""
    columns = [">GFLOP/s\nfloat32", ">GOP/s\nint8", ">memory\nGB/s", ">channel\nblock", ">\nRAM", ">\nflash"]
    table = table_of("\ndevice", *columns)
    for entry in plain["devices"]:
        compute, memory = entry["compute"], entry["memory"]
        table.add_row(
            Text.assemble((entry["name"], "bold"), f" {entry['title']}"),
            *(_figure(compute.get(key)) for key in ("peak_gflops_float32", "peak_gops_int8")),
            _figure(memory["bandwidth_gb_per_s"]),
            _figure(entry.get("kernel", {}).get("channel_block")),
            *(_bytes(memory.get(key)) for key in ("ram_bytes", "flash_bytes")),
        )
    notes = ["every figure with its source: eexform costs --device NAME; a path to a file of your own works alike"]
    return Group(table, *paragraphs(notes))


def device(plain: Mapping[str, Any]) -> RenderableType:
    """Of ``eexform costs --device NAME``: each figure and where it comes from."""
    entry = plain["device"]
    table = table_of("key", ">value", "source")
    for section, figures in entry.items():
        if isinstance(figures, Mapping) and section != "sources":
            for key, value in figures.items():
                name = f"{section}.{key}"
                table.add_row(name, _figure(value), entry["sources"].get(name, ""))
    return Group(title(f"{entry['name']}: {entry['title']}"), table)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:g}" if abs(value) < 1e6 else f"{value:.0f}"


def _bytes(value: int | None) -> str:
    return "-" if value is None else _amount(value)


def _amount(size: float) -> str:
    """Bytes in the unit of their size, as memory is sold: ``512 KiB``, ``1 MiB``, ``16 GiB``."""
    scale = next((pair for pair in _PREFIXES["bytes"] if size >= pair[0]), _PREFIXES["bytes"][-1])
    return f"{size / scale[0]:.4g} {scale[1]}"
