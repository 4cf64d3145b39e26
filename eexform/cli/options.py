"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from eexform.data import Dataset, Preprocess, open_dataset, open_source
from eexform.errors import OptionError
from eexform.frontends.onnx import load
from eexform.ir.graph import Graph
from eexform.references import is_reference
from eexform.search.limits import Limits, fitting
from eexform.search.run import open_run

Json = Annotated[bool, typer.Option("--json", help="Print JSON (docs/json.md) instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress on standard error.")]
Model = Annotated[
    str,
    typer.Argument(
        help="The trained classifier: an .onnx file, or package.module:factory for a PyTorch module.", metavar="MODEL"
    ),
]
Threads = Annotated[int, typer.Option(help="Threads of onnxruntime.", metavar="N", min=1)]

_MODEL = "What the model file does not say"
Scores = Annotated[
    str | None,
    typer.Option(
        help="What the output holds: logits or probabilities. Default: seen from the last operator.",
        metavar="KIND",
        rich_help_panel=_MODEL,
    ),
]
Output = Annotated[
    str | None,
    typer.Option(
        help="The output with the class scores, where there are several.", metavar="NAME", rich_help_panel=_MODEL
    ),
]
Shape = Annotated[
    list[str] | None,
    typer.Option(
        "--shape", help="Shape of an input: NAME=N,3,32,32. Repeatable.", metavar="NAME=DIMS", rich_help_panel=_MODEL
    ),
]

_TORCH = "For a PyTorch module (package.module:factory)"
Weights = Annotated[
    Path | None,
    typer.Option(help="Its state dict: .pt, .pth or .safetensors.", metavar="FILE", rich_help_panel=_TORCH),
]
Examples = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="What its forward takes, batch first: 1,3,32,32 or input_ids=1,128:int64. Repeatable.",
        metavar="[NAME=]DIMS[:TYPE]",
        rich_help_panel=_TORCH,
    ),
]

