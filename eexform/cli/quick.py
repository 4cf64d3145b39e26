"""The quickstart command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group

from eexform.cli import options
from eexform.cli.output import console, errors, show
from eexform.cli.progress import Bars
from eexform.errors import OptionError
from eexform.report import tables
from eexform.report.quickstart import free_folder
from eexform.report.quickstart import quickstart as run_all


def quickstart(
    out: Annotated[
        Path | None,
        typer.Option(
            help="A new folder. Default: eexform-quickstart, with a number where that exists.", metavar="FOLDER"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything.", metavar="N", min=0)] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0: one per core.", metavar="N", min=0)] = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Go through the whole job on embedded data: train, search, export, verify, time.

    Needs nothing but this command, and under two minutes on two cores.
    """
    if out is not None and (out.is_file() or (out.is_dir() and any(out.iterdir()))):
        raise OptionError(f"{out}: exists already; choose a new folder with --out, or leave it out")
    made = run_all(
        out or free_folder("eexform-quickstart"), seed=seed, threads=threads, progress=Bars(errors, quiet=quiet)
    )
    plain = made.to_json()

    def table(_: object) -> Group:
        return Group(
            tables.pareto(plain["pareto"], exported=plain["plan"]),
            "",
            tables.verification(plain["verify"]),
            "",
            tables.timings(plain["bench"], plain["model"]),
            "",
        )

    show(plain, as_json, table)
    if not as_json:
        for line in (
            f"model {plain['model']}, with exits {plain['exported']}, run {plain['run']}",
            f"next: eexform inspect {plain['model']}; eexform pareto {plain['run']} --all",
        ):
            console.print(line, markup=False, soft_wrap=True)
