"""Commands about a model and what can be done to it: inspect, groups, apply, passes, criteria."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eexform import passes as registered
from eexform.backends.export import export
from eexform.cli import options
from eexform.cli.output import show
from eexform.data import Calibration, Preprocess
from eexform.errors import OptionError, suggest
from eexform.ir.serialize import save
from eexform.passes import Recipe
from eexform.report import tables, tables_groups
from eexform.report.apply import apply as replay
from eexform.report.apply import check_plan_target, save_settled
from eexform.report.groups import groups as find
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


def groups(
    model: options.Model,
    frozen: Annotated[bool, typer.Option("--frozen", help="Also list what cannot be pruned, and why.")] = False,
    as_json: options.Json = False,
    scores: options.Scores = None,
    output: options.Output = None,
    shape: options.Shape = None,
    weights: options.Weights = None,
    examples: options.Examples = None,
) -> None:
    """Show what a model can be pruned by: channels that must be cut together, and the work that falls with them."""
    graph = options.load_model(model, scores, output, shape, weights, examples)
    show(find(graph).to_json(), as_json, lambda plain: tables_groups.groups(plain, frozen))


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
    plan_out: Annotated[
        Path | None,
        typer.Option(
            help="Also write the settled plan, .toml or .json: what was chosen and computed from the samples is in "
            "it and in the .safetensors beside it; applied to the same model it gives the same file, without data.",
            metavar="FILE",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed for passes that draw random numbers, and of the samples.", metavar="N", min=0)
    ] = 0,
    as_json: options.Json = False,
    data: options.Data = None,
    split: options.Split = "head_train",
    samples: Annotated[
        int,
        typer.Option(
            help="Samples of the split, at most, that passes get to look at.",
            metavar="N",
            min=1,
            rich_help_panel="Data",
        ),
    ] = 1024,
    image_key: options.ImageKey = None,
    label_key: options.LabelKey = None,
    inputs: options.Inputs = None,
    labels: options.Labels = "given",
    train_from: options.TrainFrom = None,
    select_from: options.SelectFrom = None,
    test_from: options.TestFrom = None,
    fractions: options.Fractions = None,
    limit: options.Limit = None,
    split_seed: options.SplitSeed = 0,
    cache: options.Cache = None,
    colour: options.Colour = None,
    resize: options.Resize = None,
    crop: options.Crop = None,
    layout: options.Layout = None,
    model_layout: options.ModelLayout = None,
    scale: options.Scale = None,
    mean: options.Mean = None,
    std: options.Std = None,
    preset: options.Preset = None,
    scores: options.Scores = None,
    output: options.Output = None,
    shape: options.Shape = None,
    weights: options.Weights = None,
    examples: options.Examples = None,
) -> None:
    """Replay a recipe or a plan on a model, without a search. Some passes have to look at --data."""
    if form is not None and form not in _FORMS:
        raise OptionError(f"--form: {form!r} does not exist: {suggest(form, _FORMS)}")
    options.check_target(out, folder=form == "stages")
    if plan_out is not None:
        check_plan_target(plan_out)
    graph = options.load_model(model, scores, output, shape, weights, examples)
    steps = Recipe.load(recipe)
    chosen_samples = None
    if data is not None:
        preprocess = Preprocess.parse(
            preset=preset,
            layout=layout,
            model_layout=model_layout,
            scale=scale,
            mean=mean,
            std=std,
            resize=resize,
            crop=crop,
            colour=colour,
        )
        dataset = options.open_data(
            data,
            image_key=image_key,
            label_key=label_key,
            inputs=inputs,
            labels=labels,
            train_from=train_from,
            select_from=select_from,
            test_from=test_from,
            fractions=fractions,
            limit=limit,
            split_seed=split_seed,
            augment="none",
            cache=cache,
            preprocess=preprocess,
        )
        chosen_samples = Calibration(dataset.bind(graph), split, samples, seed)
    result = replay(graph, steps, data=chosen_samples, seed=seed)
    chosen = form or ("if" if result.graph.exits else "none")
    if chosen != "none" and not result.graph.exits:
        raise OptionError(f"--form {chosen}: the recipe left no exits to lower (it may have lowered them itself)")
    if chosen == "none":
        save(result.graph, out)
    else:
        export(result.graph, out, chosen)
    if plan_out is not None:
        save_settled(result, plan_out, steps.store())
    plain = {
        "out": str(out),
        "plan": None if plan_out is None else str(plan_out),
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


def criteria(as_json: options.Json = False) -> None:
    """List the registered criteria of pruning with what they need and their settings."""
    from eexform.pruning.criteria import listing

    show({"criteria": listing()}, as_json, tables.criteria)
