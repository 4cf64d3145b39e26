"""Commands about what a run found: pareto, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eexform.cli import options
from eexform.cli.output import show
from eexform.errors import OptionError, suggest
from eexform.report import tables
from eexform.report.pareto import described
from eexform.report.pareto import pareto as front_of
from eexform.search.run import open_run

_FORMS = ("if", "stages", "multi", "torch", "plan")


def pareto(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    all_plans: Annotated[bool, typer.Option("--all", help="Every plan; the table shows at most 25 otherwise.")] = False,
    as_json: options.Json = False,
) -> None:
    """Show the front of a run: accuracy and cost on select and on test, exit rates, worst case."""
    opened = open_run(run)
    show(front_of(opened), as_json, lambda plain: tables.pareto(plain, every=all_plans))


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File to write; a folder for the form stages.", metavar="FILE")
    ],
    pick: Annotated[
        str,
        typer.Option(
            help="knee; an index; max-cost=0.6x (of the model's) or a number in the unit of the cost; "
            "max-cost:params=1.1x for another objective, or any cost that was computed; "
            "min-accuracy=-0.5 (points against the model, on select, judged as the search judges) or 0.91 (plain "
            "accuracy on select).",
            metavar="PLAN",
        ),
    ] = "knee",
    form: Annotated[
        str,
        typer.Option(
            help="if: one file that skips work; stages: one file per segment and a manifest; multi: one file, all "
            "scores, no decisions; torch: a .pt2 program for PyTorch that skips work; plan: a recipe (.toml or .json) "
            "with its heads beside it, for `eexform apply`.",
            metavar="FORM",
        ),
    ] = "if",
    thresholds_as_input: Annotated[
        bool, typer.Option("--thresholds-as-input", help="Form if: thresholds become an input of the network.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Write a plan of a run as a network that skips work at run time: as ONNX, or as a program for PyTorch."""
    if form not in _FORMS:
        raise OptionError(f"--form: {form!r} does not exist: {suggest(form, _FORMS)}")
    if thresholds_as_input and form != "if":
        raise OptionError(f"--thresholds-as-input belongs to the form if, not to {form}")
    if (form, out.suffix) in (("torch", ".onnx"), ("if", ".pt2"), ("multi", ".pt2")):
        ending = ".pt2" if form == "torch" else ".onnx"
        raise OptionError(f"{out}: the form {form} is no {out.suffix[1:]} file; call it {out.with_suffix(ending)}")
    options.check_target(out, folder=form == "stages")
    opened = open_run(run)
    plan = opened.front.pick(pick)
    if not plan.exits and opened.is_original(plan):
        raise OptionError(
            f"--pick {pick}: this is plan {plan.index}, the model alone without any exit, and there is nothing to "
            "write; allow a lower accuracy, or give an index (see `eexform pareto`)"
        )
    checked = None
    if form == "plan":
        opened.save_plan(plan, out)
    elif form == "torch" and plan.exits:
        from eexform.report.torch_form import export_program  # torch is slow to import

        checked = export_program(opened, plan, out).to_json()
    else:
        opened.export(plan, out, form=form, thresholds_as_input=thresholds_as_input)
    front = front_of(opened)
    plain = {
        "out": str(out),
        "form": form,
        "objective": opened.front.objective,
        "objectives": front["run"]["objectives"],
        "trunk": front["trunk"],
        "plan": described(plan, opened.front.goals),
        "checked": checked,
    }
    show(plain, as_json, tables.exported)
