"""fold_batch_norm: before/after pairs, refusals with reasons, numeric equivalence."""

from __future__ import annotations

import numpy as np
import pytest

from eexform.ir.emit import Emitter
from eexform.ir.exit_nodes import head_digest
from eexform.ir.exits import Exit
from eexform.passes import make
from tests.passes.helpers import CHAIN, assert_same_outputs, graph_of, ops

BEFORE = """
<ir_version: 8, opset_import: ["": 17]>
small (float[N, 2, 6, 6] image) => (float[N, 3] scores)
<float[4, 2, 3, 3] conv_weight, float[4] scale, float[4] shift, float[4] mean, float[4] var, float[3, 4] w, float[3] b>
{
    [conv] c = Conv(image, conv_weight)
    [norm] n = BatchNormalization<epsilon = 0.001>(c, scale, shift, mean, var)
    [relu] r = Relu(n)
    [pool] p = GlobalAveragePool(r)
    [flat] f = Flatten(p)
    [fc] scores = Gemm<transB = 1>(f, w, b)
}
"""

AFTER = """
<ir_version: 8, opset_import: ["": 17]>
small (float[N, 2, 6, 6] image) => (float[N, 3] scores)
<float[4, 2, 3, 3] conv_weight, float[4] conv_bias, float[3, 4] w, float[3] b>
{
    [conv] n = Conv(image, conv_weight, conv_bias)
    [relu] r = Relu(n)
    [pool] p = GlobalAveragePool(r)
    [flat] f = Flatten(p)
    [fc] scores = Gemm<transB = 1>(f, w, b)
}
"""


def test_before_and_after() -> None:
    before = graph_of(BEFORE)
    result = make("fold_batch_norm")(before)
    values = before.parameters()
    gain = values["scale"].astype(np.float64) / np.sqrt(values["var"].astype(np.float64) + 0.001)
    after = graph_of(
        AFTER,
        arrays={
            **{name: values[name] for name in ("w", "b")},
            "conv_weight": values["conv_weight"] * gain[:, None, None, None],
            "conv_bias": values["shift"] - gain * values["mean"],
        },
    )
    assert result.changed
    assert result.graph.digest == after.digest
    assert_same_outputs(before, result.graph)


