"""What is shipped: entry points, typing marker, version, nothing of anybody's machine, light imports."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import pytest

import eexform
from eexform import plugins

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
GROUPS: dict[str, dict[str, str]] = PROJECT["project"]["entry-points"]
POINTS = [(group, name, target) for group, points in GROUPS.items() for name, target in points.items()]


def _python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _loaded(code: str, *modules: str) -> set[str]:
    """Which of ``modules`` a fresh interpreter has imported after ``code``."""
    printed = _python(f"{code}\nimport sys\nprint(*[name for name in {modules!r} if name in sys.modules])")
    return set(printed.split())


# -- entry points ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "name", "target"), POINTS, ids=[f"{group}-{name}" for group, name, _ in POINTS])
def test_entry_point_loads(group: str, name: str, target: str) -> None:
    module, _, attribute = target.partition(":")
    assert plugins.load(group, name) is getattr(import_module(module), attribute)
    assert getattr(plugins.load(group, name), "name", name) == name or group == "eexform.data_sources"


def test_installed_entry_points_are_those_of_the_project() -> None:
    assert set(GROUPS) == set(plugins.GROUPS)
    for group, points in GROUPS.items():
        ours = {point.name: point.value for point in entry_points(group=group) if point.dist.name == "eexform"}
        assert ours == points, f"{group}: install the project again"


def test_the_command_is_there() -> None:
    module, _, attribute = PROJECT["project"]["scripts"]["eexform"].partition(":")
    assert callable(getattr(import_module(module), attribute))


def test_passes_and_cost_models_are_one_file_each() -> None:
    for group, folder in (("eexform.passes", "passes"), ("eexform.cost_models", "cost_models")):
        for name in GROUPS[group]:
            assert (ROOT / folder / f"{name}.py").is_file()


# -- what is shipped ---------------------------------------------------------------------------------------------------


def test_typing_marker_is_shipped() -> None:
    assert Path(eexform.__file__).with_name("py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["eexform"]


def test_every_package_is_shipped() -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "eexform").rglob("__init__.py")}
    inside = {".".join(folder.parts) for folder in folders} - {"eexform.passes", "eexform.cost_models"}
    assert {*inside, "eexform.passes", "eexform.cost_models"} == set(PROJECT["tool"]["setuptools"]["packages"])


def test_one_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[?(\d+\.\d+\.\d+)\]? - (\d{4}-\d{2}-\d{2})$", changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["project"]["version"] == eexform.__version__ == version("eexform")


def test_extras_and_licence() -> None:
    assert {"hf", "dev"} <= set(PROJECT["project"]["optional-dependencies"])
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")[:400]


# -- nobody's machine --------------------------------------------------------------------------------------------------

_MACHINE = re.compile(r"(?:^|[^\w.~/-])/(?:work|root|home|tmp|mnt|Users|opt)/[\w.]|[A-Z]:\\\\?Users")
_MADE_UP = "/home/somebody/"


def _tracked() -> list[Path]:
    try:
        done = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_paths_of_a_machine() -> None:
    found = []
    for path in _tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if _MACHINE.search(line.replace(_MADE_UP, "")):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("line", ["open('" + "/ro" + "ot/x')", "see " + "/wo" + "rk/a.py", " C:" + "\\Users\\me"])
def test_paths_of_a_machine_are_noticed(line: str) -> None:
    assert _MACHINE.search(line)


@pytest.mark.parametrize("line", ["docs/home/x.md", "https://example.org/home/x", 'prefixes = ("/home/", "/tmp/")'])
def test_other_slashes_are_not(line: str) -> None:
    assert not _MACHINE.search(line)


# -- imports -----------------------------------------------------------------------------------------------------------


def test_importing_eexform_is_light() -> None:
    assert not _loaded(
        "import eexform", "torch", "onnx", "onnxruntime", "onnx_graphsurgeon", "networkx", "deap", "numpy"
    )


def test_the_runtime_needs_numpy_and_onnxruntime_only() -> None:
    heavy = (
        "torch",
        "onnx",
        "onnx_graphsurgeon",
        "networkx",
        "deap",
        "scipy",
        "sklearn",
        "safetensors",
        "rich",
        "typer",
    )
    for code in ("import eexform.runtime", "import eexform as ee; ee.StagedSession"):
        assert _loaded(code, "numpy", "onnxruntime", *heavy) == {"numpy", "onnxruntime"}


def test_everything_offered_is_there() -> None:
    for name in eexform.__all__:
        assert getattr(eexform, name) is not None
    assert set(eexform.__all__) <= set(dir(eexform))
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        _ = eexform.serach  # type: ignore[attr-defined]


def test_functions_stay_functions_whatever_was_imported() -> None:
    """The package ``eexform.search`` and the function of that name: both must be reachable, in any order."""
    names = [name for name in eexform.__all__ if name[0].islower()]
    code = f"""
import inspect
import eexform as ee
import eexform.search.run, eexform.verification.verify
for _ in range(2):
    for name in {names!r}:
        assert callable(getattr(ee, name)), name
assert "resume" in inspect.signature(ee.search).parameters
try:
    ee.search()
except TypeError as error:
    print(error)
from eexform.search.driver import search
import eexform.search.options as options
assert callable(search) and options.SearchOptions is ee.SearchOptions
"""
    assert "missing 2 required positional arguments: 'graph' and 'data'" in _python(code)
