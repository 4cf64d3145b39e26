"""From a head's description and a site to a stand-alone graph with initial parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from eexform.errors import GraphError, ModelError, OptionError, suggest
from eexform.heads import layers
from eexform.heads.blocks import HeadEmitter, linear, pool_space, shrink
from eexform.heads.spec import HeadSpec
from eexform.ir.arithmetic import node_macs
from eexform.ir.exits import Scores
from eexform.ir.graph import BATCH, Graph
from eexform.ir.types import TensorType

if TYPE_CHECKING:
    from eexform.ir.sites import Site

INPUT = "site"
OUTPUT = "scores"
GATE = "gate"
OPSET = 17
"""Heads use only operators whose form is the same in every opset from this one to 25: they fit any trunk."""

_POOLS = {"spatial": ("avg", "avg+max"), "sequence": ("cls", "mean", "avg+max"), "flat": ("avg",)}


def unsupported(spec: HeadSpec, site: Site) -> str | None:
    """Why a head like ``spec`` cannot be attached at ``site``; ``None`` where it can."""
    reason = layers.get(spec.layer).supports(site)
    if reason is not None:
        return reason
    pools = _POOLS[site.kind]
    if spec.pool not in pools:
        return f"a {site.kind} site ({site.value!r}) has no pooling {spec.pool!r}: choose from {', '.join(pools)}"
    if site.kind != "spatial" and spec.stride > 1:
        return f"a {site.kind} site ({site.value!r}) has no space to reduce by {spec.stride}"
    if site.kind == "spatial" and not 2 <= len(site.shape) <= 4:
        return f"{site.value!r} has {len(site.shape) - 1} spatial axes: heads know one to three"
    return None


def head_graph(
    spec: HeadSpec, site: Site, *, num_classes: int, scores: Scores = "logits", seed: int = 0, opset: int = OPSET
) -> Graph:
    """The head as a graph of its own.

    Input ``site``, [N, ...site.shape] float32; output ``scores``, [N, num_classes]. Parameters are called
    ``layer<i>.<part>.<weight|bias|...>`` and ``classifier.<weight|bias>``; convolutions start from He's normal
    distribution, batch normalisation from the identity.

    With a gate there is a second output, ``gate``, [N] float32 in [0, 1]: ``sigmoid(w . [features, s1, s2] + b)`` of
    the features that the classifier reads and its two highest logits, with the parameters ``gate.<weight|bias>``. It
    starts as ``sigmoid(s1 - s2)``; all other parameters start as without it.

    The stride of ``spec`` is spent on the layers first, two each from the first one on; what is left is average pooling
    in front of them. At flat sites the pooling of ``spec`` has no effect.

    Args:
        spec: shape of the head.
        site: where it will be attached.
        num_classes: classes of the trunk.
        scores: ``probabilities`` adds a softmax, so that all exits speak alike.
        seed: of the initial weights; equal seeds give equal weights.
        opset: of the graph; 17 or newer.

    Raises:
        OptionError: the head does not fit the site; the message says why.
    """
    return _build(spec, site, num_classes, scores, np.random.default_rng(seed), opset)


def head_macs(spec: HeadSpec, site: Site, *, num_classes: int) -> int:
    """Multiply-accumulates of the head for one sample.

    Raises:
        OptionError: the head does not fit the site.
        GraphError: the site's spatial size is not known.
    """
    graph = _build(spec, site, num_classes, "logits", None, OPSET)
    types = {
        tensor.name: TensorType(np.dtype(np.float32), tuple(tensor.shape))
        for tensor in graph.tensors.values()
        if tensor.shape is not None
    }
    return sum(node_macs(node, types) or 0 for node in graph.nodes)


def with_parameters(graph: Graph, arrays: Mapping[str, np.ndarray]) -> Graph:
    """A copy of ``graph`` with new values for some of its parameters.

    Args:
        graph: any graph; it is not changed.
        arrays: by parameter name; shapes must be the old ones.

    Raises:
        GraphError: no such parameter, or another shape.
        ModelError: NaN or infinite values.
    """
    draft = graph.copy()
    for name, array in arrays.items():
        constant = draft.constants.get(name)
        if constant is None:
            raise GraphError(f"the graph has no parameter {name!r}: {suggest(name, draft.constants)}")
        if tuple(array.shape) != tuple(constant.shape):
            raise GraphError(
                f"parameter {name!r}: expected shape {list(constant.shape)}, found {list(array.shape)}; "
                "were the values trained for another head?"
            )
        values = np.ascontiguousarray(array, dtype=constant.dtype).reshape(array.shape)
        if not np.isfinite(values).all():
            raise ModelError(
                f"parameter {name!r} holds NaN or infinite values; training diverged or the file is damaged"
            )
        constant.values = values
    return draft


def _build(
    spec: HeadSpec, site: Site, num_classes: int, scores: Scores, rng: np.random.Generator | None, opset: int
) -> Graph:
    reason = unsupported(spec, site)
    if reason is not None:
        raise OptionError(f"head {spec}: {reason}")
    if num_classes < 2:
        raise OptionError(f"head {spec}: a classifier needs at least 2 classes, found {num_classes}")
    source = gs.Variable(INPUT, dtype=np.dtype(np.float32), shape=[BATCH, *site.shape])
    draft = gs.Graph(inputs=[source], outputs=[], name="head", opset=opset)
    emitter = HeadEmitter(draft, rng)
    emitter.unique(OUTPUT)

    layer = layers.get(spec.layer)
    value, channels = _channels_first(emitter, source, site), site.channels
    halvings = spec.stride.bit_length() - 1
    in_layers = min(halvings, spec.depth) if layer.spatial else 0
    if site.kind == "spatial":
        value = shrink(emitter, value, 2 ** (halvings - in_layers))
    if layer.spatial:
        for place in range(spec.depth):
            scope = emitter.scoped(f"layer{place}.")
            # half as many channels in front of each further stride, as in any network that trades space for channels
            width = max(1, spec.width >> max(0, in_layers - 1 - place))
            value, channels = layer.emit(scope, value, channels, width, 2 if place < in_layers else 1)
    value, channels = _pooled(emitter, value, channels, spec, site)
    if not layer.spatial:
        for place in range(spec.depth):
            value, channels = layer.emit(emitter.scoped(f"layer{place}."), value, channels, spec.width, 1)
    features = value
    logits = value = linear(emitter, value, channels, num_classes, name="classifier", gain=1.0)
    if scores == "probabilities":
        value = emitter.node("Softmax", value, name="softmax", shape=value.shape, axis=1)
    value.name = OUTPUT
    draft.outputs = [value]
    if spec.gate:
        draft.outputs.append(_gate(emitter, features, channels, logits))
    return Graph(draft, scores=scores)


def _gate(emitter: HeadEmitter, features: gs.Variable, channels: int, logits: gs.Variable) -> gs.Variable:
    """How sure the head is, [N] in [0, 1], from the [N, channels] that its classifier reads and its two best scores."""
    rows = features.shape[0]
    top, _ = emitter.nodes(
        "TopK", [logits, emitter.constant("gate.k", [2])], 2, name="gate.top", axis=1, largest=1, sorted=1
    )
    seen = emitter.node("Concat", features, top, name="gate.seen", shape=[rows, channels + 2], axis=1)
    # whether an answer is right is not linear in what the classifier reads, but the lead over the second best tells
    # most of it: the gate begins with that and learns to correct it
    start = np.zeros((1, channels + 2), np.float32)
    start[0, -2:] = 1.0, -1.0
    weight, bias = emitter.constant(f"{GATE}.weight", start), emitter.filled(f"{GATE}.bias", 1, 0.0)
    odds = emitter.node("Gemm", seen, weight, bias, name=GATE, shape=[rows, 1], transB=1)
    sure = emitter.node(
        "Sigmoid", emitter.squeeze(odds, [1], name="gate.flat", shape=[rows]), name="gate.sigmoid", shape=[rows]
    )
    sure.name = GATE
    return sure


def _channels_first(emitter: HeadEmitter, value: gs.Variable, site: Site) -> gs.Variable:
    """[N, C, ...space]: channels behind the batch, whatever the layout of a spatial site."""
    rank = len(site.shape) + 1
    axis = site.channel_axis % rank
    if axis == 1 or site.kind != "spatial":  # the class token is taken before anything moves: see _pooled
        return value
    order = [0, axis, *(other for other in range(1, rank) if other != axis)]
    shape = [value.shape[place] for place in order]
    return emitter.node("Transpose", value, name="channels_first", shape=shape, perm=order)


def _pooled(
    emitter: HeadEmitter, value: gs.Variable, channels: int, spec: HeadSpec, site: Site
) -> tuple[gs.Variable, int]:
    """[N, features] from what the spatial layers (if any) left."""
    if site.kind == "flat":
        return value, channels
    if site.kind == "sequence":
        if site.channel_axis % 3 != 2:
            raise OptionError(f"head {spec}: {site.value!r}: a sequence site is [N, tokens, channels]")
        if spec.pool == "cls":
            first = emitter.constant("pool.first", np.int64(0))
            return emitter.node("Gather", value, first, name="pool.cls", shape=[BATCH, channels], axis=1), channels
        shape = [value.shape[0], value.shape[2], value.shape[1]]
        value = emitter.node("Transpose", value, name="channels_first", shape=shape, perm=[0, 2, 1])
    return pool_space(emitter, value, channels, spec.pool)
