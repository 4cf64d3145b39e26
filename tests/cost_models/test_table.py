"""The cost model table: what it finds, interpolates, flags and refuses, on tables written by hand."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from eexform.cost_models import Crossing, Held, _ort_kernels, make, path_costs
from eexform.cost_models._grid import planned
from eexform.cost_models._interpolate import Entry, Estimate, Lookup
from eexform.cost_models._kernels import kernels
from eexform.cost_models._prices import CLASSES, Prices, Residual, surcharges
from eexform.cost_models._table_file import read_table
from eexform.errors import OptionError
from eexform.heads import HeadSpec
from eexform.ir.extract import extract
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from tests.passes.helpers import CHAIN, graph_of


def rows(graph: Graph, us: float = 10.0, way: str = "fused") -> list[dict[str, Any]]:
    """An entry per kernel: the first takes ``us``, each further one twice as long."""
    found = kernels(graph) if way == "fused" else _ort_kernels.kernels(graph)
    entries: dict[Any, dict[str, Any]] = {}
    for kernel in found:
        key = (kernel.op, kernel.variant, kernel.sizes)
        entry = {"op": kernel.op, "variant": kernel.variant, "sizes": list(kernel.sizes)}
        entries.setdefault(key, {**entry, "us": us * 2 ** len(entries)})
    return list(entries.values())


def written(path: Path, table: Any, **more: Any) -> str:
    path.write_text(json.dumps({"format": 1, "kernels": "fused", "table": table, **more}))
    return str(path)


# -- known kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["fused", "onnxruntime"])
def test_known_kernels_have_their_time_and_add_up(tmp_path: Path, way: str) -> None:
    graph = graph_of(CHAIN)
    table = rows(graph, way=way)
    runtime = {"call_us": 7.0, "between_us": {"conv": 0.5, "matmul": 0.25}}
    model = make("table", device=written(tmp_path / "t.json", table, kernels=way, runtime=runtime))
    cost = model.cost(graph)
    found = kernels(graph) if way == "fused" else _ort_kernels.kernels(graph)
    times = {(row["op"], row["variant"], tuple(row["sizes"])): row["us"] for row in table}
    more = {"conv": 0.5, "matmul": 0.25}
    expected = sum(times[k.op, k.variant, k.sizes] + more.get(k.kind, 0.0) for k in found)
    assert cost.total == pytest.approx((expected + 7.0) / 1e3)
    assert cost.total == pytest.approx(sum(cost.nodes.values()) + model.overhead())
    assert set(cost.nodes) == {node.name for node in graph.nodes}
    assert cost.unknown == ()
    assert cost.estimated == ()
    assert cost.conditions["kernels"] == way
    assert cost.conditions["entries"] == len(table)


def test_times_that_stand_there_twice_are_averaged() -> None:
    lookup = Lookup([Entry("Relu", "", (4,), 1.0), Entry("Relu", "", (4,), 3.0)])
    found = lookup.estimate("Relu", "", (4,))
    assert found is not None
    assert found.us == 2.0
    assert found.why is None


def test_operators_that_the_table_does_not_know_are_named_and_not_counted(tmp_path: Path) -> None:
    graph = graph_of(CHAIN)
    table = [row for row in rows(graph) if row["op"] != "GlobalAveragePool"]
    missing = [kernel for kernel in kernels(graph) if kernel.op == "GlobalAveragePool"]
    assert missing
    whole = make("table", device=written(tmp_path / "all.json", rows(graph))).cost(graph)
    cost = make("table", device=written(tmp_path / "part.json", table)).cost(graph)
    assert cost.unknown == tuple((kernel.name, kernel.op) for kernel in missing)
    assert cost.nodes[missing[0].name] == 0.0
    assert cost.total < whole.total


def test_paths_are_priced_with_it(tmp_path: Path) -> None:
    graph = graph_of(CHAIN)
    device = written(tmp_path / "t.json", rows(graph), runtime={"call_us": 100.0})
    model = make("table", device=device)
    sites = find_sites(graph).sites
    found = path_costs(model, graph, sites, {site.value: [HeadSpec.parse("none/avg")] for site in sites})
    assert found.trunk == pytest.approx(model.cost(graph).total)
    first, *_, last = found.path([(site.value, "none/avg") for site in sites])
    assert model.overhead() < first < last


# -- between and beyond ----------------------------------------------------------------------------------------------


def power_law(sizes: tuple[int, ...]) -> float:
    return 0.01 * sizes[0] ** 0.7 * sizes[1] ** 1.2 * sizes[2] ** 0.9


def test_a_power_law_is_interpolated_exactly() -> None:
    grid = list(itertools.product((8, 32, 64), (8, 64), (16, 256)))
    lookup = Lookup([Entry("Conv", "3x3", sizes, power_law(sizes)) for sizes in grid])
    for sizes in [(8, 8, 16), (16, 16, 64), (33, 9, 200), (64, 64, 256), (12, 60, 17)]:
        found = lookup.estimate("Conv", "3x3", sizes)
        assert found is not None
        assert found.why is None
        assert found.us == pytest.approx(power_law(sizes), rel=0.01)


def test_the_launch_does_not_scale() -> None:
    sizes = [(2**power,) for power in range(4, 11)]
    lookup = Lookup([Entry("Relu", "", each, 5.0 + 0.01 * each[0]) for each in sizes], launch_us=5.0)
    for size in (24, 100, 700):
        found = lookup.estimate("Relu", "", (size,))
        assert found is not None
        assert found.us == pytest.approx(5.0 + 0.01 * size, rel=0.002)


def test_one_dimension_that_never_varied_is_outside_when_it_does() -> None:
    lookup = Lookup([Entry("Conv", "3x3", (8, 8, 16), 1.0), Entry("Conv", "3x3", (64, 8, 16), 8.0)])
    inside, outside = (lookup.estimate("Conv", "3x3", sizes) for sizes in ((16, 8, 16), (16, 16, 16)))
    assert inside is not None
    assert inside.why is None
    assert inside.us == pytest.approx(2.0, rel=0.01)
    assert outside is not None
    assert outside.why is not None


def test_beyond_the_grid_is_scaled_and_said() -> None:
    lookup = Lookup([Entry("MatMul", "", (1, size, size), size * size / 100) for size in (16, 32, 64)])
    found = lookup.estimate("MatMul", "", (1, 128, 128))
    assert found is not None
    assert found.us == pytest.approx(128 * 128 / 100)
    assert (
        found.why == "sizes [1, 128, 128] are outside the table's [1, 16, 16] to [1, 64, 64]; scaled from [1, 64, 64]"
    )


def test_another_variant_is_scaled_by_its_window_and_said() -> None:
    entries = [Entry("Conv", f"float32 {side}x{side} p1", (16, 16, 64), side * side) for side in (1, 3)]
    found = Lookup(entries).estimate("Conv", "float32 5x5 p2", (16, 16, 64))
    assert found is not None
    assert found.us == pytest.approx(25.0)
    assert found.why == "no entry of Conv (float32 5x5 p2); scaled from (float32 3x3 p1) [16, 16, 64]"


def test_nothing_gets_faster_for_its_size_than_what_was_seen() -> None:
    entries = [Entry("Conv", "1x1", (2, 2, 1), 0.4), Entry("Conv", "3x3", (64, 64, 64), 36.0)]
    found = Lookup(entries, launch_us=0.2).estimate("Conv", "1x1", (64, 64, 64))
    assert found is not None
    assert found.us >= 36.0 / 9


def test_what_is_outside_is_in_the_cost(tmp_path: Path) -> None:
    graph = graph_of(CHAIN)
    table = rows(graph)
    moved = [{**row, "sizes": [2 * size for size in row["sizes"]]} if row["op"] == "Gemm" else row for row in table]
    cost = make("table", device=written(tmp_path / "t.json", moved)).cost(graph)
    (name, why) = cost.estimated[0]
    assert [name] == [kernel.name for kernel in kernels(graph) if kernel.op == "Gemm"]
    assert "outside the table's" in why
    assert cost.nodes[name] > 0
    assert cost.unknown == ()


def test_windows_of_fused_tables_are_scaled_by_their_areas_too() -> None:
    entries = [Entry("Conv", "k1x1 s1x1 d1x1 float32", (16, 16, 8, 8), 2.0)]
    found = Lookup(entries).estimate("Conv", "k3x3 s1x1 d1x1 float32", (16, 16, 8, 8))
    assert found is not None
    assert found.us == pytest.approx(9 * 2.0)
    assert found.why is not None


def test_a_kernel_of_which_nothing_could_be_measured_spoils_nothing() -> None:
    lookup = Lookup([Entry("Relu", "", (size,), us) for size, us in ((4, 0.0), (64, 0.1), (4096, 6.0))])
    assert lookup.estimate("Relu", "", (4,)) == Estimate(0.0)
    for size in (0, 1, 5, 1000, 10**6):
        found = lookup.estimate("Relu", "", (size,))
        assert found is not None
        assert math.isfinite(found.us)
        assert found.us >= 0


# -- figures beside kernels ------------------------------------------------------------------------------------------


def test_surcharges_are_found_again() -> None:
    true = {"conv": 0.3, "depthwise": 0.1, "matmul": 0.05, "elementwise": 0.2}
    counts = [dict(zip(CLASSES, numbers, strict=True)) for numbers in itertools.product((0, 9, 40), repeat=4)]
    found = surcharges(Residual(sum(true[k] * n for k, n in each.items()), each, 12.0) for each in counts)
    assert found == pytest.approx(true, rel=0.05)


def test_one_network_gives_all_classes_one_surcharge() -> None:
    found = surcharges([Residual(2.0, {"conv": 20}, 50.0)])
    assert found == pytest.approx(dict.fromkeys(CLASSES, 0.1))
    assert set(surcharges([Residual(-2.0, {"conv": 20}, 50.0)]).values()) == {0.0}
    assert set(surcharges([]).values()) == {0.0}


def test_parameters_beyond_the_cache_cost_fetching() -> None:
    kernel = next(kernel for kernel in kernels(graph_of(CHAIN)) if kernel.weight_bytes)
    curve = [[100.0, 0.0], [1000.0, 0.0], [2000.0, 0.5]]
    prices = Prices.of(Lookup([Entry("Conv", "", (1,), 1.0)]), {"weights": curve})
    kib = kernel.weight_bytes / 1024
    assert prices.fetching_us(kernel, 50.0) == prices.fetching_us(kernel, 900.0) == 0.0
    assert prices.fetching_us(kernel, 1500.0) == pytest.approx(0.25 * kib)
    assert prices.fetching_us(kernel, 9000.0) == pytest.approx(0.5 * kib)


def test_routing_is_what_the_file_says(tmp_path: Path) -> None:
    graph = graph_of(CHAIN)
    crossing = Crossing("r1", Held((3, 8, 8)), (Held((3, 8, 8)), Held((64, 4, 4))), 10)
    routing = {"decision_us": 4.0, "decision_us_per_class": 0.1, "onward_us": 2.0, "onward_us_per_kib": 1.0}
    model = make("table", device=written(tmp_path / "a.json", rows(graph), runtime={"routing": routing}))
    found = model.routing(graph, crossing)
    assert found.decision == pytest.approx((4.0 + 10 * 0.1) / 1e3)
    assert found.onward == pytest.approx((2.0 + (3 * 64 + 64 * 16) * 4 / 1024) / 1e3)
    silent = make("table", device=written(tmp_path / "b.json", rows(graph)))
    assert silent.routing(graph, crossing).decision == 0.0
    assert any("routing" in warning for warning in silent.cost(graph).conditions["warnings"])


def test_another_machine_is_a_warning(tmp_path: Path) -> None:
    graph = graph_of(CHAIN)
    runtime = {"machine": {"device": "A Processor of Long Ago", "onnxruntime": "0.1"}, "threads": 1}
    cost = make("table", device=written(tmp_path / "t.json", rows(graph), runtime=runtime)).cost(graph)
    said = " ".join(cost.conditions["warnings"])
    assert "A Processor of Long Ago" in said
    assert "onnxruntime '0.1'" in said
    assert cost.conditions["threads"] == 1


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_table_in_csv(tmp_path: Path) -> None:
    graph = graph_of(CHAIN)
    lines = ["op,variant,sizes,us"]
    lines += [f"{r['op']},{r['variant']},{'x'.join(map(str, r['sizes']))},{r['us']}" for r in rows(graph)]
    (tmp_path / "phone.csv").write_text("\n".join(lines) + "\n")
    expected = make("table", device=written(tmp_path / "t.json", rows(graph))).cost(graph).total
    assert make("table", device=str(tmp_path / "phone.csv")).cost(graph).total == pytest.approx(expected)
    beside = written(tmp_path / "beside.json", "phone.csv", runtime={"call_us": 1000.0})
    assert make("table", device=beside).cost(graph).total == pytest.approx(expected + 1.0)


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    graph = graph_of(CHAIN)
    path = tmp_path / "t.json"
    model = make("table", device=written(path, rows(graph)))
    first = model.cost(graph).total
    written(path, rows(graph, us=1000.0))
    assert model.cost(graph).total == pytest.approx(100 * first)


GOOD = {"op": "Relu", "variant": "float32", "sizes": [4], "us": 1.0}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "there is no 'table' in it"),
        ({"format": 2, "table": [GOOD]}, "written by a newer eexform"),
        ({"table": [GOOD], "kernels": "tvm"}, "neither 'onnxruntime' nor 'fused'"),
        ({"table": 3}, "expected a list of kernels or the name of a CSV"),
        ({"table": []}, "the table is empty"),
        ({"table": [GOOD, "x"]}, r"table\[1\]: expected op, variant, sizes and us"),
        ({"table": [{**GOOD, "op": 3}]}, "op 3 and variant"),
        ({"table": [{**GOOD, "sizes": [0]}]}, r"sizes \[0\] must be whole numbers"),
        ({"table": [{**GOOD, "sizes": []}]}, "must be whole numbers"),
        ({"table": [{**GOOD, "sizes": [1.5]}]}, "must be whole numbers"),
        ({"table": [{**GOOD, "sizes": [10**400]}]}, "must be whole numbers"),
        ("[" * 100_000, "cannot be read as JSON"),
        ({"table": [{**GOOD, "us": -1.0}]}, "us -1.0 is no time"),
        ({"table": [{**GOOD, "us": "fast"}]}, "us 'fast' is no time"),
        ({"table": [{**GOOD, "spread_us": None}]}, "spread_us None"),
        ({"table": [GOOD], "runtime": 3}, "runtime: expected names and values"),
        ({"table": [GOOD], "runtime": {"call_us": "x"}}, "runtime.call_us: 'x'"),
        ({"table": [GOOD], "runtime": {"between_us": 3}}, "runtime.between_us"),
        ({"table": [GOOD], "runtime": {"weights": [[1]]}}, "runtime.weights"),
        ({"table": [GOOD], "runtime": {"routing": {"speed": 1}}}, "runtime.routing is damaged"),
        ({"table": [GOOD], "finished": False}, "its calibration was interrupted; finish it"),
        ({"table": "nowhere.csv"}, "nowhere.csv: no such file"),
        ({"table": "../nowhere.csv"}, "is no name; a CSV lies in the same folder"),
        ({"table": "/etc/passwd"}, "is no name"),
        ({"table": [{**GOOD, "us": 10**400}]}, "is no time"),
        (
            {"table": [GOOD], "runtime": {"routing": {"decision_us": -1.0}}},
            "runtime.routing.decision_us: -1.0",
        ),
        ({"table": [GOOD], "runtime": {"routing": {"decision_us": 10**400}}}, "runtime.routing is damaged"),
        ({"table": [GOOD], "device": {"name": "x"}}, r"\[compute\] must be a table"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: Any, says: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(OptionError, match=says) as caught:
        make("table", device=str(path)).cost(graph_of(CHAIN))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("op,variant,us\nRelu,,1", "no column 'sizes'"),
        ("op,variant,sizes,us\nRelu,,4xa,1", "line 2"),
        ("op,variant,sizes,us\nRelu,,4,1\nRelu,,8,quick", "line 3"),
        ("op,variant,sizes,us\nRelu,,4,nan", "us nan is no time"),
        ("\n", "no column 'op'"),
    ],
)
def test_damaged_csv_is_refused(tmp_path: Path, lines: str, says: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(lines + "\n")
    with pytest.raises(OptionError, match=says):
        read_table(path)


def test_a_csv_from_a_spreadsheet_and_one_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("\ufeffop,variant,sizes,us\r\nRelu,float32,4x5,1.5\r\n".encode())
    assert [row.key for row in read_table(path).rows] == [("Relu", "float32", (4, 5))]
    path.write_text("op,variant,sizes,us\n")
    with pytest.raises(OptionError, match="the table is empty"):
        make("table", device=str(path)).cost(graph_of(CHAIN))
    assert read_table(written(tmp_path / "n.json", [GOOD], runtime=None)).runtime == {}


def test_a_table_must_be_named() -> None:
    with pytest.raises(OptionError, match="device"):
        make("table")
    with pytest.raises(OptionError, match="no table is given"):
        make("table", device="")
    with pytest.raises(OptionError, match="no such file"):
        make("table", device="/nowhere/t.json").cost(graph_of(CHAIN))


def test_interpolation_never_gives_nonsense() -> None:
    lookup = Lookup([Entry("Relu", "", (size,), us) for size, us in ((4, 0.2), (5, 0.2), (4096, 0.2))], launch_us=0.2)
    for size in (4, 60, 4096, 10**9):
        found = lookup.estimate("Relu", "", (size,))
        assert found is not None
        assert math.isfinite(found.us)
        assert found.us > 0


# -- between exits -----------------------------------------------------------------------------------------------------

RESIDUAL = """
<ir_version: 8, opset_import: ["": 17]>
residual (float[N, 3, 8, 8] image) => (float[N, 4] scores)
<float[16, 3, 3, 3] w0, float[16, 16, 3, 3] w1, float[16, 16, 3, 3] w2, float[16, 16, 3, 3] w3, float[4, 16] w4>
{
    [stem] s = Conv<pads = [1, 1, 1, 1]>(image, w0)
    [relus] rs = Relu(s)
    [conv1] c1 = Conv<pads = [1, 1, 1, 1]>(rs, w1)
    [add1] a1 = Add(c1, rs)
    [relu1] r1 = Relu(a1)
    [conv2] c2 = Conv<pads = [1, 1, 1, 1]>(r1, w2)
    [add2] a2 = Add(c2, r1)
    [relu2] r2 = Relu(a2)
    [pool] p = GlobalAveragePool(r2)
    [flat] f = Flatten(p)
    [fc] scores = Gemm<transB = 1>(f, w4)
}
"""


def test_a_branch_is_priced_as_it_is_executed(tmp_path: Path) -> None:
    graph = graph_of(RESIDUAL)
    sites = [site for site in find_sites(graph).sites if site.value == "r1"]
    branch = extract(graph, ["r1"], ["scores"])
    everything = [*_ort_kernels.kernels(graph), *_ort_kernels.kernels(branch)]
    everything += _ort_kernels.kernels(extract(graph, ["image"], ["r1"]))
    entries = {(k.op, k.variant, k.sizes): k for k in everything}
    timed = [{"op": op, "variant": variant, "sizes": list(sizes), "us": 1.0} for op, variant, sizes in entries]
    content = {"format": 1, "kernels": "onnxruntime", "table": timed}
    routing = {"decision_us": 4.0, "decision_us_per_class": 0.0, "onward_us": 2.0, "onward_us_per_kib": 0.0}
    (tmp_path / "t.json").write_text(json.dumps({**content, "runtime": {"routing": routing}}))
    (tmp_path / "bare.json").write_text(json.dumps(content))
    model = make("table", device=str(tmp_path / "t.json"))
    costs = path_costs(model, graph, sites, {site.value: [HeadSpec.parse("none/avg")] for site in sites})
    # every kernel takes a microsecond, so extra time is extra kernels: those that only the branch needs
    kernels, inside = _ort_kernels.kernels(graph), {node.name for node in branch.nodes}
    expected = len(_ort_kernels.kernels(branch)) - sum(kernel.name in inside for kernel in kernels)
    assert costs.between[("r1", "")] == pytest.approx(1e-3 * expected)
    assert expected > 0, "onnxruntime lays values out for convolutions, and a branch begins without that"
    assert set(costs.between) == {("", "r1"), ("r1", "")}
    # a table without such figures knows nothing of branches
    silent = make("table", device=str(tmp_path / "bare.json"))
    heads = {site.value: [HeadSpec.parse("none/avg")] for site in sites}
    assert set(path_costs(silent, graph, sites, heads).between.values()) == {0.0}
    assert path_costs(model, graph, sites, {}).between == {}, "where no head can be there is no branch"
    # energy is power x time, branches included
    energy = make("energy", by="power", power_w=2.0, time=f"table:device={tmp_path / 't.json'}")
    priced = path_costs(energy, graph, sites, {site.value: [HeadSpec.parse("none/avg")] for site in sites})
    assert priced.path([("r1", "none/avg")]) == pytest.approx([2 * ms for ms in costs.path([("r1", "none/avg")])])


def test_what_only_a_branch_executes_is_measured_or_named(tmp_path: Path) -> None:
    graph = graph_of(RESIDUAL)
    sites = [site for site in find_sites(graph).sites if site.value == "r1"]
    heads = {site.value: [HeadSpec.parse("none/avg")] for site in sites}
    behind = {(k.op, k.variant, k.sizes) for k in _ort_kernels.kernels(extract(graph, ["r1"], ["scores"]))}
    operators = planned({"net": graph}).operators
    assert behind <= set(operators), "the grid holds what an exit would make of the trunk"
    own = {(k.op, k.variant, k.sizes) for k in _ort_kernels.kernels(graph)}
    missing = {op for op, *_ in behind} - {op for op, *_ in own}
    assert missing, "a branch executes operators that the whole network does not"
    routing = {"decision_us": 4.0, "decision_us_per_class": 0.0, "onward_us": 2.0, "onward_us_per_kib": 0.0}
    for kept, unknown in ((set(operators), set()), ({key for key in operators if key[0] not in missing}, missing)):
        timed = [{"op": op, "variant": variant, "sizes": list(sizes), "us": 1.0} for op, variant, sizes in kept]
        path = tmp_path / f"{len(unknown)}.json"
        content = {"format": 1, "kernels": "onnxruntime", "table": timed, "runtime": {"routing": routing}}
        path.write_text(json.dumps(content))
        costs = path_costs(make("table", device=str(path)), graph, sites, heads)
        assert unknown <= {op for _, op in costs.unknown}
        assert bool(costs.unknown) == bool(unknown)
