"""lower: the graph it returns is the lowered model."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from eexform.backends import ort
from eexform.backends.lower_if import lower_if
from eexform.errors import OptionError, PassError
from eexform.frontends.onnx import to_model
from eexform.ir.graph import Graph
from eexform.passes import Pipeline, make
from tests.passes.helpers import CHAIN, feeds_of, graph_of

SITES = {"r1": "conv:1x4/avg", "r2": "none/avg"}


def with_exits() -> Graph:
    insert = make("insert_exits", sites=[*SITES], heads=SITES, thresholds={"r1": 0.4, "r2": 0.3}, untrained=True)
    return insert(graph_of(CHAIN)).graph


def test_the_result_is_what_the_backend_makes() -> None:
    graph = with_exits()
    result = make("lower")(graph)
    model = to_model(result.graph)
    onnx.checker.check_model(model, full_check=True)
    expected, feeds = lower_if(graph), feeds_of(graph, batch=7)
    one, other = ort.run(ort.session(expected), feeds), ort.run(ort.session(model), feeds)
    assert list(one) == list(other) == ["scores", "exit_index", "confidence"]
    for name, values in one.items():
        np.testing.assert_array_equal(other[name], values)
    assert _initialisers(model.graph) == _initialisers(expected.graph), "weights stay in their branches"
    assert result.graph.metadata["eexform.form"] == "if"


def test_thresholds_as_input_and_multi() -> None:
    graph = with_exits()
    assert make("lower", thresholds_as_input=True)(graph).graph.inputs == ("image", "thresholds")
    multi = make("lower", form="multi")(graph).graph
    assert len(multi.outputs) >= 3


def test_refusals() -> None:
    with pytest.raises(OptionError, match=r"pass 'lower': form: 'iff' does not exist: did you mean 'if'\?"):
        make("lower", form="iff")
    with pytest.raises(OptionError, match="takes no thresholds"):
        make("lower", form="multi", thresholds_as_input=True)
    with pytest.raises(PassError, match="put insert_exits in front of it"):
        make("lower")(graph_of(CHAIN))
    with pytest.raises(PassError, match=r"pass 'lower' \(after lower\): the graph is lowered already"):
        Pipeline([make("lower"), make("lower")])(with_exits())


def _initialisers(graph: onnx.GraphProto) -> list[object]:
    inner = [
        _initialisers(attribute.g)
        for node in graph.node
        for attribute in node.attribute
        if attribute.type == onnx.AttributeProto.GRAPH
    ]
    return [sorted(item.name for item in graph.initializer), *inner]
