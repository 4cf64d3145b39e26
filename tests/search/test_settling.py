"""What a search says about the original, carried out on what passes in front have made of it."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from onnx import numpy_helper

import eexform as ee
from eexform.errors import PassError
from eexform.ir.graph import Graph
from eexform.passes import PassContext, Recipe, Step
from eexform.report.apply import apply
from eexform.search.settling import settle_passes

CONTEXT = PassContext()


def chain() -> Graph:
    """Two residual blocks of one kind behind a stem: families stem and a0 (with a1)."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 3, 8, 8] image) => (float[N, 4] scores) <
        float[8, 3, 3, 3] "stem.weight", float[8, 8, 3, 3] "a0.weight", float[8, 8, 3, 3] "b0.weight",
        float[8, 8, 3, 3] "a1.weight", float[8, 8, 3, 3] "b1.weight", float[8, 4] "fc.weight"
    > {
        stem = Conv<pads=[1, 1, 1, 1]>(image, "stem.weight")
        x0 = Relu(stem)
        a0 = Conv<pads=[1, 1, 1, 1]>(x0, "a0.weight")
        r0 = Relu(a0)
        b0 = Conv<pads=[1, 1, 1, 1]>(r0, "b0.weight")
        sum0 = Add(x0, b0)
        x1 = Relu(sum0)
        a1 = Conv<pads=[1, 1, 1, 1]>(x1, "a1.weight")
        r1 = Relu(a1)
        b1 = Conv<pads=[1, 1, 1, 1]>(r1, "b1.weight")
        sum1 = Add(x1, b1)
        x2 = Relu(sum1)
        pooled = GlobalAveragePool(x2)
        flat = Flatten(pooled)
        scores = MatMul(flat, "fc.weight")
    }"""
    return with_weights(text)


def with_weights(text: str) -> Graph:
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for held in model.graph.value_info:
        shape = [dim.dim_value for dim in held.type.tensor_type.shape.dim]
        values = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, held.name))
    del model.graph.value_info[:]
    return ee.from_model(model)


def widths(graph: Graph) -> dict[str, int]:
    return {name: values.shape[0] for name, values in graph.parameters().items() if name != "fc.weight"}


def pruned(graph: Graph, *steps: tuple[str, dict[str, object]], genes: bool) -> Graph:
    open_ = [(place, name) for place, (_, given) in enumerate(steps) for name in given] if genes else []
    return settle_passes(steps, graph, CONTEXT, open_).graph


def test_a_family_whose_first_group_went_with_a_block_is_cut_all_the_same() -> None:
    graph = chain()
    assert dict(graph.groups.families()) == {"stem": ("stem",), "a0": ("a0", "a1")}
    drop, cut = ("drop_blocks", {"blocks": ("sum0",)}), ("prune_channels", {"ratios": {"a0": 0.5, "stem": 0.0}})
    assert widths(pruned(graph, drop, cut, genes=True)) == {"stem.weight": 8, "a1.weight": 4, "b1.weight": 8}


def test_where_all_that_is_named_is_gone_nothing_is_cut() -> None:
    graph = chain()
    drop, cut = ("drop_blocks", {"blocks": ("sum0", "sum1")}), ("prune_channels", {"ratios": {"a0": 0.5}})
    assert widths(pruned(graph, drop, cut, genes=True)) == {"stem.weight": 8}


def test_what_the_recipe_fixes_means_the_same_as_applied() -> None:
    graph = chain()
    fixed = {"ratios": {"a1": 0.5}}  # a group that is not the first of its family
    found = pruned(graph, ("prune_channels", fixed), genes=False)
    assert widths(found)["a1.weight"] == 4
    assert widths(found)["a0.weight"] == 8
    assert found.digest == apply(graph, Recipe((Step("prune_channels", fixed),))).graph.digest
    with pytest.raises(PassError, match="no channel group 'typo'"):
        pruned(graph, ("prune_channels", {"ratios": {"typo": 0.5}}), genes=False)
