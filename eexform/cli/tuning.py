"""Options of training by torch that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from eexform.training.finetune_options import AMP, OPTIMISERS, SCHEDULES

PANEL = "Fine-tuning"

Device = Annotated[
    str,
    typer.Option(help="Where to train: auto (CUDA where there is one), cpu, cuda, cuda:1...", metavar="DEVICE"),
]
BatchSize = Annotated[int, typer.Option(help="Samples per step.", metavar="N", rich_help_panel=PANEL)]
Optimiser = Annotated[str, typer.Option(help=" | ".join(OPTIMISERS), metavar="NAME", rich_help_panel=PANEL)]
Momentum = Annotated[float, typer.Option(help="Of sgd.", metavar="X", rich_help_panel=PANEL)]
Nesterov = Annotated[
    bool, typer.Option("--nesterov/--no-nesterov", help="Whether sgd looks ahead.", rich_help_panel=PANEL)
]
WeightDecay = Annotated[
    float, typer.Option(help="Not of scales, shifts and biases.", metavar="X", rich_help_panel=PANEL)
]
Schedule = Annotated[str, typer.Option(help=f"{' | '.join(SCHEDULES)}.", metavar="NAME", rich_help_panel=PANEL)]
Warmup = Annotated[float, typer.Option(help="Share of the steps spent warming up.", metavar="X", rich_help_panel=PANEL)]
Clip = Annotated[
    float, typer.Option(help="Norm that the gradient is cut to; 0: off.", metavar="X", rich_help_panel=PANEL)
]
Ema = Annotated[
    float, typer.Option(help="Decay of averaged parameters; 0: no averaging.", metavar="X", rich_help_panel=PANEL)
]
Patience = Annotated[
    int,
    typer.Option(
        help="Stop after so many epochs without gain on calibrate; 0: never.", metavar="N", rich_help_panel=PANEL
    ),
]
Amp = Annotated[
    str,
    typer.Option(
        help=f"Precision of the forward pass: {' | '.join(AMP)}. auto: half where the device computes with it.",
        metavar="KIND",
        rich_help_panel=PANEL,
    ),
]
LabelSmoothing = Annotated[
    float, typer.Option(help="Share of the target spread over all classes.", metavar="X", rich_help_panel=PANEL)
]
