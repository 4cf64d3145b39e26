"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eexform.data import Dataset, Preprocess, open_dataset
from eexform.errors import OptionError
from eexform.frontends.onnx import load
from eexform.ir.graph import Graph
from eexform.search.run import open_run

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]
Model = Annotated[Path, typer.Argument(help="The trained classifier, an .onnx file.", metavar="MODEL.onnx")]
Scores = Annotated[
    str | None,
    typer.Option(help="What the output holds: logits or probabilities (default: seen from the graph).", metavar="KIND"),
]
Output = Annotated[str | None, typer.Option(help="Name of the class scores, where the model has several outputs.")]
Shape = Annotated[
    list[str] | None,
    typer.Option("--shape", help="Shape of an input that the model does not say: NAME=N,3,32,32. Repeatable."),
]

_DATA = "Data"
Data = Annotated[
    str | None,
    typer.Option(
        help="digits | FILE.npz | FOLDER of class folders | hf:FOLDER-OR-NAME | package.module:factory",
        rich_help_panel=_DATA,
    ),
]
ImageKey = Annotated[str | None, typer.Option(help="Column or array of the images.", rich_help_panel=_DATA)]
LabelKey = Annotated[str | None, typer.Option(help="Column or array of the labels.", rich_help_panel=_DATA)]
Inputs = Annotated[
    str | None, typer.Option(help="Which array feeds which input: input_ids=ids,attention_mask=mask.", rich_help_panel=_DATA)
]
Labels = Annotated[
    str, typer.Option(help="given, or none: learn and judge by the model's own answers.", rich_help_panel=_DATA)
]
TrainFrom = Annotated[str | None, typer.Option(help="Part of the data that trains the heads.", rich_help_panel=_DATA)]
SelectFrom = Annotated[
    str | None, typer.Option(help="Part that the model was NOT trained on: calibrate, select, test.", rich_help_panel=_DATA)
]
TestFrom = Annotated[str | None, typer.Option(help="A part of its own for test.", rich_help_panel=_DATA)]
Fractions = Annotated[
    str | None, typer.Option(help="Shares of the splits drawn from one part, e.g. 0.1,0.4,0.5.", rich_help_panel=_DATA)
]
Limit = Annotated[int | None, typer.Option(help="At most so many samples for head training.", rich_help_panel=_DATA)]
SplitSeed = Annotated[int, typer.Option(help="Seed of the splits.", rich_help_panel=_DATA)]
Augment = Annotated[
    str, typer.Option(help="For head training: none, or flip,crop:4,cutout:8,jitter:0.2,mixup:0.4,cutmix:1.", rich_help_panel=_DATA)
]
Cache = Annotated[Path | None, typer.Option(help="Folder for decoded images.", rich_help_panel=_DATA)]

_PRE = "Preprocessing (nothing is guessed)"
Preset = Annotated[str | None, typer.Option(help="imagenet: 1/255, ImageNet mean and std.", rich_help_panel=_PRE)]
Layout = Annotated[str | None, typer.Option(help="Layout of raw images: nhwc or nchw.", rich_help_panel=_PRE)]
ModelLayout = Annotated[str | None, typer.Option(help="Layout that the model takes (default nchw).", rich_help_panel=_PRE)]
Scale = Annotated[str | None, typer.Option(help="Factor for raw values, e.g. 1/255.", rich_help_panel=_PRE)]
Mean = Annotated[str | None, typer.Option(help="Subtracted after scaling: one number or one per channel.", rich_help_panel=_PRE)]
Std = Annotated[str | None, typer.Option(help="Divisor after that.", rich_help_panel=_PRE)]
Resize = Annotated[str | None, typer.Option(help="HEIGHTxWIDTH, or the shorter edge.", rich_help_panel=_PRE)]
Crop = Annotated[str | None, typer.Option(help="Centre crop after resizing, HEIGHTxWIDTH.", rich_help_panel=_PRE)]
Colour = Annotated[str | None, typer.Option(help="Convert to rgb or grey.", rich_help_panel=_PRE)]
RunData = Annotated[
    Path | None, typer.Option("--run", help="Take the data of this run instead of --data.", rich_help_panel=_DATA)
]


def load_model(path: Path, scores: str | None, output: str | None, shapes: list[str] | None) -> Graph:
    """The model, with what the options say about it."""
    if scores not in (None, "logits", "probabilities"):
        raise OptionError(f"--scores: {scores!r} is neither logits nor probabilities")
    parsed = dict(_shape(text) for text in shapes or ())
    return load(path, scores=scores, output=output, input_shapes=parsed or None)  # type: ignore[arg-type]


def _shape(text: str) -> tuple[str, list[int | str]]:
    name, equals, dims = text.rpartition("=")
    if not equals or not name or not dims:
        raise OptionError(f"--shape: {text!r} is not of the form NAME=N,3,32,32")
    return name, [int(dim) if dim.strip().isdigit() else dim.strip() for dim in dims.split(",")]


def parse_fractions(text: str | None) -> list[float] | None:
    """``0.1,0.4,0.5`` as numbers."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise OptionError(f"--fractions: {text!r} is not a list of numbers such as 0.1,0.4,0.5") from error


def open_data(
    data: str | None,
    *,
    image_key: str | None,
    label_key: str | None,
    inputs: str | None,
    labels: str,
    train_from: str | None,
    select_from: str | None,
    test_from: str | None,
    fractions: str | None,
    limit: int | None,
    split_seed: int,
    augment: str,
    cache: Path | None,
    preprocess: Preprocess,
) -> Dataset:
    """The data set that the options describe."""
    if data is None:
        raise OptionError("no data: give --data (digits, FILE.npz, a folder, hf:..., package.module:factory)")
    if labels not in ("given", "none"):
        raise OptionError(f"--labels: {labels!r} is neither given nor none")
    return open_dataset(
        data,
        image_key=image_key,
        label_key=label_key,
        inputs=inputs,
        preprocess=preprocess,
        augment=augment,
        labels=labels,  # type: ignore[arg-type]
        train_from=train_from,
        select_from=select_from,
        test_from=test_from,
        fractions=parse_fractions(fractions),
        seed=split_seed,
        limit=limit,
        cache_folder=cache,
    )


def check_data(
    graph: Graph,
    run: Path | None,
    data: str | None,
    *,
    image_key: str | None,
    label_key: str | None,
    inputs: str | None,
    select_from: str | None,
    preprocess: Preprocess,
) -> Dataset:
    """Data for ``verify`` and ``bench``, which need inputs and no labels: a run's own, or what ``--data`` names."""
    if run is not None and data is None:
        return open_run(run).dataset().bind(graph)
    return open_data(
        data,
        image_key=image_key,
        label_key=label_key,
        inputs=inputs,
        labels="none",
        train_from=None,
        select_from=select_from,
        test_from=None,
        fractions=None,
        limit=None,
        split_seed=0,
        augment="none",
        cache=None,
        preprocess=preprocess,
    ).bind(graph)
