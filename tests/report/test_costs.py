"""ee.cost: parts that add up to the whole, plans priced as the search priced them, predictions judged by a clock."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from rich.console import Console
from rich.text import Text

import eexform as ee
from eexform.cost_models import Cost, CostModel, Crossing, Routing, exit_costs, make
from eexform.errors import OptionError
from eexform.ir.arithmetic import node_macs
from eexform.ir.graph import Graph
from eexform.passes import make as make_pass
from eexform.report import tables_costs
from eexform.report.cost_choice import divided
from eexform.report.costs import cost
from eexform.search.front import Plan, PlanExit
from tests.passes.helpers import CHAIN, graph_of

CONV1, CONV2, CONV3, FC = 64 * 3 * 18, 16 * 6 * 27, 16 * 6 * 54, 24
HEAD = "conv:1x4/avg"
HEAD1, HEAD2 = 64 * 4 * 27 + 16, 16 * 4 * 54 + 16


@dataclass(frozen=True)
class Rough(CostModel):
    """A microsecond per 1000 MACs, at least 0.1; 2 for the call."""

    name: ClassVar[str] = "rough"
    unit: ClassVar[str] = "ms"
    additive: ClassVar[bool] = True

    device: str = "none"

    def cost(self, graph: Graph) -> Cost:
        macs = {node.name: node_macs(node, graph.types) or 0 for node in graph.nodes}
        nodes = {name: max(count / 1e6, 1e-4) for name, count in macs.items()}
        bounds = {name: "compute" if count > 100 else "overhead" for name, count in macs.items()}
        estimated = (("conv1", "window 3x3 is outside the table"),) if "conv1" in macs else ()
        unknown = (("odd", "Odd"),) if "pool" in macs else ()
        return Cost(sum(nodes.values()) + 2e-3, nodes, unknown, estimated, bounds, {"device": self.device})

    def overhead(self) -> float:
        return 2e-3

    def routing(self, graph: Graph, crossing: Crossing) -> Routing:
        return Routing(5e-4 * crossing.classes, 1e-6 * sum(value.bytes for value in crossing.live))


@dataclass(frozen=True)
class Clock(Rough):
    """The same, but as a clock would tell: whole graphs only, and twice as slow."""

    name: ClassVar[str] = "clock"
    additive: ClassVar[bool] = False
    measured: ClassVar[bool] = True

    log: list[str] = field(default_factory=list, compare=False)
    speed: float = 2.0

    def cost(self, graph: Graph) -> Cost:
        self.log.append(graph.final)
        return Cost(self.speed * super().cost(graph).total, conditions={"repeats": 1})

    def overhead(self) -> float:
        return self.speed * super().overhead()

    def routing(self, graph: Graph, crossing: Crossing) -> Routing:
        one = super().routing(graph, crossing)
        return Routing(self.speed * one.decision, self.speed * one.onward)


class Spoken:
    """Progress that is remembered."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.tasks: list[tuple[str, int, int]] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def task(self, label: str, total: int) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def opened() -> Any:
            steps = []

            class Task:
                def advance(self, count: int = 1, note: str = "") -> None:
                    steps.append(count)

            yield Task()
            self.tasks.append((label, total, sum(steps)))

        return opened()


def with_exits(carry: float = 0.0) -> Graph:
    sites = ["r1", "r2"]
    insert = make_pass(
        "insert_exits", sites=sites, heads=dict.fromkeys(sites, HEAD), thresholds=dict.fromkeys(sites, 0.5),
        untrained=True, carry=carry,
    )  # fmt: skip
    return insert(graph_of(CHAIN)).graph


def shown(plain: Mapping[str, Any], width: int = 80, top: int = 10) -> str:
    """What a terminal of this width shows."""
    console = Console(width=width, highlight=False, markup=False, emoji=False, force_terminal=True)
    with console.capture() as captured:
        console.print(tables_costs.cost(plain, top), crop=False)
    return Text.from_ansi(captured.get()).plain


