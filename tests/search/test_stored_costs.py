"""Measured path costs that a run keeps: read back as they were, also those written before routing had parts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from eexform import files
from eexform.cost_models import Cost, CostModel, Crossing, Routing, make
from eexform.cost_models import _device as devices
from eexform.errors import RunError
from eexform.heads import HeadSpec
from eexform.ir.graph import Graph
from eexform.ir.sites import find_sites
from eexform.search.stored_costs import files_read, model_settings, same_settings, stored_path_costs
from tests.passes.helpers import CHAIN, graph_of

BUNDLED = Path(devices.__file__).parent / "devices"
HEADS = {"r1": [HeadSpec.parse("none/avg")], "r2": [HeadSpec.parse("none/avg")]}


@dataclass(frozen=True)
class Clock(CostModel):
    """A thousandth per node, and once more every time it is asked."""

    name: ClassVar[str] = "clock"
    unit: ClassVar[str] = "ms"
    additive: ClassVar[bool] = False
    measured: ClassVar[bool] = True
    asked: ClassVar[list[int]] = []

    def cost(self, graph: Graph) -> Cost:
        self.asked.append(1)
        return Cost(1e-3 * (len(graph.nodes) + len(self.asked)), conditions={"device": "none"})

    def routing(self, graph: Graph, crossing: Crossing) -> Routing:
        return Routing(0.5, 0.25 * len(crossing.live))

    def between(self, graph: Graph, before: Crossing | None, after: Crossing | None) -> Cost:
        return Cost(0.125 if before is None else -0.125)


def test_a_measurement_is_made_once(tmp_path: Path) -> None:
    trunk = graph_of(CHAIN)
    sites = [site for site in find_sites(trunk).sites if site.value in HEADS]
    first = stored_path_costs(tmp_path, Clock(), trunk, sites, HEADS)
    before = len(Clock.asked)
    again = stored_path_costs(tmp_path, Clock(), trunk, sites, HEADS)
    assert len(Clock.asked) == before
    assert asdict(again) == asdict(first)
    assert again.decision == {"r1": 0.5, "r2": 0.5}
    assert again.onward == {"r1": 0.25, "r2": 0.25}
    assert again.between[("", "r1")] == 0.125
    assert again.between[("r1", "r2")] == -0.125
    assert set(again.between) == {("", "r1"), ("", "r2"), ("r1", "r2"), ("r1", ""), ("r2", "")}


def test_one_figure_of_routing_is_paid_at_every_exit(tmp_path: Path) -> None:
    trunk = graph_of(CHAIN)
    sites = [site for site in find_sites(trunk).sites if site.value in HEADS]
    stored_path_costs(tmp_path, Clock(), trunk, sites, HEADS)
    (path,) = tmp_path.glob("*.json")
    plain = files.read_json(path)
    for key in ("decision", "onward", "between", "combine", "estimated"):
        del plain[key]
    files.write_json(path, {**plain, "routing": 0.75})
    costs = stored_path_costs(tmp_path, Clock(), trunk, sites, HEADS)
    assert costs.decision == {"r1": 0.75, "r2": 0.75}
    assert costs.onward == {}
    assert costs.combine == "sum"


@pytest.mark.parametrize("damage", [{"combine": "mean"}, {"trunk": "much"}, {"decision": [1.0]}, {"cells": [[1]]}])
def test_a_damaged_file_is_named(tmp_path: Path, damage: dict[str, object]) -> None:
    trunk = graph_of(CHAIN)
    sites = [site for site in find_sites(trunk).sites if site.value in HEADS]
    stored_path_costs(tmp_path, Clock(), trunk, sites, HEADS)
    (path,) = tmp_path.glob("*.json")
    files.write_json(path, {**files.read_json(path), **damage})
    with pytest.raises(RunError, match=path.name):
        stored_path_costs(tmp_path, Clock(), trunk, sites, HEADS)


@dataclass(frozen=True)
class Grown(Clock):
    """The clock of a later version, with settings that it did not have."""

    speed: float = 1.0
    mode: str = "hot"


def test_what_an_older_version_measured_is_found(tmp_path: Path) -> None:
    trunk = graph_of(CHAIN)
    sites = [site for site in find_sites(trunk).sites if site.value in HEADS]
    before = stored_path_costs(tmp_path, Clock(), trunk, sites, HEADS)
    assert asdict(stored_path_costs(tmp_path, Grown(), trunk, sites, HEADS)) == asdict(before)
    for other in (Grown(speed=2.0), Grown(mode="cold")):
        assert stored_path_costs(tmp_path, other, trunk, sites, HEADS).trunk > before.trunk
    assert len(list(tmp_path.glob("*.json"))) == 3


def test_settings_that_an_older_version_did_not_have_are_the_default() -> None:
    now = model_settings(make("latency_ort", threads=2))
    older = {key: now[key] for key in ("name", "threads", "batch", "repeats", "warmup", "cache", "bindings")}
    assert same_settings(older, now)
    assert not same_settings({**older, "threads": 1}, now)
    assert not same_settings(older, model_settings(make("latency_ort", threads=2, state="cold")))
    assert not same_settings({"name": "macs", "bindings": {}}, now)
    assert not same_settings({**older, "of a newer one": 1}, now)
    assert not same_settings("latency_ort", now)


def test_a_file_is_more_than_its_name(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text((BUNDLED / "rpi5.toml").read_text())
    models = [make("macs"), make("roofline", device=str(path)), make("roofline", device="rpi4")]
    first = files_read(models)
    assert list(first) == [str(path)], "what is bundled belongs to the version of eexform"
    path.write_text(path.read_text() + "# another one\n")
    assert files_read(models) != first
