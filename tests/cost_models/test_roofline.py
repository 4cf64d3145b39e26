"""Rooflines: counted by hand, against published measurements, and fitted to measured kernels."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eexform.cost_models import Crossing, Held, make, path_costs
from eexform.cost_models._added import added
from eexform.cost_models._device import Device
from eexform.cost_models._fit import fit, onto_kernels
from eexform.cost_models._kernels import Kernel, kernels
from eexform.cost_models._routing import RoutingFit
from eexform.cost_models.roofline import kernel_time, padded_macs
from eexform.errors import OptionError
from eexform.frontends.onnx import from_model, load
from eexform.heads import HeadSpec
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from tests.passes.helpers import CHAIN, graph_of
from tests.zoo import doors
from tests.zoo.net import Net

CONV = Kernel(
    name="conv", nodes=("conv",), op="Conv", kind="conv", variant="k3x3 float32", sizes=(16, 20, 10, 10),
    macs=16 * 20 * 100 * 9, flops=2000, read_bytes=6400, write_bytes=8000, weight_bytes=11600, dtype="float32",
    channels=(16, 20),
)  # fmt: skip


def plain(**sections: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": "test", "title": "a test", "compute": {"peak_gflops_float32": 10.0},
        "memory": {"bandwidth_gb_per_s": 2.0}, "kernel": {"launch_us": 3.0},
    }  # fmt: skip
    for section, values in sections.items():
        found[section] = {**found.get(section, {}), **values}
    keys = [f"{section}.{key}" for section, values in found.items() if isinstance(values, dict) for key in values]
    return {**found, "sources": {key: "made up" for key in keys if key != "compute.threads"}}


def device(**sections: dict[str, Any]) -> Device:
    return Device.from_json(plain(**sections), "test")


def saved(folder: Path, **sections: dict[str, Any]) -> str:
    path = folder / "device.json"
    path.write_text(json.dumps({"device": plain(**sections)}))
    return str(path)


# -- one kernel -------------------------------------------------------------------------------------------------------


def test_by_hand() -> None:
    # 578,000 operations at 10 per nanosecond; 26,000 bytes at 2 per nanosecond
    time = kernel_time(CONV, device())
    assert (time.launch, time.compute, time.bandwidth) == pytest.approx((3.0, 57.8, 13.0))
    assert time.total == pytest.approx(60.8)
    assert time.bound == "compute"
    half = kernel_time(CONV, device(efficiency={"conv": 0.5, "depthwise": 0.1}))
    assert half.compute == pytest.approx(2 * 57.8)
    assert kernel_time(CONV, device(compute={"peak_gflops_float32": 1000.0})).bound == "bandwidth"
    assert kernel_time(CONV, device(kernel={"launch_us": 100.0})).bound == "overhead"


def test_the_cache_is_used_where_everything_fits() -> None:
    fast = {"cache_kib": 26, "cache_bandwidth_gb_per_s": 20.0}
    assert kernel_time(CONV, device(memory=fast)).bandwidth == pytest.approx(1.3)
    assert kernel_time(CONV, device(memory={**fast, "cache_kib": 25})).bandwidth == pytest.approx(13.0)
    assert kernel_time(CONV, device(memory={"cache_kib": 26})).bandwidth == pytest.approx(13.0)


def test_batches_read_parameters_once() -> None:
    time = kernel_time(CONV, device(), batch=4)
    assert time.compute == pytest.approx(4 * 57.8)
    assert time.bandwidth == pytest.approx((4 * 14400 + 11600) / 2e3)


def test_other_element_types() -> None:
    narrow = device(compute={"peak_gflops_float32": 10.0, "peak_gops_int8": 40.0})
    time = kernel_time(CONV, narrow, dtype="int8")
    assert (time.compute, time.bandwidth) == pytest.approx((57.8 / 4, 13.0 / 4))
    quantised = replace(CONV, dtype="uint8")
    assert kernel_time(quantised, narrow).compute == pytest.approx(57.8 / 4)
    assert kernel_time(quantised, narrow).bandwidth == pytest.approx(13.0)  # its bytes are those of uint8 already


def test_element_wise_efficiency_is_one_of_bandwidth() -> None:
    add = replace(CONV, kind="elementwise", macs=0, flops=2000, weight_bytes=0, channels=None)
    time = kernel_time(add, device(efficiency={"elementwise": 0.5}))
    assert (time.compute, time.bandwidth) == pytest.approx((0.2, 14400 / 1e3))


@pytest.mark.parametrize(
    ("channels", "block", "factor"),
    [
        ((16, 20), None, 1.0),
        ((16, 20), 8, 24 / 20),
        ((16, 20), 16, 32 / 20),
        ((3, 16), 16, 1.0),  # fewer than a block: read as they are
        ((17, 16), 16, 32 / 17),
        ((1, 20), 16, 32 / 20),  # depthwise
        (None, 16, 1.0),
    ],
)
def test_channels_are_rounded_up_to_blocks(channels: tuple[int, int] | None, block: int | None, factor: float) -> None:
    kernel = replace(CONV, channels=channels, macs=10_000)
    assert padded_macs(kernel, block) == pytest.approx(10_000 * factor, abs=1)


# -- networks ---------------------------------------------------------------------------------------------------------


def narrow_net(channels: int) -> Graph:
    net = Net("narrow")
    x = net.op("Relu", net.conv(net.input("image", 3, 16, 16), 3, channels))
    return from_model(net.model(net.classifier(net.conv(x, channels, channels), channels, 5), 5))


def test_time_grows_with_channels_and_in_steps_of_a_block(tmp_path: Path) -> None:
    path = saved(tmp_path, kernel={"channel_block": 8}, memory={"bandwidth_gb_per_s": 1000.0})
    model = make("roofline", device=path)
    assert model.channel_block() == 8
    totals = [model.cost(narrow_net(channels)).total for channels in range(8, 33)]
    assert all(after >= before for before, after in pairwise(totals))
    assert totals[8] == pytest.approx(totals[1], rel=0.02)  # 16 and 9 channels: the same blocks
    assert totals[9] > 1.3 * totals[8]


def test_a_kernels_time_stands_at_its_last_node(tmp_path: Path) -> None:
    graph = graph_of(CHAIN)
    model = make("roofline", device=saved(tmp_path, kernel={"call_us": 50.0}))
    cost = model.cost(graph)
    assert set(cost.nodes) == {node.name for node in graph.nodes}
    assert {name for name, time in cost.nodes.items() if time} == {"relu1", "relu2", "relu3", "pool", "fc"}
    assert set(cost.bounds) == {"relu1", "relu2", "relu3", "pool", "fc"}
    assert model.overhead() == pytest.approx(0.05)
    assert cost.total == pytest.approx(sum(cost.nodes.values()) + 0.05)
    assert cost.conditions["device"] == "a test"
    assert "efficiency.conv = 1" in cost.conditions["assumed"]
    first, *_ = kernels(graph)
    expected = kernel_time(first, device(kernel={"call_us": 50.0})).total
    assert cost.nodes["relu1"] * 1e3 == pytest.approx(expected)


def test_operators_without_a_rule_are_named(tmp_path: Path) -> None:
    graph = graph_of("""
    <ir_version: 8, opset_import: ["": 17, "somebody": 1]>
    custom (float[N, 4] x) => (float[N, 3] scores)
    <float[4, 3] w>
    {
        [m] m = MatMul(x, w)
        [odd] scores = somebody.Odd(m)
    }
    """)
    cost = make("roofline", device=saved(tmp_path)).cost(graph)
    assert cost.unknown == (("odd", "Odd"),)
    assert cost.nodes["odd"] == 0
    assert cost.nodes["m"] > 0


def test_settings() -> None:
    with pytest.raises(OptionError, match=r"(?s)no device is given.*eexform costs --device"):
        make("roofline")
    with pytest.raises(OptionError, match="device 'rpi4' has no peak for int8"):
        make("roofline", device="rpi4", dtype="int8")
    with pytest.raises(OptionError, match="dtype: 'int7' is not known"):
        make("roofline", device="rpi4", dtype="int7")
    with pytest.raises(OptionError, match="batch: 0 is less than 1"):
        make("roofline", device="rpi4", batch=0)


@pytest.mark.parametrize("name", ["cortex-m4", "rpi5", "xeon", "a100"])
def test_every_network_of_the_zoo_has_a_time(name: str) -> None:
    model = make("roofline", device=name)
    for network in ("resnet_a", "mobilenet_v3", "swin", "bert", "kws_gru"):
        cost = model.cost(doors.graph(network, "onnx"))
        assert cost.total > 0
        assert not cost.unknown


# MLPerf Tiny v1.0, closed division, STMicroelectronics: inferences per second with int8 and X-CUBE-AI 7.3
# (https://github.com/mlcommons/tiny_results_v1.0). The devices' efficiencies come from the first two.
@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "image_classification", "keyword_spotting"), [("cortex-m4", 4.407, 13.323), ("cortex-m7", 18.401, 59.667)]
)
def test_microcontrollers_as_measured(
    name: str, image_classification: float, keyword_spotting: float, shared: Path
) -> None:
    model = make("roofline", device=name, dtype="int8")
    for file, per_second in (("ic_resnet8_cifar10", image_classification), ("kws_dscnn", keyword_spotting)):
        found = model.cost(load(shared / "models" / f"{file}.onnx")).total
        assert found == pytest.approx(1e3 / per_second, rel=0.08)


def test_a_network_that_no_figure_was_derived_from() -> None:
    """Visual wake words of the same round, 4.339 per second: MobileNet v1 x 0.25 on 96 x 96 pixels."""
    net = Net("vww")
    x = net.conv_bn_relu(net.input("image", 3, 96, 96), 3, 8, stride=2)
    before = 8
    widths = [(16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), *[(128, 1)] * 5, (256, 2), (256, 1)]
    for width, stride in widths:
        x = net.conv_bn_relu(x, before, before, stride=stride, group=before)
        x = net.conv_bn_relu(x, before, width, kernel=1)
        before = width
    graph = from_model(net.model(net.classifier(x, before, 2), 2))
    assert make("macs").cost(graph).total == pytest.approx(7.49e6, rel=0.01)
    found = make("roofline", device="cortex-m4", dtype="int8").cost(graph).total
    assert found == pytest.approx(1e3 / 4.339, rel=0.15)


# -- routing ----------------------------------------------------------------------------------------------------------

CROSSING = Crossing("site", Held((16, 8, 8)), (Held((16, 8, 8)), Held((4, 8, 8))), 10)


def test_routing_as_the_device_says(tmp_path: Path) -> None:
    figures = {
        "decision_us": 10.0, "decision_us_per_class": 0.5, "decision_us_per_kib": 2.0,
        "onward_us": 20.0, "onward_us_per_kib": 3.0,
    }  # fmt: skip
    found = make("roofline", device=saved(tmp_path, routing=figures)).routing(graph_of(CHAIN), CROSSING)
    assert found.decision == pytest.approx((10 + 5 + 2 * 4) / 1e3)
    assert found.onward == pytest.approx((20 + 3 * 5) / 1e3)


def test_a_call_decides_once_for_a_batch(tmp_path: Path) -> None:
    figures = {"decision_us": 10.0, "decision_us_per_class": 0.5, "onward_us": 20.0, "onward_us_per_kib": 3.0}
    path = saved(tmp_path, routing=figures)
    found = make("roofline", device=path, batch=4).routing(graph_of(CHAIN), CROSSING)
    assert found.decision == pytest.approx((10 / 4 + 5) / 1e3)
    assert found.onward == pytest.approx((20 / 4 + 3 * 5) / 1e3)


def test_derived_routing_is_what_lowering_adds(tmp_path: Path) -> None:
    found = make("roofline", device=saved(tmp_path)).routing(graph_of(CHAIN), CROSSING)
    kinds = added()
    assert kinds.decision >= 4  # confidence, comparison, branch
    assert kinds.per_value == 1
    scores, live = 2 * 4 * 10, 4 * (16 * 64 + 4 * 64)
    assert found.decision * 1e3 == pytest.approx(3.0 * kinds.decision + kinds.decision * scores / 2e3)
    onward = 3.0 * (kinds.onward + 2) + (kinds.onward * scores + 2 * live) / 2e3
    assert found.onward * 1e3 == pytest.approx(onward)


def test_paths_pay_for_routing() -> None:
    graph = graph_of(CHAIN)
    sites = [site for site in find_sites(graph).sites if site.value == "r1"]
    model = make("roofline", device="a100")
    costs = path_costs(model, graph, sites, {"r1": [HeadSpec.parse("none/avg")]})
    early, final = costs.path([("r1", "none/avg")])
    assert early > costs.prefix["r1"] + costs.head["r1", "none/avg"]
    assert final > costs.trunk + costs.head["r1", "none/avg"]


# -- fitting ----------------------------------------------------------------------------------------------------------

TRUTH = {
    "compute": {"peak_gflops_float32": 120.0},
    "memory": {"bandwidth_gb_per_s": 40.0},
    "kernel": {"launch_us": 2.5, "channel_block": 16},
    "efficiency": {"conv": 1.0, "depthwise": 0.2, "matmul": 0.5, "elementwise": 0.5},
}


def measured(noise: float, networks: tuple[str, ...]) -> list[tuple[Kernel, float]]:
    true, random = device(**TRUTH), np.random.default_rng(0)
    found = [kernel for name in networks for kernel in kernels(doors.graph(name, "onnx"))]
    for scale in (4, 16, 64):  # the zoo's are tiny: the same kernels with more work
        found += [
            replace(k, macs=k.macs * scale**2, read_bytes=k.read_bytes * scale, write_bytes=k.write_bytes * scale,
                    weight_bytes=k.weight_bytes * scale, flops=k.flops * scale)
            for k in found[: len(found) // scale]
        ]  # fmt: skip
    return [
        (kernel, kernel_time(kernel, true).total * float(np.exp(noise * random.standard_normal()))) for kernel in found
    ]


NETWORKS = ("resnet_a", "mobilenet_v2", "vit", "convnext")


def test_fitting_finds_the_figures_again() -> None:
    pairs = measured(0.05, NETWORKS)
    random = np.random.default_rng(1)
    odd = random.choice(len(pairs), size=len(pairs) // 20, replace=False)  # some measurements went wrong
    for place in odd:
        pairs[place] = (pairs[place][0], pairs[place][1] * 20)
    found = Device.from_json(fit(pairs, title="x", call_us=7.0), "fit")
    assert found.compute.peak_gflops_float32 == pytest.approx(120, rel=0.15)
    assert found.kernel.launch_us == pytest.approx(2.5, rel=0.15)
    assert found.kernel.call_us == 7.0
    assert found.kernel.channel_block == 16
    assert found.efficiency.depthwise == pytest.approx(0.2, rel=0.3)
    assert found.memory.bandwidth_gb_per_s * found.efficiency.elementwise == pytest.approx(20, rel=0.3)
    assert all("calibrated" in source for source in found.sources.values())
    for name in ("resnet_b", "mobilenet_v3", "swin"):  # others than those it was fitted to
        for kernel in kernels(doors.graph(name, "onnx")):
            assert kernel_time(kernel, found).total == pytest.approx(
                kernel_time(kernel, device(**TRUTH)).total, rel=0.3
            )


def test_one_odd_kernel_does_not_speak_for_its_class() -> None:
    pairs = measured(0.0, ("resnet_a",))
    lone = next(kernel for kernel, _ in pairs if kernel.kind == "elementwise")
    rest = [(kernel, us) for kernel, us in pairs if kernel.kind != "elementwise"]
    true = device(**TRUTH)
    found = Device.from_json(fit([*rest, (lone, 10 * kernel_time(lone, true).total)], title="x"), "fit")
    rate = found.memory.bandwidth_gb_per_s * found.efficiency.elementwise
    assert rate > 3, "the only pooling of a small network once made additions thirty times too dear"


def test_fitted_devices_are_valid_whatever_was_measured() -> None:
    for networks in (("kws_gru",), ("cnn",), ("bert",)):
        content = fit(measured(0.3, networks), routing=RoutingFit(1.0, 0.1, 2.0, 0.2), threads=2, title="x")
        found = Device.from_json(json.loads(json.dumps(content)), "fit")
        assert found.compute.threads == 2
        assert found.routing is not None
        assert found.routing.onward_us_per_kib == 0.2


def test_too_few_kernels_are_refused() -> None:
    with pytest.raises(OptionError, match="3 measured kernels are too few"):
        fit(measured(0.0, ("cnn",))[:3])


def test_times_of_nodes_go_to_their_kernels() -> None:
    graph = graph_of(CHAIN)
    pairs, rest = onto_kernels(graph, {"conv1": 5.0, "relu1": 1.0, "pool": 3.0, "flat": 0.5, "fc": 2.0})
    assert [(kernel.name, us) for kernel, us in pairs] == [("relu1", 6.0), ("pool", 3.5), ("fc", 2.0)]
    assert rest == 0


def test_the_file_of_a_fitted_device_is_a_device(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"format": 1, "device": fit(measured(0.1, ("resnet_a",)), title="mine")}))
    cost = make("roofline", device=str(path)).cost(doors.graph("resnet_a", "onnx"))
    assert cost.conditions["device"] == "mine"
    assert cost.total > 0
