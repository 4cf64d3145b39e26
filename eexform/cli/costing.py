"""Commands about what a network costs: cost, costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from eexform import cost_models
from eexform.cli import options
from eexform.cli.output import errors, show
from eexform.cli.progress import Bars
from eexform.cost_models._device import listing as devices
from eexform.cost_models._device import load_device
from eexform.errors import OptionError, suggest
from eexform.report import tables, tables_costs
from eexform.report.cost_choice import chosen, divided
from eexform.report.costs import SITES
from eexform.report.costs import cost as price
from eexform.search.run import open_run


def cost(
    model: Annotated[
        str | None,
        typer.Argument(
            help="The classifier: an .onnx file, or package.module:factory for a PyTorch module; not with --run.",
            metavar="MODEL",
        ),
    ] = None,
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="A cost model with its settings, such as roofline:device=rpi5 (see `eexform costs`). Repeatable. "
            "Default: macs.",
            metavar="COST",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Device of every cost model that has that setting and is not given one: a name (see `eexform costs "
            "--device`) or a file.",
            metavar="DEVICE",
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Cost models side by side, such as macs,roofline,latency_ort:threads=1. Where one is measured, the "
            "others are judged by it.",
            metavar="COST,COST",
        ),
    ] = None,
    top: Annotated[
        int, typer.Option(help="Dearest nodes to show per cost model; 0: none.", metavar="N", min=0)
    ] = tables_costs.TOP,
    sites: Annotated[
        int,
        typer.Option(help="Places at most that a model without exits is divided at.", metavar="N", min=0),
    ] = SITES,
    run: Annotated[
        Path | None, typer.Option(help="Price a plan of this run in place of a model.", metavar="RUN")
    ] = None,
    pick: Annotated[
        str | None,
        typer.Option(help="Which plan of --run, as in `eexform export`. Default: knee.", metavar="PLAN"),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    scores: options.Scores = None,
    output: options.Output = None,
    shape: options.Shape = None,
    weights: options.Weights = None,
    examples: options.Examples = None,
) -> None:
    """Show what a model or a plan costs: its dearest nodes, each stretch and exit, what limits it; models side by side.

    Static cost models are computed, measured ones (latency_ort) are timed on this machine.
    """
    named, listed = list(models or ()), divided(compare or "")
    if not named and not listed:
        named = ["macs"]
    chosen([*named, *listed], device)  # what is wrong with them is said before a model is loaded or anything timed
    if len(listed) == 1:
        raise OptionError(f"--compare {compare}: there is nothing to compare it with; name two cost models at least")
    what: Any
    if run is None:
        if model is None:
            raise OptionError("name a model, or a run with --run RUN and a plan of it with --pick PLAN")
        if pick is not None:
            raise OptionError("--pick chooses a plan of a run: give --run RUN")
        what = options.load_model(model, scores, output, shape, weights, examples)
    else:
        if model is not None:
            raise OptionError(f"{model} and --run {run}: a plan brings its own network; leave one of them out")
        about = {"scores": scores, "output": output, "shape": shape, "weights": weights, "input": examples}
        said = [option for option, value in about.items() if value]
        if said:
            raise OptionError(f"--{said[0]} and --run {run}: a plan brings its own network; leave one of them out")
        what = open_run(run).front.pick(pick or "knee")
    report = price(
        what,
        named,
        compare=listed,
        device=device,
        sites=sites,
        progress=Bars(errors, quiet=quiet),
    )
    show(report.to_json(), as_json, lambda plain: tables_costs.cost(plain, top))


def costs(
    name: Annotated[
        str | None,
        typer.Argument(help="With --device: the device to show, with the source of every figure.", metavar="NAME"),
    ] = None,
    device: Annotated[
        bool, typer.Option("--device", help="List the bundled devices instead, or show the one named.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """List the registered cost models with their units and settings, or with --device the bundled devices."""
    if device:
        if name is None:
            show({"devices": devices()}, as_json, tables_costs.devices)
        else:
            show({"device": load_device(name).to_json()}, as_json, tables_costs.device)
        return
    listing = cost_models.listing()
    if name is not None:
        known = [entry["name"] for entry in listing]
        if name not in known:
            raise OptionError(f"no cost model is called {name!r}: {suggest(name, known)}; devices: --device {name}")
        listing = [entry for entry in listing if entry["name"] == name]
    show({"costs": listing}, as_json, tables.costs)