# -- a model alone -----------------------------------------------------------------------------------------------------


def test_stretches_of_a_chain_by_hand() -> None:
    report = cost(graph_of(CHAIN))
    (entry,) = report.costs
    assert [piece.end for piece in report.stretches] == ["r1", "r2", ""]
    assert [part.trunk for part in entry.parts] == [CONV1, CONV2, CONV3 + FC]
    assert [part.path for part in entry.parts] == [CONV1, CONV1 + CONV2, CONV1 + CONV2 + CONV3 + FC]
    assert entry.cost.total == CONV1 + CONV2 + CONV3 + FC
    plain = report.to_json()
    assert json.dumps(plain, allow_nan=False)
    nodes = plain["costs"][0]["nodes"]
    assert [node["node"] for node in nodes] == ["conv3", "conv1", "conv2", "fc"]
    assert [node["stretch"] for node in nodes] == [2, 0, 1, 2]
    assert nodes[-1]["cumulative"] == pytest.approx(1.0)
    assert nodes[0]["share"] == pytest.approx(CONV3 / entry.cost.total)
    assert plain["plan"] is plain["comparison"] is None


def test_fewer_places_and_none() -> None:
    one = cost(graph_of(CHAIN), sites=1)
    assert len(one.stretches) == 2
    assert sum(part.trunk for part in one["macs"].parts) == one["macs"].cost.total
    none = cost(graph_of(CHAIN), sites=0)
    assert [part.trunk for part in none["macs"].parts] == [none["macs"].cost.total]


def test_the_call_belongs_to_the_first_stretch() -> None:
    (entry,) = cost(graph_of(CHAIN), Rough()).costs
    assert sum(part.trunk for part in entry.parts) == pytest.approx(entry.cost.total)
    assert entry.parts[0].trunk == pytest.approx(2e-3 + CONV1 / 1e6 + 1e-4)


def test_what_bounds_is_summed_by_stretch() -> None:
    plain = cost(graph_of(CHAIN), Rough()).to_json()["costs"][0]
    assert plain["parts"][0]["bounds"] == pytest.approx({"compute": CONV1 / 1e6, "bandwidth": 0, "overhead": 1e-4})
    assert sum(plain["bounds"].values()) == pytest.approx(plain["total"] - 2e-3)
    assert plain["nodes"][0]["bound"] == "compute"
    assert plain["unknown"] == [{"node": "odd", "operator": "Odd"}]
    assert plain["estimated"] == [{"node": "conv1", "why": "window 3x3 is outside the table"}]
    assert cost(graph_of(CHAIN)).to_json()["costs"][0]["bounds"] is None


def test_a_clock_gives_the_same_stretches_by_differences() -> None:
    exact, clock = cost(graph_of(CHAIN), [Rough(), Clock()]).costs
    assert [part.trunk for part in clock.parts] == pytest.approx([2 * part.trunk for part in exact.parts])
    assert clock.cost.nodes == {}


def test_memory_is_the_most_so_far() -> None:
    (entry,) = cost(graph_of(CHAIN), "peak_ram_bytes").costs
    held = [part.trunk for part in entry.parts]
    assert held == sorted(held)
    assert held[-1] == entry.worst == make("peak_ram_bytes").cost(graph_of(CHAIN)).total
    assert entry.mean == {}


# -- exits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [make("macs"), make("params"), make("model_bytes"), Rough(), Clock()], ids=str)
@pytest.mark.parametrize("carry", [0.0, 0.5])
def test_paths_are_those_of_the_shared_place(model: CostModel, carry: float) -> None:
    graph = with_exits(carry)
    (entry,) = cost(graph, model).costs
    assert [part.path for part in entry.parts] == pytest.approx(exit_costs(graph, model))


