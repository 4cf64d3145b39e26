"""Runs in the wrong state, options with wrong values, places that cannot be written, plug-ins that are broken."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from eexform import plugins
from eexform.cli import models
from eexform.search.folder import RunFolder
from tests.cli.support import SEARCH, cli, fine, listing, refused


def rewrite(path: Path, **changes: object) -> None:
    plain = json.loads(path.read_text())
    path.write_text(json.dumps({**plain, **changes}))


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run that may be spoilt."""
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_folder_in_use(model: Path, copy: Path, tmp_path: Path) -> None:
    fresh = RunFolder(tmp_path / "fresh")
    with fresh.locked(), RunFolder(copy).locked():
        refused("search", model, *SEARCH, "--out", fresh.path, says=["fresh", "another process", "another --out"])
        refused("search", model, *SEARCH, "--resume", "--out", copy, says=["copy", "another process"])
        fine("pareto", copy)  # reading is always allowed
    assert listing(fresh.path) == [".lock"]


def test_a_folder_that_is_taken(model: Path, copy: Path, tmp_path: Path) -> None:
    refused("search", model, *SEARCH, "--out", copy, says=["copy", "holds a run already", "--resume"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    refused("search", model, *SEARCH, "--out", tmp_path / "mine", says=["mine", "not empty", "--out"])
    refused("search", model, *SEARCH, "--resume", "--out", tmp_path / "nowhere", says=["nowhere", "holds no run"])
    refused("quickstart", "--out", tmp_path / "mine", says=["mine", "exists already", "--out"])
    refused("export", copy, "--form", "stages", "-o", tmp_path / "mine", says=["mine", "thesis.tex", "new folder"])
    refused("export", copy, "--form", "torch", "-o", tmp_path / "ee.onnx", says=["no onnx file", "ee.pt2"])
    refused("export", copy, "-o", tmp_path / "ee.pt2", says=["the form if is no pt2 file", "ee.onnx"])
    refused("export", copy, "-o", tmp_path / "mine", says=["mine", "is a folder"])
    refused("export", copy, "--form", "stages", "-o", model, says=["model.onnx", "is a file"])
    assert listing(tmp_path / "mine") == ["thesis.tex"]
    assert not (tmp_path / "nowhere").exists()


def test_a_run_of_a_newer_version(model: Path, copy: Path, tmp_path: Path) -> None:
    rewrite(copy / "run.json", format=99, eexform="9.1.0")
    for arguments in (
        ("pareto", copy),
        ("export", copy, "-o", tmp_path / "x.onnx"),
        ("search", model, *SEARCH, "--resume", "--out", copy),
    ):
        refused(*arguments, says=["copy", "eexform 9.1.0", "format 99", "upgrade"])
    assert not (tmp_path / "x.onnx").exists()


def test_an_export_of_a_newer_version(model: Path, run: Path, exported: Path, tmp_path: Path) -> None:
    newer = onnx.load(exported)
    next(entry for entry in newer.metadata_props if entry.key == "eexform.version").value = "9.1.0"
    onnx.save(newer, tmp_path / "newer.onnx")
    refused(
        "verify", tmp_path / "newer.onnx", "--against", model, "--run", run, says=["newer.onnx", "9.1.0", "install"]
    )
    fine("export", run, "--pick", "3", "--form", "stages", "-o", tmp_path / "stages")
    rewrite(tmp_path / "stages" / "manifest.json", format=99)
    for command in (("verify", tmp_path / "stages", "--against", model), ("bench", tmp_path / "stages", "--vs", model)):
        refused(*command, "--run", run, says=["manifest.json", "99"])


def test_a_run_that_is_damaged(copy: Path, tmp_path: Path) -> None:
    (copy / "front.json").write_text('{"plans": [')
    refused("pareto", copy, says=["front.json", "damaged"])
    (copy / "front.json").unlink()
    refused("pareto", copy, says=["no front", "--resume"])
    (copy / "run.json").write_text("[]")
    refused("pareto", copy, says=["run.json", "damaged"])


def test_a_run_whose_heads_are_gone(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "bank")
    fine("pareto", copy)
    refused("export", copy, "--pick", "3", "-o", tmp_path / "x.onnx", says=["head"])
    assert not (tmp_path / "x.onnx").exists()


def test_resuming_with_other_options(model: Path, copy: Path) -> None:
    refused(
        "search", model, *SEARCH, "--epochs", "3", "--resume", "--out", copy, says=["cannot resume", "epochs", "6", "3"]
    )
    refused("search", model, *SEARCH, "--seed", "5", "--resume", "--out", copy, says=["cannot resume", "seed"])


def test_resuming_what_is_done(model: Path, copy: Path) -> None:
    before = fine("pareto", copy, "--json").json
    after = fine("search", model, *SEARCH, "--resume", "--out", copy, "--json").json
    assert after["plans"] == before["plans"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--population", "10"), ["population", "10", "multiple of 4"]),
        (("--epochs", "0"), ["epochs", "0", "at least 1"]),
        (("--epochs", "few"), ["--epochs", "integer"]),
        (("--trust", "2"), ["trust", "between 0 and 1"]),
        (("--cost", "mcas"), ["'mcas'", "did you mean", "macs"]),
        (("--cost", "latency_ort:threds=1"), ["latency_ort", "threds", "threads"]),
        (("--head", "conv:2x"), ["conv:2x"]),
        (("--head", "konv:1x8/avg"), ["konv", "conv"]),
        (("--site", "stage0_block0_relu"), ["stage0_block0_relu", "stage0_block0_relu_out"]),
        (("--max-cost", "cheap"), ["max-cost", "cheap"]),
        (("--min-accuracy", "high"), ["min-accuracy", "high"]),
        (("--recipe", "absent.toml"), ["absent.toml", "no such file"]),
        (("--limit", "0"), ["--limit", "greater than or equal to 1"]),
        (("--no-such-option",), ["--no-such-option"]),
    ],
)
def test_wrong_values(options: tuple[str, ...], says: list[str], model: Path, tmp_path: Path) -> None:
    refused("search", model, *SEARCH, *options, "--out", tmp_path / "run", says=says)
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--pick", "99"), ["no plan 99", "0 to"]),
        (("--pick", "best"), ["'best'", "knee", "max-cost=0.6x"]),
        (("--pick", "max-cost=0.01x"), ["no plan costs at most", "cheapest"]),
        (("--pick", "min-accuracy=0.99999"), ["no plan has an accuracy", "best one"]),
        (("--pick", "min-accuracy=91"), ["min-accuracy=91", "0..1"]),
        (("--form", "iff"), ["--form", "'iff'", "'if'"]),
        (("--form", "multi", "--thresholds-as-input"), ["--thresholds-as-input", "multi"]),
    ],
)
def test_wrong_picks(arguments: tuple[str, ...], says: list[str], run: Path, tmp_path: Path) -> None:
    refused("export", run, *arguments, "-o", tmp_path / "x.onnx", says=says)
    assert listing(tmp_path) == []


