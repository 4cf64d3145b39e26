"""Energy: counted by hand, both ways, and against a published measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eexform.cost_models import Crossing, Held, exit_costs, make
from eexform.cost_models._added import added
from eexform.cost_models._kernels import kernels
from eexform.errors import OptionError
from eexform.frontends.onnx import load
from eexform.passes import make as make_pass
from tests.passes.helpers import CHAIN, graph_of
from tests.zoo import doors

CROSSING = Crossing("site", Held((16, 8, 8)), (Held((16, 8, 8)),), 10)
FIGURES = {"pj_per_mac_float32": 5.0, "pj_per_byte_ram": 200.0}


def saved(folder: Path, energy: dict[str, float], memory: dict[str, float] | None = None) -> str:
    content: dict[str, Any] = {
        "name": "test", "title": "a test", "compute": {"peak_gflops_float32": 10.0},
        "memory": {"bandwidth_gb_per_s": 2.0, **(memory or {})}, "energy": energy,
    }  # fmt: skip
    keys = [f"{section}.{key}" for section, values in content.items() if isinstance(values, dict) for key in values]
    path = folder / "device.json"
    path.write_text(json.dumps({"device": {**content, "sources": dict.fromkeys(keys, "made up")}}))
    return str(path)


def test_operations_and_bytes_by_hand(tmp_path: Path) -> None:
    graph = graph_of(CHAIN)
    cost = make("energy", device=saved(tmp_path, FIGURES)).cost(graph)
    conv, *others = kernels(graph)
    moved = 4 * (2 * 64 + 3 * 64 + 3 * 2 * 9)
    assert cost.nodes["relu1"] == pytest.approx((5 * (conv.macs + conv.flops / 2) + 200 * moved) * 1e-9)
    assert cost.total == pytest.approx(sum(cost.nodes.values()))
    assert {name for name, value in cost.nodes.items() if value} == {"relu1", *(kernel.name for kernel in others)}


def test_what_fits_into_the_cache_comes_from_it(tmp_path: Path) -> None:
    graph = graph_of(CHAIN)
    ram = make("energy", device=saved(tmp_path, FIGURES)).cost(graph)
    figures = {**FIGURES, "pj_per_byte_cache": 2.0}
    cache = make("energy", device=saved(tmp_path, figures, {"cache_kib": 64})).cost(graph)
    small = make("energy", device=saved(tmp_path, figures, {"cache_kib": 1})).cost(graph)
    work = sum(5 * (kernel.macs + kernel.flops / 2) for kernel in kernels(graph)) * 1e-9
    assert cache.total - work == pytest.approx((ram.total - work) / 100)
    assert cache.total < small.total < ram.total


def test_element_types(tmp_path: Path) -> None:
    graph = graph_of(CHAIN)
    path = saved(tmp_path, {**FIGURES, "pj_per_mac_int8": 1.0})
    wide, narrow = make("energy", device=path).cost(graph), make("energy", device=path, dtype="int8").cost(graph)
    assert wide.total / 5 < narrow.total < wide.total / 4
    with pytest.raises(OptionError, match=r"no energy per operation in float16: say dtype=float32 or dtype=int8"):
        make("energy", device=path, dtype="float16")


def test_power_times_time(tmp_path: Path) -> None:
    graph = graph_of(CHAIN)
    path = saved(tmp_path, {"power_w": 2.0})
    time = make("roofline", device=path)
    model = make("energy", device=path, by="power")
    assert model.cost(graph).total == pytest.approx(2 * time.cost(graph).total)
    assert model.cost(graph).conditions["power_w"] == 2.0
    assert make("energy", device=path, by="power", power_w=3.0).cost(graph).total == pytest.approx(
        3 * time.cost(graph).total
    )
    routing, expected = model.routing(graph, CROSSING), time.routing(graph, CROSSING)
    assert (routing.decision, routing.onward) == pytest.approx((2 * expected.decision, 2 * expected.onward))
    with_exit = make_pass(
        "insert_exits", sites=["r1"], heads={"r1": "none/avg"}, thresholds={"r1": 0.5}, untrained=True
    )(graph).graph
    assert exit_costs(with_exit, model) == pytest.approx([2 * value for value in exit_costs(with_exit, time)])


def test_power_times_a_measured_time() -> None:
    model = make("energy", by="power", power_w=10.0, time="latency_ort:repeats=3,warmup=1")
    assert model.measured
    assert not model.additive
    cost = model.cost(graph_of(CHAIN))
    assert cost.total == pytest.approx(10 * cost.conditions["median_ms"])
    assert cost.conditions["time"] == "latency_ort"


def test_routing_of_operations_is_bytes(tmp_path: Path) -> None:
    found = make("energy", device=saved(tmp_path, FIGURES)).routing(graph_of(CHAIN), CROSSING)
    decision, onward = added().bytes(CROSSING)
    assert (found.decision, found.onward) == pytest.approx((200e-9 * decision, 200e-9 * onward))


def test_exactly_one_way(tmp_path: Path) -> None:
    path = saved(tmp_path, FIGURES)
    for settings, message in (
        ({"by": "guess"}, "by: 'guess' is no way to count energy"),
        ({"power_w": 3.0}, "power_w and time belong to by=power"),
        ({"time": "roofline:device=rpi4"}, "power_w and time belong to by=power"),
        ({"by": "power"}, "no power is known; give power_w=WATTS"),
        ({"by": "power", "power_w": 3.0, "time": "macs"}, "time: 'macs' gives MACs, not ms"),
        ({"by": "power", "power_w": -1.0}, "power_w: -1.0 is less than 0"),
        ({"dtype": "int8"}, "no energy per operation in int8: say dtype=float32"),
    ):
        with pytest.raises(OptionError, match=message):
            make("energy", device=path, **settings)
    with pytest.raises(OptionError, match="no device is given"):
        make("energy")
    with pytest.raises(OptionError, match="has no 'energy"):
        make("energy", device=saved(tmp_path, {"pj_per_mac_float32": 5.0}))
    with pytest.raises(OptionError, match="use by=power"):
        make("energy", device="cortex-m4")


@pytest.mark.parametrize("name", ["rpi4", "rpi5", "xeon"])
def test_every_network_of_the_zoo_has_an_energy(name: str) -> None:
    model = make("energy", device=name)
    assert all(model.cost(doors.graph(network, "onnx")).total > 0 for network in ("resnet_a", "swin", "bert"))


@pytest.mark.shared_data
def test_a_microcontroller_as_measured(shared: Path) -> None:
    """MLPerf Tiny v1.0, image classification: 10.68 mJ and 8.71 mJ per inference (see the devices' sources)."""
    graph = load(shared / "models" / "ic_resnet8_cifar10.onnx")
    for name, measured in (("cortex-m4", 10.68), ("cortex-m7", 8.71)):
        found = make("energy", device=name, by="power", dtype="int8").cost(graph)
        assert found.total == pytest.approx(measured, rel=0.08)
