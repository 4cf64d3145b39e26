"""Sites of networks of every kind, held against what a run of the network shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import helper

from eexform.backends import ort
from eexform.errors import GraphError
from eexform.frontends.onnx import from_model
from eexform.ir.exits import Exit
from eexform.ir.extract import extract
from eexform.ir.flow import DataFlow
from eexform.ir.graph import Graph
from eexform.ir.serialize import to_model
from eexform.ir.sites import SiteReport, find_sites
from tests import zoo
from tests.counting import function_calls
from tests.graphs import random_classifier
from tests.zoo.big import KINDS
from tests.zoo.net import Net

RANDOM = (1, 2, 3, 4, 5)


class Case:
    """A network with its sites and everything that a run of it shows at batch 2 and 3."""

    def __init__(self, name: str | int) -> None:
        self.name = name
        self.graph = from_model(zoo.build(name) if isinstance(name, str) else random_classifier(name))
        self.report = find_sites(self.graph)
        self.values = sorted({*self.graph.flow.producer} - {self.graph.final})
        session = ort.session(ort.tap(self.graph, self.values), optimize=False)
        self.runs = {batch: self.feeds(batch) | ort.run(session, self.feeds(batch)) for batch in (2, 3)}
        self.others = {batch: ort.run(session, self.feeds(batch, seed=9)) for batch in (2, 3)}

    def feeds(self, batch: int, seed: int = 0) -> dict[str, np.ndarray]:
        if isinstance(self.name, str):
            return zoo.feeds(self.name, batch, seed)
        return {"image": np.random.default_rng(seed).normal(size=(batch, 3, 8, 8)).astype(np.float32)}


@pytest.fixture(scope="module", params=[*zoo.NAMES, *RANDOM], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def reasons(report: SiteReport) -> dict[str, str]:
    return {rejected.value: rejected.reason for rejected in report.rejected}


# -- against a run -----------------------------------------------------------------------------------------------------


def test_shapes_and_channels_are_what_a_run_shows(case: Case) -> None:
    for site in case.report.sites:
        for batch, run in case.runs.items():
            array = run[site.value]
            assert array.dtype == np.float32
            assert array.shape[0] == batch
            assert array.shape[site.channel_axis] == site.channels
            expected = [d if isinstance(d, int) else 7 for d in site.shape]  # BERT's sentences have 7 words
            assert list(array.shape[1:]) == expected
            assert site.kind == {2: "flat", 3: "sequence", 4: "spatial"}[array.ndim]


def test_strides_are_what_a_run_shows(case: Case) -> None:
    for site in case.report.sites:
        array = case.runs[2][site.value]
        if site.kind == "spatial":
            height = array.shape[2 if site.channel_axis == 1 else 1]
            assert site.stride == case.runs[2]["image"].shape[2] / height
        else:
            assert site.stride is None


def test_every_float_that_carries_samples_is_a_site_or_has_a_reason(case: Case) -> None:
    carrying = {
        value
        for value, array in case.runs[2].items()
        if array.dtype.kind == "f" and array.shape != case.runs[3][value].shape
    }
    sites = [site.value for site in case.report.sites]
    rejected = [item.value for item in case.report.rejected]
    assert len({*sites, *rejected}) == len(sites) + len(rejected)
    assert {*sites, *rejected} == carrying
    assert all(item.reason for item in case.report.rejected)


def test_sites_come_in_the_order_of_the_network(case: Case) -> None:
    flow = case.graph.flow
    for earlier, later in zip(case.report.sites, case.report.sites[1:], strict=False):
        assert flow.index(flow.producer[earlier.value]) < flow.index(flow.producer[later.value])


def tail(graph: Graph, feeds: Sequence[str]) -> tuple[onnx.ModelProto, list[str]]:
    """The nodes between ``feeds`` and the output. What shape nodes hold is an input as well: its names are returned."""
    model = to_model(graph)
    made = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name for tensor in model.graph.initializer}
    shaped = {name for node in graph.flow.shape_nodes for name in made if made[name].name == node}
    keep: set[str] = set()
    inputs: set[str] = set()
    left = [graph.final]
    while left:
        name = left.pop()
        if not name or name in constants:
            continue
        if name in shaped or name in feeds:
            inputs.add(name)
        elif name not in made:
            raise AssertionError(f"the tail needs the network's input {name!r}")
        elif made[name].name not in keep:
            keep.add(made[name].name)
            left += made[name].input

    def info(name: str) -> onnx.ValueInfoProto:
        kind = graph.types[name]
        assert kind.dtype is not None
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(kind.dtype), None)

    part = helper.make_graph(
        [node for node in model.graph.node if node.name in keep],
        "tail",
        [info(name) for name in sorted(inputs)],
        [info(graph.final)],
        list(model.graph.initializer),
    )
    return helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version), sorted(
        inputs & shaped
    )


def test_the_live_values_are_enough_and_none_is_idle(case: Case) -> None:
    final = case.graph.final
    random = np.random.default_rng(1)
    for site in case.report.sites:
        model, shaped = tail(case.graph, site.live)
        session = ort.session(model, optimize=False)
        for batch in (2, 3):
            # shape arithmetic comes from a run on other samples: it must not hold anything of these
            feeds = {name: case.others[batch][name] for name in shaped}
            feeds |= {name: case.runs[batch][name] for name in site.live}
            np.testing.assert_allclose(ort.run(session, feeds)[final], case.runs[batch][final], rtol=1e-4, atol=1e-5)
        for value in site.live:
            array = feeds[value]
            assert array.dtype == np.float32
            changed = feeds | {value: (array + random.normal(size=array.shape)).astype(np.float32)}
            assert np.abs(ort.run(session, changed)[final] - case.runs[3][final]).max() > 1e-6, value


def test_the_rest_runs_on_some_rows_of_the_live_values(case: Case) -> None:
    rows = [0, 2]
    for site in case.report.sites:
        part = extract(case.graph, site.live, [case.graph.final])
        scores = ort.run(ort.session(part, optimize=False), {v: case.runs[3][v][rows] for v in part.inputs})
        expected = case.runs[3][case.graph.final][rows]
        np.testing.assert_allclose(scores[case.graph.final], expected, rtol=1e-4, atol=1e-5)


# -- what is expected of each architecture -----------------------------------------------------------------------------


EXPECTED = {  # sites; those of them behind which only the site itself is carried
    "resnet": (12, 6),  # stem, 6 blocks less the last, and the inside of all 6
    "preact": (6, 3),
    "mobilenet": (14, 8),
    "densenet": (11, 3),
    "shufflenet": (21, 7),
    "inception": (12, 3),
    "unet": (5, 3),
    "convnext": (20, 8),  # stem, 6 blocks less the last, 2 down-samplings with 2 points each; 2 inside of every block
    "vit": (12, 6),  # per block: its input, attention, the middle, the hidden layer
    "swin": (15, 9),
    "bert": (12, 2),  # the mask goes along until the last attention
}


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_number_of_sites(name: str) -> None:
    report = find_sites(from_model(zoo.build(name)))
    assert (len(report.sites), sum(site.cuts for site in report.sites)) == EXPECTED[name]


class ShapesAreData(DataFlow):
    """The fault: shape arithmetic counts as data flow."""

    @staticmethod
    def is_shape_node(node: Any, sources: Any, shape_nodes: Any) -> bool:
        return False


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_counting_shape_arithmetic_as_data_loses_sites(name: str) -> None:
    graph = from_model(zoo.build(name))
    naive = find_sites(graph, flow=ShapesAreData(graph))
    assert sum(site.cuts for site in naive.sites) <= 1
    assert len(naive.sites) < EXPECTED[name][0] / 2


def test_a_swin_and_a_convnext_have_dozens_of_sites() -> None:
    # 4 + 4 blocks deep, as the real ones are 12 and more
    assert len(find_sites(from_model(zoo.transformers.swin(depth=4))).sites) >= 24
    assert len(find_sites(from_model(zoo.convnets.convnext(depth=4))).sites) >= 24


def test_resnet_sites_are_the_activations() -> None:
    report = find_sites(from_model(zoo.build("resnet")))
    assert [site.value for site in report.sites] == [f"relu_{i}" for i in range(1, 13)]
    assert [site.stride for site in report.sites] == [1] * 5 + [2] * 4 + [4] * 3
    assert report.site("relu_3").live == ("relu_3",)
    assert report.site("relu_4").live == ("relu_3", "relu_4")
    assert report.site("relu_6").channels == 8
    why = reasons(report)
    assert why["conv_1"] == (
        "followed by BatchNormalization 'node_batchnormalization_1', not by a layer; the site is 'relu_1'"
    )
    assert "followed by Add 'node_add_3'" in why["batchnormalization_8"]  # a shortcut's convolution
    assert "the classifier itself, node 'node_gemm_1'" in why["relu_13"]
    assert why["logits"] == "nothing is left to skip: no layer comes after it"
    assert "input of the network" in why["image"]


def test_pre_activation_blocks_are_cut_at_the_sum() -> None:
    report = find_sites(from_model(zoo.build("preact")))
    assert [site.value for site in report.sites if site.cuts] == ["conv_1", "add_1", "add_2"]
    assert "the site 'add_1' comes before it" in reasons(report)["relu_3"]


def test_squeeze_and_excitation_gates_are_no_sites() -> None:
    report = find_sites(from_model(zoo.build("mobilenet")))
    why = reasons(report)
    assert "side branch without positions" in why["relu_1"]
    assert "side branch without positions" in why["hardsigmoid_1"]
    assert {site.kind for site in report.sites} == {"spatial"}
    # two layers are left behind the global pooling; in front of it is the better place
    assert report.sites[-1].value == "hardswish_8"
    assert "'hardswish_8' comes before it" in why["globalaveragepool_4"]


def test_a_dense_blocks_sites_are_all_its_features_and_wide_cuts_say_so() -> None:
    report = find_sites(from_model(zoo.build("densenet")))
    assert report.site("relu_4").live == ("maxpool_1", "conv_3", "relu_4")
    assert reasons(report)["conv_3"].endswith("the site is 'relu_4'")
    assert reasons(report)["relu_6"].startswith("4 values would have to be carried (at most 3 may): maxpool_1, conv_3")
    wide = find_sites(from_model(zoo.build("densenet")), max_live=6)
    assert wide.site("relu_6").channels == 16
    narrow = find_sites(from_model(zoo.build("densenet")), max_live=1)
    assert all(site.cuts for site in narrow.sites)


def test_a_shuffled_block_is_one_site_in_front_of_the_shuffle() -> None:
    report = find_sites(from_model(zoo.build("shufflenet")))
    assert report.site("concat_4").cuts
    why = reasons(report)
    assert "'concat_4' comes before it" in why["reshape_4"]
    assert "'concat_4' comes before it" in why["split_2.1"]
    assert "heads read" in why["transpose_2"]


def test_attention_is_no_place_for_a_head_but_its_result_is() -> None:
    report = find_sites(from_model(zoo.build("vit")))
    why = reasons(report)
    assert "operand of a product" in why["softmax_1"]
    assert "operand of a product" in why["matmul_1"]
    assert "spread over the axes 2, 3" in why["transpose_4"]
    assert "sizes and constants alone" in why["expand_1"]
    assert report.site("reshape_3").channel_axis == 2
    assert {(site.kind, site.shape[0]) for site in report.sites} == {("sequence", 17)}


def test_windows_merged_into_the_batch_are_named() -> None:
    why = reasons(find_sites(from_model(zoo.build("swin"))))
    assert why["reshape_2"] == "the batch is merged with another axis, or mixed: float32[4*Nx16x8]"


def test_channels_last_is_recognised() -> None:
    report = find_sites(from_model(zoo.build("convnext")))
    inside, end = report.site("mul_5"), report.site("add_4")
    assert (inside.kind, inside.channel_axis, inside.shape) == ("spatial", 3, (8, 8, 24))
    assert (end.kind, end.channel_axis, end.shape) == ("spatial", 1, (6, 8, 8))
    assert inside.stride == end.stride == 2
    assert len(inside.live) == 2


def test_a_mask_for_all_layers_is_carried_and_is_no_site() -> None:
    report = find_sites(from_model(zoo.build("bert")))
    assert report.sites[1].live == ("mul_1", "layernormalization_2")
    assert reasons(report)["mul_1"] == "no layer with weights comes before it"


# -- single values -----------------------------------------------------------------------------------------------------


def test_signals_have_a_length_and_a_stride() -> None:
    net = Net("signal")
    x = net.input("signal", 2, 64)
    for cin, cout in ((2, 4), (4, 8)):
        weights = net.weight(cout, cin, 3)
        x = net.op("Relu", net.op("Conv", x, weights, kernel_shape=[3], strides=[2], pads=[1, 1]))
    x = net.op("Relu", net.op("Conv", x, net.weight(8, 8, 3), kernel_shape=[3], pads=[1, 1]))
    report = find_sites(from_model(net.model(net.gemm(net.op("ReduceMean", x, axes=[2], keepdims=0), 8, 5), 5)))
    assert [(s.value, s.kind, s.shape, s.channel_axis, s.stride) for s in report.sites] == [
        ("relu_1", "spatial", (4, 32), 1, 2),
        ("relu_2", "spatial", (8, 16), 1, 4),
    ]


def test_a_network_on_tables_has_flat_sites() -> None:
    net = Net("table")
    x = net.input("row", 6)
    for cin, cout in ((6, 8), (8, 8), (8, 8)):
        x = net.op("Relu", net.gemm(x, cin, cout))
    report = find_sites(from_model(net.model(net.gemm(x, 8, 5), 5)))
    assert [(s.value, s.kind, s.shape, s.stride) for s in report.sites] == [
        ("relu_1", "flat", (8,), None),
        ("relu_2", "flat", (8,), None),
    ]
    assert "the classifier itself" in reasons(report)["relu_3"]


def test_channels_last_input_gives_the_right_stride() -> None:
    net = Net("nhwc")
    x = net.transpose(net.input("image", 16, 16, 3), 0, 3, 1, 2)
    x = net.op("Relu", net.conv(x, 3, 4, 3, 2))
    x = net.op("Relu", net.conv(x, 4, 4))
    report = find_sites(from_model(net.model(net.classifier(x, 4, 5), 5)))
    assert [(site.value, site.stride) for site in report.sites] == [("relu_1", 2)]


def test_a_carried_value_whose_batch_is_merged_rejects_the_cut() -> None:
    net = Net("merged")
    x = net.conv(net.input("image", 3, 4, 4), 3, 4)
    windows = net.op("Relu", net.op("MatMul", net.reshape(x, -1, 4), net.weight(4, 4)))  # [16 N, 4]
    inner = net.op("Sigmoid", net.conv(net.reshape(windows, -1, 4, 4, 4), 4, 4))
    late = net.reshape(net.op("MatMul", windows, net.weight(4, 4)), -1, 4, 4, 4)
    end = net.op("Add", net.conv(inner, 4, 4), late)
    report = find_sites(from_model(net.model(net.classifier(net.conv(end, 4, 4), 4, 5), 5)))
    assert [site.value for site in report.sites] == ["conv_1", "add_1"]
    assert reasons(report)["sigmoid_1"] == (
        "'relu_1' would have to be carried, whose batch is merged or not known: float32[16*Nx4]"
    )


def test_an_unknown_operator_is_a_layer_and_its_value_has_no_type() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(zoo.build("resnet"))
    node = next(n for n in model.graph.node if n.output[0] == "relu_5")
    node.op_type, node.domain = "Mystery", "my.ops"
    model.opset_import.append(helper.make_opsetid("my.ops", 1))
    graph = Graph(gs.import_onnx(model))
    report = find_sites(graph)
    assert reasons(report)["relu_5"] == "its type is not known (operator 'Mystery' of node 'node_relu_5')"
    assert "relu_3" in {site.value for site in report.sites}


def test_heads_already_there_change_nothing() -> None:
    graph = from_model(zoo.build("resnet"))
    before = find_sites(graph)
    draft = graph.copy()
    pooled = gs.Variable("exit0.pooled", np.float32)
    scores = gs.Variable("exit0.scores", np.float32, ["N", 5])
    weights = gs.Constant("exit0.weight", np.ones((4, 5), np.float32))
    site = draft.tensors["relu_3"]
    axes = {"axes": [2, 3], "keepdims": 0}
    draft.gs.nodes.append(gs.Node("ReduceMean", "exit0.pool", axes, inputs=[site], outputs=[pooled]))
    draft.gs.nodes.append(gs.Node("MatMul", "exit0.fc", inputs=[pooled, weights], outputs=[scores]))
    draft.gs.outputs.append(scores)
    after = find_sites(draft.replace(exits=[Exit("relu_3", "none/avg", "exit0.scores")]))
    assert after.sites == before.sites
    assert reasons(after)["exit0.pooled"] == "it does not lead to the final output"


def test_asking_for_what_is_no_site_says_why() -> None:
    report = find_sites(from_model(zoo.build("resnet")))
    assert report.site("relu_2").channels == 4
    with pytest.raises(GraphError, match="'conv_1' is no site: followed by BatchNormalization"):
        report.site("conv_1")
    with pytest.raises(GraphError, match="there is no site 'relu_22': did you mean 'relu_"):
        report.site("relu_22")
    with pytest.raises(GraphError, match="max_live is 0"):
        find_sites(from_model(zoo.build("resnet")), max_live=0)


def test_points_are_distinct(case: Case) -> None:
    """No two sites have the same layers before them: they would cost the same and one would do."""
    graph = case.graph
    layers = {n.name for n in graph.nodes if n.op in ("Conv", "Gemm", "MatMul") and n.name in graph.flow.needed}
    before = Counter(frozenset(graph.flow.ancestors([site.value]) & layers) for site in case.report.sites)
    assert max(before.values()) == 1


# -- growth ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ladder", "masked"])
def test_work_grows_about_linearly_with_the_graph(kind: str) -> None:
    """In function calls; seconds for 10,000 nodes are in the benchmark."""
    calls = {}
    for nodes in (1000, 4000):
        graph = from_model(KINDS[kind](nodes))
        assert graph.types
        calls[nodes] = function_calls(lambda graph=graph: find_sites(graph))
    assert calls[4000] < 5 * calls[1000]  # 4 if linear, 16 if quadratic
