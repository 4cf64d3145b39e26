"""The command distill: a small network learns the answers of the one that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eexform.cli import options, tuning
from eexform.cli.output import errors, show
from eexform.cli.progress import Bars
from eexform.data import Preprocess
from eexform.report import distilled
from eexform.training.distill import LEARNING_RATE, begun, distill_options, work_folder
from eexform.training.distill import distill as run_distillation
from eexform.training.finetune_options import FinetuneOptions

_F = FinetuneOptions


def distill(
    model: options.Model,
    teacher: Annotated[
        str,
        typer.Option(
            help="The model to learn from, usually the one that MODEL was made from: an .onnx file or "
            "package.module:factory.",
            metavar="ORIGINAL",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: names as in MODEL.", metavar="FILE")],
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the checkpoint and the history, which stays. Default: FILE.training, until FILE is "
            "written.",
            metavar="FOLDER",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted training; all other options as they were.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of order and augmentation.", metavar="N", min=0)] = _F.seed,
    threads: Annotated[int, typer.Option(help="Threads; 0: one per core.", metavar="N", min=0)] = 0,
    device: tuning.Device = "auto",
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
    epochs: Annotated[
        int, typer.Option(help="Passes over head-train.", metavar="N", rich_help_panel=tuning.PANEL)
    ] = _F.epochs,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            help="A term of the loss (see `eexform losses`). Repeatable; terms add up. Default: "
            "distill:weight=1,temperature=4, and with labels cross_entropy:weight=0.1.",
            metavar="LOSS",
            rich_help_panel=tuning.PANEL,
        ),
    ] = None,
    batch_size: tuning.BatchSize = _F.batch_size,
    optimiser: tuning.Optimiser = _F.optimiser,
    learning_rate: Annotated[
        float, typer.Option("--lr", help="Peak of the learning rate.", metavar="X", rich_help_panel=tuning.PANEL)
    ] = LEARNING_RATE,
    momentum: tuning.Momentum = _F.momentum,
    nesterov: tuning.Nesterov = _F.nesterov,
    weight_decay: tuning.WeightDecay = _F.weight_decay,
    schedule: tuning.Schedule = _F.schedule,
    warmup: tuning.Warmup = _F.warmup,
    clip: tuning.Clip = _F.clip,
    ema: tuning.Ema = _F.ema,
    patience: tuning.Patience = _F.patience,
    amp: tuning.Amp = _F.amp,
    label_smoothing: tuning.LabelSmoothing = _F.label_smoothing,
    scores: options.Scores = None,
    output: options.Output = None,
    shape: options.Shape = None,
    weights: options.Weights = None,
    examples: options.Examples = None,
) -> None:
    """Train a network that was made smaller (by `eexform apply`) to answer as its original does.

    Labels help and are not needed: --labels none. What --scores, --output, --shape, --weights and --input say of MODEL
    holds for ORIGINAL too, where it is of the same kind. Ctrl-C keeps whole epochs; --resume goes on from there.
    """
    options.check_target(out, folder=False)
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
    modules = {text: options.names_module(text) for text in (model, teacher)}
    about = (weights, examples)
    own = about if modules[model] or not modules[teacher] else (None, None)
    graph = options.load_model(model, scores, output, shape if not modules[model] or modules[teacher] else None, *own)
    theirs = about if modules[teacher] else (None, None)
    original = options.load_model(teacher, scores, output, None if modules[teacher] else shape, *theirs)
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
    settings = distill_options(
        graph,
        labelled=dataset.labels == "given",
        epochs=epochs,
        batch_size=batch_size,
        optimiser=optimiser,
        learning_rate=learning_rate,
        trunk_learning_rate=learning_rate,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        schedule=schedule,
        warmup=warmup,
        clip=clip,
        ema=ema,
        patience=patience,
        amp=amp,
        label_smoothing=label_smoothing,
        seed=seed,
        **({"losses": tuple(loss)} if loss else {}),
    )
    try:
        report = run_distillation(
            graph,
            dataset,
            teacher=original,
            out=out,
            folder=work,
            resume=resume,
            options=settings,
            threads=threads,
            progress=Bars(errors, quiet=quiet),
            device=device,
        )
    except KeyboardInterrupt:
        if begun(work or work_folder(out)):
            _say("interrupted: the epochs trained so far are kept; go on with the same command and --resume")
            raise typer.Exit(130) from None
        raise
    plain = {"out": str(out), "digest": report.graph.digest, "teacher": original.digest, **report.to_json()}
    show(plain, as_json, distilled.distilled)


def _say(text: str) -> None:
    errors.print(text, markup=False, soft_wrap=True)