def test_parts_of_exits_by_hand() -> None:
    (entry,) = cost(with_exits(), "macs").costs
    assert [part.trunk for part in entry.parts] == [CONV1, CONV2, CONV3 + FC]
    assert [part.head for part in entry.parts] == [HEAD1, HEAD2, 0]
    assert entry.parts[0].path == CONV1 + HEAD1
    assert entry.worst == CONV1 + CONV2 + CONV3 + FC + HEAD1 + HEAD2


@pytest.mark.parametrize("model", [Rough(), Clock(speed=1.0)], ids=["additive", "measured"])
@pytest.mark.parametrize("carry", [0.0, 0.5])
def test_routing_stands_apart(model: CostModel, carry: float) -> None:
    (entry,) = cost(with_exits(carry), model).costs
    first, second, last = entry.parts
    assert first.decision == second.decision == pytest.approx(2e-3)
    carried = 4 if carry else 0  # the exit's scores go along to the next
    live = (3 * 64 + carried, 6 * 16 + carried)
    assert (first.onward, second.onward) == pytest.approx(tuple(4e-6 * elements for elements in live))
    assert first.path == pytest.approx(first.trunk + first.head + first.decision)
    paid = sum(part.trunk + part.head + part.decision + part.onward for part in (first, second)) + last.trunk
    assert last.path == pytest.approx(paid)


def plan_of(graph: Graph, **figures: Any) -> Plan:
    exits = tuple(PlanExit(item.site, item.head, "max_prob", 0.5, 1.0) for item in graph.exits)

    class Source:
        def materialise(self, plan: Plan, *, lean: bool = True) -> Graph:
            return graph

        def export(self, plan: Plan, path: Any, *, form: str = "if") -> None:
            raise AssertionError

    return Plan(7, (), exits, 0.0, source=Source(), **figures)


def test_a_plan_has_means() -> None:
    plan = plan_of(with_exits(), select={"rates": [0.5, 0.25, 0.25]}, test={"rates": [0.0, 0.5, 0.5]})
    report = cost(plan, ["macs", "params", "peak_ram_bytes"])
    paths = [part.path for part in report["macs"].parts]
    assert report["macs"].mean["select"] == pytest.approx(0.5 * paths[0] + 0.25 * paths[1] + 0.25 * paths[2])
    assert report["macs"].mean["test"] == pytest.approx(0.5 * paths[1] + 0.5 * paths[2])
    assert report["params"].mean == report["peak_ram_bytes"].mean == {}, "sizes and memory have no mean"
    plain = report.to_json()
    assert plain["plan"] == 7
    assert plain["stretches"][1]["rates"] == {"select": 0.25, "test": 0.5}
    assert plain["stretches"][0]["head"] == HEAD
    text = shown(plain)
    assert "mean on select" in text
    assert "A  r1  conv:1x4/avg" in text


def test_rates_of_other_exits_are_not_used() -> None:
    graph = with_exits()
    plan = plan_of(graph, select={"rates": [0.5, 0.25, 0.25]})
    fewer = graph.replace(exits=graph.exits[:1])
    report = cost(Plan(7, (), plan.exits, 0.0, plan.select, source=plan_of(fewer, select={}).source), "macs")
    assert report["macs"].mean == {}
    assert "passes behind insert_exits changed the exits" in report.notes[0]


# -- side by side ------------------------------------------------------------------------------------------------------


