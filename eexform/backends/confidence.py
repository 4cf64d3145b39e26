"""The confidence of a block's classifier, emitted where the block ends."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from eexform.backends.blocks import Block
from eexform.backends.rebatch import Scope
from eexform.ir import measures
from eexform.ir.graph import BATCH
from eexform.ir.policy import final_measure


def emit_scored(scope: Scope, depth: int, block: Block) -> tuple[gs.Variable, gs.Variable]:
    """Scores [N, classes] and confidence [N] (float32) of exit ``depth``, or of the final classifier behind the last.

    A confidence that the network computes itself is taken as it is. The final classifier's is that of the simulator
    (:func:`eexform.ir.policy.final_measure`, at temperature 1).
    """
    source, scores = scope.source, block.scores
    final = depth == len(source.exits)
    rule = source.exits[-1] if final else source.exits[depth]
    emit = scope.emit.scoped("final." if final else f"exit{depth}.")
    found = scope.resolve(scores)
    found.dtype, found.shape = source.types[scores].dtype, [BATCH, source.num_classes]
    if block.confidence:
        # a value of its own: the one in the graph may be handed on to later exits under its name
        learned, to = scope.resolve(block.confidence), int(onnx.TensorProto.FLOAT)
        return found, emit.node("Cast", learned, name="confidence", shape=[BATCH], dtype=np.float32, to=to)
    single = found
    if found.dtype is not None and found.dtype != np.float32:
        single = emit.node("Cast", found, name="single", shape=found.shape, to=int(onnx.TensorProto.FLOAT))
        single.dtype = np.dtype(np.float32)
    confidence = measures.emit_confidence(
        emit,
        single,
        measure=final_measure(source.exits) if final else rule.measure,
        kind=source.scores,
        temperature=1.0 if final else rule.temperature,
        num_classes=source.num_classes,
    )
    return found, confidence
