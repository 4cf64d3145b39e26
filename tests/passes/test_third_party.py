"""A pass from another distribution, really installed: listed, applied through a recipe, its tunable searchable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from eexform.frontends.onnx import save
from tests.passes.helpers import CHAIN, graph_of

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "third_party_pass"

SCRIPT = textwrap.dedent("""
    import json, sys
    import eexform.passes as passes
    from eexform.frontends.onnx import load

    graph = load(sys.argv[1])
    with passes.instruments(passes.WellFormed()):
        applied = passes.load_recipe(sys.argv[2]).pipeline()(graph)
    free = passes.Recipe.parse({"pass": [{"name": "clip_activations"}]}).steps[0]
    domain = free.space(graph, passes.PassContext())["ceiling"]
    print(json.dumps({
        "listed": [entry for entry in passes.listing() if entry["name"] == "clip_activations"],
        "ops": [node.op for node in applied.graph.nodes],
        "ceiling": float(applied.graph.constants["clip_activations.high"].values),
        "free": free.free(),
        "domain": domain.describe(),
        "changed": applied.changed,
    }))
""")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sample installed by pip from a copy (building leaves traces in the source folder)."""
    import shutil

    folder = tmp_path_factory.mktemp("third_party")
    shutil.copytree(SAMPLE, folder / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder / "site")]
    done = subprocess.run([*pip, *options, str(folder / "source")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_listed_applied_and_searchable(installed: Path, tmp_path: Path) -> None:
    save(graph_of(CHAIN), tmp_path / "model.onnx")
    (tmp_path / "recipe.toml").write_text('[[pass]]\nname = "clip_activations"\nceiling = 4.0\n')
    known = [str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "model.onnx"), str(tmp_path / "recipe.toml")],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(known)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (entry,) = found["listed"]
    assert entry["distribution"] == "eexform-clip-activations 0.1.0"
    assert entry["summary"] == "Replace every Relu by a Clip to [0, ceiling]."
    assert entry["parameters"][0]["domain"] == "real 1..20 (log)"
    assert found["ops"].count("Clip") == 3
    assert "Relu" not in found["ops"]
    assert found["ceiling"] == 4.0
    assert found["changed"]
    assert (found["free"], found["domain"]) == (["ceiling"], "real 1..20 (log)")