def test_predictions_are_judged_by_the_clock() -> None:
    report = cost(graph_of(CHAIN), [], compare=["macs", Rough(), "params", Clock()])
    found = report.comparison
    assert found is not None
    macs, rough, params, clock = found.columns
    assert found.reference == 3
    assert clock.figures == pytest.approx([2 * figure for figure in rough.figures])
    baseline, half, nothing, itself = found.judged
    assert nothing is None
    assert itself is None
    assert half is not None
    assert half.scale is None
    assert half.errors == pytest.approx([-0.5] * 3)
    assert (half.median, half.tau) == (pytest.approx(0.5), pytest.approx(1.0))
    assert half.whole == pytest.approx({"total": -0.5})
    assert baseline is not None
    assert baseline.scale == pytest.approx(sum(clock.figures) / sum(macs.figures))
    expected = [baseline.scale * m / c - 1 for m, c in zip(macs.figures, clock.figures, strict=True)]
    assert baseline.errors == pytest.approx(expected)
    assert baseline.worst == max(range(3), key=lambda row: abs(expected[row]))
    assert baseline.whole == pytest.approx({"total": 0.0}, abs=1e-9)
    assert params.figures == (54, 162, 352)
    assert report.costs == ()


def test_a_wrong_order_has_a_negative_tau() -> None:
    @dataclass(frozen=True)
    class Backwards(Rough):
        """The dearest stretch is said to be the cheapest."""

        name: ClassVar[str] = "backwards"

        def cost(self, graph: Graph) -> Cost:
            nodes = {name: 1 / figure for name, figure in super().cost(graph).nodes.items() if figure > 1e-4}
            return Cost(sum(nodes.values()) + 2e-3, nodes)

    judged = cost(graph_of(CHAIN), [], compare=[Backwards(), Clock()]).comparison.judged[0]  # type: ignore[union-attr]
    assert judged is not None
    assert judged.tau is not None
    assert judged.tau < 0


def test_paths_of_a_plan_side_by_side() -> None:
    plan = plan_of(with_exits(), select={"rates": [0.5, 0.25, 0.25]}, test={"rates": [0.0, 0.5, 0.5]})
    plain = cost(plan, [], compare=[Rough(), Clock()]).to_json()["comparison"]
    assert plain["of"] == "paths"
    assert plain["rows"] == ["r1", "r2", None]
    assert plain["measured"] == "clock"
    rough, clock = plain["columns"]
    assert set(rough["whole"]) == {"select", "test"}
    assert rough["judged"]["whole"] == pytest.approx({"select": -0.5, "test": -0.5})
    assert clock["judged"] is None
    assert json.dumps(plain, allow_nan=False)


def test_nothing_measured_nothing_judged() -> None:
    plain = cost(graph_of(CHAIN), [], compare=["macs", "params"]).to_json()
    assert plain["comparison"]["measured"] is None
    assert "none of these is measured" in shown(plain)


# -- what takes part ---------------------------------------------------------------------------------------------------


def test_a_model_asked_for_twice_is_measured_once() -> None:
    clock, single = Clock(), Clock()
    cost(graph_of(CHAIN), single)
    cost(graph_of(CHAIN), [clock, clock], compare=[clock, "macs"])
    assert clock.log == single.log


def test_what_is_measured_is_said_first_and_static_models_come_before() -> None:
    heard, clock = Spoken(), Clock()
    cost(graph_of(CHAIN), [clock, "macs"], progress=heard)
    assert heard.said == ["to be measured on this machine: clock; the whole network and what runs up to 2 places"]
    assert heard.tasks == [("measuring", 1, 1)]

    @dataclass(frozen=True)
    class Broken(Rough):
        """A static model that fails."""

        name: ClassVar[str] = "broken"

        def cost(self, graph: Graph) -> Cost:
            raise OptionError("broken")

    late = Clock()
    with pytest.raises(OptionError, match="broken"):
        cost(graph_of(CHAIN), [late, Broken()])
    assert late.log == [], "nothing was measured in vain"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"models": "mac"}, "no cost model is called 'mac': did you mean 'macs'"),
        ({"models": "latency_ort:thread=1"}, "has no parameter 'thread'"),
        ({"models": []}, "name a cost model"),
        ({"models": [], "compare": ["macs"]}, "there is nothing to compare one cost model with"),
        ({"models": "macs", "device": "rpi5"}, "device 'rpi5': no cost model named has a device to set; these have: "),
    ],
)
def test_mistakes_are_named_before_anything_is_priced(arguments: dict[str, Any], says: str) -> None:
    clock = Clock()
    models = arguments.pop("models")
    given = [clock, *([models] if isinstance(models, str) else models)] if models else []
    with pytest.raises(OptionError) as caught:
        cost(graph_of(CHAIN), given, **arguments)
    assert says in str(caught.value)
    assert clock.log == []