def test_a_plan_without_exits(copy: Path, tmp_path: Path) -> None:
    front = json.loads((copy / "front.json").read_text())
    front["plans"][1]["exits"] = []
    rewrite(copy / "front.json", **front)
    out = tmp_path / "x.onnx"
    refused("export", copy, "--pick", "1", "-o", out, says=["plan 1", "the model alone", "eexform pareto"])
    assert not out.exists()


def test_wrong_values_of_verify_and_bench(run: Path, model: Path, exported: Path) -> None:
    refused("verify", exported, "--against", model, says=["--run", "--data"])
    refused(
        "verify", exported, "--against", model, "--run", run, "--split", "tets", says=["'tets'", "did you mean 'test'"]
    )
    refused("verify", exported, "--against", model, "--run", run, "--samples", "0", says=["--samples", "greater"])
    refused("bench", exported, "--vs", model, "--run", run, "--batch", "0", says=["--batch", "greater"])
    refused("bench", exported, "--vs", model, says=["--run", "--data"])


def test_recipes(model: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "r.toml", tmp_path / "out.onnx"

    def apply(text: str, *more: str, says: list[str]) -> None:
        recipe.write_text(text)
        refused("apply", model, recipe, "-o", out, *more, says=says)
        assert not out.exists()

    apply('[[pass]]\nname = "fold_batchnorm"\n', says=["r.toml", "'fold_batchnorm'", "did you mean 'fold_batch_norm'"])
    apply(
        '[[pass]]\nname = "simplify"\ncompre = true\n',
        says=["r.toml", "simplify", "'compre'", "did you mean 'compare'"],
    )
    apply('[[pass]]\nname = "simplify"\ncompare = 3\n', says=["r.toml", "compare"])
    apply('[[pass]]\nname = "insert_exits"\n', says=["insert_exits", "sites"])
    apply("[[pass]]\nname = \n", says=["r.toml"])
    apply('[[pass]]\nname = "remove_dead"\n', "--form", "if", says=["--form if", "no exits"])
    recipe.write_text('[[pass]]\nname = "simplify"\n')
    assert fine("apply", model, recipe, "-o", out, "--json").json["form"] == "none"
    (tmp_path / "r.yaml").write_text("a: 1")
    refused("apply", model, tmp_path / "r.yaml", "-o", out, says=["r.yaml", ".toml", ".json"])


def test_places_that_cannot_be_written(model: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    inside = tmp_path / "file" / "below"
    refused("search", model, *SEARCH, "--out", inside, says=["below", "cannot be written"])
    refused("export", run, "--pick", "3", "-o", inside, says=["below", "cannot be written"])
    refused("export", run, "--pick", "3", "--form", "stages", "-o", inside, says=["below", "cannot be written"])
    refused(
        "export",
        run,
        "--pick",
        "3",
        "--form",
        "plan",
        "-o",
        inside.with_suffix(".toml"),
        says=["below", "cannot be written"],
    )
    assert listing(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the administrator may write everywhere")
def test_folders_without_permission(model: Path, run: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        refused("search", model, *SEARCH, "--out", tmp_path / "run", says=["run", "cannot be written", "ermission"])
        refused(
            "export", run, "--pick", "3", "-o", tmp_path / "x.onnx", says=["x.onnx", "cannot be written", "ermission"]
        )
    finally:
        tmp_path.chmod(0o700)
    assert listing(tmp_path) == []


@pytest.fixture
def broken_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed distribution whose modules cannot be imported, one for each reason."""
    site = tmp_path / "site"
    info = site / "broken-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.2\n")
    (site / "broken_raises.py").write_text("raise RuntimeError('needs a newer compiler')\n")
    (site / "broken_empty.py").write_text("")
    points = {
        "eexform.passes": {
            "absent_pass": "nowhere_at_all:X",
            "raising_pass": "broken_raises:X",
            "empty_pass": "broken_empty:X",
        },
        "eexform.cost_models": {"absent_cost": "nowhere_at_all:X"},
        "eexform.measures": {"absent_measure": "nowhere_at_all:X"},
        "eexform.head_layers": {"absent_layer": "nowhere_at_all:X"},
        "eexform.data_sources": {"absent_source": "nowhere_at_all:X"},
    }
    lines = [
        line for group, items in points.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in items.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(site))
    plugins.refresh()
    yield
    monkeypatch.undo()
    plugins.refresh()


@pytest.mark.usefixtures("broken_plugins")
def test_broken_plugins_are_listed_and_harm_nobody(model: Path, tmp_path: Path) -> None:
    errors = {entry["name"]: entry["error"] for entry in fine("passes", "--json").json["passes"]}
    assert errors["fold_batch_norm"] is None
    assert "nowhere_at_all" in errors["absent_pass"]
    assert "needs a newer compiler" in errors["raising_pass"]
    assert "broken_empty" in errors["empty_pass"]
    shown = fine("passes").out
    assert "cannot be loaded" in shown
    assert "[broken 1.2]" in shown
    assert "cannot be loaded" in fine("costs").out
    fine("search", model, *SEARCH, "--generations", "0", "--out", tmp_path / "run")
    refused(
        "search",
        model,
        *SEARCH,
        "--cost",
        "absent_cost",
        "--out",
        tmp_path / "r2",
        says=["absent_cost", "broken", "nowhere_at_all"],
    )
    (tmp_path / "r.toml").write_text('[[pass]]\nname = "absent_pass"\n')
    refused("apply", model, tmp_path / "r.toml", "-o", tmp_path / "x.onnx", says=["absent_pass", "broken"])


def test_tracebacks_are_for_those_who_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EEXFORM_DEBUG", raising=False)
    absent = tmp_path / "absent.onnx"
    assert "Traceback" not in cli("inspect", absent).err
    done = cli("--debug", "inspect", absent)
    assert done.code == 2
    assert "Traceback" in done.err
    assert "ModelError" in done.err
    assert "Traceback" not in cli("inspect", absent).err

    def crash(*_: object, **__: object) -> None:
        raise ValueError("out of tune")

    monkeypatch.setattr(models.options, "load_model", crash)
    done = cli("inspect", absent)
    assert done.code == 1
    assert done.out == ""
    assert "eexform is at fault here: ValueError: out of tune" in done.err
    assert "eexform --debug" in done.err
    assert "Traceback" not in done.err
    assert "Traceback" in cli("--debug", "inspect", absent).err