_DATA = "Data"
Data = Annotated[
    str | None,
    typer.Option(
        help="digits | FILE.npz | FOLDER with one folder per class | hf:FOLDER-OR-NAME | package.module:factory",
        metavar="DATA",
        rich_help_panel=_DATA,
    ),
]
ImageKey = Annotated[
    str | None, typer.Option(help="Column or array that holds the images.", metavar="NAME", rich_help_panel=_DATA)
]
LabelKey = Annotated[
    str | None, typer.Option(help="Column or array that holds the labels.", metavar="NAME", rich_help_panel=_DATA)
]
Inputs = Annotated[
    str | None,
    typer.Option(
        help="Which array feeds which input of the model: input_ids=ids,attention_mask=mask.",
        metavar="PAIRS",
        rich_help_panel=_DATA,
    ),
]
Labels = Annotated[
    str,
    typer.Option(
        help="given; or none: learn and judge by the model's own answers, accuracy is then agreement with it.",
        metavar="KIND",
        rich_help_panel=_DATA,
    ),
]
TrainFrom = Annotated[
    str | None, typer.Option(help="Part of the data that trains the heads.", metavar="PART", rich_help_panel=_DATA)
]
SelectFrom = Annotated[
    str | None,
    typer.Option(
        help="Part that the model was NOT trained on; calibrate, select and test are drawn from it.",
        metavar="PART",
        rich_help_panel=_DATA,
    ),
]
TestFrom = Annotated[
    str | None, typer.Option(help="Part that is test as a whole.", metavar="PART", rich_help_panel=_DATA)
]
Fractions = Annotated[
    str | None,
    typer.Option(
        help="Shares of the splits that divide a part, in the order head-train, calibrate, select, test: four numbers "
        "for data with one part, the last three with --select-from, the middle two with --test-from as well.",
        metavar="SHARES",
        rich_help_panel=_DATA,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(help="Samples for head training at most.", metavar="N", min=1, rich_help_panel=_DATA),
]
SplitSeed = Annotated[int, typer.Option(help="Seed of the splits.", metavar="N", min=0, rich_help_panel=_DATA)]
Augment = Annotated[
    str,
    typer.Option(
        help="For head training: none, or any of flip,crop:4,cutout:8,jitter:0.2,mixup:0.4,cutmix:1.",
        metavar="LIST",
        rich_help_panel=_DATA,
    ),
]
Cache = Annotated[
    Path | None, typer.Option(help="Folder that keeps decoded images.", metavar="FOLDER", rich_help_panel=_DATA)
]
Split = Annotated[
    str,
    typer.Option(
        help="head_train, calibrate, select or test: which samples to take.", metavar="SPLIT", rich_help_panel=_DATA
    ),
]
RunData = Annotated[
    Path | None,
    typer.Option(
        "--run",
        help="Data, splits and preprocessing of this run; --data then only says where the samples are now.",
        metavar="RUN",
        rich_help_panel=_DATA,
    ),
]

_PRE = "Preprocessing (nothing is guessed; in this order)"
Colour = Annotated[str | None, typer.Option(help="Convert to rgb or grey.", metavar="KIND", rich_help_panel=_PRE)]
Resize = Annotated[
    str | None, typer.Option(help="HEIGHTxWIDTH, or the shorter edge.", metavar="SIZE", rich_help_panel=_PRE)
]
Crop = Annotated[
    str | None, typer.Option(help="Centre crop after resizing: HEIGHTxWIDTH.", metavar="SIZE", rich_help_panel=_PRE)
]
Layout = Annotated[
    str | None,
    typer.Option(
        help="Of the raw images, where the data does not say: nhwc or nchw.", metavar="AXES", rich_help_panel=_PRE
    ),
]
ModelLayout = Annotated[
    str | None, typer.Option(help="That the model takes: nhwc or nchw (default).", metavar="AXES", rich_help_panel=_PRE)
]
Scale = Annotated[
    str | None, typer.Option(help="Factor for raw values, e.g. 1/255.", metavar="X", rich_help_panel=_PRE)
]
Mean = Annotated[
    str | None,
    typer.Option(
        help="Subtracted after scaling: one number, or one per channel.", metavar="X,...", rich_help_panel=_PRE
    ),
]
Std = Annotated[str | None, typer.Option(help="Divisor after that, alike.", metavar="X,...", rich_help_panel=_PRE)]
Preset = Annotated[
    str | None,
    typer.Option(help="imagenet: scale 1/255, ImageNet's mean and std.", metavar="NAME", rich_help_panel=_PRE),
]

_LIMITS = "Limits of every plan"
MaxCost = Annotated[
    str | None,
    typer.Option(
        help="What the first --cost comes to: 0.7x of the original's, or a number (20M).",
        metavar="X",
        rich_help_panel=_LIMITS,
    ),
]
MaxWorst = Annotated[
    str | None, typer.Option(help="Cost of the dearest path, written alike.", metavar="X", rich_help_panel=_LIMITS)
]
MaxParams = Annotated[
    str | None, typer.Option(help="Parameters with heads, written alike.", metavar="X", rich_help_panel=_LIMITS)
]
MinAccuracy = Annotated[
    str | None,
    typer.Option(
        help="On select: -0.5 (points against the original model), or 0.91.", metavar="X", rich_help_panel=_LIMITS
    ),
]
MaxTerms = Annotated[
    list[str] | None,
    typer.Option(
        "--max",
        help="Any cost, written alike: peak_ram_bytes=256KiB, latency_ort@p95=1.2x. Repeatable.",
        metavar="TERM=X",
        rich_help_panel=_LIMITS,
    ),
]
Fits = Annotated[
    str | None,
    typer.Option(
        help="Peak memory and size within a device's RAM and flash (see `eexform costs --device`); settings of both "
        "cost models behind a colon: cortex-m7:dtype=int8.",
        metavar="DEVICE",
        rich_help_panel=_LIMITS,
    ),
]


def limits(
    max_cost: str | None,
    max_worst: str | None,
    max_params: str | None,
    min_accuracy: str | None,
    terms: list[str] | None,
    fits: str | None,
) -> Limits:
    """The limits that the options describe."""
    more = (*(terms or ()), *(fitting(fits) if fits is not None else ()))
    return Limits(max_cost, max_worst, max_params, min_accuracy, more)


def load_model(
    model: str,
    scores: str | None,
    output: str | None,
    shapes: list[str] | None,
    weights: Path | None = None,
    examples: list[str] | None = None,
) -> Graph:
    """The model, with what the options say about it."""
    if scores not in (None, "logits", "probabilities"):
        raise OptionError(f"--scores: {scores!r} is neither logits nor probabilities")
    if names_module(model):
        from eexform.frontends.torch import from_reference

        if shapes:
            raise OptionError(f"--shape is for ONNX files: {model} takes --input")
        return from_reference(model, weights=weights, inputs=examples or (), scores=scores, output=output)  # type: ignore[arg-type]
    for option, given in (("--weights", weights), ("--input", examples)):
        if given:
            raise OptionError(f"{option} is for PyTorch modules, package.module:factory; {model} is taken for a file")
    parsed = dict(_shape(text) for text in shapes or ())
    return load(model, scores=scores, output=output, input_shapes=parsed or None)  # type: ignore[arg-type]


def names_module(model: str) -> bool:
    """Whether the text names a PyTorch module; a file of that name comes first."""
    return is_reference(model) and not Path(model).exists()


def _shape(text: str) -> tuple[str, list[int | str]]:
    name, equals, dims = text.rpartition("=")
    parts = [dim.strip() for dim in dims.split(",")]
    if not equals or not name or not all(parts):
        raise OptionError(f"--shape: {text!r} is not of the form NAME=N,3,32,32")
    return name, [int(dim) if dim.lstrip("-").isdigit() else dim for dim in parts]


def check_target(out: Path, *, folder: bool) -> None:
    """Whether ``out`` can be what is about to be written, before any work is done."""
    if folder and out.exists() and not out.is_dir():
        raise OptionError(f"{out}: is a file; stages are written to a folder, give another --out")
    if not folder and out.is_dir():
        raise OptionError(f"{out}: is a folder; give --out the name of a file, such as {out / 'ee.onnx'}")


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
        raise OptionError("no data: give --data digits, FILE.npz, FOLDER, hf:FOLDER-OR-NAME or package.module:factory")
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


def check_data(graph: Graph, run: Path | None, data: str | None, **given: Any) -> Dataset:
    """Data for ``verify`` and ``bench``, which need inputs and no labels: a run's own, or what ``--data`` names.

    Args:
        graph: that the samples must fit.
        run: folder of a run.
        data: as in ``--data``.
        given: ``image_key``, ``label_key``, ``inputs``, ``select_from`` and the texts that make a :class:`Preprocess`.
    """
    if run is not None:
        said = [name for name, value in given.items() if value is not None]
        if said:
            raise OptionError(
                f"--{said[0].replace('_', '-')} does not go with --run, which brings its own splits and preprocessing; "
                "leave one of them out"
            )
        return open_run(run).dataset(data).bind(graph)
    if data is None:
        raise OptionError(
            "no samples to run: give --run RUN (the data of a search), or --data digits, FILE.npz, FOLDER, "
            "hf:FOLDER-OR-NAME or package.module:factory"
        )
    about = {key: given.pop(key) for key in ("image_key", "label_key", "inputs")}
    select_from = given.pop("select_from")
    source = open_source(data, **about)
    # of three parts or more only one matters here: all splits are drawn from it
    train_from = select_from if len(source.parts) > 2 else None
    preprocess = Preprocess.parse(**given)
    return open_dataset(
        source, preprocess=preprocess, labels="none", train_from=train_from, select_from=select_from
    ).bind(graph)
