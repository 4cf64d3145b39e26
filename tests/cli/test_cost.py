"""``eexform cost`` and ``eexform costs``: models and plans priced, mistakes named before anything is timed."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import sys
import textwrap
from pathlib import Path

import onnx
import pytest

import eexform as ee
from eexform.cost_models import exit_costs, make
from tests import text
from tests.cli.support import SITES, fine, refused, shell
from tests.documents import ROOT, blocks

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "external_cost_model"
QUICK = "latency_ort:repeats=2,warmup=0"

# stem 8x8x4, a 8x8x6, b 4x4x12, c 4x4x12, classifier 192 -> 10
MACS = {"stem": 64 * 4 * 9, "a": 64 * 6 * 36, "b": 16 * 12 * 54, "c": 16 * 12 * 108, "classifier": 1920}


# -- a model -----------------------------------------------------------------------------------------------------------


def test_a_model_by_default_in_macs(model: Path) -> None:
    plain = fine("cost", model, "--json").json
    (entry,) = plain["costs"]
    assert (entry["model"], entry["unit"], entry["total"]) == ("macs", "MACs", sum(MACS.values()))
    ends = [piece["end"] for piece in plain["stretches"]]
    assert ends[-1] is None
    assert set(ends[:-1]) <= set(SITES)
    assert sum(part["trunk"] for part in entry["parts"]) == entry["total"]
    assert entry["nodes"][0]["cost"] == MACS["c"]
    assert entry["nodes"][0]["share"] == pytest.approx(MACS["c"] / entry["total"])
    assert entry["nodes"][-1]["cumulative"] == pytest.approx(1.0)
    assert plain["plan"] is None


def test_the_documented_keys(model: Path) -> None:
    plain = fine("cost", model, "--model", "macs", "--compare", "macs,params", "--json").json
    assert set(plain) == {"name", "digest", "plan", "stretches", "costs", "comparison", "notes"}
    assert set(plain["stretches"][0]) == {"end", "nodes", "head", "rates"}
    assert set(plain["costs"][0]) == {
        *("model", "label", "settings", "unit", "measured", "additive", "per_sample", "combine", "total", "parts"),
        *("mean", "worst", "original", "nodes", "bounds", "unknown", "estimated", "conditions", "fits", "kernels"),
    }
    assert set(plain["costs"][0]["parts"][0]) == {"trunk", "head", "decision", "onward", "path", "bounds"}
    assert set(plain["costs"][0]["nodes"][0]) == {
        *("node", "operator", "cost", "share", "cumulative", "bound", "stretch", "head")
    }
    assert set(plain["comparison"]) == {"rows", "of", "measured", "columns"}


def test_tables(model: Path) -> None:
    shown = fine("cost", model, "--model", "macs", "--model", "params", "--top", "2").out
    assert "total 49.15 kMACs" in shown
    assert "total 4.126 k parameters" in shown
    assert "dearest nodes, 2 of 5" in shown
    assert "stage0_block0_relu_out" in shown
    assert "dearest nodes" not in fine("cost", model, "--top", "0").out


def test_a_device_is_set_where_there_is_one(model: Path) -> None:
    shown = fine("cost", model, "--model", "roofline", "--model", "macs", "--device", "rpi5", "--json").json
    roofline, macs = shown["costs"]
    assert roofline["settings"]["device"] == "rpi5"
    assert "device" not in macs["settings"]
    assert roofline["unit"] == "ms"
    assert sum(roofline["bounds"].values()) <= roofline["total"] * (1 + 1e-9)
    assert {node["bound"] for node in roofline["nodes"]} <= {"compute", "bandwidth", "overhead"}
    own = fine("cost", model, "--model", "roofline:device=rpi4", "--model", "roofline", "--device", "rpi5", "--json")
    assert [entry["settings"]["device"] for entry in own.json["costs"]] == ["rpi4", "rpi5"]
    assert "bound by" in fine("cost", model, "--model", "roofline", "--device", "rpi5").out


def test_kernels_are_printed_for_tables_by_hand(model: Path) -> None:
    entry = fine("cost", model, "--model", "roofline:device=rpi5", "--json").json["costs"][0]
    kernel = next(kernel for kernel in entry["kernels"] if kernel["op"].startswith("Conv"))
    assert {"name", "nodes", "op", "variant", "sizes"} <= set(kernel)
    assert set(kernel["nodes"]) & {node["node"] for node in entry["nodes"]}


def test_memory_is_held_to_a_device(model: Path) -> None:
    plain = fine("cost", model, "--model", "peak_ram_bytes", "--device", "cortex-m4", "--json").json
    fit = plain["costs"][0]["fits"]
    assert fit["ok"]
    assert fit["ram"]["needed"] >= plain["costs"][0]["total"]
    assert fit["ram"]["available"] > fit["ram"]["needed"]
    assert "fits: RAM" in fine("cost", model, "--model", "peak_ram_bytes", "--device", "cortex-m4").out
    assert fine("cost", model, "--model", "peak_ram_bytes", "--json").json["costs"][0]["fits"] is None


def test_a_device_that_is_too_small(model: Path, tmp_path: Path) -> None:
    tiny = tmp_path / "tiny.toml"
    tiny.write_text(
        textwrap.dedent("""
        name = "tiny"
        title = "hardly anything"
        [compute]
        peak_gflops_float32 = 0.1
        [memory]
        bandwidth_gb_per_s = 0.1
        ram_bytes = 1024
        flash_bytes = 1024
        [sources]
        "compute.peak_gflops_float32" = "made up"
        "memory.bandwidth_gb_per_s" = "made up"
        "memory.ram_bytes" = "made up"
        "memory.flash_bytes" = "made up"
        """)
    )
    shown = fine("cost", model, "--model", "peak_ram_bytes", "--device", tiny).out
    assert "does NOT fit: RAM" in shown
    assert "too many" in shown


def test_operators_without_a_rule_are_named(tmp_path: Path) -> None:
    path = tmp_path / "custom.onnx"
    body = "m = MatMul(x, w)\n odd = somebody.Odd(m)\n scores = Relu(odd)"
    weights = {"w": text.normal(4, 3)}
    onnx.save(text.model(body, weights, outputs="float[N,3] scores", domains=', "somebody" : 1'), path)
    done = fine("cost", path, "--scores", "logits")
    assert "not counted, the model has no rule for" in done.out
    assert "(Odd)" in done.out


# -- side by side ------------------------------------------------------------------------------------------------------


def test_predictions_beside_a_measurement(model: Path) -> None:
    done = fine("cost", model, "--compare", f"macs,roofline,params,{QUICK}", "--device", "xeon", "--json")
    assert "to be measured on this machine: latency_ort" in done.err
    plain = done.json
    assert plain["costs"] == []
    found = plain["comparison"]
    assert found["of"] == "stretches"
    assert [column["label"] for column in found["columns"]] == ["macs", "roofline", "params", "latency_ort"]
    assert found["measured"] == "latency_ort"
    macs, roofline, params, clock = found["columns"]
    assert macs["judged"]["scale"] > 0
    assert roofline["judged"]["scale"] is None
    assert params["judged"] is clock["judged"] is None
    assert all(figure >= 0 for figure in clock["figures"])
    assert roofline["whole"]["total"] == pytest.approx(sum(roofline["figures"]))
    error = roofline["whole"]["total"] / clock["whole"]["total"] - 1
    assert roofline["judged"]["whole"]["total"] == pytest.approx(error)


def test_the_naive_baseline_is_called_that(model: Path) -> None:
    shown = fine("cost", model, "--compare", f"macs,{QUICK}", "--quiet")
    assert "the naive baseline: macs times one constant" in shown.out
    assert "Kendall" in shown.out
    assert shown.err == ""


# -- a plan of a run ---------------------------------------------------------------------------------------------------


def test_a_plan_of_a_run(run: Path) -> None:
    plain = fine("cost", "--run", run, "--pick", "3", "--model", "macs", "--model", "params", "--json").json
    plan = ee.open_run(run).front[3]
    macs, params = plain["costs"]
    assert plain["plan"] == 3
    assert [piece["end"] for piece in plain["stretches"]] == [*(exit_.site for exit_ in plan.exits), None]
    assert [piece["head"] for piece in plain["stretches"][:-1]] == [exit_.head for exit_ in plan.exits]
    assert macs["mean"] == pytest.approx({"select": plan.select["macs"], "test": plan.test["macs"]})
    assert macs["worst"] == pytest.approx(plan.worst["macs"])
    assert [part["path"] for part in macs["parts"]] == pytest.approx(exit_costs(plan.materialise(), make("macs")))
    assert macs["original"] == sum(MACS.values())
    assert params["mean"] is None
    shown = fine("cost", "--run", run, "--pick", "3").out
    assert "mean on select" in shown
    assert "the model alone 49.15 kMACs" in shown
    assert "leaving" in shown


def test_the_knee_by_default(run: Path) -> None:
    assert fine("cost", "--run", run, "--json").json["plan"] == ee.open_run(run).front.knee().index


def test_paths_of_a_plan_beside_a_measurement(run: Path) -> None:
    done = fine("cost", "--run", run, "--pick", "3", "--compare", f"macs,{QUICK}", "--json")
    found = done.json["comparison"]
    assert found["of"] == "paths"
    assert set(found["columns"][0]["whole"]) == {"select", "test"}
    assert found["rows"][-1] is None


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_mistakes_are_named(model: Path, run: Path, tmp_path: Path) -> None:
    refused("cost", model, "--model", "mac", says=["no cost model is called 'mac': did you mean 'macs'"])
    refused("cost", model, "--compare", "macs", says=["--compare macs: there is nothing to compare it with"])
    refused("cost", model, "--compare", "macs,latencyort", says=["no cost model is called 'latencyort'"])
    refused("cost", model, "--model", "roofline", says=["--device"])
    refused("cost", model, "--model", "roofline", "--device", "rpi55", says=["'rpi55'", "did you mean 'rpi5'"])
    refused("cost", model, "--device", "rpi5", says=["no cost model named has a device to set", "roofline"])
    refused("cost", says=["name a model, or a run with --run RUN"])
    refused("cost", model, "--run", run, says=["a plan brings its own network"])
    refused("cost", "--run", run, "--scores", "logits", says=["--scores and --run", "brings its own network"])
    refused("cost", model, "--pick", "3", says=["--pick chooses a plan of a run"])
    refused("cost", "--run", run, "--pick", "99", says=["99"])
    refused("cost", tmp_path / "no.onnx", says=["no.onnx"])


def test_a_table_by_hand(model: Path, tmp_path: Path) -> None:
    """As docs/costs.md says: the kernels that --json prints, a time for each, and the CSV is a device."""
    kernels = fine("cost", model, "--model", "roofline:device=rpi5", "--json").json["costs"][0]["kernels"]
    table = tmp_path / "times.csv"
    with table.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["op", "variant", "sizes", "us"])
        rows.writerows([k["op"], k["variant"], "x".join(map(str, k["sizes"])), 10] for k in kernels)
    entry = fine("cost", model, "--model", f"table:device={table}", "--json").json["costs"][0]
    assert entry["total"] == pytest.approx(0.01 * len(kernels))
    assert entry["unknown"] == entry["estimated"] == []
    assert {node["operator"] for node in entry["nodes"]} >= {"Conv+Relu"}


def test_the_documented_device_is_one(model: Path, tmp_path: Path) -> None:
    page = ROOT / "docs" / "costs.md"
    (tmp_path / "my.toml").write_text(next(block.text for block in blocks(page) if block.language == "toml"))
    entry = fine("cost", model, "--model", "roofline", "--device", tmp_path / "my.toml", "--json").json["costs"][0]
    assert entry["total"] > 0
    power = fine("cost", model, "--model", "energy:by=power", "--device", tmp_path / "my.toml", "--json").json["costs"][
        0
    ]
    assert power["total"] == pytest.approx(2.5 * entry["total"]), "watts x milliseconds"


def test_a_table_that_does_not_fit(model: Path, tmp_path: Path) -> None:
    table = tmp_path / "other.csv"
    table.write_text("op,variant,sizes,us\nSomethingElse,none,1 2 3,10\n")
    plain = fine("cost", model, "--model", f"table:device={table}", "--json").json["costs"][0]
    assert {entry["node"] for entry in plain["unknown"]} or plain["estimated"], "nothing is silently zero"
    empty = tmp_path / "empty.csv"
    empty.write_text("op,variant,sizes,us\n")
    refused(
        "cost",
        model,
        "--model",
        f"table:device={empty}",
        says=["empty.csv", "the table is empty"],
    )
    refused("cost", model, "--model", f"table:device={tmp_path / 'no.json'}", says=["no.json"])


# -- costs -------------------------------------------------------------------------------------------------------------


def test_cost_models_are_listed() -> None:
    shown = fine("costs").out
    assert "macs" in shown
    assert "latency_ort" in shown
    listed = fine("costs", "--json").json["costs"]
    assert {"macs", "params", "latency_ort", "roofline"} <= {entry["name"] for entry in listed}
    assert [entry["name"] for entry in fine("costs", "macs", "--json").json["costs"]] == ["macs"]
    refused("costs", "rpi5", says=["no cost model is called 'rpi5'", "--device rpi5"])


def test_devices_are_listed() -> None:
    listed = fine("costs", "--device", "--json").json["devices"]
    names = [entry["name"] for entry in listed]
    assert {"cortex-m4", "cortex-m7", "rpi4", "rpi5", "xeon", "a100"} <= set(names)
    shown = fine("costs", "--device").out
    assert all(name in shown for name in names)
    assert "KiB" in shown


def test_a_device_with_its_sources() -> None:
    entry = fine("costs", "--device", "rpi5", "--json").json["device"]
    assert entry["compute"]["peak_gflops_float32"] > 0
    assert entry["sources"]["memory.bandwidth_gb_per_s"]
    shown = fine("costs", "--device", "rpi5").out
    assert "memory.bandwidth_gb_per_s" in shown
    refused("costs", "--device", "rpi55", says=["did you mean 'rpi5'"])


# -- external programs -------------------------------------------------------------------------------------------------


@pytest.fixture
def vendor(tmp_path: Path) -> str:
    """A folder for PYTHONPATH in which the sample is installed, without pip."""
    site = tmp_path / "site"
    info = site / "eexform_vendor_cost-0.1.0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(SAMPLE / "eexform_vendor_cost.py", site)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: eexform-vendor-cost\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[eexform.cost_models]\nvendor = eexform_vendor_cost:Vendor\n")
    return str(site)


def test_an_external_program_is_asked(model: Path, vendor: str) -> None:
    program = shlex.join([sys.executable, str(SAMPLE / "vendor_compiler.py")])
    done = shell("cost", model, "--model", f"vendor:command={program}", "--json", PYTHONPATH=vendor)
    assert done.code == 0, done.err
    (entry,) = done.json["costs"]
    assert entry["total"] > 0
    assert entry["settings"]["command"] == program
    failed = shell("cost", model, "--model", "vendor:command=no-such-program", PYTHONPATH=vendor)
    assert failed.code == 2
    assert "there is no program 'no-such-program'" in failed.err


def test_opening_and_listing_a_run_starts_no_program(run: Path, vendor: str, model: Path, tmp_path: Path) -> None:
    """A run's settings may name a program; only a command that computes costs starts it."""
    folder, mark, script = tmp_path / "run", tmp_path / "started", tmp_path / "program.py"
    script.write_text(f"open({str(mark)!r}, 'w').write('x')")
    program = shlex.join([sys.executable, str(script)])
    shutil.copytree(run, folder)
    facts = json.loads((folder / "run.json").read_text())
    facts["cost"] = {"name": "vendor", "command": program, "timeout_s": 5.0}
    (folder / "run.json").write_text(json.dumps(facts))
    front = json.loads((folder / "front.json").read_text())
    front["objective"] = "vendor"
    for key in ("objectives", "target_blend"):  # they would say what is made small in its place
        front.pop(key, None)
    for plan in (*front["plans"], front["trunk"]):
        for figures in (plan["select"], plan["test"], plan["worst"]):
            for key in ("cost", "cost_heads_free"):
                if key in figures:
                    figures[key]["vendor"] = figures[key]["macs"]
    (folder / "front.json").write_text(json.dumps(front))
    for arguments in (["pareto", folder], ["pareto", folder, "--json"], ["costs"], ["cost", "--run", folder]):
        done = shell(*arguments, PYTHONPATH=vendor)
        assert done.code == 0, done.err
    assert not mark.exists()
    asked = shell("cost", model, "--model", f"vendor:command={program}", PYTHONPATH=vendor)
    assert asked.code == 2
    assert mark.exists(), "the same program leaves its mark where it is started"
