"""Commands about an exported network: verify, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eexform.cli import options
from eexform.cli.output import errors, show
from eexform.cli.progress import Bars
from eexform.data import Preprocess
from eexform.errors import OptionError
from eexform.frontends.onnx import load
from eexform.report import tables
from eexform.verification.bench import bench as time_files
from eexform.verification.verify import verify as check_file


def verify(
    exported: Annotated[Path, typer.Argument(help="An exported file, or a folder of stages.", metavar="EXPORTED")],
    against: Annotated[Path, typer.Option(help="The original model.", metavar="MODEL.onnx")],
    run: options.RunData = None,
    data: options.Data = None,
    samples: Annotated[int, typer.Option(help="How many samples to run.")] = 256,
    split: Annotated[str, typer.Option(help="Split of the data to take them from.")] = "test",
    threads: Annotated[int, typer.Option(help="Of onnxruntime.")] = 1,
    image_key: options.ImageKey = None,
    label_key: options.LabelKey = None,
    inputs: options.Inputs = None,
    select_from: options.SelectFrom = None,
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
    """Check an exported network against the simulator, sample by sample, and prove that it skips work."""
    graph = options.load_model(against, scores, output, shape)
    preprocess = Preprocess.parse(
        preset=preset, layout=layout, model_layout=model_layout, scale=scale, mean=mean, std=std, resize=resize, crop=crop,
        colour=colour,
    )
    dataset = options.check_data(
        graph, run, data, image_key=image_key, label_key=label_key, inputs=inputs, select_from=select_from, preprocess=preprocess
    )
    with errors.status("verifying") as status:
        report = check_file(
            exported,
            graph,
            dataset,
            samples=samples,
            split=split,
            threads=threads,
            progress=None if quiet else lambda name: status.update(f"verifying: {name}"),
        )
    show(report.to_json(), as_json, tables.verification)
    if not report.ok:
        raise typer.Exit(1)


def bench(
    exported: Annotated[list[Path], typer.Argument(help="Exported files or folders of stages.", metavar="FILE...")],
    vs: Annotated[list[Path] | None, typer.Option(help="What to compare with; repeatable.", metavar="MODEL.onnx")] = None,
    run: options.RunData = None,
    data: options.Data = None,
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; repeatable (default 1 and 32).")] = None,
    threads: Annotated[int, typer.Option(help="Of onnxruntime.")] = 1,
    samples: Annotated[int, typer.Option(help="Samples of the data to stream.")] = 512,
    split: Annotated[str, typer.Option(help="Split of the data to take them from.")] = "test",
    repeats: Annotated[int, typer.Option(help="Walks through the samples.")] = 3,
    image_key: options.ImageKey = None,
    label_key: options.LabelKey = None,
    inputs: options.Inputs = None,
    select_from: options.SelectFrom = None,
    preset: options.Preset = None,
    layout: options.Layout = None,
    model_layout: options.ModelLayout = None,
    scale: options.Scale = None,
    mean: options.Mean = None,
    std: options.Std = None,
    resize: options.Resize = None,
    crop: options.Crop = None,
    colour: options.Colour = None,
    shape: options.Shape = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Time networks side by side in onnxruntime, on the same samples in their real order."""
    reference = (vs or exported)[0]
    if reference.is_dir():
        raise OptionError("bench needs one .onnx file to read the inputs from: give the original model with --vs")
    graph = options.load_model(reference, None, None, shape) if vs else load(reference)
    preprocess = Preprocess.parse(
        preset=preset, layout=layout, model_layout=model_layout, scale=scale, mean=mean, std=std, resize=resize, crop=crop,
        colour=colour,
    )
    dataset = options.check_data(
        graph, run, data, image_key=image_key, label_key=label_key, inputs=inputs, select_from=select_from, preprocess=preprocess
    )
    feeds = dataset.sample_feeds(split, min(samples, dataset.size(split)))
    files = [*exported, *(vs or ())]
    sizes = batch or [1, 32]
    bars = Bars(errors, quiet=quiet)
    done: dict[int, int] = {}
    with bars.task("timing", 100 * len(sizes)) as task:

        def report(size: int, finished: int, total: int) -> None:
            share = 100 * finished // max(1, total)
            task.advance(share - done.get(size, 0), f"batch {size}")
            done[size] = share

        timings = time_files(files, feeds, batches=sizes, threads=threads, repeats=repeats, progress=report)
    show(timings.to_json(), as_json, lambda plain: tables.timings(plain, str(vs[0]) if vs else None))
