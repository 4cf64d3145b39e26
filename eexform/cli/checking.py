"""Commands about an exported network: verify, bench."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from eexform.cli import options
from eexform.cli.output import errors, show
from eexform.cli.progress import Bars
from eexform.errors import ModelError, OptionError
from eexform.ir.graph import Graph
from eexform.ir.serialize import save
from eexform.progress import Task
from eexform.report import tables
from eexform.search.run import open_run
from eexform.verification.bench import bench as time_files
from eexform.verification.verify import verify as check_file


def verify(
    exported: Annotated[Path, typer.Argument(help="An exported file, or a folder of stages.", metavar="EXPORTED")],
    against: Annotated[
        str,
        typer.Option(
            help="The model that the exits were added to: an .onnx file, or package.module:factory.", metavar="MODEL"
        ),
    ],
    samples: Annotated[int, typer.Option(help="Samples to run at most.", metavar="N", min=1)] = 256,
    threads: options.Threads = 1,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    run: options.RunData = None,
    data: options.Data = None,
    split: options.Split = "test",
    image_key: options.ImageKey = None,
    label_key: options.LabelKey = None,
    inputs: options.Inputs = None,
    select_from: options.SelectFrom = None,
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
    """Check an exported network against the simulator, sample by sample, and prove that it skips work.

    Exit code 0: every check holds; 1: one failed; 2: it could not be checked.
    """
    graph = options.load_model(against, scores, output, shape, weights, examples)
    dataset = options.check_data(
        graph,
        run,
        data,
        image_key=image_key,
        label_key=label_key,
        inputs=inputs,
        select_from=select_from,
        colour=colour,
        resize=resize,
        crop=crop,
        layout=layout,
        model_layout=model_layout,
        scale=scale,
        mean=mean,
        std=std,
        preset=preset,
    )
    with ExitStack() as stack:
        bars = Bars(errors, quiet=quiet)
        tasks: list[Task] = []

        def report(name: str, made: int, total: int) -> None:
            if not tasks:
                tasks.append(stack.enter_context(bars.task("verifying", total)))
            tasks[0].advance(1 if made else 0, name)

        arrays = None if run is None else open_run(run).context().arrays
        found = check_file(
            exported, graph, dataset, samples=samples, split=split, threads=threads, progress=report, arrays=arrays
        )
        tasks[0].advance(1, f"{len(found.checks)} checks")
    show(found.to_json(), as_json, tables.verification)
    if not found.ok:
        raise typer.Exit(1)


def bench(
    exported: Annotated[list[Path], typer.Argument(help="Exported files or folders of stages.", metavar="FILE...")],
    vs: Annotated[
        list[str] | None,
        typer.Option(
            help="What to compare with, the original model first: .onnx files, or once package.module:factory. "
            "Repeatable.",
            metavar="MODEL",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Batch size. Repeatable; default 1 and 32.", metavar="N", min=1)
    ] = None,
    threads: options.Threads = 1,
    samples: Annotated[int, typer.Option(help="Samples to stream at most.", metavar="N", min=1)] = 512,
    repeats: Annotated[
        int,
        typer.Option(
            help="Walks through the samples; between 30 and 2000 batches are timed in any case.", metavar="N", min=1
        ),
    ] = 3,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    run: options.RunData = None,
    data: options.Data = None,
    split: options.Split = "test",
    image_key: options.ImageKey = None,
    label_key: options.LabelKey = None,
    inputs: options.Inputs = None,
    select_from: options.SelectFrom = None,
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
    """Time networks side by side in onnxruntime, on the same samples in their real order."""
    modules = [text for text in vs or () if options.names_module(text)]
    if len(modules) > 1:
        raise OptionError(f"--vs: one PyTorch module at most (--weights and --input are its own), not {len(modules)}")
    if not modules and (weights or examples):
        raise OptionError("--weights and --input go with --vs package.module:factory")
    for file in (*exported, *(Path(text) for text in vs or () if text not in modules)):
        if not file.exists():
            raise ModelError(f"{file}: no such file")
    module = options.load_model(modules[0], scores, output, shape, weights, examples) if modules else None
    graph = module if module is not None else _inputs_of(vs, exported[0], run, scores, output, shape)
    dataset = options.check_data(
        graph,
        run,
        data,
        image_key=image_key,
        label_key=label_key,
        inputs=inputs,
        select_from=select_from,
        colour=colour,
        resize=resize,
        crop=crop,
        layout=layout,
        model_layout=model_layout,
        scale=scale,
        mean=mean,
        std=std,
        preset=preset,
    )
    feeds = dataset.sample_feeds(split, min(samples, dataset.size(split)))
    sizes = list(dict.fromkeys(batch or [1, 32]))
    bars = Bars(errors, quiet=quiet)
    done: dict[str, int] = {}
    with TemporaryDirectory() as scratch, bars.task("timing", 100 * len(sizes)) as task:
        written = {text: str(Path(scratch) / "module.onnx") for text in modules}
        if module is not None:
            save(module, written[modules[0]])
        files = [*map(str, exported), *(written.get(text, text) for text in vs or ())]

        def report(size: str, finished: int, total: int) -> None:
            share = 100 * finished // max(1, total)
            task.advance(share - done.get(size, 0), size)
            done[size] = share

        timings = time_files(files, feeds, batches=sizes, threads=threads, repeats=repeats, progress=report)
        task.advance(100 * len(sizes) - sum(done.values()))
    names = {file: text for text, file in written.items()}
    timings = replace(
        timings, results=tuple(replace(one, file=names.get(one.file, one.file)) for one in timings.results)
    )
    show(timings.to_json(), as_json, lambda plain: tables.timings(plain, str(vs[0]) if vs else None))


def _inputs_of(
    vs: list[str] | None,
    first: Path,
    run: Path | None,
    scores: str | None,
    output: str | None,
    shape: list[str] | None,
) -> Graph:
    """A model that says what the inputs are: an exported network no longer tells which of its values are what."""
    if vs:
        return options.load_model(vs[0], scores, output, shape)
    if run is not None:
        return open_run(run).graph
    if first.is_dir():
        raise OptionError(f"{first}: the inputs of stages cannot be told; give the original model with --vs, or --run")
    try:
        return options.load_model(str(first), scores, output, shape)
    except ModelError as error:
        raise OptionError(f"{error}; give the original model with --vs, or --run") from error
