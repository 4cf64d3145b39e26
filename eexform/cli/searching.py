"""Commands of a search: search, pareto, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eexform.cli import options
from eexform.cli.output import errors, show
from eexform.cli.progress import Bars
from eexform.data import Preprocess
from eexform.errors import OptionError
from eexform.passes import Recipe
from eexform.report import tables
from eexform.report.pareto import pareto as front_of
from eexform.search.driver import search as run_search
from eexform.search.folder import RunFolder
from eexform.search.limits import Limits
from eexform.search.options import SearchOptions
from eexform.search.run import open_run
from eexform.training.options import TrainOptions

_CANDIDATES, _TRAINING, _LIMITS = "Candidates", "Head training", "Limits"
_S, _T = SearchOptions(), TrainOptions()


def search(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Folder of the run.", metavar="RUN")],
    data: options.Data = None,
    cost: Annotated[str, typer.Option(help="What to make small beside the error, e.g. macs or latency_ort:threads=1.")] = "macs",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    recipe: Annotated[Path | None, typer.Option(help="Passes to apply; tunables left open are searched.")] = None,
    population: Annotated[int, typer.Option(help="Individuals per generation.")] = _S.population,
    generations: Annotated[int, typer.Option(help="How many.")] = _S.generations,
    seed: Annotated[int, typer.Option(help="Of training and search.")] = 0,
    threads: Annotated[int, typer.Option(help="0: one per core.")] = 0,
    site: Annotated[
        list[str] | None, typer.Option(help="A candidate site; repeatable. Default: spread over the cost.", rich_help_panel=_CANDIDATES)
    ] = None,
    max_sites: Annotated[int, typer.Option(help="Candidate sites, where none are named.", rich_help_panel=_CANDIDATES)] = _S.max_sites,
    head: Annotated[
        list[str] | None,
        typer.Option(help="A candidate head, e.g. conv:2x64/avg+max/s4; repeatable. Default: fitted to each site.", rich_help_panel=_CANDIDATES),
    ] = None,
    max_head_share: Annotated[
        float, typer.Option(help="What a default head may cost, as a share of the model's MACs.", rich_help_panel=_CANDIDATES)
    ] = _S.max_head_share,
    max_live: Annotated[int, typer.Option(help="Tensors that an exit may have to carry on.", rich_help_panel=_CANDIDATES)] = _S.max_live,
    levels: Annotated[int, typer.Option(help="Threshold levels per head.", rich_help_panel=_CANDIDATES)] = _S.levels,
    trust: Annotated[
        float, typer.Option(help="Weight of the model's calibrated opinion beside the label while choosing.", rich_help_panel=_CANDIDATES)
    ] = _S.trust,
    max_cost: Annotated[str | None, typer.Option(help="Mean cost: 0.7x of the model's, or a number.", rich_help_panel=_LIMITS)] = None,
    max_worst: Annotated[str | None, typer.Option(help="Cost of the dearest path, written alike.", rich_help_panel=_LIMITS)] = None,
    max_params: Annotated[str | None, typer.Option(help="Parameters with heads: 1.2x, or a number.", rich_help_panel=_LIMITS)] = None,
    min_accuracy: Annotated[
        str | None, typer.Option(help="On select: -0.5 points against the model, or 0.91.", rich_help_panel=_LIMITS)
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training split at most.", rich_help_panel=_TRAINING)] = _T.epochs,
    batch_size: Annotated[int, typer.Option(help="Samples per step.", rich_help_panel=_TRAINING)] = _T.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Peak.", rich_help_panel=_TRAINING)] = _T.learning_rate,
    weight_decay: Annotated[float, typer.Option(help="AdamW's.", rich_help_panel=_TRAINING)] = _T.weight_decay,
    distill: Annotated[
        float, typer.Option(help="Weight of the model's own scores as a target, 0-1.", rich_help_panel=_TRAINING)
    ] = _T.distill,
    distill_temperature: Annotated[float, typer.Option(help="Of the distillation.", rich_help_panel=_TRAINING)] = _T.distill_temperature,
    label_smoothing: Annotated[float, typer.Option(help="Of the labels.", rich_help_panel=_TRAINING)] = _T.label_smoothing,
    ema: Annotated[float, typer.Option(help="Decay of the averaged parameters, 0: none.", rich_help_panel=_TRAINING)] = _T.ema,
    patience: Annotated[int, typer.Option(help="Stop after so many epochs without gain, 0: never.", rich_help_panel=_TRAINING)] = _T.patience,
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
    augment: options.Augment = "none",
    cache: options.Cache = None,
    preset: options.Preset = None,
    layout: options.Layout = None,
    model_layout: options.ModelLayout = None,
    scale: options.Scale = None,
    mean: options.Mean = None,
    std: options.Std = None,
    resize: options.Resize = None,
    crop: options.Crop = None,
    colour: options.Colour = None,
    scores: options.Scores = None,
    output: options.Output = None,
    shape: options.Shape = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train heads at candidate sites and search for the best early-exit networks."""
    if not resume:
        RunFolder(out).fresh()
    graph = options.load_model(model, scores, output, shape)
    preprocess = Preprocess.parse(
        preset=preset, layout=layout, model_layout=model_layout, scale=scale, mean=mean, std=std, resize=resize, crop=crop,
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
        augment=augment,
        cache=cache,
        preprocess=preprocess,
    )
    run = run_search(
        graph,
        dataset,
        out=out,
        cost=cost,
        recipe=None if recipe is None else Recipe.load(recipe),
        options=SearchOptions(
            sites=tuple(site or ()),
            max_sites=max_sites,
            heads=tuple(head or ()),
            max_head_share=max_head_share,
            max_live=max_live,
            levels=levels,
            trust=trust,
            population=population,
            generations=generations,
            seed=seed,
            threads=threads,
        ),
        train=TrainOptions(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            label_smoothing=label_smoothing,
            distill=distill,
            distill_temperature=distill_temperature,
            ema=ema,
            patience=patience,
            seed=seed,
        ),
        limits=Limits(max_cost, max_worst, max_params, min_accuracy),
        resume=resume,
        progress=Bars(errors, quiet=quiet),
    )
    show(front_of(run), as_json, tables.pareto)
    if run.state == "interrupted":
        errors.print(f"interrupted: the front so far is kept; go on with the same command and --resume ({out})", markup=False)
        raise typer.Exit(130)


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
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write (a folder for stages).")],
    pick: Annotated[
        str, typer.Option(help="knee, an index, max-cost=0.6x, min-accuracy=-0.5 (points below the model).")
    ] = "knee",
    form: Annotated[str, typer.Option(help="if | stages | multi | plan (a recipe with its weights, for `apply`).")] = "if",
    thresholds_as_input: Annotated[bool, typer.Option(help="Form if: thresholds are an input of the model.")] = False,
    as_json: options.Json = False,
) -> None:
    """Write a plan of a run as ONNX that skips work at run time."""
    opened = open_run(run)
    plan = opened.front.pick(pick)
    if form == "plan":
        if thresholds_as_input:
            raise OptionError("--thresholds-as-input belongs to the form if")
        opened.save_plan(plan, out)
    else:
        opened.export(plan, out, form=form, thresholds_as_input=thresholds_as_input)
    plain = {"out": str(out), "form": form, "trunk": front_of(opened)["trunk"], "plan": plan.to_json()}
    show(plain, as_json, tables.exported)


