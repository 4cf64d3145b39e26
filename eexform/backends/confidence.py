"""The confidence of a block's classifier, emitted where the block ends."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from eexform.backends.rebatch import Scope
from eexform.ir import measures
from eexform.ir.graph import BATCH


def emit_scored(scope: Scope, depth: int, scores: str) -> tuple[gs.Variable, gs.Variable]:
    """Scores [N, classes] and confidence [N] (float32) of exit ``depth``, or of the final classifier behind the last.

    The final classifier's confidence is taken with the last exit's measure at temperature 1, as the simulator does.
    """
    source = scope.source
    final = depth == len(source.exits)
    rule = source.exits[-1] if final else source.exits[depth]
    emit = scope.emit.scoped("final." if final else f"exit{depth}.")
    found = scope.resolve(scores)
    found.dtype, found.shape = source.types[scores].dtype, [BATCH, source.num_classes]
    single = found
    if found.dtype is not None and found.dtype != np.float32:
        single = emit.node("Cast", found, name="single", shape=found.shape, to=int(onnx.TensorProto.FLOAT))
        single.dtype = np.dtype(np.float32)
    confidence = measures.emit_confidence(
        emit,
        single,
        measure=rule.measure,
        kind=source.scores,
        temperature=1.0 if final else rule.temperature,
        num_classes=source.num_classes,
    )
    return found, confidence
