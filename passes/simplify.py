"""Let onnxslim fold constants, fuse operators and drop what is redundant."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from eexform.backends import ort
from eexform.errors import GraphError, PassError, need
from eexform.frontends.names import constants_to_initialisers, tidy
from eexform.ir.checks import check
from eexform.ir.graph import BATCH, Graph
from eexform.ir.serialize import every_constant, to_model
from eexform.passes._contract import Pass, PassContext, PassResult, Skip
from eexform.passes._exits import refresh_exits
from eexform.tunables import parameter

_PROBE = 3  # samples; not 1, so that a batch of 1 baked in is noticed


@dataclass(frozen=True)
class Simplify(Pass):
    """Simplify with onnxslim: constant folding, operator fusion, removal of redundant nodes.

    Sites of exits and every output are kept. The result is run beside the original on random inputs and refused where
    the scores differ.
    """

    name: ClassVar[str] = "simplify"
    preserves_outputs: ClassVar[bool] = True

    compare: bool = parameter(default=True, help="run original and result side by side and compare their outputs")

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        slim = _slimmed(graph)
        if slim.digest == graph.digest:
            return PassResult(graph, changed=False, skipped=(Skip("graph", "onnxslim found nothing to simplify"),))
        skipped = _compare(graph, slim) if self.compare else ()
        return PassResult(slim, True, skipped, (f"{len(graph.nodes)} nodes became {len(slim.nodes)}",))


def _slimmed(graph: Graph) -> Graph:
    """What onnxslim makes of ``graph``; the sites of exits are outputs meanwhile, so that they survive."""
    tapped = graph.copy().gs
    tensors = {tensor.name: tensor for node in tapped.nodes for tensor in node.outputs}
    sites = [name for name in dict.fromkeys(item.site for item in graph.exits) if name not in graph.outputs]
    tapped.outputs = [*tapped.outputs, *(tensors[name] for name in sites)]
    model = _slim(to_model(Graph(tapped, scores=graph.scores)))
    draft = gs.import_onnx(model)
    draft.doc_string = graph.gs.doc_string
    made = {tensor.name: tensor for node in draft.nodes for tensor in node.outputs}
    lost = [name for name in (*graph.outputs, *sites) if name not in made]
    need(not lost, f"onnxslim lost the values {lost[:3]}; leave the pass out for this model")
    need(
        [tensor.name for tensor in draft.inputs] == list(graph.inputs),
        f"onnxslim changed the inputs to {[tensor.name for tensor in draft.inputs]}; leave the pass out for this model",
    )
    draft.outputs = [made[name] for name in graph.outputs]
    for body in (draft, *draft.subgraphs(recursive=True)):
        constants_to_initialisers(body)
    tidy(draft)
    for constant in every_constant(draft):
        if isinstance(constant._values, LazyValues) and constant._values.dtype != onnx.TensorProto.STRING:
            constant.values = constant.values  # from the message to an array of its own
    for tensor, before in zip((*draft.inputs, *draft.outputs), (*graph.gs.inputs, *graph.gs.outputs), strict=True):
        tensor.dtype, tensor.shape = before.dtype, before.shape
    slim = refresh_exits(graph, graph.replace(draft))
    try:
        check(slim)
    except GraphError as error:
        raise PassError(f"onnxslim broke the graph: {error}; leave the pass out for this model") from error
    return slim


def _slim(model: onnx.ModelProto) -> onnx.ModelProto:
    """onnxslim on a model in memory, without its messages and without its change to onnxruntime's log level."""
    import onnxslim

    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return onnxslim.slim(model)
    except Exception as error:  # whatever a third party's optimiser stumbles over
        raise PassError(f"onnxslim failed: {type(error).__name__}: {error}; leave the pass out") from error


def _compare(graph: Graph, slim: Graph) -> tuple[Skip, ...]:
    """Run both on the same random inputs.

    Raises:
        PassError: an output differs by more than rounding.
    """
    feeds = _feeds(graph)
    if feeds is None:
        return (Skip("comparison", "an input has a dimension without a size, so nothing could be fed to it"),)
    expected = ort.run(ort.session(graph), feeds)
    found = ort.run(ort.session(slim), feeds)
    for name, values in expected.items():
        # sums of many terms in another order: errors grow with the largest score, not with each one
        limit = 1e-4 + 1e-3 * float(np.abs(values).max(initial=0.0))
        same = values.shape == found[name].shape
        worst = float(np.abs(values - found[name]).max(initial=0.0)) if same else float("inf")
        need(
            worst <= limit or not np.isfinite(values).all(),
            f"onnxslim changed the network: output {name!r} differs by {worst:.3g} (allowed {limit:.3g}); "
            "leave the pass out for this model",
        )
    return ()


def _feeds(graph: Graph) -> dict[str, np.ndarray] | None:
    """Random inputs for a few samples: normal floats, and whole numbers 0 and 1 (valid in any vocabulary or mask)."""
    rng = np.random.default_rng(0)
    feeds = {}
    for name in graph.inputs:
        known = graph.types[name]
        dims = [_PROBE if dim == BATCH else dim for dim in known.shape or (None,)]
        shape = [dim for dim in dims if isinstance(dim, int)]
        if known.dtype is None or len(shape) < len(dims):
            return None
        if np.issubdtype(known.dtype, np.floating):
            feeds[name] = rng.standard_normal(shape).astype(known.dtype)
        else:
            feeds[name] = rng.integers(0, 2, shape).astype(known.dtype)
    return feeds
