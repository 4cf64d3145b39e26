"""The command search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eexform.cli import objectives, options
from eexform.cli.output import errors, show
from eexform.cli.progress import Bars
from eexform.data import Preprocess
from eexform.errors import OptionError
from eexform.passes import Recipe
from eexform.report import tables
from eexform.report.pareto import pareto as front_of
from eexform.search.driver import pruning_recipe
from eexform.search.driver import search as run_search
from eexform.search.folder import RunFolder
from eexform.search.options import SearchOptions
from eexform.search.trunk_options import TrunkOptions
from eexform.training.options import TrainOptions

_CANDIDATES, _EFFORT, _TRAINING = "Candidates", "Effort of the search", "Head training"
_TRUNKS = "Trunks (--prune, or a recipe with something left open)"
_S, _T, _P = SearchOptions(), TrainOptions(), TrunkOptions()


def search(
    model: options.Model,
    out: Annotated[Path, typer.Option(help="Folder of the run.", metavar="RUN")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run; all other options as they were.")
    ] = False,
    cost: objectives.Cost = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Passes to apply, .toml or .json; tunables left open are searched. Default: fold_batch_norm, "
            "insert_exits.",
            metavar="RECIPE",
        ),
    ] = None,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            help="Search smaller trunks as well, and exits for each: a recipe of drop_blocks, prune_channels, repair, "
            "fold_batch_norm and insert_exits, with what the first two cut left open.",
        ),
    ] = False,
    target: objectives.TargetCost = None,
    target_sided: objectives.TargetSided = "two",
    target_blend: objectives.TargetBlend = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of head training and search.", metavar="N")] = 0,
    threads: Annotated[int, typer.Option(help="Threads; 0: one per core.", metavar="N")] = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    data: options.Data = None,
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
    colour: options.Colour = None,
    resize: options.Resize = None,
    crop: options.Crop = None,
    layout: options.Layout = None,
    model_layout: options.ModelLayout = None,
    scale: options.Scale = None,
    mean: options.Mean = None,
    std: options.Std = None,
    preset: options.Preset = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            help="A value of the model (see `eexform inspect`). Repeatable. Default: spread over the cost.",
            metavar="VALUE",
            rich_help_panel=_CANDIDATES,
        ),
    ] = None,
    max_sites: Annotated[
        int, typer.Option(help="How many sites, where none are named.", metavar="N", rich_help_panel=_CANDIDATES)
    ] = _S.max_sites,
    head: Annotated[
        list[str] | None,
        typer.Option(
            help="Such as conv:2x64/avg+max/s4. Repeatable. Default: fitted to each site.",
            metavar="HEAD",
            rich_help_panel=_CANDIDATES,
        ),
    ] = None,
    max_head_share: Annotated[
        float,
        typer.Option(
            help="What a default head may cost, as a share of the model's MACs.",
            metavar="X",
            rich_help_panel=_CANDIDATES,
        ),
    ] = _S.max_head_share,
    gates: Annotated[
        bool,
        typer.Option(
            "--gates",
            help="Default heads learn to say how sure they are; exits leave by that (measures gate and stick). "
            "Named heads say so themselves: conv:1x32/avg/gate.",
            rich_help_panel=_CANDIDATES,
        ),
    ] = False,
    max_live: Annotated[
        int, typer.Option(help="Tensors that an exit may have to carry on.", metavar="N", rich_help_panel=_CANDIDATES)
    ] = _S.max_live,
    levels: Annotated[
        int, typer.Option(help="Threshold levels per head.", metavar="N", rich_help_panel=_CANDIDATES)
    ] = _S.levels,
    population: Annotated[
        int, typer.Option(help="Individuals per generation, a multiple of 4.", metavar="N", rich_help_panel=_EFFORT)
    ] = _S.population,
    generations: Annotated[
        int, typer.Option(help="Generations after the first.", metavar="N", rich_help_panel=_EFFORT)
    ] = _S.generations,
    trust: Annotated[
        float,
        typer.Option(
            help="Weight of the model's calibrated opinion beside the label while plans are compared, 0-1; reported "
            "accuracies never contain it.",
            metavar="X",
            rich_help_panel=_EFFORT,
        ),
    ] = _S.trust,
    exit_fee: Annotated[
        float,
        typer.Option(
            help="What passing an exit counts beside its cost while choosing, as a share of the model's.",
            metavar="X",
            rich_help_panel=_EFFORT,
        ),
    ] = _S.exit_fee,
    max_cost: options.MaxCost = None,
    max_worst: options.MaxWorst = None,
    max_params: options.MaxParams = None,
    min_accuracy: options.MinAccuracy = None,
    max_terms: options.MaxTerms = None,
    fits: options.Fits = None,
    constraints: objectives.Constraints = _S.constraints,
    penalty: objectives.Penalty = _S.penalty,
    heads_from: Annotated[
        Path | None,
        typer.Option(
            "--heads-from",
            help="Take the trained heads of another run with the same model, data and training options, instead of "
            "training them again: for another --cost, other limits, more effort.",
            metavar="RUN",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option(help="Passes over head-train at most.", metavar="N", rich_help_panel=_TRAINING)
    ] = _T.epochs,
    batch_size: Annotated[
        int, typer.Option(help="Samples per step.", metavar="N", rich_help_panel=_TRAINING)
    ] = _T.batch_size,
    learning_rate: Annotated[
        float, typer.Option(help="Peak of the learning rate.", metavar="X", rich_help_panel=_TRAINING)
    ] = _T.learning_rate,
    weight_decay: Annotated[
        float, typer.Option(help="Weight decay of AdamW.", metavar="X", rich_help_panel=_TRAINING)
    ] = _T.weight_decay,
    distill: Annotated[
        float,
        typer.Option(help="Weight of the model's own scores as a target, 0-1.", metavar="X", rich_help_panel=_TRAINING),
    ] = _T.distill,
    distill_temperature: Annotated[
        float, typer.Option(help="Softening of those scores.", metavar="X", rich_help_panel=_TRAINING)
    ] = _T.distill_temperature,
    label_smoothing: Annotated[
        float, typer.Option(help="Share of the target spread over all classes.", metavar="X", rich_help_panel=_TRAINING)
    ] = _T.label_smoothing,
    ema: Annotated[
        float,
        typer.Option(help="Decay of averaged parameters; 0: no averaging.", metavar="X", rich_help_panel=_TRAINING),
    ] = _T.ema,
    patience: Annotated[
        int,
        typer.Option(
            help="Stop after so many epochs without gain on calibrate; 0: never.",
            metavar="N",
            rich_help_panel=_TRAINING,
        ),
    ] = _T.patience,
    trunks: Annotated[
        int,
        typer.Option(help="Trunks that get exits, besides the original.", metavar="N", rich_help_panel=_TRUNKS),
    ] = _P.survivors,
    trunk_epochs: Annotated[
        int,
        typer.Option(
            help="Passes over head-train for training trunks (distillation), all together: shared out by successive "
            "halving. 0: they are only repaired.",
            metavar="N",
            rich_help_panel=_TRUNKS,
        ),
    ] = _P.epochs,
    proxy_samples: Annotated[
        int,
        typer.Option(
            help="Samples of head-train that pruning and repair may look at, and at most so many of calibrate that "
            "trunks are ranked by.",
            metavar="N",
            rich_help_panel=_TRUNKS,
        ),
    ] = _P.samples,
    trunk_population: Annotated[
        int,
        typer.Option(help="Trunks per generation, a multiple of 4.", metavar="N", rich_help_panel=_TRUNKS),
    ] = _P.population,
    trunk_generations: Annotated[
        int, typer.Option(help="Generations of trunks after the first.", metavar="N", rich_help_panel=_TRUNKS)
    ] = _P.generations,
    trunk_lr: Annotated[
        float | None,
        typer.Option(
            help="Peak of the learning rate of trunks. Default: as in `eexform distill`.",
            metavar="X",
            rich_help_panel=_TRUNKS,
        ),
    ] = None,
    trunk_batch_size: Annotated[
        int | None,
        typer.Option(
            help="Samples per step there. Default: as in `eexform distill`.", metavar="N", rich_help_panel=_TRUNKS
        ),
    ] = None,
    round_to: objectives.RoundTo = None,
    no_exits: Annotated[
        bool,
        typer.Option("--no-exits", help="Search trunks alone: no heads, no exits.", rich_help_panel=_TRUNKS),
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            help="Where to train trunks: auto (CUDA where there is one), cpu, cuda, cuda:1...",
            metavar="DEVICE",
            rich_help_panel=_TRUNKS,
        ),
    ] = "auto",
    scores: options.Scores = None,
    output: options.Output = None,
    shape: options.Shape = None,
    weights: options.Weights = None,
    examples: options.Examples = None,
) -> None:
    """Train heads at candidate sites and search for the best early-exit networks.

    Ctrl-C keeps what is done: trained epochs, and the front so far; --resume goes on from there.
    """
    effort = SearchOptions(
        sites=tuple(site or ()),
        max_sites=max_sites,
        heads=tuple(head or ()),
        max_head_share=max_head_share,
        max_live=max_live,
        levels=levels,
        trust=trust,
        exit_fee=exit_fee,
        population=population,
        generations=generations,
        seed=seed,
        threads=threads,
        gates=gates,
        constraints=constraints,
        penalty=penalty,
    )
    training = TrainOptions(
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
    )
    limits = options.limits(max_cost, max_worst, max_params, min_accuracy, max_terms, fits)
    asked = objectives.parse(cost, target, target_sided, target_blend)
    bars = Bars(errors, quiet=quiet)
    if prune and recipe is not None:
        raise OptionError("--prune is a recipe of its own; leave it out, or --recipe")
    passes = None if recipe is None else Recipe.load(recipe)
    if prune:
        passes = pruning_recipe(objectives.block(round_to, asked, bars))
    elif round_to is not None:
        raise OptionError("--round-to belongs to --prune; a recipe says it of prune_channels (round_to)")
    smaller = TrunkOptions(
        survivors=trunks,
        epochs=trunk_epochs,
        population=trunk_population,
        generations=trunk_generations,
        samples=proxy_samples,
        exits=not no_exits,
        learning_rate=trunk_lr,
        batch_size=trunk_batch_size,
    )
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
    folder = RunFolder(out)
    if not resume:
        folder.fresh()
    graph = options.load_model(model, scores, output, shape, weights, examples)
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
    try:
        run = run_search(
            graph,
            dataset,
            out=out,
            cost=asked,
            recipe=passes,
            options=effort,
            train=training,
            limits=limits,
            trunks=smaller,
            heads_from=heads_from,
            resume=resume,
            progress=bars,
            device=device,
        )
    except KeyboardInterrupt:
        if folder.exists:
            _say("interrupted: the epochs trained so far are kept; go on with the same command and --resume")
            raise typer.Exit(130) from None
        raise
    show(front_of(run), as_json, tables.pareto)
    if run.state == "interrupted":
        _say("interrupted: the front so far is kept; go on with the same command and --resume")
        raise typer.Exit(130)


def _say(text: str) -> None:
    errors.print(text, markup=False, soft_wrap=True)
