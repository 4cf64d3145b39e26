"""Commands of fine-tuning: train, losses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eexform.cli import options, tuning
from eexform.cli.output import errors, show
from eexform.cli.progress import Bars
from eexform.report import tables
from eexform.report.pareto import pareto as front_of
from eexform.search.folder import RunFolder
from eexform.search.limits import Limits
from eexform.search.retrain import train as run_training
from eexform.search.run import open_run
from eexform.training.finetune_options import STRATEGIES, FinetuneOptions

_TRAINING, _SEARCH = tuning.PANEL, "The search afterwards"
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
    device: tuning.Device = "auto",
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
            "--head-epochs, then everything. distill: as joint, by the original's answers rather than by labels; of a "
            "plan that made the network smaller, with exits or without.",
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
            "Default: cross_entropy and distill:weight=0.5,temperature=2 (distill: the other way round, see "
            "docs/training.md), or without labels distillation alone; "
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
    batch_size: tuning.BatchSize = _F.batch_size,
    optimiser: tuning.Optimiser = _F.optimiser,
    learning_rate: Annotated[
        float, typer.Option("--lr", help="Peak for the heads.", metavar="X", rich_help_panel=_TRAINING)
    ] = _F.learning_rate,
    trunk_learning_rate: Annotated[
        float, typer.Option("--trunk-lr", help="Peak for the trunk.", metavar="X", rich_help_panel=_TRAINING)
    ] = _F.trunk_learning_rate,
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
    max_terms: options.MaxTerms = None,
    fits: options.Fits = None,
) -> None:
    """Fine-tune a plan's trunk and heads together, then search its policy anew: a run beside the old one.

    Limits are those of RUN where none are given. Ctrl-C keeps what is done: trained epochs, and the front so far;
    --resume goes on from there.
    """
    folder, source = RunFolder(out), open_run(run)
    if not resume:
        folder.fresh()
    source.front.pick(pick)  # refused before anything else is looked at
    settings = FinetuneOptions(
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
        losses=tuple(loss) if loss else None,
        exit_weights=exit_weights,
        label_smoothing=label_smoothing,
        seed=seed,
    )
    limits = options.limits(max_cost, max_worst, max_params, min_accuracy, max_terms, fits)
    try:
        made = run_training(
            source,
            pick=pick,
            out=out,
            options=settings,
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
