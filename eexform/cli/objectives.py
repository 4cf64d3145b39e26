"""Options that say what a search makes small, and how it treats limits."""

from __future__ import annotations

from typing import Annotated

import typer

from eexform.errors import OptionError
from eexform.progress import Progress
from eexform.search.driver import ROUND_TO, round_to_of
from eexform.search.objectives import Objectives, Target

Cost = Annotated[
    list[str] | None,
    typer.Option(
        help="What to make small beside the error: a cost model with its settings (see `eexform costs`), such as "
        "latency_ort:threads=1; behind an @ p50, p90, p95, p99 or max, where not the mean is meant: macs@p95; or a "
        "weighted sum, each term as a share of what the original costs: 0.7*latency_ort+0.3*params. May be given "
        "twice, for a front of three objectives. Default: macs.",
        metavar="COST",
    ),
]
TargetCost = Annotated[
    str | None,
    typer.Option(
        help="Come near to a cost instead of below: macs=2.5M, latency_ort=0.6x (of the original's). The objective is "
        "then the relative distance.",
        metavar="TERM=X",
    ),
]
TargetSided = Annotated[
    str, typer.Option(help="two: cheaper is as far off as dearer; one: cheaper is good.", metavar="one|two")
]
TargetBlend = Annotated[float, typer.Option(help="The distance times this is added to the error.", metavar="X")]

_EFFORT, _TRUNKS = "Effort of the search", "Trunks (--prune, or a recipe with something left open)"
Constraints = Annotated[
    str,
    typer.Option(
        help="How plans that break a limit are compared with others while searching: feasible-first; adaptive (the "
        "fewer keep the limits, the more violations count); penalty (every objective times 1 + --penalty x violation). "
        "The front keeps all limits in any case.",
        metavar="HOW",
        rich_help_panel=_EFFORT,
    ),
]
Penalty = Annotated[float, typer.Option(help="With --constraints penalty.", metavar="X", rich_help_panel=_EFFORT)]
RoundTo = Annotated[
    int | None,
    typer.Option(
        help="With --prune: cut groups keep a multiple of so many channels. Default: what the device of --cost "
        f"computes at once, where that is known, else {ROUND_TO}.",
        metavar="N",
        rich_help_panel=_TRUNKS,
    ),
]


def parse(cost: list[str] | None, target: str | None, sided: str, blend: float) -> Objectives:
    """The objectives that the options describe."""
    if target is not None:
        return Objectives.parse(cost, Target(target, sided, blend))  # type: ignore[arg-type]
    if (sided, blend) != (Target.sided, Target.blend):
        raise OptionError("--target-sided and --target-blend belong to --target TERM=X")
    return Objectives.parse(cost)


def block(given: int | None, objectives: Objectives, progress: Progress) -> int:
    """The multiple of channels that ``--prune`` cuts to; where nobody says which, the reason is said."""
    if given is not None:
        return given
    channels, source = round_to_of(objectives)
    progress.say(f"--round-to {channels}: {source}")
    return channels
