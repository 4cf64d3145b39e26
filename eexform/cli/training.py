"""Commands of fine-tuning: train, losses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eexform.cli import options
from eexform.cli.output import errors, show
from eexform.cli.progress import Bars
from eexform.report import tables
from eexform.report.pareto import pareto as front_of
from eexform.search.folder import RunFolder
from eexform.search.limits import Limits
from eexform.search.retrain import default_losses
from eexform.search.retrain import train as run_training
from eexform.search.run import open_run
from eexform.training.finetune_options import AMP, OPTIMISERS, SCHEDULES, STRATEGIES, FinetuneOptions

_TRAINING, _SEARCH = "Fine-tuning", "The search afterwards"
_F = FinetuneOptions


def train(
    run: Annotated[Path, typer.Argument(help="Folder of the run that the plan is taken from.", metavar="RUN")],
    out: Annotated[Path, typer.Option(help="Folder of the new run.", metavar="NEW")],
    pick: Annotated[
        str, typer.Option(help="Which plan, as in `eexform export`: knee, an index, max-cost=0.6x...", metavar="PLAN")
    ] = "knee",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted training; all other options as they were.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of training and search.", metavar="N", min=0)] = _F.seed,
    threads: Annotated[int, typer.Option(help="Threads; 0: one per core.", metavar="N", min=0)] = 0,
    device: Annotated[
        str,
        typer.Option(help="Where to train: auto (CUDA where there is one), cpu, cuda, cuda:1...", metavar="DEVICE"),
    ] = "auto",
    data: Annotated[
        str | None, typer.Option(help="Where the samples of RUN are now, if they have moved.", metavar="DATA")
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    strategy: Annotated[
        str,
        typer.Option(
            help=f"{' | '.join(STRATEGIES)}. frozen: the heads go on alone. joint: trunk and heads go on together. "
            "mixed: heads start anew, everything is trained at once. heads-then-joint: new heads alone for "
            "--head-epochs, then everything.",
            metavar="NAME",
            rich_help_panel=_TRAINING,
        ),
    ] = _F.strategy,
    epochs: Annotated[
        int, typer.Option(help="Passes over head-train, all phases together.", metavar="N", rich_help_panel=_TRAINING)
    ] = _F.epochs,
    head_epochs: Annotated[
        int,
        typer.Option(
            help="Of heads-then-joint: the first ones, for the heads alone.", metavar="N", rich_help_panel=_TRAINING
        ),
    ] = _F.head_epochs,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            help="A term of the loss, such as distill:weight=0.5 (see `eexform losses`). Repeatable; terms add up. "
            "Default: cross_entropy and distill:weight=0.5,temperature=2, or without labels distillation alone; "
            "confidence_bce too where heads have gates.",
            metavar="LOSS",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    exit_weights: Annotated[
        str,
        typer.Option(
            help="How much each exit counts: uniform, linear, cost, or 0.5/0.5/1 with the final exit's last.",
            metavar="LIST",
            rich_help_panel=_TRAINING,
        ),
    ] = _F.exit_weights,
    batch_size: Annotated[
        int, typer.Option(help="Samples per step.", metavar="N", rich_help_panel=_TRAINING)
    ] = _F.batch_size,
    optimiser: Annotated[
        str, typer.Option(help=" | ".join(OPTIMISERS), metavar="NAME", rich_help_panel=_TRAINING)
    ] = _F.optimiser,
    learning_rate: Annotated[
        float, typer.Option("--lr", help="Peak for the heads.", metavar="X", rich_help_panel=_TRAINING)
    ] = _F.learning_rate,
    trunk_learning_rate: Annotated[
        float, typer.Option("--trunk-lr", help="Peak for the trunk.", metavar="X", rich_help_panel=_TRAINING)
    ] = _F.trunk_learning_rate,
    momentum: Annotated[float, typer.Option(help="Of sgd.", metavar="X", rich_help_panel=_TRAINING)] = _F.momentum,
    nesterov: Annotated[
        bool,
        typer.Option("--nesterov/--no-nesterov", help="Whether sgd looks ahead.", rich_help_panel=_TRAINING),
    ] = _F.nesterov,
    weight_decay: Annotated[
        float,
        typer.Option(help="Not of scales, shifts and biases.", metavar="X", rich_help_panel=_TRAINING),
    ] = _F.weight_decay,
    schedule: Annotated[
        str, typer.Option(help=f"{' | '.join(SCHEDULES)}.", metavar="NAME", rich_help_panel=_TRAINING)
    ] = _F.schedule,
    warmup: Annotated[
        float, typer.Option(help="Share of the steps spent warming up.", metavar="X", rich_help_panel=_TRAINING)
    ] = _F.warmup,
    clip: Annotated[
        float, typer.Option(help="Norm that the gradient is cut to; 0: off.", metavar="X", rich_help_panel=_TRAINING)
    ] = _F.clip,
    ema: Annotated[
        float,
        typer.Option(help="Decay of averaged parameters; 0: no averaging.", metavar="X", rich_help_panel=_TRAINING),
    ] = _F.ema,
    patience: Annotated[
        int,
        typer.Option(
            help="Stop after so many epochs without gain on calibrate; 0: never.",
            metavar="N",
            rich_help_panel=_TRAINING,
        ),
    ] = _F.patience,
    amp: Annotated[
        str,
        typer.Option(
            help=f"Precision of the forward pass: {' | '.join(AMP)}. auto: half where the device computes with it.",
            metavar="KIND",
            rich_help_panel=_TRAINING,
        ),
    ] = _F.amp,
    label_smoothing: Annotated[
        float,
        typer.Option(help="Share of the target spread over all classes.", metavar="X", rich_help_panel=_TRAINING),
    ] = _F.label_smoothing,
    population: Annotated[
        int | None,
        typer.Option(help="Individuals per generation; default: as in RUN.", metavar="N", rich_help_panel=_SEARCH),
    ] = None,
    generations: Annotated[
        int | None,
        typer.Option(help="Generations after the first; default: as in RUN.", metavar="N", rich_help_panel=_SEARCH),
    ] = None,
    max_cost: options.MaxCost = None,
    max_worst: options.MaxWorst = None,
    max_params: options.MaxParams = None,
    min_accuracy: options.MinAccuracy = None,
) -> None:
    """Fine-tune a plan's trunk and heads together, then search its policy anew: a run beside the old one.

    Limits are those of RUN where none are given. Ctrl-C keeps what is done: trained epochs, and the front so far;
    --resume goes on from there.
    """
    folder, source = RunFolder(out), open_run(run)
    if not resume:
        folder.fresh()
    plan = source.front.pick(pick)
    tuning = FinetuneOptions(
        strategy=strategy,
        epochs=epochs,
        head_epochs=head_epochs,
        batch_size=batch_size,
        optimiser=optimiser,
        learning_rate=learning_rate,
        trunk_learning_rate=trunk_learning_rate,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        schedule=schedule,
        warmup=warmup,
        clip=clip,
        ema=ema,
        patience=patience,
        amp=amp,
        losses=tuple(loss or default_losses(source, plan)),
        exit_weights=exit_weights,
        label_smoothing=label_smoothing,
        seed=seed,
    )
    limits = Limits(max_cost, max_worst, max_params, min_accuracy)
    try:
        made = run_training(
            source,
            pick=pick,
            out=out,
            options=tuning,
            data=data,
            resume=resume,
            population=population,
            generations=generations,
            limits=None if limits == Limits() else limits,
            threads=threads,
            progress=Bars(errors, quiet=quiet),
            device=device,
        )
    except KeyboardInterrupt:
        if folder.exists:
            _say("interrupted: the epochs trained so far are kept; go on with the same command and --resume")
            raise typer.Exit(130) from None
        raise
    show(front_of(made), as_json, tables.pareto)
    if made.state == "interrupted":
        _say("interrupted: the front so far is kept; go on with the same command and --resume")
        raise typer.Exit(130)


def losses(as_json: options.Json = False) -> None:
    """List the registered terms of fine-tuning losses with their settings."""
    from eexform.training.objectives import listing  # imports torch, which takes a second or two

    show({"losses": listing()}, as_json, tables.losses)


def _say(text: str) -> None:
    errors.print(text, markup=False, soft_wrap=True)
