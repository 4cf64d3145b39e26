"""simplify: what onnxslim does is kept only where it is right."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from eexform.errors import PassError
from eexform.ir.graph import Graph
from eexform.passes import make
from eexform.passes.simplify import Simplify
from tests.passes.helpers import CHAIN, assert_same_outputs, graph_of, ops

REDUNDANT = """
<ir_version: 8, opset_import: ["": 17]>
redundant (float[N, 2, 6, 6] image) => (float[N, 3] scores)
<float[4, 2, 3, 3] w, float[4] b, float[3, 4] w2>
{
    [id1] i = Identity(image)
    [conv] c = Conv(i, w, b)
    [id2] j = Identity(c)
    [relu] r = Relu(j)
    [conv2] c2 = Conv<kernel_shape = [1, 1]>(r, w1)
    [pool] p = GlobalAveragePool(c2)
    [flat] f = Flatten(p)
    [fc] scores = Gemm<transB = 1>(f, w2)
}
""".replace("float[3, 4] w2", "float[4, 4, 1, 1] w1, float[3, 4] w2")


def test_redundant_nodes_go() -> None:
    before = graph_of(REDUNDANT)
    result = make("simplify")(before)
    assert result.changed
    assert "Identity" not in ops(result.graph)
    assert result.graph.inputs == before.inputs
    assert result.graph.outputs == before.outputs
    assert_same_outputs(before, result.graph)
    again = make("simplify")(result.graph)
    assert again.graph is result.graph
    assert again.skipped[0].why == "onnxslim found nothing to simplify"


def test_exits_survive() -> None:
    sites = {"r1": "conv:1x4/avg", "r2": "none/avg"}
    insert = make("insert_exits", sites=[*sites], heads=sites, thresholds=dict.fromkeys(sites, 0.5), untrained=True)
    before = insert(graph_of(CHAIN)).graph
    result = make("simplify")(before)
    assert [item.site for item in result.graph.exits] == ["r1", "r2"]
    assert result.graph.outputs == before.outputs
    assert_same_outputs(before, result.graph)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    make("simplify")(graph_of(REDUNDANT))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fault", ["weights", "output", "crash"])
def test_a_wrong_optimiser_is_refused(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    import onnxslim

    def wrong(model: onnx.ModelProto) -> onnx.ModelProto:
        if fault == "crash":
            raise KeyError("oops")
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        if fault == "output":
            changed.graph.node[-1].output[0] = changed.graph.output[0].name = "other"
        else:
            weight = changed.graph.initializer[0]
            values = onnx.numpy_helper.to_array(weight) + np.float32(0.5)
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
        return changed

    monkeypatch.setattr(onnxslim, "slim", wrong)
    messages = {"weights": "changed the network", "output": "lost the values", "crash": "failed: KeyError: 'oops'"}
    graph = graph_of(CHAIN)
    with pytest.raises(PassError, match=messages[fault]):
        make("simplify")(graph)
    if fault == "weights":
        assert Simplify(compare=False)(graph).changed


def test_inputs_without_a_size_are_not_compared() -> None:
    graph = graph_of("""
    <ir_version: 8, opset_import: ["": 17]>
    tokens (float[N, seq, 4] x) => (float[N, 3] scores)
    <float[4, 3] w>
    {
        [id] i = Identity(x)
        [mean] m = ReduceMean<axes = [1], keepdims = 0>(i)
        scores = MatMul(m, w)
    }
    """)
    result = make("simplify")(graph)
    assert result.changed
    assert result.skipped[0].where == "comparison"
    assert isinstance(result.graph, Graph)
