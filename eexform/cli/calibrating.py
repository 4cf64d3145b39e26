"""The command calibrate: measure this machine, for the cost models table, roofline and energy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from eexform.cli import options
from eexform.cli.output import errors, show
from eexform.cli.progress import Bars
from eexform.errors import OptionError, suggest
from eexform.ir.graph import Graph

_RUNTIMES = ("onnxruntime",)


def calibrate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Models whose operators are measured: .onnx files, or package.module:factory.", metavar="MODEL..."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, .json.", metavar="FILE")],
    runtime: Annotated[str, typer.Option(help="What executes the models.", metavar="NAME")] = _RUNTIMES[0],
    threads: options.Threads = 1,
    repeats: Annotated[int, typer.Option(help="Rounds in which every operator is timed.", metavar="N", min=1)] = 15,
    no_grid: Annotated[
        bool,
        typer.Option(
            "--no-grid",
            help="Only the models' own operators, not those that pruning the models and attaching heads would give.",
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Keep what FILE holds, and measure only what it lacks (or go on when interrupted)."
        ),
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    scores: options.Scores = None,
    output: options.Output = None,
    shape: options.Shape = None,
) -> None:
    """Measure how long this machine takes for the operators of your models, for --cost table and roofline.

    Use as table:device=FILE, roofline:device=FILE or energy:device=FILE. Leave the machine alone meanwhile. Ctrl-C
    keeps what is measured; --resume goes on, or adds further models to a file.
    """
    from eexform.cost_models.calibrate import Calibration
    from eexform.cost_models.calibrate import calibrate as measure

    if runtime not in _RUNTIMES:
        raise OptionError(f"--runtime: {runtime!r} cannot be measured: {suggest(runtime, _RUNTIMES)}")
    options.check_target(out, folder=False)
    if out.suffix != ".json":
        raise OptionError(f"--out: {out} must end in .json, by which it is recognised as a device")
    if out.exists() and not resume:
        raise OptionError(f"{out}: exists already; add --resume to keep what it holds and measure the rest")
    graphs = _loaded(models, scores, output, shape)

    def keep(partial: Calibration) -> None:
        partial.save(out)

    try:
        found = measure(
            graphs,
            threads=threads,
            repeats=repeats,
            grid=not no_grid,
            resume=out if resume and out.exists() else None,
            keep=keep,
            progress=Bars(errors, quiet=quiet),
        )
    except KeyboardInterrupt:
        if out.exists():
            errors.print(
                f"interrupted: what is measured is in {out}; go on with the same command and --resume",
                markup=False,
                soft_wrap=True,
            )
            raise typer.Exit(130) from None
        raise
    found.save(out)
    show({"out": str(out), **_summary(found.to_json())}, as_json, _shown)


def _loaded(models: list[str], scores: str | None, output: str | None, shape: list[str] | None) -> dict[str, Graph]:
    """The models by name; those of equal name with a number behind it."""
    graphs: dict[str, Graph] = {}
    for text in models:
        name = text if options.names_module(text) else Path(text).name
        number = 2
        while name in graphs:
            name, number = f"{Path(text).name}#{number}", number + 1
        graphs[name] = options.load_model(text, scores, output, shape, None, None)
    return graphs


def _summary(plain: dict[str, Any]) -> dict[str, Any]:
    """What the file says, without the table itself."""
    rest = {key: value for key, value in plain.items() if key not in ("format", "finished", "table")}
    return {**rest, "entries": len(plain["table"])}


def _shown(plain: dict[str, Any]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    for name in ("kernels", "measured us", "from the table us", "error"):
        table.add_column(name, justify="right")
    for item in plain["models"]:
        error = item["predicted_us"] / item["measured_us"] - 1
        table.add_row(
            item["model"],
            str(item["kernels"]),
            f"{item['measured_us']:.1f}",
            f"{item['predicted_us']:.1f}",
            f"{error:+.1%}",
        )
    about = plain["runtime"]
    text = f"{plain['entries']} kernels in {plain['out']}; a call takes {about['call_us']:.1f} us"
    if plain["refused"]:
        first = plain["refused"][0]
        text += f"; {len(plain['refused'])} could not be measured, the first: {first['what']}: {first['why']}"
    return Group(table, Text(text))
