"""Lowering to one ONNX file with control flow: nested ``If``, one per exit, per sample inside a batch.

Level ``i`` runs block ``i`` and takes the confidence of exit ``i``. While any row is still undecided (not ``confidence
>= threshold``: NaN never leaves) the branch picks the undecided rows out of every live value (``Compress``), runs the
next level on them and scatters its results back into this level's. A level costs about a dozen operators on tiny
tensors, so even at batch 1 an exit costs little more than its head. Rules that onnxruntime teaches:

- Parameters used only inside a branch are initialisers of that branch, or they would be neither packed nor fused.
- A branch may not return an outer value as it is, and may not reuse an outer name: results go through fresh values.
- The rest is never run on zero rows (a ``Reshape`` to ``[0, -1]`` fails), hence the ``If`` around the picking.
- Symbols of dimensions differ from level to level: the rows of a branch are not those outside.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from eexform.backends import metadata, protos
from eexform.backends.blocks import split
from eexform.backends.confidence import emit_scored
from eexform.backends.rebatch import Names, Scope, bind_inputs
from eexform.errors import GraphError
from eexform.ir.graph import BATCH, Graph

EXIT_INDEX = "exit_index"
CONFIDENCE = "confidence"
THRESHOLDS = "thresholds"
MAX_EXITS = 25
"""Deeper nesting exceeds the depth (100 messages, three per level) that protobuf's readers accept."""

_COPY_BYTES = 1 << 20
"""A constant used at several levels is copied into each up to this size; larger ones are captured, unless a
convolution uses them, which onnxruntime only lays out for speed where the weights are initialisers of its own graph."""

_LAID_OUT = frozenset({"Conv", "ConvTranspose"})


@dataclass
class _Level:
    """One level while it is built.

    Attributes:
        scope: its nodes.
        scores: class scores of its classifier.
        confidence: of its classifier, one per row.
        stays: which rows are undecided here.
        where: their positions, [1, how many].
        anyone: whether there is one.
        fork: the ``If`` that holds the next level; its branches are attached last.
        leave: nodes of the branch taken when every row leaves here.
    """

    scope: Scope
    scores: gs.Variable
    confidence: gs.Variable
    stays: gs.Variable | None = None
    where: gs.Variable | None = None
    anyone: gs.Variable | None = None
    fork: gs.Node | None = None
    leave: gs.Graph | None = None


def lower_if(graph: Graph, *, thresholds_as_input: bool = False) -> onnx.ModelProto:
    """One model that computes only what each sample needs.

    Args:
        graph: a graph with exits.
        thresholds_as_input: add an input ``thresholds`` (float32, one per exit) instead of baking them in.

    Returns:
        A model with the outputs: class scores under the original output's name, ``exit_index`` (int64 [N]: 0..E-1, E
        for the final classifier) and ``confidence`` (float32 [N]).

    Raises:
        GraphError: no exits, more than :data:`MAX_EXITS`, or a value that cannot be recomputed for undecided rows.
    """
    blocks = split(graph)
    if len(graph.exits) > MAX_EXITS:
        raise GraphError(
            f"{len(graph.exits)} exits: the form 'if' nests one branch per exit, readers accept at most {MAX_EXITS}; "
            "use fewer exits, or the form 'stages'"
        )
    names = Names(graph, [graph.final, EXIT_INDEX, CONFIDENCE, THRESHOLDS])
    thresholds = gs.Variable(THRESHOLDS, np.float32, [len(graph.exits)]) if thresholds_as_input else None
    scope = Scope(graph, names)
    bind_inputs(scope)
    levels: list[_Level] = []
    for depth, block in enumerate(blocks):
        if depth:
            scope = _enter(depth, levels[-1], blocks[depth - 1].live, names)
        scope.add(block.nodes)
        level = _Level(scope, *emit_scored(scope, depth, block))
        if depth < len(graph.exits):
            _ask(level, depth, graph, thresholds)
        levels.append(level)
    inner = [_merge(levels, depth, names) for depth in reversed(range(len(graph.exits)))][::-1]
    body = _assemble(graph, levels, inner, names)
    if thresholds is not None:
        body.input.append(protos.value_info(THRESHOLDS, np.float32, [len(graph.exits)]))
    return protos.model(graph, body, metadata.build(graph, "if"))


# -- from the outermost level inwards ---------------------------------------------------------------------------------


def _ask(level: _Level, depth: int, graph: Graph, thresholds: gs.Variable | None) -> None:
    """Which rows stay at this exit, and whether any does."""
    emit = level.scope.emit.scoped(f"exit{depth}.")
    if thresholds is None:
        threshold: gs.Tensor = emit.constant("threshold", np.float32(graph.exits[depth].threshold))
    else:
        threshold = emit.node("Gather", thresholds, emit.constant("place", np.int64(depth)), name="threshold", axis=0)
    # not Less: that is false for NaN; and no minimum of the confidences: whether it sees a NaN is the runtime's choice
    leaves = emit.node("GreaterOrEqual", level.confidence, threshold, name="leaves", dtype=np.bool_)
    level.stays = emit.node("Not", leaves, name="stays")
    level.where = emit.node("NonZero", level.stays, name="where", dtype=np.int64)
    count = emit.node("Size", level.where, name="count")
    level.anyone = emit.node("Cast", count, name="anyone", dtype=np.bool_, to=int(onnx.TensorProto.BOOL))


def _enter(depth: int, above: _Level, live: tuple[str, ...], names: Names) -> Scope:
    """The scope of the next level, with the undecided rows of every live value."""
    source = above.scope.source
    scope = Scope(source, names, prefix=f"rows{depth}.", outer=above.scope)
    stays = _seen(above.stays)
    for value in live:
        outside = _seen(above.scope.resolve(value))
        scope.bind(value, scope.emit.node("Compress", outside, stays, name=value, axis=source.types[value].batch_axis))
    return scope


