"""The quickstart command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group

from eexform.cli import options
from eexform.cli.output import console, errors, show
from eexform.cli.progress import Bars
from eexform.report import tables
from eexform.report.quickstart import free_folder
from eexform.report.quickstart import quickstart as run_all


def quickstart(
    out: Annotated[Path | None, typer.Option(help="Folder to make (default: eexform-quickstart, numbered if it exists).")] = None,
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    threads: Annotated[int, typer.Option(help="0: one per core.")] = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Go through the whole job on embedded data: train, search, export, verify, time. Under two minutes on two cores."""
    made = run_all(out or free_folder("eexform-quickstart"), seed=seed, threads=threads, progress=Bars(errors, quiet=quiet))
    plain = made.to_json()

    def table(_: object) -> Group:
        return Group(
            tables.pareto(plain["pareto"]),
            "",
            tables.verification(plain["verify"]),
            "",
            tables.timings(plain["bench"], plain["model"]),
            "",
            f"model {plain['model']}, with exits {plain['exported']}, run {plain['run']}",
        )

    show(plain, as_json, table)
    if not as_json:
        console.print(f"next: eexform inspect {plain['model']}; eexform pareto {plain['run']} --all", markup=False, soft_wrap=True)