def test_lists_of_cost_models_with_settings() -> None:
    assert divided("macs,latency_ort:threads=1,batch=8,params") == ("macs", "latency_ort:threads=1,batch=8", "params")
    assert divided("a:x=1, b:y=2 ,z=3,c") == ("a:x=1", "b:y=2,z=3", "c")
    assert divided("") == ()


def test_two_of_a_name_are_told_apart() -> None:
    report = cost(graph_of(CHAIN), ["model_bytes", "model_bytes:dtype=int8"])
    assert [entry.label for entry in report.costs] == ["model_bytes:dtype=", "model_bytes:dtype=int8"]
    assert report["model_bytes:dtype="].cost.total == 4 * report["model_bytes:dtype=int8"].cost.total


# -- the tables --------------------------------------------------------------------------------------------------------

LONG = "backbone.stages.3.blocks.11.attention.projection.relu_output_with_a_name_that_no_line_holds"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_tables_fit_with_long_names(width: int) -> None:
    graph = graph_of(CHAIN.replace("[conv2]", f'["{LONG}"]').replace("r1", LONG.replace(".", "_")))
    text = shown(cost(graph, [Rough(), "macs", "peak_ram_bytes"], compare=["macs", Rough(), Clock()]).to_json(), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    first = "".join(line.split("  ")[0] for line in lines)
    assert LONG in first, "the name is whole, on as many lines as it takes"
    text = " ".join(text.split())
    assert "bound by compute" in text
    assert "not counted, the model has no rule for: odd (Odd)" in text
    assert "estimated, beyond what the model has data for: conv1 (window 3x3" in text


def test_long_settings_do_not_widen_a_column() -> None:
    here = "/somewhere/far/away/in/a/folder/with/a/long/name/board.json"
    models = [Rough(here), Rough(here.replace("board", "other")), Clock(), Clock(speed=3.0)]
    text = shown(cost(graph_of(CHAIN), [], compare=models).to_json())
    assert max(map(len, text.splitlines())) <= 80
    assert "board.json" in "".join(line.strip() for line in text.splitlines())


@pytest.mark.parametrize(
    ("unit", "figures", "expected"),
    [
        ("ms", [0.0123, 0.001], ("12.30 us", "1.00 us")),
        ("ms", [12.3, 0.5], ("12.30 ms", "0.50 ms")),
        ("ms", [2300.0], ("2.300 s",)),
        ("bytes", [3 * 2**20, 2**10], ("3.000 MiB", "0.001 MiB")),
        ("bytes", [512.0], ("512 bytes",)),
        ("MACs", [40_551_040.0], ("40.55 MMACs",)),
        ("MACs", [12.0, 0.0], ("12 MACs", "0 MACs")),
        ("parameters", [269_034.0], ("269.0 k parameters",)),
        ("mJ", [0.5], ("500.0 uJ",)),
        ("widgets", [0.25], ("0.2500 widgets",)),
        ("ms", [], ()),
        ("ms", [0.0], ("0 us",)),
    ],
)
def test_figures_have_sensible_units(unit: str, figures: list[float], expected: tuple[str, ...]) -> None:
    scale = tables_costs.Scale(unit, figures)
    assert tuple(map(scale.full, figures)) == expected


def test_a_path_is_no_model() -> None:
    with pytest.raises(OptionError, match=r"'model.onnx' is neither a graph \(ee.load\) nor a plan"):
        ee.cost("model.onnx", "macs")  # type: ignore[arg-type]
