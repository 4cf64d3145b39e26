"""How much memory one step of head training takes: a bound that does not depend on the size of the data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eexform.heads import HeadSpec, head_graph
from eexform.ir.graph import BATCH, Graph
from eexform.ir.inference import split_dim
from eexform.ir.sites import Site
from eexform.ir.types import TensorType

INPUTS = 6
"""Batches of inputs at a time: under preparation (twice: raw and ready), waiting, in the trunk, in the heads, and the
one before it until its place is taken."""

VALUES = 3
"""Batches of site values at a time: made by the trunk, read by the heads, and the one before it."""

PARAMETERS = 7
"""Copies of a head's parameters: their values, gradients, the optimiser's two moments, average, best, and a checkpoint
being written."""


def step_memory(
    graph: Graph, sites: Sequence[Site], entries: Sequence[tuple[int, Site, HeadSpec]], batch_size: int
) -> int:
    """Bound in bytes on what training holds at a time, beside the trunk's weights and the programs themselves.

    Counted are the batches under way with the trunk's values at the sites, the trunk's own activations where they are
    largest, every value inside every head twice (it is kept for the backward pass, where as much comes again), and the
    heads' parameters with what the optimiser keeps of them. Symbolic dimensions other than the batch count as 1.

    Args:
        graph: the trunk.
        sites: in the order in which a sample meets them.
        entries: ``(order, site, spec)`` of every head that is trained.
        batch_size: samples per step.
    """
    types = graph.types
    tapped = {site.value for _, site, _ in entries} | {graph.final}
    inputs = sum(_bytes(types[name]) for name in graph.inputs)
    values = sum(_bytes(types[name]) for name in tapped)
    per_sample = INPUTS * inputs + VALUES * values + _widest(graph, tapped)
    parameters = 0
    known: dict[tuple[object, ...], tuple[int, int]] = {}
    for _, site, spec in entries:
        key = (spec, site.kind, site.shape)
        if key not in known:
            known[key] = _head(spec, site, graph.num_classes)
        activations, weights = known[key]
        per_sample += 2 * activations
        parameters += PARAMETERS * weights
    return batch_size * per_sample + parameters


def _head(spec: HeadSpec, site: Site, classes: int) -> tuple[int, int]:
    """Bytes of all values inside a head for one sample, and of its parameters."""
    head = head_graph(spec, site, num_classes=classes)
    made = [tensor.name for node in head.nodes for tensor in node.outputs]
    return sum(_bytes(head.types[name]) for name in made), sum(array.nbytes for array in head.parameters().values())


def _widest(graph: Graph, kept: set[str]) -> int:
    """The largest sum, for one sample, of the trunk's values that some later node still needs; ``kept`` ones stay."""
    order = {name: place for place, name in enumerate(graph.flow.topological)}
    last: dict[str, int] = {}
    for node in graph.nodes:
        for tensor in node.inputs:
            last[tensor.name] = max(last.get(tensor.name, 0), order[node.name])
    ending: dict[int, list[str]] = {}
    for name, place in last.items():
        ending.setdefault(place, []).append(name)
    types: Mapping[str, TensorType] = graph.types
    nodes = graph.flow.nodes
    held: set[str] = set()
    total = peak = 0
    for place, name in enumerate(graph.flow.topological):
        made = [tensor.name for tensor in nodes[name].outputs if tensor.name in types]
        held.update(made)
        total += sum(_bytes(types[value]) for value in made)
        peak = max(peak, total)
        for value in ending.get(place, ()):
            if value in held and value not in kept:
                held.remove(value)
                total -= _bytes(types[value])
    return peak


def _bytes(known: TensorType) -> int:
    """Size of a value for one sample; what does not grow with the batch, or has no known shape, counts as nothing."""
    if known.shape is None or known.dtype is None:
        return 0
    size, grows = known.dtype.itemsize, False
    for dim in known.shape:
        factor, symbol = split_dim(str(dim)) if isinstance(dim, str) else (dim or 1, "")
        size, grows = size * factor, grows or symbol == BATCH
    return size if grows else 0
