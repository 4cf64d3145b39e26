"""Commands about a model and what can be done to it: inspect, apply, passes, costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eexform import cost_models
from eexform import passes as registered
from eexform.backends.export import export
from eexform.cli import options
from eexform.cli.output import show
from eexform.errors import OptionError, suggest
from eexform.ir.serialize import save
from eexform.report import tables
from eexform.report.apply import apply as replay
from eexform.report.inspect import inspect as look

_FORMS = ("if", "stages", "multi", "none")


def inspect(
    model: options.Model,
    rejected: Annotated[
        bool, typer.Option("--rejected", help="Also list the values that are no sites, and why.")
    ] = False,
    max_live: Annotated[int, typer.Option(help="Tensors that an exit may have to carry on.", metavar="N", min=1)] = 3,
    as_json: options.Json = False,
    scores: options.Scores = None,
    output: options.Output = None,
    shape: options.Shape = None,
    weights: options.Weights = None,
    examples: options.Examples = None,
) -> None:
    """Show where exits can be attached, what lies before each place, and why other values are no sites."""
    graph = options.load_model(model, scores, output, shape, weights, examples)
    show(look(graph, max_live=max_live).to_json(), as_json, lambda plain: tables.inspection(plain, rejected))


def apply(
    model: options.Model,
    recipe: Annotated[Path, typer.Argument(help="A recipe or plan, .toml or .json.", metavar="RECIPE")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File to write; a folder for the form stages.", metavar="FILE")
    ],
    form: Annotated[
        str | None,
        typer.Option(
            help="How exits are written: if | stages | multi as in `eexform export`, or none: flat, an output per "
            "exit. Default: if where the result has exits, else none.",
            metavar="FORM",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for passes that draw random numbers.", metavar="N", min=0)] = 0,
    as_json: options.Json = False,
    scores: options.Scores = None,
    output: options.Output = None,
    shape: options.Shape = None,
    weights: options.Weights = None,
    examples: options.Examples = None,
) -> None:
    """Replay a recipe or a plan on a model, without a search."""
    if form is not None and form not in _FORMS:
        raise OptionError(f"--form: {form!r} does not exist: {suggest(form, _FORMS)}")
    options.check_target(out, folder=form == "stages")
    graph = options.load_model(model, scores, output, shape, weights, examples)
    result = replay(graph, recipe, seed=seed)
    chosen = form or ("if" if result.graph.exits else "none")
    if chosen != "none" and not result.graph.exits:
        raise OptionError(f"--form {chosen}: the recipe left no exits to lower (it may have lowered them itself)")
    if chosen == "none":
        save(result.graph, out)
    else:
        export(result.graph, out, chosen)
    plain = {
        "out": str(out),
        "form": chosen,
        "changed": result.changed,
        "nodes": len(result.graph.nodes),
        "exits": [exit_.to_json() for exit_ in result.graph.exits],
        "notes": list(result.notes),
        "skipped": [{"where": skip.where, "why": skip.why} for skip in result.skipped],
    }
    show(plain, as_json, tables.applied)


def passes(as_json: options.Json = False) -> None:
    """List the registered passes with their parameters and what a search may choose."""
    show({"passes": registered.listing()}, as_json, tables.passes)


def costs(as_json: options.Json = False) -> None:
    """List the registered cost models with their units and settings."""
    show({"costs": cost_models.listing()}, as_json, tables.costs)