FORMS = {
    "conv with bias": ("[N, 2, 6, 6]", "float[4, 2, 3, 3] w, float[4] b", "Conv(x, w, b)", 4),
    "grouped conv": ("[N, 4, 6, 6]", "float[4, 2, 3, 3] w", "Conv<group = 2>(x, w)", 4),
    "conv 1d": ("[N, 2, 9]", "float[4, 2, 3] w", "Conv(x, w)", 4),
    "transposed": ("[N, 3, 4, 4]", "float[3, 4, 2, 2] w, float[4] b", "ConvTranspose(x, w, b)", 4),
    "grouped transposed": ("[N, 4, 4, 4]", "float[4, 3, 2, 2] w", "ConvTranspose<group = 2>(x, w)", 6),
    "gemm": ("[N, 5]", "float[5, 4] w", "Gemm(x, w)", 4),
    "gemm with all its attributes": (
        "[N, 5]", "float[4, 5] w, float[1, 4] b", "Gemm<alpha = 0.5, beta = 2.0, transB = 1>(x, w, b)", 4,
    ),
    "gemm with a scalar": ("[N, 5]", "float[5, 4] w, float[1] b", "Gemm<beta = 3.0>(x, w, b)", 4),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_linear_operator(form: str) -> None:
    shape, weights, call, channels = FORMS[form]
    flat = "Identity(n)" if "gemm" in form else "GlobalAveragePool(n)"
    before = graph_of(f"""
    <ir_version: 8, opset_import: ["": 17]>
    one (float{shape} x) => (float[N, 3] scores)
    <{weights}, float[{channels}] scale, float[{channels}] shift, float[{channels}] mean, float[{channels}] var,
     float[{channels}, 3] last>
    {{
        c = {call}
        n = BatchNormalization(c, scale, shift, mean, var)
        p = {flat}
        f = Flatten(p)
        scores = MatMul(f, last)
    }}
    """)
    result = make("fold_batch_norm")(before)
    assert result.changed
    assert "BatchNormalization" not in ops(result.graph)
    assert_same_outputs(before, result.graph)
    again = make("fold_batch_norm")(result.graph)
    assert not again.changed
    assert again.graph is result.graph


def test_two_normalisations_in_a_row_and_shared_statistics() -> None:
    before = graph_of("""
    <ir_version: 8, opset_import: ["": 17]>
    shared (float[N, 3, 6, 6] x) => (float[N, 3] scores)
    <float[3, 3, 3, 3] w, float[3] scale, float[3] shift, float[3] mean, float[3] var>
    {
        c = Conv(x, w)
        n1 = BatchNormalization(c, scale, shift, mean, var)
        n2 = BatchNormalization(n1, scale, shift, mean, var)
        c2 = Conv(n2, w)
        n3 = BatchNormalization(c2, scale, shift, mean, var)
        p = GlobalAveragePool(n3)
        scores = Flatten(p)
    }
    """)
    result = make("fold_batch_norm")(before)
    assert ops(result.graph) == ["Conv", "Conv", "GlobalAveragePool", "Flatten"]
    assert len({node.inputs[1].name for node in result.graph.nodes[:2]}) == 2, "shared weights have come apart"
    assert_same_outputs(before, result.graph)


REFUSED = {
    "2 consumers": ("c = Conv(x, w)", "BatchNormalization(c, scale, shift, mean, var)", "Add(n, c)"),
    "comes from Relu": (
        "c0 = Conv(x, w)\nc = Relu(c0)", "BatchNormalization(c, scale, shift, mean, var)", "Identity(n)",
    ),
    "computed, not a constant": (
        "c = Conv(x, w)\n scale2 = Abs(scale)", "BatchNormalization(c, scale2, shift, mean, var)", "Identity(n)",
    ),
    "no operator's output": ("c = Conv(x, w)", "BatchNormalization(x, scale, shift, mean, var)", "Add(n, x)"),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_say_why(reason: str) -> None:
    first, norm, last = REFUSED[reason]
    before = graph_of(f"""
    <ir_version: 8, opset_import: ["": 17]>
    refused (float[N, 3, 4, 4] x) => (float[N, 3] scores)
    <float[3, 3, 1, 1] w, float[3] scale, float[3] shift, float[3] mean, float[3] var>
    {{
        {first}
        [norm] n = {norm}
        s = {last}
        s2 = Relu(s)
        p = GlobalAveragePool(s2)
        scores = Flatten(p)
    }}
    """)
    result = make("fold_batch_norm")(before)
    assert not result.changed
    assert result.graph is before
    (skip,) = result.skipped
    assert skip.where == "norm"
    assert reason in skip.why


def test_a_variance_that_is_not_positive_is_left_alone() -> None:
    before = graph_of(BEFORE, arrays={"var": np.array([1, 1, -1, 1])})
    (skip,) = make("fold_batch_norm")(before).skipped
    assert "variance is not positive" in skip.why


def test_the_site_of_an_exit_stays_and_its_head_is_folded() -> None:
    before = graph_of(CHAIN)
    insert = make("insert_exits", sites=["r1"], heads={"r1": "conv:1x4/avg"}, thresholds={"r1": 0.5}, untrained=True)
    with_exit = insert(before).graph
    result = make("fold_batch_norm")(with_exit)
    assert "BatchNormalization" not in ops(result.graph)
    (leaving,) = result.graph.exits
    assert leaving.site == "r1"
    assert leaving.digest != with_exit.exits[0].digest, "the head's parameters are other ones now"
    assert leaving.digest == head_digest({name: result.graph.constants[name].values for name in leaving.parameters})
    assert_same_outputs(with_exit, result.graph)


def test_a_value_that_an_exit_is_attached_to_is_not_folded_away() -> None:
    before = graph_of(
        CHAIN.replace("r1 = Relu(c1)", "r1 = BatchNormalization(c1, scale, shift, mean, var)").replace(
            "<float[3, 2, 3, 3] w1,",
            "<float[3] scale, float[3] shift, float[3] mean, float[3] var, float[3, 2, 3, 3] w1,",
        )
    )
    draft = before.copy().gs
    c1 = next(tensor for node in draft.nodes for tensor in node.outputs if tensor.name == "c1")
    emitter = Emitter(draft)
    early = emitter.node("Flatten", emitter.node("GlobalAveragePool", c1))
    draft.outputs = [*draft.outputs, early]
    graph = before.replace(draft, exits=[Exit(site="c1", head="none/avg", logits=early.name)])
    (skip,) = make("fold_batch_norm")(graph).skipped
    assert "2 consumers" in skip.why
