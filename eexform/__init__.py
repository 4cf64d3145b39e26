"""eexform: a compiler for early exits.

import eexform as ee

graph = ee.load("model.onnx")
data = ee.open_dataset("data.npz", preprocess=ee.Preprocess(layout="nhwc", scale=1 / 255))
run = ee.search(graph, data, out="runs/r1")
run.front.knee().export("ee.onnx")
assert ee.verify("ee.onnx", graph, data.bind(graph)).ok
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from eexform._version import __version__

# Since 1.31 onnxruntime reports its use over the network from a thread that it starts on import. Nobody asked for that,
# and the thread can abort the process as it ends, after all work is done (seen: exit code -6 instead of 130). It looks
# at this variable once, before anything of it runs; who wants the reports sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from eexform.backends.export import export
    from eexform.backends.multi_exit import to_torch
    from eexform.backends.write_back import write_back
    from eexform.cost_models.calibrate import calibrate
    from eexform.data import Preprocess, load_dataset, open_dataset
    from eexform.errors import EexformError
    from eexform.frontends.door import load
    from eexform.frontends.onnx import from_model
    from eexform.heads import HeadSpec
    from eexform.ir.graph import Graph
    from eexform.ir.serialize import save
    from eexform.ir.sites import find_sites
    from eexform.passes import Recipe
    from eexform.report.apply import apply
    from eexform.report.costs import cost
    from eexform.report.inspect import inspect
    from eexform.report.pareto import pareto
    from eexform.report.quickstart import quickstart
    from eexform.runtime import StagedSession
    from eexform.search.driver import search
    from eexform.search.limits import Limits
    from eexform.search.objectives import Target
    from eexform.search.options import SearchOptions
    from eexform.search.retrain import train
    from eexform.search.run import Run, open_run
    from eexform.training.distill import distill
    from eexform.training.finetune_options import FinetuneOptions
    from eexform.training.options import TrainOptions
    from eexform.verification.bench import bench
    from eexform.verification.verify import verify

# Loaded when first used: `import eexform` stays light, and a deployment that only runs staged networks needs no torch.
_HOME = {
    "EexformError": "eexform.errors",
    "FinetuneOptions": "eexform.training.finetune_options",
    "Graph": "eexform.ir.graph",
    "HeadSpec": "eexform.heads",
    "Limits": "eexform.search.limits",
    "Preprocess": "eexform.data",
    "Recipe": "eexform.passes",
    "Run": "eexform.search.run",
    "SearchOptions": "eexform.search.options",
    "StagedSession": "eexform.runtime",
    "Target": "eexform.search.objectives",
    "TrainOptions": "eexform.training.options",
    "apply": "eexform.report.apply",
    "bench": "eexform.verification.bench",
    "calibrate": "eexform.cost_models.calibrate",
    "cost": "eexform.report.costs",
    "distill": "eexform.training.distill",
    "export": "eexform.backends.export",
    "find_sites": "eexform.ir.sites",
    "from_model": "eexform.frontends.onnx",
    "inspect": "eexform.report.inspect",
    "load": "eexform.frontends.door",
    "load_dataset": "eexform.data",
    "open_dataset": "eexform.data",
    "open_run": "eexform.search.run",
    "pareto": "eexform.report.pareto",
    "quickstart": "eexform.report.quickstart",
    "save": "eexform.ir.serialize",
    "search": "eexform.search.driver",
    "to_torch": "eexform.backends.multi_exit",
    "train": "eexform.search.retrain",
    "verify": "eexform.verification.verify",
    "write_back": "eexform.backends.write_back",
}

__all__ = [
    "EexformError",
    "FinetuneOptions",
    "Graph",
    "HeadSpec",
    "Limits",
    "Preprocess",
    "Recipe",
    "Run",
    "SearchOptions",
    "StagedSession",
    "Target",
    "TrainOptions",
    "__version__",
    "apply",
    "bench",
    "calibrate",
    "cost",
    "distill",
    "export",
    "find_sites",
    "from_model",
    "inspect",
    "load",
    "load_dataset",
    "open_dataset",
    "open_run",
    "pareto",
    "quickstart",
    "save",
    "search",
    "to_torch",
    "train",
    "verify",
    "write_back",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'eexform' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
