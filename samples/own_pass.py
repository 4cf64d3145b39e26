"""Write a pass of one's own and run it in a pipeline, watched by instruments.

    python samples/own_pass.py                                       # on a small model that it makes itself
    python samples/own_pass.py model.onnx --bits 6

To be known by name, to recipes and searches, a pass needs an entry point as well: see third_party_pass/.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

import eexform as ee
from eexform import passes
from eexform.passes import Pass, PassContext, PassResult, Skip, need
from eexform.tunables import Integer, tunable


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Round the weights of every linear operator to 2^bits - 1 equally spaced values per tensor.

    With m the largest magnitude and n = 2^(bits - 1) - 1, a weight w becomes round(w n / m) m / n.
    """

    name: ClassVar[str] = "round_weights"

    bits: int = tunable(Integer(2, 8), default=8, help="bits per weight")

    def requires(self, graph: ee.Graph) -> None:
        need(not graph.exits, "trained heads would no longer match their digests; round before insert_exits")

    def run(self, graph: ee.Graph, context: PassContext) -> PassResult:
        draft = graph.copy().gs  # nodes are copied, weights are shared: replace arrays, never write into them
        steps = 2 ** (self.bits - 1) - 1
        notes, skipped = [], []
        for node in draft.nodes:
            if node.op not in ("Conv", "Gemm", "MatMul"):
                continue
            weight = node.inputs[1]
            if weight.name not in graph.constants:
                skipped.append(Skip(node.name, f"its second operand {weight.name!r} is computed"))
                continue
            largest = np.abs(weight.values).max() or 1.0
            rounded = (np.rint(weight.values * (steps / largest)) * (largest / steps)).astype(weight.values.dtype)
            if not np.array_equal(rounded, weight.values):
                weight.values = rounded
                notes.append(f"{weight.name}: {len(np.unique(rounded))} values left")
        return PassResult(graph.replace(draft) if notes else graph, bool(notes), tuple(skipped), tuple(notes))


def main() -> None:
    parser = argparse.ArgumentParser(description="A pass of one's own in a pipeline.")
    parser.add_argument("model", nargs="?", help="an .onnx file; default: a small one is made")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--out", default="own_pass", help="folder for what is written")
    given = parser.parse_args()
    if given.model is None:
        from small_model import make

        given.model, _ = make(given.out)

    steps = [passes.make("fold_batch_norm"), RoundWeights(bits=given.bits), passes.make("remove_dead")]
    timing = passes.Timing()  # last, so that the other instruments' own work is not counted
    with passes.instruments(passes.WellFormed(), passes.DumpGraphs(f"{given.out}/graphs"), timing):
        result = passes.Pipeline(steps)(ee.load(given.model))

    print("\n".join([*result.notes, *(f"skipped {skip.where}: {skip.why}" for skip in result.skipped)]))
    for record in timing.records:
        print(f"{record.name:16} {record.seconds:6.3f} s  {'changed the graph' if record.changed else 'nothing to do'}")
    ee.save(result.graph, f"{given.out}/rounded.onnx")


if __name__ == "__main__":
    main()