# -- from the innermost level outwards --------------------------------------------------------------------------------


def _merge(levels: list[_Level], depth: int, names: Names) -> tuple[gs.Variable, gs.Variable, gs.Variable]:
    """Close level ``depth``: the inner level's results go back to their rows, and an ``If`` chooses.

    Returns:
        What the inner branch yields: scores, exit index (relative to this level) and confidence.
    """
    level, below = levels[depth], levels[depth + 1]
    emit = below.scope.emit.scoped("merge.")
    places = emit.node("Transpose", _seen(level.where), name="places")  # [m, 1], the form that ScatterND wants
    then_scores = emit.node("ScatterND", _seen(level.scores), places, _result(below, 0), name="scores")
    then_index = emit.node("Cast", _seen(level.stays), name="passed", to=int(onnx.TensorProto.INT64))
    if below.fork is not None:
        # 0 where a row left here, 1 + what the inner levels counted where it went on
        counted = emit.node("Add", _result(below, 1), emit.constant("one", [1]), name="counted")
        then_index = emit.node("ScatterND", then_index, places, counted, name="index")
    then_confidence = emit.node("ScatterND", _seen(level.confidence), places, _result(below, 2), name="confidence")

    level.leave = gs.Graph(opset=level.scope.draft.opset)
    away = names.emitter(level.leave, f"leave{depth}.")
    away.node("Identity", _seen(level.scores), name="scores")
    away.node("Cast", _seen(level.stays), name="index", to=int(onnx.TensorProto.INT64))
    away.node("Identity", _seen(level.confidence), name="confidence")

    source = level.scope.source
    outer = level.scope.emit.scoped(f"exit{depth}.")
    kept = [outer.unique(name) for name in ("scores", EXIT_INDEX, CONFIDENCE)]
    results = [gs.Variable(name) for name in (kept if depth else (source.final, EXIT_INDEX, CONFIDENCE))]
    level.fork = gs.Node(op="If", name=outer.unique("If"), inputs=[level.anyone], outputs=results)
    level.scope.draft.nodes.append(level.fork)
    return then_scores, then_index, then_confidence


def _fork(level: _Level) -> gs.Node:
    assert level.fork is not None
    return level.fork


def _result(level: _Level, place: int) -> gs.Variable:
    if level.fork is not None:
        return level.fork.outputs[place]
    return (level.scores, None, level.confidence)[place]


def _assemble(
    graph: Graph, levels: list[_Level], inner: list[tuple[gs.Variable, gs.Variable, gs.Variable]], names: Names
) -> onnx.GraphProto:
    """The messages, innermost level first, each constant where it belongs."""
    owned = _place_constants(levels, names)
    body: onnx.GraphProto | None = None
    for depth in reversed(range(len(levels))):
        level = levels[depth]
        if level.fork is not None and level.leave is not None:
            leaving = [node.outputs[0] for node in level.leave.nodes]
            away = protos.graph_proto(
                f"leave_at_exit{depth}", protos.node_protos(level.leave), _infos(graph, leaving, depth), []
            )
            level.fork.attrs["then_branch"] = body
            level.fork.attrs["else_branch"] = away
        outputs = _infos(graph, inner[depth - 1], depth - 1) if depth else _infos(graph, _fork(levels[0]).outputs, None)
        body = protos.graph_proto(
            f"go_on_from_exit{depth - 1}" if depth else graph.gs.name or "network",
            protos.node_protos(level.scope.draft),
            outputs,
            [protos.initializer(constant) for constant in owned[depth]],
            [] if depth else protos.input_infos(graph),
        )
    assert body is not None
    return body


def _infos(
    graph: Graph, values: tuple[gs.Variable, ...] | list[gs.Variable], depth: int | None
) -> list[onnx.ValueInfoProto]:
    """Types of a branch's results: static rank (some runtimes insist), rows under a symbol of their own."""
    rows = BATCH if depth is None else f"rows_at_exit{depth}"
    scores, index, confidence = values
    return [
        protos.scores_info(graph, scores.name, rows),
        protos.value_info(index.name, np.int64, [rows]),
        protos.value_info(confidence.name, np.float32, [rows]),
    ]


def _place_constants(levels: list[_Level], names: Names) -> list[list[gs.Constant]]:
    """Which level holds which constant as its initialiser."""
    users: dict[str, list[tuple[int, gs.Constant]]] = defaultdict(list)
    laid_out: set[str] = set()
    for depth, level in enumerate(levels):
        for constant in protos.constants(level.scope.draft.nodes).values():
            users[constant.name].append((depth, constant))
        laid_out |= {t.name for node in level.scope.draft.nodes if node.op in _LAID_OUT for t in node.inputs}
    owned: list[list[gs.Constant]] = [[] for _ in levels]
    for name, used in users.items():
        owned[used[0][0]].append(used[0][1])
        size = int(np.prod(used[0][1].shape)) * np.dtype(used[0][1].dtype).itemsize
        if size > _COPY_BYTES and name not in laid_out:
            continue  # the outermost level's initialiser is visible to the levels inside it
        for depth, constant in used[1:]:
            constant.name = levels[depth].scope.emit.unique(name)
            owned[depth].append(constant)
    return owned


def _seen(tensor: gs.Tensor | None) -> gs.Variable:
    """The same value as the branches see it: by name (a tensor object belongs to one graph)."""
    assert tensor is not None
    return gs.Variable(tensor.name, dtype=tensor.dtype, shape=tensor.shape)
