"""Cost models that ask a program: the distribution in samples/, really installed, and every way that it can fail."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import onnx
import pytest

from eexform.cost_models._external import ask, ask_cost, words
from eexform.errors import EexformError, OptionError
from eexform.frontends.onnx import save
from tests.passes.helpers import CHAIN, graph_of

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "external_cost_model"


def command(tmp_path: Path, code: str) -> str:
    """A command that runs this Python code."""
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(code))
    return shlex.join([sys.executable, str(script)])


def answering(tmp_path: Path, answer: Any) -> str:
    """A command that answers this whatever it is asked."""
    text = answer if isinstance(answer, str) else json.dumps(answer)
    return command(tmp_path, f"import sys\nsys.stdin.read()\nprint({text!r})")


def good(**other: Any) -> dict[str, Any]:
    """A right answer for CHAIN, entries replaced."""
    nodes = {node.name: 1.5 for node in graph_of(CHAIN).nodes}
    return {"format": 1, "unit": "ms", "nodes": nodes, "total": sum(nodes.values()), "unknown": [], **other}


# -- what it is told, and what becomes of the answer -------------------------------------------------------------------


def test_the_program_gets_the_model(tmp_path: Path) -> None:
    copied, seen = tmp_path / "copied.onnx", tmp_path / "request.json"
    code = f"""
        import json, shutil, sys
        request = json.load(sys.stdin)
        shutil.copy(request["model"], {str(copied)!r})
        open({str(seen)!r}, "w").write(json.dumps(request))
        print(json.dumps({good()!r}))
    """
    graph = graph_of(CHAIN)
    cost = ask_cost(command(tmp_path, code), graph, unit="ms", timeout_s=60)
    assert cost.total == pytest.approx(1.5 * len(graph.nodes))
    assert cost.nodes == {node.name: 1.5 for node in graph.nodes}
    assert cost.unknown == ()
    request = json.loads(seen.read_text())
    assert (request["format"], request["batch"]) == (1, 1)
    assert [node.name for node in onnx.load(copied).graph.node] == [node.name for node in graph.nodes]
    assert not Path(request["model"]).exists(), "the temporary file is gone"


def test_what_it_does_not_know_is_named(tmp_path: Path) -> None:
    nodes = {"conv1": 2.0, "conv2": 1.0, "fc": 0}
    answer = good(nodes=nodes, total=3.0, unknown=[["conv3", "Conv"]])
    cost = ask_cost(answering(tmp_path, answer), graph_of(CHAIN), unit="ms", timeout_s=60)
    assert cost.total == 3.0
    forgotten = (("relu1", "Relu"), ("relu2", "Relu"), ("relu3", "Relu"), ("pool", "GlobalAveragePool"))
    assert cost.unknown == (("conv3", "Conv"), *forgotten, ("flat", "Flatten"))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("", "did not answer in JSON"),
        ("", "its output begins with nothing: it is empty"),
        ("loading...\n{}", "its output begins with 'loading...\\n{}'"),
        ("[1]", "expected a JSON object, found [1]"),
        (good(format=2), "expected format 1, found 2"),
        (good(format=None), "expected format 1, found None"),
        (good(unit="us"), "expected figures in 'ms', found the unit 'us'"),
        (good(nodes=[1.0]), "'nodes' must be an object with a number per node, found [1.0]"),
        (good(nodes={"conv9": 1.0}, total=1.0), "the model has no node 'conv9': did you mean"),
        (good(unknown=[["conv9", "Conv"]]), "the model has no node 'conv9'"),
        (good(unknown=[["conv1", "Conv"]]), "node 'conv1' has a figure and is unknown at once"),
        (good(unknown=["conv1"]), "'unknown' must be a list of [node, operator], found ['conv1']"),
        (good(nodes={"conv1": -1.0}, total=-1.0), "node 'conv1': expected a number of at least 0, found -1.0"),
        (good(nodes={"conv1": float("nan")}, total=1.0), "node 'conv1': expected a number of at least 0, found nan"),
        (good(nodes={"conv1": "fast"}, total=1.0), "node 'conv1': expected a number of at least 0, found 'fast'"),
        (good(nodes={"conv1": True}, total=1.0), "node 'conv1': expected a number of at least 0, found True"),
        (good(nodes={"conv1": 1.0}, total=float("inf")), "'total': expected a number of at least 0, found inf"),
        (good(nodes={"conv1": 10**400}, total=1.0), "node 'conv1': expected a number of at least 0"),
        (good(nodes={"conv1": 1.0}, total=2.0), "the total is 2 ms, but the nodes add up to 1"),
        ({"format": 1, "unit": "ms", "nodes": {"conv1": 1.0}}, "'total': expected a number of at least 0, found None"),
    ],
)
def test_a_wrong_answer_is_refused(tmp_path: Path, answer: Any, says: str) -> None:
    with pytest.raises(EexformError) as caught:
        ask_cost(answering(tmp_path, answer), graph_of(CHAIN), unit="ms", timeout_s=60)
    assert says in str(caught.value)
    assert repr(sys.executable) in str(caught.value), "which program it was"


# -- a program that fails ----------------------------------------------------------------------------------------------


def test_a_failure_shows_the_last_line(tmp_path: Path) -> None:
    code = "import sys\nprint('{}')\nsys.exit('first\\nlicence not found\\n\\n')"
    with pytest.raises(EexformError, match=r"failed with exit code 1: licence not found$"):
        ask(command(tmp_path, code), {}, 60)
    with pytest.raises(EexformError, match="failed with exit code 3: it wrote nothing to standard error"):
        ask(command(tmp_path, "raise SystemExit(3)"), {}, 60)
    with pytest.raises(EexformError, match="was ended by SIGKILL"):
        ask(command(tmp_path, "import os\nos.kill(os.getpid(), 9)"), {}, 60)


def test_one_that_takes_too_long_is_stopped_with_its_children(tmp_path: Path) -> None:
    started = tmp_path / "pids"
    code = f"""
        import os, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        open({str(started)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
        time.sleep(300)
    """
    begun = time.monotonic()
    with pytest.raises(EexformError, match="gave no answer within 3 s and was stopped; raise timeout_s"):
        ask(command(tmp_path, code), {}, 3)
    assert time.monotonic() - begun < 60
    for pid in map(int, started.read_text().split()):
        assert _ended(pid), f"process {pid} is still running"


def _ended(pid: int) -> bool:
    """Whether a process is gone, or dead and merely not collected by whoever inherited it."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.05)
    return False


def test_commands_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="there is no program 'no-such-compiler': check the command"):
        ask("no-such-compiler --fast", {}, 5)
    plain = tmp_path / "not-executable"
    plain.write_text("x")
    with pytest.raises(OptionError, match="cannot be started: Permission denied"):
        ask(str(plain), {}, 5)
    with pytest.raises(OptionError, match="the command is empty"):
        words("  ")
    with pytest.raises(OptionError, match="cannot be taken apart: No closing quotation"):
        words("vendor 'model")


def test_no_shell_is_involved(tmp_path: Path) -> None:
    spared = tmp_path / "spared"
    spared.write_text("x")
    echo = "import json, sys; sys.stdin.read(); print(json.dumps(sys.argv[1:]))"
    arguments = ["$HOME", ";", "rm", str(spared), "|", "*"]
    assert words("a 'b c' \"d\"") == ["a", "b c", "d"]
    text = f"{shlex.join([sys.executable, '-c', echo])} $HOME ; rm {shlex.quote(str(spared))} | *"
    assert ask(text, {}, 60) == arguments
    assert spared.exists()


# -- the sample --------------------------------------------------------------------------------------------------------

SCRIPT = textwrap.dedent("""
    import json, shlex, sys
    import eexform as ee
    from eexform import cost_models
    from eexform.errors import OptionError
    from eexform.heads import HeadSpec

    graph, compiler = ee.load(sys.argv[1]), sys.argv[2]
    program = shlex.join([sys.executable, compiler])
    model = cost_models.parse(f"vendor:command={program},timeout_s=30")
    cost = model.cost(graph)
    sites = ee.find_sites(graph).sites
    paths = cost_models.path_costs(model, graph, sites, {site.value: [HeadSpec.parse("none/avg")] for site in sites})
    refused = []
    for settings in ({}, {"command": ""}, {"command": "x", "timeout_s": 0}):
        try:
            cost_models.make("vendor", **settings)
        except OptionError as error:
            refused.append(str(error))
    never_started = cost_models.make("vendor", command="no-such-program")
    print(json.dumps({
        "listed": [entry for entry in cost_models.listing() if entry["name"] == "vendor"],
        "nodes": dict(cost.nodes), "total": cost.total, "unknown": cost.unknown,
        "paths": paths.path([(site.value, "none/avg") for site in sites]), "trunk": paths.trunk, "refused": refused,
    }))
""")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sample installed by pip from a copy (building leaves traces in the source folder)."""
    import shutil

    folder = tmp_path_factory.mktemp("external")
    shutil.copytree(SAMPLE, folder / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(folder / "site")]
    done = subprocess.run([*pip, *options, str(folder / "source")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def test_the_sample_works(installed: Path, tmp_path: Path) -> None:
    graph = graph_of(CHAIN)
    save(graph, tmp_path / "model.onnx")
    known = [str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "model.onnx"), str(SAMPLE / "vendor_compiler.py")],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(known)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (entry,) = found["listed"]
    assert entry["distribution"] == "eexform-vendor-cost 0.1.0"
    assert (entry["unit"], entry["measured"]) == ("ms", False)
    assert [item["name"] for item in entry["settings"]] == ["command", "timeout_s"]
    # conv1: 54 parameters and 3x8x8 results of 4 bytes, at 2e6 bytes per millisecond
    assert found["nodes"]["conv1"] == pytest.approx(4 * (54 + 192) / 2e6)
    assert found["nodes"]["relu1"] == pytest.approx(4 * 192 / 2e6)
    assert found["total"] == pytest.approx(sum(found["nodes"].values()))
    assert found["unknown"] == []
    assert len(found["paths"]) == 3
    assert 0 < found["paths"][0] < found["paths"][1] < found["paths"][2]
    assert found["paths"][2] > found["trunk"] == pytest.approx(found["total"])
    needs, empty, timeout = found["refused"]
    assert "cost model 'vendor' needs a value for 'command'" in needs
    assert "the command is empty" in empty
    assert "timeout_s: 0 is not above 0" in timeout


@pytest.mark.parametrize("timeout_s", [1e7, 1e300, float("inf")])
def test_any_time_may_be_given(tmp_path: Path, timeout_s: float) -> None:
    assert ask(answering(tmp_path, {"a": 1}), {}, timeout_s) == {"a": 1}
