"""The table of ``eexform groups``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType

from eexform.report.layout import Labels, amount, count, paragraphs, table_of, title


def groups(plain: Mapping[str, Any], frozen: bool = False) -> RenderableType:
    """Of ``eexform groups``.

    Args:
        plain: what ``--json`` prints.
        frozen: list what cannot be pruned as well, with the reasons.
    """
    free = [group for group in plain["groups"] if group["prunable"]]
    stuck = [group for group in plain["groups"] if not group["prunable"]]
    total = plain["prunable"]
    lines = [
        f"{plain['name'] or 'model'}: {amount(plain['macs'])} MACs, {amount(plain['params'])} parameters; "
        f"{100 * total['share']:.1f} % of the MACs and {_percent(total['params'], plain['params'])} of the parameters "
        "are prunable: they go where every group is cut to one unit"
    ]
    if plain["uncounted"]:
        named = ", ".join(f"{entry['node']} ({entry['operator']})" for entry in plain["uncounted"][:5])
        more = f" and {len(plain['uncounted']) - 5} more" if len(plain["uncounted"]) > 5 else ""
        lines.append(f"not counted in MACs, no rule for the operator: {named}{more}")
    families = Labels(group["family"] for group in free if group["family"])
    table = table_of("group", "kind", "of", ">units", "cut together", ">% of\nMACs", "exact")
    for group in free:
        table.add_row(
            group["name"],
            group["kind"],
            families.get(group["family"], ""),
            str(group["size"]),
            group["summary"],
            f"{100 * group['share']:.1f}",
            "yes" if group["exact"] else "no",
        )
    meaning = "of: its family; % of MACs: of the nodes that read or make the units (a node may count for two groups)"
    parts = [*paragraphs(lines), title(f"{count(len(free), 'group')} to prune"), *paragraphs([meaning]), table]
    if any(not group["exact"] for group in free):
        parts += paragraphs(["exact no: a statistic is taken over the units, so the rest is scaled anew by a cut"])
    parts += families.legend("families, groups that look alike:")
    if frozen:
        why = table_of("group", ">units", ">% of\nMACs", "why it stays")
        for group in stuck:
            why.add_row(group["name"], str(group["size"]), f"{100 * group['share']:.1f}", group["why_not"])
        parts += [title(f"{count(len(stuck), 'group')} that cannot be pruned"), why]
    elif stuck:
        parts += paragraphs([f"{count(len(stuck), 'more group')} cannot be pruned: --frozen says why"])
    return Group(*parts)


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole if whole else 0:.1f} %"
