"""Tables and progress are readable at 80 and at 160 columns, in a terminal and in a file."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eexform.cli.progress import Bars, duration
from eexform.report import layout, tables

SITES = [f"/features/features.{place}/block/block.3/Conv_output_0" for place in range(8)]


def shown(renderable: Any, width: int, *, terminal: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    console.print(renderable, crop=False)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def figures(accuracy: float, macs: float, rates: list[float]) -> dict[str, Any]:
    return {
        "accuracy": accuracy,
        "cost": {"macs": macs},
        "macs": macs,
        "macs_heads_free": macs,
        "objectives": [macs],
        "rates": rates,
    }


def goal(model: str, **changed: Any) -> dict[str, Any]:
    terms = [{"factor": 1.0, "model": model, "statistic": "mean"}]
    plain = {"label": model, "cost": model, "unit": "MACs", "terms": terms, "target": None, "sided": None}
    return {**plain, **changed}


def front(sites: int, plans: int = 4) -> dict[str, Any]:
    """A made-up front; every plan but the last leaves at every site but one."""
    made = []
    for index in range(plans):
        chosen = [] if index == plans - 1 else [site for place, site in enumerate(SITES[:sites]) if place != index]
        rates = [0.7, *[0.0] * (len(chosen) - 2), 0.002, 0.298][: len(chosen) + 1] if chosen else [1.0]
        made.append(
            {
                "index": index,
                "exits": [
                    {"site": s, "head": "h", "measure": "m", "threshold": 0.5, "temperature": 1.0} for s in chosen
                ],
                "select": figures(0.7 + 0.07 * index, 40e6 * (index + 1) / plans, rates),
                "test": figures(0.68 + 0.07 * index, 41e6 * (index + 1) / plans, rates),
                "worst": {"cost": {"macs": 48e6}, "macs": 48e6, "objectives": [48e6]},
            }
        )
    trunk: dict[str, Any] = {"accuracy_select": 0.9147, "accuracy_test": 0.9172, "macs": 40e6, "cost": {"macs": 40e6}}
    trunk["objectives"] = [40e6]
    run: dict[str, Any] = {
        "objective": "macs",
        "unit": "MACs",
        "objectives": [goal("macs")],
        "labels": "given",
        "memorisation": None,
        "state": "done",
        "uncounted": [],
    }
    return {"run": run, "trunk": trunk, "tuned": None, "plans": made, "knee": 1}


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("sites", [3, 6, 8])
def test_the_front(width: int, sites: int) -> None:
    lines = shown(tables.pareto(front(sites)), width)
    start = next(place for place, line in enumerate(lines) if set(line) == {"─"})
    rows = [line for line in lines[start + 1 :] if line[:4].strip(" *").isdigit()]
    assert len(rows) == 4
    assert max(len(line) for line in lines[start:]) <= width
    for number in ("70.00", "-21.47", "25.0", "68.00", "-23.72", "25.6", "120.0"):
        assert rows[0].count(number) >= 1, rows[0]
    assert len({row.index(".") for row in rows}) == 1  # decimal points below each other
    assert rows[1].lstrip().startswith("1*")
    for place, site in enumerate(SITES[:sites]):
        assert any(line.split() == ["ABCDEFGH"[place], site] for line in lines), site
    whole = " ".join(lines)
    assert "<1" in whole  # two samples in a thousand are not none
    if width == 160 or sites < 8:
        assert rows[-1].split()[-sites - 1 :] == ["."] * sites + ["100"]
    else:
        assert "A:" not in rows[0]  # plan 0 has no exit at the first site
        assert rows[0].split()[8] == "B:70"


def test_a_long_front_is_thinned_and_keeps_its_knee() -> None:
    plain = front(3, plans=200)
    plain["knee"] = 3
    lines = shown(tables.pareto(plain), 80)
    assert any("front: 200 plans, 26 of them here (--all shows every one)" in line for line in lines)
    assert any(line.lstrip().startswith("3*") for line in lines)
    assert sum(line.startswith("─") for line in lines) == 1


def test_thinning_leaves_room_below_the_cost_of_the_model() -> None:
    costs = [*range(1, 101), 150, 180, 300, 400, 500]
    plans = [{"index": place, "select": {"objectives": [cost]}} for place, cost in enumerate(costs)]
    chosen = [plan["select"]["objectives"][0] for plan in tables.thin(plans, 25, 100)]
    assert len(chosen) == 25
    assert chosen[0] == 1
    assert chosen[21:] == [100, 150, 300, 500]
    assert max(after - before for before, after in pairwise(chosen[:22])) <= 5
    assert len(tables.thin(plans, 25, 0.5)) <= 25  # every plan is dearer
    assert tables.thin(plans[:3], 25, 100) == plans[:3]


def test_two_costs_have_a_column_each() -> None:
    plain = front(3)
    size = goal("params", unit="parameters", cost="params@max", target=2e6, sided="one")
    plain["run"]["objectives"] = [goal("macs", cost="macs@p95"), size]
    plain["trunk"]["objectives"] = [40e6, 1e6]
    for plan in plain["plans"]:
        for split in ("select", "test"):
            plan[split]["objectives"] = [plan[split]["macs"], 1.234e6]
        plan["worst"]["objectives"] = [48e6, 1.3e6]
    text = "\n".join(shown(tables.pareto(plain), 100))
    assert "cost: macs@p95, cost 2: params@max (target at most 2 M parameters), worst: cost on the" in text
    assert text.count("123.4") == 2 * len(plain["plans"])
    assert text.count("120.0") == len(plain["plans"])
    assert "macs@p95 40 MMACs, params@max 1 M parameters" in text
    rows = shown(tables.pareto(plain), 80)
    assert all(len(line) <= 80 for line in rows[rows.index("front: 4 plans") + 2 :])


def test_plans_out_of_order_are_thinned_by_place() -> None:
    plans = [{"index": place, "select": {"objectives": [abs(place - 50)]}} for place in range(101)]
    chosen = [plan["index"] for plan in tables.thin(plans, 5, 100)]
    assert chosen == [0, 25, 50, 75, 100]


def test_the_exported_plan_is_marked() -> None:
    plain = front(3, plans=200)
    lines = shown(tables.pareto(plain, exported=7), 80)
    assert any(line.lstrip().startswith("7+") for line in lines)
    assert any(line.lstrip().startswith("1*") for line in lines)
    assert "+ the plan that was exported" in lines
    assert not any(line.startswith("+") for line in shown(tables.pareto(plain, exported=1), 80))


def test_an_empty_front_and_an_unfinished_run() -> None:
    plain = {**front(3), "plans": [], "knee": None}
    plain["run"] = {**plain["run"], "state": "interrupted", "uncounted": [{"node": "node_7", "operator": "acme.Conv"}]}
    text = "\n".join(shown(tables.pareto(plain), 80))
    assert "front: 0 plans" in text
    assert "not finished (state: interrupted)" in text
    assert "node_7 (acme.Conv)" in text


@pytest.mark.parametrize("width", [80, 160])
def test_the_sites(width: int) -> None:
    sites = [
        {
            "value": site,
            "shape": [960, 14, 14],
            "stride": None if place == 2 else 16,
            "macs_before": 12_345_678 * (place + 1),
            "params_before": 1000 * place,
            "live": [site, SITES[0], "mask"] if place == 5 else [site],
        }
        for place, site in enumerate(SITES)
    ]
    plain = {
        "name": "net", "nodes": 100, "opset": 17, "inputs": [{"name": "x", "shape": ["N", 3, 224, 224]}], "output": "y",
        "classes": 1000, "scores": "logits", "macs": 3e8, "params": 5_483_032, "uncounted": [],
        "sites": sites, "rejected": [{"value": "v", "reason": "because " * 30}],
    }  # fmt: skip
    lines = shown(tables.inspection(plain, rejected=True), width)
    assert max(map(len, lines[2:])) <= width
    joined = "".join("".join(lines).split())
    for site in SITES:
        assert site in joined or width == 80
    assert "net: 100 nodes, opset 17, 300 MMACs, 5.48 M parameters" in lines
    assert any(line.split() == ["A", SITES[0]] for line in lines)
    assert any(line.split() == ["B", "mask"] for line in lines)
    assert "because" in joined


def test_the_other_tables_fit() -> None:
    width = 80
    results: list[dict[str, Any]] = [
        {"file": f"exported/of/a/long/folder/name/{name}.onnx", "batch": batch, "threads": 1, "median_ms": 1234.5678,
         "mean_ms": 0.5, "p95_ms": 2.0, "count": 100}
        for batch in (1, 32) for name in ("ee", "model")
    ]  # fmt: skip
    lines = shown(tables.timings({"device": "cpu", "results": results}, results[1]["file"]), width)
    assert max(map(len, lines[:-1])) <= width
    assert any("1234.568" in line and "1.000x" in line for line in lines)
    for label, entry in zip("AB", results, strict=False):  # a name too long for the table stands whole below it
        assert [label, entry["file"]] in [line.split() for line in lines]
        assert sum(entry["file"] in line for line in lines) == 1
    assert "x: against B; the mean is what a stream of samples costs" in lines
    short = [{**entry, "file": Path(entry["file"]).name} for entry in results]
    lines = shown(tables.timings({"device": "cpu", "results": short}, "model.onnx"), width)
    assert [line.split()[0] for line in lines if "1234.568" in line] == ["ee.onnx", "model.onnx"] * 2
    assert not any(line.startswith("files:") for line in lines)
    assert "x" not in shown(tables.timings({"device": "cpu", "results": results}), width)[1].split()
    checks = [{"name": "decisions at batch 32", "ok": place > 0, "detail": "word " * 40} for place in range(3)]
    lines = shown(
        tables.verification({"form": "if", "samples": 9, "near_ties": 2, "ok": False, "checks": checks}), width
    )
    assert max(map(len, lines[:-1])) <= width
    assert lines[-1] == "NOT verified: 1 check failed (2 samples within 1e-6 of a threshold)"


def test_sentences_are_whole_in_a_file() -> None:
    plain = front(3)
    plain["run"]["memorisation"] = {"verdict": "seen", "message": "word " * 60}
    assert ("word " * 60).strip() in [line.strip() for line in shown(tables.pareto(plain), 80)]
    assert max(map(len, shown(tables.pareto(plain), 80, terminal=True))) <= 80


def test_labels() -> None:
    labels = layout.Labels([str(number) for number in [*range(800), 3]])
    assert list(labels.values())[:3] == ["A", "B", "C"]
    assert labels["25"] == "Z"
    assert labels["26"] == "AA"
    assert labels["701"] == "ZZ"
    assert labels["702"] == "AAA"
    assert len(set(labels.values())) == 800


def test_amounts() -> None:
    shown = [layout.amount(number) for number in (7, 999, 1000, 40_600, 414_500, 999_600, 1.2e9)]
    assert shown == ["7", "999", "1 k", "40.6 k", "414 k", "1 M", "1.2 G"]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_progress_in_a_file() -> None:
    """A line every 30 seconds with the time left, one at the end."""
    clock, out = Clock(), io.StringIO()
    bars = Bars(Console(file=out, width=80), clock=clock)
    with bars.task("training heads", 100) as task:
        task.advance(20)  # found done by a resumed run
        for step in range(80):
            clock.now += 1.0
            task.advance(
                1, f"epoch {step // 10 + 1}, a note that is long enough to be cut at eighty columns if it were"
            )
    lines = out.getvalue().splitlines()
    note = "a note that is long enough to be cut at eighty columns if it were"
    assert lines == [
        f"training heads: 50/100 after 30 s, about 50 s left; epoch 3, {note}",
        f"training heads: 80/100 after 1 min 00 s, about 20 s left; epoch 6, {note}",
        f"training heads: done in 1 min 20 s; epoch 8, {note}",
    ]


def test_progress_can_be_quiet_and_stop_early() -> None:
    out = io.StringIO()
    quiet = Bars(Console(file=out), quiet=True)
    quiet.say("hello")
    with quiet.task("x", 3) as task:
        task.advance(3)
    assert out.getvalue() == ""
    bars = Bars(Console(file=out), clock=Clock())
    with bars.task("x", 3) as task:
        task.advance()
    assert out.getvalue() == "x: ended at 1/3 in 0.0 s\n"
    with pytest.raises(ValueError, match="boom"), bars.task("y", 3):
        raise ValueError("boom")
    assert "y" not in out.getvalue()


def test_progress_on_a_terminal() -> None:
    out = io.StringIO()
    bars = Bars(Console(file=out, width=80, force_terminal=True))
    with bars.task("training heads [1]", 12) as task:
        for _ in range(12):
            task.advance(1, "a note that does not fit on a line of eighty columns and is cut with dots")
    text = out.getvalue()
    assert "12/12" in text
    assert "training heads [1]" in text
    assert "used" in text


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.04, 4.2, 42, 372, 7500)] == [
        "0.0 s",
        "4.2 s",
        "42 s",
        "6 min 12 s",
        "2 h 05 min",
    ]
