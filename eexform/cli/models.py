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
from eexform.errors import OptionError
from eexform.ir.serialize import save
from eexform.report import tables
from eexform.report.apply import apply as replay
from eexform.report.inspect import inspect as look


def inspect(
    model: options.Model,
    max_live: Annotated[int, typer.Option(help="Tensors that an exit may have to carry on.")] = 3,
    rejected: Annotated[bool, typer.Option("--rejected", help="Also list the values that are no sites, and why.")] = False,
    scores: options.Scores = None,
    output: options.Output = None,
    shape: options.Shape = None,
    as_json: options.Json = False,
) -> None:
    """Show where exits can be attached, what lies before each place, and why other values are no sites."""
    graph = options.load_model(model, scores, output, shape)
    show(look(graph, max_live=max_live).to_json(), as_json, lambda plain: tables.inspection(plain, rejected))


def apply(
    model: options.Model,
    recipe: Annotated[Path, typer.Argument(help="A recipe or plan, .toml or .json.", metavar="RECIPE")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write.")],
    form: Annotated[
        str | None,
        typer.Option(help="Lower the exits: if | stages | multi. Default: if, where the recipe inserts exits; none writes them flat."),
    ] = None,
    seed: Annotated[int, typer.Option(help="For passes that draw random numbers.")] = 0,
    scores: options.Scores = None,
    output: options.Output = None,
    shape: options.Shape = None,
    as_json: options.Json = False,
) -> None:
    """Replay a recipe or a plan on a model, without a search."""
    graph = options.load_model(model, scores, output, shape)
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


